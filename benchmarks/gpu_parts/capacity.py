"""Part b: the largest micro-batch of GPT-2 124M under the limit, and the plan beside the measured peak.

Weights and gradients are on the device, the optimizer is not (ZeRO-2 with offload).  Every row is as long
as the longest of a thousand.  `planned` is the trace of the same step without storage,
plus weights, gradients and what cuBLAS keeps.

Knows: variants, plans.  Does not know: DeepSpeed.
"""

from typing import Any

import torch

from benchmarks.gpu_parts import CARD_GIB, Setting
from benchmarks.gpu_parts.models import LAST_STAGE, config_of, longest_batch, model_of, step
from benchmarks.synthetic import experiment_like, vocabulary_of
from benchmarks.train_step import allocate_gradients, variant
from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.memory.fake_run import build_fake_model, record
from coconut_ds.memory.phases import cublas_bytes

LIMIT_GIB = CARD_GIB
VARIANTS = ("textbook", "coconut_ds", "coconut_ds+checkpointing")
MODEL = "gpt2"
MAX_ROWS = 2048
TINY_ROWS = 3


def cases(setting: Setting) -> list[str]:
    precisions = ("bf16",) if setting.tiny else ("fp32", "bf16")
    stages = ("last",) if setting.tiny else ("last", "first")
    return [
        f"{dataset} {stage} {precision} {name}"
        for stage in stages
        for precision in precisions
        for dataset in ("prosqa", "gsm")
        for name in VARIANTS
    ]


def run(case: str, setting: Setting, seconds: float) -> dict[str, Any]:
    dataset, stage_name, precision, name = case.split()
    stage = 1 if stage_name == "first" else LAST_STAGE[dataset]
    base = model_of(MODEL, setting, precision)
    allocate_gradients(base)
    loss_of = variant(name, base)

    def peak_of(rows: int) -> int | None:
        batch = longest_batch(dataset, stage, rows, base.config.vocab_size, setting)
        return setting.peak(lambda: step(loss_of, batch))

    def fits(rows: int) -> bool:
        if setting.device == "cpu":
            return rows <= TINY_ROWS
        try:
            peak_of(rows)
        except torch.OutOfMemoryError:
            return False
        finally:
            setting.forget()
        return True

    rows = largest(fits)
    if rows == 0:
        return {"rows": 0}
    measured = peak_of(rows)
    found = {"rows": rows, "measured_bytes": measured}
    if name != "textbook":
        held = 2 * sum(p.numel() * p.element_size() for p in base.parameters())
        kept = cublas_bytes(setting.described()["device"]) if setting.device == "cuda" else 0
        found["planned_bytes"] = held + kept + planned(dataset, stage, rows, precision, name, setting)
    return found


def largest(fits: Any) -> int:
    """The most rows that fit, to about a sixteenth."""
    low, high = 0, 1
    while high <= MAX_ROWS and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def planned(dataset: str, stage: int, rows: int, precision: str, name: str, setting: Setting) -> int:
    """Bytes of one step above weights and gradients, from a run without storage."""
    config = config_of(MODEL, setting)
    size = config.vocab_size
    memory = LatentMemory(activation_checkpointing="layers" if name.endswith("+checkpointing") else "none")
    markers = vocabulary_of(size).special_token_ids
    fake_model = build_fake_model(
        experiment_like(dataset), config, size, markers, memory, precision, setting.device
    )
    cpu = Setting("cpu", setting.tiny, setting.gib)
    return record(fake_model, longest_batch(dataset, stage, rows, size, cpu)).peak
