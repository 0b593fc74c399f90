"""Find a trained model: in a run folder, a checkpoint folder, an exported folder, or by an experiment YAML.

    runs/gsm-coconut                 its newest checkpoint, or those named
    runs/gsm-coconut/checkpoint_12   that one
    exported/                        what `export` wrote
    configs/published/gsm_coconut_eval.yaml      `load_model_path` at the stage of epoch `resume`

Knows: where settings and weights lie, and which stage they were trained at.  Does not know: ranks, data.
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema

from coconut_ds.config.deepspeed import DeepSpeedConfig, LatentMemory, validate_ds_config
from coconut_ds.config.experiment import (
    Experiment,
    load_experiment,
    load_named_experiment,
    parse_overrides,
    validate_experiment,
    without_permissions,
)
from coconut_ds.config.schemas.parsing import read_json
from coconut_ds.data.curriculum import ALL_STEPS, Stage, final_stage
from coconut_ds.data.tokenizer import Vocabulary
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.files import EXPORT_FILE, run_folder_of
from coconut_ds.model.build import build_module
from coconut_ds.model.coconut import Coconut
from coconut_ds.runs.checkpoint import CheckpointFolders, Manifest, misleading_best, resolve_pointer, stage_of
from coconut_ds.runs.checkpoint.manifest import MANIFEST
from coconut_ds.runs.run_folder import run_folder

# The techniques that save memory in training; a model that only reads needs none but this one.
READING = LatentMemory(
    supervised_logits_only=True,
    segmented_cache=False,
    deferred_weight_gradients=False,
    activation_checkpointing="none",
    fused_activations=False,
)
# What a run folder's ds_config.json took from the experiment of that day, and of its number of ranks.
FROM_EXPERIMENT = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip

# Blocks of a ds_config.json that name files which DeepSpeed writes; a received folder does not choose them.
WRITES_FILES = ("flops_profiler", "tensorboard", "csv_monitor")
MAX_LATENTS = 1_000  # of a received folder; more must be asked for
COUNT = {"type": "integer", "minimum": 0, "maximum": ALL_STEPS}
EXPORT_SHAPE = jsonschema.Draft202012Validator(
    {
        "required": ["experiment", "stage"],
        "properties": {
            "experiment": {"type": "object"},
            "base_model": {"type": "string", "minLength": 1},
            "stage": {
                "type": "object",
                "properties": {"hidden_steps": COUNT, "num_latents": COUNT, "hidden_tokens": COUNT},
                "required": ["hidden_steps", "num_latents"],
                "additionalProperties": False,
            },
        },
    }
)


@dataclass(frozen=True)
class Trained:
    """A model and how to ask it; `experiment.load_model_path` names its weights."""

    experiment: Experiment
    stage: Stage
    name: str
    folder: Path  # where results about it belong
    trained_at: Stage | None = None  # by its manifest; None where there is none
    note: str | None = None  # what the reader should know of the checkpoint that a word named

    @property
    def notes(self) -> list[str]:
        """Lines to print beside every result."""
        lines = [] if self.note is None else [self.note]
        if self.trained_at not in (None, self.stage):
            lines.append(f"at another stage ({self.stage}) than it was trained at ({self.trained_at})")
        return lines

    def build(self, vocabulary: Vocabulary, latent_memory: LatentMemory = READING) -> Coconut:
        """The model in fp32 on the CPU, in evaluation mode.  Raises ConfigError and CheckpointError."""
        module = build_module(self.experiment, vocabulary, latent_memory).eval()
        room = module.causal_lm.config.max_position_embeddings
        if self.stage.num_latents + 2 >= room:
            raise ConfigError(
                f"{self.name}: {self.stage.num_latents} latents do not fit the model's {room} positions; "
                "give fewer with --latents"
            )
        return module

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
    allow: Collection[str] = (),
) -> list[Trained]:
    """The models that a command line names; several only by several `checkpoints` of a run folder.

    `checkpoints`: names, 'latest' (the default), 'best', 'best_stage_2' or 'all'.  `allow`: with 'stage' the
    settings may put a checkpoint at another stage than it was trained at.
    Raises ConfigError and CheckpointError.
    """
    path = Path(target)
    if not checkpoints and (path.parent / "experiment.yaml").is_file() and resolve_pointer(path) != path:
        path, checkpoints = path.parent, (path.name,)
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
    if "stage" not in allow:
        for trained in found:
            _refuse_other_stage(trained)
    found = [trained.with_latents(num_latents) for trained in found]
    for trained in found:
        if num_latents is None and trained.stage.num_latents > MAX_LATENTS:
            raise ConfigError(
                f"{trained.name}: its stage has {trained.stage.num_latents} latents, more than "
                f"{MAX_LATENTS}; if that is meant, say --latents {trained.stage.num_latents}"
            )
    return found


def find_one(
    target: str,
    checkpoint: str | None = None,
    overrides: Sequence[str] = (),
    num_latents: int | None = None,
    allow: Collection[str] = (),
) -> Trained:
    """The one model that a command line names; its notes go to standard error."""
    if checkpoint == "all":
        raise ConfigError("--checkpoint all: this command takes one model")
    (trained,) = find_trained(target, (checkpoint,) if checkpoint else (), overrides, num_latents, allow)
    for line in trained.notes:
        print(f"{trained.name}: {line}", file=sys.stderr)
    return trained


def _refuse_other_stage(trained: Trained) -> None:
    if trained.trained_at in (None, trained.stage):
        return
    raise ConfigError(
        f"{trained.name} was trained at another stage ({trained.trained_at}) than the settings ask for "
        f"({trained.stage}). Evaluate its run folder, which knows the stage; correct the curriculum or "
        "'resume'; or, if that is meant: --allow stage"
    )


def ds_config_of(folder: Path) -> DeepSpeedConfig:
    """A run folder's own way of splitting memory, for any number of ranks.  Raises ConfigError."""
    path = folder / "ds_config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is absent; name a file with --deepspeed_config")
    values = {key: value for key, value in read_json(path).items() if key not in WRITES_FILES}
    zero = values.get("zero_optimization")
    for block in ("offload_optimizer", "offload_param"):
        if isinstance(zero, dict) and isinstance(zero.get(block), dict) and "nvme_path" in zero[block]:
            del zero[block]
    values |= dict.fromkeys(FROM_EXPERIMENT, "auto")
    optimizer = values.setdefault("optimizer", {})
    if isinstance(optimizer, dict) and isinstance(optimizer.setdefault("params", {}), dict):
        optimizer["params"] |= {"lr": "auto", "weight_decay": "auto"}
    return validate_ds_config(values, str(path))


