"""`too_long` and `max_tokens`: refuse, drop or truncate long examples, with counts."""

import json

import pytest
import yaml

from coconut_ds.__main__ import main
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.curriculum import render, stage_at
from coconut_ds.data.run_data import load_run_data, num_tokens
from coconut_ds.errors import DataError
from coconut_ds.model.loading import load_config

SHORT = {"question": "1+2=?", "steps": ["<<1+2=3>>"], "answer": "3"}
STEPS = {"question": "1+1=?", "steps": ["<<1+1=2>>"] * 400, "answer": "2"}
QUESTION = {"question": "1+" * 400 + "1=?", "steps": ["<<1+1=2>>"], "answer": "1"}


@pytest.fixture
def load(tiny_experiment, tmp_path, capsys):
    """The data of a run with `items` in every split, its experiment and what is printed."""

    def read(items, **changes):
        path = tmp_path / "items.json"
        path.write_text(json.dumps(items))
        paths = dict.fromkeys(("train_path", "val_path", "test_path"), str(path))
        experiment = validate_experiment(tiny_experiment | paths | changes, "test")
        capsys.readouterr()
        data = load_run_data(experiment, load_config(experiment.model_id))
        return data, experiment, capsys.readouterr().err

    return read


@pytest.mark.parametrize("items, index", [([STEPS], 0), ([SHORT, QUESTION], 1)])
def test_the_default_is_an_error_that_names_the_ways_out(load, items, index):
    with pytest.raises(DataError, match=f"item {index}: this example has .*write 'too_long: drop'"):
        load(items)


def test_dropped_examples_are_counted_in_every_split(load):
    data, _, printed = load([SHORT, STEPS, SHORT, QUESTION], too_long="drop")
    assert len(data.train) == len(data.valid) == len(data.test) == 2
    assert data.valid.num_dropped == data.test.num_dropped == 2
    assert data.train[0] == data.train[-1] == data.train[:][1] == data.valid.tokenized[1]
    assert [problem.question for problem in data.valid.problems] == [SHORT["question"]] * 2
    assert printed.count("2 of 4 examples are dropped (too_long: drop)") == 1
    assert printed.count("2 of 4 examples are not asked, and count as wrong answers (too_long: drop)") == 2


def test_nothing_left_is_an_error(load):
    with pytest.raises(DataError, match="every example is too long"):
        load([STEPS], too_long="drop")


@pytest.mark.parametrize("method", ["coconut", "cot"])
def test_truncated_questions_fit_at_every_stage(load, method):
    data, experiment, printed = load([SHORT, QUESTION], too_long="truncate_question", method=method)
    positions = load_config(experiment.model_id).max_position_embeddings
    lengths = [
        len(render(problem, stage_at(epoch, experiment), experiment, data.vocabulary).tokens)
        for problem in data.train
        for epoch in range(experiment.num_epochs)
    ]
    assert max(lengths) == positions
    assert len(data.train) == len(data.valid) == 2 and data.valid.num_dropped == 0
    assert data.vocabulary.decode(data.train[1].question).endswith("1=?\n")
    assert "1 of 2 examples are shortened at the start of their questions" in printed


def test_steps_cannot_be_truncated(load):
    with pytest.raises(DataError, match="more than its question has; write 'too_long: drop'"):
        load([SHORT, STEPS], too_long="truncate_question")


def test_max_tokens_is_a_limit_below_the_models(load):
    data, experiment, _ = load([SHORT])
    size = int(num_tokens(data.train)[0]) + 2 + experiment.c_thought * experiment.max_latent_stage
    assert len(load([SHORT], max_tokens=size)[0].train) == 1
    with pytest.raises(DataError, match="and max_tokens allows 5"):
        load([SHORT], max_tokens=5)


def test_dropped_items_count_as_wrong_in_the_record(tiny_experiment, load):
    from coconut_ds.data.tokenizer import load_vocabulary
    from coconut_ds.distributed import Ranks
    from coconut_ds.evaluation.evaluate import ReadingEngine, evaluate
    from coconut_ds.evaluation.saved_models import READING
    from coconut_ds.model.loading import build_module

    torch = pytest.importorskip("torch")
    data, experiment, _ = load([SHORT, STEPS, SHORT], too_long="drop", max_new_tokens=2)
    vocabulary = load_vocabulary(experiment.model_id)
    engine = ReadingEngine(build_module(experiment, vocabulary, READING), Ranks(0, 1, torch.device("cpu")))
    numbers = evaluate(engine, data.valid, stage_at(0, experiment), experiment, vocabulary).numbers()
    assert (numbers["num_items"], numbers["num_dropped"]) == (3, 1)
    assert numbers["accuracy"] == numbers["num_correct"] / 3


def test_validate_says_what_train_does(tiny_experiment, tmp_path, capsys):
    (tmp_path / "t.json").write_text(json.dumps([SHORT, STEPS]))
    for action, code in (("error", 2), ("drop", 0)):
        values = tiny_experiment | {"train_path": str(tmp_path / "t.json"), "too_long": action}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
        assert main(["validate", str(tmp_path / "c.yaml")]) == code
        printed = capsys.readouterr().err
        assert "t.json, item 1: this example has" in printed and ("1 of 2 examples" in printed) is (code == 0)
