"""On two ranks: what DeepSpeed's engine holds after two steps, and its peaks in a backward and in a step.

    python -m tests.memory.engine_states OUT.json

Writes, for each case, the measured and the planned bytes of the rank that holds most.  On the CPU, the host's
states and the GPU's are measured together.
"""

import gc
import json
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.profiler import ProfilerActivity, profile

from benchmarks.plan_accuracy import SHAPES, TEXT, peak_of_events, real_model, with_padding
from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.tokenizer import Vocabulary
from coconut_ds.engine.engine import Engine, start_distributed
from coconut_ds.memory.fake_run import Trace, build_fake_model, record
from coconut_ds.memory.phases import largest_batch, stages_of
from coconut_ds.memory.zero import (
    Partition,
    Replay,
    Sizes,
    ZeroSettings,
    gpu_states,
    host_states,
    step_items,
)
from coconut_ds.model.loading import load_config, parameter_groups
from tests.launched.forked import ROOT
from tests.launched.gloo import wait_for_gloo

VOCABULARY_SIZE, BUCKET = 8000, 1_000_000
LOW = "bf16.bf16_master_weights_and_grads=true"
IN_FP32 = "optimizer.params.fp32_optimizer_states=false"
CASES = {  # (tuning, DeepSpeed config, --ds)
    "full zero1": ("full", "zero1"),
    "full zero2": ("full", "zero2"),
    "full zero2_offload": ("full", "zero2_offload"),
    "full zero2 8-bit": ("full", "zero2", "optimizer.type=AdamW8bit"),
    "lora zero1": ("lora", "zero1"),
    "lora zero2": ("lora", "zero2"),
    "lora zero2_offload": ("lora", "zero2_offload"),
    "qlora": ("qlora", "zero2_qlora_bf16"),
    "qlora offload": ("qlora", "zero2_offload_bf16_checkpointing"),
    "full 8-bit bf16": ("full", "zero2_adam8bit_bf16"),
    "8+4+4": ("full", "zero2_offload_bf16"),
    "8+4+4 alone": ("full", "zero2_offload_bf16", IN_FP32),
    "8+4+4 checkpointing": ("full", "zero2_offload_bf16_checkpointing"),
    "8+4+4 fp16": ("full", "zero2_offload_fp16_checkpointing", "fp16.initial_scale_power=2"),  # no overflow
    "8+2+2": ("full", "zero2_offload_bf16", LOW),
    "4+2+2": ("full", "zero2_offload_bf16", LOW, "bf16.bf16_optimizer_states=true"),
}


def small_gpt2():
    config = load_config(str(SHAPES / "gpt2"))
    config.n_layer, config.n_embd, config.n_head, config.vocab_size = 4, 256, 4, VOCABULARY_SIZE
    return config


def main(out, only=".*"):
    ranks = start_distributed("fp32")
    wait_for_gloo()
    get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but its bytes are those of a GPU
    results = {}
    for name, case in CASES.items():
        if re.fullmatch(only, name):
            results[name] = compared(*case, ranks=ranks)
            if ranks.is_main:
                Path(out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def compared(tuning, ds_config, *overrides, ranks):
    """Planned and measured bytes of one case."""
    experiment = validate_experiment(
        {
            "project": "plan", "name": "states", "save_path": "runs", "model_id": "benchmarks/shapes/gpt2",
            "train_path": "none.json", "val_path": "none.json", "lr": 1e-4, "num_epochs": 3, "c_thought": 2,
            "epochs_per_stage": 1, "max_latent_stage": 3, "batch_size_training": 2, "method": "coconut",
            "gradient_accumulation_steps": 2, "tuning": tuning.removeprefix("q"),
            "quantization": "nf4" if tuning == "qlora" else "none",
            # Its weights are an optimizer group of their own.
            "thought": "last_hidden" if "_" in ds_config or overrides else "learnable_window",
        },
        "states",
    )  # fmt: skip
    size = VOCABULARY_SIZE
    vocabulary = Vocabulary(None, size, size + 1, size + 2, eos_id=0, pad_id=0)
    batch = largest_batch([TEXT.problem()], stages_of(experiment)[-1], experiment, vocabulary, 2)
    batch = with_padding(batch)
    ds_config = load_ds_config(f"{ROOT}/ds_configs/{ds_config}.json", list(overrides))
    ds_config.stock["zero_optimization"]["reduce_bucket_size"] = BUCKET
    gc.collect()
    before = held_bytes()
    model = real_model(experiment, small_gpt2(), size + 3, vocabulary, ds_config.latent_memory)
    settings = ds_config.resolve(experiment, ranks.world_size)
    sizes = Sizes.of(model, parameter_groups(model, experiment))
    engine = Engine(model, parameter_groups(model, experiment), settings, ranks)
    for _ in range(2):
        step_peak(engine, batch)
    gc.collect()
    held = held_bytes() - before
    engine.backward(engine.loss(batch))
    backward = min(most(backward_peak(engine, batch)) for _ in range(3))
    engine.step()
    step = min(most(step_peak(engine, batch)) for _ in range(2))
    zero = ZeroSettings.of(ds_config, ranks.world_size, True, "cpu")
    fake_model = build_fake_model(
        experiment, small_gpt2(), size + 3, vocabulary.special_token_ids, ds_config.latent_memory,
        ds_config.precision, "cpu",
    )  # fmt: skip
    trace, nothing = record(fake_model, batch), Trace([], sizes.flat)
    partitions = Partition.of_every_rank(sizes, zero)
    more = max(Replay(trace, sizes, zero, p).peak - Replay(nothing, sizes, zero, p).peak for p in partitions)
    on_gpu = sum(item.size for item in gpu_states(sizes, zero))
    host = [item for item in host_states(sizes, zero) if item.component not in ("process", "start")]
    engine._engine.destroy()
    return {
        "measured_states": most(held),
        "planned_states": on_gpu + sum(item.size for item in host),
        "measured_backward": backward,
        "planned_backward": more,
        "measured_step": step,
        "planned_step": sum(item.size for item in step_items(sizes, zero)),
        "on_gpu": on_gpu,
        "share": Partition.heaviest(sizes, zero).size,
    }


def step_peak(engine, batch):
    """Peak of an optimizer step beyond the states, with what is left of its micro-batches."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):
            engine.backward(engine.loss(batch))
        begins = time.time_ns()
        engine.step()
    return peak_of_events(profiler, begins)


def backward_peak(engine, batch):
    """Peak of one micro-batch; of three the smallest is compared, on a busy machine one may stand out."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine.backward(engine.loss(batch))
    return peak_of_events(profiler)


def most(value):
    """The largest over the ranks."""
    tensor = torch.tensor([float(value)])
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def held_bytes():
    """Bytes of all tensors' storages of this process."""
    storages = {}
    for thing in gc.get_objects():
        try:
            if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                if thing.grad is not None:
                    storages[thing.grad.untyped_storage().data_ptr()] = thing.grad.untyped_storage().nbytes()
        except (ReferenceError, RuntimeError):
            continue
    return sum(storages.values())


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(*arguments)
