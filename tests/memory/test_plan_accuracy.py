"""Planned against measured: activations of real models, and what the engine really holds on two ranks.

benchmarks/plan_accuracy.py runs every combination; here each value of each choice appears at two
batch sizes, all in this process.
"""

import json

import pytest

from benchmarks.plan_accuracy import Case, cases, compare, model_configs
from tests.launched.start import start

WITHIN = 0.10


def chosen(model, rows):
    """Every second combination, with the two batch sizes in turn."""
    every = list(cases(model, (rows[0],)))
    return [
        Case(c.model, c.method, c.recompute, c.thought, c.tuning, rows[place // 2 % 2])
        for place, c in enumerate(every)
        if place % 2 == 0 or c.method == "cot"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("llama", [False, True], ids=["gpt2-124m", "llama-4-layers"])
def test_the_activation_peak_is_planned_within_10_percent(llama):
    ((name, config, rows),) = model_configs(llama)
    picked = chosen(name, rows)
    assert {c.method for c in picked} == {"cot", "coconut stage 1", "coconut last stage"}
    assert {(c.tuning, c.recompute) for c in picked} == {
        (t, r) for t in ("full", "lora") for r in ("none", "layers")
    }
    assert {c.rows for c in picked} == set(rows) and len({c.thought for c in picked}) == 2
    errors = {str(case): compare(case, config).error for case in picked}
    assert {case: error for case, error in errors.items() if abs(error) > WITHIN} == {}


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_states_and_backward_of_the_real_engine(tuning, tmp_path):
    out = tmp_path / "states.json"
    done = start("tests.memory.engine_states", out, tuning, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, sizes in json.loads(out.read_text()).items():
        assert sizes["planned_states"] == pytest.approx(sizes["measured_states"], rel=0.05), name
        assert sizes["planned_backward"] == pytest.approx(sizes["measured_backward"], rel=WITHIN), name
        if (
            tuning == "full" and name != "zero2_offload"
        ):  # on the CPU its step shares one memory with the host's part
            assert sizes["planned_step"] == pytest.approx(sizes["measured_step"], rel=WITHIN), name
