"""The training loop in this process: the tested stage, the final messages, write errors."""

import errno
import json
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from coconut_ds.data.curriculum import stage_at
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.evaluation.evaluate import Evaluation
from coconut_ds.runs.checkpoint_folders import Manifest, TrainedStage
from coconut_ds.training import trainer
from tests.plain_engine import PlainEngine, plain_trainer

CHEAP = {
    "num_epochs": 3,
    "max_latent_stage": 2,
    "eval_max_items": 6,
    "max_new_tokens": 4,
    "batch_size_training": 48,
    "uniform_prob": 0.0,
}
METHODS = [
    {"method": "coconut"},
    {"method": "coconut", "num_epochs": 5},  # every step hidden
    {"method": "coconut", "num_epochs": 2},  # ends before the last stage
    {"method": "cot"},
    {"method": "no_cot"},
    {"method": "no_thoughts"},
    {"method": "icot"},
    {"method": "icot", "icot_tokens_per_epoch": 2},
    {"method": "pause"},
    {"method": "pause_as_thought"},
    {"method": "without_curriculum"},
]


def lines_of(run, kind):
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(map(str, s.values())))
def test_one_file_as_validation_and_test_set_gives_the_same_numbers(tiny_experiment, tmp_path, settings):
    """For every method, the test uses the stage of the last epoch."""
    values = tiny_experiment | CHEAP | {"test_path": tiny_experiment["val_path"], "save_path": str(tmp_path)}
    with plain_trainer(values, **settings) as trainer:
        result = trainer.run_all()
        best = trainer.checkpoints.folders.named("best")
        valid, (test,) = lines_of(trainer.run, "valid")[-1], lines_of(trainer.run, "test")
    assert result.loss == test["loss"] > 0
    assert TrainedStage.of(Manifest.read(trainer.run.folder / best)).number == test["stage"]
    keys = ("loss", "accuracy", "cot_match", "num_items", "mean_tokens", "at", "stage", "epoch")
    assert {key: test[key] for key in keys} == {key: valid[key] for key in keys}


def test_a_step_reads_the_device_and_meets_the_other_ranks_once(tiny_experiment, tmp_path, monkeypatch):
    values = tiny_experiment | CHEAP | {"num_epochs": 1, "save_path": str(tmp_path)}
    with plain_trainer(values) as trainer:
        steps, sums = [], []
        step, reduce = trainer.step, trainer.engine._reduce

        def recorded(record, function):
            return lambda *values: (record.append(values[0]), function(*values))[1]

        monkeypatch.setattr(trainer, "step", recorded(steps, step))
        monkeypatch.setattr(trainer.engine, "_reduce", recorded(sums, reduce))
        trainer.train_epoch(0)
    assert len(steps) == len(sums) > 0
    assert all(isinstance(sent, torch.Tensor) and sent.dtype == torch.float64 for sent in sums)


def test_a_run_that_ends_before_its_last_stage_says_which_stage_is_tested(tiny_experiment, tmp_path, capsys):
    values = tiny_experiment | CHEAP | {"test_path": tiny_experiment["val_path"], "save_path": str(tmp_path)}
    with plain_trainer(values, num_epochs=2) as trainer:
        trainer.run_all()
    printed = capsys.readouterr().out
    assert (
        "num_epochs: 2 ends in stage 1 of 2; the results are of that stage (1 step hidden, 1 latent)"
        in printed
    )
    end = printed.split("test loss")[1]
    assert "tiny: Stage 1 was not learned: 0.0 % (95 % interval" in end.partition("next:")[0]


ONE_EPOCH = CHEAP | {"num_epochs": 1, "max_latent_stage": 1, "eval_max_items": 2}


@pytest.mark.parametrize("kind", ["train", "memory", "valid", "save"])
def test_a_metrics_file_that_cannot_be_written_ends_the_run_with_a_message(
    tiny_experiment, tmp_path, monkeypatch, kind
):
    """For any line, including the last one of the run."""
    with plain_trainer(tiny_experiment | ONE_EPOCH | {"save_path": str(tmp_path)}) as trainer:
        metrics = trainer.run._lines["metrics.jsonl"]
        real = metrics.append

        def full(record):
            if record["kind"] == kind:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(record)

        monkeypatch.setattr(metrics, "append", full)
        with pytest.raises(
            ConfigError, match=r"metrics.jsonl: cannot write here \(No space left on device\)"
        ):
            trainer.run_all()


