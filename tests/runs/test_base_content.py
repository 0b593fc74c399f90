"""A run resumes, and a LoRA checkpoint loads, only with the base model that it was trained with."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from coconut_ds.__main__ import main
from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.tokenizer import load_vocabulary
from coconut_ds.errors import CheckpointError
from coconut_ds.evaluation.saved_models import find_one
from coconut_ds.model.loading import build_module, write_model
from coconut_ds.runs.changes import refuse_changes, settings_to_compare
from coconut_ds.runs.checkpoint_folders import Manifest, TrainState
from tests.run_folders import make_run


def change_weights(folder):
    """Change one element of one tensor that is not in the evenly spaced sample."""
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"].view(-1)[1234] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"layer_norm_epsilon": 1e-3}))


def change_tokenizer(folder):
    """Exchange two tokens: same size, other ids."""
    values = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    (folder / "tokenizer.json").write_text(json.dumps(values))


CHANGES = {
    "base.weights": change_weights,
    "base.config.layer_norm_epsilon": change_config,
    "base.tokenizer": change_tokenizer,
}


@pytest.fixture(params=["folder", "hub snapshot"])
def base(request, arithmetic, tmp_path, monkeypatch):
    """(model_id, its folder) of a copy of the tiny model."""
    if request.param == "folder":
        folder = tmp_path / "gpt2"
        shutil.copytree(arithmetic / "gpt2", folder)
        return str(folder), folder
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--maker--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    shutil.copytree(arithmetic / "gpt2", folder)
    return "maker/tiny", folder


@pytest.fixture
def settings(tiny_experiment):
    """The settings that a checkpoint records."""

    def settings(**changes):
        experiment = validate_experiment(tiny_experiment | changes, "test")
        module = build_module(experiment, load_vocabulary(experiment.model_id), LatentMemory())
        return settings_to_compare(experiment, {}, module.base_record)

    return settings


def resume(saved, current, allow=()):
    through_json = json.loads(json.dumps(saved, default=str))
    return refuse_changes(Manifest(TrainState(), through_json, 1, False, {}), current, 1, allow)


@pytest.mark.parametrize("part", CHANGES)
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_changed_base_is_refused_by_what_changed(settings, base, tuning, part):
    model_id, folder = base
    saved = settings(model_id=model_id, tuning=tuning)
    assert resume(saved, settings(model_id=model_id, tuning=tuning)) == []
    CHANGES[part](folder)
    current = settings(model_id=model_id, tuning=tuning)
    if (tuning, part) == ("full", "base.weights"):  # the checkpoint holds them all
        assert resume(saved, current) == []
        return
    with pytest.raises(CheckpointError) as caught:
        resume(saved, current, allow=[part])
    assert f"{part}: " in str(caught.value) and "impossible" in str(caught.value)
    assert str(caught.value).count("when saved") == 1


def test_a_moved_base_with_another_readme_is_the_same(settings, base, tmp_path):
    model_id, folder = base
    saved = settings(model_id=model_id, tuning="lora")
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("moved")
    (line,) = resume(saved, settings(model_id=str(tmp_path / "moved"), tuning="lora"))
    assert "model_id" in line


@pytest.fixture(params=["folder", "file"])
def start(request, settings, tiny_experiment, tmp_path):
    """A CoT model to start from, as a Hugging Face folder or as a state dict."""
    experiment = validate_experiment(tiny_experiment | {"method": "cot", "seed": 3}, "test")
    module = build_module(experiment, load_vocabulary(experiment.model_id), LatentMemory())
    with torch.no_grad():
        module.causal_lm.transformer.ln_f.bias.add_(0.5)
    if request.param == "folder":
        write_model(module, load_vocabulary(experiment.model_id), tmp_path / "cot")
    else:
        torch.save(module.causal_lm.state_dict(), tmp_path / "cot")
    return tmp_path / "cot"


def change_start(path):
    if path.is_dir():
        return change_weights(path)
    weights = torch.load(path)
    weights["transformer.h.0.mlp.c_fc.weight"].view(-1)[1234] += 1e-3
    return torch.save(weights, path)


def test_lora_over_another_start_is_refused(settings, start, tmp_path):
    saved = settings(tuning="lora", load_model_path=str(start))
    moved = start.rename(tmp_path / "moved")
    (line,) = resume(saved, settings(tuning="lora", load_model_path=str(moved)))
    assert "load_model_path" in line
    with pytest.raises(CheckpointError, match=r"base\.weights.*load_model_path"):
        resume(saved, settings(tuning="lora"))
    change_start(moved)
    with pytest.raises(CheckpointError, match=r"base\.weights.*load_model_path"):
        resume(saved, settings(tuning="lora", load_model_path=str(moved)), allow=["load_model_path"])


def test_a_full_run_only_started_there(settings, start):
    saved = settings(load_model_path=str(start))
    change_start(start)
    assert resume(saved, settings(load_model_path=str(start))) == []


def test_an_older_checkpoint_goes_on_with_a_note(settings):
    current = settings(tuning="lora")
    older = {key: value for key, value in current.items() if key != "base"}
    (note,) = resume(older, current)
    assert "older version" in note and "cannot be compared" in note


@pytest.mark.parametrize("base", [{"weights": 1, "config": {}, "tokenizer": ""}, {"weights": "a"}, [1]])
def test_a_record_that_is_none_is_refused(settings, base):
    current = settings()
    with pytest.raises(CheckpointError, match="does not describe a base model"):
        resume({**current, "base": base}, current)


@pytest.mark.parametrize("part", CHANGES)
@pytest.mark.parametrize("command", ["eval", "generate", "inspect", "export"])
def test_every_command_refuses_a_lora_run_over_another_base(
    tiny_experiment, arithmetic, tmp_path, capsys, command, part
):
    shutil.copytree(arithmetic / "gpt2", tmp_path / "gpt2")
    values = tiny_experiment | {"model_id": str(tmp_path / "gpt2"), "tuning": "lora"}
    run = make_run(values, tmp_path, epochs=(4,))
    CHANGES[part](tmp_path / "gpt2")
    arguments = {
        "generate": ["--prompt", "1+2=?"],
        "inspect": ["--question", "1+2=?"],
        "export": ["--output", str(tmp_path / "out")],
    }
    assert main([command, str(run), *arguments.get(command, [])]) == 2
    output = capsys.readouterr().err
    assert f"content has changed since: {part.removeprefix('base.')}" in output and "Traceback" not in output


def test_a_lora_run_of_an_older_version_loads_with_a_note(tiny_experiment, tmp_path):
    run = make_run(tiny_experiment | {"tuning": "lora"}, tmp_path, epochs=(1,))
    trained, model = find_one(str(run)), run / "checkpoint_1" / "model"
    values = json.loads((model / "base.json").read_text())
    assert values.pop("base")["tokenizer"]
    (model / "base.json").write_text(json.dumps(values))
    trained = replace(trained, experiment=replace(trained.experiment, load_model_path=str(model)))
    with pytest.warns(UserWarning, match=r"base\.json is of an older version.*cannot be compared"):
        trained.build(load_vocabulary(trained.experiment.model_id))


def test_the_record_survives_json(tiny_experiment):
    experiment = validate_experiment(tiny_experiment | {"tuning": "lora"}, "test")
    module = build_module(experiment, load_vocabulary(experiment.model_id), LatentMemory())
    again = type(module.base_record).read(json.loads(json.dumps(asdict(module.base_record))))
    assert again == module.base_record and again.weights
