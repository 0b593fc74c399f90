"""Deferred weight gradients: one weight-gradient product per layer and backward, for any number of passes.

A weight used in P passes gets P gradients, and autograd passes on their sum only in the backward of the first
pass.  Until then its buffers hold a full gradient of every weight, and ZeRO-2 cannot reduce anything.
Here every later pass leaves its (input, output gradient) rows, and the backward of the first pass computes
the complete gradient:

    pass 0   y = x0 W^T          dW = dy0^T x0 + [dy1; dy2; ...]^T [x1; x2; ...]
    pass 1   y = x1 W^T          rows += (x1, dy1)
    pass 2   y = x2 W^T          rows += (x2, dy2)

A pass of one column runs torch's own linear layer on a detached weight, and a hook on y keeps dy; the Barrier
(passes.py) joins such rows.  An embedding and a tied head fill one vocabulary-sized gradient.

Shapes: M rows (all leading dimensions) or looked-up ids, L layers of one shape, R rows of all one-column
passes, I inputs, O outputs, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coconut_ds.model.techniques.fused_activations import recomputation_of
from coconut_ds.model.techniques.passes import Context, Rows, Step


class LinearRows(Rows):
    """Rows of a linear layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, transposed: bool) -> None:
        super().__init__(weight, bias)
        self.renewed = partial(LinearRows, weight, bias, transposed)
        self.transposed = transposed
        self.pairs: list[tuple[Tensor, Tensor]] = []  # of wide passes
        self.size = 0  # elements that wide passes left
        self.joined: tuple[Tensor, ...] | None = None  # of all one-column passes
        self.weight_sum: Tensor | None = None  # product of pairs that would be larger than the weight
        self.bias_sum: Tensor | None = None  # of the joined one-column passes, and of such pairs

    def add(self, x_MI: Tensor, dy_MO: Tensor) -> None:
        """Keep the rows of a wide pass, or their product if that is smaller."""
        self.size += x_MI.numel() + dy_MO.numel()
        if self.size < self.parameters[0].numel():
            self.pairs.append((x_MI, dy_MO))
        else:
            self.weight_sum = self._product(self.weight_sum, x_MI, dy_MO)
            self.bias_sum = dy_MO.sum(0) if self.bias_sum is None else self.bias_sum.add_(dy_MO.sum(0))

    def collect(self, x_MI: Tensor | None, dy_MO: Tensor | None, needs_bias: bool, step: Step) -> Any:
        """The complete gradients of weight and bias, from the first pass's rows and all others."""
        pairs, dweight, dbias = self.pairs, self.weight_sum, self.bias_sum
        self.pairs, self.size, self.weight_sum, self.bias_sum = [], 0, None, None
        # dW = sum over passes of dy^T x,  db = column sums of dy
        if x_MI is not None and dy_MO is not None:
            pairs = [(x_MI, dy_MO), *pairs]
        for x, dy in pairs:
            dweight = self._product(dweight, x, dy)
            if needs_bias:
                dbias = _add_column_sums(dbias, dy, step)
        if self.joined is not None:
            dweight, self.joined = self._product(dweight, *self.joined), None
        return dweight, dbias if needs_bias else None

    def _product(self, total: Tensor | None, x_MI: Tensor, dy_MO: Tensor) -> Tensor:
        # dW = dy^T x; of a Conv1D, dW^T = x^T dy
        factors = (x_MI.t(), dy_MO) if self.transposed else (dy_MO.t(), x_MI)
        return torch.mm(*factors) if total is None else total.addmm_(*factors)

    def clear(self) -> bool:
        had_any = (
            super().clear() or bool(self.pairs) or self.weight_sum is not None or self.joined is not None
        )
        self.pairs, self.size = [], 0
        self.joined, self.weight_sum, self.bias_sum = None, None, None
        return had_any

    @staticmethod
    def gradients(group: list[Any], x_LRI: Tensor | None, dy_LRO: Tensor | None) -> dict[int, Tensor]:
        assert x_LRI is not None and dy_LRO is not None
        dbiases = dy_LRO.sum(1).unbind() if group[0].parameters[1] is not None else [None] * len(group)
        for rows, *parts in zip(group, x_LRI.unbind(), dy_LRO.unbind(), dbiases, strict=True):
            rows.joined, dbias_O = tuple(parts[:2]), parts[2]
            if dbias_O is not None:
                rows.bias_sum = dbias_O if rows.bias_sum is None else rows.bias_sum.add_(dbias_O)
        return {}


def _add_column_sums(total_O: Tensor | None, dy_MO: Tensor, step: Step) -> Tensor:
    if total_O is None:
        return dy_MO.sum(0)
    if dy_MO.element_size() < 4 and not dy_MO.is_cuda:  # there addmv rounds every partial sum to 16 bits
        return total_O.add_(dy_MO.sum(0))
    return torch.addmv(total_O, dy_MO.t(), step.ones(dy_MO))


class Lookup:
    """What a tied head and the lookups of an embedding's weight leave for its gradient."""

    def __init__(self) -> None:
        self.additions: list[Callable[[Tensor | None], Tensor]] = []  # gradient -> gradient

    def clear(self) -> bool:
        had_any = bool(self.additions)
        self.additions = []
        return had_any


