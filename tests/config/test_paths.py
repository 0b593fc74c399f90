"""Paths that a shell would have changed, and paths that are none."""

import json
from pathlib import Path

import pytest

from coconut_ds import __main__ as program
from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import load_experiment, validate_experiment
from coconut_ds.config.schema import settings_with
from coconut_ds.errors import ConfigError
from coconut_ds.files import home_expanded
from preprocessing.arithmetic import parse_arguments
from preprocessing.writing import script_arguments

SMALLEST = {"name": "run", "model_id": "gpt2", "method": "coconut", "train_path": "a", "val_path": "b"}
PATHS = settings_with("path_to", "data", "weights", "runs")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("key", PATHS)
def test_home_in_a_setting(home, tmp_path, key):
    assert getattr(validate_experiment(SMALLEST | {key: "~/x"}, "x"), key) == f"{home}/x"
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps(SMALLEST | {key: "~/x"}))
    assert getattr(load_experiment("~/x.yaml"), key) == f"{home}/x"
    assert getattr(load_experiment(file, [f"{key}=~/y"]), key) == f"{home}/y"


def test_every_setting_that_is_a_path_is_checked():
    assert {"save_path", "train_path", "val_path", "test_path", "model_id", "load_model_path"} == set(PATHS)


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("path", ["~nobody-here/x", "$HOME/x", "https://example.com/x", "s3://x/y"])
def test_a_path_that_would_make_an_odd_folder_is_refused(key, path):
    with pytest.raises(ConfigError, match=f"{key}: .*(write the complete path|download it)"):
        validate_experiment(SMALLEST | {key: path}, "x")


def test_other_paths_are_accepted():
    values = SMALLEST | {"train_path": "hf://openai/gsm8k:train", "save_path": "a$b/~c", "val_path": "C:x"}
    experiment = validate_experiment(values, "x")
    assert (experiment.save_path, experiment.val_path) == ("a$b/~c", "C:x")


def test_the_page_of_a_model_is_answered_with_its_id():
    with pytest.raises(ConfigError, match="write 'model_id: openai-community/gpt2'"):
        validate_experiment(SMALLEST | {"model_id": "https://huggingface.co/openai-community/gpt2"}, "x")


def test_home_in_a_ds_config(home, tmp_path):
    nvme = {"device": "nvme", "nvme_path": "~/a"}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": nvme}}))
    for overrides, path in (((), "a"), (["zero_optimization.offload_param.nvme_path=~/b"], "b")):
        stock = load_ds_config("~/ds.json", overrides).stock
        assert stock["zero_optimization"]["offload_param"]["nvme_path"] == f"{home}/{path}"


@pytest.mark.parametrize("name", sorted(program.COMMANDS))
def test_home_on_the_command_line(home, monkeypatch, name):
    """Before any command parses them, so that no option can be forgotten."""
    seen = []
    monkeypatch.setattr(program.Parser, "parse_known_args", lambda _, words: seen.extend(words) or 1 / 0)
    words = ["~/a", "--deepspeed_config", "~/ds.json", "--json=~/o", "--set", "save_path=~/o", "5~6", "~ 5?"]
    with pytest.raises(ZeroDivisionError):
        program.main([name, *words])
    h = str(home)
    assert seen[1:] == [
        h + "/a", "--deepspeed_config", h + "/ds.json", f"--json={h}/o", "--set", f"save_path={h}/o", "5~6",
        "~ 5?",
    ]  # fmt: skip


def test_home_in_the_options_of_scripts(home):
    options = parse_arguments(["--output-dir=~/a", "--model-dir", "~/b"])
    assert (options.output_dir, options.model_dir) == (home / "a", home / "b")
    assert script_arguments("x").parse_args(["--output-dir=~/a"]).output_dir == home / "a"


def test_what_is_not_a_path_stays(home):
    assert home_expanded("a~/b") == "a~/b" and home_expanded("hf://a/b:c") == "hf://a/b:c"
    assert Path(home_expanded("~")) == home
