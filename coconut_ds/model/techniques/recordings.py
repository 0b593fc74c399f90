"""A pass, or a layer of the first pass, outside of the modules' graph: recorded, or run from a recording.

    Recording        the modules run it, forward and backward, and their operators are written down
    LayerRecording   the same of a layer of the first pass
    Repetition       forward(weights, layers, run, ..., inputs) -> hidden, saved
                     backward(weights, layers, run, ..., saved, dhidden) -> gradients, part by part

Its autograd functions are a chain, one per part of the weights, so that the hooks of a part run before the
gradients of the next are computed, as with modules; ZeRO needs no more memory for them:

    forward    inputs, first weights -> token -> token, weights -> ... -> token, last weights -> hidden
    backward   dinputs, dweights   <- token  <-  dweights       <- ... <- dweights            <- dhidden

Shapes: B rows, D hidden size.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from coconut_ds.model.techniques.deferred_grads import LinearRows
from coconut_ds.model.techniques.kv_buffer import Layer
from coconut_ds.model.techniques.passes import Pass, Step, keeps_graph
from coconut_ds.model.techniques.recorder import NotRecordable, Program, Recorder

logger = logging.getLogger(__name__)

HAS_RUN = "the backward of this pass has run already; call the first with retain_graph=True"


@dataclass(frozen=True)
class Columns:
    """Where a pass is: its first column, its width and the columns of the batch."""

    start: int
    width: int
    total: int


@dataclass
class Kind:
    """Passes with equal rows, dtype and trained weights."""

    recordings: dict[Columns, Program] = field(default_factory=dict)
    programs: dict[int, Program] = field(default_factory=dict)  # for all columns, by width; 0: all widths
    candidates: list[Program] = field(default_factory=list)  # for all widths, until a third recording agrees
    seen_in: Callable[[], Step | None] | None = None  # the step of its first pass, by weak reference
    is_refused: bool = False

    def program(self, usual: "Usual") -> Program | None:
        if self.is_refused or not self.recordings:
            return None
        if 0 in self.programs:
            return self.programs[0]
        return self.programs.get(usual.columns.width) or self.recordings.get(usual.columns)

    def add(self, columns: Columns, program: Program) -> None:
        for seen, other in self.recordings.items():
            if seen.start == columns.start or seen.total == columns.total:
                continue
            both = other.generalized(seen.width, program, columns.width)
            if both is None:
                continue
            if seen.width == columns.width:
                self.programs[columns.width] = both
            elif any(both.code == candidate.code for candidate in self.candidates):
                self.programs[0] = both
            else:
                self.candidates.append(both)
        self.recordings[columns] = program

    def refuse(self, reason: str) -> None:
        self.is_refused = True
        logger.info("latent passes run without a recording: %s", reason)


@dataclass
class Usual:
    """A later pass, or a layer of the first one, as the modules run it."""

    step: Step
    run: Pass
    weights: list[Tensor]
    fixed: dict[str, Any]
    call: Callable[[Sequence[Tensor]], Tensor]  # of the inputs, in place of which a recording has its own
    trained: Sequence[Tensor] = ()  # weights whose gradients are its own to return

    @property
    def columns(self) -> Columns:
        run, total = self.run, self.step.passes[-1].stop
        width = run.stop - run.start
        # A first pass is as free as the columns behind it; an only pass has none.
        return Columns(run.start if run.past else (total - width or width), width, total)


class Runner:
    """A pass outside of the modules' graph."""

    parts: Sequence[Sequence[int]] = ((),)  # of the trained weights, by index

    def __init__(self, usual: Usual) -> None:
        self.step, self.is_short = usual.step, usual.run.is_short
        self.result: Tensor | None = None
        self.gradients: Iterator[Sequence[Tensor | None]] = iter(())

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def backward(self, dhidden_BSD: Tensor) -> Iterator[Sequence[Tensor | None]]:
        """The gradients of each part, from the last."""
        raise NotImplementedError

    def run(self, inputs: Sequence[Tensor], trained: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            self.result = self.forward(inputs)
        x = list(inputs)
        for number, part in enumerate(self.parts):
            x = [_Part.apply(self, number, *x, *(trained[index] for index in part))]
        return x[0]

    def leave(self, number: int) -> Tensor:
        """What a part returns: the last one the hidden states, others a token."""
        result = self.result
        assert result is not None
        if number < len(self.parts) - 1:
            return result.new_empty(0)
        self.token, self.result = result.new_empty(0), None
        return result

    def take(self, number: int, dhidden_BSD: Tensor) -> Sequence[Tensor | None]:
        """The gradients of a part."""
        if number == len(self.parts) - 1:
            self.step.watch()
            self.gradients = self.backward(dhidden_BSD.contiguous())
        gradients = next(self.gradients)
        if number == 0:
            self.gradients = iter(())
            return gradients
        return self.token, *gradients


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx, runner, number, *inputs_and_weights):  # type: ignore[override]
        ctx.runner, ctx.number = runner, number
        return runner.leave(number)

    @staticmethod
    def backward(ctx, dhidden_BSD):  # type: ignore[override]
        return None, None, *ctx.runner.take(ctx.number, dhidden_BSD)


