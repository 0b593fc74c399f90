"""LoRA through PEFT: adapters, the three marker rows that train with them, saving, loading, merging.

    frozen base + adapters (lora_A, lora_B) + marker rows (three vectors) + the thought's parameters

Knows: PEFT, Hugging Face models, thoughts.  Does not know: DeepSpeed, stages, checkpoint folders.

Shapes: B rows, T columns, N positions, K marker rows, D hidden size, V vocabulary.
"""

import copy
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coconut_ds.config import Experiment
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.model.coconut import Coconut
from coconut_ds.thoughts.learnable_window import LearnableWindow

THOUGHT_FILE = "thought.safetensors"
# The layers that the published LoRA runs adapt on GPT-2, and the same places in the Llama and Qwen families.
GPT2_TARGETS = ("c_attn", "c_proj")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
ALL_LINEAR = "all-linear"


def add_adapters(base: PreTrainedModel, experiment: Experiment, marker_ids: Sequence[int]) -> PeftModel:
    """Freeze `base`, add adapters and make the marker rows trainable; `base` has its final weights already.

    The embedding must have the marker rows.  Raises ConfigError where no layer has a name of
    `lora_target_modules`.
    """
    targets = experiment.lora_target_modules or default_target_modules(base)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=experiment.lora_r,
        lora_alpha=experiment.lora_alpha,
        lora_dropout=experiment.lora_dropout,
        use_rslora=experiment.lora_use_rslora,
        use_dora=experiment.lora_use_dora,
        target_modules=ALL_LINEAR if tuple(targets) == (ALL_LINEAR,) else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        trainable_token_indices=list(marker_ids),
    )
    try:
        adapted = get_peft_model(base, config)
    except ValueError as error:
        raise ConfigError(f"lora_target_modules {list(targets)}: {error}") from error
    for module in adapted.modules():
        if type(module) is TrainableTokensLayer:
            MarkerRows.take_over(module)
    assert_tied(adapted)
    return adapted


def default_target_modules(base: PreTrainedModel) -> tuple[str, ...]:
    """Names of the layers that get adapters where the experiment names none."""
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    for targets in (GPT2_TARGETS, LLAMA_TARGETS):
        if names.issuperset(targets):
            return targets
    return (ALL_LINEAR,)


class MarkerRows(TrainableTokensLayer):
    """PEFT's trainable token rows without a copy, or a gradient, of the whole embedding.

    PEFT copies the V x D matrix with the rows put in on every call, and autograd then fills a V x D gradient.
    Here the frozen layer runs as it is and only the rows' share is exchanged.  The frozen layer's own forward
    is also where ZeRO-3 gathers its weight.  Saved files and merging stay PEFT's.
    """

    base_layer: nn.Module
    marker_ids_K: Tensor

    @classmethod
    def take_over(cls, layer: TrainableTokensLayer) -> None:
        """Turn PEFT's layer into this one, in place."""
        layer.__class__ = cls
        (ids,) = layer.token_indices.values()
        layer.register_buffer("marker_ids_K", torch.tensor(ids), persistent=False)

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
        hits_BTK = ids_BT[..., None] == self.marker_ids_K
        marker_BTD = nn.functional.embedding(hits_BTK.int().argmax(-1), rows_KD)
        frozen_BTD = self.base_layer(ids_BT)
        return torch.where(hits_BTK.any(-1, keepdim=True), marker_BTD.to(frozen_BTD.dtype), frozen_BTD)

    def _score(self, hidden_ND: Tensor, change_KD: Tensor) -> Tensor:
        """Tied head: the logits of the frozen matrix plus what the rows' change adds to their columns."""
        logits_NV = self.base_layer(hidden_ND)
        change_NK = nn.functional.linear(hidden_ND, change_KD.to(hidden_ND.dtype))
        # In place: a linear layer's backward does not need its output.
        return logits_NV.index_add_(-1, self.marker_ids_K, change_NK.to(logits_NV.dtype))


def assert_tied(model: nn.Module) -> None:
    """Input embedding and head are one tensor where the model's configuration says so."""
    causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not getattr(causal_lm.config, "tie_word_embeddings", False):
        return
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    adapters = [getattr(module, "token_adapter", None) for module in (embedding, head)]
    weights = [
        (a.base_layer if a is not None else m).weight
        for a, m in zip(adapters, (embedding, head), strict=True)
    ]
    assert weights[0] is weights[1], "the embedding and the head were tied and are two tensors now"
    if adapters[0] is not None:
        assert adapters[1] is not None and adapters[1].tied_adapter is adapters[0], "marker rows are not tied"


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """Number of elements of each trainable parameter, by name."""
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(model: Coconut, experiment: Experiment) -> list[dict[str, Any]]:
    """Optimizer groups: `base` (weights or adapters, weight decay) and `thought` (`thought_lr`, no decay).

    As in the published code, weight decay covers every base parameter, norms and biases included.  A thought
    gets none: decay would pull window logits towards the mean and an MLP back to the identity.
    """
    thought_lr = experiment.lr if experiment.thought_lr is None else experiment.thought_lr
    settings = [
        ("base", model.base, experiment.lr, experiment.weight_decay),
        ("thought", model.thought, thought_lr, 0.0),
    ]
    groups = [
        {
            "name": name,
            "params": [p for p in part.parameters() if p.requires_grad],
            "lr": lr,
            "weight_decay": decay,
        }
        for name, part, lr, decay in settings
    ]
    return [group for group in groups if group["params"]]


