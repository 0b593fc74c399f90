"""Plans without network and data: built-in models, GPUs and text lengths, and the table of several plans."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import gpu_table
from coconut_ds.__main__ import main
from coconut_ds.cli.plan import add_arguments
from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.errors import ConfigError
from coconut_ds.memory.cases import built_in_config, config_of, read_cases
from coconut_ds.memory.fake_run import with_layers
from coconut_ds.memory.known import find_gpu, known, precision_note, short
from coconut_ds.memory.phases import LARGE_WORKSPACES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("model", known()["models"], ids=lambda model: short(model["id"]))
def test_a_built_in_shape_has_the_parameters_of_the_model(model):
    config = built_in_config(model["id"])

    def count(layers):
        with torch.device("meta"):
            shallow = AutoModelForCausalLM.from_config(with_layers(config, layers))
        return sum(p.numel() for p in shallow.parameters())

    one, two = count(1), count(2)
    assert one + (two - one) * (config.num_hidden_layers - 1) == model["parameters"]


def test_names_of_gpus():
    assert find_gpu("rtx 2080ti")["mib"] == 11018
    assert find_gpu("NVIDIA GeForce GTX 1080 Ti")["mib"] == 11178
    with pytest.raises(ConfigError, match="RTX 3060"):
        find_gpu("RTX 3061")
    with pytest.raises(
        ConfigError, match="or for another GPU its MiB, as nvidia-smi shows them: --gpu 12282"
    ):
        find_gpu("RTX 4070")
    assert find_gpu("12282")["mib"] == 12282 and precision_note("12282", "bf16") is None
    with pytest.raises(ConfigError, match="for 12 GiB write --gpu 12288"):
        find_gpu("12")


@pytest.mark.parametrize(
    ("model", "meant"), [("lama-3.2-1b", "Llama-3.2-1B"), ("gpt2-mediun", "gpt2-medium")]
)
def test_a_misspelled_built_in_model_is_named_without_asking_the_hub(model, meant, monkeypatch):
    monkeypatch.setattr("coconut_ds.memory.cases.load_config", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        config_of(model)


@pytest.mark.parametrize("gpu", known()["gpus"], ids=lambda gpu: gpu["name"])
def test_gpus_with_large_workspaces(gpu):
    is_large = LARGE_WORKSPACES.search(gpu["name"]) is not None
    assert is_large == (float(gpu["compute_capability"]) >= 9)


def test_precisions_that_a_gpu_cannot_train_in():
    assert "use fp16" in precision_note("RTX 2080 Ti", "bf16")
    assert "use fp32" in precision_note("GTX 1080 Ti", "fp16")
    assert precision_note("RTX 3060", "bf16") is None


@pytest.fixture
def own_shape(tmp_path):
    """A configuration file alone."""
    path = tmp_path / "config.json"
    values = {"model_type": "gpt2", "n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 500}
    path.write_text(json.dumps(values))
    return str(path)


def test_a_table_of_models(own_shape, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # no file of the repository is read
    command = ["plan", "--model", own_shape, own_shape, "--tuning", "full", "--gpu", "RTX 3060"]
    command += ["--set", "epochs_per_stage=1", "--set", "num_epochs=2", "--set", "batch_size_training=2"]
    assert main([*command, "--host-memory-gib", "64"]) == 0
    out, error = capsys.readouterr()
    assert "2 x RTX 3060" in out and "of 11,230 MiB" in out and "of 64.0 GiB" in out
    assert [line.split()[-4] for line in out.splitlines() if line.startswith(own_shape)] == [
        "forward",
        "forward",
    ]
    assert "(2 of 2)" in error


def test_tuning_of_the_command_line_replaces_that_of_the_file():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    config = str(ROOT / "configs/lora/gsm_coconut_qwen2.5-7b_nf4.yaml")
    models = ["gpt2", "Qwen2.5-7B"]
    for source in ([], [config]):
        args = parser.parse_args([*source, "--model", *models, "--tuning", "full", "lora", "qlora"])
        cases = [(case.name, case.tuning, case.quantization) for case in read_cases(args)]
        expected = [("full", "full", "none"), ("lora", "lora", "none"), ("qlora", "lora", "nf4")]
        assert cases == [(f"{model} {name}", *two) for model in models for name, *two in expected]


def test_a_model_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        "plan",
        "--layers",
        "4",
        "--hidden",
        "64",
        "--heads",
        "4",
        "--vocab",
        "500",
        "--data",
        "prosqa",
    ]
    assert (
        main([*command, "--set", "epochs_per_stage=1", "--set", "num_epochs=1", "--json", "--no-changes"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)[0]["stages"][0]["columns"] > 520


@pytest.mark.parametrize(
    "command, message",
    [
        ([], "--model NAME"),
        (["--layers", "4"], "--hidden N --heads N"),
        (["--model", "no/such-model"], "built-in shapes: distilgpt2, gpt2"),
        (["--model", "gpt2", "--gpu", "RTX"], "write one of: RTX 2080 Ti"),
    ],
)
def test_what_is_missing_is_named(command, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["plan", *command]) == 2
    assert message in capsys.readouterr().err


def test_a_note_is_printed_once_for_all_models(capsys):
    shape = ["--question-tokens", "9", "--set", "num_epochs=1", "--no-changes"]
    assert (
        main(["plan", "--model", "distilgpt2", "gpt2", "--gpu", "24000", "--host-memory-gib", "99", *shape])
        == 0
    )
    assert capsys.readouterr().err.count("no --deepspeed_config, so ") == 1


def gpu_rows():
    """{"gpt2 lora": {GPU: cell}} of ds_configs/README.md."""
    text = (ROOT / "ds_configs/README.md").read_text(encoding="utf-8")
    lines = gpu_table.MARKERS.search(text)[0].splitlines()[3:-1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: dict(zip(gpu_table.FILES, of_gpus, strict=True)) for name, *of_gpus in cells}


def test_the_table_of_gpus_has_every_model_and_files_for_its_gpus():
    rows = gpu_rows()
    models = gpu_table.MODELS.items()
    assert list(rows) == [f"{short(model)} {tuning}" for model, tunings in models for tuning in tunings]
    for of_gpus in rows.values():
        for gpu, cell in of_gpus.items():
            name = re.match(r"`(\w+)`: (\d+) rows; (\d+): [\d,]+ MiB, host \d+ GiB$|-$", cell)[1]
            if name is not None:
                config = load_ds_config(ROOT / f"ds_configs/{name}.json")
                assert config.memory_budget.device == gpu


@pytest.mark.slow
def test_the_table_of_gpus_says_what_the_planner_does():
    """One cell; the file for Qwen2.5-7B is planned in tests/config/test_shipped_files.py."""
    model, tuning = "openai-community/gpt2", "lora"
    files = gpu_table.FILES["RTX 2080 Ti"][0]
    planned = gpu_table.cell(
        gpu_table.planner_of(model, tuning), gpu_table.experiment_of(model, tuning), files
    )
    assert gpu_rows()["gpt2 lora"]["RTX 2080 Ti"] == planned
