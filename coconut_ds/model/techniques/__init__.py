"""Techniques that keep memory and launches of several passes near those of one, set by `latent_memory`.

Activation checkpointing by layer is here, because it keeps the KV cache: Hugging Face's own switch drops it
with one warning, and a latent loop then trains on wrong logits.  A layer writes the cache in the forward; its
recomputation only reads, as the pass that it belongs to.  Passes of one column run without checkpointing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch
from coconut_ds.errors import ConfigError
from coconut_ds.model.techniques.attention import install_buffered_attention
from coconut_ds.model.techniques.deferred_grads import install_deferral
from coconut_ds.model.techniques.fused_activations import fuse_activations, install_rotary
from coconut_ds.model.techniques.kv_buffer import ConcatenatingCache, KeyValueBuffer
from coconut_ds.model.techniques.passes import Context, Pass, Step
from coconut_ds.model.techniques.recorded_passes import RecordedPasses, draws_random
from coconut_ds.model.techniques.supervised_loss import full_loss, supervised_loss


class Techniques:
    """The techniques of one model. Each is exact and works with any of the others on or off."""

    def __init__(self, causal_lm: PreTrainedModel, settings: LatentMemory) -> None:
        """Install them in place.  Raises ConfigError if the architecture does not support one."""
        self.causal_lm = causal_lm
        self.settings = settings
        self.context = Context(settings.deferred_weight_gradients)
        checkpoints = settings.activation_checkpointing != "none"
        self.recorded: RecordedPasses | None = RecordedPasses(causal_lm, self.context, checkpoints)
        self.layers = [m for m in causal_lm.modules() if hasattr(m, "gradient_checkpointing")]
        refuse_native_checkpointing(self.layers)
        if settings.deferred_weight_gradients:
            install_deferral(causal_lm, self.context)
        if settings.segmented_cache:
            install_buffered_attention(causal_lm)
        if settings.fused_activations:
            fuse_activations(causal_lm, self.context)
            install_rotary(causal_lm, self.context)
        if settings.activation_checkpointing == "layers":
            install_activation_checkpointing(causal_lm, self.context)
        elif settings.activation_checkpointing != "none":
            raise ConfigError(
                'latent_memory.activation_checkpointing must be "none" or "layers", '
                f"got {settings.activation_checkpointing!r}"
            )

    @contextmanager
    def training_forward(
        self, passes: Sequence[Pass], batch: Batch
    ) -> Iterator[KeyValueBuffer | ConcatenatingCache | None]:
        """Enclose all passes of one loss; yields the cache they share, or None for a single pass."""
        refuse_native_checkpointing(self.layers)
        step = Step(passes, batch.position_ids_BT, batch.attention_mask_BT)
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


def install_activation_checkpointing(model: PreTrainedModel, context: Context) -> None:
    """Route every decoder layer of `model` through `_checkpointed`.

    Raises ConfigError if the model has no such layers.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"latent_memory.activation_checkpointing: {type(model).__name__} does not support it; "
            'set it to "none"'
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        # Otherwise the layer drops the cache before it calls us.
        layer._can_checkpoint_with_cache = True
        layer._gradient_checkpointing_func = partial(_checkpointed, context)


def refuse_native_checkpointing(modules: Sequence[nn.Module]) -> None:
    """Raise ConfigError if `gradient_checkpointing_enable()` was called on the model of `modules`."""
    for module in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        is_ours = isinstance(function, partial) and function.func is _checkpointed
        if getattr(module, "gradient_checkpointing", False) and not is_ours:
            raise ConfigError(
                "Hugging Face's gradient checkpointing drops the KV cache, so latent passes would not see "
                "the question. Do not call gradient_checkpointing_enable(); set "
                'latent_memory.activation_checkpointing to "layers" in the ds_config.'
            )


def _checkpointed(context: Context, call: partial, hidden_BTD: Tensor, *args: Any) -> Any:
    """Run `call(hidden, *args)`, a layer's forward, without saving its activations."""
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

    is_random = any(draws_random(module) for module in call.args[0].modules())
    return checkpoint(layer, hidden_BTD, use_reentrant=False, preserve_rng_state=is_random)
