"""Attention of several passes over one buffer of keys and values.

The first pass runs through torch's fused kernels.  D is the dropout factor, 0 or 1 / (1 - p):

    S  = scale Q K^T + mask    P  = softmax(S)                          O  = (P * D) V
    dP = (dO V^T) * D          dS = P * (dP - rowsum(P * dP))
    dQ = scale dS K            dK = scale dS^T Q                        dV = (P * D)^T dO

Passes of one column keep P and dS.  Wide passes keep Q and dO, and compute P again, a block at a time, in
their own backward and in the first pass's.

Shapes: B rows, H query heads, K key-value heads (H = K * G), S query columns, T visible columns, E head size.
N = B * K; the G query heads of a group are folded into rows, R = G * S.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from coconut_ds.errors import ConfigError
from coconut_ds.model.techniques.kv_buffer import (
    WITHOUT_BUFFER,
    KeyValueBuffer,
    Layer,
    Mask,
    Slot,
    add_products,
    make_mask,
)
from coconut_ds.model.techniques.passes import Pass, Step

ATTENTION = "coconut_buffer"
# Score elements computed at a time in wide passes; 4 million are 16 MiB in fp32.
BLOCK_ELEMENTS = 1 << 22


def install_buffered_attention(model: PreTrainedModel) -> None:
    """Have `model` attend through `buffered_attention`; its saved configuration is not touched.

    Raises ConfigError if the architecture's attention cannot be replaced.
    """
    AttentionInterface.register(ATTENTION, buffered_attention)
    AttentionMaskInterface.register(ATTENTION, make_mask)
    if getattr(model.config.get_text_config(), "kv_lora_rank", None):
        raise ConfigError(
            f"latent_memory.segmented_cache: {type(model).__name__} has multi-head latent attention, which "
            "makes its keys of cached ones; "
            f"write {WITHOUT_BUFFER} in the ds_config"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"latent_memory.segmented_cache: {type(model).__name__} does not let its attention be replaced "
            "(no support for transformers' AttentionInterface); "
            f"write {WITHOUT_BUFFER} in the ds_config"
        )
    model.set_attn_implementation(ATTENTION)


class Block(NamedTuple):
    """Some query columns of a wide pass, and their (P * D) and dS for all visible columns."""

    query_NRE: Tensor
    dout_NRE: Tensor
    weights_NRT: Tensor
    dscores_NRT: Tensor


@dataclass
class Wide:
    """Attention of a pass of many columns; keys, values and mask are of the columns that it sees."""

    run: Pass
    query_NGSE: Tensor
    keys_NTE: Tensor
    values_NTE: Tensor
    mask_N1ST: Tensor  # or with B for N
    keep_NGST: Tensor | None  # dropout: True where the probability was kept
    scale: float
    dropout: float
    dout_NGSE: Tensor | None = None

    def output(self) -> Tensor:
        """[N, G, S, E]"""
        # O = (P * D) V
        outs = [
            torch.bmm(self._dropped(self._probabilities(query, columns), columns).to(dtype), self.values_NTE)
            for columns in self._blocks()
            for query, dtype in ((_rows(self.query_NGSE, columns), self.values_NTE.dtype),)
        ]
        return self.joined(outs)

    def gradients(self) -> Iterator[Block]:
        """P and dS, computed again, a block of query columns at a time."""
        assert self.dout_NGSE is not None
        dtype = self.query_NGSE.dtype
        for columns in self._blocks():
            query, dout = _rows(self.query_NGSE, columns), _rows(self.dout_NGSE, columns)
            weights = self._probabilities(query, columns)
            # dP = (dO V^T) * D,  dS = P * (dP - rowsum(P * dP))
            dweights = self._dropped(torch.bmm(dout, self.values_NTE.mT).to(weights.dtype), columns)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            yield Block(query, dout, self._dropped(weights, columns).to(dtype), dscores.to(dtype))

    def add_products(
        self, block: Block, low: int, high: int, dkeys_NTE: Tensor, dvalues_NTE: Tensor, beta: int = 1
    ) -> None:
        """Add a block's dK and dV to the sums of the buffer's columns [low, high); beta 0 overwrites."""
        spans = list(self.run.spans(low, high))
        if beta == 0 and sum(stop - start for start, stop, _ in spans) < high - low:
            dkeys_NTE.zero_()
            dvalues_NTE.zero_()
            beta = 1
        for start, stop, offset in spans:
            width, targets = stop - start, (dkeys_NTE, dvalues_NTE)
            if width < high - low:
                targets = dkeys_NTE.narrow(1, start - low, width), dvalues_NTE.narrow(1, start - low, width)
            parts = block.weights_NRT.narrow(2, offset, width), block.dscores_NRT.narrow(2, offset, width)
            add_products(*targets, block.query_NRE, block.dout_NRE, *parts, self.scale, beta)

    def joined(self, blocks_NRE: list[Tensor]) -> Tensor:
        """Rows of all blocks as [N, G, S, E]."""
        N, G, _, E = self.query_NGSE.shape
        parts = [block.view(N, G, -1, E) for block in blocks_NRE]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _probabilities(self, query_NRE: Tensor, columns: slice | None) -> Tensor:
        # S = scale Q K^T + mask,  P = softmax(S)
        mask, N, G = self.mask_N1ST, *self.query_NGSE.shape[:2]
        if columns is not None:
            mask = mask[:, :, columns]
        if len(mask) != N:
            mask = mask.repeat_interleave(N // len(mask), 0)
        # Nothing here holds the expanded mask while the softmax runs.
        scores_NRT = _scores(
            query_NRE,
            self.keys_NTE,
            mask.squeeze(1) if G == 1 else mask.expand(-1, G, -1, -1).flatten(1, 2),
            self.scale,
        )
        return scores_NRT.softmax(-1)

    def _dropped(self, weights_NRT: Tensor, columns: slice | None) -> Tensor:
        if self.keep_NGST is None:
            return weights_NRT
        # D = keep / (1 - p)
        return weights_NRT * _rows(self.keep_NGST, columns) * (1 / (1 - self.dropout))

    def _blocks(self) -> Iterator[slice | None]:
        """Ranges of query columns; None: all at once."""
        N, G, S, _ = self.query_NGSE.shape
        size = max(1, BLOCK_ELEMENTS // (N * G * self.keys_NTE.shape[1]))
        if size >= S:
            yield None
            return
        for start in range(0, S, size):
            yield slice(start, min(start + size, S))


def _rows(x_NGST: Tensor, columns: slice | None) -> Tensor:
    """Some columns of all heads of a group, as rows."""
    return (x_NGST if columns is None else x_NGST[:, :, columns]).flatten(1, 2)


def _scores(query_NRE: Tensor, keys_NTE: Tensor, mask_NRT: Tensor, scale: float) -> Tensor:
    """scale Q K^T + mask, in fp32 at least: in 16 bits it overflows, or is rounded before the softmax."""
    if query_NRE.dtype not in (torch.float16, torch.bfloat16):
        return torch.baddbmm(mask_NRT, query_NRE, keys_NTE.mT, alpha=scale)
    if query_NRE.device.type == "cuda":
        mask_NRT = mask_NRT.expand(-1, query_NRE.shape[1], -1)
        return torch.baddbmm(mask_NRT, query_NRE, keys_NTE.mT, alpha=scale, out_dtype=torch.float32)
    return torch.baddbmm(mask_NRT.float(), query_NRE.float(), keys_NTE.float().mT, alpha=scale)


class _FirstPass(torch.autograd.Function):
    """Write the question's keys and values, unless run is None; returns them as the buffer has them."""

    @staticmethod
    def forward(ctx, key_BKSE, value_BKSE, layer, step, run, scale):  # type: ignore[override]
        ctx.layer, ctx.step, ctx.scale = layer, step, scale
        return step.call(Layer.first_states, layer, run, key_BKSE, value_BKSE)

    @staticmethod
    def backward(ctx, dkey_BKSE, dvalue_BKSE):  # type: ignore[override]
        ctx.step.call(Layer.collect, ctx.layer, dkey_BKSE, dvalue_BKSE, ctx.scale)
        return dkey_BKSE, dvalue_BKSE, *(None,) * 4


