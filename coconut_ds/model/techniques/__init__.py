"""Techniques that keep memory and launches of several passes near those of one, set by `latent_memory`.

Activation checkpointing by layer is here, because it keeps the KV cache: Hugging Face's own switch drops it
with one warning, and a latent loop then trains on wrong logits.  A layer writes the cache in the forward; its
recomputation only reads, as the pass that it belongs to.  Passes of one column run without checkpointing.

The supervised loss is here, too: the cross-entropy of the supervised positions, chunk by chunk, without the
[rows, tokens, vocabulary] logits.  With tied embeddings, the head and the embedding share one weight, and its
gradient is vocabulary-sized.  Autograd would hold the head's part through the complete backward and then add
the embedding's, as large.  Here the head's part is postponed: it is queued (as logit gradients if they are
small, otherwise as the inputs needed to recompute them) and added when the embedding's backward runs, after
all activations are freed.

Shapes: B rows, T columns, N supervised positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch
from coconut_ds.errors import ConfigError
from coconut_ds.model.techniques.attention import install_buffered_attention
from coconut_ds.model.techniques.deferred_grads import DeferringLinear, install_deferral
from coconut_ds.model.techniques.fused_activations import fuse_activations, install_rotary
from coconut_ds.model.techniques.kv_buffer import ConcatenatingCache, KeyValueBuffer
from coconut_ds.model.techniques.passes import Context, Pass, Step, is_autocast, is_partitioned
from coconut_ds.model.techniques.recorded_passes import RecordedPasses, draws_random, random_settings


class Techniques:
    """The techniques of one model. Each is exact and works with any of the others on or off."""

    def __init__(self, causal_lm: PreTrainedModel, settings: LatentMemory) -> None:
        """Install them in place.  Raises ConfigError if the architecture does not support one."""
        self.causal_lm = causal_lm
        self.settings = settings
        self.context = Context(settings.deferred_weight_gradients)
        checkpoints = settings.activation_checkpointing == "layers"
        self.recorded = (
            RecordedPasses(causal_lm, self.context, checkpoints) if settings.recorded_passes else None
        )
        self.layers = [m for m in causal_lm.modules() if hasattr(m, "gradient_checkpointing")]
        refuse_native_checkpointing(self.layers)
        if settings.deferred_weight_gradients:
            install_deferral(causal_lm, self.context)
        if settings.segmented_cache:
            install_buffered_attention(causal_lm)
        if settings.fused_activations:
            fuse_activations(causal_lm, self.context)
            install_rotary(causal_lm, self.context)
        if settings.activation_checkpointing not in ("none", "layers"):
            raise ConfigError(
                'latent_memory.activation_checkpointing must be "none" or "layers", '
                f"got {settings.activation_checkpointing!r}"
            )
        route_layers(causal_lm, self.context, checkpoints)

    @contextmanager
    def training_forward(
        self, passes: Sequence[Pass], batch: Batch
    ) -> Iterator[KeyValueBuffer | ConcatenatingCache | None]:
        """Enclose all passes of one loss; yields the cache they share, or None for a single pass."""
        refuse_native_checkpointing(self.layers)
        step = Step(passes, batch.position_ids_BT, batch.attention_mask_BT)
        step.recorded_passes = self.recorded
        cache: KeyValueBuffer | ConcatenatingCache | None = None
        if len(passes) > 1 and self.settings.segmented_cache:
            cache = KeyValueBuffer(self.context, step, self.causal_lm.config.num_hidden_layers)
        elif len(passes) > 1:
            cache = ConcatenatingCache(self.context, step)
        try:
            with self.context.running(step, passes[0]):
                yield cache
        finally:
            step.forget_graph()
            if isinstance(cache, ConcatenatingCache):
                cache.forget_graph()

    def advance(
        self,
        run: Pass,
        embeds_BTD: Tensor,
        mask_BT: Tensor,
        positions_BT: Tensor,
        read: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Hidden states of one pass, through `read(embeddings, mask, position ids)`."""
        step = self.context.step
        if step is None:
            return read(embeds_BTD, mask_BT, positions_BT)
        with self.context.running(step, run, positions_BT):
            if not run.past:
                return step.leave_first(read(embeds_BTD, mask_BT, positions_BT))
            # The buffer has the masks of all later passes; transformers hands on any mask of four dimensions.
            mask = mask_BT[:, None, None] if self.settings.segmented_cache else mask_BT
            embeds_BTD = step.enter(embeds_BTD)
            if self.recorded is not None and step.layers:
                return self.recorded.advance(embeds_BTD, mask, positions_BT, read)
            return read(embeds_BTD, mask, positions_BT)

    def losses(self, hidden_BTD: Tensor, batch: Batch, head: nn.Module) -> Tensor:
        """The loss of every target of the batch, losses_N in fp32."""
        if not self.settings.supervised_logits_only:
            return full_loss(hidden_BTD, batch.target_positions_N, batch.target_ids_N, head)
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.target_positions_N]
        return supervised_loss(
            hidden_ND, batch.target_ids_N, head, self.settings.loss_chunk_tokens, self.context
        )


