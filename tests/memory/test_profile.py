"""Real steps on two ranks, measured: the phases are all there, and the bytes add up."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from coconut_ds.__main__ import main
from coconut_ds.memory.plan import MIB
from tests.launched.start import start

ROOT = Path(__file__).parents[2]
PASSES = [f"pass {number}" for number in range(4)]  # question, two latents, the last with the answer
STEP = ["embed", *PASSES, "loss", "backward", "reduce"]


@pytest.fixture(scope="module")
def run_folder(tiny_experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    settings = {
        **tiny_experiment,
        "save_path": str(folder),
        "name": "profiled",
        "method": "without_curriculum",
        "gradient_accumulation_steps": 4,
    }
    settings.pop("uniform_prob")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    ds_config = ROOT / "ds_configs" / "zero2_offload.json"
    finished = start("coconut_ds", "profile", folder / "tiny.yaml", "--deepspeed_config", ds_config)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "PLAN AGAINST MEASURED" in finished.stdout
    return folder / "profiled"


@pytest.fixture(scope="module")
def profile(run_folder):
    return json.loads((run_folder / "memory" / "profile.json").read_text())


@pytest.mark.slow
def test_all_phases_of_two_steps_are_there(profile):
    expected = ["initialise"]
    for step in (1, 2):
        for number in ("", " (2)"):
            expected += [f"step {step}: {name}{number}" for name in STEP]
        expected.append(f"step {step}: optimizer step")
    for rank in profile["ranks"]:
        assert [phase["name"] for phase in rank["phases"]] == [*expected, "evaluation", "checkpoint"]


@pytest.mark.slow
def test_the_bytes_add_up(profile, tiny_experiment):
    model = AutoModelForCausalLM.from_pretrained(tiny_experiment["model_id"])
    parameters = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    for rank in profile["ranks"]:
        states = rank["states_mib"]["step 2"]["cpu"]
        # the flat buffer is padded, and holds a thought and three markers' rows besides
        assert parameters <= states["parameters"] <= 1.02 * parameters + 0.01
        # this rank's half: a master weight and two moments
        assert states["optimizer"] == pytest.approx(3 * states["parameters"] / 2, rel=0.02)
        # two independent countings of the same tensors
        ends = {phase["name"]: phase["end_mib"] for phase in rank["phases"]}
        assert ends["step 2: optimizer step"] == pytest.approx(sum(states.values()), abs=0.05)
        assert rank["peak_mib"] == pytest.approx(rank["at_peak"]["mib"], abs=0.01)
        assert sum(rank["at_peak"]["made_in_mib"].values()) == pytest.approx(rank["peak_mib"], abs=0.01)
        assert all(phase["peak_mib"] >= phase["end_mib"] - 0.001 for phase in rank["phases"])
    bucket = 4 * 50_000_000 / MIB
    assert rank["peak_mib"] > bucket


@pytest.mark.slow
def test_moments_appear_at_the_first_step(profile):
    states = profile["ranks"][0]["states_mib"]
    assert states["step 1"]["cpu"]["optimizer"] > 2 * states["initialise"]["cpu"]["optimizer"]
    assert states["step 2"]["cpu"]["optimizer"] == states["step 1"]["cpu"]["optimizer"]


@pytest.mark.slow
def test_no_weights_are_left_and_the_report_shows_it(run_folder, capsys):
    assert sorted(path.name for path in run_folder.iterdir()) == [
        "ds_config.json",
        "experiment.yaml",
        "memory",
    ]
    assert sorted(path.name for path in (run_folder / "memory").iterdir()) == ["plan.json", "profile.json"]
    assert main(["report", str(run_folder)]) == 0
    assert (run_folder / "memory" / "timeline.png").is_file()
