"""The checkpoint folders of a run as one process sees them: names, manifests, stages, retention.

    checkpoint_3/                  after epoch 3 (counted from 1, as in the published code)
    checkpoint_3_step_0000420/     420 optimizer steps into the fourth epoch
        manifest.json              settings, position, size and sha256 of every file; written last
        model/                     Hugging Face form, or PEFT form for adapters; for other programs
        engine/                    the ZeRO shards of every rank
        random/                    the random number generators of every rank
    latest  best                   files with the name of a folder; best: of the newest stage

Accuracies of different stages do not compare: stage 0 shows every reasoning step and is the easiest.  So the
best checkpoint of every stage is kept, also as `best_stage_2`, and `best` is that of the newest stage.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from coconut_ds.config.experiment import Experiment, validate_experiment
from coconut_ds.config.schema import record_schema, schema_error
from coconut_ds.data.curriculum import Stage, stage_at, stage_number
from coconut_ds.errors import CheckpointError, ConfigError, first_line
from coconut_ds.files import hash_file, json_text, read_bytes, read_json, replace_text, sync_path

MANIFEST, FORMAT = "manifest.json", 1
NAME = re.compile(r"checkpoint_(\d{1,9})(?:_step_(\d{1,12}))?")
BEST_OF_STAGE = re.compile(r"best_stage_(\d{1,6})")
DRAFT = ".tmp-"
MAX_POINTER = 256  # bytes of the files `latest` and `best`
LONGEST_REASONING = "longest_reasoning"  # a setting of a token-wise iCoT run: tokens, validation set
CURRICULUM = (
    "method", "c_thought", "epochs_per_stage", "max_latent_stage", "num_epochs", "icot_tokens_per_epoch",
)  # fmt: skip
UNUSED = {"name": "checkpoint", "model_id": "-", "train_path": "-", "val_path": "-"}
Log = Callable[[str], None]


@dataclass(frozen=True)
class TrainState:
    """The position of a run: `epoch` epochs are finished or skipped, and `step_in_epoch` of the next one."""

    epoch: int = 0
    step_in_epoch: int = 0
    samples_in_epoch: int = 0  # over all ranks, so that another number of ranks can resume
    global_step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0
    best_accuracy: float | None = None  # of its stage; in older versions of the run
    accuracy: float | None = None  # of the newest validation
    stage: int = 0  # older versions always wrote 0
    stage_best: float | None = None  # highest validation accuracy of the stage, for early stopping
    stale_epochs: int = 0  # epochs of the stage since then
    wandb_id: str | None = None
    positions: Mapping[str, int] = field(default_factory=dict)  # bytes of metrics.jsonl, samples.jsonl


@dataclass(frozen=True)
class FileRecord:
    size: int
    sha256: str


def _exactly(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {**record_schema(properties), "additionalProperties": False}


COUNT = {"type": "integer", "minimum": 0, "maximum": 2**63}
ACCURACY = {"type": ["number", "null"]}
STATE = _exactly(
    {item.name: COUNT for item in fields(TrainState) if item.type is int}
    | {"best_accuracy": ACCURACY, "accuracy": ACCURACY, "stage_best": ACCURACY}
    | {"wandb_id": {"type": ["string", "null"]}}
    | {"positions": {"type": "object", "additionalProperties": COUNT}}
)
OBJECT = {"type": "object"}
SETTINGS = record_schema({}, {"experiment": OBJECT, "ds_config": OBJECT, "data": OBJECT, "libraries": OBJECT})
FILES = {
    "type": "object",
    "propertyNames": {"pattern": "^[^\u0000]+$"},
    "additionalProperties": _exactly({"size": COUNT, "sha256": {"type": "string"}}),
}
SCHEMA = _exactly(
    {"format": {"const": FORMAT}, "state": STATE, "settings": SETTINGS, "files": FILES}
    | {"world_size": {"type": "integer", "minimum": 1}, "improved": {"type": "boolean"}}
)


@dataclass(frozen=True)
class Manifest:
    """manifest.json: the position, settings and files of a checkpoint."""

    state: TrainState
    settings: Mapping[str, Any]  # experiment, ds_config, data, libraries, code: see changes.py
    world_size: int
    improved: bool
    files: Mapping[str, FileRecord]  # path inside the folder, with forward slashes

    @property
    def size(self) -> int:
        """Bytes of all the files."""
        return sum(record.size for record in self.files.values())

    @property
    def epoch(self) -> int:
        """The epoch (from 0) that the newest steps belong to."""
        return self.state.epoch if self.state.step_in_epoch else max(self.state.epoch - 1, 0)

    @property
    def experiment(self) -> Experiment | None:
        """The curriculum settings, with defaults for all others; None if there are none."""
        saved = self.settings.get("experiment", {})
        try:
            values = {key: saved[key] for key in CURRICULUM}
            plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            return validate_experiment(UNUSED | plain, "")
        except (ConfigError, KeyError):
            return None

    def write(self, folder: Path) -> None:
        body = {"format": FORMAT, **asdict(self)}
        # A round trip through JSON: the hash must match what will be read.
        body = json.loads(json_text(body, default=str))
        replace_text(folder / MANIFEST, json_text({"sha256": digest_of(body), **body}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a manifest. Raises CheckpointError if it is missing, damaged, edited or of a newer format."""
        path = folder / MANIFEST
        try:
            body = read_json(path)
            written = body.pop("sha256")
            actual = digest_of(body)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: not a complete checkpoint") from None
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({first_line(error)})") from error
        if written != actual:
            raise CheckpointError(f"{path} was changed after it was written (its sha256 does not match)")
        if fault := schema_error(body, SCHEMA):
            raise CheckpointError(f"{path} is not a manifest of this version of the program ({fault})")
        body.pop("format")
        body["state"] = TrainState(**body["state"])
        body["files"] = {name: FileRecord(**record) for name, record in body["files"].items()}
        return cls(**body)

    def verify(self, folder: Path) -> None:
        """Check the size and sha256 of every file. Raises CheckpointError that names the first bad one."""
        try:
            for name, record in self.files.items():
                _verify_file(folder, folder / name, record)
            # DeepSpeed loads all shards that it finds, including those of another run.
            extra = [
                name for name in list_files(folder) if name.startswith("engine/") and name not in self.files
            ]
        except (OSError, RuntimeError) as error:  # a name that is too long, a cycle of links
            raise CheckpointError(f"{folder} cannot be verified ({first_line(error)})") from error
        if extra:
            raise CheckpointError(f"{folder / extra[0]} does not belong to this checkpoint")


