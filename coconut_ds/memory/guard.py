"""End all ranks together when one runs out of memory, and report what was in memory.

    with MemoryGuard(folder, ...):
        train()            out of memory on any rank: every rank writes a report and ends, exit code 78

Reports: RUN/memory/out_of_memory_rank_N.json, and on a GPU a snapshot of the allocator for
https://pytorch.org/memory_viz.
"""

import gc
import os
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from coconut_ds.errors import ConfigError, OutOfMemory, first_line
from coconut_ds.failures import is_out_of_memory, phase_of
from coconut_ds.files import json_text, make_folder, replace_text
from coconut_ds.memory.plan import MIB

POLL_SECONDS = 0.5
# How long the rank that ran out of memory waits for the reports of the others.
REPORT_SECONDS = 8.0
# How long the others then stay alive: the launcher ends all ranks when one exits.
LINGER_SECONDS = 2.0
NUM_LISTED = 15


class MemoryGuard:
    """Ends all ranks together when one runs out of memory; use it as a context manager."""

    def __init__(
        self,
        folder: Path | None,
        rank: int,
        world_size: int,
        device: torch.device,
        plan: dict[str, Any] | None = None,
        *,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """`folder`: RUN/memory, the same for all ranks; None writes novalue.  `plan`: from `Plan.to_json`."""
        self.folder, self.rank, self.world_size, self.device, self.plan = (
            folder,
            rank,
            world_size,
            device,
            plan,
        )
        self._end = end
        self._old = self._written()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory guard", daemon=True)

    def __enter__(self) -> Self:
        if self.folder is not None and self.world_size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if error is not None and is_out_of_memory(error):
            text = self._report(phase_of(error), first_line(error))
            self._wait_for_others()
            raise OutOfMemory(text) from error

    def _path(self, rank: int) -> Path:
        assert self.folder is not None
        return self.folder / f"out_of_memory_rank_{rank}.json"

    def _written(self) -> dict[int, float]:
        """When each rank's report was written.  Reports of earlier runs are ignored by this time."""
        if self.folder is None:
            return {}
        written = {}
        for rank in range(self.world_size):
            with suppress(OSError):
                written[rank] = self._path(rank).stat().st_mtime
        return written

    def _new_reports(self) -> list[int]:
        return [rank for rank, at in self._written().items() if self._old.get(rank) != at]

    def _watch(self) -> None:
        """End this rank when another one ran out of memory: it may be blocked in a collective."""
        while not self._stop.wait(POLL_SECONDS):
            others = [rank for rank in self._new_reports() if rank != self.rank]
            if others:
                text = self._report("waiting", f"rank {others[0]} ran out of memory")
                print(f"rank {self.rank}: {text.splitlines()[0]}", file=sys.stderr, flush=True)
                time.sleep(LINGER_SECONDS)
                self._end(OutOfMemory.exit_code)
                return

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + REPORT_SECONDS
        while self.folder is not None and time.monotonic() < deadline:
            if len(self._new_reports()) == self.world_size:
                return
            time.sleep(POLL_SECONDS / 2)

    def _report(self, phase: str, reason: str) -> str:
        """Write the report; returns the message."""
        reached = measured(self.device)
        largest = largest_tensors()
        report = {
            "rank": self.rank,
            "phase": phase,
            "reason": reason,
            "reached_mib": reached,
            "largest_tensors": largest,
            "plan": self.plan,
            "snapshot": self._snapshot(),
        }
        lines = [f"out of memory in phase '{phase}': {reason}"]
        lines.append("  reached: " + ", ".join(f"{name} {value:,.0f} MiB" for name, value in reached.items()))
        if self.plan is not None:
            lines.append(
                f"  planned: {self.plan['gpu_mib']:,.0f} MiB, peak phase {self.plan['governing_phase']}"
            )
        lines += [f"  {item['mib']:>9,.1f} MiB  {item['count']} x {item['what']}" for item in largest[:5]]
        for change in (self.plan or {}).get("changes", []):
            fits = "fits" if change["fits"] else "does not fit"
            lines.append(f"  {change['change']}: about {change['gpu_mib']:,.0f} MiB, {fits}")
            lines.append(f"      {change['setting']}")
        if self.folder is not None:
            lines.append(self._write(report))
        return "\n".join(lines)

    def _write(self, report: dict[str, Any]) -> str:
        """Write the report; returns a line with its path or the reason why it was not written."""
        path = self._path(self.rank)
        try:
            make_folder(path.parent)
            replace_text(path, json_text(report, indent=2))
        except (OSError, ConfigError) as error:
            return f"  report not written: {path}: {error}"
        return f"  report: {path}"

    def _snapshot(self) -> str | None:
        if self.folder is None or self.device.type != "cuda":
            return None
        path = self.folder / f"out_of_memory_rank_{self.rank}.pickle"
        with suppress(RuntimeError, OSError, ConfigError):
            make_folder(self.folder)
            path.unlink(missing_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            return str(path)
        return None


def measured(device: torch.device) -> dict[str, float]:
    """Peak memory of this process, MiB."""
    numbers = {"host_rss_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        numbers["gpu_allocated_peak"] = torch.cuda.max_memory_allocated(device) / MIB
        numbers["gpu_reserved_peak"] = torch.cuda.max_memory_reserved(device) / MIB
    return numbers


def largest_tensors(limit: int = NUM_LISTED) -> list[dict[str, Any]]:
    """Tensors of this process, grouped by shape, dtype and device, largest sum first; storages count once."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    seen = set()
    for value in gc.get_objects():
        with suppress(Exception):  # unfinished objects, proxies, tensors without storage
            if not issubclass(type(value), torch.Tensor) or value.untyped_storage().data_ptr() in seen:
                continue
            seen.add(value.untyped_storage().data_ptr())
            what = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
            sizes[what] += value.untyped_storage().nbytes()
            counts[what] += 1
    return [
        {"what": what, "count": counts[what], "mib": round(size / MIB, 2)}
        for what, size in sizes.most_common(limit)
    ]
