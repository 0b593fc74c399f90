"""Start a module under the `deepspeed` launcher on the CPU, or alone, with a time limit."""

import os
import subprocess
import sys
from pathlib import Path

from coconut_ds.engine import watchdog
from coconut_ds.training.sweep import launch_module

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
    return str(watchdog.free_port())


def start(module, *arguments, ranks=2, timeout=240, cwd=ROOT, **extra):
    """Run `python -m module ARGUMENTS` on `ranks` ranks; gives the finished process with its output."""
    return subprocess.run(
        [*launch_module(module, ranks), *map(str, arguments)],
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
