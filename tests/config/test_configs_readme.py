"""The commands of configs/README.md train what its table says: every method, every thought, both tunings."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from string import Template
from typing import Any

import pytest

from coconut_ds.config.experiment import Experiment, load_experiment
from coconut_ds.config.methods import Method
from coconut_ds.config.schema import defaults, load_schema
from tests.conftest import ROOT

DATA_SETS = ("gsm", "prontoqa", "prosqa", "math")
TEXT = (ROOT / "configs/README.md").read_text(encoding="utf-8")
TABLE = TEXT.split("<!-- methods -->")[1].split("<!-- /methods -->")[0]
COMMANDS = re.findall(r"^\| .* \| `(.*)` \|$", TABLE, re.M)
# What each file said that a command of the README replaced, without the keys that its method ignores.
REPLACED = json.loads((ROOT / "tests/config/replaced_experiments.json").read_text(encoding="utf-8"))
TOKENS_WITHOUT_CARD = 128
SAME_IN_ALL = {
    "model_id": "openai-community/gpt2",
    "keep_checkpoints": 2,
    "gradient_clipping": 0.0,
    "lr": 1e-4,
    "weight_decay": 0.01,
    "reset_optimizer": "stage_switch",
    "pad_latent_to_max": True,
}


def experiment_of(command: str) -> Experiment:
    """The experiment that a `bash launch/train.sh CONFIG --set ...` line trains."""
    start, script, config, *options = shlex.split(command)
    assert (start, script) == ("bash", "launch/train.sh") and (ROOT / script).is_file()
    assert options[::2] == ["--set"] * (len(options) // 2)
    return load_experiment(ROOT / config, options[1::2])


def commands() -> Iterator[str]:
    """Every line of the README's table, for every data set and tuning; later ones replace earlier ones."""
    for command in COMMANDS:
        for data in DATA_SETS if "$" in command else ("gsm",):
            full = Template(command).substitute(DATA=data)
            yield full
            if "--set name=" in full:
                yield re.sub(r"(name=\S+)", r"\1-lora", full.replace("configs/full/", "configs/lora/"))
            else:
                yield full.replace("configs/full/", "configs/lora/")


@pytest.fixture(scope="module")
def experiments() -> dict[str, Experiment]:
    return {experiment.name: experiment for experiment in map(experiment_of, commands())}


def meaningful(experiment: Experiment) -> dict[str, Any]:
    """Resolved settings other than the defaults, without those that the method ignores."""
    method = experiment.method
    ignored = {"name", "test_path", "train_path", "val_path", *SAME_IN_ALL}
    if not method.has_latents:
        ignored |= {"c_thought", "thought"}
    if not method.has_stages:
        ignored.add("epochs_per_stage")
    if not (method.has_stages or method.has_latents):
        ignored.add("max_latent_stage")
    usual = defaults(load_schema("experiment")) | {"thought": "last_hidden", "tuning": "full"}
    values = asdict(experiment) | {"max_new_tokens": experiment.max_new_tokens or TOKENS_WITHOUT_CARD}
    return {
        key: value
        for key, value in json.loads(json.dumps(values)).items()
        if key not in ignored and value != usual[key]
    }


@pytest.mark.parametrize("name", REPLACED)
def test_a_command_of_the_readme_trains_what_its_file_trained(experiments, name):
    experiment = experiments[name]
    assert meaningful(experiment) == REPLACED[name]
    assert {key: getattr(experiment, key) for key in SAME_IN_ALL} == SAME_IN_ALL
    data = name.partition("-")[0]
    assert (experiment.train_path, experiment.val_path) == (
        f"data/{data}_train.json",
        f"data/{data}_valid.json",
    )


def test_every_line_of_the_table_is_a_command():
    assert len(COMMANDS) == len(re.findall(r"^\|", TABLE, re.M)) - 2  # its head


def test_table_1_is_complete_for_every_data_set_and_tuning(experiments):
    """Every line has a name of its own, and together they are every method and thought with both tunings."""
    lines = list(commands())
    names = [experiment_of(line).name for line in lines]
    assert {name for name in names if names.count(name) > 1} == {"gsm-cot", "gsm-cot-lora"}
    for data in DATA_SETS:
        for tuning in ("full", "lora"):
            runs = [
                experiment
                for experiment in experiments.values()
                if experiment.tuning == tuning and experiment.train_path == f"data/{data}_train.json"
            ]
            assert {experiment.method for experiment in runs} == set(Method)
            assert {experiment.thought for experiment in runs if experiment.method is Method.COCONUT} == {
                "last_hidden", "fixed_window", "learnable_window", "mlp_projection",
            }  # fmt: skip