def _verify_file(folder: Path, path: Path, record: FileRecord) -> None:
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path} is a link or leads out of the checkpoint")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    size = path.stat().st_size
    if size != record.size:
        raise CheckpointError(f"{path} has {size} bytes instead of {record.size}")
    if hash_file(path) != record.sha256:
        raise CheckpointError(f"{path} is damaged: its sha256 does not match the manifest")


def list_files(folder: Path) -> list[str]:
    """Every file below `folder`, as sorted paths with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def sync_and_hash(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Sync files to disk (fsync); return the size and sha256 of each, as read back."""
    records = {}
    for name in names:
        sync_path(folder / name)
        records[name] = FileRecord((folder / name).stat().st_size, hash_file(folder / name))
    return records


def digest_of(body: Mapping[str, Any]) -> str:
    """The sha256 that a manifest holds about its other values."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, order=True)
class TrainedStage:
    """A checkpoint's position in the curriculum; a later stage is greater."""

    number: int
    hidden_tokens: int  # token-wise iCoT; limited to the longest reasoning, after which nothing changes

    @classmethod
    def of(cls, manifest: Manifest) -> "TrainedStage":
        """Older versions always wrote stage 0, so the stage is computed from the settings if possible."""
        if (experiment := manifest.experiment) is None:
            return cls(manifest.state.stage, 0)
        hidden = stage_at(manifest.epoch, experiment).hidden_tokens
        longest = manifest.settings.get(LONGEST_REASONING, hidden)
        return cls(stage_number(manifest.epoch, experiment), min(hidden, longest))


def stage_of(manifest: Manifest, experiment: Experiment | None = None) -> Stage | None:
    """The stage of a checkpoint's newest steps, by its own settings or those of `experiment`."""
    experiment = experiment or manifest.experiment
    return None if experiment is None else stage_at(manifest.epoch, experiment)


def best_of(manifests: Mapping[str, Manifest], number: int | None = None) -> str | None:
    """The name of the most accurate checkpoint of stage `number` (None: of the newest stage).

    `manifests`: end-of-epoch checkpoints.  Of equal ones, the earliest is the best.
    """
    stages = {name: TrainedStage.of(manifest) for name, manifest in manifests.items()}
    newest = max((at for at in stages.values() if number in (None, at.number)), default=None)

    def quality(name: str) -> tuple[float, int]:
        state = manifests[name].state
        return (-1.0 if state.accuracy is None else state.accuracy, -state.epoch)

    return max((name for name, at in stages.items() if at == newest), key=quality, default=None)


