"""Activations written in Python exchanged for one fused operation that keeps its input and nothing else.

GPT-2's `gelu_new` runs eight Python-level operations and keeps about six tensors of the MLP's width for the
backward, a third of all activation bytes; torch's tanh GELU is the same function.

Knows: transformers' activation modules.  Does not know: models; their configurations keep the old name.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN, NewGELUActivation

# The names in configurations whose Python implementations are the tanh approximation of GELU.
TANH_GELU_NAMES = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")


class FusedTanhGelu(nn.Module):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) in one operation."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


def fuse_activations(model: nn.Module) -> int:
    """Exchange the activation modules of `model` in place; gives their number.  No parameter changes."""
    python_types = {NewGELUActivation, *(type(ACT2FN[name]) for name in TANH_GELU_NAMES if name in ACT2FN)}
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in python_types
    ]
    for parent, name in places:
        setattr(parent, name, FusedTanhGelu())
    return len(places)
