"""Ranks: their collectives, their failures told apart, and requests to save or stop.

gloo, NCCL, c10d and torch.save raise RuntimeError for all of them, and libraries wrap those in their own
errors, so the causes of an error are checked too.

    DistError, "Connection closed by peer", "ncclRemoteError", ...     another rank died or the link is cut
    "EADDRINUSE"                                                       the rendezvous port is taken
    MemoryError, "out of memory", ...                                  an allocator gave up

Requests come from signals, files and clocks.  All ranks handle them at the same step: a launcher signals its
ranks one after another, and a rank that stopped alone would leave the others waiting.

    SIGTERM SIGINT SIGUSR1, `touch RUN/STOP`, --max-minutes     save and stop, exit code 75
    SIGTERM SIGINT SIGUSR1 before the model is loaded           exit at once, code 75: nothing to save
    the launcher ended (it leaves its ranks alive)              save and stop, exit code 75
    `touch RUN/SAVE`, save_minutes, save_steps                  save and continue
    a second SIGTERM or SIGINT                                  exit at once, nothing saved
"""

import errno
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

import psutil
import torch
import torch.distributed as dist

from coconut_ds.errors import ConfigError, RankLost, StopRequested, UserError, first_line, port_in_use

Result = TypeVar("Result")
# Messages of gloo, c10d's store and NCCL if the other end of a connection is gone or does not answer.
LOST = (
    "connection closed", "connection reset", "connection was reset", "connection refused", "broken pipe",
    "socket timeout", "timed out", "remote peer", "remote process exited", "recv failed",
    "nccl communicator was aborted", "nccl timeout", "ncclremoteerror", "ncclsystemerror",
    "ncclinternalerror", "unhandled system error", "watchdog caught collective operation timeout",
)  # fmt: skip
# NCCL errors that blame this rank's own call or GPU.
OWN_FAULT = ("ncclinvalidusage", "ncclinvalidargument", "ncclunhandledcudaerror", "nccl error 1:")
NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "std::bad_alloc")
PHASE = "coconut_ds_phase"  # attribute of an error
PORT_IN_USE = ("eaddrinuse", "address already in use")
# Environment variable with the folder where ranks write their process ids, for launch/train.sh and sweeps.
PID_FOLDER = "COCONUT_PID_FOLDER"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A second one of these ends the process; SIGUSR1 does not count: Slurm sends it some time before SIGTERM.
END_ON_REPEAT = (signal.SIGTERM, signal.SIGINT)
LAUNCHERS = ("deepspeed", "torchrun", "accelerate", "accelerate-launch")
LAUNCHER_MODULES = ("deepspeed.launcher.", "torch.distributed.", "accelerate.commands.")
REPEATED_WITHIN_SECONDS = 2.0  # launchers repeat SIGTERM; these count as one


