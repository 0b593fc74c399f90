"""DeepSpeed JSONs in the styles of other projects, tests/config/wild/: accepted as they are, and they train.

Authors: Hugging Face Trainer, Axolotl, LLaMA-Factory, LMFlow, Qwen, LLaVA, Alpaca, DeepSpeed's tutorials.
"""

import json
from pathlib import Path

import pytest

from coconut_ds.config.deepspeed import load_ds_config

WILD = {path.stem: path for path in sorted((Path(__file__).parents[1] / "config" / "wild").glob("*.json"))}
STEPS = 5


@pytest.mark.parametrize("name", WILD)
def test_is_accepted(name):
    assert load_ds_config(WILD[name]).zero_stage in (1, 2, 3)


@pytest.fixture(scope="module")
def losses(tiny_experiment, tmp_path_factory, warm):
    folder = tmp_path_factory.mktemp("start")
    on_the_cpu = [path for path in WILD.values() if load_ds_config(path).precision != "fp16"]
    cases = [
        {"name": path.stem, "experiment": tiny_experiment, "ds_config": str(path), "steps": STEPS}
        for path in on_the_cpu
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    warm.run("tests.launched.losses", folder / "cases.json", folder / "losses.json", ranks=1, cwd=folder)
    return json.loads((folder / "losses.json").read_text())


def test_trains(losses):
    assert len(losses) >= 30
    expected = losses["deepspeed_tutorial_zero2"]
    assert len(expected) == STEPS and expected[-1] < expected[0]
    for name, values in losses.items():
        tolerance = 1e-4 if load_ds_config(WILD[name]).precision == "fp32" else 0.02
        assert values == pytest.approx(expected, rel=tolerance), name
