"""Part d: which models train on one card under the limit: an engine, ZeRO-2 with offload, six latents.

Each case is three optimizer steps of one row of ProsQA's longest, recomputation on; it is noted as too large
where it runs out of memory.  Seconds are those of the last step, host memory the process's peak.

Knows: the engine.  Does not know: the loop.
"""

import resource
from typing import Any

import torch

from benchmarks.gpu_parts import CARD_GIB, Setting
from benchmarks.gpu_parts.models import LAST_STAGE, longest_batch, model_of
from benchmarks.synthetic import coconut_around, experiment_like, vocabulary_of
from coconut_ds.config.deepspeed import LatentMemory, load_ds_config
from coconut_ds.engine.engine import Engine, schedule, start_distributed
from coconut_ds.memory.planner import MIB
from coconut_ds.model.loading import parameter_groups

LIMIT_GIB = CARD_GIB
ISOLATED = True  # what an engine that ran out of memory leaves behind must not weigh on the next
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama-3.2-1b")
DS_CONFIGS = {"fp32": "zero2_offload", "bf16": "zero2_offload_bf16"}
FIRST = ("gpt2 full fp32", "llama-3.2-1b lora bf16", "gpt2-large full bf16", "gpt2-xl full bf16")
STEPS = 3


def cases(setting: Setting) -> list[str]:
    models = ("llama-3.2-1b",) if setting.tiny else MODELS
    every = [f"{model} {how} {p}" for model in models for how in ("full", "lora") for p in DS_CONFIGS]
    return every if setting.tiny else [*FIRST, *(case for case in every if case not in FIRST)]


def run(case: str, setting: Setting, seconds: float) -> dict[str, Any]:
    model, tuning, precision = case.split()
    experiment = experiment_like("prosqa", batch_size_training=1, tuning=tuning, bf16=precision == "bf16")
    ds_config = load_ds_config(f"ds_configs/{DS_CONFIGS[precision]}.json")
    settings = ds_config.resolve(experiment, 1)
    ranks = start_distributed(precision)
    base = model_of(model, setting, on_host=True)
    size = base.config.vocab_size
    parameters = sum(p.numel() for p in base.parameters())
    markers = vocabulary_of(size).special_token_ids
    module = coconut_around(base, experiment, LatentMemory(activation_checkpointing="layers"), markers)
    found: dict[str, Any] = {
        "parameters": parameters,
        "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }
    batch = longest_batch("prosqa", LAST_STAGE["prosqa"], 1, size, setting)
    try:
        engine = Engine(
            module, parameter_groups(module, experiment), settings, ranks, schedule("constant", 0, 1)
        )

        def one_step() -> None:
            engine.backward(engine.loss(batch))
            engine.step()

        peak = setting.peak(lambda: [one_step() for _ in range(STEPS - 1)])
        found |= {"fits": True, "step_seconds": round(setting.seconds(one_step), 3), "peak_bytes": peak}
    except torch.OutOfMemoryError:
        found |= {"fits": False}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"host_peak_mib": round(host / MIB)}
