"""Run folders made without training."""

import json

import pytest

from coconut_ds.config.experiment import experiment_to_yaml, validate_experiment
from coconut_ds.reports.run_records import read_run

BASE = {"model_id": "gpt2", "train_path": "t_train.json", "val_path": "t_valid.json", "num_epochs": 3}
STAGED = {"c_thought": 2, "epochs_per_stage": 1, "max_latent_stage": 2}
DS_CONFIG = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "fp16": {"enabled": True},
}
PLAN = {
    "budget": {
        "device": "card", "gpus": 2, "gpu_memory_mib": 11264, "reserved_mib": 800, "host_memory_gib": 32,
        "components_mib": {"activations": 6000}, "on_exceed": "error",
    },
    "fits": True, "verdict": "fits", "states": [], "host_per_rank": [], "phases": [],
    "stages": [{"first_epoch": 0, "gpu_mib": 100.0}],
}  # fmt: skip


def validation(epoch, correct, **more):
    numbers = {"num_correct": correct, "num_items": 100, "accuracy": correct / 100, "mean_tokens": 2.0}
    numbers |= {"loss": 1.0, "cot_match": 0.0, "stage": epoch}
    return {"kind": "valid", "time": 10.0 * epoch, "epoch": epoch, **numbers, **more}


@pytest.fixture
def make_run(tmp_path):
    """A run folder with `correct[epoch]` of 100 items right, and `test` of its test items."""

    def make(name, correct, test=None, old=False, chance=None, logged=(), test_at="as logged", **settings):
        folder = tmp_path / name
        (folder / "memory").mkdir(parents=True)
        experiment = validate_experiment(
            {**BASE, "name": name, "save_path": str(tmp_path), **settings}, "test"
        )
        (folder / "experiment.yaml").write_text(experiment_to_yaml(experiment))
        (folder / "ds_config.json").write_text(json.dumps(DS_CONFIG))
        (folder / "memory" / "plan.json").write_text(json.dumps(PLAN))
        lines = []
        for epoch, number in enumerate(correct):
            times = [100.0 * epoch + 2 * step for step in range(5)]
            lines += [
                {"kind": "train", "time": time, "epoch": epoch, "loss": 1.0, "step": 1} for time in times
            ]
            lines.append({"kind": "memory", "epoch": epoch, "gpu_allocated_peak_mib": 100.0 * (epoch + 1)})
            more = logged[epoch] if logged else {}
            lines.append(validation(epoch, number, **more, **({} if chance is None else {"chance": chance})))
        if test is not None:
            at = {} if old else {"at": test_at}
            lines.append({**validation(len(correct) - 1, test, **at), "kind": "test"})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "ti')
        return read_run(folder)

    return make


def add_answers(folder, correct, **key):
    """Append what `eval` writes to predictions.jsonl; `key`: fields to change, None to leave one out."""
    whole = {"checkpoint": "checkpoint_3", "split": "test", "latents": 4, "ablation": "intact"}
    whole |= {"examples": "e0", "grading": "exact", "file": "t_test.json"} | key
    kept = {name: value for name, value in whole.items() if value is not None}
    lines = [{**kept, "index": i, "correct": c, "expected": str(i)} for i, c in enumerate(correct)]
    lines.append({**kept, "ablation": "zero", "index": 0, "correct": not correct[0]})
    with open(folder / "predictions.jsonl", "a") as writer:
        writer.write("".join(json.dumps(line) + "\n" for line in lines))
