"""Every thought and every method, full tuning and LoRA, on two ranks: train, save, load."""

import json
import math

import pytest

from coconut_ds.config.experiment import Method
from coconut_ds.thoughts import available_thoughts
from tests.launched.forked import ROOT

PAIRS = ("full-zero2", "full-zero3_offload", "lora-zero2_offload", "lora-zero3_offload")
VARIANTS = [f"{thought}-{pair}" for thought in available_thoughts() for pair in PAIRS]
SUPERVISED = [f"step_result-{pair}" for pair in PAIRS]
BF16 = [f"{thought}-lora-zero2_offload_bf16" for thought in ("learnable_window", "normalized_hidden")]
BITSANDBYTES = ["adam8bit", "qlora"]
METHODS = [str(method) for method in Method]
LAST_STAGE = 3

pytestmark = pytest.mark.slow


def variant_case(name, experiment):
    thought, tuning, ds_config = name.split("-")
    return {
        "name": name,
        "experiment": experiment | {"thought": thought, "tuning": tuning, "thought_lr": 0.05},
        "ds_config": f"{ROOT}/ds_configs/{ds_config}.json",
        "epoch": LAST_STAGE,
    }


def supervised_case(name, experiment):
    objective, tuning, ds_config = name.split("-")
    return {
        "name": name,
        "experiment": experiment | {"latent_supervision": objective, "tuning": tuning},
        "ds_config": f"{ROOT}/ds_configs/{ds_config}.json",
        "epoch": LAST_STAGE,
    }


def method_case(name, experiment):
    return {
        "name": name,
        "experiment": experiment | {"method": name},
        "ds_config": f"{ROOT}/ds_configs/zero2_offload.json",
        "epoch": LAST_STAGE,
    }


def bitsandbytes_case(name, experiment):
    tuning = {"tuning": "lora", "quantization": "nf4"} if name == "qlora" else {"tuning": "full"}
    return {
        "name": name,
        "experiment": experiment | tuning,
        "ds_config": f"{ROOT}/ds_configs/zero2_{name}_bf16.json",
        "epoch": LAST_STAGE,
    }


@pytest.fixture(scope="module")
def results(tiny_experiment, tmp_path_factory, warm):
    folder = tmp_path_factory.mktemp("matrix")
    experiment = tiny_experiment | {"lr": 0.01, "uniform_prob": 0.0}
    cases = [variant_case(name, experiment) for name in (*VARIANTS, *BF16)]
    cases += [supervised_case(name, experiment) for name in SUPERVISED]
    cases += [method_case(name, experiment) for name in METHODS]
    cases += [bitsandbytes_case(name, experiment) for name in BITSANDBYTES]
    (folder / "cases.json").write_text(json.dumps(cases))
    files = (folder / "cases.json", folder / "out.json")
    warm.run("tests.launched.matrix", *files, ranks=2, cwd=folder, timeout=540)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("name", [*VARIANTS, *SUPERVISED, *BF16, *METHODS, *BITSANDBYTES])
def test_learns_one_batch_and_goes_on_from_a_checkpoint(results, name):
    losses = results[name]["losses"]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    straight, resumed = results[name]["straight"], results[name]["resumed"]
    assert resumed[0] == straight[0] < losses[0]
    # DeepSpeed's CPU Adam multiplies up the powers of beta as it goes and starts a resumed run from pow().
    assert resumed[1:] == pytest.approx(straight[1:], rel=1e-5)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_resumes_bit_for_bit(results, name):
    assert results[name]["resumed"] == results[name]["straight"]


@pytest.mark.parametrize("name", [name for name in (*VARIANTS, *BF16) if "-lora-" in name])
def test_lora_trains_and_saves_no_weight_of_the_base(results, name):
    trainable = results[name]["trainable"]
    assert trainable
    assert all("lora_" in n or "trainable_tokens_delta" in n or n.startswith("thought.") for n in trainable)
    if "zero3" not in name:
        # The tied head names the marker rows a second time; nothing frozen may be in the file.
        saved = {n.replace("lm_head.", "transformer.wte.") for n in results[name]["saved"]}
        assert saved - {"thought.embedding_norm"} == set(trainable)  # a buffer
        assert results[name]["frozen"] == []


@pytest.mark.parametrize("thought", [*available_thoughts(), "step_result"])
@pytest.mark.parametrize("pair", [PAIRS[:2], PAIRS[2:]], ids=str)
def test_splitting_memory_changes_no_loss(results, thought, pair):
    first, second = (results[f"{thought}-{settings}"]["losses"] for settings in pair)
    assert second == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("ds_config", ["zero2", "zero3_offload"])
def test_window_weights_move_and_are_logged(results, ds_config):
    weights = results[f"learnable_window-full-{ds_config}"]["weights"]
    assert sum(weights) == pytest.approx(1)
    assert weights[0] != pytest.approx(1 - 4e-4, abs=1e-6)
