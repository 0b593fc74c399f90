"""Find a trained model by its run folder, checkpoint folder, exported folder or experiment YAML.

runs/gsm-coconut                 its newest checkpoint, or those of --checkpoint
runs/gsm-coconut/checkpoint_12   this checkpoint
exported/                        a folder written by `export`
configs/published/gsm_coconut_eval.yaml      `load_model_path` at the stage of epoch `resume`
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from coconut_ds.config.deepspeed import DeepSpeedConfig, LatentMemory, validate_ds_config
from coconut_ds.config.experiment import (
    Experiment,
    experiment_to_yaml,
    load_named_experiment,
    load_run_experiment,
    parse_overrides,
    validate_experiment,
    without_permissions,
)
from coconut_ds.config.schema import affects, read_json, settings_with, shown
from coconut_ds.data.curriculum import ALL_STEPS, Stage, final_stage
from coconut_ds.data.problems import Card, card_for
from coconut_ds.data.tokenizer import Vocabulary
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.evaluation.data_files import DataFiles
from coconut_ds.evaluation.evaluate import grading_of, max_new_tokens
from coconut_ds.files import EXPORT_FILE, counted, run_folder_of
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import build_module
from coconut_ds.runs.checkpoint_folders import (
    MANIFEST,
    CheckpointFolders,
    Manifest,
    misleading_best,
    resolve_pointer,
    stage_of,
)
from coconut_ds.runs.run_folder import run_folder

# Without gradients only this technique saves memory.
READING = LatentMemory(
    supervised_logits_only=True,
    segmented_cache=False,
    deferred_weight_gradients=False,
    activation_checkpointing="none",
    fused_activations=False,
)
MERGED: Mapping[str, Any] = {
    "tuning": "full",
    "quantization": "none",
}  # settings of weights that include their adapters
# Keys of a run folder's ds_config.json that came from the experiment and its number of ranks.
FROM_EXPERIMENT = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip

# Blocks of a ds_config.json with paths that DeepSpeed writes to; a received folder must not choose them.
WRITES_FILES = ("flops_profiler", "tensorboard", "csv_monitor")
MAX_LATENTS = 1_000  # of a received folder; more need --latents
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
    """A trained model and its stage; `experiment.load_model_path` names its weights."""

    experiment: Experiment
    stage: Stage
    name: str
    folder: Path  # for results
    trained_at: Stage | None = None  # from its manifest, if there is one
    note: str | None = None  # a caveat about the selected checkpoint
    files: DataFiles = DataFiles()  # of its own settings
    own: Experiment | None = None  # its own settings, without the overrides of a command

    @property
    def notes(self) -> list[str]:
        """Lines to print beside every result."""
        lines = [] if self.note is None else [self.note]
        if self.trained_at not in (None, self.stage):
            lines.append(f"at another stage ({self.stage}) than it was trained at ({self.trained_at})")
        return lines

    def differences(self, card: Card) -> tuple[str, ...]:
        """How a measurement differs from the run's own: 'max_new_tokens 1 instead of 64', '0 latents ...'.

        `card`: of the measured file, which has the values of settings that are None.  The files themselves
        are not compared: results record them.
        """
        resolved = {"max_new_tokens": max_new_tokens, "grading": grading_of}
        texts = []
        for key, own, used in changed_settings(self.own, self.experiment) if self.own else ():
            if key in resolved and self.own is not None:
                own, used = resolved[key](self.own, card), resolved[key](self.experiment, card)
            if own != used:
                texts.append(f"{key} {_text(used)} instead of {_text(own)}")
        if self.trained_at is not None and self.stage != self.trained_at:
            latents = self.trained_at.num_latents
            texts.append(
                f"{counted(self.stage.num_latents, 'latent')} instead of {latents}"
                if replace(self.stage, num_latents=latents) == self.trained_at
                else f"stage '{self.stage}' instead of '{self.trained_at}'"
            )
        return tuple(texts)

    def build(self, vocabulary: Vocabulary, latent_memory: LatentMemory = READING) -> Coconut:
        """The model in fp32 on the CPU, in evaluation mode.  Raises ConfigError and CheckpointError."""
        module = build_module(self.experiment, vocabulary, latent_memory).eval()
        self.refuse_more_latents_than(module.num_positions)
        return module

    def refuse_more_latents_than(self, num_positions: int | None) -> None:
        """Raise ConfigError if the latents do not fit the model's positions; None: it has no limit."""
        if num_positions is not None and self.stage.num_latents + 2 >= num_positions:
            raise ConfigError(
                f"{self.name}: {self.stage.num_latents} latents do not fit the model's "
                f"{num_positions} positions; set fewer: num_latents of its stage, or --latents of a command"
            )

    def with_latents(self, num_latents: int | None, name: str = "num_latents") -> "Trained":
        """A copy with another number of latent slots; `name`: what messages call that number.

        Raises ConfigError if the method has no latents.
        """
        if num_latents is None:
            return self
        if num_latents < 0:
            raise ConfigError(f"{name} {num_latents}: must be 0 or more")
        if num_latents and not self.experiment.method.has_latents:
            raise ConfigError(f"{name} {num_latents}: the method {self.experiment.method} has no latents")
        experiment = replace(self.experiment, pad_latent_to_max=True)
        return replace(self, experiment=experiment, stage=replace(self.stage, num_latents=num_latents))


