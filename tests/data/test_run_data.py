"""Examples that are too long are refused before the first step, with file, item, tokens and positions."""

import json

import pytest
import yaml
from transformers import AutoConfig

from coconut_ds.__main__ import main
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.curriculum import Stage, render
from coconut_ds.data.run_data import (
    LengthCheck,
    Limit,
    limit_of,
    load_evaluation_data,
    load_run_data,
    trained_stages,
)
from coconut_ds.data.tokenizer import TokenizedProblem, load_vocabulary
from coconut_ds.errors import DataError
from coconut_ds.model.loading import load_config
from tests.conftest import ROOT

DS_CONFIG = str(ROOT / "ds_configs" / "zero2_offload.json")
SHORT = {"question": "1+1=?", "steps": ["<<1+1=2>>"], "answer": "2"}


@pytest.fixture
def run_files(tiny_experiment, tmp_path):
    """Write an experiment whose data has one item of `steps` steps in the file of `key`."""

    def write(key, steps, item=1, **changes):
        problems = [SHORT] * item + [SHORT | {"steps": ["<<1+1=2>>"] * steps}]
        data = tmp_path / f"{key}.json"
        data.write_text(json.dumps(problems))
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(tiny_experiment | {key: str(data)} | changes))
        return str(path), str(data)

    return write


@pytest.mark.parametrize("key", ["train_path", "val_path", "test_path"])
def test_every_split_is_looked_through_before_the_first_step(key, run_files, tiny_experiment, capsys):
    path, data = run_files(key, 400)
    positions = load_config(tiny_experiment["model_id"]).max_position_embeddings
    for command in (["train", path, "--deepspeed_config", DS_CONFIG], ["validate", path]):
        assert main(command) == 2
        output = capsys.readouterr().err
        assert (
            f"{data}, item 1: this example has " in output
            and f"the model has {positions:,} positions" in output
        )
        assert "shorten or remove it" in output and "Traceback" not in output


def test_validate_of_the_data_names_the_item(run_files, tiny_experiment, capsys):
    _, data = run_files("train_path", 400, item=3)
    assert main(["validate", data, "--model", tiny_experiment["model_id"]]) == 2
    output = capsys.readouterr().err
    assert f"{data}, item 3: this example has" in output and "shorten or remove it" in output


def experiment_of(tiny_experiment, **changes):
    return validate_experiment(tiny_experiment | changes, "test")


def words(question, steps, answer):
    return TokenizedProblem((7,) * question, tuple((7,) * step for step in steps), (7,) * answer)


PROBLEMS = [words(5, [], 2), words(5, [1, 1, 1], 2), words(3, [9, 1], 1), words(12, [1] * 6, 1)]


@pytest.mark.parametrize("changes", [{}, {"uniform_prob": 0}, {"method": "cot"}, {"c_thought": 3}], ids=str)
def test_the_longest_stage_of_the_run_counts(changes, tiny_experiment):
    """The smallest limit that passes is the longest row that `render` makes in any epoch."""
    experiment = experiment_of(tiny_experiment, **changes)
    vocabulary = load_vocabulary(experiment.model_id)
    stages = trained_stages(experiment)
    if experiment.uniform_prob and experiment.method.has_stages:
        stages += [Stage(number, min(number, 3) * experiment.c_thought) for number in range(4)]
    longest = max(
        len(render(problem, stage, experiment, vocabulary).tokens) for problem in PROBLEMS for stage in stages
    )
    check = LengthCheck(experiment, vocabulary, Limit(longest, True))
    assert check.refuse(check.uses(PROBLEMS, [], [])) == []
    check = LengthCheck(experiment, vocabulary, Limit(longest - 1, True))
    with pytest.raises(DataError, match=f"has {longest} tokens"):
        check.refuse(check.uses(PROBLEMS, [], []))


def test_computed_positions_are_a_note_and_prompts_without_room_an_error(tiny_experiment):
    experiment = experiment_of(tiny_experiment)
    vocabulary = load_vocabulary(experiment.model_id)
    long, prompt = words(5, [60], 2), words(60, [], 2)
    check = LengthCheck(experiment, vocabulary, Limit(40, False))
    (note, _) = check.refuse(check.uses([long], [long], []))
    assert "the model was not trained on such lengths" in note and "item 0" in note
    with pytest.raises(DataError, match="the prompt of this example has 6[0-9] tokens"):
        check.refuse(check.uses([], [prompt], []))
    with pytest.raises(DataError, match="the prompt of this example"):
        check.refuse(check.uses([], [], [prompt]))
    assert len(check.refuse(check.uses([prompt], [words(20, [60], 2)], []))) == 2


def test_a_file_to_evaluate_is_checked_at_its_stage(run_files, tiny_experiment):
    _, data = run_files("test_path", 30)
    experiment, config = experiment_of(tiny_experiment), load_config(tiny_experiment["model_id"])
    with pytest.raises(DataError, match="item 1: this example has"):
        load_evaluation_data(experiment, config, data, Stage(0, 0), None)
    _, test_set = load_evaluation_data(experiment, config, data, Stage(30, 3), None)
    assert len(test_set) == 2
    with pytest.raises(DataError, match="200 latents.*and 1 more items"):
        load_evaluation_data(experiment, config, data, Stage(30, 200), None)


@pytest.mark.parametrize(
    "kind, is_hard",
    [("gpt2", True), ("opt", True), ("gptj", True), ("llama", False), ("qwen2", False), ("gpt_neox", False)],
)
def test_which_models_have_a_table_of_positions(kind, is_hard):
    assert limit_of(AutoConfig.for_model(kind)).is_hard is is_hard


def test_a_model_without_a_stated_limit_takes_every_row():
    assert limit_of(AutoConfig.for_model("bloom")) is None


def test_cached_lengths_are_those_of_the_problems(tiny_experiment):
    run_data = load_run_data(experiment_of(tiny_experiment), load_config(tiny_experiment["model_id"]))
    expected = [sum(map(len, (p.question, *p.steps, p.answer))) for p in run_data.train]
    assert run_data.train.num_tokens().tolist() == expected
