"""Build an experiment's Coconut model and its parameter groups.  Only LoRA imports PEFT."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.tokenizer import Vocabulary
from coconut_ds.errors import ConfigError
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import install_thought, install_weights, load_base, save_thought
from coconut_ds.model.published import published_window
from coconut_ds.runs.changes import BaseRecord
from coconut_ds.runs.weights import find_adapter, load_foreign_weights, load_thought_weights
from coconut_ds.thoughts import ThoughtSettings, build_thought


def build_module(experiment: Experiment, vocabulary: Vocabulary, latent_memory: LatentMemory) -> Coconut:
    """Build the experiment's model in fp32 on the CPU: base weights, then adapters, then the thought.

    `load_model_path` may be a checkpoint of this program or the published code, a Hugging Face folder, or the
    adapter folder of a LoRA run; without it `model_id` gives the weights. Seeded by the experiment.
    Raises ConfigError and CheckpointError.
    """
    torch.manual_seed(experiment.seed)
    source = experiment.load_model_path
    adapter = find_adapter(source) if source else None
    start = None if adapter else source
    if experiment.tuning == "lora":
        from coconut_ds.model import lora

        # An adapter names the checkpoint of its base, unless that was plain `model_id`.
        origin = lora.read_origin(adapter) if adapter else None
        start = origin.weights if origin else start
    elif adapter is not None:
        raise ConfigError(f"load_model_path: {source} holds a LoRA adapter; set 'tuning: lora'")
    weights = load_foreign_weights(start, experiment.allow_pickle) if start else None
    base = load_base(experiment.model_id, vocabulary)
    window = published_window(experiment, adapter, weights, str(start)) if source else None
    if weights is not None:
        install_weights(base, weights, str(start))
    record = BaseRecord.of(base, vocabulary, with_weights=experiment.tuning == "lora")
    thought = build_thought(experiment.thought, base.config.hidden_size, ThoughtSettings.of(experiment))
    if not experiment.method.has_latents:
        thought.requires_grad_(False)
    if experiment.tuning == "lora":
        adapted = lora.add_adapters(base, experiment, vocabulary.special_token_ids, record)
        module = Coconut(adapted, thought, latent_memory)
    else:
        module = Coconut(base, thought, latent_memory)
    module.base_record = record
    if adapter is not None:
        lora.load_adapter(module, adapter, with_window=experiment.method.has_latents)
    elif source and (learned := load_thought_weights(source)):
        install_thought(module, learned, source)
    elif window is not None:
        install_thought(module, {"logits_W": window.flip(0)}, str(source))
    return module


def write_model(module: Coconut, vocabulary: Vocabulary, folder: Path) -> None:
    """Write a Hugging Face or PEFT folder for other programs, with tokenizer and thought."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(module.base, PreTrainedModel):
        module.base.save_pretrained(folder)
        save_thought(module.thought.state_dict(), folder)
    else:
        from coconut_ds.model import lora

        lora.save_adapter(module, folder)
    vocabulary.tokenizer.save_pretrained(folder)


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
