"""Save so that a crash at any moment leaves a usable checkpoint; load only complete ones, on all ranks.

.tmp-checkpoint_N-x   every rank writes; files are synced to disk and hashed; barrier; manifest
checkpoint_N          renamed: from here on the checkpoint is valid
latest, best          replaced atomically; then old folders are removed

Weights with NaN or infinity are refused, also those that a run starts from.
"""

import random
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coconut_ds.config.experiment import Experiment
from coconut_ds.data.curriculum import stage_spans
from coconut_ds.distributed import is_lost_rank, is_out_of_memory, phase
from coconut_ds.errors import CheckpointError, OneRankFailed, first_line
from coconut_ds.files import counted, sync_path
from coconut_ds.runs.changes import refuse_changes, splits_otherwise
from coconut_ds.runs.checkpoint_folders import (
    DRAFT,
    CheckpointFolders,
    FileRecord,
    Log,
    Manifest,
    TrainState,
    checkpoint_name,
    list_files,
    sync_and_hash,
)
from coconut_ds.runs.run_folder import run_folder

SPARE_BYTES = 16 * 2**20
# torch.save raises RuntimeError without a reason if the disk is full.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
Result = TypeVar("Result")


def is_write_error(error: Exception) -> bool:
    """Whether the disk caused the error; lost ranks and full memory raise errors of the same types."""
    return isinstance(error, WRITE_ERRORS) and not (is_lost_rank(error) or is_out_of_memory(error))


