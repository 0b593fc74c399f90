"""The run folder `save_path/name`: settings, environment, metrics.jsonl, samples.jsonl, wandb.

    experiment.yaml  ds_config.json  environment.json     written at every start that is not refused
    metrics.jsonl  samples.jsonl                          one JSON object per line, flushed line by line
    .lock                                                 held while a run writes here

Only the main rank writes; on the other ranks the methods of `Run` do nothing.  `debug: true` saves nothing.
"""

import errno
import fcntl
import netrc
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Self

from coconut_ds.config.experiment import Experiment, experiment_to_yaml
from coconut_ds.errors import ConfigError
from coconut_ds.files import (
    NOT_SUPPORTED,
    cannot_write,
    json_text,
    make_folder,
    open_append,
    replace_text,
    sync,
)

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
MAX_SAMPLES = 100  # rows of the table that wandb shows
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "safetensors", "numpy", "coconut_ds")
SETTINGS_FROM_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "DEEPSPEED_TIMEOUT", "DS_ALLOW_DEPRECATED_FP16",
    "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_RESTART_COUNT",
)  # fmt: skip


class RunLock:
    """An exclusive lock on a folder; the system releases it when the process ends."""

    def __init__(self, folder: Path) -> None:
        """Create `folder` and lock it.

        Raises ConfigError if another run (named in the message) writes to `folder`, or if nothing can be
        written there.  Warns on a file system without locks.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open_append(folder / ".lock", "a+")  # held until release()
            self._lock(folder)
        except OSError as error:
            raise cannot_write(folder, error) from error

    def _lock(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (*NOT_SUPPORTED, errno.ENOLCK):
                warnings.warn(
                    f"{folder}: this file system has no locks ({error.strerror}); do not start a second run "
                    "with this 'name' while this one runs",
                    stacklevel=2,
                )
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(
                f"{folder}: another run is writing here ({holder}); stop it, or set another 'name'"
            ) from None
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def refuse_unwritable(folder: Path) -> None:
    """Raise ConfigError, as RunLock does, if a run folder cannot be made or written; creates nothing."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        code = errno.EACCES if there.is_dir() else errno.ENOTDIR
        raise cannot_write(folder, OSError(code, os.strerror(code)))


