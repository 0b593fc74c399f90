"""Start real runs under the `deepspeed` launcher or a script, and find what they leave."""

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from coconut_ds.training.sweep import launch_module
from tests.launched.forked import TOKEN, Ended, Faults, environment


def under_launcher(arguments: Sequence[str], cwd: Path, faults: Faults = ()) -> Ended:
    """`deepspeed --num_gpus 2 --module coconut_ds ARGUMENTS`."""
    return run([*launch_module("coconut_ds", 2), *arguments], cwd, environment(faults))


def run(command: Sequence[str], cwd: Path, variables: dict[str, str], timeout: float = 400) -> Ended:
    """Run a program to its end, and wait a little for what it started."""
    started = time.monotonic()
    log = Path(tempfile.gettempdir(), f"{variables[TOKEN]}.log")
    with open(log, "wb") as writer:
        process = subprocess.Popen(
            ["env", *command],
            cwd=cwd,
            env={**os.environ, **variables},
            stdout=writer,
            stderr=writer,
            start_new_session=True,
        )
    try:
        process.wait(timeout)
    finally:
        left = wait_for_others(variables[TOKEN])
    output = log.read_text(errors="replace")
    log.unlink()
    return Ended([process.returncode], output, left, time.monotonic() - started)


def wait_for_others(token: str, patience: float = 35) -> list[str]:
    """Processes of the run that do not end by themselves in time; they are killed and named."""
    deadline = time.monotonic() + patience
    while (there := with_token(token)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = []
    for process in there:
        try:
            left.append(" ".join(process.cmdline()))
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return left


def with_token(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TOKEN) == token:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
