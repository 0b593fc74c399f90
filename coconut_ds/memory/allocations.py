"""Record every allocation and release of tensor memory while code runs.

    recorder = recorder_for(device); recorder.start(); ...; changes = recorder.stop()
    Timeline.of(changes, marks, offset)     bytes alive over time, the peak of every phase and its origin

On the CPU the events come from torch.profiler, on a GPU from the caching allocator's history.  Both include
temporary memory inside operators.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from coconut_ds.files import make_folder

MAX_GPU_EVENTS = 4_000_000
POINTS_PER_PHASE = 48
BEFORE, BETWEEN_PHASES = "before", "between phases"


class Change(NamedTuple):
    """An allocation (size > 0) or a release (size < 0) of one block."""

    time_ns: int  # on the clock of time.time_ns()
    address: int
    size: int


class Mark(NamedTuple):
    """The start of a phase."""

    time_ns: int
    name: str


class CpuRecorder:
    """The CPU allocator, through torch.profiler.

    It misses releases by gloo's threads: a gradient that was sent may appear to stay alive.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def start(self) -> None:
        self._profile.start()

    def stop(self) -> list[Change]:
        self._profile.stop()
        results: Any = self._profile.profiler
        changes = []
        pending = list(results.kineto_results.experimental_event_tree())
        while pending:
            node = pending.pop()
            if node.tag == _EventType.Allocation and node.extra_fields.device.type == "cpu":
                fields = node.extra_fields
                changes.append(Change(node.start_time_ns, fields.ptr, fields.alloc_size))
            pending.extend(node.children)
        return sorted(changes)


class GpuRecorder:
    """A GPU's caching allocator, through its history.  `snapshot`: file for pytorch.org/memory_viz."""

    def __init__(self, device: torch.device, snapshot: Path | None = None) -> None:
        self._device, self._snapshot = device, snapshot

    def start(self) -> None:
        context = "all" if self._snapshot else None
        torch.cuda.memory._record_memory_history("all", context, "python", MAX_GPU_EVENTS)

    def stop(self) -> list[Change]:
        if self._snapshot is not None:
            make_folder(self._snapshot.parent)
            self._snapshot.unlink(missing_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._snapshot))
        traces = torch.cuda.memory._snapshot(self._device)["device_traces"]
        torch.cuda.memory._record_memory_history(None)
        return list(gpu_changes(traces[self._device.index or 0]))


def gpu_changes(trace: Sequence[Any]) -> Iterator[Change]:
    """The changes in one device's trace of a CUDA memory snapshot."""
    signs = {"alloc": 1, "free_requested": -1}
    for entry in trace:
        if entry["action"] in signs:
            size = signs[entry["action"]] * entry["size"]
            yield Change(int(entry["time_us"]) * 1000, entry["addr"], size)


Recorder = CpuRecorder | GpuRecorder


def recorder_for(device: torch.device, snapshot: Path | None = None) -> Recorder:
    """The recorder for a device's allocator."""
    return GpuRecorder(device, snapshot) if device.type == "cuda" else CpuRecorder()


@dataclass(frozen=True)
class Timeline:
    """Bytes alive over time."""

    points: list[tuple[float, int]]  # (seconds since the first mark, bytes), the highest per interval
    peaks: list[int]  # of each phase, in the order of the marks
    ends: list[int]  # bytes at the end of each phase
    peak: int
    peak_phase: str
    alive_at_peak: dict[str, int]  # bytes by the phase that allocated them; BEFORE: before recording

    @classmethod
    def of(cls, changes: Sequence[Change], marks: Sequence[Mark], offset: int = 0) -> "Timeline":
        """Build from `changes`; `offset`: bytes alive before recording that are not in `changes`."""
        peaks, ends = [0] * len(marks), [0] * len(marks)
        alive: dict[int, tuple[int, int]] = {}  # address -> (size, phase)
        by_phase: Counter[int] = Counter()
        current, index, levels = offset, -1, []
        peak, peak_index, at_peak = -1, 0, by_phase
        for change in changes:
            while index + 1 < len(marks) and marks[index + 1].time_ns <= change.time_ns:
                index += 1
                peaks[index] = ends[index - 1] = current
            current += change.size
            if change.size > 0:
                alive[change.address] = change.size, index
                by_phase[index] += change.size
            elif change.address in alive:
                size, phase = alive.pop(change.address)
                by_phase[phase] -= size
            if index >= 0:
                levels.append((change.time_ns, current))
                peaks[index] = max(peaks[index], current)
                if current > peak and change.size > 0:
                    peak, peak_index, at_peak = current, index, by_phase.copy()
        for later in range(index + 1, len(marks)):
            peaks[later] = ends[later - 1] = current
        ends[-1] = current
        made: Counter[str] = Counter()
        for phase, size in at_peak.items():
            if phase >= 0 and size:
                made[marks[phase].name or BETWEEN_PHASES] += size
        alive_at_peak = {BEFORE: peak - made.total(), **made}
        return cls(_thinned(levels, marks), peaks, ends, peak, marks[peak_index].name, alive_at_peak)


def _thinned(levels: Sequence[tuple[int, int]], marks: Sequence[Mark]) -> list[tuple[float, int]]:
    """The highest and the last level in each of POINTS_PER_PHASE / 2 equal intervals of every phase."""
    starts = [mark.time_ns for mark in marks]
    ends = [*starts[1:], max(levels[-1][0] if levels else 0, starts[-1]) + 1]
    bins: dict[tuple[int, int], list[tuple[int, int]]] = {}
    phase = 0
    for level in levels:
        while level[0] >= ends[phase]:
            phase += 1
        width = max(1, (ends[phase] - starts[phase]) // (POINTS_PER_PHASE // 2))
        bins.setdefault((phase, (level[0] - starts[phase]) // width), []).append(level)
    points: list[tuple[float, int]] = []
    for inside in bins.values():
        highest = max(inside, key=lambda level: level[1])
        points += [
            ((moment - starts[0]) / 1e9, size) for moment, size in dict.fromkeys((highest, inside[-1]))
        ]
    return points


def now(name: str) -> Mark:
    """A mark at the current time."""
    return Mark(time.time_ns(), name)
