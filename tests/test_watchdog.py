"""A run that does not move ends, and says which rank it waits for."""

import threading
import time
from pathlib import Path

from coconut_ds.errors import RankLost
from coconut_ds.watchdog import Watchdog


def test_a_rank_that_sleeps_is_named_by_the_others(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr("coconut_ds.watchdog.LAST_WORDS_SECONDS", 0.0)
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
    said = capfd.readouterr().err
    assert "waiting for rank 1, which stopped moving" in said
    assert "rank 1: step 1 (beat 1)" in said and "rank 0: step 2 (beat 2)" in said
    assert "most recent call first" in said and __file__ in said  # the stack of this very function
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
        assert "all ranks stopped at the same place" in watchdog.describe()


def test_no_limit_no_watch(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "absent", 0, 1, 0) as watchdog:
        watchdog.beat("anything")
    assert not (tmp_path / "absent").exists()
