"""The grading rule: taken from the card or the experiment, and printed with every accuracy."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.curriculum import Stage
from coconut_ds.data.problems import Card, Problem
from coconut_ds.data.run_data import TestSet
from coconut_ds.evaluation.evaluate import grade, grading_of, summarize
from coconut_ds.evaluation.measure import Measurement
from coconut_ds.training.trainer import Trainer

SMALLEST = {"name": "run", "model_id": "gpt2", "method": "coconut", "train_path": "a", "val_path": "b"}
HALF = TestSet([Problem("q", (), "0.5")], [], Card("math", grading="latex"))


def result(grading):
    return summarize([grade(0, r"### \frac{1}{2}", 3, HALF, grading)], 0.25, grading)


@pytest.mark.parametrize("chosen, rule", [(None, "latex"), ("exact", "exact"), ("latex", "latex")])
def test_the_experiment_s_rule_goes_before_the_card_s(chosen, rule):
    assert grading_of(validate_experiment(SMALLEST | {"grading": chosen}, "test"), HALF.card) == rule


@pytest.mark.parametrize("grading, accuracy", [("latex", 1.0), ("exact", 0.0)])
def test_numbers_and_lines_name_the_rule(grading, accuracy):
    evaluation = result(grading)
    assert evaluation.accuracy == accuracy and evaluation.numbers()["grading"] == grading
    line = str(Measurement("checkpoint_1", "test", Stage(3, 6), None, evaluation))
    assert f"({grading} grading)" in line


@pytest.mark.parametrize("num_cut", [0, 1])
def test_the_lines_of_eval_name_answers_cut_at_the_limit(num_cut):
    evaluation = replace(result("exact"), num_cut=num_cut, max_new_tokens=8, longest_answer=25)
    line = str(Measurement("checkpoint_1", "test", Stage(3, 6), None, evaluation))
    note = "note: 1 of 1 answers are wrong and were cut at max_new_tokens (8)"
    assert (note in line) == bool(num_cut)


def test_the_line_of_training_names_the_rule():
    lines = []
    trainer = SimpleNamespace(
        engine=SimpleNamespace(
            module=SimpleNamespace(thought=SimpleNamespace(window_weights=lambda: None)),
        ),
        experiment=validate_experiment(SMALLEST, "test"),
        run_data=SimpleNamespace(vocabulary=None),
        measure=lambda *_: result("latex"),
        log=lambda *_, **numbers: lines.append(numbers["grading"]),
        run=SimpleNamespace(sample=lambda **_: None, show_samples=lambda: None),
        peak=SimpleNamespace(summary=lambda: ""),
        print_line=lines.append,
        check_written=lambda: None,
    )
    Trainer.evaluate(trainer, HALF, Stage(3, 6), "valid", 0)
    assert lines[0] == "latex" and "accuracy 100.0 % (latex grading)" in lines[1]
