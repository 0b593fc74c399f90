"""Deferred weight gradients: one weight-gradient product per layer and backward, however many passes.

A weight used in P passes gets P gradients, and autograd hands on their sum only in the backward of the first
pass.  Until then a full gradient of every weight sits in its buffers, and ZeRO-2 cannot reduce anything.
Here the backward of every later pass puts its (input, output gradient) rows into the layer's queue, and the
backward of the first pass makes the one product:

    pass 0   y, token = x0 W^T         dW = dy0^T x0 + [dy1; dy2; ...]^T [x1; x2; ...]
    pass 1   y        = x1 W^T, token  queue += (x1, dy1)
    pass 2   y        = x2 W^T, token  queue += (x2, dy2)

The token is an empty tensor that leads from every later pass to the first: it puts the first pass's node
behind theirs in the graph, also where nothing else does, and has no gradient.  So the weight receives exactly
one gradient, through autograd, and its hooks fire layer by layer as in ordinary training.

Knows: nn.Linear, transformers' Conv1D, nn.Embedding, autograd.  Does not know: passes' contents, DeepSpeed.

Shapes: M rows (all leading dimensions), I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coconut_ds.model.techniques.deferred_rows import RowLookup
from coconut_ds.model.techniques.fused_activations import recipe_of
from coconut_ds.model.techniques.weight_queue import Deferral, WeightQueue, take


def install_deferral(model: nn.Module) -> Deferral:
    """Make every plain linear and embedding layer of `model` a deferring one, in place; names stay."""
    deferral = Deferral()
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        deferring = DEFERRING.get(type(module))
        if deferring is None or (isinstance(module, nn.Embedding) and not _is_plain(module)):
            continue
        if isinstance(module, nn.Linear) and id(module.weight) in looked_up:
            # A tied head joins the embedding's queue through the supervised loss, or not at all.
            continue
        module.__class__ = deferring
        module.__dict__["deferral"] = deferral
    return deferral


def _is_plain(embedding: nn.Embedding) -> bool:
    return not embedding.sparse and embedding.max_norm is None and not embedding.scale_grad_by_freq


class DeferringLinear(nn.Linear):
    """nn.Linear whose weight gradient waits for the first pass."""

    deferral: Deferral

    def forward(self, input: Tensor) -> Tensor:
        if not self.deferral.applies_to(self.weight):
            return super().forward(input)
        return _call(self.deferral, self, _LinearProduct, input, self.weight, self.bias, transposed=False)


class DeferringConv1D(Conv1D):
    """transformers' Conv1D, a linear layer with its weight [I, O], whose weight gradient waits likewise."""

    deferral: Deferral

    def forward(self, x: Tensor) -> Tensor:
        if not self.deferral.applies_to(self.weight):
            return super().forward(x)
        return _call(self.deferral, self, _LinearProduct, x, self.weight, self.bias, transposed=True)


class DeferringEmbedding(nn.Embedding):
    """nn.Embedding whose gradient is filled once; a tied head adds its part to the same buffer."""

    deferral: Deferral

    def forward(self, input: Tensor) -> Tensor:
        if not self.deferral.applies_to(self.weight):
            return super().forward(input)
        return _call(
            self.deferral, self.weight, RowLookup, input, self.weight, None, padding_idx=self.padding_idx
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
    recipe = recipe_of(input)
    kept = () if recipe is None else recipe.inputs
    options["recipe"] = None if recipe is None else recipe.function
    if deferral.is_replay and function is _LinearProduct:
        # Saves first: where these are the last tensors the backward needs, the product is never computed.
        _Save.apply(weight, *(kept or (input,)))
        with torch.no_grad():
            return _product(input, weight, bias, options["transposed"]).requires_grad_()
    if queue.token is None:
        output, queue.token = function.apply(input, weight, bias, None, queue, options, *kept)
        return output
    detached_bias = None if bias is None else bias.detach()
    output, _ = function.apply(input, weight.detach(), detached_bias, queue.token, queue, options, *kept)
    return output


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    x_MI = x.view(-1, x.shape[-1])
    y_MO = torch.mm(x_MI, weight) if bias is None else torch.addmm(bias, x_MI, weight)
    return y_MO.view(*x.shape[:-1], weight.shape[1])


class _Save(torch.autograd.Function):
    """Hands tensors to whoever collects what a forward saves."""

    @staticmethod
    def forward(ctx, weight, *kept):  # type: ignore[override]
        ctx.save_for_backward(weight, *kept)
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx, _):  # type: ignore[override]
        raise AssertionError("a recomputed forward has no backward of its own")


class _LinearProduct(torch.autograd.Function):
    """x_MI -> x W^T + b, and the token."""

    @staticmethod
    def forward(ctx, x, weight, bias, token, queue, options, *recipe_inputs):  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.queue, ctx.transposed, ctx.is_first = queue, options["transposed"], token is None
        ctx.recipe, ctx.num_nones = options["recipe"], 3 + len(recipe_inputs)
        ctx.save_for_backward(weight, *(recipe_inputs or (x,)))
        return _product(x, weight, bias, options["transposed"]), x.new_empty(0)

    @staticmethod
    def backward(ctx, dy, _):  # type: ignore[override]
        weight, *kept = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_token = ctx.needs_input_grad[:4]
        dx = None
        if dy is not None:
            if needs_x:
                dx = torch.matmul(dy, weight.t() if ctx.transposed else weight)
            x = ctx.recipe(*kept) if ctx.recipe is not None else kept[0]
            pair = (x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))
            if not ctx.is_first and needs_token:
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
    """A queue never takes more bytes than the gradient it stands for."""
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
    """The whole gradient of a linear layer's weight and bias; empties the queue.

    The first pass's rows, many, are not copied; the later passes', few, are concatenated.
    """
    sums, queue.sums = queue.sums, []
    pairs = take(queue.pairs)
    parts = [] if own is None else [own]
    if len(pairs) > 1:
        pairs = [(torch.cat([x for x, _ in pairs]), torch.cat([dy for _, dy in pairs]))]
    parts += pairs
    dweight, dbias = sums if sums else (None, None)
    for x_MI, dy_MO in parts:
        if needs_weight:
            factors = _factors(x_MI, dy_MO, transposed)
            dweight = torch.mm(*factors) if dweight is None else dweight.addmm_(*factors)
        if needs_bias:
            dbias = dy_MO.sum(0) if dbias is None else dbias.add_(dy_MO.sum(0))
    return dweight if needs_weight else None, dbias if needs_bias else None


def _factors(x_MI: Tensor, dy_MO: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    return (x_MI.t(), dy_MO) if transposed else (dy_MO.t(), x_MI)
