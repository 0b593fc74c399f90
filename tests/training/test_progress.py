"""What a training run prints: start, progress with and without a terminal, warnings, results and commands."""

import io
import random
import shlex
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from coconut_ds.__main__ import main
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.batching import BatchConfig, num_samples_and_tokens, training_steps
from coconut_ds.data.run_data import load_run_data
from coconut_ds.files import duration
from coconut_ds.model.loading import load_config
from coconut_ds.training.progress import LossTrend, Progress, model_line, start_lines
from tests.plain_engine import plain_trainer
from tests.training.test_trainer import CHEAP, lines_of


def warnings_of(losses, stage=lambda step: 0):
    trend = LossTrend(lr=1e-3)
    said = ((step, trend.add(stage(step), loss)) for step, loss in enumerate(losses, 1))
    return [(step, text) for step, text in said if text]


def noisy(values):
    draw = random.Random(1)
    return [value * draw.uniform(0.8, 1.25) for value in values]


FALLS = [3.5 * 0.97**step for step in range(100)]


@pytest.mark.parametrize("high", [1.6, 11.0])
def test_a_diverging_loss_is_named_once_within_a_hundred_steps(high):
    ((step, text),) = warnings_of(noisy([*FALLS, *[0.3] * 100, *[high] * 300]))
    assert 200 < step <= 325
    assert "the loss diverges" in text and text.endswith("--checkpoint best --set lr=0.0003 --allow lr")


@pytest.mark.parametrize(
    "losses",
    [
        [*FALLS, *[0.3] * 400],  # a plateau
        [*FALLS, *[0.3] * 100, *[9.0] * 60, *[0.3] * 100],  # a spike that ends
        [*[0.0008] * 200, *[0.4] * 300],  # small numbers
        [2.5 - step / 1000 for step in range(600)],
    ],
    ids=["plateau", "spike", "small", "slow"],
)
def test_no_false_warning(losses):
    assert warnings_of(noisy(losses)) == []


def test_the_higher_loss_of_a_new_stage_is_no_divergence():
    assert warnings_of([*FALLS, *[0.1] * 200, *[3.0] * 400], stage=lambda step: step // 301) == []


def test_a_loss_that_does_not_fall_from_the_start_is_named():
    ((step, text),) = warnings_of(noisy([2.5] * 1000))
    assert step == 300 and "the loss has not fallen in 300 steps" in text and "--set lr=0.01" in text
    assert warnings_of([2.5] * 1000, stage=lambda step: step // 200) == []  # only the whole start


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3570, "1 h 0 min"), (13_200, "3 h 40 min"),
     (187_200, "2 d 4 h")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


NUMBERS = {"loss": 0.25, "lr": 1e-4, "tokens_per_s": 5120.4, "supervised_tokens_per_s": 1804.0}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run_steps(experiment, num_steps, seconds=4.0):
    clock = Clock()
    progress = Progress(experiment, 100, True, lambda: "peak 529 MiB RSS", clock)
    for epoch in range(2):
        with progress.epoch(epoch, 0, 100):
            for step in range(num_steps):
                clock.now += seconds
                progress.step(100 * epoch + step + 1, NUMBERS)
        clock.now += 100.0  # validation
    return progress


def test_without_a_terminal_there_is_a_line_every_thirty_seconds(tiny_experiment, capsys):
    experiment = validate_experiment(tiny_experiment | {"num_epochs": 4, "epochs_per_stage": 1}, "test")
    run_steps(experiment, 100)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("step")]
    assert not err
    assert len(lines) == 2 * 400 // 32 and "step 8  epoch 1/4 (8 of 100)  stage 0" in lines[0]
    assert lines[0].endswith(
        "loss 0.25  5,120 tokens/s (1,804 supervised)  peak 529 MiB RSS  epoch ends in 6 min, run in 26 min"
    )
    # Three steps, two epochs and three validations of 100 s are left.
    last = lines[-1].partition("epoch ")[2]
    assert last.startswith("2/4") and last.endswith(f"run in {duration(4 * 3 + 800 + 300)}")
    assert "expected end: " in out and "(in 25 min)" in out


def test_tokens_per_second_are_those_of_all_recent_steps(tiny_experiment, capsys):
    clock = Clock()
    progress = Progress(validate_experiment(tiny_experiment, "test"), 9, True, str, clock)
    with progress.epoch(0, 0, 9):
        for step, speed in enumerate((1000.0, 1000.0, 10.0)):  # the third step is slow
            clock.now += 11
            progress.step(step, NUMBERS | {"tokens_per_s": speed, "supervised_tokens_per_s": speed / 2})
    assert "29 tokens/s (15 supervised)" in capsys.readouterr().out