def find_trained(
    target: str,
    checkpoints: Sequence[str] = (),
    overrides: Sequence[str] = (),
    num_latents: int | None = None,
    allow: Collection[str] = (),
) -> list[Trained]:
    """The models that a command line selects, one for each of `checkpoints` of a run folder.

    `checkpoints`: names, 'latest' (default), 'best', 'best_stage_2' or 'all'.  `allow`: with 'stage', the
    settings may select another stage than the checkpoint was trained at; with a setting, `overrides` may
    change that setting although the weights were trained with another value.
    Raises ConfigError and CheckpointError.
    """
    path = Path(target)
    if not checkpoints and (path.parent / "experiment.yaml").is_file() and resolve_pointer(path) != path:
        path, checkpoints = path.parent, (path.name,)
    if not path.exists():
        raise ConfigError(f"{target}: no such run folder or experiment YAML")
    if path.is_dir() and (path / "manifest.json").is_file():
        if checkpoints:
            raise ConfigError(
                f"{target} is already a checkpoint; leave out --checkpoint, or use its run folder"
            )
        path, checkpoints = path.parent, (path.name,)
    if path.is_dir() and not (path / EXPORT_FILE).is_file():
        models = _in_run_folder(path, checkpoints or ("latest",), overrides)
    elif checkpoints:
        raise ConfigError(f"--checkpoint {checkpoints[0]}: {target} is not a run folder")
    else:
        models = [
            described_model(read_export(path), path, overrides)
            if path.is_dir()
            else _from_yaml(path, overrides)
        ]
    for trained in models:
        # --set on a YAML is an edit of it.
        refused = _refused_settings(trained, allow) if path.is_dir() else []
        refused += [] if "stage" in allow else _refused_stage(trained)
        if refused:
            raise ConfigError("\n".join(refused))
    models = [trained.with_latents(num_latents, "--latents") for trained in models]
    for trained in models:
        if num_latents is None and trained.stage.num_latents > MAX_LATENTS:
            raise ConfigError(
                f"{trained.name}: its stage has {trained.stage.num_latents} latents, more than "
                f"{MAX_LATENTS}; if this is intended, use a command with "
                f"--latents {trained.stage.num_latents}"
            )
    return models


def find_one(
    target: str,
    checkpoint: str | None = None,
    overrides: Sequence[str] = (),
    num_latents: int | None = None,
    allow: Collection[str] = (),
) -> Trained:
    """The one model that a command line selects; its notes go to standard error."""
    if checkpoint == "all":
        raise ConfigError("--checkpoint all: this command takes one model")
    (trained,) = find_trained(target, (checkpoint,) if checkpoint else (), overrides, num_latents, allow)
    for line in trained.notes:
        print(f"{trained.name}: {line}", file=sys.stderr)
    return trained