def install_deferral(model: nn.Module, context: Context) -> None:
    """Turn every plain linear and embedding layer of `model` into a deferring one, in place; names stay."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        deferring = DEFERRING.get(type(module))
        if deferring is None or (isinstance(module, nn.Embedding) and not _is_plain(module)):
            continue
        if isinstance(module, nn.Linear) and id(module.weight) in looked_up:
            # A tied head uses the embedding's lookup, through the supervised loss only.
            continue
        module.__class__ = deferring
        module.__dict__["context"] = context


def _is_plain(embedding: nn.Embedding) -> bool:
    return not embedding.sparse and embedding.max_norm is None and not embedding.scale_grad_by_freq


class DeferringLinear(nn.Linear):
    """nn.Linear that computes its weight gradient in the backward of the first pass."""

    context: Context
    transposed = False

    def forward(self, input: Tensor) -> Tensor:
        if self.context.current.is_short:
            rows = self.context.rows_of(self, input)
            if rows is not None:
                return rows.record(input, F.linear(input, rows.weight, rows.bias))
        elif self.context.defers(self.weight, input):
            return _call(self, input)
        return super().forward(input)


class DeferringConv1D(Conv1D):
    """The same for transformers' Conv1D, a linear layer with weight [I, O]."""

    context: Context
    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        if self.context.current.is_short:
            rows = self.context.rows_of(self, x)
            if rows is not None:
                return rows.record(x, _product(x, rows.weight, rows.bias, True))
        elif self.context.defers(self.weight, x):
            return _call(self, x)
        return super().forward(x)


class DeferringEmbedding(nn.Embedding):
    """nn.Embedding that fills its gradient once; a tied head adds its part to the same buffer.

    Of the position ids of all passes, it looks up all rows in the first.
    """

    context: Context

    def forward(self, input: Tensor) -> Tensor:
        return self.context.by_position(self, input, self._look_up)

    def _look_up(self, ids: Tensor) -> Tensor:
        if not self.context.defers(self.weight):
            return super().forward(ids)
        assert self.context.step is not None
        lookup = self.context.step.lookups.setdefault(id(self.weight), Lookup())
        return _RowLookup.apply(ids, self.weight, lookup, self.padding_idx)


DEFERRING: dict[type, type] = {
    nn.Linear: DeferringLinear,
    Conv1D: DeferringConv1D,
    nn.Embedding: DeferringEmbedding,
}


def _call(layer: Any, x: Tensor) -> Tensor:
    """Run a wide pass of a deferring linear layer."""
    context, weight, bias = layer.context, layer.weight, layer.bias
    recomputation = recomputation_of(x)
    saved = () if recomputation is None else recomputation.inputs
    if context.is_recomputing:
        # Save first: if these are the last tensors that the backward needs, the product is never computed.
        _Save.apply(weight, *(saved or (x,)))
        with torch.no_grad():
            return _product(x, weight, bias, layer.transposed).requires_grad_()
    rows = context.step.rows.get(id(layer))
    if rows is None:
        rows = context.step.rows[id(layer)] = LinearRows(weight, bias, layer.transposed)
    if context.current.past:
        weight, bias = rows.weight, rows.bias
    recompute = None if recomputation is None else recomputation.repeat()
    return _LinearProduct.apply(x, weight, bias, rows, context.step, recompute, *saved)


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
    """x_MI -> x W^T + b of a wide pass; the first takes what the others left."""

    @staticmethod
    def forward(ctx, x, weight, bias, rows, step, recompute, *recompute_inputs):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.step, ctx.recompute = rows, step, recompute
        ctx.num_nones = 3 + len(recompute_inputs)
        ctx.save_for_backward(weight, *(recompute_inputs or (x,)))
        return _product(x, weight, bias, rows.transposed)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        weight, *saved = ctx.saved_tensors
        needs_x, is_first, needs_bias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = x_MI = dy_MO = None
        if dy is not None:
            dy_MO = dy.reshape(-1, dy.shape[-1])
            if needs_x:
                # dx = dy W
                dx_MI = torch.mm(dy_MO, weight.t() if ctx.rows.transposed else weight)
                dx = dx_MI.view(*dy.shape[:-1], dx_MI.shape[1])
            x = ctx.recompute(*saved) if ctx.recompute is not None else saved[0]
            x_MI = x.reshape(-1, x.shape[-1])
        if is_first:
            dweight, dbias = ctx.step.call(LinearRows.collect, ctx.rows, x_MI, dy_MO, needs_bias, ctx.step)
        elif dy is not None:
            ctx.step.watch()
            ctx.step.call(LinearRows.add, ctx.rows, x_MI, dy_MO)
        return dx, dweight, dbias, *(None,) * ctx.num_nones


class _RowLookup(torch.autograd.Function):
    """ids -> rows of the embedding."""

    @staticmethod
    def forward(ctx, ids, weight, lookup, padding_idx):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.lookup, ctx.padding_idx, ctx.shape = lookup, padding_idx, weight.shape
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        additions, ctx.lookup.additions = ctx.lookup.additions, []
        # dW[ids[m]] += dy[m], on top of a tied head's dlogits^T hidden
        dweight_VD = None
        for add in additions:
            dweight_VD = add(dweight_VD)
        if dy is None:
            return None, dweight_VD, None, None
        ids_M, rows_MD = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
        if dweight_VD is None:
            padding = -1 if ctx.padding_idx is None else ctx.padding_idx
            dweight_VD = torch.ops.aten.embedding_dense_backward(rows_MD, ids_M, ctx.shape[0], padding, False)
        else:
            _add_rows_(dweight_VD, ids_M, rows_MD, ctx.padding_idx)
        return None, dweight_VD, None, None


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
