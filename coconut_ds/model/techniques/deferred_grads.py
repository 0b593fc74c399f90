"""Deferred weight gradients: one weight-gradient product per layer and backward, for any number of passes.

A weight used in P passes gets P gradients, and autograd passes on their sum only in the backward of the first
pass.  Until then its buffers hold a full gradient of every weight, and ZeRO-2 cannot reduce anything.
Here the backward of every later pass puts its (input, output gradient) rows into the layer's queue, and the
backward of the first pass computes one product:

    pass 0   y, anchor = x0 W^T          dW = dy0^T x0 + [dy1; dy2; ...]^T [x1; x2; ...]
    pass 1   y         = x1 W^T, anchor  queue += (x1, dy1)
    pass 2   y         = x2 W^T, anchor  queue += (x2, dy2)

The anchor is an empty tensor that orders the backward: later passes take it as an input, so the first pass's
node runs after theirs even where nothing else connects them.  It has no gradient.  The weight receives one
gradient, through autograd, and its hooks fire layer by layer as in ordinary training.

Embeddings work the same way with (ids, output gradient) rows: one vocabulary-sized buffer serves all passes
and a tied head.

Shapes: M rows (all leading dimensions) or looked-up ids, I inputs, O outputs, V vocabulary, D hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coconut_ds.model.techniques.backward_queue import Deferral, WeightQueue, take
from coconut_ds.model.techniques.fused_activations import recomputation_of


def install_deferral(model: nn.Module) -> Deferral:
    """Turn every plain linear and embedding layer of `model` into a deferring one, in place; names stay."""
    deferral = Deferral()
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        deferring = DEFERRING.get(type(module))
        if deferring is None or (isinstance(module, nn.Embedding) and not _is_plain(module)):
            continue
        if isinstance(module, nn.Linear) and id(module.weight) in looked_up:
            # A tied head uses the embedding's queue, through the supervised loss only.
            continue
        module.__class__ = deferring
        module.__dict__["deferral"] = deferral
    return deferral


def _is_plain(embedding: nn.Embedding) -> bool:
    return not embedding.sparse and embedding.max_norm is None and not embedding.scale_grad_by_freq


class DeferringLinear(nn.Linear):
    """nn.Linear that computes its weight gradient in the backward of the first pass."""

    deferral: Deferral

    def forward(self, input: Tensor) -> Tensor:
        if not self.deferral.applies_to(self.weight):
            return super().forward(input)
        return _call(self.deferral, self, _LinearProduct, input, self.weight, self.bias, transposed=False)


class DeferringConv1D(Conv1D):
    """The same for transformers' Conv1D, a linear layer with weight [I, O]."""

    deferral: Deferral

    def forward(self, x: Tensor) -> Tensor:
        if not self.deferral.applies_to(self.weight):
            return super().forward(x)
        return _call(self.deferral, self, _LinearProduct, x, self.weight, self.bias, transposed=True)


class DeferringEmbedding(nn.Embedding):
    """nn.Embedding that fills its gradient once; a tied head adds its part to the same buffer."""

    deferral: Deferral

    def forward(self, input: Tensor) -> Tensor:
        if not self.deferral.applies_to(self.weight):
            return super().forward(input)
        return _call(
            self.deferral, self.weight, _RowLookup, input, self.weight, None, padding_idx=self.padding_idx
        )


DEFERRING: dict[type, type] = {
    nn.Linear: DeferringLinear,
    Conv1D: DeferringConv1D,
    nn.Embedding: DeferringEmbedding,
}


def _call(
    deferral: Deferral,
    key: object,
    function: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    **options: Any,
) -> Tensor:
    queue = deferral.open_queue(key)
    recomputation = recomputation_of(input)
    saved = () if recomputation is None else recomputation.inputs
    options["recompute"] = None if recomputation is None else recomputation.function
    if deferral.is_recomputing and function is _LinearProduct:
        # Save first: if these are the last tensors that the backward needs, the product is never computed.
        _Save.apply(weight, *(saved or (input,)))
        with torch.no_grad():
            return _product(input, weight, bias, options["transposed"]).requires_grad_()
    if queue.anchor is None:
        output, queue.anchor = function.apply(input, weight, bias, None, queue, options, *saved)
        return output
    detached_bias = None if bias is None else bias.detach()
    output, _ = function.apply(input, weight.detach(), detached_bias, queue.anchor, queue, options, *saved)
    return output


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    # y = x W^T + b; a Conv1D stores W^T
    if not transposed:
        return F.linear(x, weight, bias)
    x_MI = x.view(-1, x.shape[-1])
    y_MO = torch.mm(x_MI, weight) if bias is None else torch.addmm(bias, x_MI, weight)
    return y_MO.view(*x.shape[:-1], weight.shape[1])


