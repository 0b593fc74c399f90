"""LoRA adapters and trainable special-token rows on a frozen base; optimizer groups; merging.

    trained: adapters (lora_A, lora_B) + special-token rows (three vectors) + the thought's parameters

An adapter adds a low-rank product to a frozen linear layer:

    y = x W^T + (alpha / r) (x A^T) B^T       A: r x inputs, B: outputs x r, starts at zero

rsLoRA scales by alpha / sqrt(r) instead.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coconut_ds.config.experiment import Experiment
from coconut_ds.errors import ConfigError
from coconut_ds.model.coconut import Coconut
from coconut_ds.runs.changes import BaseRecord

if TYPE_CHECKING:  # importing PEFT is slow, and only LoRA runs need it
    from peft import PeftModel

# Layers that the published LoRA runs adapt on GPT-2, and their equivalents in the Llama and Qwen families.
GPT2_TARGETS = ("c_attn", "c_proj")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
ALL_LINEAR = "all-linear"
FINGERPRINT_SAMPLES = 1024  # elements of each tensor


@dataclass(frozen=True)
class Origin:
    """The frozen weights that an adapter was trained on and needs."""

    model_id: str
    weights: str | None  # the checkpoint loaded before the adapters were added, if any
    fingerprint: str
    base: BaseRecord | None = None  # None in older files, which have only the fingerprint

    @classmethod
    def of(cls, base: PreTrainedModel, experiment: Experiment, record: BaseRecord | None) -> "Origin":
        return cls(experiment.model_id, experiment.load_model_path, fingerprint(base), record)


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
) -> "PeftModel":
    """Freeze `base`, add adapters and make the special-token rows trainable.

    `base` must have its final weights and the special-token rows.  `record` of `base` is saved with the
    adapters.  Raises ConfigError if no layer has a name of `lora_target_modules`.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    from coconut_ds.model.lora.special_token_rows import SpecialTokenRows

    origin = Origin.of(base, experiment, record)
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
        trainable_token_indices=list(special_token_ids),
    )
    try:
        adapted = get_peft_model(base, config)
    except ValueError as error:
        raise ConfigError(f"lora_target_modules {list(targets)}: {error}") from error
    for module in adapted.modules():
        if type(module) is TrainableTokensLayer:
            SpecialTokenRows.take_over(module)
    assert_tied(adapted)
    adapted.origin = origin  # type: ignore[assignment]
    return adapted


def default_target_modules(base: PreTrainedModel) -> tuple[str, ...]:
    """Names of the layers to adapt if the experiment names none."""
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    for targets in (GPT2_TARGETS, LLAMA_TARGETS):
        if names.issuperset(targets):
            return targets
    return (ALL_LINEAR,)


def assert_tied(model: nn.Module) -> None:
    """Assert that embedding and head share one tensor if the model's configuration ties them."""
    outer: Any = model
    causal_lm = outer if isinstance(outer, PreTrainedModel) else outer.get_base_model()
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
        assert adapters[1] is not None and adapters[1].tied_adapter is adapters[0], (
            "special-token rows are not tied"
        )


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """Number of elements of each trainable parameter, by name."""
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(model: Coconut, experiment: Experiment) -> list[dict[str, Any]]:
    """Optimizer groups: `base` (weights or adapters, weight decay) and `thought` (`thought_lr`, no decay).

    As in the published code, weight decay covers every base parameter, including norms and biases.  A thought
    gets none: decay would pull window logits toward the mean and an MLP back to the identity.
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


def merge(model: Coconut) -> PreTrainedModel:
    """A plain Hugging Face model with adapters and special-token rows merged into its weights.

    Works on a copy; a fully tuned model is returned itself.  The thought is not included.
    """
    if isinstance(model.base, PreTrainedModel):
        return model.base
    # W' = W + (alpha / r) B A
    merged = copy.deepcopy(model.base).merge_and_unload(safe_merge=True)
    assert_tied(merged)
    return merged
