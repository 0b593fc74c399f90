"""A run without progress is aborted, and the message names the rank it waits for."""

import threading
import time
from pathlib import Path

import pytest

from coconut_ds.engine.watchdog import HEARTBEATS, Watchdog
from coconut_ds.errors import RankLost


def test_a_rank_that_sleeps_is_named_by_the_others(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr("coconut_ds.engine.watchdog.LAST_WORDS_SECONDS", 0.0)
    ended = threading.Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    with (
        Watchdog(tmp_path, 0, 2, 1.0, end=end) as awake,
        Watchdog(tmp_path, 1, 2, 3.0, end=end) as asleep,
    ):
        asleep.beat("step 1")
        for step in (1, 2):
            awake.beat(f"step {step}")
        time.sleep(0.2)
        assert not ended.is_set()
        assert ended.wait(timeout=10)
    assert codes == [RankLost.exit_code]
    output = capfd.readouterr().err
    assert "waiting for rank 1, which makes no progress" in output
    assert "rank 1: step 1 (beat 1)" in output and "rank 0: step 2 (beat 2)" in output
    assert "most recent call first" in output and __file__ in output  # the stack of this very function
    assert "waiting for rank 1" in (tmp_path / "stuck/rank_0.txt").read_text()


def test_a_rank_that_moves_is_left_alone(tmp_path: Path) -> None:
    codes: list[int] = []
    with Watchdog(tmp_path, 0, 1, 0.3, end=codes.append) as watchdog:
        for step in range(10):
            watchdog.beat(f"step {step}")
            time.sleep(0.05)
        watchdog.beat("saving", patience=10)
        time.sleep(0.6)
    assert codes == [] and list(tmp_path.iterdir()) == []


def test_all_at_the_same_place(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 1, 60) as watchdog:
        assert "all ranks stopped at the same point" in watchdog.describe()


def test_no_limit_no_watch(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "missing", 0, 1, 0) as watchdog:
        watchdog.beat("anything")
    assert not (tmp_path / "missing").exists()


class Clock:
    """A monotonic clock that is set by hand, independent of the time of day."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def watched(folder: Path, rank: int, clock: Clock, limit: float = 300.0) -> Watchdog:
    (folder / HEARTBEATS).mkdir(exist_ok=True)
    return Watchdog(folder, rank, 2, limit, clock=clock)


def look(watchdogs: list[Watchdog], clock: Clock, seconds: int) -> list[bool]:
    """Whether each was stuck at any check, with one check per second."""
    stuck = [False] * len(watchdogs)
    for _ in range(seconds):
        clock.now += 1
        stuck = [watchdog._is_stuck() or was for watchdog, was in zip(watchdogs, stuck, strict=True)]
    return stuck


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 1e9])
def test_the_time_of_day_may_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    codes: list[int] = []
    real = time.time
    with Watchdog(tmp_path, 0, 1, 2.0, end=codes.append) as watchdog:
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        watchdog.beat("step 1")
        time.sleep(0.7)
        monkeypatch.setattr(time, "time", real)
        time.sleep(0.7)
    assert codes == []


def test_ranks_that_slept_together_go_on(tmp_path: Path) -> None:
    """A laptop suspended for an hour while its clock continued: no rank is stuck."""
    clock = Clock()
    both = [watched(tmp_path, rank, clock) for rank in (0, 1)]
    assert look(both, clock, 290) == [False, False]
    clock.now += 3600
    assert look(both, clock, 100) == [False, False]
    both[0].beat("step 2")
    both[1].beat("step 2")
    assert look(both, clock, 290) == [False, False]


def test_a_rank_that_stays_asleep_is_named_whatever_its_clock_says(tmp_path: Path) -> None:
    clock, other_clock = Clock(), Clock()
    other_clock.now = 5.0  # of another machine
    awake, asleep = watched(tmp_path, 0, clock), watched(tmp_path, 1, other_clock)
    asleep._is_stuck()  # publishes its beat, and never looks again
    awake.beat("step 1")
    assert look([awake], clock, 299) == [False]
    assert look([awake], clock, 3) == [True]
    output = awake.describe()
    assert "waiting for rank 1, which makes no progress" in output
    assert "rank 0: step 1 (beat 1), at least 301 s ago" in output
    # Others are looked at after a quarter of the limit.
    assert "rank 1: starting (beat 0), at least 225 s ago" in output
