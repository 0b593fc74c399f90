"""Every block of tensor memory that comes and goes while code runs, as the allocator itself tells it.

    recorder = recorder_for(device); recorder.start(); ...; changes = recorder.stop()
    Timeline.of(changes, marks, offset)     bytes alive over time, the peak of every phase, who made it

On the CPU the events come from torch.profiler, on a GPU from the caching allocator's history; both tell what
operators take inside, too.
Knows: allocators.  Does not know: models, phases' meaning.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from coconut_ds.files import make_folder

MAX_GPU_EVENTS = 4_000_000
POINTS_A_PHASE = 48
BEFORE, BETWEEN_PHASES = "before", "between phases"


class Change(NamedTuple):
    """A block that appears (size > 0) or goes (size < 0)."""

    time_ns: int  # of the clock of time.time_ns()
    address: int
    size: int


class Mark(NamedTuple):
    """A phase begins."""

    time_ns: int
    name: str


class Recorder(Protocol):
    """Listens to one allocator."""

    def start(self) -> None: ...

    def stop(self) -> list[Change]: ...


class CpuRecorder:
    """The CPU allocator, through torch.profiler.

    It misses what a thread of gloo is the last to let go of: a gradient that was sent may seem to stay.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def start(self) -> None:
        self._profile.start()

    def stop(self) -> list[Change]:
        self._profile.stop()
        results: Any = self._profile.profiler
        return sorted(_allocations(results.kineto_results.experimental_event_tree()))


def _allocations(nodes: Sequence[Any]) -> Iterator[Change]:
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.tag == _EventType.Allocation and node.extra_fields.device.type == "cpu":
            yield Change(node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size)
        waiting.extend(node.children)


class GpuRecorder:
    """A GPU's caching allocator, through its history; `snapshot`: a file for pytorch.org/memory_viz."""

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


def recorder_for(device: torch.device, snapshot: Path | None = None) -> Recorder:
    """The recorder of a device's allocator."""
    return GpuRecorder(device, snapshot) if device.type == "cuda" else CpuRecorder()


@dataclass(frozen=True)
class Timeline:
    """Bytes alive over time."""

    points: list[tuple[float, int]]  # (seconds from the first mark, bytes), the highest of each short while
    peaks: list[int]  # of every phase, in the order of the marks
    peak: int
    peak_phase: str
    alive_at_peak: dict[str, int]  # bytes by the phase that made them; BEFORE: older than the recording

    @classmethod
    def of(cls, changes: Sequence[Change], marks: Sequence[Mark], offset: int = 0) -> "Timeline":
        """`offset`: bytes that were alive when recording began and are not in `changes`."""
        peaks = [0] * len(marks)
        alive: dict[int, tuple[int, int]] = {}  # address -> (size, phase)
        by_phase: Counter[int] = Counter()
        current, place, levels = offset, -1, []
        peak, peak_place, at_peak = -1, 0, by_phase
        for change in changes:
            while place + 1 < len(marks) and marks[place + 1].time_ns <= change.time_ns:
                place += 1
                peaks[place] = current
            current += change.size
            if change.size > 0:
                alive[change.address] = change.size, place
                by_phase[place] += change.size
            elif change.address in alive:
                size, phase = alive.pop(change.address)
                by_phase[phase] -= size
            if place >= 0:
                levels.append((change.time_ns, current))
                peaks[place] = max(peaks[place], current)
                if current > peak and change.size > 0:
                    peak, peak_place, at_peak = current, place, by_phase.copy()
        for later in range(place + 1, len(marks)):
            peaks[later] = current
        made: dict[str, int] = {}
        for phase, size in at_peak.items():
            if phase >= 0 and size:
                name = marks[phase].name or BETWEEN_PHASES
                made[name] = made.get(name, 0) + size
        made = {BEFORE: peak - sum(made.values()), **made}
        return cls(_thinned(levels, marks), peaks, peak, marks[peak_place].name, made)


def _thinned(levels: Sequence[tuple[int, int]], marks: Sequence[Mark]) -> list[tuple[float, int]]:
    """The highest and the last level of POINTS_A_PHASE / 2 equal whiles of every phase."""
    starts = [mark.time_ns for mark in marks]
    ends = [*starts[1:], max(levels[-1][0] if levels else 0, starts[-1]) + 1]
    bins: dict[tuple[int, int], list[tuple[int, int]]] = {}
    phase = 0
    for level in levels:
        while level[0] >= ends[phase]:
            phase += 1
        width = max(1, (ends[phase] - starts[phase]) // (POINTS_A_PHASE // 2))
        bins.setdefault((phase, (level[0] - starts[phase]) // width), []).append(level)
    points: list[tuple[float, int]] = []
    for inside in bins.values():
        highest = max(inside, key=lambda level: level[1])
        points += [
            ((moment - starts[0]) / 1e9, size) for moment, size in dict.fromkeys((highest, inside[-1]))
        ]
    return points


def now(name: str) -> Mark:
    """A mark at this moment."""
    return Mark(time.time_ns(), name)
