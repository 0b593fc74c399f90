"""Cross-entropy of the supervised positions, chunk by chunk, without the [rows, tokens, vocabulary] logits.

The head's gradient is vocabulary-sized.  Where embedding and head are tied, autograd would keep it from the
first moment of the backward to the last, and add the embedding's, as large, to it.  Here the head leaves its
part in the embedding's queue as a recipe (hidden states and logit gradients, or what is needed to compute
them again), and one buffer is filled at the very end, when all activations are gone.

Knows: the head's weight, targets, the embedding's queue.  Does not know: passes, layers, labels' layout.

Shapes: N supervised positions, D hidden size, V vocabulary.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coconut_ds.model.techniques.deferred_grads import DeferringLinear
from coconut_ds.model.techniques.weight_queue import Deferral, WeightQueue, is_partitioned


def supervised_loss(
    hidden_ND: Tensor, target_ids_N: Tensor, head: nn.Module, chunk_tokens: int, deferral: Deferral | None
) -> Tensor:
    """Sum of the token losses, an fp32 scalar; logits of at most `chunk_tokens` positions exist at a time."""
    if (
        not isinstance(head, nn.Linear)
        or type(head) not in (nn.Linear, DeferringLinear)
        or is_partitioned(head.weight)
        or torch.is_autocast_enabled(hidden_ND.device.type)
    ):
        return _loss_through_module(hidden_ND, target_ids_N, head, chunk_tokens)
    weight = head.weight
    queue = deferral.queue_of(weight) if deferral is not None and deferral.applies_to(weight) else None
    token = None if queue is None else queue.token
    matrix = weight if queue is None else weight.detach()
    return _HeadLoss.apply(hidden_ND, matrix, head.bias, token, queue, target_ids_N, chunk_tokens)


def full_loss(hidden_BTD: Tensor, labels_BT: Tensor, head: nn.Module) -> Tensor:
    """The plain way: logits of every column in fp32, shifted, summed over the labels that are not -100."""
    logits_BTV = head(hidden_BTD).float()
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), reduction="sum")


def _loss_through_module(
    hidden_ND: Tensor, target_ids_N: Tensor, head: nn.Module, chunk_tokens: int
) -> Tensor:
    """For heads that are more than a matrix (adapters, trainable rows, ZeRO-3): call the module."""

    def loss_of(hidden_ND: Tensor, target_ids_N: Tensor) -> Tensor:
        return _LogitsLoss.apply(head(hidden_ND).float(), target_ids_N)

    chunks = list(zip(hidden_ND.split(chunk_tokens), target_ids_N.split(chunk_tokens), strict=True))
    if len(chunks) == 1:
        return loss_of(*chunks[0])
    losses = [
        checkpoint(loss_of, hidden, ids, use_reentrant=False, preserve_rng_state=False)
        for hidden, ids in chunks
    ]
    return torch.stack(losses).sum()


class _LogitsLoss(torch.autograd.Function):
    """sum over n of -log softmax(logits)[target]; the logits become the softmax and that the gradient."""

    @staticmethod
    def forward(ctx, logits_NV, target_ids_N):  # type: ignore[override]
        target_logits = logits_NV.gather(1, target_ids_N[:, None])[:, 0]
        norm_N = _softmax_(logits_NV)
        ctx.save_for_backward(logits_NV, target_ids_N)
        return (norm_N - target_logits).sum()

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[override]
        softmax_NV, target_ids_N = ctx.saved_tensors
        return _logit_gradient_(softmax_NV, target_ids_N, dloss), None


class _HeadLoss(torch.autograd.Function):
    """sum over n of -log softmax(hidden W^T + b)[target]."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, token, queue, target_ids_N, chunk_tokens):  # type: ignore[override]
        loss, probabilities = hidden_ND.new_zeros((), dtype=torch.float32), []
        norms = []
        for hidden, targets in zip(
            hidden_ND.split(chunk_tokens), target_ids_N.split(chunk_tokens), strict=True
        ):
            logits = F.linear(hidden, weight_VD, bias_V).float()
            target_logits = logits.gather(1, targets[:, None])[:, 0]
            norm_N = _softmax_(logits)
            loss = loss + (norm_N - target_logits).sum()
            norms.append(norm_N)
            probabilities.append(logits)
            if len(hidden_ND) > chunk_tokens or not ctx.needs_input_grad[0]:
                probabilities.clear()
            del logits
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_ids_N, *norms)
        # A single chunk's softmax is kept and becomes the logit gradient in place; many are computed again.
        ctx.probabilities, ctx.queue, ctx.chunk_tokens = probabilities, queue, chunk_tokens
        return loss

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[override]
        hidden_ND, weight_VD, bias_V, target_ids_N, *norms = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        queue: WeightQueue | None = ctx.queue
        kept, ctx.probabilities = ctx.probabilities, []
        dhidden, dweight, dbias = [], None, None
        chunks = list(
            zip(hidden_ND.split(ctx.chunk_tokens), target_ids_N.split(ctx.chunk_tokens), norms, strict=True)
        )
        for hidden, targets, norm_N in chunks:
            softmax = kept.pop() if kept else _softmax(hidden, weight_VD, bias_V, norm_N)
            dlogits = _logit_gradient_(softmax, targets, dloss).to(hidden.dtype)
            del softmax
            if needs_hidden:
                dhidden.append(dlogits @ weight_VD)
            if needs_bias:
                dbias = dlogits.sum(0) if dbias is None else dbias.add_(dlogits.sum(0))
            if queue is not None:
                queue.watch()
                if len(chunks) == 1 and 2 * len(hidden) <= hidden.shape[1]:
                    queue.additions.append(partial(_add_product, dlogits, hidden))
                else:
                    recipe = partial(_recompute_product, hidden, weight_VD, bias_V, targets, norm_N, dloss)
                    queue.additions.append(recipe)
            elif needs_weight:
                dweight = _add_product(dlogits, hidden, dweight)
            del dlogits
        return torch.cat(dhidden) if needs_hidden else None, dweight, dbias, None, None, None, None