def _in_run_folder(folder: Path, checkpoints: Sequence[str], overrides: Sequence[str]) -> list[Trained]:
    settings = folder / "experiment.yaml"
    if not settings.is_file():
        raise ConfigError(
            f"{folder} is not a run folder (it has no experiment.yaml), nor one that `export` wrote"
        )
    experiment = without_permissions(load_experiment(settings, overrides), overrides)
    experiment = replace(experiment, only_eval=True)
    folders = CheckpointFolders(folder)
    pointed = folders.pointed_at("best") if "best" in checkpoints else None
    misleading = folders.misleading_best() if pointed else None
    found = []
    for name in _names(folders, checkpoints):
        manifest = folders.check(name)
        stage = stage_of(manifest, experiment)
        assert stage is not None
        # A fully tuned checkpoint has configuration and tokenizer too.
        model_id = str(folder / name / "model") if experiment.tuning == "full" else experiment.model_id
        asked = replace(experiment, model_id=model_id, load_model_path=str(folder / name))
        note = misleading if name == pointed else None
        found.append(Trained(asked, stage, name, folder, stage_of(manifest), note))
    return found


def _names(folders: CheckpointFolders, wanted: Sequence[str]) -> list[str]:
    names: list[str] = []
    for word in wanted:
        if word == "all":
            names += folders.names()
        else:
            name = folders.named(word)
            if name is None:
                raise CheckpointError(f"{folders.run_folder}: there is no {word} checkpoint yet")
            names.append(name)
    if not names:
        raise CheckpointError(f"{folders.run_folder}: there is no checkpoint yet")
    return list(dict.fromkeys(names))


def _from_yaml(path: Path, overrides: Sequence[str]) -> Trained:
    experiment = replace(load_named_experiment(path, overrides), only_eval=True)
    name = experiment.load_model_path or experiment.model_id
    # The YAML of a received folder may name any place as its `save_path`.
    folder = run_folder_of(path) or run_folder(experiment)
    trained_at = _trained_stage(Path(name))
    note = misleading_best(Path(name)) if trained_at else None
    return Trained(experiment, final_stage(experiment), name, folder, trained_at, note)


def _trained_stage(weights: Path) -> Stage | None:
    """The stage that a checkpoint, its model/ folder or an exported folder was trained at, if it says so."""
    checkpoint = resolve_pointer(weights)
    holder = checkpoint.resolve().parent if checkpoint.name == "model" else checkpoint
    if (holder / MANIFEST).is_file():
        return stage_of(Manifest.read(holder))
    return Stage(**read_export(checkpoint)["stage"]) if (checkpoint / EXPORT_FILE).is_file() else None


def _exported(folder: Path, overrides: Sequence[str]) -> Trained:
    values = read_export(folder)
    settings = {**values["experiment"], "load_model_path": str(folder), "only_eval": True}
    if not (folder / "adapter_config.json").is_file():
        settings |= {"model_id": str(folder), "tuning": "full"}
    experiment = validate_experiment(settings | parse_overrides(overrides), str(folder / EXPORT_FILE))
    experiment = without_permissions(experiment, overrides)
    stage = Stage(**values["stage"])
    return Trained(experiment, stage, str(folder), folder, trained_at=stage)


def read_export(folder: Path) -> dict[str, Any]:
    """The settings beside exported weights.  Raises ConfigError."""
    path = folder / EXPORT_FILE
    values = read_json(path)
    problem = jsonschema.exceptions.best_match(EXPORT_SHAPE.iter_errors(values))
    if problem is not None:
        raise ConfigError(
            f"{path}: {problem.json_path.removeprefix('$.')}: {problem.message[:200]}; "
            "is this a folder that `export` wrote?"
        )
    return values