def is_running(folder: Path) -> bool:
    """Whether a process on this machine holds the lock of a run folder."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


class JsonLines:
    """A file with one JSON object per line that can be truncated to an earlier byte position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = open_append(path)  # held until close()
        if self.position:
            with open(self.path, "rb") as reader:
                reader.seek(-1, os.SEEK_END)
                if reader.read(1) != b"\n":  # killed in the middle of a line
                    self._file.write(b"\n")

    @property
    def position(self) -> int:
        return self.path.stat().st_size

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one line. Raises OSError if it cannot be written; no partial line remains."""
        line = json_text(record, default=str, ensure_ascii=False).encode() + b"\n"
        start = self.position
        written = self._file.write(line)
        if written < len(line):  # the disk became full in the middle of the line
            self._file.truncate(start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def cut(self, position: int) -> None:
        """Truncate the file to `position`; a shorter file stays unchanged."""
        if position < self.position:
            self._file.truncate(position)
            sync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Run:
    """One training or evaluation run; use it as a context manager."""

    def __init__(
        self,
        experiment: Experiment,
        ds_config: Mapping[str, Any],
        *,
        is_main: bool = True,
        devices: Sequence[str] = (),
        command: Sequence[str] | None = None,
    ) -> None:
        """`ds_config`: DeepSpeed's resolved settings; `devices`: one description per rank.

        Raises ConfigError if the folder cannot be written or another run is writing to it.
        """
        self.experiment = experiment
        self.ds_config = ds_config
        self.folder = run_folder(experiment)
        self.writes = is_main and not experiment.debug
        self.devices, self.command = devices, command or sys.argv
        self.write_error: str | None = None  # why a line could not be written
        self.is_stopping: Callable[[], bool] = lambda: False  # a launcher that stops the run also ends wandb
        self._wandb: Any = None
        self._wandb_failed = False
        self._lock: RunLock | None = None
        self._lines: dict[str, JsonLines] = {}
        self._samples: deque[dict[str, Any]] = deque(maxlen=MAX_SAMPLES)
        if self.writes:
            self._lock = RunLock(self.folder)
            try:
                self._lines = {name: JsonLines(self.folder / name) for name in (METRICS, SAMPLES)}
            except OSError as error:
                raise cannot_write(self.folder, error) from error

    def write_settings(self) -> None:
        """Write the settings and environment of this start; call it when the start can no longer be refused.

        Raises ConfigError if the folder cannot be written.
        """
        if not self.writes:
            return
        environment = describe_environment(self.devices, self.command)
        try:
            replace_text(self.folder / "experiment.yaml", experiment_to_yaml(self.experiment))
            settings = json_text(self.ds_config, indent=2, default=str)
            replace_text(self.folder / "ds_config.json", settings + "\n")
            replace_text(self.folder / "environment.json", json_text(environment, indent=2) + "\n")
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def log(self, kind: str, **numbers: Any) -> None:
        """Append {"time", "kind", numbers...} to metrics.jsonl, and log it to wandb if enabled."""
        if not self.writes:
            return
        self._append(METRICS, {"time": round(time.time(), 3), "kind": kind, **numbers})
        if self._wandb is not None:
            with self._without_wandb_errors():
                self._wandb.log(wandb_numbers(kind, numbers))

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a line. If that fails, stop writing; all ranks then end at the next step."""
        try:
            self._lines[name].append(record)
        except OSError as error:
            self.write_error = str(cannot_write(self.folder / name, error))
            self.writes = False

    def check_written(self) -> None:
        """Raise ConfigError if a line could not be written."""
        if self.write_error is not None:
            raise ConfigError(self.write_error)

    @contextmanager
    def _without_wandb_errors(self) -> Iterator[None]:
        """Stop using wandb, with a warning, if anything fails there."""
        try:
            yield
        except Exception as error:  # wandb's own errors share no base class
            if not self.is_stopping():
                text = f"wandb stopped ({error}); metrics are still written to {self.folder / METRICS}"
                warnings.warn(text, stacklevel=4)
            self._wandb, self._wandb_failed = None, True

    def sample(self, **fields: Any) -> None:
        """Append one decoded problem to samples.jsonl."""
        if self.writes:
            self._append(SAMPLES, fields)
            self._samples.append(fields)

    @property
    def has_wandb(self) -> bool:
        return self._wandb is not None

    @property
    def wandb_state(self) -> str:
        """Where the metrics go, for the first lines of a run."""
        if self._wandb is None:
            return f"off; metrics go to {self.folder / METRICS}" if self.writes else "off"
        if self._wandb.offline:
            return f"offline; `wandb sync {Path(self._wandb.dir).parent}` uploads it"
        return str(self._wandb.url)

    def show_samples(self) -> None:
        """Send the newest samples to wandb as one table, which replaces the previous one."""
        if self._wandb is None or not self._samples:
            return
        columns: list[str | int] = list(self._samples[-1])
        with self._without_wandb_errors():
            import wandb

            rows = [[str(sample.get(str(column), "")) for column in columns] for sample in self._samples]
            self._wandb.log({"samples": wandb.Table(columns=columns, data=rows)})

    def attach(self, path: Path, kind: str) -> None:
        """Send a file to wandb as an artifact of this run."""
        if self._wandb is not None:
            with self._without_wandb_errors():
                self._wandb.log_artifact(str(path), name=f"{self.experiment.name}-{kind}", type=kind)

    def positions(self) -> dict[str, int]:
        """The current length in bytes of every JSON-lines file, to be stored in a checkpoint."""
        return {name: lines.position for name, lines in self._lines.items()}

    def rewind(self, positions: Mapping[str, int]) -> None:
        """Truncate the JSON-lines files to `positions`, so that no step appears twice after a resume."""
        for name, lines in self._lines.items():
            lines.cut(positions.get(name, 0))

    def start_wandb(self, wandb_id: str | None = None) -> str | None:
        """Start wandb, or resume its run `wandb_id` if given, and return the run's id.

        Offline unless the user is logged in (WANDB_API_KEY, netrc) or WANDB_MODE is set.  If wandb does not
        start, this only warns: metrics.jsonl has everything.
        """
        if not self.writes or os.environ.get("WANDB_MODE") == "disabled":
            return wandb_id
        try:
            import wandb

            make_folder(self.folder / "wandb")
            self._wandb = wandb.init(
                project=self.experiment.project,
                name=self.experiment.name,
                dir=str(self.folder),
                id=wandb_id,
                resume="allow" if wandb_id else None,
                mode=os.environ.get("WANDB_MODE") or ("online" if is_logged_in_to_wandb() else "offline"),  # type: ignore[arg-type]
                settings=wandb.Settings(init_timeout=30, silent=True),
            )
            self._wandb.define_metric("*", step_metric="step")
            return str(self._wandb.id)
        except Exception as error:  # whatever fails in wandb must not end the run
            warnings.warn(
                f"wandb did not start ({error}); metrics go to {self.folder / METRICS}", stacklevel=2
            )
            self._wandb = None
            return wandb_id

    def close(self) -> None:
        if self._wandb is not None:
            with self._without_wandb_errors():
                self._wandb.finish()
            self._wandb = None
        if self._wandb_failed:
            with suppress(Exception):  # wandb's exit handler would print a traceback for its lost service
                import wandb

                wandb.teardown(1)
        for lines in self._lines.values():
            lines.close()
        if self._lock is not None:
            self._lock.release()
        self._lock, self._lines, self.writes = None, {}, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_folder(experiment: Experiment) -> Path:
    """Return `save_path/name`. Raises ConfigError for a name that would leave `save_path`."""
    name = experiment.name
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name + experiment.save_path:
        raise ConfigError(f"name: must be the name of one folder, without '/' or '..', got {name!r}")
    return Path(experiment.save_path) / name


def library_versions() -> dict[str, str]:
    """The versions of the libraries that affect a run."""
    installed = {}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def code_version() -> str | None:
    """The git commit of the code, with '-dirty' if there are local changes; None outside a repository."""
    where = Path(__file__).parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def describe_environment(devices: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    """What is needed to reproduce the run; no credentials."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(command),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "libraries": library_versions(),
        "code": code_version(),
        "devices": list(devices),
        "settings": {name: os.environ[name] for name in SETTINGS_FROM_ENVIRONMENT if name in os.environ},
    }


def wandb_numbers(kind: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A log line in wandb's form: 'train/loss' over 'step', and one curve per window weight."""
    flat: dict[str, Any] = {}
    for name, value in numbers.items():
        if name == "step":
            flat[name] = value
        elif isinstance(value, list | tuple):
            flat |= {f"{kind}/{name}/{index}": item for index, item in enumerate(value)}
        else:
            flat[f"{kind}/{name}"] = value
    return flat


def is_logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    return False
