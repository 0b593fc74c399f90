"""Tell what kind of file a result was measured on: the run's own, its training file, or another one."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from coconut_ds.config.experiment import Experiment
from coconut_ds.files import hash_file

OWN, TRAINING, OTHER = "own", "training", "other"


@dataclass(frozen=True)
class DataFiles:
    """The data files of a run's own settings, without the overrides of a command."""

    train: str | None = None
    valid: str | None = None
    test: str | None = None
    train_sha256: str | None = None  # when it was trained, from a checkpoint's manifest

    @classmethod
    def of(cls, experiment: Experiment, settings: Mapping[str, Any] | None = None) -> Self:
        """`settings`: those of a checkpoint's manifest."""
        recorded = (settings or {}).get("data", {}).get("train")
        sha256 = recorded if isinstance(recorded, str) else None
        return cls(experiment.train_path or None, experiment.val_path, experiment.test_path, sha256)

    def role(self, split: str, path: str) -> str:
        """OWN: the file of that split; TRAINING: the training file or a copy of it; OTHER."""
        training = {_sha256(self.train), self.train_sha256} - {None}
        if _same_file(path, self.train) or _sha256(path) in training:
            return TRAINING
        own = {"valid": self.valid, "test": self.test}
        files = [own[split]] if split in own else list(own.values())
        return OWN if any(_same_file(path, file) for file in files) else OTHER


def _sha256(path: str | None) -> str | None:
    return hash_file(Path(path)) if path and os.path.isfile(path) else None


def _same_file(path: str, other: str | None) -> bool:
    return other is not None and os.path.realpath(path) == os.path.realpath(other)
