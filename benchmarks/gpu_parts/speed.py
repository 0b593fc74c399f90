"""Part c: seconds a step and tokens a second over ProsQA's curriculum, and from them seconds an epoch.

    stage N VARIANT      forward and backward of micro-batches of real lengths, GPT-2 124M
    passes               what the one-token passes cost, and how much of it is waiting for launches

An epoch is 17,886 problems.
"""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_parts import Setting
from benchmarks.gpu_parts.models import LAST_STAGE, batch_of, model_of, problems_of, step
from benchmarks.synthetic import PROSQA_TRAIN
from benchmarks.train_step import allocate_gradients, variant
from coconut_ds.data.batching import Batch

VARIANTS = ("textbook", "coconut_ds", "coconut_ds+checkpointing")
ROWS = {"bf16": 32, "fp32": 8}
BATCHES = 8


def cases(setting: Setting) -> list[str]:
    last = LAST_STAGE["prosqa"]
    precisions = ("fp32",) if setting.tiny else tuple(ROWS)

    def timed(stages: Iterable[int]) -> list[str]:
        return [f"{p} stage {stage} {name}" for stage in stages for p in precisions for name in VARIANTS]

    first = [*timed([last]), *(f"{precision} passes" for precision in precisions)]
    return first if setting.tiny else [*first, *timed([0]), *timed(range(1, last))]


def run(case: str, setting: Setting, seconds: float) -> dict[str, Any]:
    precision, what, *rest = case.split()
    base = model_of("gpt2", setting, precision)
    allocate_gradients(base)
    rows = 2 if setting.tiny else ROWS[precision]
    if what == "stage":
        return timed(variant(rest[1], base), int(rest[0]), base, rows, setting)
    return passes(variant("coconut_ds", base), base, rows, setting)


def batches(stage: int, base: Any, rows: int, setting: Setting) -> list[Batch]:
    """Micro-batches of problems as they come, none chosen for its length."""
    count = 2 if setting.tiny else BATCHES
    size = base.config.vocab_size
    problems = problems_of("prosqa", rows * count, size, setting)
    shares = [problems[start : start + rows] for start in range(0, len(problems), rows)]
    return [batch_of(share, "prosqa", stage, size, setting.device) for share in shares]


def timed(
    loss_of: Callable[[Batch], Tensor], stage: int, base: Any, rows: int, setting: Setting
) -> dict[str, Any]:
    made = batches(stage, base, rows, setting)
    for batch in made:  # every shape once, so that no allocation is timed
        step(loss_of, batch)
    times = [setting.seconds(lambda batch=batch: step(loss_of, batch)) for batch in made]
    tokens = sum(int(batch.attention_mask_BT.sum()) for batch in made)
    median = statistics.median(times)
    return {
        "rows": rows,
        "step_seconds": round(median, 5),
        "step_seconds_min": round(min(times), 5),
        "step_seconds_max": round(max(times), 5),
        "tokens_per_second": round(tokens / sum(times)),
        "epoch_seconds": round(sum(times) / (rows * len(made)) * PROSQA_TRAIN, 1),
    }


def passes(loss_of: Callable[[Batch], Tensor], base: Any, rows: int, setting: Setting) -> dict[str, Any]:
    """Seconds of a step with and without latents; kernels, and the share of time the device was busy."""
    last = LAST_STAGE["prosqa"]
    found: dict[str, Any] = {
        f"stage_{stage}": timed(loss_of, stage, base, rows, setting)["step_seconds"] for stage in (0, last)
    }
    batch = batches(last, base, rows, setting)[0]
    step(loss_of, batch)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.device == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        wall = setting.seconds(lambda: step(loss_of, batch))
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time for event in kernels) / 1e6
    return found | {
        "kernels": len(kernels),
        "wall_seconds": round(wall, 5),
        "busy_share": round(busy / wall, 3),
    }