def changed_settings(own: Experiment, used: Experiment) -> list[tuple[str, Any, Any]]:
    """(key, own value, used value) of the settings that change what a measurement means, without data files.

    `eval_max_items` and `fields` are left out: results record which examples they are of.
    """
    values, left_out = asdict(used), {*settings_with("path_to", "data"), "eval_max_items", "fields"}
    return [
        (key, value, values[key])
        for key, value in asdict(own).items()
        if value != values[key] and affects(key) != "running" and key not in left_out
    ]


def _text(value: object) -> str:
    return shown(list(value) if isinstance(value, tuple) else value).strip("'")


def _refused_settings(trained: Trained, allow: Collection[str]) -> list[str]:
    """An error for each setting that the weights were trained with and that an override changes."""
    paths = settings_with("path_to", "weights")
    changed = changed_settings(trained.own, trained.experiment) if trained.own else []
    return [
        f"--set {key}={_text(used)}: {trained.name} was trained with {key} {_text(own)}; leave it out, or "
        f"add --allow {key} if this is intended (results will say so)"
        for key, own, used in changed
        if affects(key) != "accuracy" and key not in (*paths, *allow)
    ]


def _refused_stage(trained: Trained) -> list[str]:
    if trained.trained_at in (None, trained.stage):
        return []
    return [
        f"{trained.name} was trained at another stage ({trained.trained_at}) than the settings select "
        f"({trained.stage}). Evaluate its run folder instead, fix the curriculum or 'resume', or use "
        "--allow stage if this is intended"
    ]


def ds_config_of(folder: Path) -> DeepSpeedConfig:
    """The DeepSpeed config of a run folder, for any number of ranks.  Raises ConfigError."""
    path = folder / "ds_config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; use --deepspeed_config FILE")
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
            f"{folder} is neither a run folder (it has no experiment.yaml) nor an exported folder"
        )
    own = load_run_experiment(folder)
    experiment = without_permissions(load_run_experiment(folder, overrides), overrides)
    experiment = replace(experiment, only_eval=True)
    folders = CheckpointFolders(folder)
    best = folders.pointed_at("best") if "best" in checkpoints else None
    misleading = folders.misleading_best() if best else None
    models = []
    for name in _names(folders, checkpoints):
        manifest = folders.check(name)
        stage = stage_of(manifest, experiment)
        assert stage is not None
        # A fully tuned checkpoint includes configuration and tokenizer.
        model_id = str(folder / name / "model") if experiment.tuning == "full" else experiment.model_id
        at_checkpoint = replace(experiment, model_id=model_id, load_model_path=str(folder / name))
        note = misleading if name == best else None
        files = DataFiles.of(own, manifest.settings)
        same_weights = replace(
            own, model_id=model_id if experiment.tuning == "full" else own.model_id,
            load_model_path=at_checkpoint.load_model_path,
        )  # fmt: skip
        models.append(
            Trained(at_checkpoint, stage, name, folder, stage_of(manifest), note, files, same_weights)
        )
    return models


def _names(folders: CheckpointFolders, words: Sequence[str]) -> list[str]:
    names: list[str] = []
    for word in words:
        if word == "all":
            names += folders.names()
        else:
            name = folders.named(word)
            if name is None:
                which = "" if word == "latest" else f"{word} "
                raise CheckpointError(f"{folders.run_folder}: no {which}checkpoint yet")
            names.append(name)
    if not names:
        raise CheckpointError(f"{folders.run_folder}: no checkpoint yet")
    return list(dict.fromkeys(names))


