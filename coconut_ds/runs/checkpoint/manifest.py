"""manifest.json: the position, settings and files of a checkpoint, and their verification."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import jsonschema

from coconut_ds.errors import CheckpointError, first_line
from coconut_ds.files import json_text, read_json, replace_text, sync

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class TrainState:
    """The position of a run: `epoch` epochs are finished, and `step_in_epoch` steps of the next one."""

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
    wandb_id: str | None = None
    positions: Mapping[str, int] = field(default_factory=dict)  # bytes of metrics.jsonl, samples.jsonl


COUNT = {"type": "integer", "minimum": 0, "maximum": 2**63}
ACCURACY = {"type": ["number", "null"]}


def _record(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMA = jsonschema.Draft202012Validator(
    _record(
        {
            "format": {"const": FORMAT},
            "state": _record(
                {item.name: COUNT for item in fields(TrainState) if item.type is int}
                | {"best_accuracy": ACCURACY, "accuracy": ACCURACY, "wandb_id": {"type": ["string", "null"]}}
                | {"positions": {"type": "object", "additionalProperties": COUNT}}
            ),
            "settings": {
                "type": "object",
                "properties": {
                    part: {"type": "object"} for part in ("experiment", "ds_config", "data", "libraries")
                },
            },
            "world_size": {"type": "integer", "minimum": 1},
            "improved": {"type": "boolean"},
            "files": {
                "type": "object",
                "propertyNames": {"pattern": "^[^\u0000]+$"},
                "additionalProperties": _record({"size": COUNT, "sha256": {"type": "string"}}),
            },
        }
    )
)


@dataclass(frozen=True)
class FileRecord:
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    state: TrainState
    settings: Mapping[str, Any]  # experiment, ds_config, data, libraries, code: see changes.py
    world_size: int
    improved: bool
    files: Mapping[str, FileRecord]  # path inside the folder, with forward slashes

    @property
    def size(self) -> int:
        """Bytes of all the files."""
        return sum(record.size for record in self.files.values())

    def write(self, folder: Path) -> None:
        body = {"format": FORMAT, **asdict(self)}
        # A round trip through JSON: the hash must match what will be read.
        body = json.loads(json_text(body, default=str))
        replace_text(folder / MANIFEST, json_text({"sha256": _digest(body), **body}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a manifest. Raises CheckpointError if it is missing, damaged, edited or of a newer format."""
        path = folder / MANIFEST
        try:
            body = read_json(path)
            written = body.pop("sha256")
            actual = _digest(body)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: not a complete checkpoint") from None
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({first_line(error)})") from error
        if written != actual:
            raise CheckpointError(f"{path} was changed after it was written (its sha256 does not match)")
        invalid = jsonschema.exceptions.best_match(SCHEMA.iter_errors(body))
        if invalid is not None:
            raise CheckpointError(
                f"{path} is not a manifest of this version of the program "
                f"({invalid.json_path.removeprefix('$.')}: {invalid.message[:200]})"
            )
        body.pop("format")
        body["state"] = TrainState(**body["state"])
        body["files"] = {name: FileRecord(**record) for name, record in body["files"].items()}
        return cls(**body)

    def verify(self, folder: Path) -> None:
        """Check the size and sha256 of every file. Raises CheckpointError that names the first bad one."""
        try:
            self._verify(folder)
        except (OSError, RuntimeError) as error:  # a name that is too long, a cycle of links
            raise CheckpointError(f"{folder} cannot be verified ({first_line(error)})") from error

    def _verify(self, folder: Path) -> None:
        for name, record in self.files.items():
            path = folder / name
            if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
                raise CheckpointError(f"{path} is a link or leads out of the checkpoint")
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")
            size = path.stat().st_size
            if size != record.size:
                raise CheckpointError(f"{path} has {size} bytes instead of {record.size}")
            if hash_file(path) != record.sha256:
                raise CheckpointError(f"{path} is damaged: its sha256 does not match the manifest")
        # DeepSpeed loads all shards that it finds, including those of another run.
        extra = [name for name in list_files(folder) if name.startswith("engine/") and name not in self.files]
        if extra:
            raise CheckpointError(f"{folder / extra[0]} does not belong to this checkpoint")


def list_files(folder: Path) -> list[str]:
    """Every file below `folder`, as sorted paths with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def sync_and_hash(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Sync files to disk (fsync); return the size and sha256 of each, as read back."""
    records = {}
    for name in names:
        path = folder / name
        descriptor = os.open(path, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)
        records[name] = FileRecord(path.stat().st_size, hash_file(path))
    return records


def hash_file(path: Path) -> str:
    with open(path, "rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
