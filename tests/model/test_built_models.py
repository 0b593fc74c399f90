"""Where a model's weights come from: chains of checkpoints, adapters on top of them, published folders."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.tokenizer import load_vocabulary
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.model.loading import build_module, parameter_groups, trainable_parameters, write_model
from coconut_ds.runs.weights import load_foreign_weights
from tests.model.lora_cases import coconut, experiment
from tests.run_folders import make_run


@pytest.fixture(scope="module")
def vocabulary(tiny_experiment):
    return load_vocabulary(tiny_experiment["model_id"])


@pytest.fixture
def build(tiny_experiment, vocabulary):
    def build(load_model_path=None, **changes):
        source = None if load_model_path is None else str(load_model_path)
        values = tiny_experiment | {"load_model_path": source} | changes
        return build_module(validate_experiment(values, "test"), vocabulary, LatentMemory()).eval()

    return build


def learn_something(model, seed):
    """Move every trainable parameter, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def logits(model):
    with torch.no_grad():
        return model.causal_lm(torch.tensor([[3, 4, 5, 6, 7]])).logits


@pytest.fixture
def cot_checkpoint(build, vocabulary, tmp_path):
    model = build(method="cot")
    learn_something(model, seed=1)
    write_model(model, vocabulary, tmp_path / "cot")
    return tmp_path / "cot"


@pytest.mark.parametrize("thought", ["last_hidden", "learnable_window", "mlp_projection", "pause"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_is_written_is_what_is_built_again(build, vocabulary, tmp_path, thought, tuning):
    model = build(thought=thought, tuning=tuning)
    learn_something(model, seed=2)
    write_model(model, vocabulary, tmp_path / "model")
    again = build(tmp_path / "model", thought=thought, tuning=tuning, seed=5)
    assert torch.equal(logits(again), logits(model))
    state = again.thought.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.thought.state_dict().items())


def test_lora_starts_from_a_cot_checkpoint_and_comes_back_on_it(build, vocabulary, cot_checkpoint, tmp_path):
    cot = build(cot_checkpoint, method="cot")
    started = build(cot_checkpoint, tuning="lora")
    assert torch.equal(logits(started), logits(cot))
    assert not torch.equal(logits(started), logits(build()))
    learn_something(started, seed=3)
    write_model(started, vocabulary, tmp_path / "adapter")
    again = build(tmp_path / "adapter", tuning="lora")
    assert torch.equal(logits(again), logits(started))


def test_an_adapter_whose_base_has_changed_is_refused(build, vocabulary, cot_checkpoint, tmp_path):
    write_model(build(cot_checkpoint, tuning="lora"), vocabulary, tmp_path / "adapter")
    trained_on = build(cot_checkpoint, method="cot")
    learn_something(trained_on, seed=4)
    write_model(trained_on, vocabulary, cot_checkpoint)
    with pytest.raises(CheckpointError, match=r"trained on the weights of .*cot"):
        build(tmp_path / "adapter", tuning="lora")
    shutil.rmtree(cot_checkpoint)
    with pytest.raises(CheckpointError, match=r"cot: no such file"):
        build(tmp_path / "adapter", tuning="lora")


def test_coconut_with_a_window_starts_from_a_lora_cot_run(build, vocabulary, tmp_path):
    cot = build(method="cot", tuning="lora")
    learn_something(cot, seed=5)
    write_model(cot, vocabulary, tmp_path / "cot")
    model = build(tmp_path / "cot", thought="learnable_window", tuning="lora")
    assert torch.equal(logits(model), logits(cot))
    assert model.thought.window_weights()[0] == pytest.approx(1 - 4e-4)


def test_a_run_folder_as_weights_names_its_checkpoint(tiny_experiment, tmp_path):
    run = make_run(tiny_experiment, tmp_path)
    with pytest.raises(CheckpointError, match=f"is a run folder; .* load_model_path: {run}/best$"):
        load_foreign_weights(run)
    (run / "best").unlink()
    with pytest.raises(CheckpointError, match=f"load_model_path: {run}/checkpoint_4$"):
        load_foreign_weights(run)
    with pytest.raises(ConfigError, match=f"model_id: {run} is a run folder; .*{run}/best$"):
        load_vocabulary(str(run))


def test_published_lora_folder_is_taken_as_load_model_path(build, tiny_experiment, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_experiment["model_id"], dtype=torch.float32)
    targets = ["c_attn", "c_proj"]
    theirs = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.05, fan_in_fan_out=True)
    )
    torch.manual_seed(6)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "peft")
    torch.save({"latent_weights": torch.tensor([0.1, 0.2, 0.9])}, tmp_path / "latent.pt")
    model = build(tmp_path, latent_variant="learnable_weights_lora", latent_window_scope="pass")
    assert model.thought.logits_W.tolist() == pytest.approx([0.9, 0.2, 0.1])
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([[3, 4, 5, 6, 7]])).logits
    torch.testing.assert_close(logits(model)[..., : expected.shape[-1]], expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_for_full_tuning_is_refused(build, vocabulary, tmp_path):
    write_model(build(tuning="lora"), vocabulary, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="set 'tuning: lora'"):
        build(tmp_path / "adapter")


def test_thought_parameters_have_their_own_rate_and_no_decay():
    model = coconut(thought="learnable_window")
    groups = parameter_groups(model, experiment(lr=1e-4, thought_lr=1e-2, weight_decay=0.1))
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("base", 1e-4, 0.1),
        ("thought", 1e-2, 0.0),
    ]
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(trainable_parameters(model).values())
    assert [g["lr"] for g in parameter_groups(model, experiment(lr=3e-5))] == [3e-5, 3e-5]
    assert [g["name"] for g in parameter_groups(coconut(), experiment())] == ["base"]
