"""What a wrong key is answered with: its name here, a misspelling's, or the list of valid keys."""

import random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from coconut_ds.config.experiment import load_with_notes, parse_overrides, validate_experiment
from coconut_ds.config.schema import did_you_mean, edit_distance, load_schema, unknown_keys
from coconut_ds.errors import ConfigError

SCHEMA = load_schema("experiment")
KEYS = sorted(SCHEMA["properties"])
SYNONYMS = {other: key for key in KEYS for other in SCHEMA["properties"][key].get("also_called", ())}
SMALLEST = {"name": "run", "model_id": "gpt2", "method": "coconut", "train_path": "a", "val_path": "b"}


def messages(keys):
    """What a file with `keys` is refused with, and what --set of the same keys is."""
    found = []
    for refuse in (
        lambda: validate_experiment(SMALLEST | dict.fromkeys(keys, 1), "x.yaml"),
        lambda: parse_overrides([f"{key}=1" for key in keys]),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse()
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize(
    "written, hint",
    [
        ("learning_rate", "write 'lr' instead"),
        ("batch_size", "write 'batch_size_training' instead"),
        ("epochs", "write 'num_epochs' instead"),
        ("model", "write 'model_id' instead"),
        ("output_dir", "write 'save_path' instead"),
        ("max-grad-norm", "write 'gradient_clipping' instead"),
        ("wandb", "WANDB_MODE=disabled"),
        ("val_size", "write 'eval_max_items' instead"),
        ("train_size", "take --limit N"),
        ("fp16", "DeepSpeed JSON"),
        ("epoch_per_stage", "did you mean 'epochs_per_stage'?"),
        ("lrr", "did you mean 'lr'?"),
        ("sed", "did you mean 'seed'?"),
        ("uniform_porb", "did you mean 'uniform_prob'?"),
    ],
)
def test_hints(written, hint):
    for message in messages([written]):
        assert f"is not a setting; {hint}" in message or hint in message
        assert "valid keys" not in message


@pytest.mark.parametrize(
    "written", ["mode", "training_method", "train", "latent", "lora_settings", "x", "path"]
)
def test_a_key_that_resembles_nothing_gets_the_list_of_valid_keys(written):
    for message in messages([written]):
        assert "did you mean" not in message and "write '" not in message
        assert "is not a setting; valid keys: " in message and all(key in message for key in KEYS)


def test_the_keys_of_another_fork():
    """The list is there once, behind the last key that has no name here."""
    for message in messages(["wandb", "mode", "val_size", "training_method", "train_size"]):
        lines = message.splitlines()
        assert len(lines) == 5 and message.count("valid keys") == 1 and "did you mean" not in message
        assert any("training_method" in line and "valid keys" in line for line in lines)


def test_the_list_is_that_of_the_block():
    schema = load_schema("ds_config")["properties"]["latent_memory"]
    (hint,) = unknown_keys(["budget"], schema).values()
    assert hint == f"; valid keys: {', '.join(schema['properties'])}"


def test_no_name_of_elsewhere_is_a_key_or_stands_for_two():
    stated = [other for rule in SCHEMA["properties"].values() for other in rule.get("also_called", ())]
    stated += SCHEMA["elsewhere"]
    assert len(set(stated)) == len(stated) and not set(stated).intersection(KEYS)


@pytest.mark.parametrize("key", [key for key in KEYS if len(key) > 3])
def test_every_key_is_known_by_its_misspellings(key):
    place = random.Random(key).randrange(1, len(key) - 1)
    swapped = key[:place] + key[place + 1] + key[place] + key[place + 2 :]
    for written in (key[:place] + key[place + 1 :], key[:place] + "z" + key[place:], swapped, key.upper()):
        if written not in KEYS and written not in SYNONYMS:
            assert did_you_mean(written, KEYS) == f"; did you mean '{key}'?"


@pytest.mark.parametrize("written", ["4", 4, "12", "l", "ab", ""])
def test_numbers_and_two_letters_have_no_near_miss(written):
    assert did_you_mean(written, ["1", "2", "13", "lr", "abc"]) == ""


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_the_distance_is_a_distance(first, second):
    distance = edit_distance(first, second)
    assert distance == edit_distance(second, first) and (distance == 0) is (first == second)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))
    assert edit_distance("ab", "ba") == 1 and edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    "key, hint",
    [
        ("use_prj", "'thought: mlp_projection'"),
        ("num_latent", "c_thought times max_latent_stage"),
        ("distill_loss_factor", "a key of CODI"),
        ("explain_loss_factor", "a key of SIM-CoT"),
        ("step_supervision", "a key of LOTUS; 'latent_supervision: step_tokens'"),
    ],
)
def test_keys_of_derivatives_are_named(key, hint):
    for message in messages([key]):
        assert hint in message and "valid keys" not in message


@pytest.mark.parametrize(
    "changes, noted",
    [({"resume": 3}, True), ({}, False), ({"resume": 3, "load_model_path": "weights"}, False)],
)
def test_resume_without_weights_is_a_note(changes, noted, tmp_path):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(SMALLEST | changes))
    notes = " ".join(load_with_notes(tmp_path / "x.yaml")[1])
    assert ("resume: 3 skips the first 3 epochs" in notes) is noted


@pytest.mark.parametrize("written, key", [("learing_rate", "lr"), ("batchsize", "batch_size_training")])
def test_a_misspelled_name_of_another_program_is_answered_with_the_key(written, key):
    for message in messages([written]):
        assert f"write '{key}' instead" in message and "valid keys" not in message
