"""Attention of a later pass over the segments of a KV cache, with deferred gradients of keys and values.

A later pass's backward computes dQ and puts (q, dout, log-sum-exp, delta) of its rows into the layer's
records.  The backward of the pass that wrote a segment computes dK and dV from all later records at once.
As in flash attention, probabilities are recomputed, never saved.  D is the dropout factor, 0 or 1 / (1 - p):

    S  = scale Q K^T + mask    P  = exp(S - norm), norm = log sum exp(S)    O = (P * D) V
    dP = (dO V^T) * D          dS = P * (dP - delta), delta = rowsum(dO * O)
    dQ = scale dS K            dK = scale dS^T Q                            dV = (P * D)^T dO

Shapes: B rows, H query heads, K key-value heads (H = K * G), S query columns, T key columns, E head size.
The G query heads of a group are folded into rows: q_BKRE with R = G * S.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from coconut_ds.model.techniques.backward_queue import BackwardQueue

# Score elements computed at a time; 4 million are 16 MiB in fp32.
BLOCK_ELEMENTS = 1 << 22


@dataclass
class Record:
    """What one later pass leaves for the segments it read; rows R = G * S."""

    pass_index: int
    query_BKRE: Tensor
    dout_BKRE: Tensor
    norm_BKR1: Tensor  # log sum exp(S)
    delta_BKR1: Tensor  # rowsum(dO * O)
    mask_BKRT: Tensor | None  # additive; columns are all columns of the cache
    keep_BKRT: Tensor | None  # dropout: True where the probability was kept
    scale: float
    dropout: float


class Records(BackwardQueue):
    """One layer's records, filled and emptied during the backward."""

    setting = "segmented_cache"

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Record] = []

    @property
    def is_empty(self) -> bool:
        return not self.items

    def clear(self) -> None:
        self.items.clear()


@dataclass(frozen=True)
class Segments:
    """All keys and values that one pass's attention reads.

    past: detached keys and values of earlier passes.
    anchors: empty tensors, one per earlier pass; as inputs of the attention they order the backward, so that
        a segment's node runs after the attention of every later pass.
    """

    past: tuple[tuple[Tensor, Tensor], ...]
    key_BKSE: Tensor
    value_BKSE: Tensor
    anchors: tuple[Tensor, ...]
    records: Records