def save_adapter(model: Coconut, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter as PEFT does, and the thought beside it.

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


def save_thought(state: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write a thought's state dict into a model's folder."""
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in state.items()},
        Path(folder) / THOUGHT_FILE,
    )


def load_adapter(model: Coconut, folder: str | Path) -> None:
    """Read what `save_adapter` wrote into a model of the same shape.  Raises CheckpointError."""
    folder = Path(folder)
    _install_adapter(model.base, folder)
    _need(folder / THOUGHT_FILE)
    install_thought(model, load_file(folder / THOUGHT_FILE), folder / THOUGHT_FILE)


def load_published_lora(model: Coconut, folder: str | Path) -> None:
    """Read a folder of the learnable-window LoRA code: `peft/` and, where the window was saved, `latent.pt`.

    Its marker rows never trained and are not in it: they stay as `base` has them.  Its window weights run
    from the oldest state to the newest, ours the other way.  Raises CheckpointError.
    """
    folder = Path(folder)
    _install_adapter(model.base, folder / "peft", has_marker_rows=False)
    latent = folder / "latent.pt"
    if not latent.exists():
        return
    try:
        state = torch.load(latent, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{latent} is not a plain dictionary of tensors and was not unpickled"
        ) from error
    if set(state) != {"latent_weights"} or not isinstance(model.thought, LearnableWindow):
        raise CheckpointError(
            f"{latent} holds {sorted(state)}; 'latent_weights' fits the thought 'learnable_window', "
            f"and this model's is {type(model.thought).__name__}"
        )
    install_thought(model, {"logits_W": state["latent_weights"].flip(0)}, latent)


def merge(model: Coconut) -> PreTrainedModel:
    """A plain Hugging Face model with the adapters and marker rows written into its weights.

    The given model stays as it is; a fully tuned one is given back itself.  The thought is not part of it.
    """
    if not isinstance(model.base, PeftModel):
        return model.base
    merged = copy.deepcopy(model.base).merge_and_unload(safe_merge=True)
    assert_tied(merged)
    return merged


def _install_adapter(base: nn.Module, folder: Path, has_marker_rows: bool = True) -> None:
    if not isinstance(base, PeftModel):
        raise CheckpointError(f"{folder} holds a LoRA adapter, and this model has none: set 'tuning: lora'")
    _need(folder / "adapter_config.json")
    _compare_settings(base, folder / "adapter_config.json")
    weights = load_peft_weights(str(folder), device="cpu")
    own = get_peft_model_state_dict(base, save_embedding_layers=False)
    kept = {} if has_marker_rows else {n: v for n, v in own.items() if "trainable_tokens_delta" in n}
    _compare_tensors(weights, {n: v for n, v in own.items() if n not in kept}, folder)
    set_peft_model_state_dict(base, {**kept, **weights})
    assert_tied(base)


def install_thought(model: Coconut, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Put a saved thought into the model's own.  Raises CheckpointError where names or shapes differ."""
    _compare_tensors(state, model.thought.state_dict(), source)
    model.thought.load_state_dict(dict(state))


def _need(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: is {path.parent} the folder of a LoRA adapter?")


def _compare_settings(base: PeftModel, path: Path) -> None:
    """The settings that change what the same adapter tensors compute; their shapes cannot tell."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    own = base.peft_config["default"]
    differing = [
        f"{key} is {saved[key]} there and {getattr(own, key)} here"
        for key in ("r", "lora_alpha", "use_rslora", "use_dora")
        if key in saved and saved[key] != getattr(own, key)
    ]
    if differing:
        raise CheckpointError(f"{path} was made with other LoRA settings: {'; '.join(differing)}")


def _compare_tensors(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path) -> None:
    faults = [f"missing {name}" for name in sorted(set(expected) - set(given))]
    faults += [f"unexpected {name}" for name in sorted(set(given) - set(expected))]
    faults += [
        f"{name} is {tuple(given[name].shape)} there and {tuple(value.shape)} here"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    if faults:
        more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(f"{source} does not fit this model:\n  " + "\n  ".join(faults[:8]) + more)
