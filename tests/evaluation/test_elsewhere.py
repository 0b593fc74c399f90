"""Relative paths of a run folder count from where the run was started, not from the working folder."""

import contextlib
import json
import os
import shutil

import pytest
import yaml

from coconut_ds.__main__ import main
from coconut_ds.config.experiment import load_named_experiment
from coconut_ds.evaluation.measure import split_path
from coconut_ds.evaluation.saved_models import find_one
from coconut_ds.files import from_start
from coconut_ds.reports.run_records import read_run
from coconut_ds.runs.run_folder import run_folder
from tests.run_folders import make_run


@pytest.fixture(scope="module")
def started(tiny_experiment, arithmetic, tmp_path_factory):
    """A folder with data/, model/ and two runs that were started in it: a CoT run, and LoRA on top of it."""
    root = tmp_path_factory.mktemp("started")
    shutil.copytree(arithmetic, root / "data", ignore=shutil.ignore_patterns("gpt2", "runs", "cache"))
    shutil.copytree(arithmetic / "gpt2", root / "model")
    paths = {
        "model_id": "model",
        "train_path": "data/arithmetic_train.json",
        "val_path": "data/arithmetic_valid.json",
        "test_path": "data/arithmetic_test.json",
        "max_new_tokens": 4,
        "eval_max_items": 4,
    }
    with contextlib.chdir(root):
        for name, more in {
            "cot": {"method": "cot"},
            "lora": {"tuning": "lora", "load_model_path": "runs/cot/best_stage_0"},
        }.items():
            run = make_run(tiny_experiment | paths, root / "runs", epochs=(4,), name=name, **more)
            text = (run / "experiment.yaml").read_text().replace(f"save_path: {root}/runs", "save_path: runs")
            (run / "experiment.yaml").write_text(text)
            (run / "environment.json").write_text(json.dumps({"folder": str(root)}))
    return root


@pytest.mark.parametrize("name", ["cot", "lora"])
def test_a_run_is_evaluated_from_another_folder(started, tmp_path, monkeypatch, name, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(started / "data" / "arithmetic_train.json", tmp_path / "data" / "arithmetic_valid.json")
    run = started / "runs" / name
    assert main(["eval", str(run)]) == 0
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert (last["file"], last["role"]) == (str(started / "data" / "arithmetic_valid.json"), "own")
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "coconut.json").read_text())["base_model"] == str(started / "model")
    assert read_run(run).dataset == "arithmetic"
    relative = find_one(str(run), overrides=["val_path=data/arithmetic_valid.json"]).experiment
    assert split_path(relative, "valid") == "data/arithmetic_valid.json"  # the command line counts from here


def test_a_run_is_resumed_from_another_folder(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = load_named_experiment(started / "runs" / "lora" / "experiment.yaml")
    assert (experiment.save_path, experiment.model_id) == (str(started / "runs"), str(started / "model"))
    assert experiment.load_model_path == f"{started}/runs/cot/best_stage_0"
    monkeypatch.chdir(started)
    assert load_named_experiment("runs/lora/experiment.yaml").model_id == "model"


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("place", ["runs/lora", "elsewhere", "runs/renamed"])
def test_a_copied_run_writes_to_its_own_folder(started, tmp_path, monkeypatch, place, absolute):
    """`cp -r w1/. w2/; cd w2; train runs/lora/experiment.yaml`; or the run folder alone, under any name."""
    copy = tmp_path / place
    shutil.copytree(started / "runs" / "lora", copy)
    for name in ("data", "model"):
        shutil.copytree(started / name, tmp_path / name)
    settings = copy / "experiment.yaml"
    if absolute:
        settings.write_text(settings.read_text().replace("save_path: runs", f"save_path: {started}/runs"))
    for folder in (tmp_path, started, copy):
        monkeypatch.chdir(folder)
        for path in (settings, os.path.relpath(settings)):
            experiment = load_named_experiment(path)
            assert run_folder(experiment).resolve() == copy
            assert run_folder(load_named_experiment(path, ["name=new"])).resolve() == copy.parent / "new"
            elsewhere = load_named_experiment(path, [f"save_path={tmp_path}/other"])
            assert elsewhere.save_path == f"{tmp_path}/other"
            its_own = not absolute and place.startswith("runs/")
            root = tmp_path if its_own else started
            assert os.path.realpath(experiment.val_path) == str(root / "data" / "arithmetic_valid.json")
            assert os.path.realpath(experiment.model_id) == str(root / "model")


def test_a_config_that_is_called_experiment_is_no_run_folder(tiny_experiment, tmp_path):
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump({**tiny_experiment, "save_path": "/somewhere"}))
    assert load_named_experiment(tmp_path / "experiment.yaml").save_path == "/somewhere"


def test_the_message_names_the_file_that_was_looked_for(started, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(started / "runs" / "cot", moved)
    (moved / "environment.json").write_text(json.dumps({"folder": "/nowhere"}))
    assert main(["eval", str(moved)]) == 2
    assert "/nowhere/data/arithmetic_valid.json: no such file" in capsys.readouterr().err
    assert main(["eval", str(moved), "--set", "val_path=data/x.json"]) == 2
    assert f"data/x.json: no such file in {tmp_path}" in capsys.readouterr().err
    shutil.copytree(started / "data", tmp_path / "data")  # moved together with its data
    assert main(["eval", str(moved)]) == 0


@pytest.mark.parametrize(
    "record", [None, "[]", "{", "{}", '{"folder": 5}', '{"folder": "relative"}', '{"folder": "/a\\u0000b"}']
)
def test_a_record_without_a_start_folder_changes_nothing(tmp_path, record):
    if record is not None:
        (tmp_path / "environment.json").write_text(record)
    assert from_start("data", tmp_path / "experiment.yaml") == "data"
