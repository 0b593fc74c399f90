"""The passes of one training forward, and the Barrier that joins what the later passes leave.

    forward    pass 0 -> Barrier ->  thought -> Gate -> pass 1 ->  thought -> Gate -> pass 2 -> loss
    backward   pass 0 <- Barrier <------------- Gate <- pass 1 <------------- Gate <- pass 2 <-

The Barrier is an identity on the first pass's hidden states.  Every later pass begins with a Gate that has an
edge to the Barrier, so the Barrier's backward comes after those of all later passes, even where a thought
cuts the graph, and before that of every layer of the first.  There the rows that the one-column passes left
in each layer are joined for all layers of one shape at once, and the gradients of biases and norms are made.

Shapes: B rows, T columns, D hidden size, L layers of one shape, R rows of all one-column passes, I inputs, O
outputs of a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pass:
    """Columns [start, stop), run at once.  They see each other causally, and the column ranges in `past`."""

    start: int
    stop: int
    past: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        assert all(start < stop <= self.start for start, stop in self.past)

    @cached_property
    def is_short(self) -> bool:
        """Whether it is a later pass of one column, so that all layers' rows are kept and joined."""
        return bool(self.past) and self.stop - self.start == 1

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The column ranges that it sees, its own included; adjacent ones are joined."""
        ranges: list[tuple[int, int]] = []
        for start, stop in sorted([*self.past, (self.start, self.stop)]):
            if ranges and ranges[-1][1] == start:
                ranges[-1] = ranges[-1][0], stop
            else:
                ranges.append((start, stop))
        return tuple(ranges)

    @property
    def hidden(self) -> tuple[tuple[int, int], ...]:
        """The ranges of earlier columns that it does not see."""
        stops = [0, *(stop for _, stop in self.ranges)]
        gaps = [(stop, start) for stop, (start, _) in zip(stops, self.ranges, strict=False)]
        return tuple(gap for gap in gaps if gap[0] < gap[1])

    def visible(self, x: Tensor, dim: int) -> Tensor:
        """The columns of `x` that it sees: a view, if they are adjacent."""
        parts = [x.narrow(dim, start, stop - start) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def spans(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """Ranges that it sees within [low, high): (start, stop, index of start among the visible)."""
        offset = 0
        for start, stop in self.ranges:
            first, last = max(start, low), min(stop, high)
            if first < last:
                yield first, last, offset + first - start
            offset += stop - start


ONLY_PASS = Pass(0, 0)


class Step:
    """One forward of several passes, and what its later passes leave for the backward of the first.

    positions_BT, mask_BT: position ids and padding mask of the columns of all passes.
    """

    def __init__(
        self,
        passes: Sequence[Pass] = (ONLY_PASS,),
        positions_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
    ) -> None:
        self.passes, self.positions_BT, self.mask_BT = passes, positions_BT, mask_BT
        self.per_position: dict[int, Iterator[Any]] = {}  # what a module makes of the positions, pass by pass
        self.rows: dict[int, Rows] = {}
        self.lookups: dict[int, Any] = {}  # by the id of an embedding's weight
        self.at_barrier: list[Callable[[], None]] = []
        self.layers: list[Any] = []  # of the buffer of keys and values
        self.anchor: Tensor | None = None
        self.recorded_passes: Any = None  # of the model, if layers of the first pass may run from recordings
        self.layer_arguments: Any = None  # of the layer before
        self.state: Any = None  # of the model, as recorded passes need it
        self.recorder: Any = None  # of the pass that is being recorded
        self.recorded = False  # whether one of its later passes was
        self._is_watched = False
        self._ones: dict[Any, Tensor] = {}

    def forget_graph(self) -> None:
        """Release the graph at the end of the forward; its nodes keep what the backward needs."""
        self.anchor = self.layer_arguments = None
        self.per_position.clear()

    def split(self, x_BT: Tensor) -> tuple[Tensor, ...]:
        """Split columns by pass, once; their gradients are joined by one concatenation."""
        return x_BT.split([run.stop - run.start for run in self.passes], dim=1)

    def enter(self, embeds_BTD: Tensor) -> Tensor:
        """Begin a later pass."""
        return embeds_BTD if self.anchor is None else _Gate.apply(embeds_BTD, self.anchor)

    def leave_first(self, hidden_BTD: Tensor) -> Tensor:
        """End the first pass."""
        if len(self.passes) == 1 or not hidden_BTD.requires_grad:
            return hidden_BTD
        vectors = [vector for rows in self.rows.values() for vector in rows.vectors]
        hidden_BTD, self.anchor = _Barrier.apply(hidden_BTD, self, *vectors)
        return hidden_BTD

    def join(self) -> dict[int, Tensor]:
        """Join the rows of layers of one shape; returns the gradients of their vectors, by id."""
        self.watch()
        for join in self.at_barrier:
            join()
        groups: dict[Any, list[Rows]] = {}
        for rows in self.rows.values():
            if rows.douts or rows.leaves:
                groups.setdefault(rows.group(), []).append(rows)
        gradients: dict[int, Tensor] = {}
        for group in groups.values():
            x_LRI = dy_LRO = None
            if group[0].douts:
                x_LRI = _stacked([x for rows in group for x in rows.taken_inputs()], len(group))
                dy_LRO = _stacked([dy for rows in group for dy in rows.taken_douts()], len(group))
            gradients |= type(group[0]).gradients(group, x_LRI, dy_LRO)
        return gradients

    @contextmanager
    def recording(self, recorder: Any) -> Iterator[None]:
        """Enclose a forward or backward that `recorder` writes down."""
        self.recorder = recorder
        try:
            with recorder:
                yield
        finally:
            self.recorder = None

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`; in a recording, a single call."""
        return function(*args) if self.recorder is None else self.recorder.call(function, *args)

    def ones(self, like_MO: Tensor) -> Tensor:
        """A column of ones for the rows of `like_MO`; made once."""
        key = like_MO.shape[0], like_MO.dtype
        if key not in self._ones:
            self._ones[key] = like_MO.new_ones(like_MO.shape[0])
        return self._ones[key]

    def watch(self) -> None:
        """Have autograd check at the end of this backward that no rows are left."""
        if not self._is_watched:
            self._is_watched = True
            torch.autograd.Variable._execution_engine.queue_callback(self._assert_collected)

    def _assert_collected(self) -> None:
        self._is_watched = False
        self._ones.clear()
        queues = [*self.rows.values(), *self.lookups.values(), *self.layers]
        left_behind = any([queue.clear() for queue in queues])
        if left_behind:
            raise RuntimeError(
                "this backward ran the later passes of a layer but not its first, so the layer's gradient is "
                "incomplete. Call backward() on the complete loss; for torch.autograd.grad() of some inputs "
                "set latent_memory.deferred_weight_gradients to false and segmented_cache to false."
            )


