"""Abort a run that makes no progress, and name the rank that the others wait for.

    rank 1 stopped at beat 812 (step 40, 300 s ago); rank 0 waits at beat 813
    stack traces of all threads -> stderr and RUN/stuck/rank_0.txt; exit code 77

Heartbeats are files in the run folder.  No clock is shared: a rank counts the seconds since it saw a beat
change, without those in which it was itself suspended.  NCCL and gloo time out after ten minutes or more, and
then name neither the rank nor the operation.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from coconut_ds.errors import ConfigError, RankLost
from coconut_ds.files import json_text, make_folder, open_append, replace_text

HEARTBEATS, STACKS = ".heartbeats", "stuck"
# Several ranks may detect this at once; each needs time to write its stacks before one of them exits.
LAST_WORDS_SECONDS = 2.0
# A check that comes this many periods late means that this process was suspended or starved of CPU.
ASLEEP_PERIODS = 10


@contextmanager
def ended_after(limit: float, doing: str) -> Iterator[None]:
    """Abort this process if the context takes longer than `limit` seconds (0: never)."""

    def end() -> None:
        rank = os.environ.get("RANK", "0")
        message = (
            f"error: rank {rank}: {doing} took more than {limit:g} s; another rank died or is unreachable\n"
        )
        os.write(2, message.encode())
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
        self._end = end
        self._clock = clock
        self._beat = Beat()
        self._patience = 1.0
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
