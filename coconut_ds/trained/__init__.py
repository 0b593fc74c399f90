"""Find a trained model: in a run folder, a checkpoint folder, an exported folder, or by an experiment YAML.

    runs/gsm_coconut                 its newest checkpoint, or those named
    runs/gsm_coconut/checkpoint_12   that one
    exported/                        what `export` wrote
    configs/full/gsm_coconut_eval.yaml      `load_model_path` at the stage of epoch `resume`

Knows: where settings and weights lie, and which stage they were trained at.  Does not know: ranks, data.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coconut_ds.build import build_module
from coconut_ds.checkpoint import CheckpointFolders, Manifest
from coconut_ds.config import Experiment, load_experiment, parse_overrides, validate_experiment
from coconut_ds.curriculum import Stage, stage_at
from coconut_ds.ds_config import DeepSpeedConfig, LatentMemory, validate_ds_config
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.model.coconut import Coconut
from coconut_ds.runs import run_folder
from coconut_ds.tokens import Vocabulary

EXPORT_FILE = "coconut.json"  # settings beside exported weights
# The techniques that save memory in training; a model that only reads needs none but this one.
READING = LatentMemory(
    supervised_logits_only=True,
    segmented_cache=False,
    deferred_weight_gradients=False,
    recompute="none",
    fused_activations=False,
)
# What a run folder's ds_config.json took from the experiment of that day, and of its number of ranks.
FROM_EXPERIMENT = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A model and how to ask it; `experiment.load_model_path` names its weights."""

    experiment: Experiment
    stage: Stage
    name: str
    folder: Path  # where results about it belong

    def build(self, vocabulary: Vocabulary, latent_memory: LatentMemory = READING) -> Coconut:
        """The model in fp32 on the CPU, in evaluation mode.  Raises ConfigError and CheckpointError."""
        return build_module(self.experiment, vocabulary, latent_memory).eval()

    def with_latents(self, num_latents: int | None) -> "Trained":
        """The same with another number of latent slots.  Raises ConfigError where there can be none."""
        if num_latents is None:
            return self
        if num_latents < 0:
            raise ConfigError(f"--latents {num_latents}: give 0 or more")
        if num_latents and not self.experiment.method.has_latents:
            raise ConfigError(f"--latents {num_latents}: the method {self.experiment.method} has no latents")
        experiment = replace(self.experiment, pad_latent_to_max=True)
        return replace(self, experiment=experiment, stage=replace(self.stage, num_latents=num_latents))


def find_trained(
    target: str,
    checkpoints: Sequence[str] = (),
    overrides: Sequence[str] = (),
    num_latents: int | None = None,
) -> list[Trained]:
    """The models that a command line names; several only by several `checkpoints` of a run folder.

    `checkpoints`: names, 'latest' (the default), 'best' or 'all'.  Raises ConfigError and CheckpointError.
    """
    path = Path(target)
    if not path.exists():
        raise ConfigError(f"{target}: there is no such run folder or experiment YAML")
    if path.is_dir() and (path / "manifest.json").is_file():
        if checkpoints:
            raise ConfigError(
                f"{target} is a checkpoint already; leave --checkpoint out, or name its run folder"
            )
        path, checkpoints = path.parent, (path.name,)
    if path.is_dir() and not (path / EXPORT_FILE).is_file():
        found = _in_run_folder(path, checkpoints or ("latest",), overrides)
    elif checkpoints:
        raise ConfigError(f"--checkpoint {checkpoints[0]}: {target} is not a run folder")
    else:
        found = [_exported(path, overrides) if path.is_dir() else _from_yaml(path, overrides)]
    return [trained.with_latents(num_latents) for trained in found]


def find_one(
    target: str, checkpoint: str | None = None, overrides: Sequence[str] = (), num_latents: int | None = None
) -> Trained:
    """The one model that a command line names."""
    if checkpoint == "all":
        raise ConfigError("--checkpoint all: this command takes one model")
    return find_trained(target, (checkpoint,) if checkpoint else (), overrides, num_latents)[0]


def ds_config_of(folder: Path) -> DeepSpeedConfig:
    """A run folder's own way of splitting memory, for any number of ranks.  Raises ConfigError."""
    path = folder / "ds_config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is absent; name a file with --deepspeed_config")
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= dict.fromkeys(FROM_EXPERIMENT, "auto")
    params = values.setdefault("optimizer", {}).setdefault("params", {})
    params |= {"lr": "auto", "weight_decay": "auto"}
    return validate_ds_config(values, str(path))


def stage_of(manifest: Manifest, experiment: Experiment) -> Stage:
    """The stage that a checkpoint's newest steps were trained at."""
    epoch, steps = manifest.state.epoch, manifest.state.step_in_epoch
    return stage_at(epoch if steps else max(epoch - 1, 0), experiment)


def _in_run_folder(folder: Path, checkpoints: Sequence[str], overrides: Sequence[str]) -> list[Trained]:
    settings = folder / "experiment.yaml"
    if not settings.is_file():
        raise ConfigError(
            f"{folder} is not a run folder (it has no experiment.yaml), nor one that `export` wrote"
        )
    experiment = replace(load_experiment(settings, overrides), only_eval=True)
    folders = CheckpointFolders(folder)
    found = []
    for name in _names(folders, checkpoints):
        stage = stage_of(folders.check(name), experiment)
        # A fully tuned checkpoint has configuration and tokenizer too.
        model_id = str(folder / name / "model") if experiment.tuning == "full" else experiment.model_id
        asked = replace(experiment, model_id=model_id, load_model_path=str(folder / name))
        found.append(Trained(asked, stage, name, folder))
    return found


def _names(folders: CheckpointFolders, wanted: Sequence[str]) -> list[str]:
    names: list[str] = []
    for word in wanted:
        match word:
            case "all":
                names += folders.names()
            case "latest" | "best":
                name = folders.latest() if word == "latest" else folders.best()
                if name is None:
                    raise CheckpointError(f"{folders.run_folder}: there is no {word} checkpoint yet")
                names.append(name)
            case _:
                names.append(word)
    if not names:
        raise CheckpointError(f"{folders.run_folder}: there is no checkpoint yet")
    return list(dict.fromkeys(names))


def _from_yaml(path: Path, overrides: Sequence[str]) -> Trained:
    experiment = replace(load_experiment(path, overrides), only_eval=True)
    name = experiment.load_model_path or experiment.model_id
    return Trained(experiment, stage_at(experiment.resume, experiment), name, run_folder(experiment))


def _exported(folder: Path, overrides: Sequence[str]) -> Trained:
    values = read_export(folder)
    settings = {**values["experiment"], "load_model_path": str(folder), "only_eval": True}
    if not (folder / "adapter_config.json").is_file():
        settings |= {"model_id": str(folder), "tuning": "full"}
    experiment = validate_experiment(settings | parse_overrides(overrides), str(folder / EXPORT_FILE))
    return Trained(experiment, Stage(**values["stage"]), str(folder), folder)


def read_export(folder: Path) -> dict[str, Any]:
    """The settings beside exported weights.  Raises ConfigError."""
    path = folder / EXPORT_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(values["experiment"], dict) and isinstance(values["stage"], dict)
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): is this a folder that `export` wrote?"
        ) from error
    return values
