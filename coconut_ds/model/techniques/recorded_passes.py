"""Passes that run from a recording, without modules and autograd.

A pass of one column is little arithmetic and much Python.  Its operators are the same every time, so they are
recorded while a pass runs as usual, forward and backward, and other passes call them directly, in the same
order and with the same results.  So do passes of many columns, and the layers of the first pass, one by one,
with activation checkpointing: a recorded layer returns the gradients of all its weights at once, which other
layers would have to hold beside their activations.

    first     modules and autograd, as usual; finds models whose gradients do not all go through Rows
    then      modules and autograd, recorded as two functions
    later     forward(weights, layers, run, ...) -> hidden, saved, inputs
              backward(weights, layers, run, saved, dhidden) -> gradients, douts

A recording (recorder.py) serves passes of its own columns, and of all columns once it equals one of other
columns in a batch of another length.

Shapes: B rows, D hidden size.
"""

import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from coconut_ds.model.techniques.kv_buffer import KeyValueBuffer, Mask
from coconut_ds.model.techniques.passes import (
    Context,
    Pass,
    Step,
    is_autocast,
    is_partitioned,
    keeps_graph,
)
from coconut_ds.model.techniques.recorder import NotRecordable, Program, Recorder, reaches_a_weight

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


class Repetition:
    """A pass that runs from a recording."""

    def __init__(self, usual: Usual, program: Program) -> None:
        step = usual.step
        self.program, self.is_short = program, usual.run.is_short
        step.rows |= {module: rows.renewed() for module, rows in program.opened.items()}
        self.rows = [step.rows[module] for module in program.modules]
        self.owners = usual.weights, step.layers, step.rows, usual.run, *usual.fixed.values()
        self.saved: list[Tensor] | None = None

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        inputs = [x.detach() for x in inputs]
        with torch._C._AutoDispatchBelowAutograd():
            hidden_BSD, saved, xs = self.program.forward(*self.owners, inputs)
        self.saved = list(saved)
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
        self.recorder = Recorder(usual.weights, usual.step.rows, usual.fixed, "inputs")

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        usual, recorder, rows = self.usual, self.recorder, self.usual.step.rows
        self.leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        for index, leaf in enumerate(self.leaves):
            recorder.name(leaf, recorder.item("inputs", index))
        before = {module: rows[module].next_index(self.is_short) for module in rows}
        with torch.enable_grad(), usual.step.recording(recorder):
            self.hidden_BSD = usual.call(self.leaves)
        self.opened = {module: own for module, own in rows.items() if module not in before}
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
        backward = Recorder(usual.weights, usual.step.rows, usual.fixed, "saved dhidden", self.recorder)
        backward.reason = self.recorder.reason
        backward.name(dhidden_BSD, backward.arguments["dhidden"])
        with usual.step.recording(backward):
            dinputs = self._gradients(dhidden_BSD)
        if not self.is_done:
            self.is_done = True
            self._finish(backward, dinputs)
        if not keeps_graph():  # the node of this pass lives until the end of the step
            del usual, self.usual, self.recorder, self.leaves, self.hidden_BSD, self.xs
        return dinputs

    def _gradients(self, dhidden_BSD: Tensor) -> list[Tensor | None]:
        """Gradients of the inputs and of the trained weights; later passes leave those of stand-ins, too."""
        if not self.usual.trained:
            torch.autograd.backward(self.hidden_BSD, dhidden_BSD, retain_graph=keeps_graph())
            dinputs = [leaf.grad for leaf in self.leaves]
            for leaf in self.leaves:
                leaf.grad = None
            return dinputs
        wanted = [*self.leaves, *self.usual.trained]
        gradients = iter(
            torch.autograd.grad(
                self.hidden_BSD,
                [x for x in wanted if x.requires_grad],
                dhidden_BSD,
                retain_graph=keeps_graph(),
                allow_unused=True,
            )
        )
        return [next(gradients) if x.requires_grad else None for x in wanted]

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
        graphs = forward.finish(*outputs), backward.finish(*results)
        self.kind.add(self.usual.columns, Program(*graphs, list(self.indices), self.opened))


