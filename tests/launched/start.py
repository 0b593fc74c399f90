"""Start a module under the `deepspeed` launcher on the CPU, or alone, with a time limit."""

import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = Path(sys.executable).parent / "deepspeed"


def environment(**extra):
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "disabled",
        "PATH": f"{LAUNCHER.parent}{os.pathsep}{os.environ['PATH']}",
        **extra,
    }


def free_port():
    """A port below those that sockets get which ask for none: gloo's would take it before it is used."""
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


def start(module, *arguments, ranks=2, timeout=240, cwd=ROOT, **extra):
    """Run `python -m module ARGUMENTS` on `ranks` ranks; gives the finished process with its output."""
    if ranks == 1:
        command = [sys.executable, "-m", module]
    else:
        port = free_port()
        command = [str(LAUNCHER), "--num_gpus", str(ranks), "--master_port", port, "--module", module]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
