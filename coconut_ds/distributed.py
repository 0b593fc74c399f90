"""Ranks and their collectives, and failures told apart: a lost rank, a port in use, no memory, a full disk.

gloo, NCCL, c10d and torch.save raise RuntimeError for all of them, and libraries wrap those in their own
errors, so the causes of an error are checked too.

    DistError, "Connection closed by peer", "ncclRemoteError", ...     another rank died or the link is cut
    "EADDRINUSE"                                                       the rendezvous port is taken
    MemoryError, "out of memory", ...                                  an allocator gave up
"""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from coconut_ds.errors import RankLost, UserError, first_line, port_in_use

Result = TypeVar("Result")
# Messages of gloo, c10d's store and NCCL if the other end of a connection is gone or does not answer.
LOST = (
    "connection closed", "connection reset", "connection was reset", "connection refused", "broken pipe",
    "socket timeout", "timed out", "remote peer", "remote process exited", "recv failed",
    "nccl communicator was aborted", "nccl timeout", "ncclremoteerror", "ncclsystemerror",
    "ncclinternalerror", "unhandled system error", "watchdog caught collective operation timeout",
)  # fmt: skip
# NCCL errors that blame this rank's own call or GPU.
OWN_FAULT = ("ncclinvalidusage", "ncclinvalidargument", "ncclunhandledcudaerror", "nccl error 1:")
NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "std::bad_alloc")
PHASE = "coconut_ds_phase"  # attribute of an error
PORT_IN_USE = ("eaddrinuse", "address already in use")


@dataclass(eq=False)
class Ranks:
    """This process among all ranks; every method is collective."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(reduced, op=operation)
        return reduced.tolist()

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Exact sums (float64) of each value over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any_over_ranks(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return self.max_over_ranks([float(flag)])[0] > 0

    def all_over_ranks(self, flag: bool) -> bool:
        """Whether `flag` is true on every rank."""
        return not self.any_over_ranks(not flag)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        holder = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action` on the main rank; return its result, or raise its UserError, on all ranks."""
        result, failure = None, None
        if self.is_main:
            try:
                result = action()
            except UserError as error:
                failure = error
        result, failure = self.broadcast_object((result, failure))
        if failure is not None:
            raise failure
        return result


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error means that another rank died or cannot be reached."""
    return not is_out_of_memory(error) and any(_says_lost(cause) for cause in _causes(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator (GPU, torch's CPU tensors, Python) ran out of memory."""
    return any(_says_no_memory(cause) for cause in _causes(error))


def is_port_in_use(error: BaseException) -> bool:
    """Whether rank 0 cannot listen because another program uses the port."""
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
    """The error and its causes, up to a UserError, which has already classified its own cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, UserError):
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Record what this rank is doing, for the message if memory runs out; the innermost phase counts.

    Also a decorator: `@phase("forward")`.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, PHASE):
            setattr(error, PHASE, name)
        raise


def phase_of(error: BaseException) -> str:
    """The innermost phase in which the error was raised."""
    names = [str(getattr(cause, PHASE)) for cause in _causes(error) if hasattr(cause, PHASE)]
    return names[-1] if names else "between phases"


@contextmanager
def lost_ranks_explained() -> Iterator[None]:
    """Turn the error of a collective into RankLost if another rank died or the connection was lost."""
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
            "reached; look for its message. Run the same command to resume from the newest checkpoint. "
            f"({first_line(cause)})"
        ) from error
