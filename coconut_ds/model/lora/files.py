"""Save and load adapters: PEFT's folder plus the thought and the base's origin; load the published layout.

    adapter_config.json adapter_model.safetensors      as PEFT writes and reads them
    thought.safetensors                                the thought's parameters
    base.json                                          the frozen weights that the adapter was trained on

Shapes: K special tokens, D hidden size, V vocabulary, W window columns.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut_ds.errors import CheckpointError, first_line
from coconut_ds.files import from_start, json_text, read_json
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.lora.adapters import Origin, assert_tied
from coconut_ds.runs.changes import BaseRecord
from coconut_ds.runs.weights import (
    describe_tensor,
    is_weight,
    model_folder,
    read_safetensors,
    refuse_non_finite,
)
from coconut_ds.thoughts.learnable_window import LearnableWindow

if TYPE_CHECKING:
    from peft import PeftModel

THOUGHT_FILE = "thought.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ORIGIN_FILE = "base.json"
PUBLISHED_ADAPTER, PUBLISHED_WINDOW = "peft", "latent.pt"
PEFT_PREFIX = "base_model.model."


def save_adapter(model: Coconut, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter as PEFT does, plus the thought and the origin of the base.

    `weights` (gathered or fp32, named as in `model.state_dict()`) replaces the model's own; trained weights
    suffice.  `PeftModel.from_pretrained(base, folder)` reads the folder if the base's embedding has the
    special-token rows.
    """
    folder = Path(folder)
    state = dict(model.state_dict() if weights is None else weights)
    origin = origin_of(model.base)
    if origin.weights is not None:
        base_folder = str(model_folder(Path(origin.weights)))
        model.base.peft_config["default"].base_model_name_or_path = base_folder
    model.base.save_pretrained(
        str(folder),
        state_dict={
            name.removeprefix("base."): value for name, value in state.items() if name.startswith("base.")
        },
        save_embedding_layers=False,  # only the special-token rows differ, and the adapter has them
    )
    save_thought(
        {name.removeprefix("thought."): v for name, v in state.items() if name.startswith("thought.")}, folder
    )
    (folder / ORIGIN_FILE).write_text(json_text(asdict(origin), indent=1) + "\n", encoding="utf-8")


