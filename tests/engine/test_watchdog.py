"""Ranks that do not connect, a run without progress and a loss that diverges end the run with the reason."""

import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from coconut_ds.data.batching import Batch
from coconut_ds.engine.deepspeed_patches import SCALER_AT_MINIMUM
from coconut_ds.engine.engine import Engine
from coconut_ds.engine.watchdog import HEARTBEATS, LossGuard, Watchdog, free_port, meet
from coconut_ds.errors import ConfigError, Diverged, RankLost, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    number = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("coconut_ds.engine.watchdog.ANSWER_SECONDS", 2.0)
    return number


def meet_all(*ranks: tuple[int, str | None], limit: float = 20.0) -> list[object]:
    """The result of `meet` on two ranks, in threads: a store or an error."""

    def one(rank: int, problem: str | None) -> object:
        try:
            return meet(rank, 2, limit, problem)
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return [future.result() for future in [pool.submit(one, *rank) for rank in ranks]]


def test_all_are_there() -> None:
    stores = meet_all((1, None), (0, None))
    assert all(isinstance(store, TCPStore) for store in stores)


@pytest.mark.parametrize("there, missing", [(0, 1), (1, 0)])
def test_a_rank_that_does_not_come_is_named(there: int, missing: int, port: int) -> None:
    started = time.monotonic()
    (error,) = meet_all((there, None), limit=1.0)
    assert isinstance(error, RankLost) and time.monotonic() - started < 15
    assert f"rank {missing} of 2 did not connect to 127.0.0.1:{port} within 1 s" in str(error)


def test_what_one_rank_cannot_do_is_known_to_all() -> None:
    errors = meet_all((0, None), (1, "local rank 1 has no GPU"))
    assert [(type(error), str(error)) for error in errors] == [(ConfigError, "local rank 1 has no GPU")] * 2


@pytest.fixture(params=["silent", "web server"])
def other_program(request: pytest.FixtureRequest, port: int) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", port)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        if request.param == "web server":
            threading.Thread(target=serve, daemon=True).start()
        yield


@pytest.mark.usefixtures("other_program")
def test_a_port_of_another_program_ends_every_rank_with_the_remedy(port: int) -> None:
    for error in meet_all((0, None), (1, None), limit=60.0):
        assert isinstance(error, ConfigError)
        assert f"127.0.0.1:{port}: another program uses this port" in str(error)
        assert "--master_port N" in str(error) and "MASTER_PORT=N" in str(error)


def test_a_port_of_another_run_is_not_joined(port: int) -> None:
    stores = meet_all((0, None), (1, None))
    (error,) = meet_all((1, None))
    assert isinstance(error, ConfigError) and "another program uses this port" in str(error)
    assert len(stores) == 2


def test_a_store_without_rank_0_is_another_runs(port: int) -> None:
    store = TCPStore("127.0.0.1", port, 2, True, wait_for_workers=False)
    (error,) = meet_all((1, None), limit=60.0)
    assert isinstance(error, ConfigError) and "another program uses this port" in str(error)
    del store


def test_ports_are_drawn_in_one_way_and_are_free(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        draws = iter([port, port, port + 1 if port < 32000 else 20000])
        monkeypatch.setattr("random.randint", lambda *_: next(draws))
        assert free_port() != port
    program = "from coconut_ds.engine.watchdog import free_port; print(free_port())"
    command = [sys.executable, "-X", "importtime", "-c", program]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert 20000 <= int(printed.stdout) <= 32000 and "| torch" not in printed.stderr
    scripts = [*(ROOT / "launch").glob("*.s*"), *(ROOT / "coconut_ds").rglob("*.py")]
    drawing = [path.name for path in scripts if "RANDOM %" in path.read_text(encoding="utf-8")]
    assert drawing == []


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


@pytest.fixture
def batch() -> Batch:
    ids = torch.tensor([[5, 6, 7]])
    return Batch.from_padded(ids, torch.ones_like(ids), torch.arange(3)[None], ids, latent_id=99)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("applied", [True, False])
def test_a_loss_that_is_not_finite(tmp_path: Path, batch: Batch, loss: float, applied: bool) -> None:
    guard = LossGuard(tmp_path, rank=3)
    guard.check(1, 0.5, True, [batch], torch.tensor([0.5]))
    with pytest.raises(Diverged, match="loss of step 2"):
        guard.check(2, loss, applied, [batch, batch], torch.tensor([0.25, loss]))
    records = json.loads((tmp_path / "diverged/step_2_rank_3.json").read_text())
    assert [record["loss"] for record in records][0] == 0.25 and records[1]["loss"] is None
    assert records[0]["input_ids"] == [[5, 6, 7]] and records[0]["problems"] == [0]


def test_an_overflow_is_not_the_end_but_many_in_a_row_are(tmp_path: Path, batch: Batch) -> None:
    guard = LossGuard(tmp_path, rank=0, max_skipped=3)
    for applied in (False, False, True, False, False):
        guard.check(1, 1.0, applied, [batch], torch.tensor([1.0]))
    with pytest.raises(Diverged, match="3 steps in a row"):
        guard.check(9, 1.0, False, [batch], torch.tensor([1.0]))


def test_a_loss_scale_at_its_minimum_is_a_divergence():
    class Overflowing:
        def get_lr(self):
            return [1e-3]

        def step(self):
            raise Exception(f"Current {SCALER_AT_MINIMUM} - cannot decrease scale anymore. Exiting run.")

    engine = Engine.__new__(Engine)
    engine._engine, engine._optimizer = Overflowing(), None
    with pytest.raises(Diverged, match="train in fp32"):
        engine.step()
