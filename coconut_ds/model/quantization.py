"""NF4 with double quantization for frozen linear layers (QLoRA), through bitsandbytes.

    weight = code[4 bits] * scale of its 64 elements        scale = map[8 bits] * scale of 256 scales + offset

Everything is stored as bytes in buffers: DeepSpeed and `Module.to(dtype)` convert floating-point tensors, and
partition, offload and save parameters.  The compute dtype is the input's.

Shapes: I inputs, O outputs, N = I x O.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coconut_ds.errors import ConfigError

BLOCK, SCALE_BLOCK = 64, 256
CODES, SCALE_CODES = 16, 256


def quantize_linears(base: PreTrainedModel) -> None:
    """Replace the linear layers of `base`, except its head, in place.  Raises ConfigError."""
    refuse_missing_library("quantization: nf4")
    for parent, name in _linears(base):
        setattr(parent, name, NF4Linear(getattr(parent, name)))


def others_in_fp32(base: PreTrainedModel) -> None:
    """Convert everything but the weights that `quantize_linears` reads to fp32, in place."""
    weights = {id(getattr(parent, name).weight) for parent, name in _linears(base)}
    for parameter in base.parameters():
        if id(parameter) not in weights:
            parameter.data = parameter.data.float()
    base.config.dtype = torch.float32


def _linears(base: PreTrainedModel) -> list[tuple[Any, str]]:
    """(parent, name) of each linear layer except the head; the list keeps no weights alive."""
    head = base.get_output_embeddings()
    return [
        (parent, name)
        for parent in base.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
    ]


def dequantize_linears(model: nn.Module) -> None:
    """Replace quantized layers by layers of the original kind with the quantized values, in place."""
    parents: list[Any] = list(model.modules())
    for parent in parents:
        for name, layer in list(parent.named_children()):
            if isinstance(layer, NF4Linear):
                setattr(parent, name, layer.dequantized())
                if hasattr(parent, "fan_in_fan_out"):  # PEFT's layer around it
                    parent.fan_in_fan_out = layer.is_conv1d


def has_library() -> bool:
    return find_spec("bitsandbytes") is not None


def refuse_missing_library(setting: str) -> None:
    """Raise ConfigError if bitsandbytes, which `setting` needs, is not installed."""
    if not has_library():
        raise ConfigError(f'{setting} needs bitsandbytes; install it: pip install "bitsandbytes==0.50.2"')


def _bitsandbytes() -> Any:
    from bitsandbytes import functional  # slow, and optional

    return functional


class NF4Linear(nn.Linear):
    """A frozen linear layer with a quantized weight; of a Conv1D, which stores W^T, the same layer."""

    absmax: Tensor
    numbers: Tensor
    is_conv1d: bool

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        nn.Module.__init__(self)
        weight_OI = layer.weight.detach()
        self.is_conv1d = isinstance(layer, Conv1D)
        if self.is_conv1d:
            weight_OI = weight_OI.T.contiguous()
        self.out_features, self.in_features = weight_OI.shape
        self.bias = layer.bias
        packed, absmax, numbers = _empty(weight_OI) if weight_OI.is_meta else _quantized(weight_OI)
        # Not saved: they are made from the base's weights.
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)
        self.register_buffer("numbers", numbers, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I]."""
        library = _bitsandbytes()
        numbers = self.numbers.view(torch.float32)
        code, scale_code, offset, scales = numbers.split(
            [CODES, SCALE_CODES, 1, numbers.numel() - CODES - SCALE_CODES - 1]
        )
        state = library.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=offset,
            state2=library.QuantState(
                absmax=scales, code=scale_code, blocksize=SCALE_BLOCK, dtype=torch.float32
            ),
        )
        return library.dequantize_4bit(self.weight, state)

    def dequantized(self) -> nn.Module:
        """The layer that was quantized, with the quantized values."""
        weight_OI, sizes = self.read(torch.float32), (self.out_features, self.in_features)
        layer: Any = Conv1D(*sizes) if self.is_conv1d else nn.Linear(*sizes[::-1], bias=self.bias is not None)
        weight = weight_OI.T.contiguous() if self.is_conv1d else weight_OI
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = self.bias
        return layer


class _Product(torch.autograd.Function):
    """y = x W^T + b of a frozen layer; the backward dequantizes again instead of saving W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.read(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # dx = dy W
        return gradients[0] @ ctx.layer.read(ctx.dtype), None


def _quantized(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weights, 8-bit scales, and the fp32 numbers that decode them, all as bytes."""
    packed, state = _bitsandbytes().quantize_4bit(
        weight_OI, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    numbers = torch.cat([state.code, state.state2.code, state.offset.reshape(1), state.state2.absmax])
    return packed, state.absmax, numbers.float().view(torch.uint8)


def _empty(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same shapes without values, for planning."""
    elements = weight_OI.numel()
    scales = -(-elements // BLOCK)
    numbers = CODES + SCALE_CODES + 1 + -(-scales // SCALE_BLOCK)
    shapes = ((-(-elements // 2), 1), (scales,), (4 * numbers,))
    packed, absmax, flat = (weight_OI.new_empty(shape, dtype=torch.uint8) for shape in shapes)
    return packed, absmax, flat
