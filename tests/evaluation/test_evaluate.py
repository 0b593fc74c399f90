"""Answers of a test set: the same for every batch size and every number of ranks, in one process."""

import itertools
from dataclasses import replace

import pytest
import torch

from coconut_ds.data.curriculum import render
from coconut_ds.data.problems import Card, Problem
from coconut_ds.data.run_data import TestSet
from coconut_ds.data.tokenizer import TokenizedProblem
from coconut_ds.distributed import Ranks
from coconut_ds.evaluation.evaluate import ReadingEngine, evaluate, show_progress
from coconut_ds.evaluation.pretrained import CoconutForCausalLM
from tests.run_folders import make_run


class OneOfTheRanks(ReadingEngine):
    """A rank whose collectives return its own part, and whose neighbor is never done answering."""

    def sum_over_ranks(self, values):
        return list(values)

    max_over_ranks = sum_over_ranks

    def gather(self, value):
        return [value]

    def all_over_ranks(self, flag):
        return flag and self.world_size == 1


@pytest.fixture(scope="module")
def model(tiny_experiment, tmp_path_factory):
    run = make_run(tiny_experiment, tmp_path_factory.mktemp("evaluate"), max_new_tokens=20)
    return CoconutForCausalLM.from_pretrained(run, "cpu")


def problems_of(lengths, model):
    """Problems whose prompts take that many tokens with three latents and two markers around them."""
    rows = [TokenizedProblem((*range(3, 3 + n % 7), *(5,) * (n - n % 7 - 5)), (), (4,)) for n in lengths]
    stage = model.trained.stage
    assert [
        render(row, stage, model.trained.experiment, model.vocabulary).num_prompt for row in rows
    ] == lengths
    return TestSet([Problem("", (), "1")] * len(rows), rows, Card("lengths"))


def completions(model, tests, ranks, rows, sampler=None):
    experiment = replace(model.trained.experiment, batch_size_eval=rows)
    found = {}
    for rank in range(ranks):
        engine = OneOfTheRanks(model.model, Ranks(rank, ranks, torch.device("cpu")))
        result = evaluate(engine, tests, model.trained.stage, experiment, model.vocabulary, sampler=sampler)
        found |= {
            prediction.index: (prediction.completion, prediction.num_tokens)
            for prediction in result.predictions
        }
    return [found[index] for index in range(len(tests))]


@pytest.mark.parametrize("ranks, rows", [(1, 2), (1, 5), (2, 1), (2, 3)])
def test_answers_depend_on_neither_batch_size_nor_ranks(model, ranks, rows):
    tests = problems_of([20, 127, 126, 60, 119], model)
    expected = completions(model, tests, 1, 1)
    assert expected[1][1] == 2 and expected[2][1] == 3 and expected[0][1] > 3
    assert completions(model, tests, ranks, rows) == expected


def test_an_evaluation_without_a_terminal_prints_a_line_every_30_seconds():
    lines, seconds = [], itertools.count(0, 10)  # a batch every 10 s
    shown = show_progress(range(9), "test, answers", 9, True, lines.append, lambda: next(seconds))
    assert list(shown) == list(range(9))
    assert lines == [
        "  evaluation, test, answers: batch 3 of 9, ends in 2 min",
        "  evaluation, test, answers: batch 6 of 9, ends in 48 s",
        "  evaluation, test, answers: batch 9 of 9, ends in 11 s",
    ]
    assert list(show_progress(range(9), "x", 9, False, lines.append, lambda: next(seconds))) == list(range(9))
    assert len(lines) == 3
