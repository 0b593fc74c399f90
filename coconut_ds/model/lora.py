"""LoRA through PEFT: adapters, the three special-token rows that train with them, files, merging.

    trained: adapters (lora_A, lora_B) + special-token rows (three vectors) + the thought's parameters

An adapter adds a low-rank product to a frozen linear layer:

    y = x W^T + (alpha / r) (x A^T) B^T       A: r x inputs, B: outputs x r, starts at zero

rsLoRA scales by alpha / sqrt(r) instead.  A saved adapter is PEFT's folder with two more files:

    adapter_config.json adapter_model.safetensors      as PEFT writes and reads them
    thought.safetensors                                the thought's parameters
    base.json                                          the frozen weights that the adapter was trained on

This module imports PEFT, which is slow; only what needs adapters imports it.

Shapes: B rows, T columns, N positions, K special tokens, D hidden size, V vocabulary.
"""

import copy
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coconut_ds.config.experiment import Experiment
from coconut_ds.errors import CheckpointError, ConfigError, first_line
from coconut_ds.files import from_start, json_text, read_json
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import install_thought, refuse_other_tensors, save_thought
from coconut_ds.model.published import (
    PUBLISHED_ADAPTER,
    PUBLISHED_WINDOW,
    is_published_lora,
    read_published_window,
    take_vocabulary,
)
from coconut_ds.model.quantization import dequantize_linears, quantize_linears
from coconut_ds.runs.changes import BaseRecord
from coconut_ds.runs.weights import ADAPTER_FILE, THOUGHT_FILE, model_folder, read_safetensors

# Layers that the published LoRA runs adapt on GPT-2, and their equivalents in the Llama and Qwen families.
GPT2_TARGETS = ("c_attn", "c_proj")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
ALL_LINEAR = "all-linear"
FINGERPRINT_SAMPLES = 1024  # elements of each tensor
ORIGIN_FILE = "base.json"


@dataclass(frozen=True)
class Origin:
    """The frozen weights that an adapter was trained on and needs."""

    model_id: str
    weights: str | None  # the checkpoint loaded before the adapters were added, if any
    fingerprint: str
    base: BaseRecord | None = None  # None in older files, which have only the fingerprint


def fingerprint(base: nn.Module) -> str:
    """A short hash of evenly spaced elements of every tensor."""
    if any(parameter.is_meta for parameter in base.parameters()):
        return ""  # a model without weights, for planning
    digest = hashlib.sha256()
    for name, value in sorted(base.state_dict().items()):
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def add_adapters(
    base: PreTrainedModel,
    experiment: Experiment,
    special_token_ids: Sequence[int],
    record: BaseRecord | None = None,
) -> PeftModel:
    """Freeze `base`, add adapters and make the special-token rows trainable.

    `base` must have its final weights and the special-token rows.  `record` of `base` is saved with the
    adapters.  Raises ConfigError if no layer has a name of `lora_target_modules`.
    """
    origin = Origin(experiment.model_id, experiment.load_model_path, fingerprint(base), record)
    targets = experiment.lora_target_modules or default_target_modules(base)
    if experiment.quantization == "nf4":
        quantize_linears(base)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=experiment.lora_r,
        lora_alpha=experiment.lora_alpha,
        lora_dropout=experiment.lora_dropout,
        use_rslora=experiment.lora_use_rslora,
        use_dora=experiment.lora_use_dora,
        target_modules=ALL_LINEAR if tuple(targets) == (ALL_LINEAR,) else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        trainable_token_indices=list(special_token_ids),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21.2 reads an old name of transformers
            adapted = get_peft_model(base, config)
    except ValueError as error:
        raise ConfigError(f"lora_target_modules {list(targets)}: {error}") from error
    for module in adapted.modules():
        if type(module) is TrainableTokensLayer:
            SpecialTokenRows.take_over(module)
    adapted.origin = origin  # type: ignore[assignment]
    return adapted


def default_target_modules(base: PreTrainedModel) -> tuple[str, ...]:
    """Names of the layers to adapt if the experiment names none."""
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    for targets in (GPT2_TARGETS, LLAMA_TARGETS):
        if names.issuperset(targets):
            return targets
    return (ALL_LINEAR,)


def merge(model: Coconut) -> PreTrainedModel:
    """A plain Hugging Face model with adapters and special-token rows merged into its weights.

    Works on a copy; a fully tuned model is returned itself.  The thought is not included.
    """
    if isinstance(model.base, PreTrainedModel):
        return model.base
    # W' = W + (alpha / r) B A
    adapted = copy.deepcopy(model.base)
    dequantize_linears(adapted)
    return adapted.merge_and_unload(safe_merge=True)


