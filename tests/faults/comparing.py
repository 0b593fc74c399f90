"""Whether two runs came to the same numbers, to the last bit."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMES = {
    "time", "step_seconds", "tokens_per_s", "supervised_tokens_per_s", "seconds_per_item",
    "host_rss_peak_mib",
}  # fmt: skip
COMPARED = ("train", "valid", "test")  # not what a process measured of itself: memory, saving


@dataclass(frozen=True)
class Numbers:
    """Everything a run learned and said; equal for runs that did the same."""

    logged: list[dict[str, Any]]  # without times
    samples: list[dict[str, Any]]
    weights: dict[str, list[float]]
    optimizer: list[Any]  # of every rank


def numbers_of(run_folder: Path) -> Numbers:
    newest = run_folder / (run_folder / "latest").read_text().strip()
    return Numbers(
        [_without_times(line) for line in _lines(run_folder / "metrics.jsonl") if line["kind"] in COMPARED],
        _lines(run_folder / "samples.jsonl"),
        {name: value.tolist() for name, value in load_file(newest / "model/model.safetensors").items()},
        [
            _plain(torch.load(path, weights_only=False))
            for path in sorted(newest.glob("engine/*optim_states.pt"))
        ],
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMES}


def _plain(value: Any) -> Any:
    """Tensors as lists, so that == compares every number."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "ds_config"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str | bool | None) else type(value).__name__