def save_thought(state: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write a thought's state dict into a model's folder."""
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in state.items()},
        Path(folder) / THOUGHT_FILE,
    )


def load_adapter(model: Coconut, folder: str | Path, with_window: bool = True) -> None:
    """Load a folder of `save_adapter` or of the published code into a model with the same base weights.

    `with_window`: also load the window weights of the published code, for a method with latents.
    If the saved thought has no parameters (CoT, plain Coconut), the model's thought stays as initialized.
    Raises CheckpointError, also if the adapter was trained on other base weights.
    """
    folder = Path(folder)
    if is_published_lora(folder):
        load_published_lora(model, folder, with_window)
        return
    origin = read_origin(folder)
    _install_adapter(model.base, folder, origin=origin)
    _require(folder / THOUGHT_FILE)
    if learned := read_safetensors(folder / THOUGHT_FILE):
        install_thought(model, learned, folder / THOUGHT_FILE)
    own = origin_of(model.base)
    if origin is not None:
        model.base.origin = replace(origin, base=own.base)  # type: ignore[assignment]


def load_published_lora(model: Coconut, folder: str | Path, with_window: bool = True) -> None:
    """Load a folder of the learnable-window LoRA code: `peft/` and, if the window was saved, `latent.pt`.

    Its special-token rows were not trained.  They come from the embedding if PEFT saved it; otherwise `base`
    keeps its own, copies of `<<` as in that code.  Raises CheckpointError.
    """
    folder = Path(folder)
    _install_adapter(model.base, folder / PUBLISHED_ADAPTER, is_published=True)
    # The folder holds no base weights, so an adapter saved later belongs to plain `model_id`.
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
    """Window weights of a published adapter, oldest state first; None if the folder has none.

    Raises CheckpointError.
    """
    latent = Path(folder) / PUBLISHED_WINDOW
    if not latent.exists():
        return None
    try:
        state = torch.load(latent, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything on a damaged file
        raise CheckpointError(
            f"{latent} is not a plain dictionary of tensors, so it was not loaded ({first_line(error)})"
        ) from error
    weights = state.get("latent_weights") if isinstance(state, dict) else None
    if not isinstance(weights, Tensor) or weights.dim() != 1 or len(state) != 1:
        raise CheckpointError(
            f"{latent} must hold exactly one entry, `latent_weights`, with one number per state"
        )
    return weights


def is_published_lora(folder: str | Path) -> bool:
    """Whether the folder has the layout of the published LoRA code."""
    return (Path(folder) / PUBLISHED_ADAPTER).is_dir()


def read_origin(folder: str | Path) -> Origin | None:
    """The base weights of a saved adapter; None for the published layout, which does not record them.

    Raises CheckpointError.
    """
    path = Path(folder) / ORIGIN_FILE
    if is_published_lora(folder):
        return None
    _require(path)
    try:
        values = read_json(path)
        record = values.pop("base", None)
        origin = Origin(**values, base=None if record is None else BaseRecord.read(record))
        texts = [origin.model_id, origin.fingerprint, *([] if origin.weights is None else [origin.weights])]
        if not all(isinstance(text, str) for text in texts) or origin.weights == "":
            raise TypeError("its values are not text")
        weights = None if origin.weights is None else from_start(origin.weights, folder)
        return replace(origin, weights=weights)
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
        raise CheckpointError(f"{folder} holds a LoRA adapter, but this model has none; set 'tuning: lora'")
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    _require(folder / "adapter_config.json")
    _compare_settings(base, folder / "adapter_config.json")
    if origin is not None:
        _compare_origin(origin_of(base), origin, folder)
    weights = read_safetensors(folder / ADAPTER_FILE)  # PEFT would also load a pickled .bin or query the hub
    own = get_peft_model_state_dict(base, save_embedding_layers=False)
    kept: dict[str, Tensor] = {}
    if is_published:
        rows_KD = _take_vocabulary(base, weights, folder / ADAPTER_FILE)
        kept = {n: v if rows_KD is None else rows_KD for n, v in own.items() if "trainable_tokens_delta" in n}
    _compare_tensors(weights, {n: v for n, v in own.items() if n not in kept}, folder)
    set_peft_model_state_dict(base, {**kept, **weights})
    assert_tied(base)


def _take_vocabulary(base: "PeftModel", weights: dict[str, Tensor], file: Path) -> Tensor | None:
    """Take embedding and head out of an adapter's `weights`; return the special-token rows, rows_KD.

    PEFT saves both, frozen, when the vocabulary grew before training.  Returns None without an embedding.
    The rows of an untied head are written into `base`.
    Raises CheckpointError if any other row differs from that of `base`.
    """
    causal_lm: Any = base.get_base_model()
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    adapter = embedding.token_adapter
    (special_token_ids,) = adapter.token_indices.values()
    saved = {name: _take(causal_lm, module, weights) for name, module in (("in", embedding), ("out", head))}
    frozen = {"in": adapter.base_layer.weight, "out": _frozen_weight(head)}
    for name, saved_VD in saved.items():
        if saved_VD is not None:
            _compare_rows(saved_VD, frozen[name].detach(), special_token_ids, file)
    if saved["out"] is not None and frozen["out"] is not frozen["in"]:
        with torch.no_grad():
            frozen["out"][special_token_ids] = saved["out"][special_token_ids].to(frozen["out"])
    return None if saved["in"] is None else saved["in"][special_token_ids].to(frozen["in"])


def _take(causal_lm: Any, module: Any, weights: dict[str, Tensor]) -> Tensor | None:
    names = [name for name, other in causal_lm.named_modules() if other is module]
    taken = [weights.pop(f"{PEFT_PREFIX}{name}.weight", None) for name in names]
    return next((value for value in taken if value is not None), None)


def _frozen_weight(head: Any) -> Tensor:
    adapter = getattr(head, "token_adapter", None)
    return (head if adapter is None else adapter.base_layer).weight


def _compare_rows(saved_VD: Tensor, own_VD: Tensor, special_token_ids: list[int], file: Path) -> None:
    if saved_VD.shape[1:] != own_VD.shape[1:] or len(saved_VD) <= max(special_token_ids):
        raise CheckpointError(
            f"{file}: its embedding has shape {tuple(saved_VD.shape)}, this model's {tuple(own_VD.shape)}; "
            "set model_id to the model that it was trained on"
        )
    rows = min(len(saved_VD), len(own_VD))
    same_V = (saved_VD[:rows] == own_VD[:rows].to(saved_VD.dtype)).all(dim=1)
    same_V[list(special_token_ids)] = True
    if not bool(same_V.all()):
        raise CheckpointError(
            f"{file}: {int((~same_V).sum())} rows of its frozen embedding differ from this model's; "
            "set model_id to the model that it was trained on"
        )


def install_thought(model: Coconut, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a saved thought into the model's.  Raises CheckpointError if names or shapes differ."""
    refuse_non_finite(state, source)
    _compare_tensors(state, model.thought.state_dict(), source)
    model.thought.load_state_dict(dict(state))


def _require(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; {path.parent} is not the folder of a LoRA adapter")


def _compare_settings(base: "PeftModel", path: Path) -> None:
    """Compare the settings that change an adapter's output but not its shapes."""
    try:
        saved = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)})") from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} is not an adapter configuration")
    own = base.peft_config["default"]
    differing = [
        f"{key} is {saved[key]} there and {getattr(own, key)} here"
        for key in ("r", "lora_alpha", "use_rslora", "use_dora")
        if key in saved and saved[key] != getattr(own, key)
    ]
    if differing:
        raise CheckpointError(f"{path} was trained with other LoRA settings: {'; '.join(differing)}")


def _compare_origin(own: Origin, saved: Origin, folder: Path) -> None:
    start = saved.weights or saved.model_id
    if saved.base is None or own.base is None:
        different = [] if own.fingerprint == saved.fingerprint else ["weights"]
        if own.base is not None:
            warnings.warn(
                f"{folder / ORIGIN_FILE} is of an older version: the configuration and tokenizer of "
                f"{saved.model_id} cannot be compared, and only a sample of its weights can",
                stacklevel=2,
            )
    else:
        different = [
            part if part in ("weights", "tokenizer") else f"{part} (then {old!r}, now {new!r})"
            for part, old, new in saved.base.differences(own.base)
        ]
    if different:
        raise CheckpointError(
            f"{folder}: the adapter was trained on the weights of {start}, whose content has changed since: "
            f"{', '.join(different)}. Restore the original content, or train again"
        )


def _compare_tensors(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path) -> None:
    differences = [f"missing {name}" for name in sorted(set(expected) - set(given))]
    differences += [f"unexpected {name}" for name in sorted(set(given) - set(expected))]
    differences += [
        f"{name} is {describe_tensor(given[name])} there and {tuple(value.shape)} here"
        for name, value in expected.items()
        if name in given and not (is_weight(given[name]) and given[name].shape == value.shape)
    ]
    if differences:
        more = f"\n  and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise CheckpointError(f"{source} does not fit this model:\n  " + "\n  ".join(differences[:8]) + more)
