"""End a run that cannot continue, and say why: a rank does not connect, nothing moves, the loss diverges.

    free_port, meet     all ranks connect before the process group starts, or a message names the missing one
    ended_after         a time limit for what has none
    Watchdog            rank 1 stopped at beat 812 (step 40, 300 s ago); rank 0 waits at beat 813
                        stack traces of all threads -> stderr and RUN/stuck/rank_0.txt; exit code 77
    LossGuard           the batch that made the loss non-finite -> RUN/diverged/; exit code 76

Heartbeats are files in the run folder.  No clock is shared: a rank counts the seconds since it saw a beat
change, without those in which it was itself suspended.  torch, NCCL and gloo alone time out after ten minutes
or more, and then name neither the rank nor the operation.
"""

import faulthandler
import json
import math
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

from coconut_ds.errors import ConfigError, Diverged, RankLost, port_in_use
from coconut_ds.files import json_text, make_folder, open_append, replace_text

if TYPE_CHECKING:  # printing a free port does not need torch
    from torch import Tensor
    from torch.distributed import TCPStore

    from coconut_ds.data.batching import Batch

# Below the range of automatically assigned ports: gloo's sockets could take one of those first.
PORTS = (20000, 32000)
ANSWER_SECONDS = 15.0  # time for rank 0's store to answer, and then for rank 0 to register
FAREWELL_SECONDS = 5.0  # how long rank 0 keeps its store open for ranks that still read from it
POLL_SECONDS = 0.1
FOREVER = 1e9
HEARTBEATS, STACKS = ".heartbeats", "stuck"
# Several ranks may detect this at once; each needs time to write its stacks before one of them exits.
LAST_WORDS_SECONDS = 2.0
# A check that comes this many periods late means that this process was suspended or starved of CPU.
ASLEEP_PERIODS = 10
DIVERGED = "diverged"
# fp16 starts at a loss scale of 2^16 and halves it after two overflows: 2 x 16 skips reach scale 1.
MAX_SKIPPED = 40


