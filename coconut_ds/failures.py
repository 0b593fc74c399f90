"""Tell failures apart by what they are: a lost rank, a port in use, no memory, no room on the disk.

gloo, NCCL, c10d and torch.save raise RuntimeErrors for all of them, and libraries wrap those in errors of
their own, so an error's causes are looked at too.

    DistError, "Connection closed by peer", "ncclRemoteError", ...     another rank died or the link is cut
    "EADDRINUSE"                                                       the rendezvous port is taken
    MemoryError, "out of memory", ...                                  an allocator gave up
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from coconut_ds.errors import RankLost, UserError, first_line, port_in_use

# What gloo, c10d's store and NCCL say when the other end of a connection is gone or does not answer.
LOST = (
    "connection closed",
    "connection reset",
    "connection was reset",
    "connection refused",
    "broken pipe",
    "socket timeout",
    "timed out",
    "remote peer",
    "remote process exited",
    "recv failed",
    "nccl communicator was aborted",
    "nccl timeout",
    "ncclremoteerror",
    "ncclsystemerror",
    "ncclinternalerror",
    "unhandled system error",
    "watchdog caught collective operation timeout",
)
# NCCL errors that blame this rank's own call or GPU.
OWN_FAULT = ("ncclinvalidusage", "ncclinvalidargument", "ncclunhandledcudaerror", "nccl error 1:")
NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "std::bad_alloc")
PHASE = "coconut_ds_phase"  # attribute of an error
PORT_IN_USE = ("eaddrinuse", "address already in use")


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank died or cannot be reached."""
    return not is_out_of_memory(error) and any(_says_lost(cause) for cause in _causes(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of the GPU, of torch's CPU tensors or of Python gave up."""
    return any(_says_no_memory(cause) for cause in _causes(error))


def is_port_in_use(error: BaseException) -> bool:
    """Whether rank 0 cannot listen because another program has the port."""
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
    """The error and what it was raised from; a UserError is the last word on its own cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, UserError):
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What this rank is doing, for the message if memory runs out; the innermost phase counts.

    Also a decorator: `@phase("forward")`.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, PHASE):
            setattr(error, PHASE, name)
        raise


def phase_of(error: BaseException) -> str:
    """The innermost phase that an error left."""
    names = [str(getattr(cause, PHASE)) for cause in _causes(error) if hasattr(cause, PHASE)]
    return names[-1] if names else "between phases"


@contextmanager
def lost_ranks_explained() -> Iterator[None]:
    """Turn the error of a collective after another rank died, or the link was cut, into RankLost."""
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
            "reached; look for its message. Start again to go on from the newest checkpoint. "
            f"({first_line(cause)})"
        ) from error
