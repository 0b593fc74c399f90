"""Save so that a crash at any moment leaves a usable checkpoint; load only what is whole, on all ranks alike.

    .tmp-checkpoint_N-x   every rank writes; files reach the disk and are hashed; barrier; manifest
    checkpoint_N          rename: from here on it counts
    latest, best          replaced in one step; then old folders go

Knows: the order of steps, ranks.  Does not know: what is inside a shard, the training loop.
"""

import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError

from coconut_ds.errors import CheckpointError, OneRankFailed, first_line
from coconut_ds.failures import is_lost_rank, is_out_of_memory, phase
from coconut_ds.files import replace_text, sync_folder
from coconut_ds.runs.checkpoint.changes import refuse_changes
from coconut_ds.runs.checkpoint.folders import DRAFT, CheckpointFolders, Log, checkpoint_name
from coconut_ds.runs.checkpoint.manifest import FileRecord, Manifest, TrainState, list_files, settle_files
from coconut_ds.runs.checkpoint.random_state import restore_random_state, save_random_state

SPARE_BYTES = 16 * 2**20
# torch.save says RuntimeError when the disk is full, and not why.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
Result = TypeVar("Result")


def is_write_error(error: Exception) -> bool:
    """Whether the disk is to blame; a lost rank and a full memory raise errors of the same types."""
    return isinstance(error, WRITE_ERRORS) and not (is_lost_rank(error) or is_out_of_memory(error))