class SpecialTokenRows(TrainableTokensLayer):
    """PEFT's trainable token rows with memory for K rows only.

    PEFT copies the V x D matrix with the new rows on every call, and autograd then fills a V x D gradient.
    Here the frozen layer runs unchanged, which is also where ZeRO-3 gathers its weight, and only the outputs
    of the K rows are replaced.  Saving and merging stay PEFT's.
    """

    base_layer: nn.Module
    special_token_ids_K: Tensor

    @classmethod
    def take_over(cls, layer: TrainableTokensLayer) -> None:
        """Turn a PEFT layer into this class, in place."""
        layer.__class__ = cls
        (ids,) = layer.token_indices.values()
        layer.register_buffer("special_token_ids_K", torch.tensor(ids), persistent=False)
        if layer.tied_adapter:
            layer.register_state_dict_post_hook(_drop_second_name)

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        plain = self.disable_adapters or self.merged or len(active_adapters) != 1
        if plain or self._get_embed_scale() is not None:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        (adapter,) = active_adapters
        rows_KD = self.trainable_tokens_delta[adapter]
        if isinstance(self.base_layer, nn.Embedding):
            return self._look_up(x, rows_KD)
        return self._score(x, rows_KD - self.trainable_tokens_original[adapter].to(rows_KD))

    def _look_up(self, ids_BT: Tensor, rows_KD: Tensor) -> Tensor:
        # y = rows[k] where id = special_token_ids[k], else E[id]
        hits_BTK = ids_BT[..., None] == self.special_token_ids_K
        special_BTD = nn.functional.embedding(hits_BTK.int().argmax(-1), rows_KD)
        frozen_BTD = self.base_layer(ids_BT)
        return torch.where(hits_BTK.any(-1, keepdim=True), special_BTD.to(frozen_BTD.dtype), frozen_BTD)

    def _score(self, hidden_ND: Tensor, change_KD: Tensor) -> Tensor:
        """Logits of a tied head: the frozen matrix's plus the change of the special tokens' columns."""
        # z = h E^T;  z[special_token_ids] += h (rows - original rows)^T
        logits_NV = self.base_layer(hidden_ND)
        change_NK = nn.functional.linear(hidden_ND, change_KD.to(hidden_ND.dtype))
        # In place: a linear layer's backward does not need its output.
        return logits_NV.index_add_(-1, self.special_token_ids_K, change_NK.to(logits_NV.dtype))


def _drop_second_name(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Drop the embedding's matrix from a tied head's state.

    A checkpoint without frozen weights would not recognize this second name and would save the matrix.
    """
    state.pop(f"{prefix}base_layer.weight", None)


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
    if not hasattr(model.thought, "logits_W"):  # of a learnable window
        raise CheckpointError(
            f"{folder / PUBLISHED_WINDOW} has window weights (`latent_weights`), but this model's thought is "
            f"{type(model.thought).__name__}; set `thought: learnable_window` and `latent_window_scope: pass`"
        )
    install_thought(model, {"logits_W": window_W.flip(0)}, folder / PUBLISHED_WINDOW)


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
    base: PreTrainedModel | PeftModel,
    folder: Path,
    origin: Origin | None = None,
    is_published: bool = False,
) -> None:
    if isinstance(base, PreTrainedModel):
        raise CheckpointError(f"{folder} holds a LoRA adapter, but this model has none; set 'tuning: lora'")
    _require(folder / "adapter_config.json")
    _compare_settings(base, folder / "adapter_config.json")
    if origin is not None:
        _compare_origin(origin_of(base), origin, folder)
    weights = read_safetensors(folder / ADAPTER_FILE)  # PEFT would also load a pickled .bin or query the hub
    own = get_peft_model_state_dict(base, save_embedding_layers=False)
    kept: dict[str, Tensor] = {}
    if is_published:
        rows_KD = take_vocabulary(base, weights, folder / ADAPTER_FILE)
        kept = {n: v if rows_KD is None else rows_KD for n, v in own.items() if "trainable_tokens_delta" in n}
    refuse_other_tensors(weights, {n: v for n, v in own.items() if n not in kept}, folder)
    set_peft_model_state_dict(base, {**kept, **weights})


def _require(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; {path.parent} is not the folder of a LoRA adapter")


def _compare_settings(base: PeftModel, path: Path) -> None:
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
