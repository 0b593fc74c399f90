"""Activations, norms and dropout that save only their input, or a mask, for the backward.

GPT-2's `gelu_new` is written in Python and saves about six tensors of the MLP's width, a third of all
activation bytes; torch's tanh GELU is the same function in one operation.  Llama's gated MLP and RMS norm are
such chains too.

Their outputs are cheap to recompute, so the next layer need not save them: each output carries a function
that recomputes it, and a deferring layer saves that function's inputs, which are saved anyway:

    before   u -> gelu saves u -> a -> c_proj saves a          now   c_proj saves (gelu, u)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

# Names in configurations that mean the tanh approximation of GELU.
TANH_GELU_NAMES = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")


@dataclass(frozen=True)
class Recomputation:
    """A function and its inputs, detached, that recompute a layer's output."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def recomputation_of(output: Tensor) -> Recomputation | None:
    """How to recompute `output`; None unless a layer of this module returned it."""
    return getattr(output, "_recomputation", None)


def _recomputable(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    inputs = tuple(x.detach() for x in inputs)
    output._recomputation = Recomputation(function, inputs)  # type: ignore[attr-defined]
    return output


def fuse_activations(model: nn.Module) -> int:
    """Replace such modules of `model` in place and return their number; parameters and names stay."""
    tanh_gelus = {NewGELUActivation, *(type(ACT2FN[name]) for name in TANH_GELU_NAMES if name in ACT2FN)}
    replaced = 0
    for module in model.modules():
        fused = FusedTanhGelu if type(module) in tanh_gelus else FUSED.get(type(module))
        if fused is FusedGatedMlp and not isinstance(module.act_fn, (nn.SiLU, type(ACT2FN["silu"]))):
            continue
        if fused is not None:
            module.__class__ = fused
            replaced += 1
    return replaced


class FusedTanhGelu(nn.Module):
    """GELU's tanh approximation."""

    def forward(self, input: Tensor) -> Tensor:
        # 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
        function = partial(F.gelu, approximate="tanh")
        return _recomputable(function(input), function, input)


class FusedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm with a recomputable output."""

    def forward(self, input: Tensor) -> Tensor:
        shape, eps = self.normalized_shape, self.eps

        def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            # weight * (x - mean(x)) / sqrt(var(x) + eps) + bias
            return F.layer_norm(x, shape, weight, bias, eps)

        parts = [part for part in (self.weight, self.bias) if part is not None]
        return _recomputable(function(input, *parts), function, input, *parts)


class FusedDropout(nn.Dropout):
    """nn.Dropout with the same random numbers and a mask of bytes (torch's mask on the CPU holds floats).

    Recomputation starts from the inputs of the layer before: a LoRA adapter after an activation and a dropout
    saves neither's output.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.inplace or not 0 < self.p < 1:
            return super().forward(input)
        # y = x * mask / (1 - p), mask ~ Bernoulli(1 - p)
        output, mask = torch.native_dropout(input, self.p, True)
        scale = 1 / (1 - self.p)
        source = recomputation_of(input) or Recomputation(_itself, (input,))
        recompute_input = source.function  # not `source`: its tensors would outlive a checkpointed layer

        def function(mask: Tensor, *inputs: Tensor) -> Tensor:
            return (recompute_input(*inputs) * mask).mul_(scale)

        return _recomputable(output, function, mask, *source.inputs)


class FusedRmsNorm(LlamaRMSNorm):
    """RMS norm, normalized in fp32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        eps = self.variance_epsilon
        output = _RmsNorm.apply(hidden_states, self.weight, eps)
        return _recomputable(output, partial(_rms_norm, eps=eps), hidden_states, self.weight)


class FusedGatedMlp(LlamaMLP):
    """Llama's MLP with the SiLU gate as one operation."""

    def forward(self, x: Tensor) -> Tensor:
        # down(silu(gate(x)) * up(x))
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(_recomputable(_SiluGate.apply(gate, up), _silu_gate, gate, up))


FUSED: dict[type, type] = {
    nn.LayerNorm: FusedLayerNorm,
    nn.Dropout: FusedDropout,
    **{norm: FusedRmsNorm for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)},
    **{mlp: FusedGatedMlp for mlp in (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)},
}


def _itself(x: Tensor) -> Tensor:
    return x


def _scale_of(x: Tensor, eps: float) -> Tensor:
    # s = 1 / sqrt(mean(x^2) + eps)
    return x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # y = w * n, n = x s
    return weight * (x.float() * _scale_of(x, eps)).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        scale = _scale_of(x, ctx.eps)
        normal = x.float() * scale
        # dw = sum over rows of dy * n
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * normal.to(x.dtype)).sum(tuple(range(dy.dim() - 1)))
        # dn = dy * w,  dx = s (dn - n mean(dn * n))
        dnormal = (dy * weight).float()
        mean = (dnormal * normal).mean(-1, keepdim=True)
        dx = dnormal.sub_(normal.mul_(mean)).mul_(scale).to(x.dtype)
        return dx, dweight, None


def _silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return _silu_gate(gate, up)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        gate, up = ctx.saved_tensors
        # y = silu(g) u:  du = dy silu(g),  dg = dy u sigmoid(g) (1 + g (1 - sigmoid(g)))
        dup = dy * F.silu(gate)
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, dup
