"""Signals, files and clocks make the same request on all ranks."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from coconut_ds.distributed import (
    PID_FOLDER,
    Request,
    Requests,
    Signals,
    is_launcher,
    refuse_lone_process,
)
from coconut_ds.errors import ConfigError


class OneRank:
    """This rank, and the requests of the others."""

    def __init__(self, is_main: bool = True, others: float = 0.0, others_reason: str = "") -> None:
        self.is_main, self.others, self.others_reason = is_main, others, others_reason

    def gather(self, value: str) -> list[str]:
        return [value, self.others_reason]

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        return [max(value, self.others) for value in values]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def after_step(requests: Requests, step: int) -> Request:
    """As the trainer asks, with one rank."""
    return Request.highest(requests.counts(step))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    old = signal.getsignal(number)
    with Signals() as signals:
        requests = Requests(signals, OneRank(), tmp_path)
        assert after_step(requests, 1) is Request.NOTHING
        os.kill(os.getpid(), number)
        wait_for(lambda: signals.received)
        assert requests.poll() is Request.STOP
        assert number.name in requests.reason()
    assert signal.getsignal(number) is old


def test_a_request_of_any_rank_is_everyones(tmp_path: Path) -> None:
    other = OneRank(is_main=False, others=float(Request.STOP), others_reason="received SIGUSR1")
    requests = Requests(Signals(), other, tmp_path)
    assert requests.poll() is Request.STOP and requests.reason() == "received SIGUSR1"


def test_files(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()  # left over from before
    requests = Requests(Signals(), OneRank(), tmp_path)
    assert after_step(requests, 1) is Request.NOTHING
    (tmp_path / "SAVE").touch()
    assert requests.poll() is Request.NOTHING  # inside an evaluation there is nothing to save
    assert after_step(requests, 2) is Request.SAVE
    requests.saved()
    assert after_step(requests, 3) is Request.NOTHING and not (tmp_path / "SAVE").exists()
    (tmp_path / "STOP").touch()
    assert requests.poll() is Request.STOP
    assert "STOP" in requests.reason() and not (tmp_path / "STOP").exists()


def test_only_the_main_rank_looks_at_files(tmp_path: Path) -> None:
    requests = Requests(Signals(), OneRank(is_main=False), tmp_path, max_minutes=0, save_steps=1)
    (tmp_path / "STOP").touch()
    assert after_step(requests, 1) is Request.NOTHING


def test_steps_and_minutes(tmp_path: Path) -> None:
    clock = Clock()
    requests = Requests(
        Signals(), OneRank(), tmp_path, save_minutes=2, save_steps=10, max_minutes=60, clock=clock
    )
    assert [step for step in range(1, 31) if after_step(requests, step) is Request.SAVE] == [10, 20, 30]
    clock.now = 125
    assert after_step(requests, 31) is Request.SAVE
    requests.saved()
    assert after_step(requests, 32) is Request.NOTHING
    clock.now = 3600
    assert after_step(requests, 33) is Request.STOP and "--max-minutes 60" in requests.reason()


def start(program: str, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


# The main thread waits in C and never returns to Python, as in a collective.
BUSY = """
    import ctypes
    from coconut_ds.distributed import Signals
    with Signals():
        print("ready", flush=True)
        libc = ctypes.CDLL(None)
        libc.sem_init(semaphore := ctypes.create_string_buffer(64), 0, 0)
        while libc.sem_wait(semaphore):
            pass
"""


def test_second_signal_ends_at_once_but_not_a_repeated_one() -> None:
    process = start(BUSY)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for _ in range(3):  # Ctrl-C reaches a rank directly and again through its launchers
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    time.sleep(2.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    assert process.stderr is not None and "exits now, nothing saved" in process.stderr.read()


# The main thread computes in Python, as planning does.
PLANNING = """
    from coconut_ds.distributed import Signals
    with Signals() as signals:
        with signals.nothing_to_save():
            print("ready", flush=True)
            while True:
                sum(range(1000))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_training_ends_at_once(number: signal.Signals) -> None:
    process = start(PLANNING)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    assert process.stderr is not None and f"received {number.name} before training" in process.stderr.read()


def test_a_rank_that_a_launcher_ends_points_to_the_error_of_another() -> None:
    process = start(PLANNING, WORLD_SIZE="2")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert (
        process.stderr is not None and "if another rank failed, its error is above" in process.stderr.read()
    )


@pytest.mark.parametrize("words, number", [("--num_processes 2", 2), ("--num-processes=4", 4), ("", 0)])
def test_accelerate_without_a_gpu_starts_one_process(monkeypatch, words, number):
    command = f"python accelerate launch --cpu {words} -m coconut_ds train c.yaml".split()
    monkeypatch.setattr("psutil.Process.cmdline", lambda self: command)
    monkeypatch.setattr(sys, "argv", ["coconut_ds", "train", "c.yaml"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refuse_lone_process()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    if not number:
        refuse_lone_process()
        return
    with pytest.raises(ConfigError, match=f"write: torchrun --nproc_per_node {number} -m coconut_ds train"):
        refuse_lone_process()


def test_ranks_leave_their_process_ids(tmp_path: Path) -> None:
    process = start(
        "from coconut_ds.distributed import Signals\nwith Signals(): pass", **{PID_FOLDER: str(tmp_path)}
    )
    assert process.wait(timeout=120) == 0
    assert [path.name for path in tmp_path.iterdir()] == [str(process.pid)]


@pytest.mark.parametrize(
    "command, expected",
    [
        ("python /venv/bin/deepspeed --num_gpus 2 --module coconut_ds train c.yaml", True),
        ("python -u -m deepspeed.launcher.launch --world_info=x coconut_ds", True),
        ("python /venv/bin/torchrun --nproc-per-node 2 -m coconut_ds train c.yaml", True),
        ("python -m torch.distributed.run --nproc-per-node 2 -m coconut_ds", True),
        ("python /venv/bin/accelerate launch -m coconut_ds train c.yaml", True),
        ("python -m coconut_ds train c.yaml --deepspeed d.json", False),
        ("-bash", False),
    ],
)
def test_ranks_know_the_launchers_that_can_leave_them(command, expected):
    assert is_launcher(command.split()) is expected


def test_a_shell_that_names_a_ds_config_is_no_launcher():
    """The shell of `ssh host 'python -m coconut_ds ... &'` ends, and the run continues."""
    assert not is_launcher(["bash", "-c", "python -m coconut_ds train c.yaml --deepspeed_config d.json &"])