class Context:
    """The forward in progress and its current pass.  The modules of a model share one instance."""

    def __init__(self, is_deferring: bool = True) -> None:
        self.is_deferring = is_deferring  # latent_memory.deferred_weight_gradients
        self.step: Step | None = None
        self.current = ONLY_PASS
        self.positions_BT: Tensor | None = None  # position ids of the current pass
        self.is_recomputing = False

    @contextmanager
    def running(
        self,
        step: Step | None,
        current: Pass = ONLY_PASS,
        positions_BT: Tensor | None = None,
        is_recomputing: bool = False,
    ) -> Iterator[None]:
        """Enclose a forward, one of its passes, or the recomputation of a layer in the backward."""
        outer = self.step, self.current, self.positions_BT, self.is_recomputing
        self.step, self.current, self.positions_BT, self.is_recomputing = (
            step,
            current,
            positions_BT,
            is_recomputing,
        )
        try:
            yield
        finally:
            self.step, self.current, self.positions_BT, self.is_recomputing = outer

    def defers(self, weight: Tensor, input: Tensor | None = None) -> bool:
        """Whether the gradient of this weight is to be deferred now, in a call on `input`."""
        return (
            self.is_deferring
            and (input is None or input.requires_grad or not self.current.past)
            and self.step is not None
            and weight.requires_grad
            and torch.is_grad_enabled()
            and not is_partitioned(weight)
            and not is_autocast(weight)
        )

    def rows_of(self, module: nn.Module, input: Tensor) -> Any:
        """The rows of a layer that deferred in an earlier pass, or None.

        An input without a gradient, as in DoRA's norms, is no part of the pass that the Gate orders.
        """
        if self.step is None or not input.requires_grad:
            return None
        return self.step.rows.get(id(module))

    def by_position(self, module: nn.Module, positions_BT: Tensor, make: Callable[[Tensor], Any]) -> Any:
        """`make(position ids)`: for all columns at the first pass, then the part of the current pass."""
        step = self.step
        if step is None or step.positions_BT is None or positions_BT is not self.positions_BT:
            return make(positions_BT)
        if id(module) not in step.per_position:
            made = make(step.positions_BT)
            parts = step.split(made) if isinstance(made, Tensor) else zip(*map(step.split, made), strict=True)
            step.per_position[id(module)] = iter(parts)
        return next(step.per_position[id(module)])


