"""The figure of the window weights is drawn from the validation lines of a run."""

import json

import pytest

from coconut_ds.config.experiment import experiment_to_yaml, validate_experiment
from coconut_ds.reports.comparison import group_runs
from coconut_ds.reports.figures import draw_window_weights, loss_picture, window_picture
from coconut_ds.reports.run_records import read_run

SETTINGS = {
    "name": "r", "model_id": "gpt2", "train_path": "t.json", "val_path": "v.json", "method": "coconut",
    "c_thought": 1, "epochs_per_stage": [1, 2], "max_latent_stage": 1, "num_epochs": 3,
    "thought": "learnable_window", "latent_window_size": 2,
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def folder_with(lines):
        (tmp_path / "experiment.yaml").write_text(experiment_to_yaml(validate_experiment(SETTINGS, "test")))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path

    return folder_with


def valid(epoch, weights):
    measured = {"num_items": 4, "num_correct": 1, "accuracy": 0.25, "mean_tokens": 2.0}
    return {"kind": "valid", "epoch": epoch, **measured, "window_weights": weights}


def test_one_line_per_state_newest_first_and_a_later_line_of_an_epoch_counts(write):
    lines = [valid(0, [1.0, 0.0]), valid(1, [0.5, 0.5]), {"kind": "train", "loss": 1.0}]
    folder = write([*lines, valid(1, [0.8, 0.2]), valid(2, [0.7, 0.3])])
    assert draw_window_weights(folder).read_bytes().startswith(b"\x89PNG")
    (axes,) = window_picture(read_run(folder)).axes
    curves = {line.get_label(): line for line in axes.get_lines()}
    assert list(curves["newest state"].get_ydata()) == [1.0, 0.8, 0.7]
    assert list(curves["1 before"].get_ydata()) == [0.0, 0.2, 0.3]
    assert list(curves["1 before"].get_xdata()) == [1, 2, 3]
    assert [text.get_text() for text in axes.texts] == ["0", "stage 1"]


def test_no_figure_without_a_window(write):
    folder = write([{"kind": "valid", "epoch": 0, "stage": 0, "loss": 1.0}])
    assert draw_window_weights(folder) is None
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize("losses", [[2.0, 0.1, 0.003], [0.3, 0.25, 0.22]])
def test_the_axis_of_losses_has_plain_numbers(write, losses):
    """Formulas are off, since names of runs are drawn as they are."""
    lines = [valid(epoch, None) | {"loss": loss} for epoch, loss in enumerate(losses)]
    for step, loss in enumerate(losses, 1):
        at = {"time": step, "step": step, "epoch": step - 1, "stage": 0}
        lines.append({"kind": "train", **at, "loss": loss, "gradient_norm": 1.0})
    figure = loss_picture(group_runs([read_run(write(lines))]))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels(which="both")]
    assert any(labels) and not any("$" in label for label in labels)
