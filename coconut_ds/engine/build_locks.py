"""Locks of interrupted operator builds.

torch's extension loader waits for the file `lock` in an operator's build folder without a time limit.  A
killed build leaves that file, so every later start would hang.  (torch/utils/file_baton.py, torch 2.13)

    python -m coconut_ds.engine.build_locks      remove them
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

STALE_SECONDS = 60


def stale_locks() -> Iterator[Path]:
    """Locks older than a minute in whose folder no process works; ninja runs in the folder it builds in."""
    roots = {Path.home() / ".cache" / "torch_extensions", Path(sys.prefix) / "torch_extensions"}
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        roots = {Path(os.environ["TORCH_EXTENSIONS_DIR"])}
    for lock in sorted(lock for root in roots for lock in root.glob("**/lock")):
        if time.time() - lock.stat().st_mtime > STALE_SECONDS and not _works_in(lock.parent):
            yield lock


def remove_stale_locks() -> list[Path]:
    """Remove what interrupted builds left; returns the removed locks."""
    locks = list(stale_locks())
    for lock in locks:
        lock.unlink(missing_ok=True)
    return locks


def _works_in(folder: Path) -> bool:
    return any(process.info["cwd"] == str(folder) for process in psutil.process_iter(["cwd"]))


if __name__ == "__main__":
    for removed in remove_stale_locks():
        print(f"removed {removed}, left by an interrupted build")
