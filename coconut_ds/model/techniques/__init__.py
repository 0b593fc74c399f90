"""Techniques that keep the memory of several passes at that of one, selected by `latent_memory`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch
from coconut_ds.errors import ConfigError
from coconut_ds.model.techniques.activation_checkpointing import (
    ConcatenatingCache,
    install_activation_checkpointing,
    refuse_native_checkpointing,
)
from coconut_ds.model.techniques.deferred_grads import install_deferral
from coconut_ds.model.techniques.fused_activations import fuse_activations
from coconut_ds.model.techniques.segments import SegmentedCache, install_segmented_attention
from coconut_ds.model.techniques.supervised_loss import full_loss, supervised_loss


class Techniques:
    """The techniques of one model. Each is exact and works with any of the others on or off."""

    def __init__(self, causal_lm: PreTrainedModel, settings: LatentMemory) -> None:
        """Install them in place.  Raises ConfigError if the architecture does not support one."""
        self.causal_lm = causal_lm
        self.settings = settings
        refuse_native_checkpointing(causal_lm)
        self.deferral = install_deferral(causal_lm) if settings.deferred_weight_gradients else None
        if settings.segmented_cache:
            install_segmented_attention(causal_lm)
        if settings.fused_activations:
            fuse_activations(causal_lm)
        if settings.activation_checkpointing == "layers":
            install_activation_checkpointing(causal_lm, self.deferral)
        elif settings.activation_checkpointing != "none":
            raise ConfigError(
                'latent_memory.activation_checkpointing must be "none" or "layers", '
                f"got {settings.activation_checkpointing!r}"
            )

    @contextmanager
    def training_forward(self, batch: Batch) -> Iterator[SegmentedCache | ConcatenatingCache | None]:
        """Enclose all passes of one loss; yields the cache they share, or None for a single pass."""
        refuse_native_checkpointing(self.causal_lm)
        cache: SegmentedCache | ConcatenatingCache | None = None
        if batch.num_latents:
            cache = SegmentedCache() if self.settings.segmented_cache else ConcatenatingCache()
        try:
            with nullcontext() if self.deferral is None else self.deferral.forward():
                yield cache
        finally:
            if cache is not None:
                cache.forget_graph()

    def loss(self, hidden_BTD: Tensor, batch: Batch, head: nn.Module) -> Tensor:
        """Sum of the batch's token losses, fp32."""
        if not self.settings.supervised_logits_only:
            return full_loss(hidden_BTD, batch.labels_BT, head)
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.target_positions_N]
        return supervised_loss(
            hidden_ND, batch.target_ids_N, head, self.settings.loss_chunk_tokens, self.deferral
        )