def _taken(given: list[Any]) -> list[Any]:
    """The list, which is left empty, so that nothing holds the tensors while their hooks run."""
    values = list(given)
    given.clear()
    return values


class Repetition(Runner):
    """A pass that runs from a recording."""

    def __init__(self, usual: Usual, program: Program) -> None:
        super().__init__(usual)
        step, self.program, self.parts = usual.step, program, program.parts
        self.rows = [step.rows[module] for module in program.modules]
        self.owners = usual.weights, step.layers, step.rows, usual.run, *usual.fixed.values()
        self.saved: list[Tensor] | None = None
        self.indices: list[int] = []

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        inputs = [x.detach() for x in inputs]
        with torch._C._AutoDispatchBelowAutograd():
            hidden_BSD, xs, saved = self.program.forward(*self.owners, inputs)
        self.saved = saved
        self.indices = [rows.next_index(self.is_short) for rows in self.rows]
        for rows, x in zip(self.rows, xs, strict=True):
            if self.is_short:
                rows.inputs.append(x)
            else:
                rows.stand_ins()
        return hidden_BSD

    def backward(self, dhidden_BSD: Tensor) -> Iterator[Sequence[Tensor | None]]:
        if self.saved is None:
            raise RuntimeError(HAS_RUN)
        saved, self.saved = self.saved, self.saved if keeps_graph() else None
        given: list[Any] = []
        pauses = self.program.backward(*self.owners, given, dhidden_BSD, *saved)
        del dhidden_BSD, saved
        for _ in self.parts[1:]:
            with torch._C._AutoDispatchBelowAutograd():
                next(pauses)
            yield _taken(given)
        with torch._C._AutoDispatchBelowAutograd():
            next(pauses)
        for rows, index, dy in zip(self.rows, self.indices, given.pop(), strict=True):
            if not self.is_short:
                for leaf, dleaf in zip(rows.leaves[index], dy, strict=True):
                    leaf.grad = dleaf
            elif dy is not None:
                rows.douts[index] = dy
        yield _taken(given)


class Recording(Runner):
    """A pass that runs as usual and is recorded, forward and backward."""

    replaced: Mapping[Callable[..., Any], Callable[..., Any]] = {}
    pauses: Sequence[Sequence[LinearRows]] = ()  # of the backward, in its order

    def __init__(self, usual: Usual, kind: Kind) -> None:
        super().__init__(usual)
        self.usual, self.kind, self.is_done = usual, kind, False
        self.recorder = Recorder(usual.weights, usual.step.rows, usual.fixed, "inputs")

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        usual, recorder, rows = self.usual, self.recorder, self.usual.step.rows
        self.leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        for index, leaf in enumerate(self.leaves):
            node = recorder.item("inputs", index)
            node.meta["shape"] = tuple(leaf.shape)
            recorder.name(leaf, node)
        before = {module: rows[module].next_index(self.is_short) for module in rows}
        with torch.enable_grad(), usual.step.recording(recorder):
            self.hidden_BSD = usual.call(self.leaves)
        self.opened = {module: own for module, own in rows.items() if module not in before}
        left = {module: rows[module].next_index(self.is_short) - index for module, index in before.items()}
        self.indices = {module: index for module, index in before.items() if left[module]}
        if any(number > 1 for number in left.values()):
            recorder.reason = recorder.reason or "one of their layers runs twice in a pass"
        self.xs = [rows[module].inputs[i] if self.is_short else None for module, i in self.indices.items()]
        return self.hidden_BSD.detach()

    def backward(self, dhidden_BSD: Tensor) -> Iterator[Sequence[Tensor | None]]:
        if not hasattr(self, "usual"):
            raise RuntimeError(HAS_RUN)
        gradients = self._gradients(dhidden_BSD) if self.is_done else self._record(dhidden_BSD)[0]
        if not keeps_graph():  # the node of this pass lives until the end of the step
            self._release()
        yield gradients

    def _release(self) -> None:
        del self.usual, self.recorder, self.leaves, self.hidden_BSD, self.xs

    def _gradients(self, dhidden_BSD: Tensor) -> list[Tensor | None]:
        """Gradients of the inputs and of trained weights; those of stand-ins are left in place."""
        torch.autograd.backward(self.hidden_BSD, dhidden_BSD, retain_graph=keeps_graph())
        gradients = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        return gradients

    def _record(self, dhidden_BSD: Tensor) -> tuple[list[Tensor | None], Program | None, list[Tensor]]:
        """Gradients, the program, and what its forward has saved."""
        self.is_done, usual = True, self.usual
        arguments = usual.weights, usual.step.rows, usual.fixed, "given dhidden"
        backward = Recorder(*arguments, self.recorder, self.replaced, self.pauses)
        backward.name(dhidden_BSD, backward.arguments["dhidden"])
        backward.reason = self.recorder.reason
        with usual.step.recording(backward):
            gradients = self._gradients(dhidden_BSD)
        program = self._program(backward, gradients)
        if program is None:
            self.kind.refuse(str(backward.reason))
        else:
            self.kind.add(usual.columns, program)
        return gradients, program, backward.kept

    def _program(self, backward: Recorder, gradients: list[Tensor | None]) -> Program | None:
        """The recorded pass; None if `backward` has a reason against it."""
        forward, rows, count = self.recorder, self.usual.step.rows, len(self.leaves)
        douts = [
            rows[module].douts.get(index)
            if self.is_short
            else tuple(leaf.grad for leaf in rows[module].leaves[index])
            for module, index in self.indices.items()
        ]
        if backward.pauses:
            backward.reason = backward.reason or "their linear layers run in another order in the backward"
        if backward.reason is not None:
            return None
        try:
            first = gradients[:count] + [gradients[count + index] for index in self.parts[0]]
            backward.give([*first, tree_map(backward.rows_node, douts)])
            outputs = forward.node(self.hidden_BSD), [*map(forward.rows_node, self.xs)]
        except NotRecordable as error:
            backward.reason = str(error)
        if backward.reason is not None:
            return None
        backward_graph = backward.finish()
        forward_graph = forward.finish(*outputs, backward.saved)
        return Program(forward_graph, backward_graph, list(self.indices), self.opened, self.parts)


