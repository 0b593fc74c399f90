"""`runs` and `report` of a folder of runs, and commands from another working folder."""

import json
import shutil

import pytest
import yaml

from coconut_ds.__main__ import main
from coconut_ds.runs.run_folder import RunLock
from tests.reports.made_profile import profile

LINE = {
    "kind": "valid", "step": 4, "stage": 1, "at": "1 step hidden, 1 latent", "loss": 1.0, "time": 1.0,
    "accuracy": 0.5, "cot_match": 0.0, "num_items": 4, "num_correct": 2, "mean_tokens": 1.0,
    "grading": "exact",
}  # fmt: skip


@pytest.fixture
def runs(tiny_experiment, tmp_path):
    """Two runs, of which `done` has all epochs; a checkpoint with settings; a damaged run."""
    for name, epochs in (("done", 6), ("sweep/half", 3), ("fresh", 0)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        experiment = tiny_experiment | {"num_epochs": 6, "name": folder.name, "test_path": None}
        (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
        lines = [json.dumps(LINE | {"epoch": epoch}) for epoch in range(epochs)]
        (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    shutil.copytree(tmp_path / "runs" / "done", tmp_path / "runs" / "done" / "checkpoint_6")
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "experiment.yaml").write_text("name: [")
    return tmp_path / "runs"


def test_runs_lists_state_stage_and_accuracy(runs, capsys, monkeypatch):
    lock = RunLock(runs / "fresh")
    monkeypatch.chdir(runs.parent)
    assert main(["runs"]) == 0
    rows = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:]}
    assert "finished coconut 6 of 6 1 step hidden, 1 latent 50.0 %" in rows["runs/done"]
    assert "stopped coconut 3 of 6" in rows["runs/sweep/half"]
    assert "running coconut 0 of 6 - -" in rows["runs/fresh"]
    assert "unreadable" in rows["runs/bad"] and len(rows) == 4
    lock.release()
    (runs / "sweep" / "half" / "checkpoint_6").mkdir()  # early stopping ends the schedule
    assert main(["runs", str(runs / "sweep")]) == 0
    assert "finished  coconut  3 of 6" in capsys.readouterr().out
    for state in ("stopped", "profile"):
        assert main(["runs", str(runs / "fresh"), "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert row["state"] == state and row["valid"] is None
        (runs / "fresh" / "memory").mkdir(exist_ok=True)
        (runs / "fresh" / "memory" / "profile.json").write_text(json.dumps(profile()))
    assert main(["runs", str(runs / "none")]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_report_takes_a_folder_of_runs(runs, capsys):
    shutil.rmtree(runs / "bad")
    shutil.rmtree(runs / "fresh")
    assert main(["report", str(runs), "--no-page"]) == 0
    output = capsys.readouterr().out
    assert f"run folders: {runs / 'done'}, {runs / 'sweep' / 'half'}" in output


def test_a_command_is_advised_only_for_a_split_that_exists(runs, capsys):
    shutil.rmtree(runs / "bad")
    shutil.rmtree(runs / "fresh")
    text = (runs / "done" / "experiment.yaml").read_text()
    (runs / "done" / "experiment.yaml").write_text(text.replace("c_thought: 1", "c_thought: 2"))
    assert main(["report", str(runs), "--no-page"]) == 0
    output = capsys.readouterr().out
    assert "--split test" not in output and f"`eval {runs / 'done'} --split valid`" in output


def test_a_yaml_finds_its_project_from_another_folder(tiny_experiment, tmp_path, monkeypatch, capsys):
    (tmp_path / "project" / "configs" / "full").mkdir(parents=True)
    (tmp_path / "project" / "data").symlink_to(tiny_experiment["train_path"].rpartition("/")[0])
    path = tmp_path / "project" / "configs" / "full" / "c.yaml"
    names = {
        key: f"data/arithmetic_{split}.json"
        for key, split in (("train_path", "train"), ("val_path", "valid"))
    }
    path.write_text(yaml.safe_dump(tiny_experiment | names | {"test_path": None}))
    monkeypatch.chdir(tmp_path)
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr()
    assert f"train_path: {tmp_path}/project/data/arithmetic_train.json" in shown.out
    assert f"train_path, val_path: not in this folder, read from {tmp_path / 'project'}" in shown.err
    monkeypatch.chdir(tmp_path / "project")
    assert main(["show", str(path)]) == 0
    assert "train_path: data/arithmetic_train.json" in capsys.readouterr().out


def test_validate_notes_a_validation_set_inside_the_training_file(tiny_experiment, tmp_path, capsys):
    with open(tiny_experiment["train_path"]) as reader:
        items = json.load(reader)
    (tmp_path / "v.json").write_text(json.dumps(items[:5]))
    values = tiny_experiment | {"val_path": str(tmp_path / "v.json")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert main(["validate", str(tmp_path / "c.yaml")]) == 0
    assert "5 of 5 questions are also in" in capsys.readouterr().err
