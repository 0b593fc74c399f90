"""The last lines of a report: accuracy by stage, another example's latents, controls."""

import json

import pytest

from coconut_ds.__main__ import main
from coconut_ds.reports.comparison import group_runs, stage_table
from coconut_ds.reports.conclusions import conclusions
from coconut_ds.reports.run_records import has_learned, read_run, verdict_on_learning, verdicts
from tests.reports.conftest import STAGED, validation

AT = [{"at": f"{k} steps hidden, {2 * k} latents"} for k in range(3)]


def swapped(run, correct, epoch=2):
    line = {**validation(epoch, correct), "kind": "ablation", "ablation": "swap"}
    with open(run.folder / "metrics.jsonl", "a") as writer:
        writer.write("\n" + json.dumps(line) + "\n")
    return read_run(run.folder)


@pytest.fixture
def coconut(make_run):
    return make_run("c", [100, 99, 98], 97, method="coconut", logged=AT, test_at=AT[2]["at"], **STAGED)


@pytest.mark.parametrize(
    "correct, text",
    [
        (11, "11.0 % [6.3, 18.6]: the answers depend on the latents"),
        (70, "70.0 % [60.4, 78.1]: only a part of the answers depends on the latents"),
        (97, "97.0 % [91.5, 99.0]: the answers do not depend on what the latents hold"),
    ],
)
def test_another_examples_latents_show_whether_the_answers_depend_on_them(coconut, correct, text):
    groups = group_runs([swapped(swapped(coconut, 50, epoch=1), correct)])
    assert conclusions(groups) == [
        "coconut: stage 0 100.0 %, stage 1 99.0 %, stage 2 98.0 %, test 97.0 %",
        f"coconut: with the latents of another example {text}",
    ]
    assert ["validation, latents replaced: swap", f"{correct:.1f} %"] in stage_table(groups).rows


def test_controls_that_learned_it_and_those_that_did_not_are_named(coconut, make_run, capsys):
    learned = make_run("t", [100, 99, 96], 96, method="no_thoughts", **{**STAGED, "c_thought": 0})
    chance = make_run("n", [9, 9, 9], 10, method="no_cot")
    cot = make_run("w", [99, 99, 99], 99, method="cot")
    assert main(["report", *(str(run.folder) for run in (coconut, learned, chance, cot))]) == 0
    printed = capsys.readouterr().out
    assert "no_thoughts is as accurate (96.0 % [90.2, 98.4]): this task does not need latents" in printed
    assert "no_cot did not learn it (10.0 % [5.5, 17.4])" in printed
    assert "cot is as accurate" not in printed.replace("no_cot", "")


def test_beside_a_run_that_learned_nothing_no_control_is_called_as_accurate(make_run):
    runs = [
        make_run("c", [9, 9, 9], 9, chance=0.1, method="coconut", logged=AT, test_at=AT[2]["at"], **STAGED)
    ]
    runs.append(make_run("t", [9, 9, 9], 9, chance=0.1, method="no_thoughts", **{**STAGED, "c_thought": 0}))
    assert not any("no_thoughts" in line for line in conclusions(group_runs(runs)))


def test_a_run_without_stages_or_without_a_line_concludes_nothing(make_run):
    assert conclusions(group_runs([make_run("n", [9], 10, method="no_cot")])) == []
    assert conclusions(group_runs([make_run("c", [], method="coconut", **STAGED)])) == []


def test_other_warnings_do_not_make_a_seed_unlearned(make_run):
    """Dropped items, and a last stage of somewhat less accuracy; seed 2 lost most of it."""
    rights = {0: [100, 99, 98], 1: [100, 99, 90], 2: [100, 99, 30]}
    more = [{**line, "num_dropped": 1} for line in AT]
    runs = [make_run(f"s{seed}", right, method="coconut", seed=seed, logged=more, **STAGED)
            for seed, right in rights.items()]  # fmt: skip
    assert [len(verdicts(run)) for run in runs] == [1, 2, 2]
    assert "less accurate than the stage before" in verdict_on_learning(runs[1]).text
    assert [has_learned(run) for run in runs] == [True, True, False]
    assert conclusions(group_runs(runs))[0] == (
        "coconut: 2 of 3 seeds learned it (66.7 % [20.8, 93.9]); not seed 2"
    )