class SegmentAttention(torch.autograd.Function):
    """softmax(scale q [K_0; K_1; ...; K_own]^T + mask) [V_0; V_1; ...; V_own] of a later pass."""

    @staticmethod
    def forward(ctx, query_BHSE, key, value, mask, keep, dropout, scale, segments, *anchors):  # type: ignore[override]
        past = segments.past
        columns = sum(k.shape[2] for k, _ in past) + key.shape[2]
        query = _fold(query_BHSE, key.shape[1])
        mask_R, keep_R = _mask_rows(mask, query_BHSE, key.shape[1]), _keep_rows(keep, key.shape[1])
        # Laid out as [B, S, H, E], to which the layer reshapes it.
        B, H, S, E = query_BHSE.shape
        out_BSHE = query_BHSE.new_empty(B, S, H, E)
        out = out_BSHE.view(B, S, key.shape[1], H // key.shape[1], E).permute(0, 2, 3, 1, 4)
        outs, norms = [], []
        tail = _join([*past[1:], (key, value)])
        for rows in _row_blocks(query, columns):
            # S = scale Q K^T + mask
            scores = torch.cat(
                [query[:, :, rows] @ k.mT for k in (*(k for k, _ in past[:1]), tail[0])], dim=-1
            )
            scores = scores.float().mul_(scale)
            if mask_R is not None:
                scores += mask_R[:, :, rows]
            # P = softmax(S) = exp(S - norm), norm = log sum exp(S)
            norm = scores.logsumexp(-1, keepdim=True)
            weights = scores.sub_(norm).exp_()
            # O = (P * D) V, D = keep / (1 - dropout)
            if keep_R is not None:
                weights.mul_(keep_R[:, :, rows]).mul_(1 / (1 - dropout))
            weights = weights.to(query.dtype)
            split = weights.shape[-1] - tail[0].shape[2]
            block = weights[..., split:] @ tail[1]
            if past:
                block += weights[..., :split] @ past[0][1]
            outs.append(block)
            norms.append(norm)
        out.copy_(_join_rows(outs).view(out.shape))
        ctx.save_for_backward(
            query_BHSE,
            key,
            value,
            mask,
            keep,
            out_BSHE,
            _join_rows(norms),
            *(x for pair in past for x in pair),
        )
        ctx.dropout, ctx.scale, ctx.records = dropout, scale, segments.records
        return out_BSHE.transpose(1, 2)

    @staticmethod
    def backward(ctx, dout_BHSE):  # type: ignore[override]
        query_BHSE, key, value, mask, keep, out_BSHE, norm, *flat = ctx.saved_tensors
        past = list(zip(flat[::2], flat[1::2], strict=True))
        kv_heads = key.shape[1]
        out = _fold(out_BSHE.transpose(1, 2), kv_heads)
        dout = _fold(dout_BHSE, kv_heads)
        record = Record(
            pass_index=len(past),
            query_BKRE=_fold(query_BHSE, kv_heads),
            dout_BKRE=dout,
            norm_BKR1=norm,
            delta_BKR1=(dout.float() * out.float()).sum(-1, keepdim=True),
            mask_BKRT=_mask_rows(mask, query_BHSE, kv_heads),
            keep_BKRT=_keep_rows(keep, kv_heads),
            scale=ctx.scale,
            dropout=ctx.dropout,
        )
        first = 0
        dquery = torch.zeros_like(record.query_BKRE)
        tail = [_join([*past[1:], (key, value)])]
        for k, v in [*past[:1], *tail]:
            dquery += _query_gradient(record, k, v, first)
            first += k.shape[2]
        own_first = first - key.shape[2]
        dkey, dvalue = _segment_gradients([record], key, value, own_first)
        if any(ctx.needs_input_grad[8:]):
            ctx.records.watch()
            ctx.records.items.append(record)
        dquery_BHSE = dquery.view(query_BHSE.shape)
        return dquery_BHSE, dkey, dvalue, None, None, None, None, None, *(None for _ in past)


class SegmentGate(torch.autograd.Function):
    """Forward: a segment's keys and values -> anchor.  Backward: later passes' records -> their gradients."""

    @staticmethod
    def forward(ctx, key, value, records, position):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(key, value)
        ctx.records, ctx.position = records, position
        return key.new_empty(0)

    @staticmethod
    def backward(ctx, _):  # type: ignore[override]
        key, value = ctx.saved_tensors
        pass_index, first_column, is_last_to_run = ctx.position
        later = [record for record in ctx.records.items if record.pass_index > pass_index]
        if is_last_to_run:
            ctx.records.clear()
        if not later:
            return None, None, None, None
        return *_segment_gradients(later, key, value, first_column), None, None


def _query_gradient(record: Record, key: Tensor, value: Tensor, first: int) -> Tensor:
    """The part of dQ that comes through the segment whose first column is `first`."""
    dquery = torch.empty_like(record.query_BKRE)
    for rows in _row_blocks(record.query_BKRE, key.shape[2]):
        _, dscores = _score_gradients(record, rows, key, value, first)
        # dQ = scale dS K
        dquery[:, :, rows] = dscores @ key
    return dquery


def _segment_gradients(
    records: list[Record], key: Tensor, value: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """dK and dV of one segment from all records, a block of rows at a time."""
    dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
    joined = _join_records(records, first, key.shape[2])
    for rows in _row_blocks(joined.query_BKRE, key.shape[2]):
        weights, dscores = _score_gradients(joined, rows, key, value, 0)
        # dK = scale dS^T Q,  dV = (P * D)^T dO
        dkey += dscores.mT @ joined.query_BKRE[:, :, rows]
        dvalue += weights.mT @ joined.dout_BKRE[:, :, rows]
    return dkey, dvalue


def _score_gradients(
    record: Record, rows: slice, key: Tensor, value: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """(P * D, scale dS) of some rows against one segment, in the keys' dtype."""
    columns = slice(first, first + key.shape[2])
    # P = exp(S - norm), S = scale Q K^T + mask
    scores = (record.query_BKRE[:, :, rows] @ key.mT).float().mul_(record.scale)
    if record.mask_BKRT is not None:
        scores += record.mask_BKRT[:, :, rows, columns]
    weights = scores.sub_(record.norm_BKR1[:, :, rows]).exp_()
    # dP = (dO V^T) * D, D = keep / (1 - dropout)
    dweights = (record.dout_BKRE[:, :, rows] @ value.mT).float()
    kept = weights
    if record.keep_BKRT is not None:
        factor = record.keep_BKRT[:, :, rows, columns] * (1 / (1 - record.dropout))
        dweights.mul_(factor)
        kept = weights * factor
    # dS = P * (dP - delta), delta = rowsum(dO * O)
    dscores = dweights.sub_(record.delta_BKR1[:, :, rows]).mul_(weights).mul_(record.scale)
    return kept.to(key.dtype), dscores.to(key.dtype)


def _join_records(records: list[Record], first: int, length: int) -> Record:
    """Join the rows of all records; columns are those of one segment."""
    columns = slice(first, first + length)
    masks = [None if r.mask_BKRT is None else r.mask_BKRT[..., columns] for r in records]
    if any(mask is not None for mask in masks):
        rows = [r.query_BKRE.shape[2] for r in records]
        blank = next(mask for mask in masks if mask is not None)
        masks = [
            blank.new_zeros(blank.shape[0], 1, count, length) if mask is None else mask
            for mask, count in zip(masks, rows, strict=True)
        ]
    keeps = [None if r.keep_BKRT is None else r.keep_BKRT[..., columns] for r in records]
    return Record(
        pass_index=records[0].pass_index,
        query_BKRE=_join_rows([r.query_BKRE for r in records]),
        dout_BKRE=_join_rows([r.dout_BKRE for r in records]),
        norm_BKR1=_join_rows([r.norm_BKR1 for r in records]),
        delta_BKR1=_join_rows([r.delta_BKR1 for r in records]),
        mask_BKRT=None if masks[0] is None else _join_rows([m for m in masks if m is not None]),
        keep_BKRT=None if keeps[0] is None else _join_rows([k for k in keeps if k is not None]),
        scale=records[0].scale,
        dropout=records[0].dropout,
    )


def _fold(x_BHSE: Tensor, kv_heads: int) -> Tensor:
    """[B, H, S, E] -> [B, K, G*S, E]."""
    B, H, S, E = x_BHSE.shape
    return x_BHSE.reshape(B, kv_heads, H // kv_heads * S, E)


def _mask_rows(mask_B1ST: Tensor | None, query_BHSE: Tensor, kv_heads: int) -> Tensor | None:
    """The mask's rows, repeated for the query heads of a group: [B, 1, G*S, T]."""
    groups = query_BHSE.shape[1] // kv_heads
    if mask_B1ST is None or groups == 1:
        return mask_B1ST
    return mask_B1ST.repeat(1, 1, groups, 1)


def _keep_rows(keep_BHST: Tensor | None, kv_heads: int) -> Tensor | None:
    return None if keep_BHST is None else _fold(keep_BHST, kv_heads)


def _row_blocks(query_BKRE: Tensor, columns: int) -> Iterator[slice]:
    B, K, rows, _ = query_BKRE.shape
    step = max(1, BLOCK_ELEMENTS // (B * K * columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _join(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join short segments, for one product only."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2)


def _join_rows(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
