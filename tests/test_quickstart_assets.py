"""The quickstart's files fit each other: shell that parses, a fair comparison, a true table."""

import os
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from coconut_ds.config.experiment import load_experiment
from coconut_ds.data.curriculum import final_stage, stage_at

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "quickstart"
SCRIPTS = sorted((ROOT / "launch").glob("*.sh")) + [ROOT / ".ci" / "run"]
PIN = re.compile(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_and_stops_at_the_first_error(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert any(word in text for word in ("set -euo pipefail", "setup.sh", "ranks.sh", "exec "))


def test_ci_runs_the_test_command():
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & 0o111
    assert "launch/test.sh" in run.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-qlora.txt", "tests/requirements.txt"])
def test_every_requirement_is_pinned_once(name: str):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(PIN.fullmatch(line) for line in lines), lines
    assert len({line.split("==")[0].lower() for line in lines}) == len(lines)


METHOD = {"name", "method", "latent_supervision", "c_thought", "ablate_after_stage"}
SCHEDULE = {"epochs_per_stage", "num_epochs", "warmup_ratio", "early_stopping_patience"}


@pytest.mark.parametrize(
    "name, changed",
    [
        ("no_thoughts", METHOD | {"early_stopping_patience"}),  # the control has all epochs of its last stage
        ("no_cot", METHOD | SCHEDULE | {"uniform_prob", "advance_at", "min_epochs_per_stage"}),
        ("plain", {"name", "latent_supervision"} | SCHEDULE),
    ],
)
def test_a_baseline_differs_from_coconut_only_in_its_method(name: str, changed: set[str]):
    coconut, other = (asdict(load_experiment(CONFIGS / f"{file}.yaml")) for file in ("coconut", name))
    different = {key for key in coconut if coconut[key] != other[key]}
    assert different == changed


def test_the_last_epochs_and_the_test_hide_every_step_of_the_default_chains():
    experiment = load_experiment(CONFIGS / "coconut.yaml")
    steps = 3
    last = stage_at(experiment.num_epochs - 1, experiment)
    assert last.hidden_steps >= steps and last.num_latents == steps
    assert final_stage(experiment).hidden_steps >= steps
    assert stage_at(0, experiment).hidden_steps == 0
    assert isinstance(experiment.epochs_per_stage, tuple)
    assert sum(experiment.epochs_per_stage) == experiment.num_epochs


def test_the_files_that_the_settings_name_are_the_ones_the_script_makes():
    script = (ROOT / "launch" / "quickstart.sh").read_text(encoding="utf-8")
    settings = yaml.safe_load((CONFIGS / "coconut.yaml").read_text(encoding="utf-8"))
    assert f"--model-dir {settings['model_id']}" in script
    for key, split in (("train_path", "train"), ("val_path", "valid"), ("test_path", "test")):
        assert settings[key] == f"data/arithmetic_{split}.json"
    for named in re.findall(r"(?:configs|ds_configs|preprocessing|launch)/[\w/]+\.\w+", script):
        assert (ROOT / named).is_file(), named


@pytest.mark.slow
def test_the_script_ends_in_a_table(tmp_path: Path):
    if not (ROOT / ".venv" / "requirements.sha256").is_file():
        pytest.skip(
            "the environment was not made by launch/setup.sh, and this test must not install anything"
        )
    for name in ("coconut_ds", "configs", "ds_configs", "launch", "preprocessing"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    overrides = ["batch_size_training=500", "epochs_per_stage=1", "num_epochs=4", "eval_max_items=20"]
    command = ["bash", str(tmp_path / "launch" / "quickstart.sh")]
    command += [word for override in overrides for word in ("--set", override)]
    environment = os.environ | {"PLAIN": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("== 6/6") :]
    assert len(re.findall(r"validation, stage \d: .* \d+\.\d %", table)) == 4
    assert re.search(r"validation, latents replaced: swap +\d+\.\d %", table)
    assert re.search(r"test: .*( +\d+\.\d %){3}", table)
    assert len(re.findall(r"coconut.*: with the latents of another example", table)) == 1
