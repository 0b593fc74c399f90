"""The experiment YAML: published files run unchanged, and every bad file gets one clear message."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut_ds.config.experiment import (
    Experiment,
    Method,
    experiment_to_yaml,
    load_experiment,
    load_with_notes,
    parse_overrides,
    validate_experiment,
)
from coconut_ds.config.methods import LATENT_VARIANTS, METHOD_BOOLEANS, registered
from coconut_ds.config.schema import defaults, load_schema
from coconut_ds.errors import ConfigError

# The released gsm_coconut.yaml, key for key, with the three keys that its forks added.
PUBLISHED = """\
# need 4 gpus

project: coconut
save_path: YOUR_PATH_TO_SAVE_THE_MODEL
name: gsm-coconut

only_eval: False

coconut: True
cot: False
no_thoughts: False
no_cot: False
latent_variant: basic

c_thought: 2
epochs_per_stage: 3
max_latent_stage: 3
pad_latent_to_max: True

save_only_improve: False
uniform_prob: 0.0
model_id: openai-community/gpt2
load_model_path: None
seed: 0
resume: 3
bf16: False
train_path: data/gsm_train.json
val_path: data/gsm_valid.json
reset_optimizer: True
batch_size_training: 32
debug: False
gradient_accumulation_steps: 1
num_epochs: 25
lr: !!float "1e-4"
weight_decay: 0.01
latent_window_size: 3
"""

SMALLEST = {
    "name": "run",
    "model_id": "gpt2",
    "method": "coconut",
    "train_path": "data/a_train.json",
    "val_path": "data/a_valid.json",
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def smallest(**changes: object) -> Experiment:
    return validate_experiment(SMALLEST | changes, "test")


# --- files that must work ------------------------------------------------------------------------------


@pytest.mark.parametrize("value, same", [([2], 2), ([2, 2.0], 2), ([2, 1], (2, 1))])
def test_epochs_of_equal_stages_are_one_number(value, same):
    assert smallest(epochs_per_stage=value).epochs_per_stage == same


def test_published_file_runs_unchanged(tmp_path):
    experiment = load_experiment(write(tmp_path, PUBLISHED))
    assert experiment.method is Method.COCONUT
    assert (experiment.thought, experiment.tuning) == ("last_hidden", "full")
    assert experiment.lr == 1e-4 and isinstance(experiment.lr, float)
    assert experiment.load_model_path is None
    assert experiment.reset_optimizer == "stage_switch"
    assert experiment.name == "gsm-coconut" and experiment.project == "coconut"
    assert (experiment.c_thought, experiment.epochs_per_stage, experiment.max_latent_stage) == (2, 3, 3)
    assert (experiment.resume, experiment.num_epochs) == (3, 25)
    assert (experiment.batch_size_training, experiment.gradient_accumulation_steps) == (32, 1)
    assert experiment.pad_latent_to_max and not experiment.bf16 and not experiment.debug


def test_published_evaluation_file_needs_no_training_data(tmp_path):
    text = PUBLISHED.replace("only_eval: False", "only_eval: True")
    text = text.replace("load_model_path: None", "load_model_path: runs/gsm/checkpoint_15")
    text = text.replace("train_path: data/gsm_train.json\n", "").replace("num_epochs: 25", "num_epochs: 1")
    experiment = load_experiment(write(tmp_path, text.replace("resume: 3", "resume: 15")))
    assert experiment.only_eval and experiment.train_path == "" and experiment.resume == 15


@pytest.mark.parametrize("variant", [*LATENT_VARIANTS, None, "None"])
def test_latent_variant_names_a_pair(variant):
    experiment = smallest(latent_variant=variant)
    assert (experiment.thought, experiment.tuning) == LATENT_VARIANTS.get(variant, ("last_hidden", "full"))


@pytest.mark.parametrize("thought", registered("thoughts"))
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_every_thought_of_the_folder_works_with_both_tunings(thought, tuning):
    experiment = smallest(thought=thought, tuning=tuning)
    assert (experiment.thought, experiment.tuning) == (thought, tuning)


@pytest.mark.parametrize("method", list(Method))
def test_every_method_can_be_named(method):
    experiment = smallest(method=str(method))
    assert experiment.method is method
    assert experiment.thought == ("pause" if method.is_pause else "last_hidden")


@pytest.mark.parametrize("boolean", METHOD_BOOLEANS)
def test_each_boolean_is_the_method_of_its_name(boolean):
    assert smallest(method=None, **{boolean: True}).method == boolean


def test_without_thought_is_no_thoughts():
    assert smallest(method="without_thought").method is Method.NO_THOUGHTS
    assert smallest(method="without_thought", no_thoughts=True).method is Method.NO_THOUGHTS


@pytest.mark.parametrize(
    "written, meant",
    [(True, "stage_switch"), (False, "never"), ("every_epoch", "every_epoch"), ("never", "never")],
)
def test_reset_optimizer(written, meant):
    assert smallest(reset_optimizer=written).reset_optimizer == meant


PUBLISHED_CODE = {"coconut": True, "method": None}


@pytest.mark.parametrize(
    "changes, clipping",
    [
        ({}, 1.0),
        ({"gradient_clipping": 0.5}, 0.5),
        ({"coconut": True}, 1.0),
        (PUBLISHED_CODE, 0.0),
        (PUBLISHED_CODE | {"gradient_clipping": 1.0}, 1.0),
        *[({boolean: True, "method": None}, 0.0) for boolean in METHOD_BOOLEANS],
    ],
)
def test_only_files_of_the_published_code_are_not_clipped(changes, clipping):
    assert smallest(**changes).gradient_clipping == clipping


@pytest.mark.parametrize("override", ["method=cot", "cot=true", "lr=1e-3"])
@pytest.mark.parametrize("name, clipping", [("coconut: True", 0.0), ("method: coconut", 1.0)])
def test_an_override_does_not_change_whose_file_it_is(tmp_path, override, name, clipping):
    path = write(tmp_path, f"{name}\nname: a\nmodel_id: gpt2\ntrain_path: t\nval_path: v\n")
    assert load_experiment(path, [override]).gradient_clipping == clipping
    path.write_text(experiment_to_yaml(load_experiment(path, [override])))
    assert load_experiment(path).gradient_clipping == clipping


def test_a_default_of_the_published_code_is_noted(tmp_path):
    path = write(tmp_path, PUBLISHED)
    weights = ["load_model_path=weights"]
    (note,) = load_with_notes(path, weights)[1]
    assert note.startswith(f"{path}: gradient_clipping is 0.0, the published code's value")
    assert load_with_notes(path, [*weights, "gradient_clipping=0"])[1] == []


def test_other_defaults_are_what_the_published_code_does(tmp_path):
    """With `gradient_clipping` these are all keys of the optimizer and the curriculum that it lacks."""
    experiment = load_experiment(write(tmp_path, PUBLISHED))
    assert (experiment.lr_schedule, experiment.warmup_ratio, experiment.thought_lr) == ("constant", 0.0, None)
    assert (experiment.uniform_prob, experiment.gradient_clipping) == (0.0, 0.0)


NO_EFFECT = [  # settings, what the note says; "" where there is none
    ({"method": "cot", "latent_variant": "learnable_weights"}, "latent_variant: 'learnable_weights'"),
    ({"method": "cot", "thought": "mlp_projection"}, "thought: 'mlp_projection': no effect, method cot has"),
    ({"method": "no_cot", "c_thought": 3}, "c_thought: 3: no effect"),
    ({"method": "icot", "latent_variant": "fixed_window"}, "no effect, method icot has no latents"),
    ({"method": "no_thoughts", "ablate_after_stage": ["zero"]}, "ablate_after_stage"),
    ({"method": "cot", "pad_latent_to_max": False, "c_thought": 1}, "c_thought: 1, pad_latent_to_max: false"),
    ({"method": "cot", "thought": "fixed_window", "latent_window_size": 4}, "latent_window_size: 4"),
    ({"method": "cot", "max_latent_stage": 6}, "max_latent_stage: 6: no effect, method cot has no stages"),
    ({"method": "pause", "uniform_prob": 0.1}, "uniform_prob: 0.1: no effect, method pause has no stages"),
    ({"method": "without_curriculum", "epochs_per_stage": 5}, "epochs_per_stage: 5"),
    ({"icot_tokens_per_epoch": 8}, "icot_tokens_per_epoch: 8: no effect, method coconut is not icot"),
    (
        {"method": "icot", "icot_tokens_per_epoch": 8, "max_latent_stage": 6},
        "max_latent_stage: 6: no effect, icot_tokens_per_epoch takes the place",
    ),
    ({"latent_window_size": 4}, "latent_window_size: 4: no effect, thought last_hidden has no window"),
    ({"thought": "fixed_window", "latent_window_init": "uniform"}, "latent_window_init: 'uniform'"),
    ({"thought": "learnable_window", "latent_window_weights": [1, 0, 0]}, "latent_window_weights: [1, 0, 0]"),
    ({"thought_lr": 0.1}, "thought_lr: 0.1: no effect, thought last_hidden has no parameters"),
    ({"lora_r": 4, "lora_use_dora": True}, "lora_r: 4, lora_use_dora: true: no effect, tuning is full"),
    ({"tuning": "lora", "lora_r": 4}, ""),
    ({"method": "pause", "thought_lr": 0.1, "max_latent_stage": 6}, ""),
    ({"thought": "learnable_window", "latent_window_scope": "pass", "thought_lr": 0.1}, ""),
    ({"thought": "fixed_window", "latent_window_scope": "pass", "latent_window_weights": [1, 0, 0]}, ""),
    ({"method": "cot", "latent_variant": "basic", "c_thought": 0, "max_latent_stage": 0}, ""),
    ({"method": "cot", "epochs_per_stage": 1, "pad_latent_to_max": True, "uniform_prob": 0.0}, ""),
    ({"method": "icot", "epochs_per_stage": 5, "uniform_prob": 0.1, "max_latent_stage": 6}, ""),
]


@pytest.mark.parametrize("changes, part", NO_EFFECT, ids=[str(changes)[:60] for changes, _ in NO_EFFECT])
def test_a_setting_without_effect_is_noted(tmp_path, changes, part):
    path = write(tmp_path, yaml.safe_dump(SMALLEST | changes))
    notes = load_with_notes(path)[1]
    assert len(notes) == bool(part) and all(note.startswith(f"{path}: ") and part in note for note in notes)


@pytest.mark.parametrize("variant", LATENT_VARIANTS)
def test_a_cot_file_of_the_learnable_window_code(tmp_path, variant):
    text = PUBLISHED.replace("\ncoconut: True\ncot: False", "\ncoconut: False\ncot: True")
    text = text.replace("c_thought: 2", "c_thought: 0").replace("max_latent_stage: 3", "max_latent_stage: 0")
    text = text.replace("latent_variant: basic", f"latent_variant: {variant}")
    text += "gradient_clipping: 0.0\nlatent_window_weights: [0.6, 0.4]\n"
    experiment, notes = load_with_notes(write(tmp_path, text))
    thought, tuning = LATENT_VARIANTS[variant]
    assert experiment.method is Method.COT and experiment.tuning == tuning
    assert experiment.thought == "last_hidden", "weights of a window must not appear in a CoT model"
    named = {True: [], False: [f"latent_variant: '{variant}'"]}[thought == "last_hidden"]
    assert all(name in " ".join(notes) for name in [*named, "latent_window_weights: [0.6, 0.4]"])
    assert (f"tuning is {tuning}" in " ".join(notes)) is (tuning == "lora")


def test_numbers_that_yaml_reads_as_text(tmp_path):
    text = PUBLISHED.replace('!!float "1e-4"', "1e-4").replace("seed: 0", "seed: '7'")
    experiment = load_experiment(write(tmp_path, text))
    assert experiment.lr == 1e-4 and experiment.seed == 7


def test_defaults_are_the_schema_s():
    experiment, stated = smallest(), defaults(load_schema("experiment"))
    for key in set(stated) - set(SMALLEST) - {"thought", "tuning", "reset_optimizer", *METHOD_BOOLEANS}:
        if key != "latent_variant":
            value = getattr(experiment, key)
            assert (list(value) if isinstance(value, tuple) else value) == stated[key], key


def test_every_field_and_key_is_described():
    schema = load_schema("experiment")["properties"]
    assert set(Experiment.__dataclass_fields__) | {*METHOD_BOOLEANS, "latent_variant"} == set(schema)
    assert all(rule["description"] and rule["group"] for rule in schema.values())


ROUND_TRIPS = [
    {},
    {"method": "cot", "tuning": "lora", "lora_target_modules": ["c_attn", "c_proj"], "lr": 1e-5},
    {"epochs_per_stage": [6, 3], "thought": "fixed_window", "latent_window_weights": [1, 0.5, 0]},
    {"method": "pause", "reset_optimizer": "every_epoch", "save_minutes": 5, "thought_lr": "1e-3"},
    {"only_eval": True, "load_model_path": "runs/a/best", "train_path": None, "name": "été-1e4"},
    {"method": "icot", "icot_tokens_per_epoch": 8, "max_new_tokens": 64, "test_path": "data/t.json"},
]


@pytest.mark.parametrize("changes", ROUND_TRIPS)
def test_round_trip(tmp_path, changes):
    experiment = smallest(**changes)
    assert load_experiment(write(tmp_path, experiment_to_yaml(experiment))) == experiment


@given(
    lr=st.floats(1e-12, 10),
    epochs=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    name=st.text(max_size=8),
)
@settings(max_examples=50, deadline=None)
def test_round_trip_of_any_number_and_name(lr, epochs, name):
    try:
        experiment = smallest(lr=lr, epochs_per_stage=epochs, name=name)
    except ConfigError:
        return
    assert validate_experiment(yaml.safe_load(experiment_to_yaml(experiment)), "test") == experiment


# --- overrides -----------------------------------------------------------------------------------------


def test_set_replaces_values(tmp_path):
    path = write(tmp_path, PUBLISHED)
    experiment = load_experiment(
        path, ["lr=3e-5", "epochs_per_stage=[6, 3]", "debug=true", "load_model_path=None"]
    )
    assert experiment.lr == 3e-5 and experiment.epochs_per_stage == (6, 3) and experiment.debug


def test_set_replaces_what_the_file_says_in_other_words(tmp_path):
    path = write(
        tmp_path, PUBLISHED.replace("latent_variant: basic", "latent_variant: learnable_weights_lora")
    )
    assert load_experiment(path, ["method=pause_as_thought", "latent_variant=None"]).thought == "pause"
    changed = load_experiment(path, ["thought=mlp_projection"])
    assert (changed.thought, changed.tuning) == ("mlp_projection", "lora")
    changed = load_experiment(path, ["tuning=full"])
    assert (changed.thought, changed.tuning) == ("learnable_window", "full")
    assert load_experiment(path, ["latent_variant=basic", "cot=true"]).method is Method.COT


def test_set_needs_no_quotes_for_text():
    overrides = ["name=2024-11-05", "load_model_path=7", "reset_optimizer=false", "test_path=None", "seed=7"]
    assert parse_overrides(overrides) == {
        "name": "2024-11-05",
        "load_model_path": "7",
        "reset_optimizer": False,
        "test_path": "None",
        "seed": 7,
    }


@pytest.mark.parametrize(
    "override, part",
    [
        ("epoch_per_stage=3", "did you mean 'epochs_per_stage'?"),
        ("lr", "must be KEY=VALUE"),
        ("lr=[", "is not valid YAML"),
        ("epochs_per_stage=&a [1, *a]", "is not valid YAML"),
    ],
)
def test_bad_overrides(override, part):
    with pytest.raises(ConfigError) as caught:
        parse_overrides([override])
    assert part in str(caught.value) and override in str(caught.value)


def test_override_is_named_in_the_message(tmp_path):
    with pytest.raises(ConfigError, match=r"experiment.yaml with --set lr=-1: lr: must be"):
        load_experiment(write(tmp_path, PUBLISHED), ["lr=-1"])


# --- bad files -----------------------------------------------------------------------------------------

BAD_VALUES = [
    ({"epoch_per_stage": 3}, "epoch_per_stage: is not a setting; did you mean 'epochs_per_stage'?"),
    ({"learning_rate": 1e-4}, "learning_rate: is not a setting; write 'lr' instead"),
    ({"coconut": True, "cot": True, "method": None}, "coconut, cot: 2 methods are true"),
    ({"method": None}, "method: is not set"),
    ({"cot": True}, "method: says coconut, but 'cot: true' chooses another"),
    ({"method": "cocnut"}, "did you mean 'coconut'?"),
    ({"only_eval": True}, "load_model_path: is missing, but 'only_eval: true'"),
    ({"train_path": None}, "train_path: is missing"),
    ({"val_path": None}, "val_path: is missing, and has no default"),
    ({"c_thought": 0}, "c_thought: is 0, so method coconut has no latents"),
    ({"max_latent_stage": 0}, "max_latent_stage: is 0"),
    ({"c_thought": -1}, "c_thought: must be a whole number of at least 0 and at most 1000, got -1"),
    (
        {"method": "pause", "thought": "last_hidden"},
        "thought: is last_hidden, but method pause always uses pause",
    ),
    ({"method": "pause", "latent_variant": "mlp_projection"}, "always uses thought pause"),
    ({"latent_variant": "basic", "thought": "mlp_projection"}, "but latent_variant basic means last_hidden"),
    ({"latent_variant": "learnable_weights_lora", "tuning": "full"}, "learnable_weights_lora means lora"),
    ({"latent_variant": "learnable_weight"}, "did you mean 'learnable_weights'?"),
    ({"thought": "last_hiden"}, "did you mean 'last_hidden'?"),
    (
        {"thought": "fixed_window", "latent_window_size": 4},
        "3 weights [0.6, 0.3, 0.1] for latent_window_size 4",
    ),
    ({"latent_variant": "fixed_window", "latent_window_weights": [0, 0, 0]}, "start with 0"),
    (
        {"latent_window_weights": [0.6, -0.3]},
        "latent_window_weights.1: must be a number of at least 0, got -0.3",
    ),
    ({"num_epochs": 3, "resume": 3}, "num_epochs: is 3, but resume skips 3"),
    ({"num_epochs": True}, "num_epochs: must be a whole number of at least 1 and at most 100000, got true"),
    ({"num_epochs": 2.5}, "num_epochs: must be a whole number of at least 1 and at most 100000, got 2.5"),
    ({"epochs_per_stage": []}, "epochs_per_stage: must be a whole number of at least 1, or a list"),
    ({"epochs_per_stage": [3, True]}, "epochs_per_stage: must be a whole number of at least 1, or a list"),
    ({"lr": float("nan")}, "lr: must be a finite number"),
    ({"lr": "inf"}, "lr: must be a finite number"),
    ({"latent_window_weights": [float("inf")]}, "latent_window_weights.0: must be a finite number"),
    ({"lr": -1e-4}, "lr: must be a number of more than 0, got -0.0001"),
    ({"lr": "fast"}, "lr: must be a number of more than 0, got 'fast'"),
    ({"lr": True}, "lr: must be a number of more than 0, got true"),
    ({"uniform_prob": 30}, "uniform_prob: must be a number of at least 0 and at most 1, got 30"),
    ({"bf16": "maybe"}, "bf16: must be true or false, got 'maybe'"),
    ({"debug": 1}, "debug: must be true or false, got 1"),
    ({"seed": -1}, "seed: must be a whole number of at least 0"),
    ({"name": "../other"}, "name: '../other' is not a folder name inside save_path"),
    ({"name": ".."}, "name: '..' is not a folder name"),
    ({"name": "a\\b"}, "is not a folder name inside save_path"),
    ({"name": "a\nb"}, "is not a folder name inside save_path"),
    ({"name": "~"}, "is not a folder name inside save_path"),
    ({"name": "$HOME"}, "is not a folder name inside save_path"),
    ({"name": ""}, "name: must be text that is not empty"),
    ({"name": 5}, "name: must be text, got 5; put it in quotes"),
    ({"reset_optimizer": "sometimes"}, "reset_optimizer: must be one of true, false, never, stage_switch"),
    ({"lr_schedule": "cosin"}, "did you mean 'cosine'?"),
    ({"warmup_ratio": 1}, "warmup_ratio: must be a number of at least 0 and less than 1, got 1"),
    ({"lora_target_modules": "c_attn"}, "lora_target_modules: must be a list"),
    ({"model_id": "None"}, "model_id: is missing, and has no default"),
    ({"train_path": "x" * 500, "seed": "y" * 5000}, "seed: must be a whole number"),
]


@pytest.mark.parametrize("changes, part", BAD_VALUES, ids=[part[:50] for _, part in BAD_VALUES])
def test_bad_values(changes, part):
    with pytest.raises(ConfigError) as caught:
        validate_experiment(SMALLEST | changes, "configs/x.yaml")
    message = str(caught.value)
    assert part in message and message.startswith("configs/x.yaml: ")
    assert message.count("\n") == 0 and len(message) < 400, "one problem, one line"


def test_all_problems_of_a_file_in_one_message(tmp_path):
    text = PUBLISHED.replace("cot: False", "cot: True", 1).replace("resume: 3", "resume: 30")
    text = text.replace("weight_decay: 0.01", "weight_decay: -1") + "epoch_per_stage: 2\n"
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and all(line.startswith(f"{path}: ") for line in lines)
    for key in ("coconut, cot:", "num_epochs:", "weight_decay:", "epoch_per_stage:"):
        assert any(key in line for line in lines), key


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.dates()
    | st.binary(max_size=3)
)
YAML_VALUES = (
    SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
)
KEYS = st.sampled_from(sorted(load_schema("experiment")["properties"]))


@given(st.dictionaries(KEYS, YAML_VALUES, max_size=6))
@settings(max_examples=150, deadline=None)
def test_nothing_but_a_config_error_escapes(changes):
    try:
        assert isinstance(validate_experiment(SMALLEST | changes, "test"), Experiment)
    except ConfigError as error:
        assert str(error).startswith("test: ")


def test_record_is_frozen():
    experiment = smallest()
    with pytest.raises(AttributeError):
        experiment.lr = 1.0  # type: ignore[misc]
    assert replace(experiment, lr=1.0).lr == 1.0
