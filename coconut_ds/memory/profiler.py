"""Measure the memory of real optimizer steps, phase by phase, on every rank.

    initialise | step 1: pass 0, pass 1, ..., loss, backward, reduce, optimizer step | step 2: ... |
    evaluation | checkpoint

`backward` ends when the first parameter's gradient is complete and passed to ZeRO; the rest is `reduce`.
There are two steps because Adam allocates its moments in the first.
"""

import gc
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from coconut_ds.data.batching import Batch
from coconut_ds.engine.engine import Engine
from coconut_ds.memory.allocations import Mark, Recorder, Timeline, now
from coconut_ds.memory.planner import MIB

INITIALISE, EVALUATION, CHECKPOINT = "initialise", "evaluation", "checkpoint"
BETWEEN = ""  # the name for time outside phases: counting tensors
NUM_STEPS = 2
# More micro-batches repeat the second one.
MAX_MICRO_BATCHES = 2


@dataclass(frozen=True)
class Reading:
    """Counters of the process and its GPU at the end of a phase, MiB."""

    rss: float
    pinned: float = 0.0
    allocated: float = 0.0
    allocated_peak: float = 0.0
    reserved: float = 0.0
    reserved_peak: float = 0.0
    retries: int = 0  # of the allocator since the start, each after freeing cached blocks
    device_used: float = 0.0  # by all processes
    device_total: float = 0.0


def read(device: torch.device) -> Reading:
    """Read the counters and reset the GPU's peaks."""
    rss = psutil.Process().memory_info().rss / MIB
    if device.type != "cuda":
        return Reading(rss)
    statistics, cuda = torch.cuda.memory_stats(device), torch.cuda
    free, total = cuda.mem_get_info(device)
    pinned = cuda.host_memory_stats() if hasattr(cuda, "host_memory_stats") else {}
    reading = Reading(
        rss=rss,
        pinned=pinned.get("allocated_bytes.current", 0) / MIB,
        allocated=cuda.memory_allocated(device) / MIB,
        allocated_peak=cuda.max_memory_allocated(device) / MIB,
        reserved=cuda.memory_reserved(device) / MIB,
        reserved_peak=cuda.max_memory_reserved(device) / MIB,
        retries=statistics.get("num_alloc_retries", 0),
        device_used=(total - free) / MIB,
        device_total=total / MIB,
    )
    cuda.reset_peak_memory_stats(device)
    return reading


@dataclass
class PhaseMeter:
    """Marks the start of phases and reads the counters at their end."""

    device: torch.device
    recorder: Recorder
    marks: list[Mark] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    known: tuple[int, int] = (0, 0)  # (index of a mark + 1, bytes of all tensors at that mark)

    def begin(self, name: str) -> None:
        """End the current phase, if any, and begin another."""
        if self.marks:
            self.readings.append(read(self.device))
        else:
            self.recorder.start()
        self.marks.append(now(name))

    def set_known(self, num_bytes: int) -> None:
        """Record that all tensors of this device have `num_bytes` at the newest mark."""
        self.known = len(self.marks), num_bytes

    def end(self) -> dict[str, Any]:
        """End the last phase; returns its phases, peak and timeline as plain data, sizes in MiB."""
        self.readings.append(read(self.device))
        end, start = now("end"), self.marks[0].time_ns
        changes = [change for change in self.recorder.stop() if change.time_ns < end.time_ns]
        mark_number, num_bytes = self.known
        moment = self.marks[mark_number - 1].time_ns if mark_number else 0
        before = sum(change.size for change in changes if change.time_ns < moment)
        # A GPU's history begins before the first tensor; a CPU process has some, and maps weight files.
        offset = 0 if self.device.type == "cuda" else num_bytes - before
        timeline = Timeline.of(changes, self.marks, offset)
        stops = [*self.marks[1:], end]
        phases: list[dict[str, Any]] = [
            {
                "name": mark.name,
                "start_seconds": round((mark.time_ns - start) / 1e9, 4),
                "seconds": round((stops[index].time_ns - mark.time_ns) / 1e9, 4),
                # of tensors on the GPU or of the CPU process
                "peak_mib": round(reading.allocated_peak or timeline.peaks[index] / MIB, 4),
                "end_mib": round(reading.allocated or timeline.ends[index] / MIB, 4),
                "reading": {key: round(value, 4) for key, value in vars(reading).items()},
            }
            for index, (mark, reading) in enumerate(zip(self.marks, self.readings, strict=True))
            if mark.name != BETWEEN
        ]
        return {
            "device": str(self.device),
            "phases": phases,
            "peak_mib": max(phase["peak_mib"] for phase in phases),
            "at_peak": {
                "phase": timeline.peak_phase,
                "mib": round(timeline.peak / MIB, 3),
                "made_in_mib": {key: round(size / MIB, 3) for key, size in timeline.alive_at_peak.items()},
            },
            "timeline": [(round(second, 5), round(size / MIB, 3)) for second, size in timeline.points],
        }


