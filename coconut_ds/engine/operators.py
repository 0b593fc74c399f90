"""DeepSpeed's compiled operators: locks of interrupted builds, and what the first start has to compile.

torch's extension loader waits for the file `lock` in an operator's build folder without a time limit.  A
killed build leaves that file, so every later start would hang.  (torch/utils/file_baton.py, torch 2.13)

    python -m coconut_ds.engine.operators      remove the locks
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

STALE_SECONDS = 60


def stale_locks() -> Iterator[Path]:
    """Locks older than a minute in whose folder no process works; ninja runs in the folder it builds in."""
    for lock in sorted(lock for root in _build_folders() for lock in root.glob("**/lock")):
        if time.time() - lock.stat().st_mtime > STALE_SECONDS and not _works_in(lock.parent):
            yield lock


def remove_stale_locks() -> list[Path]:
    """Remove what interrupted builds left; returns the removed locks."""
    locks = list(stale_locks())
    for lock in locks:
        lock.unlink(missing_ok=True)
    return locks


def to_compile(installed: Mapping[str, object], on_gpu: bool) -> list[str]:
    """The operators without a binary, neither `installed` with DeepSpeed nor built by an earlier start."""
    names = ["cpu_adam"] if on_gpu else ["deepspeed_shm_comm", "cpu_adam"]
    return [
        name
        for name in names
        if not installed.get(name)
        and not any(True for folder in _build_folders() for _ in folder.glob(f"**/{name}/{name}.so"))
    ]


def _build_folders() -> list[Path]:
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return [Path(os.environ["TORCH_EXTENSIONS_DIR"])]
    return [Path.home() / ".cache" / "torch_extensions", Path(sys.prefix) / "torch_extensions"]


def _works_in(folder: Path) -> bool:
    return any(process.info["cwd"] == str(folder) for process in psutil.process_iter(["cwd"]))


if __name__ == "__main__":
    for removed in remove_stale_locks():
        print(f"removed {removed}, left by an interrupted build")
