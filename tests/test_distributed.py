"""What gloo, NCCL, c10d, torch and the allocators say, and what the program makes of it."""

import errno

import pytest
import torch
import torch.distributed as dist

from coconut_ds.distributed import is_lost_rank, is_out_of_memory, lost_ranks_explained, phase, phase_of
from coconut_ds.errors import CheckpointError, ConfigError, RankLost

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/"
LOST = {
    "gloo: closed": RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41342"
    ),
    "gloo: timeout": RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
    "gloo: barrier": RuntimeError("[Rank 0] Rank 1 timed out in monitoredBarrier after 1000 ms"),
    "gloo: reset": RuntimeError("writev [127.0.0.1]:7: Connection reset by peer"),
    "store: clients": dist.DistStoreError(
        "Timed out after 601 seconds waiting for clients. 1/2 clients joined."
    ),
    "store: key": dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cpu//0/rank_1"),
    "store: closed": dist.DistNetworkError("failed to recv, got 0 bytes"),
    "store: pipe": dist.DistNetworkError("Broken pipe"),
    "store: client": dist.DistNetworkError(
        "The client socket has timed out after 60000ms while trying to connect to (127.0.0.1, 29500)."
    ),
    "nccl: remote": dist.DistBackendError(
        f"{NCCL}NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version 2.27.5\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
        "prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer node-b<41234>"
    ),
    "nccl: system": dist.DistBackendError(
        f"{NCCL}ProcessGroupNCCL.cpp:3690, unhandled system error (run with NCCL_DEBUG=INFO for details), "
        "NCCL version 2.28.9\nncclSystemError: System call (e.g. socket, malloc) or external library call "
        "failed or device error. \nLast error:\nCall to recv from 10.0.0.2<33759> failed : No route to host"
    ),
    "nccl: internal": dist.DistBackendError(
        f"{NCCL}NCCLUtils.hpp:268, internal error - please report this issue to the NCCL developers, NCCL "
        "version 2.27.5\nncclInternalError: Internal check failed.\nLast error:\nSocket recv failed while "
        "polling for opId=0x7f4774cc9620"
    ),
    "nccl: key": dist.DistBackendError(
        "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store "
        "by key '0', but store->get('0') got error: Connection reset by peer"
    ),
    "nccl: nonblocking": dist.DistBackendError("NCCL timeout in: /pytorch/NCCLUtils.cpp:121"),
    "nccl: aborted": RuntimeError(
        "NCCL communicator was aborted on rank 0.  Original reason for failure was: [Rank 0] Watchdog caught "
        "collective operation timeout: WorkNCCL(SeqNum=10, OpType=BROADCAST, NumelIn=1, NumelOut=1, "
        "Timeout(ms)=600000) ran for 600029 milliseconds before timing out."
    ),
    "nccl: watchdog": dist.DistBackendError(
        "[PG ID 0 PG GUID 0(default_pg) Rank 1] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600020 "
        "milliseconds before timing out."
    ),
    "nccl: raised without a type": RuntimeError(
        "NCCL Error 6: remote process exited or there was a network error"
    ),
}
NO_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": MemoryError(),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"),
    "mmap": RuntimeError("unable to mmap 64 bytes from file <x>: Cannot allocate memory (12)"),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "nccl": dist.DistBackendError(
        f"{NCCL}ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL "
        "version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 "
        "'out of memory'"
    ),
}
NEITHER = {
    "shape": RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    "disk": RuntimeError(
        "[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file"
    ),
    "value": ValueError("out of memory"),
    "reader went away": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "hub": OSError("We couldn't connect to the hub: Connection refused"),
    "one gpu for two ranks": dist.DistBackendError(
        f"{NCCL}NCCLUtils.hpp:275, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version "
        "2.27.5\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
        "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 10"
    ),
    "port": dist.DistNetworkError(
        "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, "
        "code: -98, name: EADDRINUSE, message: address already in use"
    ),
}
CASES = [
    pytest.param(error, kind, id=name)
    for kind, errors in (("lost", LOST), ("memory", NO_MEMORY), ("neither", NEITHER))
    for name, error in errors.items()
]


def wrapped(error: Exception) -> Exception:
    """As a library raises it that caught the first error."""
    try:
        try:
            raise error
        except Exception as first:
            raise KeyError("step 3") from first
    except KeyError as second:
        return second


@pytest.mark.parametrize("error, kind", CASES)
def test_an_error_is_told_by_what_it_is(error: Exception, kind: str) -> None:
    for said in (error, wrapped(error)):
        assert (is_lost_rank(said), is_out_of_memory(said)) == (kind == "lost", kind == "memory")


@pytest.mark.parametrize("name", LOST)
def test_a_lost_rank_is_explained(name: str) -> None:
    for error in (LOST[name], wrapped(LOST[name])):
        with (
            pytest.raises(RankLost, match="lost contact with another rank") as caught,
            lost_ranks_explained(),
        ):
            raise error
        assert str(LOST[name]).splitlines()[0] in str(caught.value)


@pytest.mark.parametrize("name", [name for name in NEITHER if name != "port"])
def test_other_errors_stay_what_they_are(name: str) -> None:
    with pytest.raises(type(NEITHER[name])) as caught, lost_ranks_explained():
        raise NEITHER[name]
    assert caught.value is NEITHER[name]


def test_a_message_of_ours_is_not_told_anew() -> None:
    with pytest.raises(CheckpointError, match="no room"), lost_ranks_explained():
        raise CheckpointError("no room") from LOST["gloo: closed"]


def test_a_port_in_use_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match=r"127.0.0.1:29500: .*--master_port N"), lost_ranks_explained():
        raise NEITHER["port"]


def test_the_cpu_allocator_itself_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value) and not is_lost_rank(caught.value)


@phase("forward")
def run_out() -> None:
    raise MemoryError("Tried to allocate 2 GiB")


def test_the_innermost_phase_counts() -> None:
    with pytest.raises(MemoryError) as caught, phase("evaluation"):
        run_out()
    assert phase_of(caught.value) == "forward" == phase_of(wrapped(caught.value))
    assert phase_of(MemoryError()) == "between phases"
