"""Runs side by side: seeds together, intervals, paired tests, three ways to print."""

import html
import json
import math
from dataclasses import asdict

import pytest
import scipy.stats

from coconut_ds.__main__ import main
from coconut_ds.config.experiment import experiment_to_yaml, validate_experiment
from coconut_ds.reports.comparison import (
    Accuracy,
    best_table,
    group_runs,
    stage_table,
    summary_table,
)
from coconut_ds.reports.run_records import read_run, verdicts
from coconut_ds.runs.checkpoint_folders import Manifest, TrainState
from coconut_ds.tables import Table
from tests.reports.conftest import BASE, STAGED, validation


def test_several_seeds_get_an_interval_over_seeds():
    values = [0.30, 0.36, 0.33]
    accuracy = Accuracy.of([validation(0, round(100 * value)) for value in values])
    low, high = scipy.stats.t.interval(0.95, 2, loc=0.33, scale=0.03 / math.sqrt(3))
    assert (accuracy.value, accuracy.low, accuracy.high) == pytest.approx((0.33, low, high))


def test_one_seed_gets_an_interval_over_its_items():
    accuracy = Accuracy.of([validation(0, 100)])
    assert accuracy.value == accuracy.high == 1.0
    assert accuracy.low == pytest.approx(0.963, abs=1e-3)


def test_seeds_are_one_line_and_methods_are_several(make_run):
    runs = [
        make_run(f"c{seed}", [10, 50, 60 + seed], 70, method="coconut", seed=seed, **STAGED)
        for seed in (1, 0)
    ]
    runs.append(make_run("n", [5, 6, 7], 8, method="no_cot"))
    groups = group_runs(runs)
    assert [(group.label, group.seeds) for group in groups] == [("coconut", [0, 1]), ("no_cot", [0])]
    coconut, no_cot = summary_table(groups).rows
    assert coconut[:7] == ["coconut", "last_hidden", "full", "t", "ZeRO-2, offload, fp16", "0, 1", "test"]
    assert no_cot[1] == "-"  # nothing fills latents that are not there
    # two tokens and four latents; 5 steps of 2 s; the third epoch's peak; the card without its reserve
    assert coconut[8:] == ["6.0", "10.0", "300", "10,464"]
    assert no_cot[8] == "2.0"


def start(tmp_path, name, seed, **settings):
    """A run folder to start from."""
    (tmp_path / name).mkdir()
    values = {**BASE, "name": name, "save_path": str(tmp_path), "method": "cot", "seed": seed, **settings}
    text = experiment_to_yaml(validate_experiment(values, "test"))
    (tmp_path / name / "experiment.yaml").write_text(text)
    return f"{tmp_path}/{name}/best"


@pytest.mark.parametrize(
    "starts, seeds",
    [
        (["runs/cot-seed-3/best", "runs/cot-seed-4/best", "runs/cot-seed-5/best"], [[3, 4, 5]]),
        (["runs/cot/best"] * 3, [[3, 4, 5]]),  # one start for all
        (["runs/seed3/checkpoint_3", "runs/seed4/checkpoint_3", "runs/seed5/checkpoint_5"], [[3, 4], [5]]),
        (["runs/cot-lr3/best", "runs/cot-lr4/best", "runs/cot-seed-5/best"], [[3], [4], [5]]),
        (["runs/cot-seed-3/best", "runs/cot-seed-3/best", None], [[3, 4], [5]]),
    ],
)
def test_a_seeds_own_start_is_the_seeds(make_run, starts, seeds):
    runs = [
        make_run(f"c{seed}", [1, 2, 3], method="coconut", seed=seed, load_model_path=path, **STAGED)
        for seed, path in zip((3, 4, 5), starts, strict=True)
    ]
    assert [group.seeds for group in group_runs(runs)] == seeds


def test_the_starting_runs_own_settings_count_where_they_are_known(make_run, tmp_path):
    starts = {
        3: start(tmp_path, "first", 3),
        4: start(tmp_path, "second", 4),
        5: start(tmp_path, "cot-seed-5", 5, lr=0.5),
        6: start(tmp_path, "cot-seed-6", 3),  # named after another seed than it has
    }
    runs = [
        make_run(f"c{seed}", [1, 2, 3], method="coconut", seed=seed, load_model_path=path, **STAGED)
        for seed, path in starts.items()
    ]
    assert [group.seeds for group in group_runs(runs)] == [[3, 4], [5], [6]]
    other = make_run("o", [1, 2, 3], method="coconut", seed=3, load_model_path=starts[4], **STAGED)
    assert [group.seeds for group in group_runs([runs[0], other])] == [[3], [3]]