def _from_yaml(path: Path, overrides: Sequence[str]) -> Trained:
    experiment = replace(load_named_experiment(path, overrides), only_eval=True)
    name = experiment.load_model_path or experiment.model_id
    # The YAML of a received folder may have any `save_path`.
    folder = run_folder_of(path) or run_folder(experiment)
    manifest = _manifest_of(Path(name))
    trained_at = stage_of(manifest) if manifest else _exported_stage(Path(name))
    note = misleading_best(Path(name)) if trained_at else None
    files = DataFiles.of(experiment, manifest.settings if manifest else None)
    own = _own_settings(folder, experiment)
    return Trained(experiment, final_stage(experiment), name, folder, trained_at, note, files, own)


def _own_settings(folder: Path, experiment: Experiment) -> Experiment:
    """`experiment` with the settings by which the run in `folder` measures, if there is a run."""
    if not (folder / "experiment.yaml").is_file():
        return experiment
    own = load_run_experiment(folder)
    chosen = (*settings_with("path_to", "weights"), "resume")  # results record weights and stage
    return replace(own, **{key: getattr(experiment, key) for key in chosen})


def _manifest_of(weights: Path) -> Manifest | None:
    """The manifest of a checkpoint or of its model/ folder; None if `weights` is something else."""
    checkpoint = resolve_pointer(weights)
    holder = checkpoint.resolve().parent if checkpoint.name == "model" else checkpoint
    return Manifest.read(holder) if (holder / MANIFEST).is_file() else None


def _exported_stage(folder: Path) -> Stage | None:
    """The stage that an exported folder was trained at; None if `folder` is something else."""
    return Stage(**read_export(folder)["stage"]) if (folder / EXPORT_FILE).is_file() else None


def described_model(values: Mapping[str, Any], folder: Path, overrides: Sequence[str] = ()) -> Trained:
    """The model in `folder` with the settings {"experiment": ..., "stage": ...}.  Raises ConfigError."""
    _check_description(values, folder)
    settings = {**values["experiment"], "load_model_path": str(folder), "only_eval": True}
    if not (folder / "adapter_config.json").is_file():
        settings |= {"model_id": str(folder), **MERGED}
    experiment = validate_experiment(settings | parse_overrides(overrides), str(folder / EXPORT_FILE))
    experiment = without_permissions(experiment, overrides)
    stage = Stage(**values["stage"])
    own = validate_experiment(settings, str(folder / EXPORT_FILE))
    files = DataFiles.of(own)
    return Trained(experiment, stage, str(folder), folder, trained_at=stage, files=files, own=own)


def portable_settings(trained: Trained, merged: bool) -> dict[str, Any]:
    """Experiment and stage for `described_model`, without paths of this machine's weights and runs.

    `merged`: the weights will include adapters.
    """
    experiment = trained.experiment
    kept = replace(
        experiment,
        model_id=original_model_id(trained),
        load_model_path=None,
        max_new_tokens=max_new_tokens(experiment, card_for(experiment.val_path)),
        save_path="runs",
        **(MERGED if merged else {}),
    )
    return {"experiment": yaml.safe_load(experiment_to_yaml(kept)), "stage": asdict(trained.stage)}


def original_model_id(trained: Trained) -> str:
    """The `model_id` that training started from."""
    settings = trained.folder / "experiment.yaml"
    if settings.is_file():
        return load_run_experiment(trained.folder).model_id
    if (trained.folder / EXPORT_FILE).is_file():
        return str(read_export(trained.folder).get("base_model", trained.experiment.model_id))
    return trained.experiment.model_id


def read_export(folder: Path) -> dict[str, Any]:
    """The settings of an exported folder.  Raises ConfigError."""
    values = read_json(folder / EXPORT_FILE)
    _check_description(values, folder)
    return values


def _check_description(values: Mapping[str, Any], folder: Path) -> None:
    error = jsonschema.exceptions.best_match(EXPORT_SHAPE.iter_errors(values))
    if error is not None:
        raise ConfigError(
            f"{folder / EXPORT_FILE}: {error.json_path.removeprefix('$.')}: {error.message[:200]}; "
            "is this a folder written by `export`?"
        )
