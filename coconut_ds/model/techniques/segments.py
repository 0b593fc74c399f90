"""A KV cache in segments, one per pass, as a transformers cache and attention implementation.

With a concatenating cache, every pass saves its own full-length keys and values for the backward.  Here the
question's keys and values are saved once and every later pass refers to them:

    keys      [ question | L0 | L1 | L2, answer ]     one contiguous tensor per pass, never copied
    scores    q K0^T | q K1^T | q K2^T                one softmax over all, then the sum of P_i V_i

Shapes: B rows, H query heads, K key-value heads, S query columns, T key columns, E head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from coconut_ds.errors import ConfigError
from coconut_ds.model.techniques.segment_attention import Records, SegmentAttention, SegmentGate, Segments

ATTENTION = "coconut_segments"


def install_segmented_attention(model: PreTrainedModel) -> None:
    """Have `model` attend through `segmented_attention`; its saved configuration is not touched.

    Raises ConfigError if the architecture's attention cannot be replaced.
    """
    AttentionInterface.register(ATTENTION, segmented_attention)
    AttentionMaskInterface.register(ATTENTION, segmented_mask)
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"latent_memory.segmented_cache: {type(model).__name__} does not let its attention be replaced "
            "(no support for transformers' AttentionInterface); set segmented_cache to false"
        )
    model.set_attn_implementation(ATTENTION)


class SegmentedLayer(CacheLayerMixin):
    """One layer's segments."""

    is_sliding = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.past: list[tuple[Tensor, Tensor]] = []
        self.anchors: list[Tensor] = []
        self.records = Records()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def read(self, key_BKSE: Tensor, value_BKSE: Tensor, num_past: int) -> Segments:
        """Return what a pass after `num_past` others attends to; the cache stays as it is."""
        return Segments(
            tuple(self.past[:num_past]),
            key_BKSE.contiguous(),
            value_BKSE.contiguous(),
            tuple(self.anchors[:num_past]),
            self.records,
        )

    def write(self, key_BKSE: Tensor, value_BKSE: Tensor) -> None:
        """Append a segment for the passes to come."""
        if not self.is_initialized:
            self.lazy_initialization(key_BKSE, value_BKSE)
        is_last_to_run = not any(anchor.requires_grad for anchor in self.anchors)
        position = (len(self.past), self.length, is_last_to_run)
        self.anchors.append(SegmentGate.apply(key_BKSE, value_BKSE, self.records, position))
        self.past.append((key_BKSE.detach(), value_BKSE.detach()))
        self.length += key_BKSE.shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        segments = self.read(key_states, value_states, len(self.past))
        self.write(segments.key_BKSE, segments.value_BKSE)
        return segments, segments

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SegmentedCache(Cache):
    """A cache for one multi-pass forward."""

    layers: list[Any]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=SegmentedLayer)

    def num_passes(self, layer_index: int) -> int:
        return len(self._layer(layer_index).past)

    def read(self, key: Tensor, value: Tensor, layer_index: int, num_past: int) -> tuple[Any, Any]:
        segments = self._layer(layer_index).read(key, value, num_past)
        return segments, segments

    def write(self, key: Tensor, value: Tensor, layer_index: int) -> None:
        self._layer(layer_index).write(key, value)

    def forget_graph(self) -> None:
        """Release the graph at the end of the forward; its nodes keep what the backward needs."""
        for layer in self.layers:
            layer.anchors.clear()

    def _layer(self, layer_index: int) -> SegmentedLayer:
        while len(self.layers) <= layer_index:
            self.layers.append(SegmentedLayer())
        return self.layers[layer_index]


def segmented_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor | None:
    """Additive mask [B, 1, S, T], built once per pass and shared by all layers; None if purely causal.

    A query in the left padding sees only itself: a softmax over nothing would be NaN.
    """
    skip = allow_is_causal_skip and (attention_mask is None or q_length == kv_length)
    allowed = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=skip,
        **kwargs,
    )
    if allowed is None:
        return None
    itself = torch.ones(q_length, kv_length, dtype=torch.bool, device=allowed.device)
    itself = itself.tril(kv_length - q_length).triu(kv_length - q_length)
    hidden = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return hidden.masked_fill_(~(allowed | itself), float("-inf"))


def segmented_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Segments,
    value: Tensor | Segments,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, S, E] -> [B, S, H, E]."""
    if isinstance(key, Tensor) or isinstance(value, Tensor):
        assert isinstance(key, Tensor) and isinstance(value, Tensor)
        if key.shape[2] != query.shape[2]:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        # No cache, or an empty one, as in a first pass.
        key = Segments((), key, value, (), Records())
    elif query.untyped_storage().nbytes() > query.numel() * query.element_size():
        # A view would keep the complete fused projection alive.  The output takes the query's layout, so with
        # the heads of a column side by side the next layer need not copy it.
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ConfigError(
            f"latent_memory.segmented_cache: {type(module).__name__} uses soft capping or attention sinks, "
            "which segmented attention does not support; set segmented_cache to false"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not key.past and (dropout == 0 or query.is_cuda):
        out_BHSE = _long_pass(query, key, attention_mask, dropout, scale)
    else:
        out_BHSE = _attend(query, key, attention_mask, dropout, scale)
    return out_BHSE.transpose(1, 2), None


def _long_pass(query: Tensor, own: Segments, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """Attention of the first pass, through torch's fused kernels."""
    key, value, groups = own.key_BKSE, own.value_BKSE, query.shape[1] // own.key_BKSE.shape[1]
    if groups > 1 and mask is not None and query.is_cuda:
        # With a mask and grouped heads, CUDA falls back to a kernel that saves all probabilities.
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    # O = softmax(scale Q K^T + mask) V
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and query.shape[2] > 1,
        scale=scale,
        enable_gqa=groups > 1,
    )


def _attend(
    query_BHSE: Tensor, segments: Segments, mask: Tensor | None, dropout: float, scale: float
) -> Tensor:
    """Attention of a later pass, over all segments."""
    columns = sum(k.shape[2] for k, _ in segments.past) + segments.key_BKSE.shape[2]
    if mask is None and query_BHSE.shape[2] > 1:
        shape = (query_BHSE.shape[2], columns)
        hidden = torch.ones(shape, dtype=torch.bool, device=query_BHSE.device).triu(columns - shape[0] + 1)
        mask = torch.zeros(shape, dtype=query_BHSE.dtype, device=query_BHSE.device)
        mask = mask.masked_fill_(hidden, float("-inf"))[None, None]
    keep = None
    if dropout > 0:
        keep = torch.rand(*query_BHSE.shape[:3], columns, device=query_BHSE.device) >= dropout
    return SegmentAttention.apply(
        query_BHSE,
        segments.key_BKSE,
        segments.value_BKSE,
        mask,
        keep,
        dropout,
        scale,
        segments,
        *segments.anchors,
    )
