"""Numbers that JSON lacks: written as null everywhere, and read back from null and from old Infinity."""

import ast
import json
import math
from pathlib import Path

import pytest

from coconut_ds.__main__ import main
from coconut_ds.config.experiment import experiment_to_yaml, validate_experiment
from coconut_ds.data.curriculum import Stage
from coconut_ds.engine.watchdog import write_batches
from coconut_ds.evaluation.evaluate import Evaluation
from coconut_ds.evaluation.measure import Measurement, write_results
from coconut_ds.files import json_text
from coconut_ds.reports.comparison import group_runs
from coconut_ds.reports.figures import draw_window_weights, loss_picture, smoothed, window_picture
from coconut_ds.reports.run_records import read_run
from coconut_ds.runs.run_folder import Run

PACKAGE = Path(__file__).parents[1] / "coconut_ds"
# json.dumps of text or settings: cache keys, digests, --set values, messages, YAML strings.
OTHERS = {
    "files.py",
    "data/tokenizer.py",
    "runs/checkpoint_folders.py",
    "training/sweep.py",
    "evaluation/model_card.py",
}
VALUES = {
    "name": "run", "model_id": "gpt2", "method": "coconut", "num_epochs": 2, "epochs_per_stage": 1,
    "train_path": "t_train.json", "val_path": "t_valid.json",
}  # fmt: skip
BAD = (math.inf, -math.inf, math.nan)


def strict(text):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_text_is_json():
    value = {"a": [1.5, *BAD], "b": {"c": (math.inf, "Infinity")}, "d": None, "e": 3, "f": True}
    expected = {"a": [1.5, None, None, None], "b": {"c": [None, "Infinity"]}, "d": None, "e": 3, "f": True}
    assert strict(json_text(value)) == expected
    assert json_text({"b": 1, "a": "é"}, sort_keys=True, ensure_ascii=False) == '{"a": "é", "b": 1}'


def test_the_package_writes_json_by_that_function_alone():
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        found = [node for node in calls if ast.unparse(node) in ("json.dumps", "json.dump")]
        assert not found or str(path.relative_to(PACKAGE)) in OTHERS, path


@pytest.mark.parametrize("bad", BAD)
def test_the_line_of_a_skipped_step_is_json(tmp_path, bad):
    experiment = validate_experiment(VALUES | {"save_path": str(tmp_path)}, "test")
    with Run(experiment, {"fp16": {"enabled": True}}) as run:
        run.log("train", step=1, epoch=0, loss=1.0, gradient_norm=bad, loss_scale=65536.0)
        run.log("valid", step=1, epoch=0, loss=bad, window_weights=[bad, 1.0])
        run.sample(kind="valid", loss=bad)
    train, valid = map(strict, (run.folder / "metrics.jsonl").read_text().splitlines())
    assert train["gradient_norm"] is None and train["loss_scale"] == 65536.0
    assert valid["loss"] is None and valid["window_weights"] == [None, 1.0]
    assert strict((run.folder / "samples.jsonl").read_text())["loss"] is None


@pytest.mark.parametrize("written", ["null", "NaN", "Infinity"])
def test_pictures_of_window_weights_have_gaps(tmp_path, written):
    experiment = validate_experiment(
        VALUES | {"save_path": str(tmp_path), "thought": "learnable_window"}, "t"
    )
    (tmp_path / "experiment.yaml").write_text(experiment_to_yaml(experiment))
    line = (
        '{{"kind": "valid", "epoch": {}, "stage": 0, "num_items": 4, "num_correct": 2, "accuracy": 0.5, '
        '"mean_tokens": 2.0, "window_weights": [{}, 0.5, 0.25]}}\n'
    )
    (tmp_path / "metrics.jsonl").write_text(line.format(0, written) + line.format(1, 0.25))
    assert draw_window_weights(tmp_path).is_file()
    figure = window_picture(read_run(tmp_path))
    figure.canvas.draw()
    assert math.isnan(float(figure.axes[0].lines[0].get_ydata(orig=False)[0])) or written == "Infinity"


def test_evaluations_and_diverged_batches_are_json(tmp_path):
    evaluation = Evaluation(math.nan, 0.0, 0.0, 0, 0, 0.0, (), "exact")
    write_results(Measurement("checkpoint_1", "test", Stage(3, 6), None, evaluation), tmp_path)
    assert strict((tmp_path / "evaluations.jsonl").read_text())["loss"] is None
    write_batches(tmp_path / "batches.json", [], [])
    assert strict((tmp_path / "batches.json").read_text()) == []


@pytest.mark.parametrize("written", ["null", "NaN", "Infinity", "-Infinity"])
def test_readers_take_null_and_old_infinity(tmp_path, written, capsys):
    experiment = validate_experiment(VALUES | {"save_path": str(tmp_path)}, "test")
    (tmp_path / "experiment.yaml").write_text(experiment_to_yaml(experiment))
    numbers = '"num_items": 10, "num_correct": 5, "accuracy": 0.5, "cot_match": 0.0, "mean_tokens": 2.0'
    lines = []
    for epoch, loss in enumerate((written, "1.5")):
        head = f'"time": {epoch}, "epoch": {epoch}, "stage": {epoch}, "step": {epoch + 1}, "loss": {loss}'
        lines.append(f'{{"kind": "train", {head}, "gradient_norm": {written}}}')
        lines.append(f'{{"kind": "valid", {head}, {numbers}}}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(tmp_path)
    assert math.isnan(run.of("train")[0]["loss"]) and math.isnan(run.of("train")[1]["gradient_norm"])
    assert smoothed(run, "loss") == ([2.5], [1.5])
    assert loss_picture(group_runs([run])) is not None
    assert main(["report", str(tmp_path), "--no-page"]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--json"]) == 0
    strict(capsys.readouterr().out)
