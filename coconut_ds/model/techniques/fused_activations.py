"""Activations, norms and dropout that save only their input, or a mask, for the backward.

GPT-2's `gelu_new` is written in Python and saves about six tensors of the MLP's width, a third of all
activation bytes; torch's tanh GELU is the same function in one operation.  Llama's gated MLP and RMS norm are
such chains too.

Their outputs are cheap to recompute, so the next layer need not save them: each output carries a function
that recomputes it, and a deferring layer saves that function's inputs, which are saved anyway:

    before   u -> gelu saves u -> a -> c_proj saves a          now   c_proj saves (gelu, u)
"""

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from coconut_ds.model.techniques.passes import Context, Rows

# Names in configurations that mean the tanh approximation of GELU.
TANH_GELU_NAMES = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")


@dataclass(frozen=True)
class Recomputation:
    """A function and its inputs, detached, that recompute a layer's output."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    memo: list[weakref.ref[Tensor]] = field(default_factory=list)

    def repeat(self) -> Callable[..., Tensor]:
        """The function; layers that read the same output share its result while one of them holds it."""
        return partial(_repeat, self.function, self.memo)


def _repeat(function: Callable[..., Tensor], memo: list[weakref.ref[Tensor]], *inputs: Tensor) -> Tensor:
    output = memo[0]() if memo else None
    if output is None:
        output = function(*inputs)
        memo[:] = [weakref.ref(output)]
    return output


def recomputation_of(output: Tensor) -> Recomputation | None:
    """How to recompute `output`; None unless a layer of this module returned it."""
    return getattr(output, "_recomputation", None)


def _recomputable(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    inputs = tuple(x.detach() for x in inputs)
    output._recomputation = Recomputation(function, inputs)  # type: ignore[attr-defined]
    return output


def fuse_activations(model: nn.Module, context: Context) -> int:
    """Replace such modules of `model` in place and return their number; parameters and names stay."""
    tanh_gelus = {NewGELUActivation, *(type(ACT2FN[name]) for name in TANH_GELU_NAMES if name in ACT2FN)}
    replaced = 0
    for module in model.modules():
        fused = FusedTanhGelu if type(module) in tanh_gelus else _fused(type(module))  # type: ignore[arg-type]
        if fused is FusedGatedMlp and not isinstance(module.act_fn, (nn.SiLU, type(ACT2FN["silu"]))):
            continue
        if fused is not None:
            module.__class__ = fused
            module.__dict__["context"] = context
            replaced += 1
    return replaced


class FusedTanhGelu(nn.Module):
    """GELU's tanh approximation."""

    context: Context

    def forward(self, input: Tensor) -> Tensor:
        # 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
        function = partial(F.gelu, approximate="tanh")
        if self.context.current.is_short:
            return function(input)
        return _recomputable(function(input), function, input)


class FusedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm with a recomputable output."""

    context: Context

    def forward(self, input: Tensor) -> Tensor:
        shape, eps = self.normalized_shape, self.eps
        if self.context.current.is_short:
            rows = self.context.rows_of(self, input)
            if rows is None:
                return F.layer_norm(input, shape, self.weight, self.bias, eps)
            return rows.record(input, F.layer_norm(input, shape, rows.weight, rows.bias, eps))

        def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            # weight * (x - mean(x)) / sqrt(var(x) + eps) + bias
            return F.layer_norm(x, shape, weight, bias, eps)

        def normalized(x: Tensor) -> Tensor:
            return F.layer_norm(x, shape, eps=eps)

        parts = _weights_of(self, input, normalized)
        return _recomputable(function(input, *parts), function, input, *parts)


class FusedDropout(nn.Dropout):
    """nn.Dropout with the same random numbers and a mask of bytes (torch's mask on the CPU holds floats).

    Recomputation starts from the inputs of the layer before: a LoRA adapter after an activation and a dropout
    saves neither's output.
    """

    context: Context

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        if self.inplace or self.p == 1:
            return super().forward(input)
        # y = x * mask / (1 - p), mask ~ Bernoulli(1 - p)
        output, mask = torch.native_dropout(input, self.p, True)
        if self.context.current.is_short:
            return output
        scale = 1 / (1 - self.p)
        source = recomputation_of(input) or Recomputation(_itself, (input,))
        recompute_input = source.function  # not `source`: its tensors would outlive a checkpointed layer

        def function(mask: Tensor, *inputs: Tensor) -> Tensor:
            return (recompute_input(*inputs) * mask).mul_(scale)

        return _recomputable(output, function, mask, *source.inputs)


class FusedRmsNorm(LlamaRMSNorm):
    """RMS norm, normalized in fp32; keeps its scale, one number per column."""

    context: Context

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = _scale_of(hidden_states.detach(), self.variance_epsilon)
        if self.context.current.is_short:
            rows = self.context.rows_of(self, hidden_states)
            if rows is None:
                return _RmsNorm.apply(hidden_states, self.weight, scale, True)
            return rows.record(hidden_states, _RmsNorm.apply(hidden_states, rows.weight, scale, True))
        (weight,) = _weights_of(self, hidden_states, partial(_normalized, eps=self.variance_epsilon))
        output = _RmsNorm.apply(hidden_states, weight, scale, False)
        return _recomputable(output, _rms_norm, hidden_states, weight, scale)


class FusedGatedMlp(LlamaMLP):
    """Llama's MLP with the SiLU gate as one operation."""

    context: Context

    def forward(self, x: Tensor) -> Tensor:
        # down(silu(gate(x)) * up(x))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.context.current.is_short:
            return self.down_proj(_silu_gate(gate, up))
        return self.down_proj(_recomputable(_SiluGate.apply(gate, up), _silu_gate, gate, up))


@cache
def _fused(kind: type) -> type | None:
    """The class in place of `kind`, also of a copy that transformers has for another architecture."""
    if kind in (nn.LayerNorm, nn.Dropout):
        return FusedLayerNorm if kind is nn.LayerNorm else FusedDropout
    copied = {LlamaRMSNorm: FusedRmsNorm, LlamaMLP: FusedGatedMlp}
    return next((fused for original, fused in copied.items() if _code(kind) == _code(original)), None)


def _code(kind: type) -> tuple[Any, ...]:
    """What a module's forward does, without its docstring."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)  # type: ignore[attr-defined]
    if code is None:
        return (kind,)
    return code.co_code, code.co_names, [x for x in code.co_consts if not isinstance(x, str)]


def _itself(x: Tensor) -> Tensor:
    return x


class NormRows(Rows):
    """Rows of a norm; `normalized` is the norm without weight and bias."""

    def __init__(self, weights: list[Tensor], eps: float, normalized: Callable[[Tensor], Tensor]) -> None:
        super().__init__(weights[0], weights[1] if weights[1:] else None, *weights)
        self.eps, self.normalized = eps, normalized
        self.renewed = partial(NormRows, weights, eps, normalized)

    def group(self) -> Any:
        return *super().group(), self.eps

    @staticmethod
    def gradients(group: list[Any], x_LRI: Tensor | None, dy_LRO: Tensor | None) -> dict[int, Tensor]:
        gradients: dict[int, Tensor] = {}
        if x_LRI is None or dy_LRO is None:
            totals: list[Tensor | None] = [None] * len(group[0].vectors)
        else:
            # dw = sum over rows of dy * n,  db = column sums of dy, for y = w * n + b
            normal_LRD = group[0].normalized(x_LRI.float())
            totals = [(dy_LRO.float() * normal_LRD).sum(1).to(dy_LRO.dtype), dy_LRO.sum(1)]
        for index in range(len(group[0].vectors)):
            total_LD = totals[index]
            for leaves in zip(*(rows.leaves for rows in group), strict=True):
                wide_LD = torch.stack([_taken_gradient(leaf[index]) for leaf in leaves])
                total_LD = wide_LD if total_LD is None else total_LD.add_(wide_LD)
            assert total_LD is not None
            vectors = [rows.vectors[index] for rows in group]
            gradients |= {id(vector): d for vector, d in zip(vectors, total_LD.unbind(), strict=True)}
        return gradients


def _taken_gradient(leaf: Tensor) -> Tensor:
    gradient, leaf.grad = leaf.grad, None
    return torch.zeros_like(leaf) if gradient is None else gradient


def _weights_of(norm: Any, x: Tensor, normalized: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Weight and bias of a norm for a wide pass; opens the rows that the later passes leave."""
    context = norm.context
    weights = [w for w in (norm.weight, getattr(norm, "bias", None)) if w is not None]
    if not weights or not all(context.defers(weight, x) for weight in weights):
        return weights
    rows = context.step.rows.get(id(norm))
    if rows is None:
        eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
        context.step.rows[id(norm)] = NormRows(weights, eps, normalized)
    elif context.current.past and not context.is_recomputing:
        return rows.stand_ins()
    return weights


def _scale_of(x: Tensor, eps: float) -> Tensor:
    # s = 1 / sqrt(mean(x^2) + eps)
    return x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _normalized(x: Tensor, eps: float) -> Tensor:
    # n = x s
    return x.float() * _scale_of(x, eps)


def _rms_norm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    # y = w * n
    return weight * (x.float() * scale).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    """RMS norm; with `keep`, its backward computes nothing of the forward again."""

    @staticmethod
    def forward(ctx, x, weight, scale, keep):  # type: ignore[override]
        normal = x.float() * scale
        ctx.save_for_backward(x, weight, scale, normal if keep else None)
        return weight * normal.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        x, weight, scale, normal = ctx.saved_tensors
        if normal is None:
            normal = x.float() * scale
        # dw = sum over rows of dy * n
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * normal.to(x.dtype)).sum(tuple(range(dy.dim() - 1)))
        # dn = dy * w,  dx = s (dn - n mean(dn * n))
        dnormal = (dy * weight).float()
        mean = (dnormal * normal).mean(-1, keepdim=True)
        dx = dnormal.addcmul_(normal, mean, value=-1).mul_(scale).to(x.dtype)
        return dx, dweight, None, None


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


