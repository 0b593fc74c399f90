"""Equal losses for all ds_configs, ranks and accumulation, and for a resumed run."""

import json

import pytest
import yaml

from tests.launched.forked import ROOT
from tests.launched.start import start

STEPS = 20
SWAPPED = ("zero1", "zero2", "zero2_offload", "zero3_offload", "zero2_offload_recompute")


def case(name, experiment, ds_config, **changes):
    keys = {key: changes.pop(key) for key in ("latent_memory", "epoch") if key in changes}
    return {
        "name": name,
        "experiment": experiment | changes,
        "ds_config": f"{ROOT}/ds_configs/{ds_config}.json",
        "steps": STEPS,
        **keys,
    }


def run(cases, folder, ranks, warm):
    (folder / "cases.json").write_text(json.dumps(cases))
    warm.run("tests.launched.losses", folder / "cases.json", folder / "losses.json", ranks=ranks, cwd=folder)
    return json.loads((folder / "losses.json").read_text())


@pytest.fixture(scope="module")
def two_ranks(tiny_experiment, tmp_path_factory, warm):
    cases = [case(name, tiny_experiment, name, epoch=2) for name in SWAPPED]
    cases.append(case("bf16", tiny_experiment, "zero2_offload_bf16", epoch=2))
    cases.append(
        case(
            "accumulated",
            tiny_experiment,
            "zero2",
            epoch=2,
            batch_size_training=2,
            gradient_accumulation_steps=4,
        )
    )
    return run(cases, tmp_path_factory.mktemp("two_ranks"), 2, warm)


@pytest.fixture(scope="module")
def one_rank(tiny_experiment, tmp_path_factory, warm):
    cases = [
        case("at_once", tiny_experiment, "zero2", epoch=2, batch_size_training=16),
        case(
            "one_by_one",
            tiny_experiment,
            "zero2",
            epoch=2,
            batch_size_training=1,
            gradient_accumulation_steps=16,
        ),
    ]
    return run(cases, tmp_path_factory.mktemp("one_rank"), 1, warm)


@pytest.mark.slow
@pytest.mark.parametrize("name", SWAPPED[1:])
def test_swapping_the_ds_config_changes_no_loss(two_ranks, name):
    assert len(two_ranks[name]) == STEPS
    assert two_ranks[name] == pytest.approx(two_ranks["zero1"], abs=1e-5)
    assert two_ranks[name][-1] < two_ranks[name][0]


@pytest.mark.slow
def test_bf16_twin_is_near(two_ranks):
    assert two_ranks["bf16"] == pytest.approx(two_ranks["zero2_offload"], rel=0.05)
    assert two_ranks["bf16"] != two_ranks["zero2_offload"]


@pytest.mark.slow
def test_accumulation_and_ranks_weigh_every_token_the_same(two_ranks, one_rank):
    for losses in (two_ranks["accumulated"], one_rank["at_once"], one_rank["one_by_one"]):
        assert losses == pytest.approx(two_ranks["zero2"], abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny_experiment, tmp_path, warm):
    def train(name, epochs):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump(tiny_experiment | {"name": name, "save_path": str(tmp_path), "num_epochs": epochs})
        )
        ds_config = ROOT / "ds_configs/zero2_offload.json"
        train = ("train", path, "--deepspeed_config", ds_config)
        warm.run("coconut_ds", *train, ranks=1, cwd=tmp_path)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] in ("train", "valid")]

    def numbers(records):
        return [(r["kind"], r["step"], r["loss"], r.get("accuracy")) for r in records]

    train("interrupted", 2)
    assert numbers(train("interrupted", 4)) == numbers(train("straight", 4))


@pytest.mark.slow
def test_a_start_does_not_load_torchs_compiler(tiny_experiment, tmp_path):
    settings = tiny_experiment | {"save_path": str(tmp_path), "num_epochs": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    train = ("train", tmp_path / "tiny.yaml", "--deepspeed_config", "ds_configs/zero2_offload.json")
    process = start("coconut_ds", *train, ranks=1, PYTHONPROFILEIMPORTTIME="1")
    assert process.returncode == 0, process.stderr[-4000:]
    assert "deepspeed.runtime.zero.muon" in process.stderr
    assert "torch._inductor.compile_fx" not in process.stderr


@pytest.mark.slow
def test_a_bad_file_ends_every_rank_with_one_message(tiny_experiment, tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(tiny_experiment | {"epoch_per_stage": 3}))
    process = start(
        "coconut_ds", "train", tmp_path / "bad.yaml", "--deepspeed_config", "ds_configs/zero2.json"
    )
    assert process.returncode == 2
    assert process.stderr.count("did you mean 'epochs_per_stage'?") == 1
    assert "Traceback" not in process.stderr
