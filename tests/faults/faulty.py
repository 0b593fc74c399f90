"""Break one place of the real program, on one rank.

    FAULTS='[{"rank": 1, "at": "coconut_ds.engine.engine:Engine.step", "call": 3, "do": "kill"}]'

`at`: "module:Class.function" or "module:function"; `call`: at which of its calls, counted from 1; `when`:
before it (default) or after.  `do`: kill, sleep, stop (SIGSTOP), nan (the result times NaN), fill FILE (until
the disk is full), touch FILE, run COMMAND, or SIGNAL@TARGET: TERM, USR1, INT, KILL to self, parent,
grandparent, or to the process id in a file.  After a signal every step takes longer, so that it arrives
before the run is over.
"""

import importlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

SLOW_SECONDS = 0.05


def install(faults: Sequence[dict[str, Any]]) -> None:
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    for fault in faults:
        if fault.get("rank", rank) == rank:
            _wrap(fault["at"], _with_fault(fault))


def _wrap(place: str, decorate: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, path = place.partition(":")
    holder = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        holder = getattr(holder, part)
    setattr(holder, name, decorate(getattr(holder, name)))


def _with_fault(fault: dict[str, Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(real: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def faulty(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            due = calls == fault.get("call", 1)
            if due and fault.get("when", "before") == "before" and fault["do"] != "nan":
                _act(fault["do"])
            result = real(*args, **kwargs)
            if due and fault["do"] == "nan":
                return result * float("nan")
            if due and fault.get("when") == "after":
                _act(fault["do"])
            return result

        return faulty

    return decorate


def _act(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "sleep":
        time.sleep(600)
    elif what.startswith("touch "):
        Path(what.removeprefix("touch ")).touch()
    elif what.startswith("run "):
        subprocess.run(shlex.split(what.removeprefix("run ")), check=True)
    elif what.startswith("fill "):
        _fill_disk(Path(what.removeprefix("fill ")))
    else:
        name, _, target = what.partition("@")
        _wrap("coconut_ds.engine.engine:Engine.step", _slow)
        os.kill(_process_id(target), getattr(signal, f"SIG{name}"))


def _fill_disk(file: Path) -> None:
    """Write until there is no room."""
    with suppress(OSError), open(file, "wb", buffering=0) as writer:
        while writer.write(bytes(2**16)):
            pass


def _slow(real: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any) -> Any:
        time.sleep(SLOW_SECONDS)
        return real(*args)

    return slow


def _process_id(target: str) -> int:
    me = psutil.Process()
    if target == "self":
        return me.pid
    if target in ("parent", "grandparent"):
        return me.parents()[0 if target == "parent" else 1].pid
    return int(Path(target).read_text())
