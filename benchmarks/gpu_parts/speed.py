"""Part c: seconds a step and tokens a second over ProsQA's curriculum, and from them seconds an epoch.

    stage N VARIANT      forward and backward of micro-batches of real lengths, GPT-2 124M
    host MODEL VARIANT   six latents, 8 rows: milliseconds until the last launch (host), of all threads (CPU),
                         until the last kernel (step) and of kernels alone, and their number

An epoch is 17,886 problems.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_parts import Setting
from benchmarks.gpu_parts.models import LAST_STAGE, batch_of, model_of, problems_of, step
from benchmarks.synthetic import PROSQA_TRAIN
from benchmarks.train_step import allocate_gradients, variant, warm_up
from coconut_ds.data.batching import Batch

VARIANTS = ("textbook", "coconut_ds", "coconut_ds+checkpointing")
HOST_VARIANTS = ("single_pass", *VARIANTS)
ROWS = {"bf16": 32, "fp32": 8}
BATCHES, HOST_ROWS, REPEATS = 8, 8, 5


def cases(setting: Setting) -> list[str]:
    last = LAST_STAGE["prosqa"]

    def timed(precision: str, stages: Iterable[int]) -> list[str]:
        return [f"{precision} stage {stage} {name}" for stage in stages for name in VARIANTS]

    def host(precision: str, model: str) -> list[str]:
        return [f"{precision} host {model} {name}" for name in HOST_VARIANTS]

    if setting.tiny:
        return [*timed("fp32", [last]), *host("fp32", "gpt2")]
    first = [*timed("bf16", [last]), *host("bf16", "gpt2"), *timed("fp32", [last])]
    first += [*host("bf16", "llama-3.2-1b"), *host("fp32", "gpt2"), *timed("bf16", [0]), *timed("fp32", [0])]
    return [*first, *(case for stage in range(1, last) for p in ROWS for case in timed(p, [stage]))]


def run(case: str, setting: Setting, seconds: float) -> dict[str, Any]:
    precision, what, where, name = case.split()
    base = model_of(where if what == "host" else "gpt2", setting, precision)
    allocate_gradients(base)
    loss_of = variant(name, base)
    rows = 2 if setting.tiny else HOST_ROWS if what == "host" else ROWS[precision]
    warm_up(loss_of, rows, base.config.vocab_size, setting.device)
    if what == "stage":
        return timed(loss_of, int(where), base, rows, setting)
    return host_times(loss_of, batches(LAST_STAGE["prosqa"], base, rows, setting)[0], setting)


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
    for batch in [*made, *made]:  # every shape, so that no allocation and no recording is timed
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


def host_times(loss_of: Callable[[Batch], Tensor], batch: Batch, setting: Setting) -> dict[str, Any]:
    """Least milliseconds of a step, and its kernels."""
    step(loss_of, batch)
    times = []
    for _ in range(REPEATS):
        setting.wait()
        start, cpu_start = time.perf_counter(), time.process_time()
        step(loss_of, batch)
        launched, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        setting.wait()
        times.append((launched, cpu, time.perf_counter() - start))
    launched, cpu, done = (1000 * min(column) for column in zip(*times, strict=True))
    found = {"host_ms": launched, "cpu_ms": cpu, "step_ms": done}
    if setting.device == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step(loss_of, batch)
            setting.wait()
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        found |= {"kernel_ms": sum(e.device_time for e in kernels) / 1000, "kernels": len(kernels)}
    return {"rows": batch.shape[0]} | {key: round(value, 2) for key, value in found.items()}
