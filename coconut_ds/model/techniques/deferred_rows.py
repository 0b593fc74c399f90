"""The embedding's deferred gradient: one vocabulary-sized buffer for all passes and a tied head.

Knows: lookups and their queue.  Does not know: linear layers, the loss.

Shapes: M looked-up ids, V vocabulary, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from coconut_ds.model.techniques.weight_queue import take


class RowLookup(torch.autograd.Function):
    """ids -> rows of the embedding, and the token."""

    @staticmethod
    def forward(ctx, ids, weight, _bias, token, queue, options):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.queue, ctx.padding_idx, ctx.is_first = queue, options["padding_idx"], token is None
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return F.embedding(ids, weight), weight.new_empty(0)

    @staticmethod
    def backward(ctx, dy, _):  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        if dy is not None and (ctx.is_first or ctx.needs_input_grad[3]):
            ctx.queue.watch()
            ctx.queue.pairs.append((ids.reshape(-1), dy.reshape(-1, dy.shape[-1])))
        if not ctx.is_first or ctx.queue.is_empty:
            return (None,) * 6
        pairs, additions = take(ctx.queue.pairs), take(ctx.queue.additions)
        dweight_VD = None
        for add in additions:
            dweight_VD = add(dweight_VD)
        if pairs:
            ids_M, rows_MD = torch.cat([ids for ids, _ in pairs]), torch.cat([rows for _, rows in pairs])
            if dweight_VD is None:
                padding = -1 if ctx.padding_idx is None else ctx.padding_idx
                dweight_VD = torch.ops.aten.embedding_dense_backward(
                    rows_MD, ids_M, ctx.shape[0], padding, False
                )
            else:
                add_rows_(dweight_VD, ids_M, rows_MD, ctx.padding_idx)
        return None, dweight_VD, None, None, None, None


def add_rows_(target_VD: Tensor, ids_M: Tensor, rows_MD: Tensor, padding_idx: int | None) -> None:
    """target[ids[m]] += rows[m], in place, rows of `padding_idx` left out.

    Rows of the same id are summed first, by the kernel of the embedding's own backward: no repeated index is
    left, so the result does not depend on the order of atomic additions, and 16-bit rows are rounded once.
    """
    if padding_idx is not None:
        rows_MD = rows_MD.masked_fill((ids_M == padding_idx)[:, None], 0)
    sorted_M, order_M = ids_M.sort(stable=True)
    is_new_M = torch.ones_like(sorted_M)
    is_new_M[1:] = sorted_M[1:] != sorted_M[:-1]
    slot_M = is_new_M.cumsum(0) - 1
    sums_MD = torch.ops.aten.embedding_dense_backward(rows_MD[order_M], slot_M, len(ids_M), -1, False)
    slot_ids_M = torch.zeros_like(sorted_M).scatter_(0, slot_M, sorted_M)
    target_VD.index_add_(0, slot_ids_M, sums_MD.to(target_VD.dtype))