class Shards(Protocol):
    """What a checkpoint needs of the engine; every method but one is called on every rank."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    def barrier(self) -> None: ...
    def gather(self, value: Any, /) -> list[Any]: ...
    def broadcast_object(self, value: Any, /) -> Any: ...
    def save_shards(self, folder: Path, client_state: dict[str, Any], /) -> None: ...
    def load_shards(self, folder: Path, /) -> dict[str, Any]: ...
    def load_converted_shards(self, folder: Path, /) -> dict[str, Any]: ...
    def convert_shards(self, folder: Path, target: Path, /) -> None: ...  # on the main rank alone


class Checkpoints:
    """The checkpoints of one run folder, which all ranks must see (a shared file system)."""

    def __init__(
        self,
        run_folder: Path,
        engine: Shards,
        settings: Mapping[str, Any],
        *,
        keep: int | None = None,
        only_improving: bool = False,
        expected_bytes: int = 0,
        log: Log = print,
    ) -> None:
        """`settings` as in changes.py.  `keep`: at most so many end-of-epoch checkpoints (None: all).

        `only_improving`: of the end-of-epoch checkpoints keep those that improved the validation accuracy
        of their stage; the newest checkpoint of all stays besides, to resume from.  `expected_bytes`: size of
        a checkpoint, for the first free-space check.  `log` gets one line for all the user should know, on
        the main rank.
        """
        self.folders = CheckpointFolders(run_folder, log)
        self.engine = engine
        self.settings = settings
        self.keep = keep
        self.only_improving = only_improving
        self.expected_bytes = expected_bytes
        self._log = log

    @property
    def run_folder(self) -> Path:
        return self.folders.run_folder

    def latest(self) -> str | None:
        """The newest checkpoint that verifies, the same on every rank."""
        return self._on_main(self.folders.latest)

    @phase("checkpoint")
    def save(self, state: TrainState, model_writer: Callable[[Path], None]) -> str:
        """Write a checkpoint on all ranks and return its name; `model_writer` is called on every rank.

        Raises CheckpointError when it could not be written; what was there before is untouched.
        """
        name = checkpoint_name(state.epoch, state.step_in_epoch)
        draft = self._new_draft(name)
        self._on_main(lambda: self._begin(draft))
        self._on_every_rank(draft, lambda: save_random_state(self._random_file(draft)))
        try:
            self.engine.save_shards(draft / "engine", {"step_of_run": state.global_step})
            model_writer(draft / "model")
        except WRITE_ERRORS as error:
            if not is_write_error(error):
                raise
            # The other ranks may wait inside a collective: they cannot be asked, only left.
            shutil.rmtree(draft, ignore_errors=True)
            raise OneRankFailed(self._cannot_write(error)) from error
        self.engine.barrier()
        self._settle(draft)
        self._on_main(lambda: self._finish(draft, name, state))
        return name

    @phase("loading a checkpoint")
    def load(self, wanted: str | None = None, *, allow: Collection[str] = ()) -> TrainState | None:
        """Put engine and random state of all ranks back; None when there is nothing to load.

        `wanted` None: the newest checkpoint that verifies.  A `wanted` one that is absent or damaged, and
        settings that differ and are not in `allow`, raise CheckpointError on every rank.
        """
        self._on_main(self.folders.sweep)
        chosen = self._on_main(lambda: self._choose(wanted, allow))
        if chosen is None:
            return None
        name, manifest = chosen
        folder = self.run_folder / name
        if manifest.world_size == self.engine.world_size:
            client_state = self.engine.load_shards(folder / "engine")
        else:
            client_state = self._load_for_other_ranks(folder / "engine")
        if client_state.get("step_of_run") != manifest.state.global_step:
            raise CheckpointError(f"{folder}: its shards are of another step than its manifest")
        random_file = self._random_file(folder)
        if random_file.exists():  # absent when the checkpoint is of fewer ranks: the seed's state stays
            restore_random_state(random_file)
        self._on_main(lambda: self.folders.set_aside_after(name))
        if self.engine.is_main:
            self._log(
                f"resumed from {folder}: {manifest.state.epoch} epochs, step {manifest.state.global_step}"
            )
        return manifest.state

    def _new_draft(self, name: str) -> Path:
        """A folder of the same name on every rank, which the next start sweeps away if it is left."""
        return self.run_folder / f"{DRAFT}{name}-{self.engine.broadcast_object(uuid.uuid4().hex[:8])}"

    def _load_for_other_ranks(self, shards: Path) -> dict[str, Any]:
        """Load the shards of another number of ranks, by way of a form that fits any; it is removed again."""
        draft = self._new_draft("universal")
        converted = draft / "universal"
        self._on_main(lambda: self._convert(shards, converted))
        client_state = self.engine.load_converted_shards(converted)
        self.engine.barrier()
        if self.engine.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        return client_state

    def _convert(self, shards: Path, converted: Path) -> None:
        # DeepSpeed writes every tensor once in pieces and once whole.
        needed = 2 * sum(path.stat().st_size for path in shards.iterdir())
        if lack := self._lack_of_space(needed):
            raise CheckpointError(f"{self.run_folder}: dividing {shards} anew {lack}; make room")
        self._log(f"dividing {shards} anew, for world size {self.engine.world_size}")
        converted.mkdir(parents=True)
        try:
            self.engine.convert_shards(shards, converted)
        except WRITE_ERRORS as error:
            if not is_write_error(error):
                raise
            shutil.rmtree(converted.parent, ignore_errors=True)
            raise CheckpointError(self._cannot_write(error)) from error

    def _choose(self, wanted: str | None, allow: Collection[str]) -> tuple[str, Manifest] | None:
        name = self.folders.named(wanted or "latest")
        if name is None:
            if wanted:
                raise CheckpointError(f"{self.run_folder}: there is no {wanted} checkpoint yet")
            if names := self.folders.names():
                raise CheckpointError(
                    f"{self.run_folder}: every checkpoint is damaged ({', '.join(names)}); "
                    "repair one, or move them away to begin again"
                )
            return None
        manifest = self.folders.check(name)
        for line in refuse_changes(manifest, self.settings, self.engine.world_size, allow):
            self._log(line)
        return name, manifest

    def _begin(self, draft: Path) -> None:
        newest = self.folders.names()[-1:]
        needed = max(self.expected_bytes, *(self.folders.size_of(name) for name in newest), 0)
        if lack := self._lack_of_space(needed):
            raise CheckpointError(
                f"{self.run_folder}: a checkpoint {lack}; make room, or lower 'keep_checkpoints'. "
                f"{self._what_is_left()}"
            )
        for part in ("engine", "model", "random", "records"):
            (draft / part).mkdir(parents=True)

    def _lack_of_space(self, needed: int) -> str | None:
        """What to say where the disk has no room for `needed` bytes, None where it has."""
        free = shutil.disk_usage(self.run_folder).free
        if free >= needed + SPARE_BYTES:
            return None
        return f"needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"

    def _settle(self, draft: Path) -> None:
        """Share the files out over the ranks; each brings its part to the disk and hashes it."""
        names = self._on_main(lambda: [name for name in list_files(draft) if not name.startswith("records/")])

        def settle_mine() -> None:
            records = settle_files(draft, names[self.engine.rank :: self.engine.world_size])
            lines = "".join(f"{record.sha256} {record.size} {name}\n" for name, record in records.items())
            replace_text(draft / "records" / str(self.engine.rank), lines)

        self._on_every_rank(draft, settle_mine)

    def _finish(self, draft: Path, name: str, state: TrainState) -> None:
        files: dict[str, FileRecord] = {}
        for rank in range(self.engine.world_size):
            for line in (draft / "records" / str(rank)).read_text(encoding="utf-8").splitlines():
                sha256, size, path = line.split(" ", 2)
                files[path] = FileRecord(int(size), sha256)
        shutil.rmtree(draft / "records")
        manifest = Manifest(state, self.settings, self.engine.world_size, False, files)
        self.folders.judged(manifest).write(draft)
        for folder in {(draft / path).parent for path in files}:
            sync_folder(folder)
        self.folders.publish(draft, name)
        self.folders.retire(name, keep=self.keep, only_improving=self.only_improving)

    def _on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action` on the main rank; its result, or its CheckpointError, on all of them."""
        answer: tuple[Any, str | None] = (None, None)
        if self.engine.is_main:
            try:
                answer = (action(), None)
            except CheckpointError as error:
                answer = (None, str(error))
            except OSError as error:
                answer = (None, self._cannot_write(error))
        result, problem = self.engine.broadcast_object(answer)
        if problem is not None:
            raise CheckpointError(problem)
        return result

    def _on_every_rank(self, draft: Path, action: Callable[[], None]) -> None:
        """Run `action` on every rank; when it fails on one, all raise CheckpointError."""
        problem = None
        try:
            action()
        except WRITE_ERRORS as error:
            if not is_write_error(error):
                raise
            problem = self._cannot_write(error)
        problems = [text for text in self.engine.gather(problem) if text is not None]
        if problems:
            shutil.rmtree(draft, ignore_errors=True)
            raise CheckpointError("\n".join(problems))

    def _random_file(self, folder: Path) -> Path:
        return folder / "random" / f"rank_{self.engine.rank:05d}.pt"

    def _cannot_write(self, error: Exception) -> str:
        reason = getattr(error, "strerror", None) or first_line(error)
        if shutil.disk_usage(self.run_folder).free < SPARE_BYTES:
            reason = f"the disk is full: {reason}"
        what = f"rank {self.engine.rank}: {self.run_folder}: cannot write a checkpoint ({reason})."
        return f"{what} {self._what_is_left()}"

    def _what_is_left(self) -> str:
        names = self.folders.names()
        return f"The newest checkpoint is still {names[-1]}." if names else "There is no older checkpoint."
