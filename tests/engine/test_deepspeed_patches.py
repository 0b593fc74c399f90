"""The places in DeepSpeed that deepspeed_patches.py depends on are still there, in the version it names."""

import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from coconut_ds.engine import deepspeed_patches as patches

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
