"""One-column passes that run from a recording, without modules and autograd.

A pass of one column is little arithmetic and much Python.  Its operators are the same every time, so they are
recorded while a pass runs as usual, forward and backward, and other passes call them directly, in the same
order and with the same results:

    first     modules and autograd, as usual; finds models whose gradients do not all go through Rows
    then      modules and autograd, recorded as two functions
    later     forward(weights, layers, run, ...) -> hidden, saved, inputs
              backward(weights, layers, run, saved, dhidden) -> gradients, douts

Attention over the buffer is recorded as one call, since its shapes change with the question's length.  Random
operators draw new numbers.  A recording serves passes of its own columns, and of all columns once it equals
one of other columns in a batch of another length.

Shapes: B rows, D hidden size.
"""

import itertools
import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from coconut_ds.model.techniques.kv_buffer import Layer
from coconut_ds.model.techniques.passes import Context, Pass, Rows, Step, is_partitioned, keeps_graph

logger = logging.getLogger(__name__)
aten = torch.ops.aten

VIEWS = {
    aten.view.default: "view",
    aten._unsafe_view.default: "view",
    aten.unsqueeze.default: "unsqueeze",
    aten.transpose.int: "transpose",
    aten.t.default: "t",
}
# Operators with a faster entry in Python, which takes the same arguments.
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.addmm.default: torch.addmm,
    aten.mm.default: torch.mm,
    aten.add.Tensor: torch.add,
    aten.mul.Tensor: torch.mul,
    aten.cat.default: torch.cat,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.gelu.default: torch._C._nn.gelu,
    aten.mean.dim: torch.mean,
    aten.rsqrt.default: torch.rsqrt,
    aten.roll.default: torch.roll,
    aten.addcmul.default: torch.addcmul,
    aten.split.Tensor: torch._VF.split,  # type: ignore[attr-defined]
    aten.split_with_sizes.default: torch._VF.split_with_sizes,  # type: ignore[attr-defined]
}
# Operators on the last dimension alone: they run on [rows, last dimension], without views in between.
ROWWISE = (
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.gelu.default,
    aten.gelu_backward.default,
    aten.silu.default,
    aten.silu_backward.default,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
)
ALIASES = (aten.detach.default, aten.alias.default)
HAS_RUN = "the backward of this pass has run already; call the first with retain_graph=True"
# Kinds of passes that are kept: rows, dtype, trained weights; and recordings of one kind.
MAX_KINDS, MAX_RECORDINGS = 8, 16


class NotRecordable(Exception):
    """A pass does what a recording cannot repeat."""