def is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 owns the weight, so that its gradient cannot be deferred.

    Such a weight exists only between the hooks of its module's own forward and backward.
    """
    return hasattr(weight, "ds_id")


def is_autocast(tensor: Tensor) -> bool:
    """Whether operators on the tensor run under autocast, which the meta device of plans does not have."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def keeps_graph() -> bool:
    """Whether the backward in progress was called with retain_graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


class _Gate(torch.autograd.Function):
    """The input of a later pass; its backward is the last of the pass and comes before the Barrier's."""

    @staticmethod
    def forward(ctx, embeds_BTD, anchor):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        return embeds_BTD.view_as(embeds_BTD)

    @staticmethod
    def backward(ctx, dembeds_BTD):  # type: ignore[override]
        return dembeds_BTD, None


class _Barrier(torch.autograd.Function):
    """The hidden states of the first pass, and the anchor of the later passes."""

    @staticmethod
    def forward(ctx, hidden_BTD, step, *vectors):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.step, ctx.vectors = step, [id(vector) for vector in vectors]
        return hidden_BTD.view_as(hidden_BTD), hidden_BTD.new_empty(0)

    @staticmethod
    def backward(ctx, dhidden_BTD, _):  # type: ignore[override]
        gradients = ctx.step.join()
        return dhidden_BTD, None, *(gradients.get(vector) for vector in ctx.vectors)


class Rows:
    """Rows that the later passes leave for one layer."""

    renewed: "Callable[[], Rows]"  # empty rows of the same layer, for another step

    def __init__(self, weight: Tensor, bias: Tensor | None, *vectors: Tensor | None) -> None:
        self.parameters = weight, bias
        self.vectors = [vector for vector in vectors if vector is not None and vector.requires_grad]
        self.inputs: list[Tensor] = []  # of the one-column passes
        self.douts: dict[int, Tensor] = {}
        self.leaves: list[list[Tensor]] = []  # stand-ins for the vectors, of each wide pass

    @cached_property
    def weight(self) -> Tensor:
        return self.parameters[0].detach()

    @cached_property
    def bias(self) -> Tensor | None:
        bias = self.parameters[1]
        return None if bias is None else bias.detach()

    def record(self, x: Tensor, y: Tensor) -> Tensor:
        """Keep x now and the gradient of y, the layer's output, in the backward."""
        y.register_hook(partial(self.douts.__setitem__, len(self.inputs)))
        self.inputs.append(x.detach())
        return y

    def next_index(self, is_short: bool) -> int:
        """Index of what the next later pass will leave."""
        return len(self.inputs if is_short else self.leaves)

    def stand_ins(self) -> list[Tensor]:
        """The vectors for a wide pass; the Barrier takes their gradients, for all layers at once."""
        self.leaves.append([vector.detach().requires_grad_() for vector in self.vectors])
        return self.leaves[-1]

    def group(self) -> Any:
        """Rows of equal groups can be stacked."""
        # Of equal width and number: a norm of queries has more rows than one of grouped keys.
        counts = [dy.numel() for dy in self.douts.values()]
        shape = (self.inputs[0].shape[-1], *self.douts, *counts) if self.douts else None
        weight, bias = self.parameters
        return (
            type(self),
            shape,
            weight.shape,
            weight.dtype,
            bias is None,
            len(self.leaves),
            len(self.vectors),
        )

    def taken_inputs(self) -> list[Tensor]:
        """Inputs of the rows with a gradient; without retain_graph the list is emptied."""
        inputs = self.inputs
        if len(inputs) > len(self.douts):
            inputs = [inputs[index] for index in sorted(self.douts)]
        if not keeps_graph():
            self.inputs = []
        return inputs

    def taken_douts(self) -> list[Tensor]:
        douts = [dy for _, dy in sorted(self.douts.items())]
        self.douts.clear()
        return douts

    def clear(self) -> bool:
        """Forget all rows; returns whether there were any."""
        had_any = bool(self.douts)
        self.douts.clear()
        return had_any

    @staticmethod
    def gradients(group: list[Any], x_LRI: Tensor | None, dy_LRO: Tensor | None) -> dict[int, Tensor]:
        """Take the rows of a group of layers; returns the gradients of their vectors, by id."""
        raise NotImplementedError


def _stacked(parts: list[Tensor], count: int) -> Tensor:
    if len({part.dim() for part in parts}) > 1:  # those of a recorded pass have no column
        parts = [part.flatten(0, -2) for part in parts]
    return torch.cat(parts).view(count, -1, parts[0].shape[-1])
