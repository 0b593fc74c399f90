"""Let the ranks meet before their process group starts, and say who is missing or whose port it is.

    rank 0 listens on MASTER_ADDR:MASTER_PORT, every rank claims its number there and waits for the others
    a rank that does not come within `limit` seconds       RankLost on the others, with its number
    a port that another program has                        ConfigError on every rank, with the remedy

torch alone waits ten minutes or more, names nobody, and waits without end for a server that does not answer.

    python -m coconut_ds.engine.rendezvous     prints a port that is free on this machine, for launch/*.sh
"""

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from coconut_ds.errors import ConfigError, RankLost, port_in_use

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# Below the ports that sockets get which ask for none: gloo's would take it before it is used.
PORTS = (20000, 32000)
ANSWER_SECONDS = 15.0  # how long rank 0's store may take to answer, and then to name rank 0
FAREWELL_SECONDS = 5.0  # how long rank 0 keeps its store for ranks that still read from it
POLL_SECONDS = 0.1
FOREVER = 1e9


def free_port() -> int:
    """A port that no program of this machine listens on now."""
    while True:
        port = random.randint(*PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def meet(rank: int, world_size: int, limit: float, problem: str | None = None) -> "TCPStore":
    """Wait for all ranks; the store returned must live until the process group has started.  Collective.

    `limit` in seconds, 0: without end.  `problem`: why this rank cannot take part, raised as ConfigError on
    all ranks.  Raises RankLost where a rank is missing, ConfigError where the port is another program's.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Under torchrun its agent has the store, through all restarts; else rank 0 has.
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
        raise port_in_use(address, port)  # by a rank of the same number, so of another run
    keys = [f"{prefix}/rank_{other}" for other in range(world_size)]
    store.set(keys[rank], problem or "")
    if not of_agent:
        answer = min(deadline, time.monotonic() + ANSWER_SECONDS)
        _wait(lambda: store.check(keys[:1]), answer, lambda: port_in_use(address, port))

    def absent() -> RankLost:
        missing = [other for other in range(world_size) if not store.check([keys[other]])]
        return _missing(missing, world_size, limit, where)

    _wait(lambda: store.check(keys), deadline, absent)
    problems = [text for key in keys if (text := store.get(key).decode())]
    if problems:
        _leave(store, f"{prefix}/left", rank, world_size)
        raise ConfigError(problems[0])
    return store


def _listen(address: str, port: int, world_size: int) -> "TCPStore":
    from torch.distributed import DistNetworkError, TCPStore  # printing a free port need not wait for torch

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
    """The store behind a port that accepts connections.  A client would wait without end for an answer."""
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
        f"rank {os.environ['RANK']}: rank {names} of {world_size} did not come to {where} within {limit:g} "
        "s; look for its message, and start again. --stuck-seconds N waits longer."
    )


def _leave(store: "TCPStore", key: str, rank: int, world_size: int) -> None:
    """Have rank 0, whose process holds the store, end after the others."""
    store.add(key, 1)
    deadline = time.monotonic() + FAREWELL_SECONDS
    while rank == 0 and store.add(key, 0) < world_size and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    print(free_port())