class Shards(Protocol):
    """The engine's methods that checkpoints use. All but `convert_shards` are called on every rank."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    def barrier(self) -> None: ...
    def gather(self, value: Any, /) -> list[Any]: ...
    def broadcast_object(self, value: Any, /) -> Any: ...
    def on_main(self, action: Callable[[], Result], /) -> Result: ...
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
        """`settings`: see changes.py.  `keep`: maximum number of end-of-epoch checkpoints (None: all).

        `only_improving`: keep only end-of-epoch checkpoints that improved the validation accuracy of their
        stage, and the newest checkpoint, to resume from.  `expected_bytes`: size of a checkpoint, for the
        first free-space check.  `log`: receives lines for the user, on the main rank.
        """
        self.folders = CheckpointFolders(run_folder, log)
        self.engine, self.settings, self.expected_bytes = engine, settings, expected_bytes
        self.keep, self.only_improving = keep, only_improving
        self.loaded: Manifest | None = None  # of the checkpoint that load() restored
        self._log = log

    @property
    def run_folder(self) -> Path:
        return self.folders.run_folder

    @phase("checkpoint")
    def save(self, state: TrainState, model_writer: Callable[[Path], None]) -> str:
        """Write a checkpoint on all ranks and return its name; `model_writer` is called on every rank.

        Raises CheckpointError if it cannot be written; older checkpoints stay unchanged.
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
            # The other ranks may be waiting in a collective, so this rank cannot agree with them.
            shutil.rmtree(draft, ignore_errors=True)
            raise OneRankFailed(self._cannot_write(error)) from error
        self.engine.barrier()
        files = self._sync_files(draft)
        self._on_main(lambda: self._finish(draft, name, state, files))
        return name

    @phase("loading a checkpoint")
    def load(self, wanted: str | None = None, *, allow: Collection[str] = ()) -> TrainState | None:
        """Restore the engine and random state of all ranks; None if there is nothing to load.

        `wanted` None: the newest valid checkpoint.  Raises CheckpointError on every rank if `wanted` is
        missing or damaged, or if settings differ that are not in `allow`.
        """
        self._on_main(self.folders.remove_drafts)
        chosen = self._on_main(lambda: self._choose(wanted, allow))
        if chosen is None:
            return None
        name, manifest = chosen
        folder = self.run_folder / name
        if manifest.world_size != self.engine.world_size:
            client_state = self._load_converted(folder / "engine", f"world size {self.engine.world_size}")
        elif self._on_main(lambda: splits_otherwise(manifest.settings, self.settings)):  # rank 0 has them
            client_state = self._load_converted(folder / "engine", "the new ZeRO settings")
        else:
            client_state = self.engine.load_shards(folder / "engine")
        if client_state.get("step_of_run") != manifest.state.global_step:
            raise CheckpointError(f"{folder}: its shards are from another step than its manifest")
        random_file = self._random_file(folder)
        if random_file.exists():  # missing if the checkpoint has fewer ranks: the seed's state stays
            restore_random_state(random_file)
        self._on_main(lambda: self.folders.set_aside_after(name))
        if self.engine.is_main:
            self._log(
                f"resumed from {folder}: {counted(manifest.state.epoch, 'epoch')}, "
                f"step {manifest.state.global_step}"
            )
        self.loaded = manifest
        return manifest.state

    def _new_draft(self, name: str) -> Path:
        """A folder name that all ranks share; the next start removes the folder if it is left behind."""
        return self.run_folder / f"{DRAFT}{name}-{self.engine.broadcast_object(uuid.uuid4().hex[:8])}"

    def _load_converted(self, shards: Path, target: str) -> dict[str, Any]:
        """Load shards that are split in another way, through a temporary universal checkpoint."""
        draft = self._new_draft("universal")
        converted = draft / "universal"
        self._on_main(lambda: self._convert(shards, converted, target))
        client_state = self.engine.load_converted_shards(converted)
        self.engine.barrier()
        if self.engine.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        return client_state

    def _convert(self, shards: Path, converted: Path, target: str) -> None:
        # DeepSpeed writes every tensor twice: in pieces and complete.
        needed = 2 * sum(path.stat().st_size for path in shards.iterdir())
        if lack := self._lack_of_space(needed):
            raise CheckpointError(
                f"{self.run_folder}: converting {shards} for {target} {lack}; free disk space"
            )
        self._log(f"converting {shards} for {target}")
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
                raise CheckpointError(f"{self.run_folder}: no {wanted} checkpoint yet")
            if names := self.folders.names():
                raise CheckpointError(
                    f"{self.run_folder}: every checkpoint is damaged ({', '.join(names)}); "
                    "repair one, or move them away to start from scratch"
                )
            return None
        manifest = self.folders.check(name)
        for line in refuse_changes(manifest, self.settings, self.engine.world_size, allow):
            self._log(line)
        return name, manifest

    def _begin(self, draft: Path) -> None:
        if lack := self._lack_of_space(_size_of_next(self.folders, self.expected_bytes)):
            raise CheckpointError(
                f"{self.run_folder}: a checkpoint {lack}; free disk space, or keep fewer (keep_checkpoints). "
                f"{self._remaining()}"
            )
        for part in ("engine", "model", "random"):
            (draft / part).mkdir(parents=True)

    def _lack_of_space(self, needed: int) -> str | None:
        """Text for a message if the disk has no room for `needed` bytes, else None."""
        free = shutil.disk_usage(self.run_folder).free
        if free >= needed + SPARE_BYTES:
            return None
        return f"needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"

    def _sync_files(self, draft: Path) -> dict[str, FileRecord]:
        """Sync all files to disk and hash them, divided over the ranks."""
        names = self._on_main(lambda: list_files(draft))
        own = names[self.engine.rank :: self.engine.world_size]
        shares = self._on_every_rank(draft, lambda: sync_and_hash(draft, own))
        return {name: record for share in shares for name, record in share.items()}

    def _finish(self, draft: Path, name: str, state: TrainState, files: Mapping[str, FileRecord]) -> None:
        manifest = Manifest(state, self.settings, self.engine.world_size, False, files)
        self.folders.with_stage(manifest).write(draft)
        for folder in {(draft / path).parent for path in files}:
            sync_path(folder)
        self.folders.publish(draft, name)
        self.folders.retire(name, keep=self.keep, only_improving=self.only_improving)

    def _on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action` on the main rank; return its result, or raise its CheckpointError, on all ranks."""

        def explained() -> Result:
            try:
                return action()
            except OSError as error:
                raise CheckpointError(self._cannot_write(error)) from error

        return self.engine.on_main(explained)

    def _on_every_rank(self, draft: Path, action: Callable[[], Result]) -> list[Result]:
        """Every rank's result of `action`; if it fails on one, raise CheckpointError on all."""
        result, message = None, None
        try:
            result = action()
        except WRITE_ERRORS as error:
            if not is_write_error(error):
                raise
            message = self._cannot_write(error)
        gathered = self.engine.gather((result, message))
        if messages := [text for _, text in gathered if text is not None]:
            shutil.rmtree(draft, ignore_errors=True)
            raise CheckpointError("\n".join(messages))
        return [value for value, _ in gathered]

    def _random_file(self, folder: Path) -> Path:
        return folder / "random" / f"rank_{self.engine.rank:05d}.pt"

    def _cannot_write(self, error: Exception) -> str:
        reason = getattr(error, "strerror", None) or first_line(error)
        if shutil.disk_usage(self.run_folder).free < SPARE_BYTES:
            reason = f"the disk is full: {reason}"
        what = f"rank {self.engine.rank}: {self.run_folder}: cannot write a checkpoint ({reason})."
        return f"{what} {self._remaining()}"

    def _remaining(self) -> str:
        names = self.folders.names()
        return f"The newest checkpoint is still {names[-1]}." if names else "There is no older checkpoint."


def check_disk(experiment: Experiment, expected_bytes: int, log: Log = print) -> None:
    """Check, before training, the room for all checkpoints that a run will keep at once.

    `expected_bytes`: size of a checkpoint.  Raises CheckpointError if the disk cannot hold them; logs a line
    if it may not, since stages may end early and the best checkpoint of each stage is kept.
    """
    folders = CheckpointFolders(run_folder(experiment), log)
    positions, size = folders.positions(), _size_of_next(folders, expected_bytes)
    done = max((epoch for epoch, _ in positions.values()), default=experiment.resume)
    if size == 0 or done >= experiment.num_epochs:
        return
    epochs = experiment.num_epochs - done + sum(step == 0 for _, step in positions.values())
    keep = epochs if experiment.keep_checkpoints is None else experiment.keep_checkpoints
    # A new checkpoint is complete before an old one is removed.
    certain = possible = min(keep + 1, epochs)
    if experiment.save_only_improve or experiment.early_stopping_patience or experiment.advance_at:
        certain = min(2, epochs)
    has_more = experiment.save_minutes is not None or experiment.save_steps is not None
    possible = min(possible + len(list(stage_spans(experiment))), epochs) + has_more
    certain, possible = (max(number, len(positions) + 1) for number in (certain, possible))
    free = _free_bytes(folders.run_folder)
    room = len(positions) + max(0, free - SPARE_BYTES) // size
    if room >= possible:
        return
    number = certain if room < certain else possible
    fewer = f"keep fewer (--set keep_checkpoints={room - 1}), " if 1 < room <= keep else ""
    text = (
        f"{folders.run_folder}: {'' if room < certain else 'up to '}{counted(number, 'checkpoint')} of "
        f"{size / 2**20:,.0f} MiB will be on the disk at once; {free / 2**20:,.0f} MiB are free, enough for "
        f"{room - len(positions)} more; {fewer}free disk space, or write to another disk (save_path)"
    )
    if room < certain:
        raise CheckpointError(text)
    log(f"warning: {text}")


def _size_of_next(folders: CheckpointFolders, expected_bytes: int) -> int:
    return max([expected_bytes, *map(folders.size_of, folders.names()[-1:])])


def _free_bytes(folder: Path) -> int:
    """Free bytes of the disk of a folder, which may not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free


def save_random_state(path: Path) -> None:
    """Save the random number generators of this process, in a form that loads without pickle."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert isinstance(keys, np.ndarray)
    words_of_numpy = torch.from_numpy(keys.astype(np.int64))
    state = {
        "python": (version, list(words), gauss),
        "numpy": (str(name), words_of_numpy, int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(state, path)


def restore_random_state(path: Path) -> None:
    """Restore the state. Raises CheckpointError if save_random_state did not write `path`."""
    try:
        _restore(torch.load(path, weights_only=True))
    except Exception as error:  # torch and every generator raise their own on damaged files
        raise CheckpointError(f"{path} is not a saved random state ({first_line(error)})") from error


def _restore(state: Any) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def refuse_non_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise CheckpointError with the names of tensors that hold NaN or infinity.

    `source`: the file, or the folder with the files.
    """
    if names := [name for name, value in tensors.items() if not _is_finite(value)]:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"{_file_of(names[0], Path(source))} holds NaN or infinite weights: "
            f"{', '.join(names[:3])}{more}, "
            "so every loss would be NaN; use another file or an older checkpoint"
        )


def _is_finite(value: Tensor) -> bool:
    if not is_weight(value) or value.numel() == 0:
        return True
    # Two numbers instead of a mask of the tensor's size; if there is a NaN, both are NaN.
    wide = value.float() if value.element_size() == 1 else value
    return bool(torch.stack(torch.aminmax(wide)).isfinite().all())


def _file_of(name: str, source: Path) -> Path:
    """The safetensors file in the folder that holds the tensor `name`; otherwise `source`."""
    for file in sorted(source.glob("*.safetensors")) if source.is_dir() else ():
        with safe_open(file, "pt") as reader:
            if any(name == key or name.endswith(f".{key}") for key in reader.keys()):  # noqa: SIM118
                return file
    return source


def is_weight(value: Tensor) -> bool:
    """Whether a tensor is dense and floating-point."""
    return value.is_floating_point() and value.layout is torch.strided and not value.is_meta


def describe_tensor(value: Tensor) -> str:
    """A tensor's shape, and its dtype if it cannot be a weight."""
    return f"{tuple(value.shape)}" + ("" if is_weight(value) else f" of {value.dtype}")
