"""Open a safetensors file that another person may have made.

Knows: safetensors, which tensors can be weights.  Does not know: models, names, shapes.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from coconut_ds.errors import CheckpointError, first_line


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file.  Raises CheckpointError for one that is missing or damaged."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist, or is not a file")
    try:
        return load_file(file)
    except Exception as error:  # of safetensors, of torch for odd types, of the system
        raise CheckpointError(f"{file} cannot be read as safetensors ({first_line(error)})") from error


def is_weight(value: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers, one after the other."""
    return value.is_floating_point() and value.layout is torch.strided and not value.is_meta


def described(value: Tensor) -> str:
    """A tensor's shape, and its type where no weight has that type."""
    return f"{tuple(value.shape)}" + ("" if is_weight(value) else f" of {value.dtype}")