def free_port() -> int:
    """A port that no program on this machine is listening on."""
    while True:
        port = random.randint(*PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def meet(rank: int, world_size: int, limit: float, message: str | None = None) -> "TCPStore":
    """Wait for all ranks. Keep the returned store until the process group has started.  Collective.

    `limit` in seconds; 0 disables it.  `message`: why this rank cannot take part, raised as ConfigError on
    all ranks.  Raises RankLost if a rank is missing, ConfigError if another program uses the port.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Under torchrun the agent owns the store through all restarts; otherwise rank 0 does.
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + (limit or FOREVER)
    where = f"{address}:{port}"
    if rank == 0 and not of_agent:
        store = _listen(address, port, world_size)
    else:
        _wait(lambda: _accepts(address, port), deadline, lambda: _missing([0], world_size, limit, where))
        store = _connect(address, port, world_size)
    prefix = f"coconut_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if store.add(f"{prefix}/claim_{rank}", 1) > 1:
        raise port_in_use(address, port)  # another run has a rank with the same number here
    keys = [f"{prefix}/rank_{other}" for other in range(world_size)]
    store.set(keys[rank], message or "")
    if not of_agent:
        answer = min(deadline, time.monotonic() + ANSWER_SECONDS)
        _wait(lambda: store.check(keys[:1]), answer, lambda: port_in_use(address, port))

    def lost() -> RankLost:
        missing = [other for other in range(world_size) if not store.check([keys[other]])]
        return _missing(missing, world_size, limit, where)

    _wait(lambda: store.check(keys), deadline, lost)
    messages = [text for key in keys if (text := store.get(key).decode())]
    if messages:
        _leave(store, f"{prefix}/left", rank, world_size)
        raise ConfigError(messages[0])
    return store


def _listen(address: str, port: int, world_size: int) -> "TCPStore":
    from torch.distributed import DistNetworkError, TCPStore

    try:
        return TCPStore(address, port, world_size, True, wait_for_workers=False, multi_tenant=True)
    except DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise port_in_use(address, port) from error
        raise


def _accepts(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=5):
        return True
    return False


def _connect(address: str, port: int, world_size: int) -> "TCPStore":
    """Connect to the store, in a thread: the client itself has no timeout for an answer."""
    from torch.distributed import DistError, TCPStore

    stores = []

    def connect() -> None:
        timeout = timedelta(seconds=ANSWER_SECONDS / 2)
        with suppress(DistError):
            stores.append(TCPStore(address, port, world_size, False, timeout, wait_for_workers=False))

    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not stores:
        raise port_in_use(address, port)
    return stores[0]


def _wait(done: Callable[[], bool], deadline: float, failure: Callable[[], Exception]) -> None:
    while not done():
        if time.monotonic() > deadline:
            raise failure()
        time.sleep(POLL_SECONDS)


def _missing(ranks: list[int], world_size: int, limit: float, where: str) -> RankLost:
    names = ", ".join(map(str, ranks))
    return RankLost(
        f"rank {os.environ['RANK']}: rank {names} of {world_size} did not connect to {where} within "
        f"{limit:g} s; look for its message, then start again. To wait longer: --stuck-seconds N."
    )


def _leave(store: "TCPStore", key: str, rank: int, world_size: int) -> None:
    """Let rank 0, which owns the store, end after the others."""
    store.add(key, 1)
    deadline = time.monotonic() + FAREWELL_SECONDS
    while rank == 0 and store.add(key, 0) < world_size and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


@contextmanager
def ended_after(limit: float, doing: str) -> Iterator[None]:
    """Abort this process if the context takes longer than `limit` seconds (0: never)."""

    def end() -> None:
        rank, cause = os.environ.get("RANK", "0"), "another rank died or is unreachable"
        os.write(2, f"error: rank {rank}: {doing} took more than {limit:g} s; {cause}\n".encode())
        os._exit(RankLost.exit_code)

    timer = threading.Timer(limit, end)
    timer.daemon = True
    if limit > 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclass(frozen=True)
class Beat:
    count: int = 0
    doing: str = "starting"


class Watchdog:
    """A thread that expects `beat` at least every `limit` seconds; use it as a context manager."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        limit: float,
        *,
        end: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit` in seconds; 0 disables it.  `folder`: for the heartbeats and stacks of all ranks."""
        self.folder, self.rank, self.world_size, self.limit = folder, rank, world_size, limit
        self._end, self._clock = end, clock
        self._beat, self._patience = Beat(), 1.0
        self._period = min(1.0, limit / 10)
        self._looked = clock()
        self._changed: dict[int, tuple[int, float]] = {}  # rank -> its count, when this rank first saw it
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self.limit > 0:
            with suppress(OSError):  # the watchdog must work on a full disk
                make_folder(self.folder / HEARTBEATS)
            self._publish(self._beat)  # replaces the heartbeat of an earlier run
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self.limit > 0:
            self._thread.join()
            self._heartbeat(self.rank).unlink(missing_ok=True)
            with suppress(OSError):  # another rank is still running
                (self.folder / HEARTBEATS).rmdir()

    def beat(self, doing: str, patience: float = 1.0) -> None:
        """Report progress: this rank does `doing` next, which may take `patience` times the limit.

        All ranks beat at the same points, so the rank with the fewest beats is the one they wait for.
        """
        self._patience = patience
        self._beat = Beat(self._beat.count + 1, doing)

    def _watch(self) -> None:
        self._looked = self._clock()
        while not self._stop.wait(self._period):
            if self._is_stuck():
                self._report(self._beat)
                self._end(RankLost.exit_code)
                return

    def _is_stuck(self) -> bool:
        """Check once whether this rank has made no progress for too long."""
        now, beat = self._clock(), self._beat
        if now - self._looked > ASLEEP_PERIODS * self._period:  # restart the time of all ranks
            self._changed = {rank: (count, now) for rank, (count, _) in self._changed.items()}
        self._looked = now
        self._publish(beat)
        idle = self._idle(self.rank, beat, now)
        if idle > self.limit / 4:  # before that, do not read the files of other ranks
            for rank, other in self._beats().items():
                self._idle(rank, other, now)
        return idle > self.limit * self._patience

    def _idle(self, rank: int, beat: Beat, now: float) -> float:
        """Seconds since this rank first saw a beat of `rank`."""
        count, since = self._changed.get(rank, (-1, now))
        if count != beat.count:
            self._changed[rank] = (beat.count, now)
            return 0.0
        return now - since

    def _heartbeat(self, rank: int) -> Path:
        return self.folder / HEARTBEATS / f"rank_{rank}.json"

    def _publish(self, beat: Beat) -> None:
        with suppress(OSError):  # the watchdog must work on a full disk
            replace_text(self._heartbeat(self.rank), json_text(asdict(beat)), durable=False)

    def _beats(self) -> dict[int, Beat]:
        beats = {}
        for rank in range(self.world_size):
            with suppress(OSError, ValueError, TypeError):
                beats[rank] = Beat(**json.loads(self._heartbeat(rank).read_text()))
        return beats

    def describe(self) -> str:
        """The last operation of every rank, the ones that the others wait for first."""
        now = self._clock()
        beats = self._beats()
        fewest = min((beat.count for beat in beats.values()), default=0)
        behind = [rank for rank, beat in beats.items() if beat.count == fewest]
        states = [
            f"rank {rank}: {beat.doing} (beat {beat.count}), at least {self._idle(rank, beat, now):.0f} s ago"
            for rank, beat in sorted(beats.items(), key=lambda item: item[1].count)
        ]
        if len(behind) < len(beats):
            head = f"waiting for rank {', '.join(map(str, behind))}, which makes no progress"
        else:
            head = "all ranks stopped at the same point"
        return f"{head}. Last seen: " + "; ".join(states)

    def _report(self, beat: Beat) -> None:
        idle = self._idle(self.rank, beat, self._clock())
        message = (
            f"error: rank {self.rank}: no progress for {idle:.0f} s: {self.describe()}. "
            f"Stack traces: {self.folder / STACKS}. "
            "Run the same command to resume from the newest checkpoint."
        )
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        with suppress(OSError, ConfigError):
            file = make_folder(self.folder / STACKS) / f"rank_{self.rank}.txt"
            file.unlink(missing_ok=True)
            with open_append(file, "a") as writer:
                writer.write(message + "\n")
                writer.flush()
                faulthandler.dump_traceback(file=writer, all_threads=True)
        time.sleep(LAST_WORDS_SECONDS)


@dataclass
class LossGuard:
    """Checks every step for divergence; `folder` is the run folder."""

    folder: Path
    rank: int
    max_skipped: int = MAX_SKIPPED
    _skipped: int = 0

    def check(
        self, step: int, loss: float, applied: bool, batches: "Sequence[Batch]", losses: "Tensor"
    ) -> None:
        """Raise Diverged on every rank if training cannot continue.

        `loss`: summed over ranks, so all ranks see the same one.  `applied`: false if gradients overflowed
        and DeepSpeed skipped the step, which it does in fp32 too, without end.  `batches`, `losses`: this
        rank's micro-batches and their losses, which are then written to a file.
        """
        self._skipped = 0 if applied else self._skipped + 1
        if not math.isfinite(loss):
            reason = f"the loss of step {step} is {loss}"
        elif self._skipped >= self.max_skipped:
            reason = f"{self._skipped} steps in a row overflowed and were skipped, up to step {step}"
        else:
            return
        file = self.folder / DIVERGED / f"step_{step}_rank_{self.rank}.json"
        try:
            write_batches(file, batches, losses.tolist())
            where = f"The batch of each rank is in {file.parent}."
        except OSError as error:
            where = f"The batch of this rank could not be written ({error})."
        raise Diverged(
            f"{reason}. {where} The newest checkpoint is from before that step. "
            "Before you resume, lower 'lr' or 'gradient_clipping', or fix the data"
        )


def write_batches(file: Path, batches: "Sequence[Batch]", losses: Sequence[float]) -> None:
    """Write one JSON file with the loss, problem numbers and token ids of every micro-batch."""
    make_folder(file.parent)
    records = [
        {
            "loss": loss,
            "problems": batch.indices,
            "input_ids": batch.input_ids_BT.tolist(),
            "labels": batch.labels_BT.tolist(),
            "num_latents": batch.num_latents,
        }
        for batch, loss in zip(batches, losses, strict=True)
    ]
    replace_text(file, json_text(records, indent=1))