class Recorder(TorchDispatchMode):
    """Writes the operators of a forward, or of the backward of `forward`, into a graph.

    A tensor knows its node by an attribute, so recording keeps no tensor alive.
    """

    _numbers = itertools.count()

    def __init__(self, usual: "Usual", arguments: str, forward: "Recorder | None" = None) -> None:
        super().__init__()
        self.graph = fx.Graph()
        names = ["weights", "layers", "rows", "run", *arguments.split()]
        self.arguments = {name: self.graph.placeholder(name) for name in names}
        self.weights = {_identity(weight): index for index, weight in enumerate(usual.weights)}
        self.modules = {id(rows): module for module, rows in usual.step.rows.items()}
        self.number = next(self._numbers)
        self.forward = forward
        self.saved: list[Any] = []  # nodes of the forward that the backward uses
        self.reason: str | None = None  # why there is no recording
        self._items: dict[Any, Any] = {}

    def name(self, tensor: Tensor, node: Any) -> None:
        tensor.__dict__.setdefault("_recorded", {})[self.number] = node

    def node(self, value: Any) -> Any:
        """The node of a tensor, of the pass, of a layer of the buffer or of a module's rows; others stay."""
        if isinstance(value, Pass):
            return self.arguments["run"]
        if isinstance(value, Layer):
            return self.item("layers", value.index)
        if isinstance(value, Rows):
            return self.item("rows", self.modules[id(value)])
        if not isinstance(value, Tensor):
            return value
        nodes = getattr(value, "_recorded", {})
        if self.number in nodes:
            return nodes[self.number]
        if self.forward is not None and self.forward.number in nodes:
            node = nodes[self.forward.number]
            if node not in self.saved:
                self.saved.append(node)
            return self.item("saved", self.saved.index(node), _take)
        index = self.weights.get(_identity(value))
        if index is None:
            raise NotRecordable(f"a tensor of shape {list(value.shape)} is neither an input nor a weight")
        return self.item("weights", index)

    def rows_node(self, value: Any) -> Any:
        """The node of a tensor whose leading dimensions do not matter."""
        node = self.node(value)
        if isinstance(node, fx.Node) and node.target == "view":
            source: Any = node.args[0]
            if source.meta.get("shape", (0,))[-1] == value.shape[-1]:
                return source
        return node

    def item(self, argument: str, index: int, get: Callable[..., Any] = operator.getitem) -> Any:
        if (argument, index) not in self._items:
            node = self.graph.call_function(get, (self.arguments[argument], index))
            self._items[argument, index] = node
        return self._items[argument, index]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._write(func, args, kwargs or {}, result)
        return result

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function unseen, and record it as one call."""
        with _disable_current_modes():
            result = function(*args)
        self._write(function, args, {}, result)
        return result

    def _write(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if self.reason is not None:
            return
        try:
            nodes, kwargs = tree_map(self.node, tuple(args)), tree_map(self.node, kwargs)
        except NotRecordable as error:
            self.reason = f"{func}: {error}"
            return
        if func in ALIASES:
            self.name(result, nodes[0])
        elif isinstance(result, Tensor) and _identity(result) in self.weights:
            self.name(result, self.item("weights", self.weights[_identity(result)]))
        elif func in VIEWS:
            self.name(result, self._view(VIEWS[func], nodes, args[0], result))
        else:
            self._write_call(func, args, nodes, kwargs, result)

    def _write_call(self, func: Any, args: Any, nodes: Any, kwargs: Any, result: Any) -> None:
        tensors = [x for x in args if isinstance(x, Tensor)]
        is_rowwise = func in ROWWISE and tensors[0].dim() == 3
        if is_rowwise:
            shape = tensors[0].shape
            same = [x for x in tensors if x.shape == shape]
            is_rowwise = func in ROWWISE[-2:] or len(same) == len(tensors)
            is_rowwise = is_rowwise and all(x.is_contiguous() for x in same)
        if is_rowwise:
            rows = shape[0] * shape[1], shape[2]
            nodes = tuple(
                self._reshaped(node, rows) if isinstance(x, Tensor) and x.shape == shape else node
                for x, node in zip(args, nodes, strict=True)
            )
        call = self.graph.call_function(FUNCTIONS.get(func, func), nodes, kwargs)
        parts = (
            [result] if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else []
        )
        for index, part in enumerate(parts):
            if not isinstance(part, Tensor):
                continue
            node = call if part is result else self.graph.call_function(operator.getitem, (call, index))
            node.meta["shape"] = tuple(part.shape)
            if is_rowwise and part.shape == shape:
                node.meta["shape"] = rows
                node = self._reshaped(node, tuple(part.shape))
            self.name(part, node)

    def _view(self, method: str, args: Any, source: Tensor, result: Tensor) -> Any:
        """A view of a tensor; a mere change of shape is taken of the tensor that it views."""
        order = [[size for size in x.shape if size > 1] for x in (source, result)]
        if method == "view" or (method != "t" and order[0] == order[1] and 1 in result.shape):
            return self._reshaped(args[0], tuple(result.shape))
        if (method, args) not in self._items:
            self._items[method, args] = self.graph.call_method(method, args)
            self._items[method, args].meta["shape"] = tuple(result.shape)
        return self._items[method, args]

    def _reshaped(self, node: Any, shape: tuple[int, ...]) -> Any:
        while node.op == "call_method" and node.target == "view":
            node = node.args[0]
        if node.meta.get("shape") == shape:
            return node
        if (node, shape) not in self._items:
            self._items[node, shape] = self.graph.call_method("view", (node, *shape))
            self._items[node, shape].meta["shape"] = shape
        return self._items[node, shape]

    def finish(self, *results: Any) -> fx.Graph:
        """The recorded function, which returns `results`."""
        self.graph.output(results)
        self.graph.eliminate_dead_code(is_impure_node=_has_effect)
        return self.graph


def _take(saved: list[Any], index: int) -> Any:
    """Take a tensor out of a list, which no longer keeps it."""
    value, saved[index] = saved[index], None
    return value


def _has_effect(node: fx.Node) -> bool:
    return node.is_impure() or getattr(node.target, "__module__", "").startswith("coconut_ds")


def width_of(run: Pass, slope: int, offset: int) -> int:
    """A size of a recorded operator, as its two recordings have it."""
    return slope * (run.stop - run.start) + offset


def generalized(graph: fx.Graph, width: int, other: fx.Graph, other_width: int) -> fx.Graph | None:
    """A copy of `graph` for passes of any width; None unless `other` is equal but for sizes linear in it."""
    names: dict[fx.Node, fx.Node] = {}
    result = fx.Graph()
    sizes: dict[tuple[int, int], fx.Node] = {}
    run: fx.Node | None = None

    def merged(a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and pairs.get(a) is b:
            return names[a]
        if type(a) is type(b) and isinstance(a, (tuple, list)) and len(a) == len(b):
            return type(a)(map(merged, a, b))
        if type(a) is int and type(b) is int and a != b and (a - b) % (width - other_width) == 0:
            slope = (a - b) // (width - other_width)
            key = slope, a - slope * width
            if key not in sizes:
                sizes[key] = result.call_function(width_of, (run, *key))
            return sizes[key]
        if isinstance(a, fx.Node) or isinstance(b, fx.Node) or type(a) is not type(b) or a != b:
            raise NotRecordable
        return a

    nodes, other_nodes = list(graph.nodes), list(other.nodes)
    if len(nodes) != len(other_nodes):
        return None
    pairs = dict(zip(nodes, other_nodes, strict=True))
    try:
        for node, twin in pairs.items():
            if (node.op, node.target, node.kwargs.keys()) != (twin.op, twin.target, twin.kwargs.keys()):
                return None
            args = merged(node.args, twin.args)
            kwargs = {key: merged(value, twin.kwargs[key]) for key, value in node.kwargs.items()}
            names[node] = result.create_node(node.op, node.target, args, kwargs)
            run = names[node] if node.op == "placeholder" and node.target == "run" else run
    except NotRecordable:
        return None
    return result


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


@dataclass(frozen=True)
class Columns:
    """Where a pass is: its first column, its width and the columns of the batch."""

    start: int
    width: int
    total: int


class Program:
    """A recorded pass: two functions, and the modules whose rows they return."""

    def __init__(self, forward: fx.Graph, backward: fx.Graph, modules: Sequence[int]) -> None:
        self.graphs, self.modules = (forward, backward), tuple(modules)

    @cached_property
    def forward(self) -> Callable[..., Any]:
        return fx.GraphModule(nn.Module(), self.graphs[0]).forward

    @cached_property
    def backward(self) -> Callable[..., Any]:
        return fx.GraphModule(nn.Module(), self.graphs[1]).forward

    @cached_property
    def code(self) -> tuple[str, ...]:
        return tuple(graph.python_code("self").src for graph in self.graphs)

    def generalized(self, width: int, other: "Program", other_width: int) -> "Program | None":
        """The program of two widths, or of one if both are equal."""
        pairs = zip(self.graphs, other.graphs, strict=True)
        forward, backward = (generalized(a, width, b, other_width) for a, b in pairs)
        if forward is None or backward is None or self.modules != other.modules:
            return None
        return Program(forward, backward, self.modules)


@dataclass
class Kind:
    """Passes with equal rows, dtype and trained weights."""

    recordings: dict[Columns, Program] = field(default_factory=dict)
    programs: dict[int, Program] = field(default_factory=dict)  # for all columns, by width; 0: all widths
    candidates: list[Program] = field(default_factory=list)  # for all widths, until a third recording agrees
    seen_in: Callable[[], Step | None] | None = None  # the step of its first pass, by weak reference
    is_refused: bool = False

    def program(self, columns: Columns) -> Program | None:
        if self.is_refused:
            return None
        return self.programs.get(0) or self.programs.get(columns.width) or self.recordings.get(columns)

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
    """One pass as the modules run it."""

    step: Step
    run: Pass
    weights: list[Tensor]
    mask: Tensor
    positions_BS: Tensor
    read: Callable[[Tensor, Tensor, Tensor], Tensor]
    parts: dict[int, Any]  # what modules made of the positions, by id

    @property
    def columns(self) -> Columns:
        return Columns(self.run.start, self.run.stop - self.run.start, self.step.passes[-1].stop)

    def inputs(self, embeds_BSD: Tensor) -> list[Tensor]:
        inputs = [embeds_BSD.contiguous()]
        for part in self.parts.values():
            inputs += [part] if isinstance(part, Tensor) else part
        return inputs

    def hidden(self, inputs: Sequence[Tensor]) -> Tensor:
        embeds_BSD, *others = inputs
        tensors = iter(others)
        parts = {
            module: next(tensors) if isinstance(part, Tensor) else tuple(next(tensors) for _ in part)
            for module, part in self.parts.items()
        }
        outer = self.step.per_position
        self.step.per_position = {module: iter([part]) for module, part in parts.items()}
        try:
            return self.read(embeds_BSD, self.mask, self.positions_BS)
        finally:
            self.step.per_position = outer


class Repetition:
    """A pass that runs from a recording."""

    def __init__(self, usual: Usual, program: Program) -> None:
        rows = usual.step.rows
        self.program, self.is_short = program, usual.run.is_short
        self.rows = [rows[module] for module in program.modules]
        self.owners = usual.weights, usual.step.layers, rows, usual.run
        self.fixed: tuple[Tensor, ...] = usual.mask, usual.positions_BS
        self.saved: list[Tensor] | None = None

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        inputs = [x.detach() for x in inputs]
        with torch._C._AutoDispatchBelowAutograd():
            hidden_BSD, saved, xs = self.program.forward(*self.owners, *self.fixed, inputs)
        self.saved, self.fixed = list(saved), ()
        self.indices = [rows.next_index(self.is_short) for rows in self.rows]
        for rows, x in zip(self.rows, xs, strict=True):
            if self.is_short:
                rows.inputs.append(x)
            else:
                rows.stand_ins()
        return hidden_BSD

    def backward(self, dhidden_BSD: Tensor) -> Sequence[Tensor | None]:
        if self.saved is None:
            raise RuntimeError(HAS_RUN)
        saved, self.saved = list(self.saved), self.saved if keeps_graph() else None
        with torch._C._AutoDispatchBelowAutograd():
            dinputs, douts = self.program.backward(*self.owners, saved, dhidden_BSD)
        for rows, index, dy in zip(self.rows, self.indices, douts, strict=True):
            if not self.is_short:
                for leaf, dleaf in zip(rows.leaves[index], dy, strict=True):
                    leaf.grad = dleaf
            elif dy is not None:
                rows.douts[index] = dy
        return dinputs


class Recording:
    """A pass that runs as usual and is recorded, forward and backward."""

    def __init__(self, usual: Usual, kind: Kind) -> None:
        self.usual, self.kind, self.is_done = usual, kind, False
        self.is_short = usual.run.is_short
        self.recorder = Recorder(usual, "mask positions inputs")

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        usual, recorder, rows = self.usual, self.recorder, self.usual.step.rows
        self.leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        for index, leaf in enumerate(self.leaves):
            recorder.name(leaf, recorder.item("inputs", index))
        recorder.name(usual.mask, recorder.arguments["mask"])
        recorder.name(usual.positions_BS, recorder.arguments["positions"])
        before = {module: rows[module].next_index(self.is_short) for module in rows}
        with torch.enable_grad(), usual.step.recording(recorder):
            self.hidden_BSD = usual.hidden(self.leaves)
        self.indices = {
            module: index
            for module, index in before.items()
            if rows[module].next_index(self.is_short) > index
        }
        self.xs = [rows[module].inputs[i] if self.is_short else None for module, i in self.indices.items()]
        return self.hidden_BSD.detach()

    def backward(self, dhidden_BSD: Tensor) -> Sequence[Tensor | None]:
        if not hasattr(self, "usual"):
            raise RuntimeError(HAS_RUN)
        backward = Recorder(self.usual, "saved dhidden", self.recorder)
        backward.reason = self.recorder.reason
        backward.name(dhidden_BSD, backward.arguments["dhidden"])
        with self.usual.step.recording(backward):
            torch.autograd.backward(self.hidden_BSD, dhidden_BSD, retain_graph=keeps_graph())
        dinputs = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        if not self.is_done:
            self.is_done = True
            self._finish(backward, dinputs)
        if not keeps_graph():  # the node of this pass lives until the end of the step
            del self.usual, self.recorder, self.leaves, self.hidden_BSD, self.xs
        return dinputs

    def _finish(self, backward: Recorder, dinputs: Sequence[Tensor | None]) -> None:
        forward, rows = self.recorder, self.usual.step.rows
        douts = [
            rows[module].douts.get(index)
            if self.is_short
            else tuple(leaf.grad for leaf in rows[module].leaves[index])
            for module, index in self.indices.items()
        ]
        reason = forward.reason or backward.reason
        if reason is None:
            try:
                results = [*map(backward.node, dinputs)], tree_map(backward.rows_node, douts)
                xs = [*map(forward.rows_node, self.xs)]
                outputs = forward.node(self.hidden_BSD), list(backward.saved), xs
            except NotRecordable as error:
                reason = str(error)
        if reason is not None:
            self.kind.refuse(reason)
            return
        program = Program(forward.finish(*outputs), backward.finish(*results), list(self.indices))
        self.kind.add(self.usual.columns, program)


class _RecordedPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, runner, step, *inputs):  # type: ignore[override]
        ctx.runner, ctx.step = runner, step
        return runner.forward(inputs)

    @staticmethod
    def backward(ctx, dhidden_BSD):  # type: ignore[override]
        ctx.step.watch()
        return None, None, *ctx.runner.backward(dhidden_BSD.contiguous())


class RecordedPasses:
    """The recordings of one model's passes."""

    def __init__(self, model: nn.Module, context: Context, checkpoints: bool) -> None:
        """checkpoints: whether wide passes run with activation checkpointing."""
        self.context, self.checkpoints = context, checkpoints
        self.modules = list(model.modules())
        self.tensors = [t for m in self.modules for t in (m._parameters, m._buffers)]
        self.hooks = [
            hooks
            for m in self.modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self.kinds: dict[Any, Kind] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Of a copied model, which starts without recordings: they know their modules by id."""
        return vars(self) | {"kinds": {}}

    def advance(
        self,
        embeds_BSD: Tensor,
        mask: Tensor,
        positions_BS: Tensor,
        read: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Hidden states of the current pass, by `read(embeddings, mask, position ids)` or a recording."""
        step, run = self.context.step, self.context.current
        assert step is not None
        state = self._state(step)
        if state is None or type(embeds_BSD) is not Tensor or not embeds_BSD.requires_grad:
            return read(embeds_BSD, mask, positions_BS)
        weights, signature = state
        parts = {module: next(made) for module, made in step.per_position.items()}
        usual = Usual(step, run, weights, mask, positions_BS, read, parts)
        inputs = usual.inputs(embeds_BSD)
        key = run.is_short, signature, *((len(x), x.shape[2:], x.dtype, x.requires_grad) for x in inputs)
        kind = self.kinds.setdefault(key, Kind())
        program = kind.program(usual.columns)
        if program is not None:
            return _RecordedPass.apply(Repetition(usual, program), step, *inputs)
        if self._may_record(step, kind):
            step.recorded = True
            return _RecordedPass.apply(Recording(usual, kind), step, *inputs)
        hidden_BSD = usual.hidden(inputs)
        if kind.seen_in is None:
            kind.seen_in = weakref.ref(step)
            if _reaches_a_weight(hidden_BSD, inputs, step):
                kind.refuse("a weight of their layers takes its gradient in every pass")
            elif not run.is_short and self.checkpoints and any(map(draws_random, self.modules)):
                kind.refuse("dropout of checkpointed layers needs the random state of the forward")
        return hidden_BSD

    def _may_record(self, step: Step, kind: Kind) -> bool:
        """One pass a step, and none of the first step or of one that is being measured."""
        is_new = kind.seen_in is None or kind.seen_in() is step
        is_observed = torch._C._len_torch_dispatch_stack() > 0
        has_room = len(kind.recordings) < MAX_RECORDINGS and len(self.kinds) <= MAX_KINDS
        return has_room and not (is_new or is_observed or step.recorded or kind.is_refused)

    def _state(self, step: Step) -> tuple[list[Tensor], Any] | None:
        """The model's weights and what a recording depends on; None while passes must run as usual."""
        if step.state is None:
            step.state = self._read_state()
        return step.state or None

    def _read_state(self) -> Any:
        if not torch.is_grad_enabled() or any(self.hooks):
            return ()
        weights = [w for tensors in self.tensors for w in tensors.values() if w is not None]
        if torch.is_autocast_enabled(weights[0].device.type) or any(map(is_partitioned, weights)):
            return ()
        signature = *(m.training for m in self.modules), *(weight.requires_grad for weight in weights)
        # Transposed once for all passes.
        return weights + [weight.detach().t() for weight in weights if weight.dim() == 2], signature


def draws_random(module: nn.Module) -> bool:
    """Whether a module may draw random numbers: it trains with a probability of dropout, or adds noise."""
    if not module.training:
        return False
    names = ("drop", "noise", "jitter")
    settings = [value for name, value in vars(module).items() if any(part in name for part in names)]
    if isinstance(module, nn.modules.dropout._DropoutNd):
        settings.append(module.p)
    return any(isinstance(value, float) and value > 0 for value in settings)


def _reaches_a_weight(hidden_BSD: Tensor, inputs: Sequence[Tensor], step: Step) -> bool:
    """Whether the backward of a pass, before its inputs', accumulates the gradient of a weight."""
    stand_ins = {id(leaf) for rows in step.rows.values() for leaves in rows.leaves for leaf in leaves}
    seen = {None, *(x.grad_fn for x in inputs)}
    nodes: list[Any] = [hidden_BSD.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in stand_ins:
            return True
        nodes += [parent for parent, _ in node.next_functions]
    return False
