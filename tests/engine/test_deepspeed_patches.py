"""The places in DeepSpeed that deepspeed_patches.py depends on are still there, in the version it names."""

import os
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import cpuinfo
import cpuinfo.cpuinfo
import pytest
import torch

from coconut_ds.distributed import Ranks
from coconut_ds.engine import deepspeed_patches as patches
from coconut_ds.engine.engine import Engine

INSTALLED = {name: getattr(cpuinfo.cpuinfo, name) for name in ("get_cpu_info", "_get_cpu_info_from_cpuid")}
DEEPSPEED = Path(find_spec("deepspeed").submodule_search_locations[0])
STAGE_1_AND_2, SHM = "runtime/zero/stage_1_and_2.py", "ops/csrc/cpu/comm/shm.cpp"
# What each patch reads, sets or replaces, and where DeepSpeed has it.
PLACES = [
    ("runtime/zero/muon/original_muon.py", "@compiler.compile()"),
    (SHM, '#define SHM_BUFFER_NAME "deepspeed_allreduce_buffer"'),
    (SHM, "SHM_BUFFER_NAME,\n             getuid(),\n             addr_string,\n             port_string);"),
    (SHM, 'snprintf(shm_name, NAME_BUF_SIZE, "%s_%d", shm_name_prefix, rank);'),
    (STAGE_1_AND_2, "link_hp_params(lp_param_list=self.bit16_groups[i],"),
    (STAGE_1_AND_2, "self._param_slice_mappings = self._create_param_mapping()"),
    ("ops/csrc/includes/cpu_adam.h", "_betta1_t *= _betta1;"),
    ("ops/adam/cpu_adam.py", "self.ds_opt_adam.create_adam(self.opt_id"),
    ("runtime/fp16/loss_scaler.py", patches.SCALER_AT_MINIMUM),
    (STAGE_1_AND_2, "self.clip_grad = checkpoint_clip_grad"),
    ("runtime/zero/utils.py", "return type(optimizer) in ZERO_SUPPORTED_OPTIMIZERS"),
    ("ops/adam/cpu_adam.py", "        from cpuinfo import get_cpu_info\n"),
    ("ops/op_builder/builder.py", "            from cpuinfo import get_cpu_info\n"),
    ("runtime/engine.py", "return self._config.load_universal_checkpoint"),
]


def test_the_installed_version_is_the_one_that_is_patched():
    assert metadata.version("deepspeed") == patches.VERSION


@pytest.mark.parametrize("file, text", PLACES)
def test_deepspeed_still_has(file, text):
    assert text in (DEEPSPEED / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("own", [None, "0"])
def test_muon_is_imported_without_a_trace_in_the_environment(monkeypatch, own):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if own is not None:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", own)
    patches.import_muon_uncompiled()
    assert os.environ.get("TORCHDYNAMO_DISABLE") == own


@pytest.fixture
def own_cpuinfo(monkeypatch):
    """py-cpuinfo as it is installed; what a patch replaces in it ends with the test."""
    saved = [(cpuinfo, "get_cpu_info"), (cpuinfo.cpuinfo, "_get_cpu_info_from_cpuid")]
    for module, name in saved:
        monkeypatch.setattr(module, name, INSTALLED[name])
    patches._processor.cache_clear()
    yield
    patches._processor.cache_clear()


def test_the_processor_is_described_without_measuring_its_clock(own_cpuinfo, monkeypatch):
    """With all that DeepSpeed reads, as py-cpuinfo itself has it."""
    measured = cpuinfo.get_cpu_info()
    monkeypatch.setattr("multiprocessing.Process", lambda **_: pytest.fail("a process measures the clock"))
    patches.describe_processor_once()
    described = cpuinfo.get_cpu_info()
    assert described is cpuinfo.get_cpu_info()
    for key in ("arch", "vendor_id_raw"):
        assert described[key] == measured[key]
    for flag in ("avx2", "avx512", "avx512f", "sve"):
        assert (flag in described["flags"]) == (flag in measured["flags"])


def test_an_engine_starts_with_the_patches_that_save_time(own_cpuinfo, monkeypatch):
    def initialize(**_):
        assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules
        assert cpuinfo.get_cpu_info is patches._processor
        raise InterruptedError

    monkeypatch.setattr("deepspeed.initialize", initialize)
    config = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}
    with pytest.raises(InterruptedError):
        Engine(torch.nn.Linear(1, 1), [], config, Ranks(0, 1, torch.device("cpu")))