def test_on_a_terminal_there_is_a_bar(tiny_experiment, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    class Eager(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, mininterval=0, **kwargs)

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr("coconut_ds.training.progress.tqdm", Eager)
    run_steps(validate_experiment(tiny_experiment | {"num_epochs": 4}, "test"), 3)
    assert "epoch 1/4  stage 0 |" in terminal.getvalue()
    assert "3/100, 6 min left, run 26 min, loss 0.25, peak 529 MiB RSS, 5,120" in terminal.getvalue()
    assert capsys.readouterr().out == ""
    terminal.truncate(0)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as a notebook does
    run_steps(validate_experiment(tiny_experiment | {"num_epochs": 4}, "test"), 8)
    assert terminal.getvalue() == "" and "step 8  epoch 1/4 (8 of 100)" in capsys.readouterr().out


def test_other_ranks_print_nothing(tiny_experiment, capsys):
    progress = Progress(validate_experiment(tiny_experiment, "test"), 9, False, str, Clock())
    with progress.epoch(0, 0, 9):
        progress.step(1, NUMBERS)
    progress.print_line("a line")
    assert list(progress.batches([1, 2], "loss", 2)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_tokens_are_those_of_all_real_rows(tiny_experiment, tmp_path):
    """With a filler row, over two ranks, and in the log."""
    values = tiny_experiment | CHEAP | {"num_epochs": 1, "save_path": str(tmp_path)}
    with plain_trainer(values) as trainer:
        experiment, data = trainer.experiment, trainer.run_data
        problems = [data.train[index] for index in range(5)]
        ranks = [
            next(iter(training_steps(problems, 0, experiment, data.vocabulary, BatchConfig(3, 1, 2, rank))))[
                0
            ]
            for rank in (0, 1)
        ]
        counts = [num_samples_and_tokens(batch) for batch in ranks]
        alone = training_steps(problems, 0, experiment, data.vocabulary, BatchConfig(5, 1, 1, 0))
        assert any(-1 in batch.indices for batch in ranks)
        assert (5, sum(tokens for _, tokens in counts)) == num_samples_and_tokens(next(alone)[0])
        assert sum(rows for rows, _ in counts) == 5
        trainer.run_all()
        logged = lines_of(trainer.run, "train")
        (batch,), *_ = training_steps(data.train, 0, experiment, data.vocabulary, trainer.layout)
    line = logged[0]
    _, tokens = num_samples_and_tokens(batch)
    assert line["tokens_per_s"] * line["step_seconds"] == pytest.approx(tokens)
    assert line["supervised_tokens_per_s"] * line["step_seconds"] == pytest.approx(batch.loss_denominator)


def test_a_run_ends_with_its_results_and_commands_that_work(tiny_experiment, tmp_path, capsys):
    values = tiny_experiment | CHEAP | {"num_epochs": 2, "save_path": str(tmp_path), "name": "my run"}
    with plain_trainer(values) as trainer:
        trainer.run_all()
        folder = trainer.run.folder
    start, end = capsys.readouterr().out.split("epoch 1/2", 1)
    assert "parameters, all trained" in start and "\nstart     epoch 1 of 2\n" in start
    end, _, commands = end.partition("next:\n")
    assert "\ncoconut: stage 0 0.0 %, stage 1 " in end
    evaluate, report, generate = (shlex.split(line) for line in commands.splitlines())
    assert evaluate[3:] == ["eval", str(folder), "--split", "valid", "--ablate", "all"]
    assert Path(generate[4]) == folder and generate[5] == "--prompt"
    assert main([*report[3:], "--no-page"]) == 0


def test_trained_parameters_are_counted_beside_frozen_ones(tiny_experiment):
    with plain_trainer(tiny_experiment | {"debug": True}) as trainer:
        model, experiment = trainer.engine.module, trainer.experiment
        sizes = [parameter.numel() for parameter in model.parameters()]
        next(model.parameters()).requires_grad_(False)
        text = model_line(experiment, model)
    assert text == f"{experiment.model_id}: {sum(sizes):,} parameters, {sum(sizes[1:]):,} trained"


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_start_says_when_the_config_is_for_another_number_of_gpus(tiny_experiment, ranks):
    experiment = validate_experiment(tiny_experiment | {"batch_size_training": 4}, "test")
    run_data = load_run_data(experiment, load_config(experiment.model_id))
    plan = {"verdict": "fits", "budget": {"gpus": 2}}
    lines = start_lines(experiment, run_data, Path("runs/x"), ["cpu"] * ranks, plan)
    says = "ranks     1 x cpu; the DeepSpeed config is for 2, which take 8 rows a step" in lines
    assert says is (ranks == 1) and f"of {4 * ranks} rows per epoch" in lines
