"""Paired tests: only of results on the same examples; what was left out is printed."""

import json

import pytest
import scipy.stats

from coconut_ds.__main__ import main
from coconut_ds.data.problems import Problem, examples_digest
from coconut_ds.reports.comparison import all_verdicts, group_runs
from coconut_ds.reports.pairing import pair
from coconut_ds.reports.run_records import read_run
from tests.reports.conftest import STAGED, add_answers

OLD = {"examples": None, "grading": None, "file": None}


@pytest.fixture
def two(make_run):
    """(a function that pairs a Coconut and a no-CoT run, their folders)"""
    ours = make_run("c", [1, 2, 3], 4, method="coconut", **STAGED)
    theirs = make_run("n", [1, 2, 3], 4, method="no_cot")
    return lambda: pair(group_runs([read_run(ours.folder), read_run(theirs.folder)])), ours, theirs


def test_methods_are_paired_item_by_item(two):
    paired, ours, theirs = two
    add_answers(ours.folder, [True] * 14)
    add_answers(theirs.folder, [*[False] * 12, True, False], checkpoint="checkpoint_2")
    (test,) = paired().tests
    assert (test.split, test.num_items, test.only_first, test.only_second) == ("test", 14, 13, 0)
    assert test.p_value == pytest.approx(scipy.stats.binomtest(0, 13).pvalue)
    assert str(test).endswith("(checkpoint_3, checkpoint_2)") and paired().left_out == ()


def test_a_run_without_predictions_is_not_paired(two, capsys):
    paired, ours, theirs = two
    add_answers(ours.folder, [True])
    assert paired().lines() == []
    assert main(["report", str(ours.folder), str(theirs.folder)]) == 0
    assert "write the predictions it needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "ours, theirs, reason",
    [
        (
            {},
            {"examples": "e1", "file": "/data/t.json"},
            "(test t.json, 2 examples): they answered different",
        ),
        (
            {},
            {"differences": ["max_new_tokens 1 instead of 64"]},
            "(max_new_tokens 1 instead of 64); run `eval`",
        ),
        (
            {"differences": ["0 latents instead of 3"]},
            {},
            "own settings (0 latents instead of 3); run `eval`",
        ),
        ({}, {"grading": "latex"}, "graded by different rules (exact, latex)"),
        ({}, OLD, "graded by different rules"),
        ({"split": "valid"}, {"split": "valid", "examples": "e1"}, "(valid t_test.json, 2 examples) and n ("),
        (OLD | {"expected": None}, OLD, None),
        (OLD | {"checkpoint": "checkpoint_2"}, OLD, None),
        ({"split": "/data/t.json"}, {}, None),  # the same examples under another name
    ],
)
def test_only_results_of_the_same_examples_are_paired(two, ours, theirs, reason, capsys):
    paired, one, other = two
    add_answers(one.folder, [True, False], **ours)
    add_answers(other.folder, [False, True], **theirs)
    pairing = paired()
    assert (len(pairing.tests), len(pairing.left_out)) == ((1, 0) if reason is None else (0, 1))
    assert reason is None or reason in pairing.left_out[0]
    for form in ([], ["--html", str(one.folder / "page.html")], ["--json"]):
        assert main(["report", str(one.folder), str(other.folder), *form]) == 0
        printed = capsys.readouterr().out
        assert reason is None or pairing.left_out[0] in printed
    page = (one.folder / "page.html").read_text()
    assert ("not paired" in page) is (reason is not None)


@pytest.mark.parametrize("number, expected, count", [(2, "0", 1), (3, "0", 0), (2, "7", 0)])
def test_results_of_older_versions_are_paired_only_if_expected_answers_agree(two, number, expected, count):
    paired, ours, theirs = two
    add_answers(ours.folder, [True, False], **OLD)
    add_answers(theirs.folder, [False] * number, **OLD)
    path = theirs.folder / "predictions.jsonl"
    path.write_text(path.read_text().replace('"expected": "0"', f'"expected": "{expected}"'))
    pairing = paired()
    assert (len(pairing.tests), len(pairing.left_out)) == (count, 1 - count)
    assert "an older version" in pairing.lines()[0]


def test_an_evaluation_of_another_file_does_not_hide_the_own_one(two):
    """`eval m2 --set val_path=t.json` after both were evaluated on their validation file."""
    paired, ours, theirs = two
    add_answers(ours.folder, [True, True, False], split="valid")
    add_answers(theirs.folder, [True, False, False], split="valid")
    add_answers(theirs.folder, [True, True], split="valid", examples="e1", file="t.json")
    (test,) = paired().tests
    assert (test.num_items, test.only_first, test.only_second) == (3, 1, 0)


def test_an_evaluation_in_another_way_does_not_hide_the_own_one(two):
    """`eval m1 --set max_new_tokens=1` and `eval m1 --latents 0` after both were evaluated."""
    paired, ours, theirs = two
    for run in (ours, theirs):
        add_answers(run.folder, [True, True, False])
    add_answers(ours.folder, [False] * 3, differences=["max_new_tokens 1 instead of 64"])
    add_answers(ours.folder, [False] * 3, latents=0, differences=["0 latents instead of 4"])
    (test,) = paired().tests
    assert (test.num_items, test.only_first, test.only_second) == (3, 0, 0)


def test_seeds_with_other_examples_are_left_out(make_run):
    runs = [make_run(f"c{seed}", [1], 4, method="coconut", seed=seed, **STAGED) for seed in (0, 1)]
    runs += [make_run(f"n{seed}", [1], 4, method="no_cot", seed=seed) for seed in (0, 1)]
    for run in runs:
        add_answers(run.folder, [True, False], examples=f"e{run.experiment.seed}")
    pairing = pair(group_runs([read_run(run.folder) for run in runs]))
    assert [test.num_items for test in pairing.tests] == [2]
    assert "c1 and n1" in pairing.left_out[0] and "other seeds answered other examples" in pairing.left_out[0]


@pytest.mark.parametrize(
    "examples, lines",
    [
        ("aaa", ["coconut is not above no_cot"]),
        ("aab", ["no_cot and coconut were measured on different examples (test)"]),
        ("aba", ["no_cot: its seeds were measured on"]),
    ],
)
def test_means_and_baselines_over_different_examples_are_named_or_left_out(make_run, examples, lines):
    """Of two seeds of the baseline and one run."""
    made = [make_run(f"n{seed}", [1], 40, method="no_cot", seed=seed) for seed in (0, 1)]
    made.append(make_run("c", [1], 30, method="coconut", **STAGED))
    for run, name in zip(made, examples, strict=True):
        path = run.folder / "metrics.jsonl"
        text = "".join(json.dumps({**line, "examples": name}) + "\n" for line in run.lines)
        path.write_text(text)
    runs = [read_run(run.folder) for run in made]
    printed = all_verdicts(runs, group_runs(runs))
    assert len(printed) == len(lines)
    assert all(line.startswith(start) for line, start in zip(printed, lines, strict=True))


def test_the_hash_is_of_questions_and_answers_in_order():
    first, second = Problem("a", (), "1"), Problem("b", ("x",), "2")
    digests = {
        examples_digest(problems)
        for problems in (
            [first, second],
            [second, first],
            [first],
            [first, Problem("b", (), "3")],
            [Problem("a1", (), ""), second],
        )
    }
    assert len(digests) == 5
    assert examples_digest([second]) == examples_digest([Problem("b", (), "2")])
