"""What an engine adapts to the device of its rank, and the locks of interrupted builds."""

import os
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from coconut_ds.engine import engine
from coconut_ds.engine.deepspeed_patches import remove_stale_locks, to_compile
from coconut_ds.errors import ConfigError

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def for_device(device: str, params: dict, **zero) -> dict:
    ds_config = {"optimizer": {"type": "AdamW", "params": params}, "zero_optimization": {"stage": 2, **zero}}
    return engine._for_device(ds_config, torch.device(device))["optimizer"]["params"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "params, zero, expected",
    [
        ({"lr": 1}, {}, {"lr": 1, "torch_adam": True}),
        ({"lr": 1, "bias_correction": True}, {}, {"lr": 1, "torch_adam": True}),
        ({"lr": 1, "bias_correction": False}, {}, {"lr": 1, "bias_correction": False}),
        ({"lr": 1}, OFFLOAD, {"lr": 1}),
        ({"lr": 1}, {"offload_optimizer": {"device": "none"}}, {"lr": 1, "torch_adam": True}),
    ],
)
def test_an_optimizer_beside_the_weights_needs_no_compiler(device, params, zero, expected):
    assert for_device(device, params, **zero) == expected


def test_fused_adam_is_there_for_those_who_ask_for_it():
    assert for_device("cuda", {"torch_adam": False}) == {"torch_adam": False}
    assert for_device("cpu", {"torch_adam": False}) == {"torch_adam": True}


def test_quantized_collectives_need_a_gpu():
    with pytest.raises(ConfigError, match="zero_quantized_weights: needs a GPU"):
        for_device("cpu", {}, zero_quantized_weights=True)
    assert for_device("cuda", {}, zero_quantized_weights=True)
    with pytest.raises(ConfigError, match="offload_optimizer.super_offload: needs a GPU"):
        for_device("cpu", {}, offload_optimizer={"device": "cpu", "super_offload": True})


@pytest.mark.parametrize(
    "precision, capability, refusal",
    [
        ("fp32", (6, 1), None),
        ("fp16", (6, 1), "fp16 is slow"),
        ("fp16", (7, 5), None),
        ("bf16", (7, 5), "bf16 needs compute capability 8.0"),
        ("bf16", (9, 0), None),
    ],
)
def test_a_rank_takes_its_gpu_without_cudnn_attention(monkeypatch, precision, capability, refusal):
    cuda, chosen, cudnn = torch.cuda, [], []
    monkeypatch.delenv("DS_ALLOW_DEPRECATED_FP16", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": chosen.append,
        "get_device_capability": lambda number: capability,
    }.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    with nullcontext() if refusal is None else pytest.raises(ConfigError, match=refusal):
        engine._choose_device(precision)
    assert chosen == [1] and cudnn == [False]
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="local rank 1 has no GPU: 1 visible"):
        engine._choose_device(precision)


@pytest.mark.parametrize("visible, local_rank", [(1, "0"), (2, "1")])
def test_a_task_of_slurm_that_sees_one_gpu_takes_it(monkeypatch, visible, local_rank):
    seen = []

    def choose_device(precision):
        seen.append(os.environ["LOCAL_RANK"])
        raise ConfigError("enough")

    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "1", "SLURM_LOCALID": "1"}
    usual = {name: value for name, value in os.environ.items() if name not in engine.SLURM_NAMES}
    monkeypatch.setattr(os, "environ", usual | slurm)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(engine, "_choose_device", choose_device)
    with pytest.raises(ConfigError, match="enough"):
        engine.start_distributed()
    assert seen == [local_rank]


def test_locks_of_interrupted_builds_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    young, old, in_use = (tmp_path / "py311" / name / "lock" for name in ("young", "old", "in_use"))
    for lock in (young, old, in_use):
        lock.parent.mkdir(parents=True)
        lock.touch()
    for lock in (old, in_use):
        os.utime(lock, (time.time() - 3600,) * 2)
    with subprocess.Popen(["sleep", "60"], cwd=in_use.parent) as build:
        assert remove_stale_locks() == [old]
        build.kill()
    assert young.exists() and in_use.exists() and not old.exists()


def test_the_first_start_says_what_it_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    nothing = {"cpu_adam": False, "deepspeed_shm_comm": False}
    assert to_compile(nothing, on_gpu=False) == ["deepspeed_shm_comm", "cpu_adam"]
    assert to_compile(nothing, on_gpu=True) == ["cpu_adam"]
    assert to_compile({"cpu_adam": 1, "deepspeed_shm_comm": 1}, on_gpu=False) == []
    built = tmp_path / "py311_cpu" / "cpu_adam" / "cpu_adam.so"
    built.parent.mkdir(parents=True)
    built.touch()
    ninja = built.parent / "build.ninja"
    ninja.write_text("cflags = -isystem /another/environment/torch/include\n")
    assert to_compile(nothing, on_gpu=False) == ["deepspeed_shm_comm", "cpu_adam"]
    ninja.write_text(f"cflags = -isystem {Path(torch.__file__).parent}/include\n")
    assert to_compile(nothing, on_gpu=False) == ["deepspeed_shm_comm"]
