"""Planned against measured: activations of real models, and what the engine really holds on two ranks.

benchmarks/plan_accuracy.py runs every combination; here are a few of them, all in this process.
"""

import json
from dataclasses import replace

import pytest
from transformers import GPT2Config

from benchmarks.plan_accuracy import SHAPES, Case, cases, compare, small_configs
from coconut_ds.model.loading import load_config
from tests.memory.engine_states import CASES

WITHIN = 0.10
WITHIN_ACTIVATIONS = 0.03
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
OPT, GPT2, LLAMA = "3-layer OPT, width 200", "3-layer GPT-2, width 300", "3-layer Llama, width 360, own head"


def test_the_activation_peak_is_planned_within_3_percent():
    config = GPT2Config(n_layer=3, n_embd=192, n_head=3, vocab_size=4000, **SPECIAL_TOKENS)
    picked = list(cases("gpt2", (2, 4)))[::3]
    assert {(c.tuning, c.activation_checkpointing) for c in picked} == {
        (t, r) for t in ("full", "lora") for r in ("none", "layers")
    }
    assert {c.method for c in picked} == {"cot", "coconut stage 1", "coconut last stage"}
    errors = {str(case): compare(case, config).error for case in picked}
    assert {case: error for case, error in errors.items() if abs(error) > WITHIN_ACTIVATIONS} == {}


@pytest.mark.slow
def test_the_activation_peak_of_gpt2_124m_is_planned_within_3_percent():
    case = Case("gpt2", "coconut last stage", "layers", "learnable_window", "lora", 2)
    comparison = compare(case, load_config(str(SHAPES / "gpt2")))
    assert abs(comparison.error) <= WITHIN_ACTIVATIONS


@pytest.mark.parametrize(
    "model, choices",
    [
        (OPT, {}),  # autograd adds up the gradients of its positions in place
        (GPT2, {"tuning": "lora"}),  # dropout's mask is converted
        (LLAMA, {"tuning": "lora", "activation_checkpointing": "layers"}),
        (OPT, {"tuning": "dora"}),
    ],
)
def test_what_gpt2_does_not_have_is_planned_within_1_percent(model, choices):
    plain = Case(model, "coconut last stage", "none", "last_hidden", "full", 2)
    comparison = compare(replace(plain, **choices), small_configs()[model])
    assert abs(comparison.error) < 0.01


@pytest.fixture(scope="module")
def engine_states(tmp_path_factory, warm):
    """Of two ranks; benchmarks/engine_bytes.py measures one rank as well."""
    out = tmp_path_factory.mktemp("engine") / "states.json"
    warm.run("tests.memory.engine_states", out, ranks=2, cwd=out.parent, timeout=3600)
    return json.loads(out.read_text())


@pytest.mark.slow
def test_states_backward_and_step_of_the_real_engine(engine_states):
    assert list(engine_states) == list(CASES)
    for name, sizes in engine_states.items():
        assert sizes["planned_states"] == pytest.approx(sizes["measured_states"], rel=0.01), name
        assert sizes["planned_backward"] == pytest.approx(sizes["measured_backward"], rel=WITHIN), name
        assert sizes["planned_step"] == pytest.approx(sizes["measured_step"], rel=WITHIN), name


@pytest.mark.slow
def test_16_bit_states_on_the_host_of_the_real_engine(engine_states):
    """8+4+4, 8+2+2 and 4+2+2 bytes a parameter of moments, master weights and gradients."""
    measured = {name: sizes["measured_states"] for name, sizes in engine_states.items()}
    assert measured["8+4+4 alone"] == pytest.approx(measured["8+4+4"], rel=1e-3)
    moments = measured["8+2+2"] - measured["4+2+2"]
    assert moments == pytest.approx(4 * engine_states["8+2+2"]["share"], rel=0.02)
