"""The checkpoint folders of a run as one process sees them: names, pointers, verification, retention."""

import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from coconut_ds.errors import CheckpointError
from coconut_ds.files import read_bytes, replace_text, sync_folder
from coconut_ds.runs.checkpoint.manifest import Manifest
from coconut_ds.runs.checkpoint.stages import (
    BEST_OF_STAGE,
    TrainedStage,
    best_of,
    best_per_stage,
    describe_position,
)

NAME = re.compile(r"checkpoint_(\d{1,9})(?:_step_(\d{1,12}))?")
DRAFT = ".tmp-"
MAX_POINTER = 256  # bytes of the files `latest` and `best`
Log = Callable[[str], None]


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

    def names(self) -> list[str]:
        """The names of all checkpoints, oldest first. They were complete when saved; files may be damaged."""
        if not self.run_folder.is_dir():
            return []
        names = [
            entry.name for entry in self.run_folder.iterdir() if entry.is_dir() and position_of(entry.name)
        ]
        return sorted(names, key=_age)

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
        for name in self.names():
            if _age(name)[1] == 0:
                with suppress(CheckpointError):
                    manifests[name] = Manifest.read(self.run_folder / name)
        return manifests

    def misleading_best(self) -> str | None:
        """A note if `best` is not from the newest stage (runs of older versions), else None."""
        manifests, name = self.manifests(), self.pointed_at("best")
        newest = best_of(manifests)
        if name not in manifests or newest is None:
            return None
        at, reached = TrainedStage.of(manifests[name]), TrainedStage.of(manifests[newest])
        if at == reached:
            return None
        return (
            f"{self.run_folder / 'best'} is {name}: {describe_position(manifests[name])}. "
            f"The newest stage is {reached.number}; its best checkpoint is best_stage_{reached.number} "
            f"({newest})"
        )

    def check(self, name: str) -> Manifest:
        """Verify every file of a checkpoint (once per process). Raises CheckpointError with the reason."""
        folder = self.run_folder / name
        if position_of(name) is None or not folder.is_dir():
            available = ", ".join(self.names()) or "none"
            raise CheckpointError(f"{folder}: no such checkpoint; available: {available}")
        manifest = Manifest.read(folder)
        if (manifest.state.epoch, manifest.state.step_in_epoch) != position_of(name):
            raise CheckpointError(f"{folder} was renamed: its manifest is for epoch {manifest.state.epoch}")
        if name not in self._verified:
            manifest.verify(folder)
            self._verified.add(name)
        return manifest

    def pointed_at(self, pointer: str) -> str | None:
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
        sync_folder(self.run_folder)
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
        for newer in self.names():
            if _age(newer) > _age(name):
                (self.run_folder / newer).rename(self.run_folder / f"superseded-{stamp}-{newer}")
                self._log(f"set aside {newer}: it is newer than {name}, from which this run resumes")
        self._point_best()
        replace_text(self.run_folder / "latest", name + "\n")

    def remove_drafts(self) -> None:
        """Remove the drafts of runs that died while saving."""
        if self.run_folder.is_dir():
            for entry in self.run_folder.iterdir():
                if entry.name.startswith(DRAFT) and entry.is_dir():
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


def _age(name: str) -> tuple[int, int]:
    position = position_of(name)
    assert position is not None
    return position