def test_the_stage_table_names_what_is_hidden(make_run):
    ours = make_run("c", [10, 50, 60], 70, method="coconut", **STAGED)
    theirs = make_run("n", [5, 6, 7], 8, method="no_cot")
    table = stage_table(group_runs([ours, theirs]))
    assert table.head == ["accuracy", "coconut", "no_cot"]
    assert table.rows == [
        ["validation, stage 0: all steps as text", "10.0 %", ""],
        ["validation, stage 1: 1 step in 2 latents", "50.0 %", ""],
        ["validation, stage 2: 2 steps in 4 latents", "60.0 %", ""],
        ["validation, at the end", "60.0 %", "7.0 %"],
        ["test: each run at its final stage", "70.0 %", "8.0 %"],
    ]
    longer = make_run("l", [10, 50, 60, 65], 71, method="coconut", **(STAGED | {"num_epochs": 4}))
    assert stage_table(group_runs([longer, theirs])).rows[-1][0] == "test: all steps in 4 latents"


def test_tests_of_older_versions_at_a_stage_the_run_was_not_trained_at_do_not_count(make_run):
    """They hid every step, from a CoT run too."""
    run = make_run("cot", [80, 90, 95], 8, old=True, method="cot")
    assert (run.split, run.result["accuracy"]) == ("valid", 0.95)
    assert [line["accuracy"] for line in run.untrained_tests] == [0.08]
    new = make_run("new", [80, 90, 95], 94, method="cot")
    assert (new.split, new.result["accuracy"], new.untrained_tests) == ("test", 0.94, [])
    same = make_run("c", [10, 50, 60], 70, old=True, method="coconut", **STAGED)
    assert same.split == "test"


def test_labels_say_what_differs(make_run):
    runs = [make_run(f"lr{lr}", [1, 2, 3], method="coconut", lr=lr, **STAGED) for lr in (1e-3, 1e-4)]
    assert [group.label for group in group_runs(runs)] == ["coconut, lr 0.001", "coconut, lr 0.0001"]
    far = make_run("far", [1, 2, 3], method="coconut", lr=0.5, weight_decay=0.5, warmup_ratio=0.5, **STAGED)
    assert group_runs([runs[0], far])[1].label == "far"


def test_a_copy_of_a_run_is_no_second_seed(make_run):
    runs = [make_run(name, [1, 2, 3], method="coconut", seed=0, **STAGED) for name in ("a", "a_copy")]
    runs.append(make_run("b", [1, 2, 3], method="coconut", seed=1, **STAGED))
    groups = group_runs(runs)
    assert [(group.label, group.seeds) for group in groups] == [
        ("coconut", [0, 1]),
        ("coconut (a_copy)", [0]),
    ]


def test_other_optimizer_settings_or_rows_are_no_seeds(make_run):
    """Of the DeepSpeed JSON: what changes the result keeps runs apart, what moves memory is in the label."""
    runs = [make_run(f"s{seed}", [1, 2, 3], method="coconut", seed=seed, **STAGED) for seed in (0, 1, 2, 3)]
    for run, changes in zip(
        runs[1:],
        (
            {"optimizer": {"params": {"betas": [0.5, 0.6]}}},
            {"train_batch_size": 7},
            {"communication_data_type": "fp16"},
        ),
        strict=True,
    ):
        file = run.folder / "ds_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    groups = group_runs([read_run(run.folder) for run in runs])
    assert [group.seeds for group in groups] == [[0], [1], [2], [3]]
    assert len({group.label for group in groups}) == 4


def test_report_prints_text_latex_markdown_and_json(make_run, capsys):
    folders = [
        str(make_run("c", [1, 2, 3], 70, method="coconut", **STAGED).folder),
        str(make_run("n", [1, 2, 3], 8, method="no_cot").folder),
    ]
    assert main(["report", *folders]) == 0
    printed = capsys.readouterr().out
    assert "70.0 % [60.4, 78.1]" in printed and f"run folders: {folders[0]}, {folders[1]}" in printed
    main(["report", *folders, "--latex"])
    latex = capsys.readouterr().out
    assert latex.count(r"\begin{tabular}") == 2 and r"no\_cot & 3.0 \%" not in latex
    assert r"70.0 \% & 8.0 \%" in latex
    main(["report", *folders, "--markdown"])
    assert "| test: each run at its final stage | 70.0 % | 8.0 % |" in capsys.readouterr().out
    main(["report", *folders, "--json"])
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [group["accuracy"]["value"] for group in groups] == [0.7, 0.08]


