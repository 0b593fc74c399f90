"""The command line: help texts, show and validate, and a bad file of every kind with its one message."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import coconut_ds
from coconut_ds.__main__ import COMMANDS, main
from tests.conftest import ROOT

NAMES = sorted(COMMANDS)
DS_CONFIG = str(ROOT / "ds_configs" / "zero2.json")


@pytest.fixture
def experiment_file(tiny_experiment, tmp_path):
    def write(**changes):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(tiny_experiment | changes))
        return str(path)

    return write


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage:" in text and len(text) > 200


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {name} " in text or f"    {name}\n" in text for name in NAMES)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"coconut_ds {coconut_ds.__version__}\n"


def test_validate_and_the_errors_of_train_do_not_wait_for_torch():
    program = (
        "import sys; from coconut_ds.__main__ import main; coconut = 'configs/full/gsm_coconut.yaml'\n"
        "main(['validate', 'ds_configs/zero2.json', coconut])\n"
        "assert main(['train', 'no.yaml']) == main(['train', coconut, '--set', 'lrr=1']) == 2\n"
        "assert main(['train', coconut, '--deepspeed_config', 'no.json']) == 2\n"
        "sys.exit('deepspeed' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120).returncode == 0


def test_help_does_not_wait_for_torch():
    """`profile` does: it also starts the engine."""
    program = (
        "import sys; from coconut_ds.__main__ import main\n"
        "for name in sys.argv[1:]:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit: assert 'torch' not in sys.modules, name"
    )
    names = [name for name in NAMES if name != "profile"]
    command = [sys.executable, "-c", program, *names]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 0


def test_a_python_without_the_packages_is_told_where_they_are():
    command = [sys.executable, "-S", "-m", "coconut_ds", "doctor"]  # -S: no site-packages
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "is not installed" in ended.stderr and "source launch/setup.sh" in ended.stderr


FLAGS = [
    ["--deepspeed", "--deepspeed_config", DS_CONFIG],
    ["--deepspeed_config", DS_CONFIG, "--deepspeed"],
    ["--deepspeed", DS_CONFIG],
    [f"--deepspeed={DS_CONFIG}"],
    ["--deepspeed-config", DS_CONFIG],
    ["--deepspeed_config", DS_CONFIG, "--local_rank", "0"],
    ["--deepspeed_config", DS_CONFIG, "--local-rank=0"],
]


@pytest.mark.parametrize("flags", FLAGS, ids=[" ".join(flags).replace(DS_CONFIG, "X") for flags in FLAGS])
@pytest.mark.parametrize("command", ["train", "eval", "plan", "show"])
def test_launchers_and_guides_spellings_are_accepted(command, flags, monkeypatch):
    seen = []
    module = importlib.import_module(f"coconut_ds.cli.{command}")
    monkeypatch.setattr(module, "run", seen.append)
    assert main(["--local-rank=0", command, "x.yaml", *flags]) == 0
    assert seen[0].deepspeed_config in (DS_CONFIG, [DS_CONFIG]) and seen[0].local_rank == 0


def test_a_bare_deepspeed_flag_may_stand_before_the_yaml(monkeypatch):
    seen = []
    monkeypatch.setattr(importlib.import_module("coconut_ds.cli.train"), "run", seen.append)
    assert main(["train", "--deepspeed", "x.yaml", "--deepspeed_config", DS_CONFIG]) == 0
    assert (seen[0].config, seen[0].deepspeed_config) == ("x.yaml", DS_CONFIG)


def test_no_parser_accepts_abbreviations():
    """An abbreviation changes its meaning with the next option of the same beginning."""
    files = [
        path
        for folder in ("coconut_ds", "preprocessing", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    calls = [
        (path, node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    parsers = [
        (path, node)
        for path, node in calls
        if getattr(node.func, "attr", "") in ("ArgumentParser", "add_parser")
    ]
    assert len(parsers) > 10
    for path, node in parsers:
        assert any(word.arg == "allow_abbrev" for word in node.keywords), f"{path}:{node.lineno}"


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("coconut_ds.cli.plan"), "run", interrupted)
    assert main(["plan", "x.yaml", "--deepspeed_config", DS_CONFIG]) == 130
    assert capsys.readouterr().err == "stopped: interrupted\n"


def test_show_prints_settings_batches_stages_and_samples(experiment_file, capsys):
    assert (
        main(
            ["show", experiment_file(epochs_per_stage=[2, 1], num_epochs=6), "--deepspeed_config", DS_CONFIG]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "8 rows per GPU x 1 micro-batches x 2 GPUs = 16 rows per optimizer step" in text
    assert "96 problems -> 6 steps per epoch, 36 steps in 6 epochs" in text
    assert "1-2  0: 0 steps hidden, 0 latents" in text
    assert "6  4: all steps hidden, 3 latents" in text
    assert "<|start-latent|><|latent|><|end-latent|>" in text


PUBLISHED = {"method": None, "coconut": True, "latent_window_size": 4}  # two notes: clipping, the window


@pytest.mark.parametrize("command", ["show", "validate"])
def test_notes_are_printed_once_on_stderr(command, experiment_file, capsys):
    assert main([command, experiment_file(**PUBLISHED)]) == 0
    said = capsys.readouterr()
    notes = [line for line in said.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2 and "note: " not in said.out
    assert "gradient_clipping is 0.0" in notes[0] and "latent_window_size: 4: no effect" in notes[1]


@pytest.mark.parametrize("rank, count", [("0", 2), ("1", 0)])
def test_the_main_rank_alone_prints_the_notes_of_training(rank, count, experiment_file, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("coconut_ds.training.trainer.train", lambda *_: None)
    assert main(["train", experiment_file(**PUBLISHED), "--deepspeed_config", DS_CONFIG]) == 0
    assert capsys.readouterr().err.count("note: ") == count


@pytest.mark.parametrize("method, compared", [({"method": "coconut"}, False), (PUBLISHED, True)])
def test_show_compares_the_effective_batch_of_published_files(method, compared, experiment_file, capsys):
    assert main(["show", experiment_file(**method), "--gpus", "2"]) == 0
    text = capsys.readouterr().out
    assert "16 rows per optimizer step, the effective batch" in text
    assert ("the published code uses 4 GPUs, an effective batch of 32" in text) is compared
    assert f"gradient_clipping: {0.0 if compared else 1.0}" in text


@pytest.mark.parametrize("item", [-1, 9999])
def test_show_refuses_an_item_that_is_not_there(item, experiment_file, capsys):
    assert main(["show", experiment_file(), "--item", str(item)]) == 2
    assert f"--item {item}: " in capsys.readouterr().err


def test_show_goes_without_data(experiment_file, capsys):
    assert main(["show", experiment_file(train_path="data/absent_train.json")]) == 0
    text = capsys.readouterr().out
    assert "absent_train.json: no such file" in text and "Stages" in text


def test_validate_lists_every_bad_file(tmp_path, experiment_file, capsys):
    (tmp_path / "bad.json").write_text('{"zero_optimisation": {}}')
    (tmp_path / "data.json").write_text('[{"question": "", "answer": "1", "steps": []}]')
    files = [experiment_file(lr=-1), str(tmp_path / "bad.json"), str(tmp_path / "data.json"), DS_CONFIG]
    assert main(["validate", *files]) == 2
    said = capsys.readouterr()
    assert "lr" in said.err and "did you mean 'zero_optimization'" in said.err and "question" in said.err
    assert f"{DS_CONFIG}: ok" in said.out


def problem(**changes):
    return [{"question": "1+1=?", "steps": ["<<1+1=2>>"], "answer": "2"} | changes]


BAD_RUNS = {  # what is wrong: (changes of the YAML, words that the message must have)
    "no training file": ({"train_path": "nowhere/x_train.json"}, "nowhere/x_train.json: no such file"),
    "no validation file": ({"val_path": "nowhere/x_valid.json"}, "nowhere/x_valid.json: no such file"),
    "no model folder": ({"model_id": "./nowhere/model"}, "model_id: ./nowhere/model does not exist"),
    "no gguf file": ({"model_id": "models/x.gguf"}, "model_id: models/x.gguf does not exist"),
    "unknown thought": ({"thought": "last_hiden"}, "last_hidden"),
    "two methods": ({"method": None, "coconut": True, "cot": True}, "cot"),
    "evaluation without weights": ({"only_eval": True}, "load_model_path"),
    "name that leaves the folder": ({"name": "../x"}, "name"),
    "negative rate": ({"lr": -0.1}, "lr"),
    "absurd batch": (
        {"batch_size_training": 100_000},
        "batch_size_training: must be a whole number of at least",
    ),
    "absurd epochs": ({"num_epochs": 10**12}, "at most 100000, got 1000000000000"),
    "absurd accumulation": ({"gradient_accumulation_steps": 10**9}, "at most 100000"),
    "absurd evaluation batch": ({"batch_size_eval": 10**6}, "at most 10000"),
    "absurd latents": ({"c_thought": 10**6}, "at most 1000"),
    "text for a number": ({"num_epochs": "many"}, "num_epochs"),
    "misspelt key": ({"epoch_per_stage": 2}, "did you mean 'epochs_per_stage'?"),
    "bf16 without bf16": ({"bf16": True}, "zero2_offload_bf16.json"),
}
BAD_DATA = {
    "no list": ("{}", "list"),
    "not json": ("[{", "data.json"),
    "empty list": ("[]", "data.json"),
    "empty file": ("", "data.json"),
    "no answer": (json.dumps([{"question": "a", "steps": []}]), "answer"),
    "steps of a number": (json.dumps(problem(steps=2)), "steps"),
    "step of number": (json.dumps(problem(steps=[1])), "steps"),
    "blank question": (json.dumps(problem(question=" ")), "question"),
    "answer of true": (json.dumps(problem(answer=True)), "answer"),
    "pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
    "page": ("<html></html>", "HTML page"),
    "uneven columns": ('{"question": ["a"], "steps": [], "answer": ["1"]}', "columns differ in length"),
}


def fails_cleanly(arguments, words, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and words in message and "Traceback" not in message


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_settings_end_before_any_model(name, experiment_file, capsys):
    changes, words = BAD_RUNS[name]
    fails_cleanly(["train", experiment_file(**changes), "--deepspeed_config", DS_CONFIG], words, capsys)


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_ends_before_any_model(name, experiment_file, tmp_path, capsys):
    text, words = BAD_DATA[name]
    (tmp_path / "data.json").write_text(text)
    path = experiment_file(train_path=str(tmp_path / "data.json"))
    fails_cleanly(["train", path, "--deepspeed_config", DS_CONFIG], words, capsys)
    if name not in ("no list", "not json", "empty file"):  # those may be settings as well
        assert main(["validate", str(tmp_path / "data.json")]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, words", [("{", "broken.json"), ("[]", "broken.json"), ('{"a": 1}', "broken.json")]
)
def test_bad_deepspeed_settings_end_before_any_model(text, words, experiment_file, tmp_path, capsys):
    (tmp_path / "broken.json").write_text(text)
    path = str(tmp_path / "broken.json")
    fails_cleanly(["train", experiment_file(), "--deepspeed_config", path], words, capsys)


def test_an_absent_settings_file_is_named(capsys):
    fails_cleanly(["train", "no.yaml", "--deepspeed_config", DS_CONFIG], "no.yaml", capsys)


def test_readme_names_every_command():
    text = Path(ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in NAMES)


def test_a_reader_that_stops_early_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "coconut_ds", "validate", "configs/quickstart/coconut.yaml"]
    ended = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_the_main_rank_prints_what_is_wrong_on_all(monkeypatch, capsys, tmp_path, rank, lines):
    """Wrong options and wrong settings; another rank gives it time to print."""
    waited = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit) as ended:
        main(["eval", "run", "--limt", "3"])
    assert ended.value.code == 2 and capsys.readouterr().err.count("error: ") == lines
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("error: ") == lines
    assert len(waited) == 2 * (1 - lines)