def short_attention(
    layer: Layer,
    run: Pass,
    query_NGE: Tensor,
    key_BK1E: Tensor,
    value_BK1E: Tensor,
    scale: float,
    dropout: float,
) -> tuple[Tensor | None, ...]:
    """Attention of a later pass of one column, over all columns of the buffer; what its backward needs."""
    assert layer.mask is not None
    layer.write(key_BK1E, value_BK1E, run)
    keys, values = layer.keys_NTE, layer.values_NTE
    # S = scale Q K^T + mask,  P = softmax(S),  O = (P * D) V
    weights = _scores(query_NGE, keys, layer.mask.later(run), scale).softmax(-1).to(values.dtype)
    kept, keep = torch.native_dropout(weights, dropout, True) if dropout else (weights, None)
    return torch.bmm(kept, values), weights, keep


def short_gradients(
    layer: Layer,
    run: Pass,
    query_NGE: Tensor,
    weights_NGT: Tensor,
    keep_NGT: Tensor | None,
    dout_NGE: Tensor,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV of the column, [N, G, E] and twice [N, E]."""
    # dP = (dO V^T) * D,  dS = P * (dP - rowsum(P * dP)),  dQ = scale dS K
    dweights, kept = torch.bmm(dout_NGE, layer.values_NTE.mT), weights_NGT
    if keep_NGT is not None:
        dweights, kept = (
            torch.ops.aten.native_dropout_backward(x, keep_NGT, 1 / (1 - dropout))
            for x in (dweights, weights_NGT)
        )
    dscores = torch._softmax_backward_data(dweights, weights_NGT, -1, weights_NGT.dtype)
    dquery = torch.baddbmm(query_NGE, dscores, layer.keys_NTE, beta=0, alpha=scale)
    # All columns of the tail, for equal shapes in all passes: those not yet written get zeros.
    tails = layer.tails
    dkeys_NTE, dvalues_NTE = tails.of(layer)
    tail = 2, tails.first, tails.stop - tails.first
    add_products(
        dkeys_NTE, dvalues_NTE, query_NGE, dout_NGE, kept.narrow(*tail), dscores.narrow(*tail), scale
    )
    if layer.defers:
        layer.records.append((query_NGE, dout_NGE, kept, dscores))
    dkey, dvalue = tails.own(layer, run)
    return dquery, dkey, dvalue


class _ShortPass(torch.autograd.Function):
    """Attention of a later pass of one column."""

    @staticmethod
    def forward(ctx, query_BH1E, key_BK1E, value_BK1E, layer, step, run, scale, dropout):  # type: ignore[override]
        ctx.layer, ctx.step, ctx.run, ctx.scale, ctx.dropout = layer, step, run, scale, dropout
        ctx.shape = key_BK1E.shape
        query_NGE = query_BH1E.reshape(key_BK1E.shape[0] * key_BK1E.shape[1], -1, key_BK1E.shape[3])
        states = query_NGE, key_BK1E, value_BK1E
        out_NGE, *saved = step.call(short_attention, layer, run, *states, scale, dropout)
        ctx.save_for_backward(query_NGE, *saved)
        return out_NGE.view(query_BH1E.shape)

    @staticmethod
    def backward(ctx, dout_BH1E):  # type: ignore[override]
        query_NGE, weights, keep = ctx.saved_tensors
        dout_NGE = dout_BH1E.reshape(query_NGE.shape)
        args = ctx.layer, ctx.run, query_NGE, weights, keep, dout_NGE, ctx.scale, ctx.dropout
        dquery, dkey, dvalue = ctx.step.call(short_gradients, *args)
        states = dquery.view(dout_BH1E.shape), dkey.view(ctx.shape), dvalue.view(ctx.shape)
        return *states, *(None,) * 5


def wide_attention(
    layer: Layer | None,
    run: Pass,
    query_BHSE: Tensor,
    key_BKSE: Tensor,
    value_BKSE: Tensor,
    writes: bool,
    mask: Tensor | None,
    keep: Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor | None, ...]:
    """Attention of a pass of many columns; what its backward needs.  mask: None in a later pass."""
    if writes:
        assert layer is not None
        layer.write(key_BKSE, value_BKSE, run)
    B, H, S, E = query_BHSE.shape
    query = query_BHSE.reshape(-1, H // key_BKSE.shape[1], S, E)
    if mask is None:
        assert layer is not None and layer.mask is not None
        mask = layer.mask.later(run)
        if dropout:
            keep = torch.rand((*query.shape[:2], *mask.shape[2:]), device=query.device) >= dropout
    wide = Wide(run, query, *_seen(layer, run, key_BKSE, value_BKSE), mask, keep, scale, dropout)
    return wide.output().view(B, H, S, E), query, mask, keep


def wide_gradients(
    layer: Layer | None,
    run: Pass,
    query: Tensor,
    mask: Tensor,
    keep: Tensor | None,
    own_states: Sequence[Tensor],
    dout_BHSE: Tensor,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV; leaves the rest of dK and dV in the tails and for the first pass."""
    keys, values = _seen(layer, run, *own_states)
    dout = dout_BHSE.reshape(query.shape)
    wide = Wide(run, query, keys, values, mask, keep, scale, dropout, dout)
    N, _, S, E = query.shape
    # In the layout of the projections' outputs, so that the layer before need not copy them.
    sums_2SNE = keys.new_empty(2, S, N, E)
    dkeys, dvalues = sums_2SNE.transpose(1, 2).unbind()
    first = 0 if layer is None else layer.tails.first
    last = min(run.start, layer.tails.stop) if layer is not None and run.past else first
    dblocks, beta = [], 0
    for block in wide.gradients():
        # dQ = scale dS K
        dblocks.append(torch.baddbmm(block.query_NRE, block.dscores_NRT, keys, beta=0, alpha=scale))
        wide.add_products(block, run.start, run.stop, dkeys, dvalues, beta)
        if layer is not None and first < last:
            sums = layer.tails.of(layer)
            if last < layer.tails.stop:
                sums = sums[0].narrow(1, 0, last - first), sums[1].narrow(1, 0, last - first)
            wide.add_products(block, first, last, *sums)
        beta = 1
    dquery = wide.joined(dblocks).view(dout_BHSE.shape)
    dkey, dvalue = sums_2SNE.view(2, S, dout_BHSE.shape[0], -1, E).permute(0, 2, 3, 1, 4).unbind()
    if layer is not None and run.past:
        if run.stop <= layer.tails.stop:  # other passes see these columns
            for own_NSE, sums_NTE in zip((dkeys, dvalues), layer.tails.of(layer), strict=True):
                own_NSE.add_(sums_NTE[:, run.start - first : run.stop - first])
        if layer.defers:
            layer.wide.append(wide)
    return dquery, dkey, dvalue


class _WidePass(torch.autograd.Function):
    """Attention of a pass of many columns.  layer: None without cache."""

    @staticmethod
    def forward(ctx, query_BHSE, key_BKSE, value_BKSE, layer, step, run, writes, mask, keep, scale, dropout):  # type: ignore[override]
        ctx.layer, ctx.step, ctx.run, ctx.scale, ctx.dropout = layer, step, run, scale, dropout
        states = query_BHSE, key_BKSE, value_BKSE
        out_BHSE, *saved = step.call(wide_attention, layer, run, *states, writes, mask, keep, scale, dropout)
        ctx.save_for_backward(*saved, *(states[1:] if layer is None else ()))
        return out_BHSE

    @staticmethod
    def backward(ctx, dout_BHSE):  # type: ignore[override]
        query, mask, keep, *own = ctx.saved_tensors
        args = ctx.layer, ctx.run, query, mask, keep, own, dout_BHSE, ctx.scale, ctx.dropout
        if ctx.run.past:
            ctx.step.watch()
        dquery, dkey, dvalue = ctx.step.call(wide_gradients, *args)
        if ctx.layer is not None and not ctx.run.past:
            ctx.step.call(Layer.collect, ctx.layer, dkey, dvalue, ctx.scale)
        return dquery, dkey, dvalue, *(None,) * 8


def _seen(
    layer: Layer | None, run: Pass, key_BKSE: Tensor | None = None, value_BKSE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The keys and values of the columns that a wide pass sees, [N, T, E]."""
    if layer is not None:
        return run.visible(layer.keys_NTE, dim=1), run.visible(layer.values_NTE, dim=1)
    assert key_BKSE is not None and value_BKSE is not None
    return key_BKSE.reshape(-1, *key_BKSE.shape[2:]), value_BKSE.reshape(-1, *value_BKSE.shape[2:])


def buffered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Slot,
    value: Tensor | Slot,
    attention_mask: Tensor | Mask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, S, E] -> [B, S, H, E]."""
    own = attention_mask.own if isinstance(attention_mask, Mask) else attention_mask
    if isinstance(key, Tensor) and isinstance(value, Tensor) and key.shape[2] != query.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, own, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ConfigError(
            f"latent_memory.segmented_cache: {type(module).__name__} uses soft capping or attention sinks, "
            "which segmented attention does not support; "
            f"write {WITHOUT_BUFFER} in the ds_config"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    slot = key if isinstance(key, Slot) else None
    if slot is not None and slot.cache.context.current.past:
        return _later_pass(query, slot, scale, dropout).transpose(1, 2), None
    if slot is not None and not slot.cache.context.is_recomputing:
        defers = slot.key_BKSE.requires_grad or slot.value_BKSE.requires_grad
        args = slot.cache, slot.layer.index, slot.key_BKSE, attention_mask, defers
        slot.cache.step.call(KeyValueBuffer.open, *args)
    own_key, own_value = (key, value) if slot is None else (slot.key_BKSE, slot.value_BKSE)
    assert isinstance(own_key, Tensor) and isinstance(own_value, Tensor)
    out_BHSE = _first_pass(query, own_key, own_value, slot, own, scale, dropout)
    return out_BHSE.transpose(1, 2), None


def _first_pass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot: Slot | None,
    mask: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attention of the first pass, or of the only one, which has no buffer."""
    groups = query.shape[1] // key.shape[1]
    if dropout and not query.is_cuda:
        # torch's kernel for the CPU would save all probabilities.
        B, _, S, _ = query.shape
        keep = torch.rand(B * key.shape[1], groups, S, S, device=query.device) >= dropout
        mask = _causal(query) if mask is None else mask
        layer, step = (None, Step()) if slot is None else (slot.layer, slot.cache.step)
        writes = slot is not None and not slot.cache.context.is_recomputing
        return _WidePass.apply(query, key, value, layer, step, Pass(0, S), writes, mask, keep, scale, dropout)
    if slot is not None:
        context = slot.cache.context
        run = None if context.is_recomputing else context.current
        key, value = _FirstPass.apply(key, value, slot.layer, slot.cache.step, run, scale)
        if query.untyped_storage().nbytes() > query.numel() * query.element_size():
            # A view would keep the complete fused projection alive.  The output takes the query's layout, so
            # with the heads of a column side by side the next layer need not copy it.
            query = query.transpose(1, 2).contiguous().transpose(1, 2)
    if groups > 1 and query.is_cuda and (mask is not None or not _fused_takes_groups(query)):
        # Otherwise CUDA falls back to a kernel that saves all probabilities.
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


def _fused_takes_groups(query: Tensor) -> bool:
    """Whether CUDA has a fused kernel for grouped heads: FlashAttention, in 16 bits from Ampere on."""
    is_ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return is_ampere and query.element_size() == 2


def _later_pass(query: Tensor, slot: Slot, scale: float, dropout: float) -> Tensor:
    """Attention of a later pass, over the columns that it sees."""
    key, value, layer, cache = slot
    run, step = cache.context.current, cache.step
    if run.is_short:
        return _ShortPass.apply(query, key, value, layer, step, run, scale, dropout)
    writes = not cache.context.is_recomputing
    return _WidePass.apply(query, key, value, layer, step, run, writes, None, None, scale, dropout)


def _causal(query_BHSE: Tensor) -> Tensor:
    """Additive causal mask, [B, 1, S, S]."""
    B, _, S, _ = query_BHSE.shape
    mask_SS = torch.full((S, S), float("-inf"), dtype=query_BHSE.dtype, device=query_BHSE.device).triu_(1)
    return mask_SS.expand(B, 1, S, S)
