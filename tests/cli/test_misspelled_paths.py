"""A path with a spelling error, or the file of another kind, ends in one line that names what to write."""

import json

import pytest
import yaml

from coconut_ds.__main__ import main
from coconut_ds.config.deepspeed import default_ds_config


@pytest.fixture
def folder(tiny_experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny_experiment))
    (tmp_path / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    (tmp_path / "train_data.csv").write_text("question,steps,answer\na,b,c\n")
    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    "words, message",
    [
        ("train mine.yml", "mine.yml: no such file; did you mean 'mine.yaml'?"),
        ("validate mine.yaml --deepspeed zero_2.json", "no such file; did you mean 'zero2.json'?"),
        ("validate train_dta.csv", "did you mean 'train_data.csv'?"),
        ("train mine.yaml --set train_path=train_dta.csv", "did you mean 'train_data.csv'?"),
        ("train mine.yaml --set model_id=models/tiny-lama", "did you mean 'models/tiny-llama'?"),
        ("train zero2.json", "is a DeepSpeed config, not an experiment; write CONFIG.yaml --deepspeed_"),
        ("validate mine.yaml --deepspeed_config mine.yaml", "is a YAML file: write CONFIG.yaml --deep"),
        ("train train_data.csv", "train_data.csv: holds text; expected 'key: value' lines"),
        ("train nowhere/mine.yaml", "nowhere/mine.yaml: no such file\n"),
    ],
)  # fmt: skip
def test_one_line_says_what_to_write(folder, capsys, words, message):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1 and "median" not in error


@pytest.mark.parametrize("words", ["validate mine.yaml", "plan"])
def test_a_name_inside_a_folder_is_a_path(folder, capsys, words):
    option = "--model" if words == "plan" else "--set"
    value = "models/nothere" if words == "plan" else "model_id=models/nothere"
    assert main([*words.split(), option, value]) == 2
    assert "model_id: models/nothere does not exist" in capsys.readouterr().err


def test_an_experiment_whose_files_are_on_another_machine_is_ok(folder, capsys):
    elsewhere = ["model_id", "train_path", "val_path", "test_path"]
    words = [word for key in elsewhere for word in ("--set", f"{key}=models/nothere.json")]
    assert main(["validate", "mine.yaml", *words]) == 0
    assert "data not checked, since this machine does not have models/nothere.json" in capsys.readouterr().out


def test_a_model_in_the_cache_of_the_hub_may_have_a_folder_of_its_owner_beside_it(folder, monkeypatch):
    from coconut_ds.data import tokenizer

    monkeypatch.setattr(tokenizer, "try_to_load_from_cache", lambda *_: "cache/config.json")
    assert tokenizer.locate_model("models/tiny-lama") == ("models/tiny-lama", {})
    assert tokenizer.is_on_this_machine("models/tiny-lama")


@pytest.mark.parametrize("name", [".tmp-exported", "my model", "größe", "-x", "a--b", "x" * 120, "a/b"])
def test_folders_with_names_that_the_hub_forbids_are_found(folder, name):
    from coconut_ds.data import tokenizer

    (folder / "models" / name).mkdir(parents=True)
    for path in (f"models/{name}", str(folder / "models" / name)):
        assert tokenizer.locate_model(path) == (path, {}) and tokenizer.is_on_this_machine(path)
    assert not tokenizer.is_on_this_machine("-a name with blanks")


def test_a_package_that_is_missing_while_a_command_runs_is_named(folder, capsys, monkeypatch):
    def run(_):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr("coconut_ds.cli.report.run", run)
    assert main(["report", "runs/x"]) == 2
    assert "error: matplotlib is not installed for " in capsys.readouterr().err


def test_the_ds_config_of_accelerate_launch_is_used(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "mine.json")
    assert default_ds_config() == "mine.json"


def test_data_that_train_would_download_is_named_and_not_downloaded(folder, capsys, monkeypatch):
    asked = []

    def snapshot_download(*_, local_files_only=False, **__):
        asked.append(local_files_only)
        raise OSError("not cached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for more in ([], ["--deepspeed_config", "zero2.json"]):
        assert main(["validate", "mine.yaml", "--set", "train_path=hf://owner/name:train", *more]) == 0
        said = capsys.readouterr().out
        assert "data not checked, since this machine does not have hf://owner/name:train" in said
    assert main(["validate", "mine.yaml", "--set", "val_path=nowhere.json"]) == 0
    assert "this machine does not have nowhere.json" in capsys.readouterr().out
    assert asked == [True, True]


def test_a_run_folder_that_cannot_be_made_is_refused_and_nothing_is_made(folder, capsys):
    words = ["validate", "mine.yaml", "--deepspeed_config", "zero2.json", "--set"]
    assert main([*words, "save_path=train_data.csv"]) == 2
    assert "cannot write here (Not a directory); choose another 'save_path'" in capsys.readouterr().err
    assert main([*words, "save_path=new/runs"]) == 0 and not (folder / "new").exists()