@dataclass(eq=False)
class Ranks:
    """This process among all ranks; every method is collective."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def _reduce(
        self, values: Sequence[float] | torch.Tensor, operation: dist.ReduceOp.RedOpType
    ) -> list[float]:
        reduced = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(reduced, op=operation)
        return reduced.tolist()

    def sum_over_ranks(self, values: Sequence[float] | torch.Tensor) -> list[float]:
        """Exact sums (float64) of each value over the ranks.  A tensor of the device is read once."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any_over_ranks(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return self.max_over_ranks([float(flag)])[0] > 0

    def all_over_ranks(self, flag: bool) -> bool:
        """Whether `flag` is true on every rank."""
        return not self.any_over_ranks(not flag)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        holder = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action` on the main rank; return its result, or raise its UserError, on all ranks."""
        result, failure = None, None
        if self.is_main:
            try:
                result = action()
            except UserError as error:
                failure = error
        result, failure = self.broadcast_object((result, failure))
        if failure is not None:
            raise failure
        return result


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error means that another rank died or cannot be reached."""
    return not is_out_of_memory(error) and any(_says_lost(cause) for cause in _causes(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator (GPU, torch's CPU tensors, Python) ran out of memory."""
    return any(_says_no_memory(cause) for cause in _causes(error))


def is_port_in_use(error: BaseException) -> bool:
    """Whether rank 0 cannot listen because another program uses the port."""
    return any(_says(cause, PORT_IN_USE) for cause in _causes(error) if isinstance(cause, dist.DistError))


def _says_lost(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or _says(error, OWN_FAULT) or _says(error, PORT_IN_USE):
        return False
    return isinstance(error, dist.DistError) or _says(error, LOST)


def _says_no_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _says(error, NO_MEMORY)


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(word in text for word in words)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, up to a UserError, which has already classified its own cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, UserError):
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Record what this rank is doing, for the message if memory runs out; the innermost phase counts.

    Also a decorator: `@phase("forward")`.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, PHASE):
            setattr(error, PHASE, name)
        raise


def phase_of(error: BaseException) -> str:
    """The innermost phase in which the error was raised."""
    names = [str(getattr(cause, PHASE)) for cause in _causes(error) if hasattr(cause, PHASE)]
    return names[-1] if names else "between phases"


@contextmanager
def lost_ranks_explained() -> Iterator[None]:
    """Turn the error of a collective into RankLost if another rank died or the connection was lost."""
    try:
        yield
    except Exception as error:
        if is_port_in_use(error):
            address, port = os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
            raise port_in_use(address, port) from error
        if not is_lost_rank(error):
            raise
        cause = next(cause for cause in _causes(error) if _says_lost(cause))
        raise RankLost(
            f"rank {os.environ.get('RANK', '0')} lost contact with another rank, which died or cannot be "
            "reached; look for its message. Run the same command to resume from the newest checkpoint. "
            f"({first_line(cause)})"
        ) from error


class Signals:
    """Within this context, a stop signal is recorded instead of ending the process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._nothing_to_save = False
        self._first = 0.0

    def __enter__(self) -> Self:
        if folder := os.environ.get(PID_FOLDER):
            Path(folder, str(os.getpid())).touch()
        # A thread listens: the main thread may wait in a collective and run no handler for minutes.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, _remember) for number in STOP_SIGNALS}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_descriptor)
        os.close(self._writer)

    @contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Within this context a stop signal ends the process at once, even if the main thread is busy."""
        self._nothing_to_save = True
        try:
            yield
        finally:
            self._nothing_to_save = False

    def _listen(self) -> None:
        while numbers := os.read(self._reader, 16):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._note(signal.Signals(number))
        os.close(self._reader)

    def _note(self, number: signal.Signals) -> None:
        if self._nothing_to_save:
            others = int(os.environ.get("WORLD_SIZE", "1")) > 1
            why = "; if another rank failed, its error is above or in its log" if others else ""
            text = (
                f"stopped: received {number.name} before training began{why}; run the same command to restart"
            )
            os.write(2, text.encode() + b"\n")
            os._exit(StopRequested.exit_code)
        now = time.monotonic()
        if number in END_ON_REPEAT:
            if self._first and now - self._first > REPEATED_WITHIN_SECONDS:
                os.write(2, f"second {number.name}: pid {os.getpid()} exits now, nothing saved\n".encode())
                os._exit(128 + number)
            self._first = self._first or now
        self.received = self.received or number


def _remember(number: int, frame: FrameType | None) -> None:
    """Do nothing: the thread reads the signal from the wakeup descriptor."""


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line starts ranks: a program, or `python -m` and a module."""
    return any(
        os.path.basename(word) in LAUNCHERS or word.startswith(LAUNCHER_MODULES) for word in command[:4]
    )


def refuse_lone_process() -> None:
    """Raise ConfigError if `accelerate launch --cpu` started one process where several were wanted.

    It passes no number of processes (accelerate/utils/launch.py, prepare_simple_launcher_cmd_env).
    """
    if "ACCELERATE_USE_CPU" not in os.environ or "WORLD_SIZE" in os.environ:
        return
    words = " ".join(psutil.Process(os.getppid()).cmdline())
    number = re.search(r"--num[_-]processes[ =](\d+)", words)
    if number and int(number[1]) > 1:
        command = f"torchrun --nproc_per_node {number[1]} -m coconut_ds {shlex.join(sys.argv[1:])}"
        raise ConfigError(
            f"`accelerate launch` without a GPU starts one process, not {number[1]}; write: {command}"
        )


class Launcher:
    """The launcher processes above this rank, if any; a signal can end them and leave the ranks alive.

    `deepspeed` has two of them (deepspeed/launcher/runner.py, launch.py).
    """

    def __init__(self) -> None:
        self._parents: list[tuple[psutil.Process, int]] = []  # a process below it, and its parent's pid
        child = psutil.Process()
        for parent in child.parents()[:2]:
            if not is_launcher(parent.cmdline()):
                break
            self._parents.append((child, parent.pid))
            child = parent

    def is_gone(self) -> bool:
        try:
            return any(child.ppid() != parent for child, parent in self._parents)
        except psutil.NoSuchProcess:
            return True


class Request(IntEnum):
    """What to do; the highest request over all ranks is carried out."""

    NOTHING = 0
    SAVE = 1
    STOP = 2
    FAIL = 3

    @classmethod
    def highest(cls, counts: Sequence[float]) -> "Request":
        """The highest request that any rank has, of the sums of `Requests.counts`."""
        return max(request for request, count in zip(cls, counts, strict=True) if count)


class Requests:
    """Requests to all ranks: by `poll`, or by a sum that they compute in any case, of `counts`."""

    def __init__(
        self,
        signals: Signals,
        ranks: Ranks,
        folder: Path,
        *,
        save_minutes: float | None = None,
        save_steps: int | None = None,
        max_minutes: float | None = None,
        failed: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`folder`: where to look for STOP and SAVE files; files from an earlier run are removed.

        `failed`: whether this rank cannot continue.
        """
        self._signals, self._ranks, self._clock = signals, ranks, clock
        self._files = {Request.STOP: folder / "STOP", Request.SAVE: folder / "SAVE"}
        self._save_minutes, self._save_steps, self._max_minutes = save_minutes, save_steps, max_minutes
        self._failed = failed
        self._started = self._saved = clock()
        self._reason = ""
        self._launcher = Launcher()
        if ranks.is_main:
            for file in self._files.values():
                file.unlink(missing_ok=True)

    def poll(self) -> Request:
        """The highest request of any rank between two steps, where there is nothing to save. Collective."""
        (level,) = self._ranks.max_over_ranks([float(self._of_this_rank(None))])
        return Request(int(level))

    def counts(self, step: int) -> list[int]:
        """1 for this rank's request after a step, 0 for the others; to be summed over the ranks."""
        own = self._of_this_rank(step)
        return [int(own is request) for request in Request]

    def saved(self) -> None:
        """Record that a checkpoint was written: `save_minutes` counts from now."""
        self._saved = self._clock()
        if self._ranks.is_main:
            self._files[Request.SAVE].unlink(missing_ok=True)

    def reason(self) -> str:
        """Why the run stops, from all ranks that know a reason. Collective."""
        if self._ranks.is_main:
            self._files[Request.STOP].unlink(missing_ok=True)
        return ", ".join(sorted({reason for reason in self._ranks.gather(self._reason) if reason}))

    def _of_this_rank(self, step: int | None) -> Request:
        if self._failed():
            return Request.FAIL
        if reason := self._reason_to_stop():
            self._reason = reason
            return Request.STOP
        return Request.SAVE if step is not None and self._is_time_to_save(step) else Request.NOTHING

    def _reason_to_stop(self) -> str | None:
        if self._signals.received is not None:
            return f"received {self._signals.received.name}"
        if self._launcher.is_gone():
            return "the launcher ended"
        if not self._ranks.is_main:  # only the main rank checks clocks and files
            return None
        if self._max_minutes is not None and self._clock() - self._started >= 60 * self._max_minutes:
            return f"--max-minutes {self._max_minutes:g} reached"
        return f"found {self._files[Request.STOP]}" if self._files[Request.STOP].exists() else None

    def _is_time_to_save(self, step: int) -> bool:
        if not self._ranks.is_main:
            return False
        by_steps = self._save_steps is not None and step % self._save_steps == 0
        by_clock = self._save_minutes is not None and self._clock() - self._saved >= 60 * self._save_minutes
        return by_steps or by_clock or self._files[Request.SAVE].exists()