class _Save(torch.autograd.Function):
    """Save tensors for the saved-tensor hooks of activation checkpointing."""

    @staticmethod
    def forward(ctx, weight, *saved):  # type: ignore[override]
        ctx.save_for_backward(weight, *saved)
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx, _):  # type: ignore[override]
        raise AssertionError("a recomputed forward has no backward of its own")


class _LinearProduct(torch.autograd.Function):
    """x_MI -> x W^T + b and the anchor."""

    @staticmethod
    def forward(ctx, x, weight, bias, anchor, queue, options, *recompute_inputs):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.queue, ctx.transposed, ctx.is_first = queue, options["transposed"], anchor is None
        ctx.recompute, ctx.num_nones = options["recompute"], 3 + len(recompute_inputs)
        ctx.save_for_backward(weight, *(recompute_inputs or (x,)))
        return _product(x, weight, bias, options["transposed"]), x.new_empty(0)

    @staticmethod
    def backward(ctx, dy, _):  # type: ignore[override]
        weight, *saved = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_anchor = ctx.needs_input_grad[:4]
        dx = None
        if dy is not None:
            if needs_x:
                # dx = dy W
                dx = torch.matmul(dy, weight.t() if ctx.transposed else weight)
            x = ctx.recompute(*saved) if ctx.recompute is not None else saved[0]
            pair = (x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))
            if not ctx.is_first and needs_anchor:
                ctx.queue.watch()
                ctx.queue.pairs.append(pair)
                _fold_when_large(ctx.queue, weight, ctx.transposed)
        nones = (None,) * ctx.num_nones
        if not ctx.is_first:
            return dx, None, None, *nones
        own = None if dy is None else pair
        dweight, dbias = _collect(ctx.queue, own, ctx.transposed, needs_weight, needs_bias)
        return dx, dweight, dbias, *nones


def _fold_when_large(queue: WeightQueue, weight: Tensor, transposed: bool) -> None:
    """Turn the queued rows into a gradient once they take as many bytes as one."""
    if sum(x.numel() + dy.numel() for x, dy in queue.pairs) < weight.numel():
        return
    for x_MI, dy_MO in take(queue.pairs):
        if queue.sums:
            queue.sums[0].addmm_(*_factors(x_MI, dy_MO, transposed))
            queue.sums[1].add_(dy_MO.sum(0))
        else:
            queue.sums = [torch.mm(*_factors(x_MI, dy_MO, transposed)), dy_MO.sum(0)]


def _collect(
    queue: WeightQueue,
    own: tuple[Tensor, Tensor] | None,
    transposed: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The complete gradient of a linear layer's weight and bias; empties the queue.

    Concatenates the later passes' few rows; the first pass's many rows are not copied.
    """
    sums, queue.sums = queue.sums, []
    pairs = take(queue.pairs)
    parts = [] if own is None else [own]
    if len(pairs) > 1:
        pairs = [(torch.cat([x for x, _ in pairs]), torch.cat([dy for _, dy in pairs]))]
    parts += pairs
    dweight, dbias = sums if sums else (None, None)
    # dW = sum over passes of dy^T x, db = column sums of dy
    for x_MI, dy_MO in parts:
        if needs_weight:
            factors = _factors(x_MI, dy_MO, transposed)
            dweight = torch.mm(*factors) if dweight is None else dweight.addmm_(*factors)
        if needs_bias:
            dbias = dy_MO.sum(0) if dbias is None else dbias.add_(dy_MO.sum(0))
    return dweight if needs_weight else None, dbias if needs_bias else None


def _factors(x_MI: Tensor, dy_MO: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    # dW = dy^T x; of a Conv1D, dW^T = x^T dy
    return (x_MI.t(), dy_MO) if transposed else (dy_MO.t(), x_MI)


class _RowLookup(torch.autograd.Function):
    """ids -> rows of the embedding and the anchor."""

    @staticmethod
    def forward(ctx, ids, weight, _bias, anchor, queue, options):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.queue, ctx.padding_idx, ctx.is_first = queue, options["padding_idx"], anchor is None
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
        # dW[ids[m]] += dy[m], on top of a tied head's dlogits^T hidden
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
                _add_rows_(dweight_VD, ids_M, rows_MD, ctx.padding_idx)
        return None, dweight_VD, None, None, None, None


def _add_rows_(target_VD: Tensor, ids_M: Tensor, rows_MD: Tensor, padding_idx: int | None) -> None:
    """target[ids[m]] += rows[m], in place, without the rows of `padding_idx`.

    The embedding's backward kernel first sums the rows of each id. With no repeated index left, the result
    does not depend on the order of atomic additions, and 16-bit rows are rounded once.
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