@pytest.mark.parametrize("arguments", [[], ["/nowhere"]])
def test_report_says_what_is_no_run_folder(arguments, capsys):
    assert main(["report", *arguments]) == 2
    assert "run folder" in capsys.readouterr().err


def test_latex_escapes_what_it_must():
    table = Table(["a_b", "x"], [["50 % & {more}", "1 ± 2"]])
    assert r"50 \% \& \{more\} & 1 $\pm$ 2 \\" in table.latex()


QUICKSTART = {"method": "coconut", "c_thought": 1, "epochs_per_stage": 1, "max_latent_stage": 3}
SUPERVISED = QUICKSTART | {"latent_supervision": "step_result"}
WITHOUT_LATENTS = QUICKSTART | {"method": "no_thoughts", "c_thought": 0}


@pytest.mark.parametrize(
    "correct, settings, said",
    [
        ([100, 100, 100, 48], QUICKSTART, "Stage 3 was not learned: 48.0 % (95 % interval 38.5 to 57.7)"),
        ([100, 100, 100, 20], QUICKSTART, "after 1 epoch, 100.0 % at stage 2. Try more epochs"),
        ([100, 100, 100, 20], QUICKSTART, "(epochs_per_stage), latents that learn their step (latent"),
        ([100, 100, 100, 20], SUPERVISED, "(epochs_per_stage), another seed, or earlier stages mixed in"),
        ([100, 100, 100, 20], WITHOUT_LATENTS, "(epochs_per_stage), another seed, or earlier stages mixed"),
        ([100, 100, 11, 12], QUICKSTART, "is not above chance (10.0 %); 11.0 % at stage 2"),
        ([100, 100, 11], QUICKSTART, "100.0 % at stage 1, so far (3 of 4 epochs). Try more epochs"),
        ([60, 60, 60, 45], QUICKSTART, "Stage 3 is less accurate than the stage before: 45.0 %"),
        ([60, 60, 60, 55], QUICKSTART, None),
        ([98, 97, 99, 99], QUICKSTART, None),
        ([9, 9, 9, 9], {"method": "cot"}, "cot was not learned: 9.0 %"),
        ([9, 9, 9, 90], {"method": "cot"}, None),
        ([9, 9, 9, 9], {"method": "no_cot"}, "As the baseline without steps and latents"),
        ([90, 80, 70, 60], {"method": "icot", "icot_tokens_per_epoch": 8}, None),
    ],
)
def test_a_run_that_did_not_learn_says_so_last(make_run, capsys, correct, settings, said):
    run = make_run("r", correct, chance=0.1, **({"num_epochs": 4} | settings))
    lines = verdicts(run)
    assert main(["report", str(run.folder), "--no-page"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    if said is None:
        assert lines == [] and last.startswith(("run folders:", "coconut: stage 0"))
    else:
        assert said in lines[0] and last == lines[0]


@pytest.mark.parametrize(
    "cut, has_advice, text",
    [
        ((95, 8, 25), False, "95 of 100 answers are wrong and were cut at max_new_tokens (8), but correct "
         "ones have up to 25 tokens: write max_new_tokens: 32"),
        ((95, 64, 25), True, "cut at max_new_tokens (64); the longest correct one has 25 tokens. Try"),
        ((3, 8, 25), True, "write max_new_tokens: 32. Try"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "correct, settings", [([5], {"method": "cot"}), ([90, 5], QUICKSTART), ([5], QUICKSTART)]
)
def test_a_verdict_names_answers_cut_at_the_limit(make_run, capsys, correct, settings, cut, has_advice, text):
    logged = [dict(zip(("num_cut", "max_new_tokens", "longest_answer"), cut, strict=True))] * len(correct)
    run = make_run("r", correct, chance=0.1, logged=logged, **({"num_epochs": len(correct)} | settings))
    assert main(["report", str(run.folder), "--no-page"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "was not learned" in last and text in last and ("Try more epochs" in last) == has_advice


def test_the_page_says_what_was_not_learned(make_run, capsys):
    run = make_run("r", [100, 100, 100, 48], chance=0.1, **({"num_epochs": 4} | QUICKSTART))
    assert main(["report", str(run.folder)]) == 0
    (line,) = verdicts(run)
    page = (run.folder / "memory" / "report.html").read_text()
    assert f'<p class="verdict over">{html.escape(line)}</p>' in page


def test_not_above_no_cot_is_said_last(make_run, capsys):
    ours = make_run("c", [100, 100, 100, 14], 14, chance=0.05, num_epochs=4, **QUICKSTART)
    theirs = make_run("n", [12, 12, 12, 13], 13, chance=0.05, num_epochs=4, method="no_cot")
    assert main(["report", str(ours.folder), str(theirs.folder)]) == 0
    *_, before, last = capsys.readouterr().out.splitlines()
    assert before.startswith("c: Stage 3 was not learned: 14.0 %")
    assert last.startswith("coconut is not above no_cot: 14.0 % [8.5, 22.1] against 13.0 %")


def write_manifest(run, epoch, accuracy, **changes):
    """A checkpoint after `epoch`, made by a start with other settings than the run folder's."""
    settings = {"experiment": {**asdict(run.experiment), **changes}}
    state = TrainState(epoch=epoch, accuracy=accuracy)
    (run.folder / f"checkpoint_{epoch}").mkdir()
    Manifest(state, settings, 1, True, {}).write(run.folder / f"checkpoint_{epoch}")


def test_the_best_of_every_stage_and_its_checkpoint(make_run):
    run = make_run(
        "c", [10, 90, 80, 70, 75], method="coconut", **(STAGED | {"epochs_per_stage": 2, "num_epochs": 5})
    )
    write_manifest(run, 5, 0.75)
    assert best_table([run, make_run("n", [1], method="no_cot")]).rows == [
        ["c", "best_stage_0", "-", "90.0 %"],
        ["c", "best_stage_1", "-", "80.0 %"],
        ["c", "best_stage_2", "checkpoint_5", "75.0 %"],
    ]


def test_a_changed_schedule_does_not_relabel_what_was_trained(make_run):
    """Trained with one epoch a stage, then resumed with two: epoch 4 is at stage 1 again."""
    stages = ["0 steps hidden, 0 latents", "1 step hidden, 2 latents", "2 steps hidden, 4 latents"]
    logged = [{"at": stages[number], "stage": number} for number in (0, 1, 2, 1)]
    now = STAGED | {"epochs_per_stage": 2, "num_epochs": 4}
    run = make_run("c", [90, 80, 60, 85], 84, method="coconut", logged=logged, test_at=stages[1], **now)
    write_manifest(run, 1, 0.9, epochs_per_stage=1)
    write_manifest(run, 2, 0.8, epochs_per_stage=1)
    write_manifest(run, 4, 0.85)
    assert best_table([run]).rows == [
        ["c", "best_stage_0", "checkpoint_1", "90.0 %"],
        ["c", "best_stage_1", "checkpoint_4", "85.0 %"],
        ["c", "best_stage_2", "-", "60.0 %"],
    ]
    assert [(r.number, str(r.stage), r.line["accuracy"]) for r in run.stages] == [
        (0, stages[0], 0.9),
        (1, stages[1], 0.85),
        (2, stages[2], 0.6),
    ]
    assert str(run.result_stage) == stages[1] and run.untrained_tests == []
    other = make_run("d", [90, 80], 9, method="coconut", logged=logged[:2], test_at=stages[2], **now)
    assert [line["accuracy"] for line in other.untrained_tests] == [0.09]


ODD = ("x", None, [], {}, True, float("inf"), -1, 0.5, 10**30)


@pytest.mark.parametrize("value", ODD, ids=str)
def test_an_odd_number_in_any_field_is_no_traceback(make_run, value):
    """Each field of each line of metrics.jsonl by itself, and one that is missing."""
    run = make_run("c", [90, 80, 2], 3, method="coconut", chance=0.5, **STAGED)
    fields = {(line["kind"], key) for line in run.lines for key in line if key not in ("kind", "at")}
    assert ("valid", "chance") in fields
    for kind, key in sorted(fields):
        lines = [{**line, key: value} if line["kind"] == kind else line for line in run.lines]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        damaged = read_run(run.folder)
        assert all(isinstance(line, str) for line in verdicts(damaged)), (kind, key)
        groups = group_runs([damaged])
        assert summary_table(groups).rows and stage_table(groups) and best_table([damaged])
