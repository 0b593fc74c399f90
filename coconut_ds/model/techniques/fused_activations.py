"""Activations, norms and dropout that keep their input, or a mask, for the backward and nothing else.

GPT-2's `gelu_new` is written in Python and keeps about six tensors of the MLP's width, a third of all
activation bytes; torch's tanh GELU is the same function in one operation.  Llama's gate and RMS norm are such
chains too.

Their outputs are cheap to compute again, so the layer behind need not keep them: an output carries the recipe
it was made with, and a deferring layer saves the recipe's inputs, which are saved anyway, in its place:

    before   u -> gelu keeps u -> a -> c_proj keeps a          now   c_proj keeps (gelu, u)

Knows: transformers' activation, norm and MLP modules.  Does not know: models, configurations.
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

# The names in configurations that mean the tanh approximation of GELU.
TANH_GELU_NAMES = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")


@dataclass(frozen=True)
class Recipe:
    """How to compute a tensor again; the inputs are cut from the graph."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def recipe_of(output: Tensor) -> Recipe | None:
    """The recipe of a tensor that one of this module's layers made."""
    return getattr(output, "_recipe", None)


def _with_recipe(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    output._recipe = Recipe(function, tuple(x.detach() for x in inputs))  # type: ignore[attr-defined]
    return output


def fuse_activations(model: nn.Module) -> int:
    """Exchange such modules of `model` in place; gives their number.  No parameter and no name changes."""
    tanh_gelus = {NewGELUActivation, *(type(ACT2FN[name]) for name in TANH_GELU_NAMES if name in ACT2FN)}
    exchanged = 0
    for module in model.modules():
        fused = FusedTanhGelu if type(module) in tanh_gelus else FUSED.get(type(module))
        if fused is FusedGatedMlp and not isinstance(module.act_fn, (nn.SiLU, type(ACT2FN["silu"]))):
            continue
        if fused is not None:
            module.__class__ = fused
            exchanged += 1
    return exchanged


class FusedTanhGelu(nn.Module):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""

    def forward(self, input: Tensor) -> Tensor:
        function = partial(F.gelu, approximate="tanh")
        return _with_recipe(function(input), function, input)


class FusedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm with a recipe."""

    def forward(self, input: Tensor) -> Tensor:
        shape, eps = self.normalized_shape, self.eps

        def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            return F.layer_norm(x, shape, weight, bias, eps)

        parts = [part for part in (self.weight, self.bias) if part is not None]
        return _with_recipe(function(input, *parts), function, input, *parts)


class FusedDropout(nn.Dropout):
    """nn.Dropout that draws the same numbers and keeps a mask of bytes (torch's on the CPU: of floats).

    Its recipe goes through its input's: an adapter behind an activation and a dropout keeps neither's output.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.inplace or not 0 < self.p < 1:
            return super().forward(input)
        output, mask = torch.native_dropout(input, self.p, True)
        scale = 1 / (1 - self.p)
        source = recipe_of(input) or Recipe(_itself, (input,))
        make = source.function  # not `source`: its tensors would outlive a checkpointed layer

        def function(mask: Tensor, *inputs: Tensor) -> Tensor:
            return (make(*inputs) * mask).mul_(scale)

        return _with_recipe(output, function, mask, *source.inputs)


class FusedRmsNorm(LlamaRMSNorm):
    """weight * x / sqrt(mean(x^2) + eps), normalised in fp32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        eps = self.variance_epsilon
        output = _RmsNorm.apply(hidden_states, self.weight, eps)
        return _with_recipe(output, partial(_rms_norm, eps=eps), hidden_states, self.weight)


class FusedGatedMlp(LlamaMLP):
    """down(silu(gate(x)) * up(x))."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(_with_recipe(_SiluGate.apply(gate, up), _silu_gate, gate, up))


FUSED: dict[type, type] = {
    nn.LayerNorm: FusedLayerNorm,
    nn.Dropout: FusedDropout,
    **{norm: FusedRmsNorm for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)},
    **{mlp: FusedGatedMlp for mlp in (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)},
}


def _itself(x: Tensor) -> Tensor:
    return x


def _scale_of(x: Tensor, eps: float) -> Tensor:
    return x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
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
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * normal.to(x.dtype)).sum(tuple(range(dy.dim() - 1)))
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
        dup = dy * F.silu(gate)
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, dup