def test_a_disk_too_small_is_refused_before_the_first_step(tiny_experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(PlainEngine, "expected_bytes", 2**60)
    monkeypatch.setattr(PlainEngine, "step", lambda self: pytest.fail("a step was taken"))
    with plain_trainer(tiny_experiment | ONE_EPOCH | {"save_path": str(tmp_path)}) as trainer:
        with pytest.raises(CheckpointError, match=f"1 checkpoint of {2**40:,} MiB will be on the disk"):
            trainer.run_all()
        assert not list(trainer.run.folder.glob("checkpoint_*"))


def test_a_start_that_is_refused_leaves_the_settings_of_the_run_as_they_were(tiny_experiment, tmp_path):
    values = tiny_experiment | ONE_EPOCH | {"save_path": str(tmp_path)}
    with plain_trainer(values) as trainer:
        trainer.run_all()
        settings = trainer.run.folder / "experiment.yaml"
    written = settings.read_text()
    with plain_trainer(values, lr=0.5) as trainer, pytest.raises(CheckpointError, match="--allow lr"):
        trainer.run_all()
    assert settings.read_text() == written


def test_a_finished_run_is_tested_at_the_stage_it_was_trained_at(tiny_experiment, tmp_path):
    """Started again with a longer stage 0, whose schedule has another stage at the last epoch."""
    values = tiny_experiment | CHEAP | {"num_epochs": 2, "save_path": str(tmp_path)}
    with plain_trainer(values) as trainer:
        trainer.run_all()
    changes = {"epochs_per_stage": 5, "test_path": tiny_experiment["val_path"]}
    with plain_trainer(values, allow=["epochs_per_stage"], **changes) as trainer:
        trainer.run_all()
        (test,) = lines_of(trainer.run, "test")
    assert test["at"] == lines_of(trainer.run, "valid")[-1]["at"] == "1 step hidden, 1 latent"


@pytest.mark.parametrize("schedule, allow", [("constant", ""), ("linear", " --allow num_epochs")])
def test_a_finished_run_says_so_and_how_to_train_on(tiny_experiment, tmp_path, capsys, schedule, allow):
    values = tiny_experiment | ONE_EPOCH | {"save_path": str(tmp_path), "lr_schedule": schedule}
    with plain_trainer(values) as trainer:
        trainer.run_all()
    assert "is finished" not in capsys.readouterr().out
    with plain_trainer(values) as trainer:
        trainer.run_all()
        accuracy, folder = trainer.state.accuracy, trainer.run.folder
    line = next(line for line in capsys.readouterr().out.splitlines() if "is finished" in line)
    assert line == (
        f"{folder} is finished: 1 of 1 epochs, validation accuracy {100 * accuracy:.1f} % "
        f"(0 steps hidden, 0 latents). "
        f"Newest checkpoint: {folder}/latest; best: {folder}/best (checkpoint_1). "
        f"To train on: --set num_epochs=2{allow} (or more)"
    )
    allowed = ["num_epochs"] if allow else []
    with plain_trainer(values, allow=allowed, num_epochs=2) as trainer:
        trainer.run_all()
        assert trainer.state.epoch == 2


def test_a_finished_run_started_again_changes_nothing(tiny_experiment, tmp_path, capsys):
    """No line, settings or test; with another test set it is tested."""
    test = {"test_path": tiny_experiment["val_path"]}
    values = tiny_experiment | ONE_EPOCH | {"save_path": str(tmp_path), **test}
    with plain_trainer(values) as trainer:
        trainer.run_all()
    folder = trainer.run.folder

    def files():
        kept = (path for path in folder.rglob("*") if path.is_file() and "wandb" not in path.parts)
        return {path: path.read_bytes() for path in kept}

    before = files()
    capsys.readouterr()
    with plain_trainer(values) as trainer:
        assert trainer.run_all() is None
        assert files().keys() == before.keys()
    changed = {path.name for path, content in files().items() if content != before[path]}
    assert changed <= {".lock"}
    printed = capsys.readouterr().out
    assert "is finished: 1 of 1 epochs" in printed and "test loss" not in printed
    assert f"report {folder}" in printed.partition("next:")[2]
    other = tiny_experiment["train_path"]
    with plain_trainer(values, allow=["data.test"], test_path=other) as trainer:
        assert trainer.run_all() is not None


EARLY = {
    "epochs_per_stage": 3, "num_epochs": 9, "max_latent_stage": 2, "advance_at": 0.9,
    "early_stopping_patience": 1, "uniform_prob": 0.5,
}  # fmt: skip
ACCURACIES = {0: 0.95, 3: 0.2, 4: 0.1, 5: 0.1, 6: 0.5, 7: 0.4}


def run_with_accuracies(trainer, stop_at=None):
    """Train with given validation accuracies; `stop_at`: fail in the validation of this epoch."""
    validate = trainer.validate

    def given(epoch):
        if epoch == stop_at:
            raise KeyboardInterrupt
        correct = round(100 * ACCURACIES[epoch])
        return replace(validate(epoch), accuracy=ACCURACIES[epoch], num_correct=correct, num_items=100)

    trainer.validate = given
    trainer.run_all()


def test_stages_end_early_and_a_resumed_run_does_the_same(tiny_experiment, tmp_path, capsys):
    values = tiny_experiment | CHEAP | EARLY | {"save_path": str(tmp_path)}
    with plain_trainer(values) as trainer:
        run_with_accuracies(trainer)
        straight = lines_of(trainer.run, "train")
        assert trainer.checkpoints.folders.names()[-1] == "checkpoint_9"
        per_epoch = trainer.layout.num_steps(len(trainer.run_data.train))
        assert trainer.engine.skipped_steps == [2 * per_epoch, per_epoch], "epochs 1 and 2; epoch 8"
    printed = capsys.readouterr().out
    assert sorted({line["epoch"] for line in straight}) == [0, 3, 4, 5, 6, 7]
    assert {line["epoch"]: line["stage"] for line in straight} == {0: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2}
    assert "stage 0 ends early: accuracy 95.0% reached advance_at 0.9" in printed
    assert "stage 2 ends early: no new best in 1 epoch (early_stopping_patience)" in printed
    for stop_at in (4, 7):  # behind a skip; with one epoch that is no new best counted
        with plain_trainer(values, name=f"stopped-{stop_at}") as trainer, pytest.raises(KeyboardInterrupt):
            run_with_accuracies(trainer, stop_at)
        with plain_trainer(values, name=f"stopped-{stop_at}") as trainer:
            run_with_accuracies(trainer)
            resumed = lines_of(trainer.run, "train")
        assert [(line["epoch"], line["loss"]) for line in resumed] == [
            (line["epoch"], line["loss"]) for line in straight
        ]


def test_a_stage_that_was_not_learned_is_named_when_the_next_begins(tiny_experiment, tmp_path, capsys):
    values = tiny_experiment | CHEAP | {"save_path": str(tmp_path), "max_new_tokens": 24}
    with plain_trainer(values, num_epochs=2) as trainer:  # untrained: at chance
        trainer.run_all()
    first, second = capsys.readouterr().out.split("epoch 2/2")
    assert "coconut was not learned" in first
    assert "Stage 1 was not learned" in second and "latent_supervision" in second


def test_answers_cut_at_the_limit_are_named_in_place_of_more_training(tiny_experiment, tmp_path, capsys):
    """In the line of each validation and in the verdict, with a limit that the correct answers fit."""
    values = tiny_experiment | CHEAP | {"save_path": str(tmp_path), "max_new_tokens": 1}
    with plain_trainer(values, num_epochs=1) as trainer:
        trainer.run_all()
        (line,) = lines_of(trainer.run, "valid")
        texts = ["\n".join([*p.steps, f"### {p.answer}"]) for p in trainer.run_data.valid.problems]
        tokenizer = trainer.run_data.vocabulary.tokenizer
    longest = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    assert (line["num_cut"], line["max_new_tokens"], line["longest_answer"]) == (6, 1, longest)
    validated, *_, verdict = re.findall(".*6 of 6 answers are wrong and were cut .*", capsys.readouterr().out)
    enough = int(re.search(r"write max_new_tokens: (\d+)", validated)[1])
    assert longest < enough <= longest + 8
    assert "coconut was not learned" in verdict and f"write max_new_tokens: {enough}" in verdict
    assert "Try more epochs" not in verdict


@pytest.mark.parametrize(
    ("losses", "is_said"),
    [([0.27, 0.26, 0.25, 0.19, 0.17], False), ([0.27, 0.18, 0.171, 0.172, 0.170], True)],
)
def test_a_stage_whose_loss_still_falls_is_not_called_unlearned(
    losses, is_said, tiny_experiment, tmp_path, capsys
):
    """As the first stage of the quickstart, which the next one completes."""
    values = tiny_experiment | CHEAP | {"save_path": str(tmp_path), "epochs_per_stage": 5}
    with plain_trainer(values, num_epochs=10) as trainer:
        trainer.run.write_settings()
        for epoch, loss in enumerate(losses):
            result = Evaluation(loss, 0.1, 0.0, 100, 10, 5.0, (), "exact", chance=0.1)
            trainer.log(
                "valid", epoch, stage=0, at=str(stage_at(epoch, trainer.experiment)), **result.numbers()
            )
            trainer.end_epoch(epoch, result)
    assert ("coconut was not learned" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("stage, trains, is_refused", [(3, True, True), (2, True, False), (3, False, False)])
def test_experts_are_not_trained_under_zero_3(monkeypatch, stage, trains, is_refused):
    experts = torch.nn.Linear(2, 2)
    experts.gate = torch.nn.Parameter(torch.zeros(4, 2, 2), requires_grad=trains)
    monkeypatch.setattr(trainer, "build_module", lambda *_: SimpleNamespace(base=experts))
    ds_config = SimpleNamespace(zero_stage=stage, path="z.json", latent_memory=None)
    run_data = SimpleNamespace(vocabulary=None)
    with pytest.raises(ConfigError, match="mixture of experts") if is_refused else nullcontext():
        assert trainer._module(None, ds_config, run_data).base is experts
