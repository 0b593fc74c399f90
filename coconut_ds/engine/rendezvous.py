"""Connect all ranks before the process group starts, and name missing ranks and ports in use.

    rank 0 listens on MASTER_ADDR:MASTER_PORT; every rank registers there and waits for the others
    a rank does not connect within `limit` seconds         RankLost on the others, with its number
    another program uses the port                          ConfigError on every rank, with the fix

torch alone waits ten minutes or more, names no rank, and never times out on a server that does not answer.

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

# Below the range of automatically assigned ports: gloo's sockets could take one of those first.
PORTS = (20000, 32000)
ANSWER_SECONDS = 15.0  # time for rank 0's store to answer, and then for rank 0 to register
FAREWELL_SECONDS = 5.0  # how long rank 0 keeps its store open for ranks that still read from it
POLL_SECONDS = 0.1
FOREVER = 1e9


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
    from torch.distributed import DistNetworkError, TCPStore  # printing a free port does not need torch

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


if __name__ == "__main__":
    print(free_port())