class _RecordedPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, runner, step, num_inputs, *inputs_and_trained):  # type: ignore[override]
        ctx.runner, ctx.step = runner, step
        return runner.forward(inputs_and_trained[:num_inputs])

    @staticmethod
    def backward(ctx, dhidden_BSD):  # type: ignore[override]
        ctx.step.watch()
        return None, None, None, *ctx.runner.backward(dhidden_BSD.contiguous())


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
        self.checkpointing_layers = [m for m in self.modules if isinstance(m, GradientCheckpointingLayer)]
        self.kinds: dict[Any, Kind] = {}
        # Trained weights of a layer and its first passes, by its index and the model's signature.
        self.layers: dict[Any, tuple[list[Tensor], dict[Any, Kind]]] = {}
        self.signatures: dict[Any, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Of a copied model, which starts without recordings: they know their modules by id."""
        return vars(self) | {"kinds": {}, "layers": {}}

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
        inputs = [embeds_BSD.contiguous()]
        for part in parts.values():
            inputs += [part] if isinstance(part, Tensor) else part

        def call(inputs: Sequence[Tensor]) -> Tensor:
            embeds_BSD, *others = inputs
            tensors, outer = iter(others), step.per_position
            step.per_position = {
                module: iter(
                    [next(tensors) if isinstance(part, Tensor) else tuple(next(tensors) for _ in part)]
                )
                for module, part in parts.items()
            }
            try:
                return read(embeds_BSD, mask, positions_BS)
            finally:
                step.per_position = outer

        usual = Usual(step, run, weights, {"mask": mask, "positions": positions_BS}, call)
        key = run.is_short, signature, *((len(x), x.shape[2:], x.dtype, x.requires_grad) for x in inputs)
        return self._run(usual, self.kinds, key, inputs)

    def advance_layer(
        self,
        index: int,
        call: Callable[..., Any],
        hidden_BSD: Tensor,
        args: Sequence[Any],
        keywords: Sequence[Any],
    ) -> Any:
        """`call(hidden, *args)`, a checkpointed layer of the first pass, or its recording.

        keywords: the values of those that `call` has.
        """
        step, run = self.context.step, self.context.current
        assert step is not None
        state, others = self._state(step), (*args, *keywords)
        if state is None or not all(isinstance(x, KeyValueBuffer) for x in others if isinstance(x, Cache)):
            return call(hidden_BSD, *args)
        weights, signature = state
        if (index, signature) not in self.layers:
            self.layers[index, signature] = self._trained(index), {}
        trained, kinds = self.layers[index, signature]
        if step.layer_arguments is None or any(map(operator.is_not, others, step.layer_arguments[0])):
            step.layer_arguments = others, *_fixed(step, others)
        _, fixed, described = step.layer_arguments
        if not (trained or hidden_BSD.requires_grad) or fixed is None:
            return call(hidden_BSD, *args)
        usual = Usual(step, run, weights, fixed, lambda inputs: call(inputs[0], *args), trained)
        key = hidden_BSD.requires_grad, _described(hidden_BSD), described
        return self._run(usual, kinds, key, [hidden_BSD])

    def _trained(self, index: int) -> list[Tensor]:
        return [weight for weight in self.checkpointing_layers[index].parameters() if weight.requires_grad]

    def _run(self, usual: Usual, kinds: dict[Any, Kind], key: Any, inputs: Sequence[Tensor]) -> Any:
        step, kind = usual.step, kinds.setdefault(key, Kind())
        program = kind.program(usual.columns)
        if program is not None and program.opened.keys().isdisjoint(step.rows):
            runner: Repetition | Recording = Repetition(usual, program)
        elif self._may_record(usual, kinds, kind):
            step.recorded, runner = step.recorded or bool(usual.run.past), Recording(usual, kind)
        else:
            result = usual.call(inputs)
            if kind.seen_in is None:
                kind.seen_in = weakref.ref(step)
                self._refuse(usual, kind, inputs, result)
            return result
        return _RecordedPass.apply(runner, step, len(inputs), *inputs, *usual.trained)

    def _refuse(self, usual: Usual, kind: Kind, inputs: Sequence[Tensor], result: Any) -> None:
        if not isinstance(result, Tensor):
            kind.refuse("their layers return more than hidden states")
        elif reaches_a_weight(result, [*inputs, *usual.trained], usual.step):
            kind.refuse("a weight of their layers takes its gradient in every pass")
        elif not usual.run.is_short and self.checkpoints and any(map(draws_random, self.modules)):
            kind.refuse("dropout of checkpointed layers needs the random state of the forward")

    def _may_record(self, usual: Usual, kinds: dict[Any, Kind], kind: Kind) -> bool:
        """The first and one later pass a step; none of the first step or of one that is measured."""
        step = usual.step
        is_new = kind.seen_in is None or kind.seen_in() is step
        is_observed = torch._C._len_torch_dispatch_stack() > 0
        is_taken = bool(usual.run.past) and step.recorded
        has_room = len(kind.recordings) < MAX_RECORDINGS and len(kinds) <= MAX_KINDS
        return has_room and not (is_new or is_observed or is_taken or kind.is_refused)

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
        number = self.signatures.setdefault(signature, len(self.signatures))
        return weights + [weight.detach().t() for weight in weights if weight.dim() == 2], number


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


def _fixed(step: Step, others: Sequence[Any]) -> tuple[dict[str, Any] | None, Any]:
    """What a recorded layer takes beside hidden states, and what its recording depends on of it.

    None if one of the tensors needs a gradient.
    """
    others = [y for x in others for y in (x if isinstance(x, tuple) else (x,))]
    fixed: dict[str, Any] = {"step": step}
    for number, x in enumerate(others):
        if isinstance(x, (Tensor, KeyValueBuffer, Mask)):
            fixed[f"other_{number}"] = x
        if isinstance(x, Mask):
            fixed[f"mask_{number}"] = x.own
    if any(x.requires_grad for x in fixed.values() if isinstance(x, Tensor)):
        return None, None
    return fixed, tuple(map(_described, [*others, *fixed.values()]))


def _described(x: Any) -> Any:
    """What a recording depends on of an argument of a layer."""
    if isinstance(x, Tensor):
        return len(x), x.dim(), x.dtype
    return x if isinstance(x, (bool, int, float, str)) else type(x)
