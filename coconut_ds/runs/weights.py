"""Read weights from untrusted files: our checkpoints, Hugging Face folders, safetensors, torch.save.

    checkpoint_7                 a file written by torch.save: the published Coconut code's checkpoints
    model.safetensors            one file
    folder/                      Hugging Face form, one file or several with an index
    checkpoint_7/                our own: its model/ part

model/loading.py checks the names and shapes.
"""

import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from coconut_ds.errors import CheckpointError, first_line
from coconut_ds.files import meant_child, read_json
from coconut_ds.runs.checkpoint_folders import CheckpointFolders, resolve_pointer
from coconut_ds.runs.checkpoints import refuse_non_finite

ADAPTER_FILE = "adapter_model.safetensors"
PUBLISHED_ADAPTER_FILE = "peft/adapter_model.safetensors"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
WEIGHT_SUFFIXES, PUBLISHED_NAME = (".safetensors", ".bin", ".pt", ".pth"), re.compile(r"checkpoint_\d+")
THOUGHT_FILE = "thought.safetensors"
# Published Coconut wraps the model in this attribute and stores its input embedding under a second name.
WRAPPER, SECOND_NAME = "base_causallm.", "embedding.weight"
WINDOW_NAME = "latent_weights"  # of the learnable-window forks, oldest state first
# What torch.load raises for a file that torch.save did not write.
DAMAGED = (
    OSError, RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError, ImportError,
)  # fmt: skip
PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


def load_foreign_weights(path: str | Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read the state dict of a causal LM to the CPU, under Hugging Face's names.

    If the file has the learned window of a fork, it is added under WINDOW_NAME.

    `allow_pickle`: also open files that hold more than tensors; these can run their author's code.
    Raises CheckpointError if `path` is missing, has another format, or holds code where tensors belong.
    """
    path = resolve_pointer(Path(path))
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; check 'load_model_path'")
    weights: dict[str, Tensor] = {}
    for file in _weight_files(path):
        part = read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file, allow_pickle)
        weights.update(part)
    return _plain_names(weights, path)


def load_thought_weights(path: str | Path) -> dict[str, Tensor]:
    """The trained weights of the thought in one of our checkpoints; empty for other weights."""
    file = model_folder(Path(path)) / THOUGHT_FILE
    return read_safetensors(file) if file.is_file() else {}


def is_published_file(path: str | Path) -> bool:
    """Whether the weights are a file written by torch.save, which this program does not write."""
    path = Path(path)
    return path.is_file() and path.suffix != ".safetensors" and resolve_pointer(path) == path


def find_adapter(path: str | Path) -> Path | None:
    """The folder of LoRA adapters at `path` (our layout or the published one); None if there are none."""
    folder = model_folder(Path(path))
    has_adapter = any((folder / name).is_file() for name in (ADAPTER_FILE, PUBLISHED_ADAPTER_FILE))
    return folder if has_adapter else None


def model_folder(path: Path) -> Path:
    """The folder with the weights of one of our checkpoints; any other path as it is."""
    path = resolve_pointer(path)
    return path / "model" if (path / "model").is_dir() and (path / "manifest.json").is_file() else path


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder = model_folder(path)
    if (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds LoRA adapters, not a complete model; "
            f"merge them first: python -m coconut_ds export {path}"
        )
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed_files(index)
    if checkpoints := CheckpointFolders(folder).names():
        name = "best" if (folder / "best").is_file() else checkpoints[-1]
        raise CheckpointError(
            f"{folder} is a run folder; name one of its checkpoints: load_model_path: {folder / name}"
        )
    child = meant_child(folder, _has_weights) or "; give a weight file or a folder with one"
    raise CheckpointError(f"{folder} has no model.safetensors and no pytorch_model.bin{child}")


def _has_weights(path: Path) -> bool:
    """Whether a path is a weight file, as the published code's `checkpoint_7`, or a folder with one."""
    if path.is_dir():
        names = [f"{name}{index}" for name in WEIGHT_FILES for index in ("", ".index.json")]
        return any((path / name).is_file() for name in (*names, ADAPTER_FILE))
    return path.is_file() and (
        path.suffix in WEIGHT_SUFFIXES or PUBLISHED_NAME.fullmatch(path.name) is not None
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
            f"{file} is damaged or holds more than tensors, and opening it could run code of its author. "
            "If you trust its source: --set allow_pickle=true"
        ) from error
    except DAMAGED as error:
        raise CheckpointError(
            f"{file} was not written by torch.save, or is damaged ({first_line(error)})"
        ) from error
    for key in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{file} is not a state dict: it must map names to tensors")
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
            f"{path}: holds weights that do not belong to the model: {', '.join(sorted(outer)[:5])}"
        )
    return inner if window is None else {**inner, WINDOW_NAME: window}


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