def route_layers(model: PreTrainedModel, context: Context, checkpoints: bool) -> None:
    """Route every decoder layer of `model` through `_run_layer`.

    Raises ConfigError if layers without activation checkpointing are to have it.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if checkpoints and not layers:
        raise ConfigError(
            f"latent_memory.activation_checkpointing: {type(model).__name__} does not support it; "
            'set it to "none"'
        )
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = True
        # Otherwise the layer drops the cache before it calls us.
        layer._can_checkpoint_with_cache = True
        sources = [module for module in layer.modules() if random_settings(module)] if checkpoints else None
        layer._gradient_checkpointing_func = partial(_run_layer, context, index, sources)


def refuse_native_checkpointing(modules: Sequence[nn.Module]) -> None:
    """Raise ConfigError if `gradient_checkpointing_enable()` was called on the model of `modules`."""
    for module in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        is_ours = isinstance(function, partial) and function.func is _run_layer
        if getattr(module, "gradient_checkpointing", False) and not is_ours:
            raise ConfigError(
                "Hugging Face's gradient checkpointing drops the KV cache, so latent passes would not see "
                "the question. Do not call gradient_checkpointing_enable(); set "
                'latent_memory.activation_checkpointing to "layers" in the ds_config.'
            )


def _run_layer(
    context: Context,
    index: int,
    sources: Sequence[nn.Module] | None,
    call: partial,
    *hidden_and_others: Any,
) -> Any:
    """Run `call(hidden, *others)`, a layer's forward; if possible, recorded.

    sources: modules of the layer that may draw random numbers; None without activation checkpointing.
    """
    run = call if sources is None else partial(_checkpointed, context, sources, call)
    recorded = None if context.step is None else context.step.recorded_passes
    if recorded is None or not hidden_and_others or context.current.past or context.is_recomputing:
        return run(*hidden_and_others)
    hidden_BTD, *others = hidden_and_others
    return recorded.advance_layer(index, run, hidden_BTD, others, tuple(call.keywords.values()))


def _checkpointed(
    context: Context, sources: Sequence[nn.Module], call: partial, hidden_BTD: Tensor, *args: Any
) -> Any:
    """Run `call(hidden, *args)`, a layer's forward, without saving its activations.

    sources: modules of the layer that may draw random numbers.
    """
    if context.current.is_short or not torch.is_grad_enabled():
        return call(hidden_BTD, *args)
    step, run, has_run = context.step, context.current, False

    def layer(hidden_BTD: Tensor) -> Any:
        nonlocal has_run
        if not has_run:
            has_run = True
            return call(hidden_BTD, *args)
        with context.running(step, run, is_recomputing=True):
            return call(hidden_BTD, *args)

    draws = any(map(draws_random, sources))
    return checkpoint(layer, hidden_BTD, use_reentrant=False, preserve_rng_state=draws)


def supervised_loss(
    hidden_ND: Tensor, target_ids_N: Tensor, head: nn.Module, chunk_tokens: int, context: Context
) -> Tensor:
    """The token losses, losses_N in fp32; at most `chunk_tokens` positions have logits at a time."""
    if (
        not isinstance(head, nn.Linear)
        or type(head) not in (nn.Linear, DeferringLinear)
        or is_partitioned(head.weight)
        or is_autocast(hidden_ND)
    ):
        return _loss_through_module(hidden_ND, target_ids_N, head, chunk_tokens)
    weight = head.weight
    step = context.step if context.defers(weight) else None
    lookup = None if step is None else step.lookups.get(id(weight))
    matrix = weight if lookup is None else weight.detach()
    return _HeadLoss.apply(hidden_ND, matrix, head.bias, lookup, step, target_ids_N, chunk_tokens)


def full_loss(hidden_BTD: Tensor, positions_N: Tensor, target_ids_N: Tensor, head: nn.Module) -> Tensor:
    """The token losses at flat positions b*T+t, losses_N, from fp32 logits of every column."""
    logits_BTV = head(hidden_BTD).float()
    return F.cross_entropy(logits_BTV.flatten(0, 1)[positions_N], target_ids_N, reduction="none")


def _loss_through_module(
    hidden_ND: Tensor, target_ids_N: Tensor, head: nn.Module, chunk_tokens: int
) -> Tensor:
    """Call the head as a module: for adapters, trainable rows and ZeRO-3."""

    def loss_of(hidden_ND: Tensor, target_ids_N: Tensor) -> Tensor:
        return _LogitsLoss.apply(head(hidden_ND).float(), target_ids_N)

    chunks = list(zip(hidden_ND.split(chunk_tokens), target_ids_N.split(chunk_tokens), strict=True))
    if len(chunks) == 1:
        return loss_of(*chunks[0])
    losses = [
        checkpoint(loss_of, hidden, ids, use_reentrant=False, preserve_rng_state=False)
        for hidden, ids in chunks
    ]
    return torch.cat(losses)


class _LogitsLoss(torch.autograd.Function):
    """Cross-entropy from logits; one buffer holds the logits, then the softmax, then the gradient."""

    @staticmethod
    def forward(ctx, logits_NV, target_ids_N):  # type: ignore[override]
        # loss_n = log sum exp(z_n) - z_n[target_n], for logits z
        target_logits = logits_NV.gather(1, target_ids_N[:, None])[:, 0]
        norm_N = _softmax_(logits_NV)
        ctx.save_for_backward(logits_NV, target_ids_N)
        return norm_N - target_logits

    @staticmethod
    def backward(ctx, dloss_N):  # type: ignore[override]
        softmax_NV, target_ids_N = ctx.saved_tensors
        return _logit_gradient_(softmax_NV, target_ids_N, dloss_N), None


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy from hidden states, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, lookup, step, target_ids_N, chunk_tokens):  # type: ignore[override]
        losses, probabilities, norms = [], [], []
        for hidden, targets in zip(
            hidden_ND.split(chunk_tokens), target_ids_N.split(chunk_tokens), strict=True
        ):
            # z = hidden W^T + b,  loss_n = log sum exp(z_n) - z_n[target_n]
            logits = F.linear(hidden, weight_VD, bias_V).float()
            target_logits = logits.gather(1, targets[:, None])[:, 0]
            norm_N = _softmax_(logits)
            losses.append(norm_N - target_logits)
            norms.append(norm_N)
            probabilities.append(logits)
            if len(hidden_ND) > chunk_tokens or not ctx.needs_input_grad[0]:
                probabilities.clear()
            del logits
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_ids_N, *norms)
        # A single chunk keeps its softmax for the logit gradient; several chunks recompute theirs.
        ctx.probabilities, ctx.chunk_tokens = probabilities, chunk_tokens
        ctx.lookup, ctx.step = lookup, step
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, dloss_N):  # type: ignore[override]
        hidden_ND, weight_VD, bias_V, target_ids_N, *norms = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        kept, ctx.probabilities = ctx.probabilities, []
        dhidden, dweight, dbias = [], None, None
        chunks = list(
            zip(*(x.split(ctx.chunk_tokens) for x in (hidden_ND, target_ids_N, dloss_N)), norms, strict=True)
        )
        for hidden, targets, dloss, norm_N in chunks:
            softmax = kept.pop() if kept else _softmax(hidden, weight_VD, bias_V, norm_N)
            dlogits = _logit_gradient_(softmax, targets, dloss).to(hidden.dtype)
            del softmax
            # dhidden = dz W,  db = column sums of dz,  dW = dz^T hidden
            if needs_hidden:
                dhidden.append(dlogits @ weight_VD)
            if needs_bias:
                dbias = dlogits.sum(0) if dbias is None else dbias.add_(dlogits.sum(0))
            if ctx.lookup is not None:
                ctx.step.watch()
                if len(chunks) == 1 and 2 * len(hidden) <= hidden.shape[1]:
                    ctx.lookup.additions.append(partial(_add_product, dlogits, hidden))
                else:
                    inputs = (hidden, weight_VD, bias_V, targets, norm_N, dloss)
                    ctx.lookup.additions.append(partial(_recompute_product, *inputs))
            elif needs_weight:
                dweight = _add_product(dlogits, hidden, dweight)
            del dlogits
        return torch.cat(dhidden) if needs_hidden else None, dweight, dbias, None, None, None, None


def _softmax_(logits_NV: Tensor) -> Tensor:
    """Turn logits into probabilities in place; returns log sum exp of the logits, norm_N."""
    # m = max(z),  p = exp(z - m) / sum(exp(z - m)),  norm = log(sum(exp(z - m))) + m
    highest_N = logits_NV.amax(dim=1)
    total_N = logits_NV.sub_(highest_N[:, None]).exp_().sum(dim=1)
    logits_NV.div_(total_N[:, None])
    return total_N.log() + highest_N


def _softmax(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, norm_N: Tensor) -> Tensor:
    # p = exp(z - norm)
    return F.linear(hidden_ND, weight_VD, bias_V).float().sub_(norm_N[:, None]).exp_()


def _logit_gradient_(softmax_NV: Tensor, target_ids_N: Tensor, dloss_N: Tensor) -> Tensor:
    """Turn the softmax into the gradient of the logits, in place."""
    # dz_n = (softmax(z_n) - onehot(target_n)) * dloss_n
    minus_one_N1 = softmax_NV.new_full((len(target_ids_N), 1), -1)
    return softmax_NV.scatter_add_(1, target_ids_N[:, None], minus_one_N1).mul_(dloss_N[:, None])


def _add_product(dlogits_NV: Tensor, hidden_ND: Tensor, dweight_VD: Tensor | None) -> Tensor:
    # dW += dz^T hidden
    if dweight_VD is None:
        return torch.mm(dlogits_NV.t(), hidden_ND)
    return dweight_VD.addmm_(dlogits_NV.t(), hidden_ND)


def _recompute_product(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_ids_N: Tensor,
    norm_N: Tensor,
    dloss_N: Tensor,
    dweight_VD: Tensor | None,
) -> Tensor:
    softmax = _softmax(hidden_ND, weight_VD, bias_V, norm_N)
    dlogits = _logit_gradient_(softmax, target_ids_N, dloss_N).to(hidden_ND.dtype)
    return _add_product(dlogits, hidden_ND, dweight_VD)
