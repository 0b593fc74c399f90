"""Launched on two ranks: what DeepSpeed's engine really holds after two steps, and its peak in a backward.

    deepspeed --num_gpus 2 --module tests.memory.engine_states OUT.json

Writes per tuning and ds_config the measured and the planned bytes of the rank that holds most.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.plan_accuracy import TEXT, peak_of_events, real_model, with_padding
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
    replay,
    step_items,
)
from coconut_ds.model.loading import load_config, parameter_groups
from tests.launched.gloo import wait_for_gloo

VOCABULARY_SIZE, BUCKET = 8000, 1_000_000
# name -> --ds overrides of zero2_offload_bf16.json, which decide in how many bytes the host keeps its states
IN_FP32 = ["optimizer.params.fp32_optimizer_states=false"]
LOW = ["bf16.bf16_master_weights_and_grads=true"]
HOST = {"8+4+4": [], "alone": IN_FP32, "8+2+2": LOW, "4+2+2": [*LOW, "bf16.bf16_optimizer_states=true"]}


def small_gpt2():
    config = load_config("benchmarks/shapes/gpt2")
    config.n_layer, config.n_embd, config.n_head, config.vocab_size = 4, 256, 4, VOCABULARY_SIZE
    return config


def main(out, case="engine"):
    ranks = start_distributed("fp32")
    wait_for_gloo()
    if case == "host":
        results = {name: host_bytes(overrides, ranks) for name, overrides in HOST.items()}
    else:
        results = {tuning: compared(tuning, ranks) for tuning in ("full", "lora")}
    if ranks.is_main:
        Path(out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def compared(tuning, ranks):
    """Planned and measured bytes by ds_config."""
    trained = validate_experiment(
        {
            "project": "plan", "name": "states", "save_path": "runs", "model_id": "benchmarks/shapes/gpt2",
            "train_path": "none.json", "val_path": "none.json", "lr": 1e-4, "num_epochs": 3, "c_thought": 2,
            "epochs_per_stage": 1, "max_latent_stage": 3, "batch_size_training": 2, "method": "coconut",
            "gradient_accumulation_steps": 2, "tuning": tuning, "thought": "learnable_window",
        },
        "states",
    )  # fmt: skip
    size = VOCABULARY_SIZE
    vocabulary = Vocabulary(None, size, size + 1, size + 2, eos_id=0, pad_id=0)
    batch = largest_batch([TEXT.problem()], stages_of(trained)[-1], trained, vocabulary, 2)
    batch = with_padding(batch)
    results = {}
    for name in ("zero1", "zero2", "zero2_offload", "zero2_8bit"):
        is_8bit = name == "zero2_8bit"
        overrides = ["optimizer.type=AdamW8bit"] if is_8bit else []
        # Without weights of the thought there is one optimizer group.
        experiment = replace(trained, thought="last_hidden") if is_8bit else trained
        ds_config = load_ds_config(f"ds_configs/{name.removesuffix('_8bit')}.json", overrides)
        ds_config.stock["zero_optimization"]["reduce_bucket_size"] = BUCKET
        gc.collect()
        before = held_bytes()
        model = real_model(experiment, small_gpt2(), size + 3, vocabulary, ds_config.latent_memory)
        settings = ds_config.resolve(experiment, ranks.world_size)
        sizes = Sizes.of(model, parameter_groups(model, experiment))
        engine = Engine(model, parameter_groups(model, experiment), settings, ranks)
        for _ in range(2):
            for _ in range(2):
                engine.backward(engine.loss(batch))
            engine.step()
        gc.collect()
        held = held_bytes() - before
        engine.backward(engine.loss(batch))
        backward = min(most(backward_peak(engine, batch)) for _ in range(3))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as step_profiler:
            engine.step()
        zero = ZeroSettings.of(ds_config, ranks.world_size, True, "cpu")
        fake_model = build_fake_model(
            experiment,
            small_gpt2(),
            size + 3,
            vocabulary.special_token_ids,
            ds_config.latent_memory,
            device="cpu",
        )
        trace, nothing = record(fake_model, batch), Trace([], sizes.flat)
        more = max(
            Replay(trace, sizes, zero, p).peak - Replay(nothing, sizes, zero, p).peak
            for p in Partition.of_every_rank(sizes, zero)
        )
        # ZeRO-1's bucket stays from the first micro-batch of a step to its end.
        bucket = zero.model_bytes * zero.bucket if zero.stage == 1 else 0
        host = [i for i in host_states(sizes, zero) if i.component not in ("process", "start")]
        results[name] = {
            "measured_states": most(held),
            "planned_states": sum(i.size for i in [*gpu_states(sizes, zero), *host]),
            "measured_backward": backward,
            "planned_backward": more - bucket,
            "measured_step": most(peak_of_events(step_profiler)),
            "planned_step": sum(i.size for i in step_items(sizes, zero)) - kept_for_step(sizes, zero),
        }
        engine._engine.destroy()
        del engine, model, fake_model
    return results


def host_bytes(overrides, ranks):
    """Planned and measured bytes of all states after two steps in bf16; on the CPU, host and GPU are one."""
    experiment = validate_experiment(
        {
            "project": "plan", "name": "host", "save_path": "runs", "model_id": "benchmarks/shapes/gpt2",
            "train_path": "none.json", "val_path": "none.json", "lr": 1e-4, "num_epochs": 1, "method": "cot",
            "batch_size_training": 2, "gradient_accumulation_steps": 2,
        },
        "host",
    )  # fmt: skip
    size = VOCABULARY_SIZE
    vocabulary = Vocabulary(None, size, size + 1, size + 2, eos_id=0, pad_id=0)
    batch = largest_batch([TEXT.problem()], stages_of(experiment)[-1], experiment, vocabulary, 2)
    ds_config = load_ds_config("ds_configs/zero2_offload_bf16.json", overrides)
    gc.collect()
    before = held_bytes()
    model = real_model(experiment, small_gpt2(), size + 3, vocabulary, ds_config.latent_memory)
    engine = Engine(
        model, parameter_groups(model, experiment), ds_config.resolve(experiment, ranks.world_size), ranks
    )
    for _ in range(2):
        for _ in range(2):
            engine.backward(engine.loss(batch))
        engine.step()
    gc.collect()
    sizes = Sizes.of(model, parameter_groups(model, experiment))
    zero = ZeroSettings.of(ds_config, ranks.world_size, True, "cpu")
    host = [item for item in host_states(sizes, zero) if item.component not in ("process", "start")]
    measured = most(held_bytes() - before)
    engine._engine.destroy()
    return {
        "measured": measured,
        "planned": sum(item.size for item in [*gpu_states(sizes, zero), *host]),
        "share": Partition.heaviest(sizes, zero).size,
    }


def backward_peak(engine, batch):
    """Peak of one micro-batch; of three the smallest is compared, on a busy machine one may stand out."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine.backward(engine.loss(batch))
    return peak_of_events(profiler)


def kept_for_step(sizes, zero):
    """Gradients that are there when the step begins."""
    return replay(Trace([], sizes.flat), sizes, zero).peak


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