def best_per_stage(manifests: Mapping[str, Manifest]) -> dict[int, str]:
    """The best checkpoint of every stage, by the stage's number."""
    numbers = sorted({TrainedStage.of(manifest).number for manifest in manifests.values()})
    return {number: name for number in numbers if (name := best_of(manifests, number)) is not None}


def checkpoint_name(epoch: int, step_in_epoch: int = 0) -> str:
    """`checkpoint_3` after epoch 3 (counted from 1), `checkpoint_3_step_0000420` 420 steps later."""
    return f"checkpoint_{epoch}" + (f"_step_{step_in_epoch:07d}" if step_in_epoch else "")


def position_of(name: str) -> tuple[int, int] | None:
    """(finished epochs, steps of the next) from a checkpoint's name, else None; later ones are greater."""
    match = NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


class CheckpointFolders:
    def __init__(self, run_folder: Path, log: Log = print) -> None:
        """`log` receives one line for every checkpoint that is skipped or set aside."""
        self.run_folder = run_folder
        self._log = log
        self._verified: set[str] = set()

    def positions(self) -> dict[str, tuple[int, int]]:
        """(finished epochs, steps of the next) of every checkpoint by its name, oldest first.

        The checkpoints were complete when saved; files may be damaged.
        """
        if not self.run_folder.is_dir():
            return {}
        names = [entry.name for entry in self.run_folder.iterdir() if entry.is_dir()]
        named = [(position, name) for name in names if (position := position_of(name))]
        return {name: position for position, name in sorted(named)}

    def finished_epochs(self) -> int:
        """The finished epochs of the newest checkpoint; all of the schedule if the run stopped early."""
        return max((epoch for epoch, _ in self.positions().values()), default=0)

    def names(self) -> list[str]:
        """The names of all checkpoints, oldest first."""
        return list(self.positions())

    def latest(self) -> str | None:
        """The newest valid checkpoint; damaged ones are skipped and the reason is logged."""
        pointed = self.pointed_at("latest")
        for name in reversed(self.names()):
            try:
                self.check(name)
            except CheckpointError as error:
                self._log(f"skipped {name}: {error}")
                continue
            if pointed is not None and pointed != name:
                self._log(
                    f"{self.run_folder / 'latest'} names {pointed}; the newest complete checkpoint is {name}"
                )
            return name
        return None

    def named(self, word: str) -> str | None:
        """The name of a checkpoint given as 'latest', 'best', 'best_stage_2' or by name; None: none yet.

        Raises CheckpointError if that stage has no checkpoint, or if the best one is damaged.
        """
        if word == "latest":
            return self.latest()
        if word == "best":
            name = self.pointed_at("best")
        elif match := BEST_OF_STAGE.fullmatch(word):
            per_stage = best_per_stage(self.manifests())
            name = per_stage.get(int(match[1]))
            if name is None:
                available = ", ".join(f"best_stage_{number}" for number in per_stage) or "none"
                raise CheckpointError(f"{self.run_folder}: no {word}; available: {available}")
        else:
            return word
        if name is not None:
            self.check(name)
        return name

    def manifests(self) -> dict[str, Manifest]:
        """The readable manifests of all end-of-epoch checkpoints, oldest first."""
        manifests = {}
        for name, (_, step) in self.positions().items():
            if step == 0:
                with suppress(CheckpointError):
                    manifests[name] = Manifest.read(self.run_folder / name)
        return manifests

    def misleading_best(self) -> str | None:
        """A note if `best` is not from the newest stage (runs of older versions), else None."""
        manifests, name = self.manifests(), self.pointed_at("best")
        newest = best_of(manifests)
        if name not in manifests or newest is None:
            return None
        manifest = manifests[name]
        at, reached = TrainedStage.of(manifest), TrainedStage.of(manifests[newest])
        if at == reached:
            return None
        stage = f" ({stage})" if (stage := stage_of(manifest)) else ""
        return (
            f"{self.run_folder / 'best'} is {name}: epoch {manifest.epoch + 1}, stage {at.number}{stage}. "
            f"The newest stage is {reached.number}; its best checkpoint is best_stage_{reached.number} "
            f"({newest})"
        )

    def check(self, name: str) -> Manifest:
        """Verify every file of a checkpoint (once per process). Raises CheckpointError with the reason."""
        folder = self.run_folder / name
        if position_of(name) is None or not folder.is_dir():
            stages = [f"best_stage_{number}" for number in best_per_stage(self.manifests())]
            available = ", ".join([*self.names(), *(["best"] if stages else []), *stages]) or "none"
            raise CheckpointError(f"{folder}: no such checkpoint; available: {available}")
        manifest = Manifest.read(folder)
        if (manifest.state.epoch, manifest.state.step_in_epoch) != position_of(name):
            raise CheckpointError(f"{folder} was renamed: its manifest is for epoch {manifest.state.epoch}")
        if name not in self._verified:
            manifest.verify(folder)
            self._verified.add(name)
        return manifest

    def pointed_at(self, pointer: str) -> str | None:
        """The checkpoint that the file `latest` or `best` names; None if it names none."""
        with suppress(OSError, UnicodeDecodeError):
            name = read_bytes(self.run_folder / pointer, MAX_POINTER).decode("utf-8").strip()
            return name if position_of(name) else None
        return None

    def size_of(self, name: str) -> int:
        """Bytes of a checkpoint; 0 if its manifest cannot be read."""
        with suppress(CheckpointError):
            return Manifest.read(self.run_folder / name).size
        return 0

    def with_stage(self, manifest: Manifest) -> Manifest:
        """`manifest` with its stage, the stage's best accuracy so far, and whether this one improved it."""
        at, state = TrainedStage.of(manifest), manifest.state
        same_stage = [other.state for other in self.manifests().values() if TrainedStage.of(other) == at]
        others = [other.accuracy for other in same_stage if other.epoch != state.epoch]
        known = [accuracy for accuracy in others if accuracy is not None]
        accuracy = None if state.step_in_epoch else state.accuracy
        best = max([*known, *([] if accuracy is None else [accuracy])], default=None)
        improved = accuracy is not None and all(accuracy > other for other in known)
        return replace(manifest, state=replace(state, stage=at.number, best_accuracy=best), improved=improved)

    def publish(self, draft: Path, name: str) -> None:
        """Give a finished draft its name, and update `latest` and `best`."""
        final = self.run_folder / name
        if final.exists():
            self._remove(name)
        draft.rename(final)
        sync_path(self.run_folder)
        self._verified.add(name)
        replace_text(self.run_folder / "latest", name + "\n")
        self._point_best()

    def _point_best(self) -> None:
        best = best_of(self.manifests())
        if best is None:
            (self.run_folder / "best").unlink(missing_ok=True)
        elif best != self.pointed_at("best"):
            replace_text(self.run_folder / "best", best + "\n")

    def retire(self, newest: str, *, keep: int | None, only_improving: bool) -> None:
        """Remove checkpoints that the settings do not keep; always keep the newest and every stage's best."""
        manifests = self.manifests()
        epochs = [name for name, manifest in manifests.items() if manifest.improved or not only_improving]
        kept = set(epochs if keep is None else epochs[-keep:])
        kept |= {newest, *best_per_stage(manifests).values()}
        for name in self.names():
            if name not in kept:
                self._remove(name)

    def set_aside_after(self, name: str) -> None:
        """Rename checkpoints newer than `name`: a run that resumes from `name` does not include them."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        positions = self.positions()
        for newer, position in positions.items():
            if position > positions[name]:
                (self.run_folder / newer).rename(self.run_folder / f"superseded-{stamp}-{newer}")
                self._log(f"set aside {newer}: it is newer than {name}, from which this run resumes")
        self._point_best()
        replace_text(self.run_folder / "latest", name + "\n")

    def remove_drafts(self) -> None:
        """Remove the drafts of runs that died while saving."""
        for entry in self.run_folder.glob(f"{DRAFT}*/"):
            shutil.rmtree(entry, ignore_errors=True)

    def _remove(self, name: str) -> None:
        # Rename it first: a crash must not leave part of a checkpoint under its name.
        gone = self.run_folder / f"{DRAFT}old-{time.time_ns()}-{name}"
        (self.run_folder / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def misleading_best(path: Path) -> str | None:
    """A note if `path` is RUN/best and not from the run's newest stage, else None."""
    return CheckpointFolders(path.parent).misleading_best() if path.name == "best" else None


def resolve_pointer(path: Path) -> Path:
    """The checkpoint that RUN/best, RUN/latest or RUN/best_stage_2 names; other paths are returned as is.

    Raises CheckpointError if it does not name a checkpoint.
    """
    folders = CheckpointFolders(path.parent)
    if path.name in ("best", "latest") and path.is_file() and path.stat().st_size < MAX_POINTER:
        name = folders.pointed_at(path.name)
        if name is None:
            content = read_bytes(path, MAX_POINTER).decode("utf-8", errors="replace").strip()
            raise CheckpointError(f"{path} names {content!r}, which is not a checkpoint in the same folder")
        return path.parent / name
    if BEST_OF_STAGE.fullmatch(path.name) and folders.names():
        return path.parent / str(folders.named(path.name))
    return path