def profile_steps(
    engine: Engine,
    meter: PhaseMeter,
    batch: Batch,
    accumulation: int,
    evaluate: Callable[[], Any],
    write_model: Callable[[Path], None],
    folder: Path,
) -> dict[str, Any]:
    """Run the phases after `initialise`, in which the meter is when called.  Collective.

    batch: the micro-batch of every step.  folder: location of a temporary checkpoint.
    Returns the profile of this rank: `PhaseMeter.end`, and the census after initialise and after each step.
    """
    micro_batches = min(accumulation, MAX_MICRO_BATCHES)
    denominator = batch.loss_denominator * len(batch.target_ids_N) * engine.world_size * micro_batches
    latents = batch.num_latent_targets * engine.world_size * micro_batches
    batch = replace(batch, loss_denominator=denominator, latent_denominator=latents)
    meter.begin(BETWEEN)
    states = {INITIALISE: census(engine)}
    engine.train()
    for step in range(1, NUM_STEPS + 1):
        for number in range(1, micro_batches + 1):
            with _micro_batch(
                engine, meter, f"step {step}: ", "" if number == 1 else f" ({number})"
            ) as begin:
                begin("embed")
                if step == number == 1:
                    meter.set_known(sum(states[INITIALISE].get(engine.device.type, {}).values()))
                loss = engine.loss(batch.to(engine.device))
                begin("backward")
                engine.backward(loss)
                del loss
        meter.begin(f"step {step}: optimizer step")
        engine.step()
        meter.begin(BETWEEN)
        states[f"step {step}"] = census(engine)
    meter.begin(EVALUATION)
    evaluate()
    meter.begin(CHECKPOINT)
    _write_checkpoint(engine, write_model, folder)
    states_mib = {
        when: {
            device: {kind: round(size / MIB, 4) for kind, size in kinds.items()}
            for device, kinds in sizes.items()
        }
        for when, sizes in states.items()
    }
    return {**meter.end(), "states_mib": states_mib}


@contextmanager
def _micro_batch(
    engine: Engine, meter: PhaseMeter, before: str, after: str
) -> Iterator[Callable[[str], None]]:
    """Begin a phase at every pass of the model, at the loss and at the first complete gradient.

    Yields a function that begins another phase.  `before` and `after` surround the names.
    """
    module, passes, begun = engine.module, itertools.count(), set()

    def begin(phase: str) -> None:
        begun.add(phase)
        meter.begin(f"{before}{phase}{after}")

    def reduce(_: Tensor) -> None:
        if "reduce" not in begun:
            begin("reduce")

    handles: list[Any] = [
        module.causal_lm.get_decoder().register_forward_pre_hook(lambda *_: begin(f"pass {next(passes)}")),
        *(p.register_post_accumulate_grad_hook(reduce) for p in module.parameters() if p.requires_grad),
    ]
    original = module.techniques.losses

    def marked_loss(*arguments: Any, **named: Any) -> Tensor:
        begin("loss")
        return original(*arguments, **named)

    module.techniques.losses = marked_loss  # type: ignore[method-assign]
    try:
        yield begin
    finally:
        del module.techniques.losses
        for handle in handles:
            handle.remove()


def _write_checkpoint(engine: Engine, write_model: Callable[[Path], None], folder: Path) -> None:
    temporary = folder / ".profile_checkpoint"
    if engine.is_main and temporary.is_symlink():
        temporary.unlink()
    elif engine.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    engine.barrier()
    try:
        engine.save_shards(temporary / "engine", {})
        with engine.full_weights():
            if engine.is_main:
                write_model(temporary / "model")
        engine.barrier()
    finally:
        if engine.is_main:
            shutil.rmtree(temporary, ignore_errors=True)


def census(engine: Engine) -> dict[str, dict[str, int]]:
    """Bytes of all tensors of this process by device ('cpu', 'cuda') and kind; storages count once.

    kinds: parameters, with the model's buffers; optimizer (master weights, moments); gradients; other (reduce
    buckets, staging, constants).
    """
    seen: set[tuple[str, int]] = set()
    sizes: dict[str, dict[str, int]] = {}

    def count(tensor: Tensor | None, kind: str) -> None:
        with suppress(RuntimeError, NotImplementedError):  # tensors without a storage
            if tensor is None or tensor.device.type not in ("cpu", "cuda"):
                return
            storage = tensor.untyped_storage()
            key = tensor.device.type, storage.data_ptr()
            if storage.nbytes() and key not in seen:
                seen.add(key)
                kinds = sizes.setdefault(tensor.device.type, {})
                kinds[kind] = kinds.get(kind, 0) + storage.nbytes()

    gc.collect()
    for weights in (*engine.module.parameters(), *engine.module.buffers()):
        count(weights, "parameters")
    for parameter in engine.module.parameters():
        count(parameter.grad, "gradients")
    for tensor in engine.optimizer_tensors():
        count(tensor, "optimizer")
        count(tensor.grad if tensor.is_leaf else None, "gradients")
    for thing in gc.get_objects():
        with suppress(Exception):  # unfinished objects, dead proxies
            if type(thing) in (Tensor, torch.nn.Parameter):
                count(thing, "other")
    return sizes
