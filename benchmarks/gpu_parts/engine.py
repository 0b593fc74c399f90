"""Part f: the engine as users start it, on one GPU.

overlap_comm     losses of steps with and without overlapped communication, which must be equal; two runs
                 without it show what repeats
fp16, bf16       losses with offload, beside those in fp32
launcher         an epoch of a tiny task through DeepSpeed's launcher, --num_gpus 1
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu_parts import CARD_GIB, Setting
from benchmarks.gpu_parts.learning import graph_settings, task, train
from benchmarks.gpu_parts.models import LAST_STAGE, model_of
from benchmarks.gpu_parts.speed import batches
from benchmarks.synthetic import engine_around, experiment_like

LIMIT_GIB = CARD_GIB
ISOLATED = True
STEPS, ROWS = 20, 4


def cases(setting: Setting) -> list[str]:
    return ["overlap_comm", *(["fp16"] if setting.device == "cuda" else []), "launcher", "bf16"]


def run(case: str, setting: Setting, seconds: float) -> dict[str, Any]:
    if case == "launcher":
        setting = replace(setting, tiny=True)
        folder, data = task(setting)
        changes = {"name": "launched", "num_epochs": 1, "epochs_per_stage": 1}
        launcher = sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--module"
        return train(graph_settings(data, "coconut", setting) | changes, folder, setting, seconds, launcher)
    torch.backends.cuda.enable_mem_efficient_sdp(case != "overlap_comm")  # its backward adds in any order
    found: dict[str, Any] = {"steps": STEPS}
    if case == "overlap_comm":
        values = ("false", "false", "true")
        expected, again, others = (
            losses("zero2", setting, f"zero_optimization.overlap_comm={value}")[0] for value in values
        )
        found["difference_when_repeated"] = largest_difference(expected, again)
    else:
        expected, _ = losses("zero2_offload", setting)
        others, found["skipped"] = losses(f"zero2_offload_{case}", setting)
    found |= {"first_loss": expected[0], "last_loss": expected[-1]}
    return found | {"largest_difference": largest_difference(expected, others)}


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def losses(ds_config: str, setting: Setting, *overrides: str) -> tuple[list[float], int]:
    """Of GPT-2, six latents; and the steps that fp16 skipped."""
    experiment = experiment_like("prosqa", batch_size_training=ROWS, bf16=ds_config.endswith("bf16"))
    base = model_of("gpt2", setting, on_host=True)
    made, found, skipped = batches(LAST_STAGE["prosqa"], base, ROWS, setting), [], 0
    engine = engine_around(base, experiment, ds_config, overrides)
    for step in range(STEPS):
        found.append(float(engine.backward(engine.loss(made[step % len(made)]))))
        skipped += not engine.step()
    return found, skipped
