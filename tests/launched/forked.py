"""Ranks forked from a server that has imported what they need; start.py starts ranks as users do."""

import ctypes
import json
import multiprocessing
import os
import runpy
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.launched.start import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
TOKEN = "COCONUT_TEST_TOKEN"  # in the environment of every process of one run, to find those that are left
Faults = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    codes: list[int]  # of every rank, or of the launcher alone
    output: str
    left: list[str]  # command lines of processes that are still there
    seconds: float

    @property
    def code(self) -> int:
        return self.codes[0]


def environment(faults: Faults = (), **extra: str) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/faults/site'}",
        "WANDB_MODE": "disabled",
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "FAULTS": json.dumps(list(faults)),
        TOKEN: uuid.uuid4().hex,
        **extra,
    }


class Warm:
    """A server that has imported DeepSpeed, and forks ranks without a launcher: a start takes no time."""

    def __init__(self) -> None:
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.launched.preloaded"])
        variables = {name: value for name, value in environment().items() if name not in ("FAULTS", TOKEN)}
        with patch.dict(os.environ, variables):
            forkserver.ensure_running()

    def start(
        self,
        arguments: Sequence[str],
        cwd: Path,
        faults: Faults = (),
        ranks: int = 1,
        variables: Mapping[str, str] | None = None,
        module: str = "coconut_ds",
    ) -> "WarmRun":
        """`python -m module ARGUMENTS` on every rank, with its output in files below `cwd`."""
        return WarmRun(self.context, [module, *arguments], cwd, faults, ranks, variables or {})

    def run(self, module: str, *arguments: object, ranks: int, cwd: Path, timeout: float = 300) -> str:
        """The same, to an end without errors; gives the output."""
        ended = self.start([*map(str, arguments)], cwd, ranks=ranks, module=module).wait(timeout)
        assert (ended.codes, ended.left) == ([0] * ranks, []), ended.output[-4000:]
        return ended.output


class WarmRun:
    def __init__(
        self,
        context: ForkServerContext,
        words: list[str],
        cwd: Path,
        faults: Faults,
        ranks: int,
        extra: Mapping[str, str],
    ) -> None:
        self.started = time.monotonic()
        variables = environment(faults, **extra)
        if ranks > 1:
            port = free_port()
            group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = group | variables
        self.logs = [cwd / f"{variables[TOKEN]}_{rank}.log" for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            mine = variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            process = context.Process(target=_rank, args=(words, str(cwd), mine, str(log)))
            process.start()
            self.processes.append(process)

    @property
    def output(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def wait(self, timeout: float = 150) -> Ended:
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        left = [f"rank {rank}" for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        codes = [process.exitcode or 0 for process in self.processes]
        return Ended(codes, self.output, left, time.monotonic() - self.started)


def _rank(words: list[str], cwd: str, variables: dict[str, str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    os.chdir(cwd)
    if namespace := variables.get(f"NAMESPACE_{variables.get('RANK')}"):
        enter_namespace(namespace)
    sys.argv = words
    from tests.faults.faulty import install

    install(json.loads(variables["FAULTS"]))
    runpy.run_module(words[0], run_name="__main__")


def enter_namespace(name: str) -> None:
    """Move this process into a network namespace of `ip netns`, as onto another host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as handle:
        if libc.setns(handle.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")
