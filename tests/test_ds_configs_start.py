"""What `validate` accepts starts: DeepSpeed JSONs of other projects train on the CPU."""

import json

import pytest

from tests.launched.start import start

ADAMW = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "betas": [0.9, 0.999]}}
FILES = {
    "no torch_adam": {
        "optimizer": ADAMW,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000},
    },
}


@pytest.fixture(scope="module")
def losses(tiny_experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    cases = []
    for name, values in FILES.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(values))
        cases.append({"name": name, "experiment": tiny_experiment, "ds_config": str(path), "steps": 2})
    (folder / "cases.json").write_text(json.dumps(cases))
    process = start("tests.launched.losses", folder / "cases.json", folder / "losses.json", ranks=1)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_trains(losses, name):
    assert len(losses[name]) == 2 and losses[name] == pytest.approx(losses["no torch_adam"], rel=1e-4)
