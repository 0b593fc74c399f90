"""Adapters on disk: PEFT's folder with the thought and the origin of the base; the published layout too.

    adapter_config.json adapter_model.safetensors      as PEFT writes and reads them
    thought.safetensors                                the thought's parameters
    base.json                                          the frozen weights that the adapter belongs to

Knows: both layouts, and what must agree before anything is changed.
Does not know: checkpoint folders, DeepSpeed.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut_ds.errors import CheckpointError, first_line
from coconut_ds.files import json_text, read_json
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.lora.adapters import Origin, assert_tied
from coconut_ds.model.lora.grown_vocabulary import take_vocabulary
from coconut_ds.runs.base_record import BaseRecord
from coconut_ds.runs.weight_files import describe_tensor, is_weight, read_safetensors, refuse_non_finite
from coconut_ds.thoughts.learnable_window import LearnableWindow

if TYPE_CHECKING:
    from peft import PeftModel

THOUGHT_FILE = "thought.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ORIGIN_FILE = "base.json"
PUBLISHED_ADAPTER, PUBLISHED_WINDOW = "peft", "latent.pt"


def save_adapter(model: Coconut, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter as PEFT does, and beside it the thought and the origin of the base.

    `weights`, named as in `model.state_dict()`, replaces the model's own (gathered or fp32 ones); it needs
    only what trains.  A plain `PeftModel.from_pretrained(base, folder)` reads the folder, given a base whose
    embedding has the marker rows.
    """
    folder = Path(folder)
    state = dict(model.state_dict() if weights is None else weights)
    model.base.save_pretrained(
        str(folder),
        state_dict={
            name.removeprefix("base."): value for name, value in state.items() if name.startswith("base.")
        },
        save_embedding_layers=False,  # the marker rows are all that differs, and they are in the adapter
    )
    save_thought(
        {name.removeprefix("thought."): v for name, v in state.items() if name.startswith("thought.")}, folder
    )
    (folder / ORIGIN_FILE).write_text(
        json_text(asdict(origin_of(model.base)), indent=1) + "\n", encoding="utf-8"
    )


