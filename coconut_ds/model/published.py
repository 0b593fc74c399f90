"""Read what the published forks wrote: window weights, LoRA folders; check the experiment's window settings.

    a fork's window                                     here
    width in the code, weights oldest state first       latent_window_size, weights newest state first
    full for the first latent, one state wide after it  latent_window_scope: pass
    fixed weights .6 .3 .1, oldest state first          latent_window_weights: [0.1, 0.3, 0.6]

    folder/peft/       adapter_config.json, adapter_model.safetensors
    folder/latent.pt   {"latent_weights": one number per state}, if the window was saved

Settings are never changed silently: an error lists the lines to write.

Shapes: K special tokens, D hidden size, V vocabulary, W window columns.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coconut_ds.config.experiment import Experiment
from coconut_ds.errors import CheckpointError, first_line
from coconut_ds.runs.weights import WINDOW_NAME, is_published_file

if TYPE_CHECKING:  # importing PEFT is slow, and only LoRA runs need it
    from peft import PeftModel

DEFAULT_WEIGHTS, FORK_WEIGHTS = (0.6, 0.3, 0.1), (0.1, 0.3, 0.6)  # newest state first
PUBLISHED_ADAPTER, PUBLISHED_WINDOW = "peft", "latent.pt"
PEFT_PREFIX = "base_model.model."


def published_window(
    experiment: Experiment, adapter: Path | None, weights: dict[str, Tensor] | None, source: str
) -> Tensor | None:
    """Take the window weights of a fork's full checkpoint out of `weights`, oldest state first.

    Raises CheckpointError if the experiment's settings differ from those of the fork's training.
    """
    window = None if weights is None else weights.pop(WINDOW_NAME, None)
    if not experiment.method.has_latents or (adapter is not None and not is_published_lora(adapter)):
        return None  # no latents, or an adapter with its own thought
    if adapter is not None:
        if (learned := read_published_window(adapter)) is not None:
            _require_learned_window(experiment, learned, adapter)
    elif window is not None:
        _require_learned_window(experiment, window, source)
    elif experiment.thought == "fixed_window" and is_published_file(source):
        _require_fixed_window(experiment, source)
    return window


def is_published_lora(folder: str | Path) -> bool:
    """Whether the folder has the layout of the published LoRA code."""
    return (Path(folder) / PUBLISHED_ADAPTER).is_dir()


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


def _require_learned_window(experiment: Experiment, latent_weights_W: Tensor, source: str | Path) -> None:
    """Raise CheckpointError if the experiment's window is not the fork's learned window.

    `latent_weights_W`: oldest state first, as in the file.
    """
    if latent_weights_W.dim() != 1 or not len(latent_weights_W):
        shape = tuple(latent_weights_W.shape)
        raise CheckpointError(
            f"{source}: `latent_weights` has shape {shape}; it must be one number per state"
        )
    width = len(latent_weights_W)
    lines = []
    if experiment.thought != "learnable_window":
        lines.append("thought: learnable_window")
    if experiment.latent_window_scope != "pass":
        lines.append("latent_window_scope: pass")
    if experiment.latent_window_size != width:
        lines.append(f"latent_window_size: {width}")
    if lines:
        uses = (
            f"uses thought `{experiment.thought}`"
            if experiment.thought != "learnable_window"
            else "has other window settings than the fork's training"
        )
        raise CheckpointError(
            f"{source}: this checkpoint has window weights (`latent_weights`), but the experiment {uses}; "
            f"set {_listed(lines)}"
        )
    newest_first = ", ".join(f"{value:.3g}" for value in latent_weights_W.flip(0).tolist())
    warnings.warn(
        f"{source}: window weights of the learnable-window fork, newest state first here: {newest_first}. "
        f"As in the fork, the first latent sees {width} states and every later one sees 1",
        stacklevel=2,
    )


def _require_fixed_window(experiment: Experiment, source: str | Path) -> None:
    """The same for the contextual fork's fixed window, which a state dict does not show.

    Raises CheckpointError for evaluation; warns when training starts from such a file.
    """
    lines = []
    if experiment.latent_window_scope != "pass":
        lines.append("latent_window_scope: pass")
    if tuple(experiment.latent_window_weights) == DEFAULT_WEIGHTS:
        lines.append(f"latent_window_weights: {list(FORK_WEIGHTS)}")
    if not lines:
        return
    text = (
        f"{source}: a state dict of the published code, and the experiment uses thought `fixed_window`. "
        "The fork's window reaches into the newest pass only, and its weights .6 .3 .1 run from the oldest "
        f"state to the newest. To use the window of its training, set {_listed(lines)}"
    )
    if experiment.only_eval:
        raise CheckpointError(text)
    warnings.warn(text, stacklevel=2)


def _listed(lines: list[str]) -> str:
    quoted = [f"`{line}`" for line in lines]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def take_vocabulary(base: "PeftModel", weights: dict[str, Tensor], file: Path) -> Tensor | None:
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
