"""benchmarks/quantized.py sees a resumed run that differs in one digit or one bit, and its table says so."""

import json

import pytest

from benchmarks.memory_sections import quantized_text
from benchmarks.quantized import are_equal

LINES = [
    {"kind": "train", "step": step, "loss": 1 / step, "gradient_norm": 0.3, "step_seconds": 1.0}
    for step in (1, 2, 3)
]


def a_run(folder, lines, weights=b"01", seconds=1.0):
    (folder / "checkpoint_2" / "model").mkdir(parents=True)
    (folder / "checkpoint_2" / "model" / "model.safetensors").write_bytes(weights)
    lines = [{**line, "step_seconds": seconds} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    "change, equal",
    [
        ({"seconds": 7.0}, True),
        ({"weights": b"11"}, False),
        ({"lines": LINES[:2]}, False),
        ({"lines": [*LINES[:2], {**LINES[2], "loss": 1 / 3 + 1e-16}]}, False),
        ({"lines": [*LINES[:2], {**LINES[2], "gradient_norm": 0.30000000000000004}]}, False),
    ],
)
def test_runs_are_equal_to_the_last_digit_or_not(tmp_path, change, equal):
    straight = a_run(tmp_path / "straight", LINES)
    assert are_equal(straight, a_run(tmp_path / "killed", **{"lines": LINES, **change})) is equal


def test_the_table_names_a_different_run():
    row = {
        "model": "tiny Llama", "kind": "QLoRA", "ranks": 2, "steps": 20, "steps_after_resume": 8,
        "equal": True, "first_loss": 3.0, "last_loss": 2.5, "step_seconds": 0.3, "adapter_difference": 2e-6,
        "merged_difference": 0.0, "largest_logit": 11.7, "planned_and_measured_mib": {"total": [99.0, 100.0]},
    }  # fmt: skip
    text = quantized_text({"records": [row, {**row, "equal": False}]})
    assert "| equal, 8 of 20 steps |" in text and "| DIFFERENT, 8 of 20 steps |" in text
    assert "tiny Llama, QLoRA, two ranks" in text and "| 2e-06, 0 of 12 | 99.0 | 100.0 | -1.0 % |" in text