class LayerRecording(Recording):
    """A layer of the first pass that runs as usual and is recorded.

    For the recording, autograd runs a backward right after the forward, before other activations exist, and
    without the weights' gradients.  The recording then computes the layer's gradients, part by part.
    """

    def __init__(self, usual: Usual, kind: Kind) -> None:
        super().__init__(usual, kind)
        self.replaced = WITHOUT_WEIGHTS
        self.repetition: Repetition | None = None

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        hidden_BSD = super().forward(inputs)
        usual, self.is_done = self.usual, True
        reason = self.recorder.reason or self._divide(hidden_BSD.shape[-1])
        program = None
        if reason is None:
            _, program, saved = self._record(hidden_BSD.new_zeros(hidden_BSD.shape))
        else:
            self.kind.refuse(reason)
        if program is None:
            self.parts = [range(len(usual.trained))]
        else:
            self.repetition = Repetition(usual, program)
            self.repetition.saved = saved
            self._release()
        return hidden_BSD

    def backward(self, dhidden_BSD: Tensor) -> Iterator[Sequence[Tensor | None]]:
        if self.repetition is None:
            return super().backward(dhidden_BSD)
        return self.repetition.backward(dhidden_BSD)

    def _divide(self, hidden_size: int) -> str | None:
        """Divide the trained weights into parts, about as large as the largest linear layer.

        Returns a reason not to record the layer.
        """
        numbers = {id(weight): index for index, weight in enumerate(self.usual.trained)}
        linear = [x for x in self.opened.values() if isinstance(x, LinearRows)]
        own = {id(x): [numbers[id(w)] for w in x.parameters if id(w) in numbers] for x in linear}
        limit = max([hidden_size**2, *(rows.weight.numel() for rows in linear)])
        groups: list[list[LinearRows]] = [[]]  # from the last
        for rows in reversed(linear):
            if groups[-1] and sum(x.weight.numel() for x in [*groups[-1], rows]) > limit:
                groups.append([])
            groups[-1].append(rows)
        self.pauses = groups[:-1]
        parts = [[index for rows in group for index in own[id(rows)]] for group in reversed(self.pauses)]
        first = {*numbers.values()}.difference(*parts)
        self.parts = [sorted(first), *parts]
        others = first.difference(*own.values())
        if sum(self.usual.trained[index].numel() for index in others) > limit:
            return "their weights outside of linear layers are large"
        shared = len(set().union(*own.values())) < sum(map(len, own.values()))
        return "their linear layers share a weight" if shared else None

    def _gradients(self, dhidden_BSD: Tensor) -> list[Tensor | None]:
        targets = [*self.leaves, *self.usual.trained]
        gradients = torch.autograd.grad(
            self.hidden_BSD,
            [x for x in targets if x.requires_grad],
            dhidden_BSD,
            retain_graph=self.step.recorder is not None or keeps_graph(),
            allow_unused=True,
        )
        iterator = iter(gradients)
        return [next(iterator) if x.requires_grad else None for x in targets]


def _no_gradients(rows: LinearRows, x: Any, dy: Any, needs_bias: bool, *_: Any) -> list[Tensor | None]:
    """Tensors of the gradients' shapes, without memory."""
    wanted = rows.weight, rows.bias if needs_bias else None
    return [None if x is None else x.new_empty(()).expand_as(x) for x in wanted]


def _collect_nothing(*_: Any) -> None:
    pass


WITHOUT_WEIGHTS: dict[Callable[..., Any], Callable[..., Any]] = {
    LinearRows.collect: _no_gradients,
    Layer.collect: _collect_nothing,
}
