"""Build an experiment's Coconut model."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.tokenizer import Vocabulary
from coconut_ds.errors import ConfigError
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.fork_windows import require_fixed_window, require_learned_window
from coconut_ds.model.loading import install_weights, load_base
from coconut_ds.model.lora import (
    add_adapters,
    install_thought,
    is_published_lora,
    load_adapter,
    read_origin,
    read_published_window,
    save_adapter,
    save_thought,
)
from coconut_ds.runs.changes import BaseRecord
from coconut_ds.runs.weights import (
    WINDOW_NAME,
    find_adapter,
    is_published_file,
    load_foreign_weights,
    load_thought_weights,
)
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
    # An adapter names the checkpoint of its base, unless that was plain `model_id`.
    origin = read_origin(adapter) if adapter else None
    start = origin.weights if origin else None if adapter else source
    weights = load_foreign_weights(start, experiment.allow_pickle) if start else None
    base = load_base(experiment.model_id, vocabulary)
    window = _published_window(experiment, adapter, weights, str(start))
    if weights is not None:
        install_weights(base, weights, str(start))
    record = BaseRecord.of(base, vocabulary, with_weights=experiment.tuning == "lora")
    thought = build_thought(experiment.thought, base.config.hidden_size, ThoughtSettings.of(experiment))
    if not experiment.method.has_latents:
        thought.requires_grad_(False)
    if experiment.tuning == "full":
        if adapter is not None:
            raise ConfigError(f"load_model_path: {source} holds a LoRA adapter; set 'tuning: lora'")
        module = Coconut(base, thought, latent_memory)
    else:
        adapted = add_adapters(base, experiment, vocabulary.special_token_ids, record)
        module = Coconut(adapted, thought, latent_memory)
    module.base_record = record
    if adapter is not None:
        load_adapter(module, adapter, with_window=experiment.method.has_latents)
    elif source and (learned := load_thought_weights(source)):
        install_thought(module, learned, source)
    elif window is not None:
        install_thought(module, {"logits_W": window.flip(0)}, str(source))
    return module


def _published_window(
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
            require_learned_window(experiment, learned, adapter)
    elif window is not None:
        require_learned_window(experiment, window, source)
    elif experiment.thought == "fixed_window" and is_published_file(source):
        require_fixed_window(experiment, source)
    return window


def write_model(module: Coconut, vocabulary: Vocabulary, folder: Path) -> None:
    """Write a Hugging Face or PEFT folder for other programs, with tokenizer and thought."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(module.base, PreTrainedModel):
        module.base.save_pretrained(folder)
        save_thought(module.thought.state_dict(), folder)
    else:
        save_adapter(module, folder)
    vocabulary.tokenizer.save_pretrained(folder)
