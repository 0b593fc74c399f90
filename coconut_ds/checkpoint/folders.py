"""The checkpoint folders of a run, as one process sees them: which there are, which are whole, which may go.

Knows: names, pointers, retention.  Does not know: ranks, what is inside a shard.
"""

import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from coconut_ds.checkpoint.manifest import Manifest
from coconut_ds.errors import CheckpointError
from coconut_ds.files import read_bytes, replace_text, sync_folder

NAME = re.compile(r"checkpoint_(\d{1,9})(?:_step_(\d{1,12}))?")
DRAFT = ".tmp-"
Say = Callable[[str], None]


def checkpoint_name(epoch: int, step_in_epoch: int = 0) -> str:
    """`checkpoint_3` after epoch 3 (counted from 1), `checkpoint_3_step_0000420` 420 steps later."""
    return f"checkpoint_{epoch}" + (f"_step_{step_in_epoch:07d}" if step_in_epoch else "")


def position_of(name: str) -> tuple[int, int] | None:
    """(epochs done, steps of the next) for a checkpoint's name, else None; a later checkpoint is greater."""
    match = NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


class CheckpointFolders:
    def __init__(self, run_folder: Path, say: Say = print) -> None:
        """`say` gets one line for every checkpoint that is skipped or set aside."""
        self.run_folder = run_folder
        self._say = say
        self._verified: set[str] = set()

    def names(self) -> list[str]:
        """Every checkpoint's name, oldest first; complete when it got its name, maybe damaged since."""
        if not self.run_folder.is_dir():
            return []
        found = [
            entry.name for entry in self.run_folder.iterdir() if entry.is_dir() and position_of(entry.name)
        ]
        return sorted(found, key=_age)

    def latest(self) -> str | None:
        """The newest checkpoint that verifies; damaged ones are skipped, with the reason said."""
        pointed = self.pointed_at("latest")
        for name in reversed(self.names()):
            try:
                self.check(name)
            except CheckpointError as error:
                self._say(f"skipped {name}: {error}")
                continue
            if pointed is not None and pointed != name:
                self._say(
                    f"{self.run_folder / 'latest'} names {pointed}; the newest whole checkpoint is {name}"
                )
            return name
        return None

    def best(self) -> str | None:
        """The checkpoint of the best accuracy; raises CheckpointError when it does not verify."""
        name = self.pointed_at("best")
        if name is not None:
            self.check(name)
        return name

    def check(self, name: str) -> Manifest:
        """Verify every file of one checkpoint (once a process); raises CheckpointError with what is wrong."""
        folder = self.run_folder / name
        if position_of(name) is None or not folder.is_dir():
            there = ", ".join(self.names()) or "none"
            raise CheckpointError(f"{folder}: there is no such checkpoint; there are: {there}")
        manifest = Manifest.read(folder)
        if (manifest.state.epoch, manifest.state.step_in_epoch) != position_of(name):
            raise CheckpointError(f"{folder} was renamed: its manifest is of epoch {manifest.state.epoch}")
        if name not in self._verified:
            manifest.verify(folder)
            self._verified.add(name)
        return manifest

    def pointed_at(self, pointer: str) -> str | None:
        with suppress(OSError, UnicodeDecodeError):
            name = read_bytes(self.run_folder / pointer, 256).decode("utf-8").strip()
            return name if position_of(name) else None
        return None

    def size_of(self, name: str) -> int:
        """Bytes of a checkpoint, 0 when its manifest cannot be read."""
        with suppress(CheckpointError):
            return Manifest.read(self.run_folder / name).size
        return 0

    def publish(self, draft: Path, name: str, *, improved: bool) -> None:
        """Give a finished draft its name, and point `latest` (and `best`) at it."""
        final = self.run_folder / name
        if final.exists():
            self._remove(name)
        draft.rename(final)
        sync_folder(self.run_folder)
        self._verified.add(name)
        replace_text(self.run_folder / "latest", name + "\n")
        if improved:
            replace_text(self.run_folder / "best", name + "\n")

    def retire(self, newest: str, *, keep: int | None, only_improving: bool) -> None:
        """Remove what the settings do not keep; never the newest, never the best."""
        epochs = [name for name in self.names() if _age(name)[1] == 0]
        if only_improving:
            epochs = [name for name in epochs if self._improved(name)]
        kept = set(epochs if keep is None else epochs[-keep:])
        kept |= {newest, self.pointed_at("best") or newest}
        for name in self.names():
            if name not in kept:
                self._remove(name)

    def set_aside_after(self, name: str) -> None:
        """Rename checkpoints newer than `name`, from which a run goes on: they are not its own."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for newer in self.names():
            if _age(newer) > _age(name):
                (self.run_folder / newer).rename(self.run_folder / f"superseded-{stamp}-{newer}")
                self._say(f"set aside {newer}: it is newer than {name}, from which this run goes on")
        best = self.pointed_at("best")
        if best is not None and not (self.run_folder / best).is_dir():
            improved = [other for other in self.names() if self._improved(other)]
            if improved:
                replace_text(self.run_folder / "best", improved[-1] + "\n")
            else:
                (self.run_folder / "best").unlink()
        replace_text(self.run_folder / "latest", name + "\n")

    def sweep(self) -> None:
        """Remove the drafts of runs that died while saving."""
        if self.run_folder.is_dir():
            for entry in self.run_folder.iterdir():
                if entry.name.startswith(DRAFT) and entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)

    def _remove(self, name: str) -> None:
        # Out of sight in one step first: a crash must not leave half a checkpoint under its name.
        gone = self.run_folder / f"{DRAFT}old-{time.time_ns()}-{name}"
        (self.run_folder / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _improved(self, name: str) -> bool:
        with suppress(CheckpointError):
            return Manifest.read(self.run_folder / name).improved
        return False


def _age(name: str) -> tuple[int, int]:
    position = position_of(name)
    assert position is not None
    return position
