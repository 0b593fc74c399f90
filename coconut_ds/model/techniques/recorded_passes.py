"""One-column passes that run from a recording, without modules and autograd.

A pass of one column is little arithmetic and much Python.  Its operators are the same every time, so they are
recorded while a pass runs as usual, forward and backward, and other passes call them directly, in the same
order and with the same results:

    first     modules and autograd, as usual; finds models whose gradients do not all go through Rows
    then      modules and autograd, recorded as two functions
    later     forward(weights, layers, run, ...) -> hidden, saved, inputs
              backward(weights, layers, run, saved, dhidden) -> gradients, douts

A recording (recorder.py) serves passes of its own columns, and of all columns once it equals one of other
columns in a batch of another length.

Shapes: B rows, D hidden size.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from coconut_ds.model.techniques.passes import (
    Context,
    Pass,
    Step,
    is_autocast,
    is_partitioned,
    keeps_graph,
)
from coconut_ds.model.techniques.recorder import NotRecordable, Program, Recorder

logger = logging.getLogger(__name__)

HAS_RUN = "the backward of this pass has run already; call the first with retain_graph=True"
# Kinds of passes that are kept: rows, dtype, trained weights; and recordings of one kind.
MAX_KINDS, MAX_RECORDINGS = 8, 16


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
        self.recorder = Recorder(usual.weights, usual.step.rows, "mask positions inputs")

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
        usual = self.usual
        backward = Recorder(usual.weights, usual.step.rows, "saved dhidden", self.recorder)
        backward.reason = self.recorder.reason
        backward.name(dhidden_BSD, backward.arguments["dhidden"])
        with usual.step.recording(backward):
            torch.autograd.backward(self.hidden_BSD, dhidden_BSD, retain_graph=keeps_graph())
        dinputs = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        if not self.is_done:
            self.is_done = True
            self._finish(backward, dinputs)
        if not keeps_graph():  # the node of this pass lives until the end of the step
            del usual, self.usual, self.recorder, self.leaves, self.hidden_BSD, self.xs
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
        if is_autocast(weights[0]) or any(map(is_partitioned, weights)):
            return ()
        signature = *(m.training for m in self.modules), *(weight.requires_grad for weight in weights)
        # Transposed once for all passes.
        return weights + [weight.detach().t() for weight in weights if weight.dim() == 2], signature


def random_settings(module: nn.Module) -> list[float]:
    """Probabilities of dropout, and scales of noise, that a module has."""
    names = ("drop", "noise", "jitter")
    settings = [value for name, value in vars(module).items() if any(part in name for part in names)]
    if isinstance(module, nn.modules.dropout._DropoutNd):
        settings.append(module.p)
    return [value for value in settings if isinstance(value, float)]


def draws_random(module: nn.Module) -> bool:
    """Whether a module may draw random numbers: it trains with a probability of dropout, or adds noise."""
    return module.training and any(value > 0 for value in random_settings(module))


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
