"""The real program with a fault at one place of one rank.

    deepspeed tests/faults/faulty.py train CONFIG ...      FAULTS='[{"rank": 1, "at": "...", "call": 3, "do": "kill"}]'

`at`: "module:Class.function" or "module:function"; `call`: at which of its calls (counted from 1); `when`: before
(default) or after it.  `do`: kill, sleep, stop (SIGSTOP), nan (the result times NaN), full (the disk, from then on),
TERM / USR1 / INT @ self / parent / grandparent / pid file.  From the first signal on every step takes longer, so that
the run is still there when the signal has made its way.
"""

import errno
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

SLOW_SECONDS = 0.05


def install(faults: Sequence[dict[str, Any]]) -> None:
    rank = int(os.environ.get("RANK", "0"))
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
    elif what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        name, _, target = what.partition("@")
        _wrap("coconut_ds.engine:Engine.step", _slow)
        os.kill(_process_id(target), getattr(signal, f"SIG{name}"))


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


def main() -> int:
    from coconut_ds.__main__ import main as program

    install(json.loads(os.environ.get("FAULTS", "[]")))
    return program()


if __name__ == "__main__":
    sys.exit(main())
