"""Writes the operators of a pass down, as functions that call them again without modules and autograd.

Attention over the buffer is recorded as one call, since its shapes change with the question's length.  Random
operators draw new numbers.
"""

import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from coconut_ds.model.techniques.kv_buffer import Layer
from coconut_ds.model.techniques.passes import Pass, Rows, Step

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
    aten.bmm.default: torch.bmm,
    aten.add.Tensor: torch.add,
    aten.mul.Tensor: torch.mul,
    aten.cat.default: torch.cat,
    aten.clone.default: torch.clone,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.gelu.default: torch._C._nn.gelu,
    aten.mean.dim: torch.mean,
    aten.rsqrt.default: torch.rsqrt,
    aten.roll.default: torch.roll,
    aten.addcmul.default: torch.addcmul,
    aten.split_with_sizes.default: torch.split_with_sizes,
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
# Operators that hand numbers to Python, or whose shapes depend on numbers.
DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NotRecordable(Exception):
    """A pass does what a recording cannot repeat."""


class Recorder(TorchDispatchMode):
    """Writes the operators of a forward, or of the backward of `forward`, into a graph.

    A tensor knows its node by an attribute, so recording keeps no tensor alive.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        weights: Sequence[Tensor],
        rows: dict[int, Rows],
        fixed: dict[str, Any],
        arguments: str,
        forward: "Recorder | None" = None,
        replaced: Mapping[Callable[..., Any], Callable[..., Any]] = {},
        pauses: Sequence[Sequence[Rows]] = (),
    ) -> None:
        """fixed: other arguments of the functions, by name: tensors, and objects given to recorded calls.

        replaced: what to run in place of a recorded call.  pauses: groups of rows, after whose calls the
        function hands out all results and waits.
        """
        super().__init__()
        self.graph = fx.Graph()
        names = ["weights", "layers", "rows", "run", *fixed, *arguments.split()]
        self.arguments = {name: self.graph.placeholder(name) for name in names}
        self.objects: dict[int, fx.Node] = {}
        self.weights = {_identity(weight): index for index, weight in enumerate(weights)}
        self.modules = {id(own): module for module, own in rows.items()}
        self.number = next(self._numbers)
        self.forward = forward
        self.saved: list[Any] = []  # nodes of the forward that the backward uses
        self.kept: list[Tensor] = []  # their tensors
        self.replaced, self.pauses = replaced, [[*group] for group in pauses]
        self.paused: list[Rows] = []  # those that were called
        self.results: list[Any] = []  # of the calls of the current group
        self.reason: str | None = None  # why there is no recording
        self._items: dict[Any, Any] = {}
        for name, value in fixed.items():
            if isinstance(value, Tensor):
                self.name(value, self.arguments[name])
            elif value is not None:
                self.objects[id(value)] = self.arguments[name]

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
            return self.objects.get(id(value), value)
        nodes = getattr(value, "_recorded", {})
        if self.number in nodes:
            return nodes[self.number]
        if self.forward is not None and self.forward.number in nodes:
            node = _viewed(nodes[self.forward.number])
            if node not in self.saved:
                self.saved.append(node)
                if self.replaced:
                    self.kept.append(value.detach().view(node.meta.get("shape", value.shape)))
            saved = self._argument(self.saved.index(node))
            saved.meta |= node.meta
            return saved if node is nodes[self.forward.number] else self._reshaped(saved, tuple(value.shape))
        index = self.weights.get(_identity(value))
        if index is None:
            raise NotRecordable(f"a tensor of shape {list(value.shape)} is neither an input nor a weight")
        return self.item("weights", index)

    def rows_node(self, value: Any) -> Any:
        """The node of a tensor whose leading dimensions do not matter."""
        node = self.node(value)
        if isinstance(node, fx.Node) and value.dim() == 3 and value.is_contiguous():
            return self._reshaped(node, (value.shape[0] * value.shape[1], value.shape[2]))
        return node

    def item(self, argument: str, index: int) -> Any:
        if (argument, index) not in self._items:
            node = self.graph.call_function(operator.getitem, (self.arguments[argument], index))
            self._items[argument, index] = node
        return self._items[argument, index]

    def _argument(self, index: int) -> fx.Node:
        """The argument for a saved tensor: of its own, so that the function drops it after its last use."""
        name = f"saved_{index}"
        if name not in self.arguments:
            with self.graph.inserting_after(next(reversed(self.arguments.values()))):
                self.arguments[name] = self.graph.placeholder(name)
        return self.arguments[name]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._write(func, args, kwargs or {}, result)
        return result

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function unseen, and record it as one call."""
        with _disable_current_modes():
            result = self.replaced.get(function, function)(*args)
        self._write(function, args, {}, result)
        if function in self.replaced and args[0] in self.paused:
            self.reason = "one of their linear layers runs twice in a pass"
        if self.pauses and self.pauses[0][0] is args[0]:
            self.results += [x for x in result if x is not None]
            self.paused.append(self.pauses[0].pop(0))
            if not self.pauses[0]:
                self.give(self.results)
                self.results = []
                del self.pauses[0]
        return result

    def give(self, values: Sequence[Any]) -> None:
        """Have the function hand out tensors here, and wait until it is called for the next ones."""
        try:
            nodes = tree_map(self.node, tuple(values))
        except NotRecordable as error:
            self.reason = self.reason or str(error)
            return
        self.graph.call_function(give, (self.arguments["given"], nodes))

    def _write(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if self.reason is None and isinstance(func, torch._ops.OpOverload):
            self.reason = self._objection(func, args, result)
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

    def _objection(self, func: Any, args: Any, result: Any) -> str | None:
        """Why an operator cannot be repeated."""
        is_dependent = not DEPENDENT.isdisjoint(func.tags)
        if func is aten.index.Tensor:  # of positions, not of a mask
            is_dependent = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if is_dependent:
            return f"{func} depends on computed numbers"
        writes = func._schema.is_mutable and isinstance(result, Tensor) and _identity(result) in self.weights
        return f"{func} writes into a weight or buffer" if writes else None

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
        if func is aten.split.Tensor:  # torch.split is Python
            dim = args[2] if len(args) > 2 else 0
            func, nodes = aten.split_with_sizes.default, (nodes[0], [x.shape[dim] for x in result], dim)
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
        is_reshape = method in ("view", "unsqueeze")
        if is_reshape or (method == "transpose" and _keeps_order(source.shape, *args[1:])):
            return self._reshaped(args[0], tuple(result.shape))
        if (method, args) not in self._items:
            self._items[method, args] = self.graph.call_method(method, args)
            self._items[method, args].meta["shape"] = tuple(result.shape)
        return self._items[method, args]

    def _reshaped(self, node: Any, shape: tuple[int, ...]) -> Any:
        node = _viewed(node)
        if node.meta.get("shape") == shape:
            return node
        if (node, shape) not in self._items:
            self._items[node, shape] = self.graph.call_method("view", (node, *shape))
            self._items[node, shape].meta["shape"] = shape
        return self._items[node, shape]

    def finish(self, *results: Any) -> fx.Graph:
        """The recorded function, which returns `results`; unused arguments for saved tensors are dropped."""
        self.graph.output(results)
        self.graph.eliminate_dead_code(is_impure_node=_has_effect)
        names = [f"saved_{index}" for index in range(len(self.saved))]
        used = [bool(self.arguments[name].users) for name in names]
        self.saved, self.kept = ([*itertools.compress(x, used)] for x in (self.saved, self.kept))
        for name in itertools.compress(names, map(operator.not_, used)):
            self.graph.erase_node(self.arguments[name])
        return self.graph


def _keeps_order(shape: Sequence[int], first: int, second: int) -> bool:
    """Whether a transpose of two dimensions leaves those of more than one element in their order."""
    order = list(range(len(shape)))
    order[first], order[second] = order[second], order[first]
    moved = [dim for dim in order if shape[dim] > 1]
    return moved == sorted(moved)


def _viewed(node: Any) -> Any:
    """The node of which `node` is another shape."""
    while node.op == "call_method" and node.target == "view":
        node = node.args[0]
    return node


def _has_effect(node: fx.Node) -> bool:
    return node.is_impure() or getattr(node.target, "__module__", "").startswith("coconut_ds")


def give(given: list[Any], values: Sequence[Any]) -> None:
    given.extend(values)


def _with_pauses(body: list[str]) -> list[str]:
    """The code of a function that becomes a generator: it pauses after each `give`."""
    return [re.sub(r"^(give(_\d+)? = .*)$", r"\1; yield", "".join(body), flags=re.MULTILINE)]


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
        if (
            type(a) is int
            and type(b) is int
            and width != other_width
            and a != b
            and (a - b) % (width - other_width) == 0
        ):
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


class Program:
    """A recorded pass: two functions, and the modules whose rows they return."""

    def __init__(
        self,
        forward: fx.Graph,
        backward: fx.Graph,
        modules: Sequence[int],
        opened: dict[int, Rows],
        parts: Sequence[Sequence[int]],
    ) -> None:
        """opened: rows of modules that a first pass runs, by the modules' ids; empty after their step.

        parts: the weights whose gradients the backward hands out at once, by their index; the last first.
        """
        self.graphs, self.modules, self.opened = (forward, backward), tuple(modules), opened
        self.parts = parts

    @cached_property
    def forward(self) -> Callable[..., Any]:
        return fx.GraphModule(nn.Module(), self.graphs[0]).forward

    @cached_property
    def backward(self) -> Callable[..., Any]:
        self.graphs[1].on_generate_code(lambda _: _with_pauses)
        return fx.GraphModule(nn.Module(), self.graphs[1]).forward

    @cached_property
    def code(self) -> tuple[str, ...]:
        return tuple(graph.python_code("self").src for graph in self.graphs)

    def generalized(self, width: int, other: "Program", other_width: int) -> "Program | None":
        """The program of two widths, or of one if both are equal."""
        pairs = zip(self.graphs, other.graphs, strict=True)
        forward, backward = (generalized(a, width, b, other_width) for a, b in pairs)
        if forward is None or backward is None or (self.modules, self.parts) != (other.modules, other.parts):
            return None
        return Program(forward, backward, self.modules, self.opened, self.parts)


def reaches_a_weight(hidden_BSD: Tensor, inputs: Sequence[Tensor], step: Step) -> bool:
    """Whether the backward of a pass, before its inputs', accumulates the gradient of another weight.

    Also whether it does so twice for a weight to which the Barrier adds: the sum would have another order.
    """
    stand_ins = {id(leaf) for rows in step.rows.values() for leaves in rows.leaves for leaf in leaves}
    stand_ins |= {id(x) for x in inputs}
    vectors = [id(vector) for rows in step.rows.values() for vector in rows.vectors]
    seen = {None, *(x.grad_fn for x in inputs)}
    nodes: list[Any] = [hidden_BSD.grad_fn]
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "AccumulateGrad":
            used = id(node.variable)
            if used not in stand_ins or (node in seen and used in vectors):
                return True
        if node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
    return False
