"""Sweeps: combinations of a grid; skipped, failed and stopped runs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from coconut_ds.__main__ import main
from coconut_ds.cli.sweep import summary
from coconut_ds.config.experiment import experiment_to_yaml
from coconut_ds.errors import ConfigError
from coconut_ds.runs.changes import data_hashes
from coconut_ds.runs.checkpoint_folders import CheckpointFolders, Manifest, TrainState
from coconut_ds.training import sweep
from tests.launched.start import environment

ROOT = Path(__file__).parents[2]
ZERO2, ZERO1 = (str(ROOT / "ds_configs" / f"{name}.json") for name in ("zero2", "zero1"))


@pytest.fixture
def config(tmp_path):
    values = {
        "name": "base", "save_path": str(tmp_path / "runs"), "model_id": "gpt2", "coconut": True,
        "c_thought": 1, "epochs_per_stage": 1, "max_latent_stage": 1, "num_epochs": 2,
        "train_path": "t.json", "val_path": "v.json",
    }  # fmt: skip
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def finish(point, epoch=None):
    """Write the files of a finished run."""
    point.folder.mkdir(parents=True, exist_ok=True)
    (point.folder / "experiment.yaml").write_text(experiment_to_yaml(point.experiment))
    epoch = point.experiment.num_epochs - 1 if epoch is None else epoch
    line = {"kind": "valid", "epoch": epoch, "stage": epoch, "num_correct": 3, "num_items": 4}
    line |= {"accuracy": 0.75, "mean_tokens": 1.0}
    (point.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_seeds_are_a_range_and_the_summary_has_the_share_that_learned(config, tmp_path, capsys):
    assert sweep.parse_seeds("3-5,7,4") == [3, 4, 5, 7]
    command = ["sweep", config, "--deepspeed_config", ZERO2, "--seeds", "0-1,5"]
    assert main([*command, "--num_gpus", "1", "--dry-run"]) == 0
    assert [line.count("seed=") for line in capsys.readouterr().out.splitlines()] == [1, 1, 1]
    grid = sweep.points(config, ZERO2, [], {"seed": [0, 1, 5]})
    for point, correct in zip(grid, (4, 4, 0), strict=True):
        finish(point)
        lines = (point.folder / "metrics.jsonl").read_text()
        numbers = {"num_correct": correct, "accuracy": correct / 4, "chance": 0.0}
        line = {**json.loads(lines), **numbers}
        (point.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = summary([sweep.Outcome(point, sweep.FINISHED) for point in grid])
    assert "coconut: 2 of 3 seeds learned it (66.7 % [20.8, 93.9]); not seed 5" in text


@pytest.mark.parametrize("seeds", ["x", "5-3", "-1", "1,,2", "0-99999999"])
def test_seeds_that_are_no_seeds_are_refused(config, capsys, seeds):
    assert main(["sweep", config, "--deepspeed_config", ZERO2, f"--seeds={seeds}", "--dry-run"]) == 2
    assert f"--seeds {seeds}: " in capsys.readouterr().err


def test_seeds_beside_seeds_of_the_grid_are_refused(config, capsys):
    command = ["sweep", config, "--deepspeed_config", ZERO2, "--seeds=1", "--grid", "seed=1"]
    assert main([*command, "--dry-run"]) == 2
    assert "keep one of the two" in capsys.readouterr().err


def test_every_combination_is_a_run_of_its_own(config):
    axes = {"seed": [0, 1], "method": ["coconut", "no_cot"], "deepspeed_config": [ZERO2, ZERO1]}
    grid = sweep.points(config, None, ["lr=0.5"], axes)
    assert len(grid) == 8
    names = [point.experiment.name for point in grid]
    assert names[0] == "base-seed-0-method-coconut-zero2" and names[-1] == "base-seed-1-method-no_cot-zero1"
    assert {(p.experiment.seed, p.experiment.method, p.ds_config) for p in grid} == {
        (seed, method, path) for seed in (0, 1) for method in ("coconut", "no_cot") for path in (ZERO2, ZERO1)
    }
    assert all(point.experiment.lr == 0.5 for point in grid)


def test_the_command_line_of_a_point_means_the_point(config):
    (point,) = sweep.points(config, ZERO2, [], {"method": ["no_cot"]})
    command = sweep.launch_command(point, 2, port=12345)
    assert command[1:5] == ["--num_gpus", "2", "--master_port", "12345"]
    assert command[5:9] == ["--log_level", "error", "--module", "coconut_ds"]
    overrides = [command[place + 1] for place, word in enumerate(command) if word == "--set"]
    assert sweep.load_experiment(command[command.index("train") + 1], overrides) == point.experiment
    assert sweep.launch_command(point, 1)[:3] == [sys.executable, "-m", "coconut_ds"]


@pytest.mark.parametrize(
    "axes, problem",
    [
        ({"sed": [1]}, "did you mean"),
        ({"seed": []}, "needs a list"),
        ({"seed": 3}, "needs a list"),
        ({"seed": [1, 1]}, "two combinations"),
        ({"method": ["magic"], "seed": [1]}, "method"),
        ({"debug": [True]}, "saves nothing"),
        ({"deepspeed_config": ["/nowhere.json"]}, "/nowhere.json"),
    ],
)
def test_a_grid_is_checked_before_anything_runs(config, axes, problem):
    with pytest.raises(ConfigError, match=problem):
        sweep.points(config, ZERO2, [], axes)


def test_axes_of_the_command_line():
    assert sweep.parse_axes(["seed=0,1", "method=cot", "lr=0.001,0.1"]) == {
        "seed": [0, 1],
        "method": ["cot"],
        "lr": [0.001, 0.1],
    }
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        sweep.parse_axes(["seed"])


def test_a_run_is_finished_when_its_last_epoch_is_measured_with_the_same_settings(config):
    (point,) = sweep.points(config, ZERO2, [], {"seed": [0]})
    assert not point.is_finished()
    finish(point, epoch=0)
    assert not point.is_finished()
    finish(point)
    assert point.is_finished()
    (same,) = sweep.points(config, ZERO2, ["keep_checkpoints=1"], {"seed": [0]})
    assert same.is_finished()
    (changed,) = sweep.points(config, ZERO2, ["lr=0.25"], {"seed": [0]})
    assert changed.folder == point.folder and not changed.is_finished()


def test_a_run_with_another_optimizer_or_other_data_is_not_finished(config, tmp_path):
    (point,) = sweep.points(config, ZERO2, [], {"seed": [0]})
    finish(point)
    ds_config = json.loads(Path(ZERO2).read_text())
    (point.folder / "ds_config.json").write_text(json.dumps(ds_config))
    assert point.is_finished()
    ds_config["optimizer"]["params"]["betas"] = [0.5, 0.6]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(ds_config))
    (point,) = sweep.points(config, str(other), [], {"seed": [0]})
    assert not point.is_finished()


def test_a_run_on_a_file_that_changed_is_not_finished(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.json").write_text("[]")
    (point,) = sweep.points(config, ZERO2, [], {"seed": [0]})
    finish(point)
    checkpoint = point.folder / "checkpoint_2"
    checkpoint.mkdir()
    saved = {"data": data_hashes(point.experiment)}
    state = TrainState(epoch=2, global_step=1)
    monkeypatch.setattr(
        CheckpointFolders, "manifests", lambda self: {"x": Manifest(state, saved, 1, True, {})}
    )
    assert point.is_finished()
    Path("t.json").write_text("[{}]")
    assert not point.is_finished()


def program(code, point, wanted=0):
    """A command line that stands for a training run."""
    return [sys.executable, "-c", code, str(point.folder), str(wanted)]


def test_failures_are_reported_and_the_rest_goes_on(config, monkeypatch, capsys):
    grid = sweep.points(config, ZERO2, [], {"seed": [0, 1, 2]})
    finish(grid[0])
    started = []

    def command(point, num_gpus):
        if point not in started:
            started.append(point)
        if point is grid[1]:
            return program("import sys; print('ValueError: no luck'); sys.exit(3)", point)
        finish(point)
        return program("print('fine')", point)

    monkeypatch.setattr(sweep, "launch_command", command)
    outcomes = sweep.run_all(grid, 2)
    assert [outcome.state for outcome in outcomes] == [sweep.SKIPPED, sweep.FAILED, sweep.FINISHED]
    assert "exit code 3: ValueError: no luck" in outcomes[1].message
    assert started == grid[1:]
    text = summary(outcomes)
    assert "2 of 3 runs finished" in text and "failed: base-seed-1" in text and "75.0 % [" in text


def test_a_stopped_run_ends_the_sweep(config, monkeypatch):
    grid = sweep.points(config, ZERO2, [], {"seed": [0, 1]})
    monkeypatch.setattr(sweep, "launch_command", lambda point, n: program("raise SystemExit(75)", point))
    assert [outcome.state for outcome in sweep.run_all(grid, 2)] == [sweep.STOPPED]


RANK = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["COCONUT_PID_FOLDER"])
def save(*_):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(folder / str(os.getpid())).touch()
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


def test_a_terminated_sweep_lets_the_ranks_save(config, monkeypatch):
    (point,) = sweep.points(config, ZERO2, [], {"seed": [0]})
    monkeypatch.setattr(sweep, "launch_command", lambda point, n: program(RANK, point))

    def terminate():
        deadline = time.monotonic() + 30
        while not (point.folder / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    (outcome,) = sweep.run_all([point], 2)
    thread.join()
    assert outcome.state == sweep.STOPPED and (point.folder / "saved").exists()


def test_a_grid_file(config, tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    values = {"config": config, "deepspeed_config": ZERO2, "set": ["lr=0.5"], "name": "mine"}
    path.write_text(yaml.safe_dump({**values, "grid": {"seed": [0, 1]}}))
    assert main(["sweep", str(path), "--dry-run", "--num_gpus", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and "--set lr=0.5 --set name=mine-seed-1 --set seed=1" in printed[1]
    path.write_text(yaml.safe_dump({**values, "grid": {"seed": [0]}, "grids": 1}))
    assert main(["sweep", str(path)]) == 2
    assert "'grids' is not a key" in capsys.readouterr().err
    assert main(["sweep", config, "--deepspeed_config", ZERO2]) == 2
    assert "add --grid" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_grid_trains_goes_on_and_prints_one_table(tiny_experiment, tmp_path):
    config = tmp_path / "tiny.yaml"
    settings = {**tiny_experiment, "save_path": str(tmp_path / "runs"), "num_epochs": 1, "eval_max_items": 8}
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "coconut_ds", "sweep", str(config), "--deepspeed_config", ZERO2]
    command += ["--grid", "seed=0,1", "--num_gpus", "1"]

    def start():
        return subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
        )

    first = start()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 of 2 runs finished" in first.stdout and "coconut (2 seeds)" in first.stdout
    assert start().stdout.count("already finished") == 2