def _softmax_(logits_NV: Tensor) -> Tensor:
    """Turn logits into probabilities in place; gives log(sum(exp(logits))), norm_N."""
    highest_N = logits_NV.amax(dim=1)
    total_N = logits_NV.sub_(highest_N[:, None]).exp_().sum(dim=1)
    logits_NV.div_(total_N[:, None])
    return total_N.log() + highest_N


def _softmax(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, norm_N: Tensor) -> Tensor:
    return F.linear(hidden_ND, weight_VD, bias_V).float().sub_(norm_N[:, None]).exp_()


def _logit_gradient_(softmax_NV: Tensor, target_ids_N: Tensor, dloss: Tensor) -> Tensor:
    """(softmax - onehot(target)) * dloss, in place."""
    minus_one_N1 = softmax_NV.new_full((len(target_ids_N), 1), -1)
    return softmax_NV.scatter_add_(1, target_ids_N[:, None], minus_one_N1).mul_(dloss)


def _add_product(dlogits_NV: Tensor, hidden_ND: Tensor, dweight_VD: Tensor | None) -> Tensor:
    if dweight_VD is None:
        return torch.mm(dlogits_NV.t(), hidden_ND)
    return dweight_VD.addmm_(dlogits_NV.t(), hidden_ND)


def _recompute_product(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_ids_N: Tensor,
    norm_N: Tensor,
    dloss: Tensor,
    dweight_VD: Tensor | None,
) -> Tensor:
    softmax = _softmax(hidden_ND, weight_VD, bias_V, norm_N)
    dlogits = _logit_gradient_(softmax, target_ids_N, dloss).to(hidden_ND.dtype)
    return _add_product(dlogits, hidden_ND, dweight_VD)
