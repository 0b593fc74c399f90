"""Ranks connect, or all report the missing rank, the port in use, or the error of another rank."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from coconut_ds.engine import rendezvous
from coconut_ds.engine.rendezvous import free_port, meet
from coconut_ds.errors import ConfigError, RankLost, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    number = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 2.0)
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
        monkeypatch.setattr(rendezvous.random, "randint", lambda *_: next(draws))
        assert free_port() != port
    command = [sys.executable, "-X", "importtime", "-m", "coconut_ds.engine.rendezvous"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert 20000 <= int(printed.stdout) <= 32000 and "| torch" not in printed.stderr
    scripts = [*(ROOT / "launch").glob("*.s*"), *(ROOT / "coconut_ds").rglob("*.py")]
    drawing = [path.name for path in scripts if "RANDOM %" in path.read_text(encoding="utf-8")]
    assert drawing == []