def install_rotary(model: nn.Module, context: Context) -> None:
    """Make the tables of Llama's rotary positions once per step, and rotate in few operators.

    Left alone where the tables depend on the longest row seen, as in dynamic scaling.
    """
    tables = [module for module in model.modules() if type(module) in ROTARY_TABLES]
    if not tables or any(table.rope_type not in STATIC_ROTARY for table in tables):
        return
    for module in model.modules():
        if type(module) in ROTARY_TABLES:
            module.__class__ = FusedRotaryTables
            module.__dict__["context"] = context
        elif type(module) in ROTARY_ATTENTION:
            module.__class__ = ROTARY_ATTENTION[type(module)]


class FusedRotaryTables(LlamaRotaryEmbedding):
    """cos and signed sin of the current pass's positions, [B, S, E] each, for `rotate`.

    Of a later pass of one column, twice its rotation, [B, E, E].
    """

    context: Context

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        def tables(positions_BT: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = LlamaRotaryEmbedding.forward(self, x, positions_BT)
            first, second = sin.chunk(2, dim=-1)
            return cos, torch.cat([-first, second], dim=-1)

        cos_BSE, sin_BSE = self.context.by_position(self, position_ids, tables)
        if not self.context.current.is_short:
            return cos_BSE, sin_BSE
        # y = x R,  R = diag(cos) + swap(diag(sin))
        swapped_BEE = sin_BSE.squeeze(1).diag_embed().roll(sin_BSE.shape[-1] // 2, 1)
        rotation_BEE = cos_BSE.squeeze(1).diag_embed().add_(swapped_BEE)
        return rotation_BEE, rotation_BEE


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries [B, H, S, E] and keys [B, K, S, E] by what FusedRotaryTables returns."""
    if cos.shape[1] != q.shape[2]:  # [B, E, E]; no more the same object where a hook of ZeRO-3 returns views
        return torch.bmm(q.squeeze(2), cos).unsqueeze(2), torch.bmm(k.squeeze(2), cos).unsqueeze(2)
    cos, sin = cos[:, None], sin[:, None]
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        # y = cos * x + sin * swap(x), where swap exchanges the halves of a head
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        # dx = cos * dy + swap(sin * dy)
        return torch.addcmul((dy * sin).roll(dy.shape[-1] // 2, -1), dy, cos), None, None


def _rotating(attention: type) -> type:
    """A subclass whose forward calls `rotate` where it names `apply_rotary_pos_emb`."""
    forward: Any = inspect.unwrap(attention.forward)  # type: ignore[attr-defined]
    names = {**forward.__globals__, "apply_rotary_pos_emb": rotate}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return type(f"Rotating{attention.__name__}", (attention,), {"forward": ours})


STATIC_ROTARY = ("default", "linear", "llama3", "yarn")
ROTARY_TABLES = (LlamaRotaryEmbedding, MistralRotaryEmbedding, Qwen2RotaryEmbedding, Qwen3RotaryEmbedding)
ROTARY_ATTENTION: dict[type, type] = {
    attention: _rotating(attention)
    for attention in (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention)
}
