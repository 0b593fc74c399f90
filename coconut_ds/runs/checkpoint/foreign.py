"""Weights that this program did not train: state dict files, Hugging Face folders, safetensors; also our own.

    checkpoint_7                 a file that torch.save wrote: the published Coconut code's checkpoints
    model.safetensors            one file
    folder/                      Hugging Face form, one file or several with an index
    checkpoint_7/                ours: its model/ part

Knows: file formats and the names in them.  Does not know: models; model/loading.py checks names and shapes.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from coconut_ds.errors import CheckpointError
from coconut_ds.files import read_json
from coconut_ds.runs.checkpoint.folders import followed
from coconut_ds.runs.weight_files import read_safetensors, refuse_non_finite

ADAPTER_FILE = "adapter_model.safetensors"
PUBLISHED_ADAPTER_FILE = "peft/adapter_model.safetensors"
THOUGHT_FILE = "thought.safetensors"
# The published Coconut wraps the model in this attribute, and keeps its input embedding under a second name.
WRAPPER, SECOND_NAME = "base_causallm.", "embedding.weight"
WINDOW_NAME = "latent_weights"  # of the learnable-window forks, oldest state first
PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


def load_foreign_weights(path: str | Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The state dict of a causal LM on the CPU, under the names that Hugging Face gives.

    With it, where the file has one, the learned window of a fork under WINDOW_NAME.

    `allow_pickle`: also open files that hold more than tensors, which can run code of whoever made them.
    Raises CheckpointError when there is nothing, or nothing of these forms, or code where tensors belong.
    """
    path = followed(Path(path))
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder; check 'load_model_path'")
    weights: dict[str, Tensor] = {}
    for file in _weight_files(path):
        part = read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file, allow_pickle)
        weights.update(part)
    return _plain_names(weights, path)


def load_thought_weights(path: str | Path) -> dict[str, Tensor]:
    """What one of our checkpoints learned for its latent slots; empty for weights from elsewhere."""
    file = _model_folder(Path(path)) / THOUGHT_FILE
    return read_safetensors(file) if file.is_file() else {}


def is_published_file(path: str | Path) -> bool:
    """Whether the weights are a file that torch.save wrote: this program writes none."""
    path = Path(path)
    return path.is_file() and path.suffix != ".safetensors" and followed(path) == path


def find_adapter(path: str | Path) -> Path | None:
    """The folder of LoRA adapters at `path`, if that is what is there: ours, or the published layout."""
    folder = _model_folder(Path(path))
    found = any((folder / name).is_file() for name in (ADAPTER_FILE, PUBLISHED_ADAPTER_FILE))
    return folder if found else None


def _model_folder(path: Path) -> Path:
    path = followed(path)
    return path / "model" if (path / "model").is_dir() and (path / "manifest.json").is_file() else path


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder = _model_folder(path)
    if (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds LoRA adapters, not a whole model; "
            f"merge them first: python -m coconut_ds export {path}"
        )
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed_files(index)
    raise CheckpointError(
        f"{folder} has no model.safetensors and no pytorch_model.bin; name a file, or such a folder"
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weight files ({error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file in the same folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing; {index.name} names it")
    return [index.parent / name for name in names]


def _read_pickle(file: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if file.stat().st_size == 0:
        raise CheckpointError(f"{file} is empty")
    try:
        content = torch.load(file, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} cannot be opened as tensors alone: it is damaged, or it holds more, and opening it "
            "could run code of whoever made it. Only if you trust its source: --set allow_pickle=true"
        ) from error
    except (
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        EOFError,
        TypeError,
        AttributeError,
        ImportError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} was not written by torch.save, or is damaged ({reason})") from error
    for key in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(
            f"{file} is not a state dict (names with tensors), but a {type(content).__name__}"
        )
    refuse_non_finite(content, file)
    return content


def _plain_names(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    if not weights:
        raise CheckpointError(f"{path} holds no tensor")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    if not any(name.startswith(WRAPPER) for name in weights):
        return weights
    inner = {name.removeprefix(WRAPPER): value for name, value in weights.items() if name.startswith(WRAPPER)}
    outer = {name: value for name, value in weights.items() if not name.startswith(WRAPPER)}
    second, window = outer.pop(SECOND_NAME, None), outer.pop(WINDOW_NAME, None)
    if second is not None and not any(
        second.shape == v.shape and torch.equal(second, v) for v in inner.values()
    ):
        raise CheckpointError(f"{path}: '{SECOND_NAME}' is not the input embedding of '{WRAPPER}...'")
    if outer:
        raise CheckpointError(
            f"{path}: besides the model it holds {', '.join(sorted(outer)[:5])}: no place for that here"
        )
    return inner if window is None else {**inner, WINDOW_NAME: window}