def save_thought(state: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write a thought's state dict into a model's folder."""
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in state.items()},
        Path(folder) / THOUGHT_FILE,
    )


def load_adapter(model: Coconut, folder: str | Path, with_window: bool = True) -> None:
    """Read what `save_adapter`, or the published code, wrote into a model of the same shape and base weights.

    `with_window`: a method with latents, which uses the window weights of the published code.
    A thought without parameters (CoT, plain Coconut) leaves the model's own as it starts.
    Raises CheckpointError, also where the base weights are not those that the adapter was trained on.
    """
    folder = Path(folder)
    if is_published_lora(folder):
        load_published_lora(model, folder, with_window)
        return
    origin = read_origin(folder)
    _install_adapter(model.base, folder, origin=origin)
    _need(folder / THOUGHT_FILE)
    if learned := read_safetensors(folder / THOUGHT_FILE):
        install_thought(model, learned, folder / THOUGHT_FILE)
    own = origin_of(model.base)
    if origin is not None:
        model.base.origin = replace(origin, base=own.base)  # type: ignore[assignment]


def load_published_lora(model: Coconut, folder: str | Path, with_window: bool = True) -> None:
    """Read a folder of the learnable-window LoRA code: `peft/` and, where the window was saved, `latent.pt`.

    Its special-token rows never trained.  Where PEFT saved the grown embedding they come from there, else
    they stay as `base` has them: copies of `<<`, as in that code.  Raises CheckpointError.
    """
    folder = Path(folder)
    _install_adapter(model.base, folder / PUBLISHED_ADAPTER, is_published=True)
    # Saved from here on, the adapter stands on plain `model_id`: this folder holds no base weights.
    model.base.origin = replace(origin_of(model.base), weights=None)  # type: ignore[assignment]
    window_W = read_published_window(folder)
    if window_W is None or not with_window:
        return
    if not isinstance(model.thought, LearnableWindow):
        raise CheckpointError(
            f"{folder / PUBLISHED_WINDOW} has window weights (`latent_weights`), but this model's thought is "
            f"{type(model.thought).__name__}; set `thought: learnable_window` and `latent_window_scope: pass`"
        )
    install_thought(model, {"logits_W": window_W.flip(0)}, folder / PUBLISHED_WINDOW)


def read_published_window(folder: str | Path) -> Tensor | None:
    """Window weights beside a published adapter, oldest state first; None where there are none.

    Raises CheckpointError.
    """
    latent = Path(folder) / PUBLISHED_WINDOW
    if not latent.exists():
        return None
    try:
        state = torch.load(latent, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything on a damaged file
        raise CheckpointError(
            f"{latent} is not a plain dictionary of tensors and was not unpickled ({first_line(error)})"
        ) from error
    weights = state.get("latent_weights") if isinstance(state, dict) else None
    if not isinstance(weights, Tensor) or weights.dim() != 1 or len(state) != 1:
        raise CheckpointError(
            f"{latent} does not hold `latent_weights`, one number per state, and nothing else"
        )
    return weights


def is_published_lora(folder: str | Path) -> bool:
    """Whether the folder has the layout of the published LoRA code."""
    return (Path(folder) / PUBLISHED_ADAPTER).is_dir()


def read_origin(folder: str | Path) -> Origin | None:
    """The base weights of a saved adapter; None for the published layout, which does not say.

    Raises CheckpointError.
    """
    path = Path(folder) / ORIGIN_FILE
    if is_published_lora(folder):
        return None
    _need(path)
    try:
        values = read_json(path)
        record = values.pop("base", None)
        origin = Origin(**values, base=None if record is None else BaseRecord.read(record))
        if not all(isinstance(v, str) for v in (origin.model_id, origin.weights or "", origin.fingerprint)):
            raise TypeError("its values are not text")
        return origin
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe an adapter's base ({first_line(error)})") from error


def origin_of(base: nn.Module) -> Origin:
    origin = getattr(base, "origin", None)
    assert isinstance(origin, Origin), "adapters come from add_adapters"
    return origin


def _install_adapter(
    base: "PreTrainedModel | PeftModel",
    folder: Path,
    origin: Origin | None = None,
    is_published: bool = False,
) -> None:
    if isinstance(base, PreTrainedModel):
        raise CheckpointError(f"{folder} holds a LoRA adapter, and this model has none: set 'tuning: lora'")
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    _need(folder / "adapter_config.json")
    _compare_settings(base, folder / "adapter_config.json")
    if origin is not None:
        _compare_origin(origin_of(base), origin, folder)
    weights = read_safetensors(folder / ADAPTER_FILE)  # PEFT would also take a pickled .bin, or ask the hub
    own = get_peft_model_state_dict(base, save_embedding_layers=False)
    kept: dict[str, Tensor] = {}
    if is_published:
        rows_KD = take_vocabulary(base, weights, folder / ADAPTER_FILE)
        kept = {n: v if rows_KD is None else rows_KD for n, v in own.items() if "trainable_tokens_delta" in n}
    _compare_tensors(weights, {n: v for n, v in own.items() if n not in kept}, folder)
    set_peft_model_state_dict(base, {**kept, **weights})
    assert_tied(base)


def install_thought(model: Coconut, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Put a saved thought into the model's own.  Raises CheckpointError where names or shapes differ."""
    refuse_non_finite(state, source)
    _compare_tensors(state, model.thought.state_dict(), source)
    model.thought.load_state_dict(dict(state))


def _need(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: is {path.parent} the folder of a LoRA adapter?")


def _compare_settings(base: "PeftModel", path: Path) -> None:
    """The settings that change what the same adapter tensors compute; their shapes cannot tell."""
    try:
        saved = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)})") from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} is not the configuration of an adapter")
    own = base.peft_config["default"]
    differing = [
        f"{key} is {saved[key]} there and {getattr(own, key)} here"
        for key in ("r", "lora_alpha", "use_rslora", "use_dora")
        if key in saved and saved[key] != getattr(own, key)
    ]
    if differing:
        raise CheckpointError(f"{path} was made with other LoRA settings: {'; '.join(differing)}")


def _compare_origin(own: Origin, saved: Origin, folder: Path) -> None:
    start = saved.weights or saved.model_id
    if saved.base is None or own.base is None:
        different = [] if own.fingerprint == saved.fingerprint else ["weights"]
        if own.base is not None:
            warnings.warn(
                f"{folder / ORIGIN_FILE} is of an older version: the configuration and the tokenizer of "
                f"{saved.model_id} cannot be compared, and of the weights only a sample",
                stacklevel=2,
            )
    else:
        different = [
            part if part in ("weights", "tokenizer") else f"{part} (then {old!r}, now {new!r})"
            for part, old, new in saved.base.differences(own.base)
        ]
    if different:
        raise CheckpointError(
            f"{folder}: the adapter was trained on the weights of {start}, and what is there now has other "
            f"content: {', '.join(different)}. Put back what it was trained on, or train again"
        )


def _compare_tensors(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path) -> None:
    faults = [f"missing {name}" for name in sorted(set(expected) - set(given))]
    faults += [f"unexpected {name}" for name in sorted(set(given) - set(expected))]
    faults += [
        f"{name} is {describe_tensor(given[name])} there and {tuple(value.shape)} here"
        for name, value in expected.items()
        if name in given and not (is_weight(given[name]) and given[name].shape == value.shape)
    ]
    if faults:
        more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(f"{source} does not fit this model:\n  " + "\n  ".join(faults[:8]) + more)
