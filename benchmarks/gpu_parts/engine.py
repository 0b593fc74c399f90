"""Part f: the engine as users start it, on one GPU.

overlap_comm     losses of steps with and without overlapped communication, which must be equal
launcher         an epoch through DeepSpeed's launcher, --num_gpus 1
"""

import sys
from typing import Any

from benchmarks.gpu_parts import CARD_GIB, Setting
from benchmarks.gpu_parts.learning import graph_settings, task, train
from benchmarks.gpu_parts.models import LAST_STAGE, model_of
from benchmarks.gpu_parts.speed import batches
from benchmarks.synthetic import coconut_around, experiment_like, vocabulary_of
from coconut_ds.config.deepspeed import LatentMemory, load_ds_config
from coconut_ds.engine.engine import Engine, schedule, start_distributed
from coconut_ds.model.loading import parameter_groups

LIMIT_GIB = CARD_GIB
ISOLATED = True
STEPS, ROWS = 20, 4


def cases(setting: Setting) -> list[str]:
    return ["overlap_comm", "launcher"]


def run(case: str, setting: Setting, seconds: float) -> dict[str, Any]:
    if case == "launcher":
        folder, data = task(setting)
        changes = {"name": "launched", "num_epochs": 1, "epochs_per_stage": 1}
        launcher = sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--module"
        return train(graph_settings(data, "coconut", setting) | changes, folder, setting, seconds, launcher)
    without, overlapped = (losses(value, setting) for value in ("false", "true"))
    differences = [abs(a - b) for a, b in zip(without, overlapped, strict=True)]
    return {
        "steps": STEPS,
        "first_loss": without[0],
        "last_loss": without[-1],
        "largest_difference": max(differences),
    }


def losses(overlap_comm: str, setting: Setting) -> list[float]:
    """Of GPT-2 under ZeRO-2, six latents."""
    experiment = experiment_like("prosqa", batch_size_training=ROWS)
    overrides = [f"zero_optimization.overlap_comm={overlap_comm}"]
    ds_config = load_ds_config("ds_configs/zero2.json", overrides)
    ranks = start_distributed("fp32")
    base = model_of("gpt2", Setting("cpu", setting.tiny, setting.gib))
    markers = vocabulary_of(base.config.vocab_size).special_token_ids
    module = coconut_around(base, experiment, LatentMemory(), markers)
    groups = parameter_groups(module, experiment)
    engine = Engine(module, groups, ds_config.resolve(experiment, 1), ranks, schedule("constant", 0, 1))
    made, found = batches(LAST_STAGE["prosqa"], base, ROWS, setting), []
    for step in range(STEPS):
        found.append(float(engine.backward(engine.loss(made[step % len(made)]))))
        engine.step()
    return found
