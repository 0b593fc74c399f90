"""Read safetensors files from untrusted sources."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from coconut_ds.errors import CheckpointError, first_line


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of one file. Raises CheckpointError if it is missing, damaged or holds NaN."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors, torch (unknown types) and the system raise their own
        raise CheckpointError(f"{file} cannot be read as safetensors ({first_line(error)})") from error
    refuse_non_finite(tensors, file)
    return tensors


def refuse_non_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise CheckpointError with the names of tensors that hold NaN or infinity.

    `source`: the file, or the folder with the files.
    """
    if names := [name for name, value in tensors.items() if not _is_finite(value)]:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"{_file_of(names[0], Path(source))} holds NaN or infinite weights: "
            f"{', '.join(names[:3])}{more}, "
            "so every loss would be NaN; use another file or an older checkpoint"
        )


def _is_finite(value: Tensor) -> bool:
    if not is_weight(value) or value.numel() == 0:
        return True
    # Two numbers instead of a mask of the tensor's size; if there is a NaN, both are NaN.
    wide = value.float() if value.element_size() == 1 else value
    return bool(torch.stack(torch.aminmax(wide)).isfinite().all())


def _file_of(name: str, source: Path) -> Path:
    """The safetensors file in the folder that holds the tensor `name`; otherwise `source`."""
    for file in sorted(source.glob("*.safetensors")) if source.is_dir() else ():
        with safe_open(file, "pt") as reader:
            if any(name == key or name.endswith(f".{key}") for key in reader.keys()):  # noqa: SIM118
                return file
    return source


def is_weight(value: Tensor) -> bool:
    """Whether a tensor is dense and floating-point."""
    return value.is_floating_point() and value.layout is torch.strided and not value.is_meta


def describe_tensor(value: Tensor) -> str:
    """A tensor's shape, and its dtype if it cannot be a weight."""
    return f"{tuple(value.shape)}" + ("" if is_weight(value) else f" of {value.dtype}")
