"""Passes that run from a recording, without modules and autograd.

A pass of one column is little arithmetic and much Python.  Its operators are the same every time, so they are
recorded while a pass runs as usual, forward and backward, and other passes call them directly, in the same
order and with the same results (recordings.py).  So do passes of many columns, and the layers of the first
pass, one by one.

    first     modules and autograd, as usual; finds models whose gradients do not all go through Rows
    then      modules and autograd, recorded as two functions
    later     the two functions

A recording (recorder.py) serves passes of its own columns, and of all columns once it equals one of other
columns in a batch of another length.

Shapes: B rows, D hidden size.
"""

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from coconut_ds.model.techniques.kv_buffer import KeyValueBuffer, Mask
from coconut_ds.model.techniques.passes import Context, Step, is_autocast, is_partitioned
from coconut_ds.model.techniques.recorder import reaches_a_weight
from coconut_ds.model.techniques.recordings import Kind, LayerRecording, Recording, Repetition, Runner, Usual

# Kinds of passes that are kept: rows, dtype, trained weights; and recordings of one kind.
MAX_KINDS, MAX_RECORDINGS = 8, 16


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
        # A recording of the last layer would be the peak: it runs before what the layer saves is released.
        is_peak = index == len(self.checkpointing_layers) - 1 and not self.checkpoints
        is_known = all(isinstance(x, KeyValueBuffer) for x in others if isinstance(x, Cache))
        if state is None or is_peak or not is_known:
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
        step, kind = usual.step, kinds.get(key)
        if kind is None:
            kind = kinds[key] = Kind()
        program = kind.program(usual)
        if program is not None and program.opened.keys().isdisjoint(step.rows):
            step.rows |= {module: rows.renewed() for module, rows in program.opened.items()}
            runner: Runner = Repetition(usual, program)
        elif self._may_record(usual, kinds, kind):
            step.recorded = step.recorded or bool(usual.run.past)
            runner = Recording(usual, kind) if usual.run.past else LayerRecording(usual, kind)
        else:
            result = usual.call(inputs)
            if kind.seen_in is None:
                kind.seen_in = weakref.ref(step)
                self._refuse(usual, kind, inputs, result)
            return result
        return runner.run(inputs, usual.trained)

    def _refuse(self, usual: Usual, kind: Kind, inputs: Sequence[Tensor], result: Any) -> None:
        if not isinstance(result, Tensor):
            kind.refuse("their layers return more than hidden states")
        elif reaches_a_weight(result, [*inputs, *usual.trained], usual.step):
            kind.refuse("a weight of their layers takes more than one gradient")
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
        if not torch.is_grad_enabled() or any(self.hooks) or nn.modules.module._has_any_global_hook():
            return ()
        weights = [w for tensors in self.tensors for w in tensors.values() if w is not None]
        if is_autocast(weights[0]) or any(map(is_partitioned, weights)):
            return ()
        # A buffer may be another tensor every step; recordings keep their parameters, so ids stay unique.
        own = [(w.requires_grad, id(w) if isinstance(w, nn.Parameter) else None) for w in weights]
        signature = *(m.training for m in self.modules), *own
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
