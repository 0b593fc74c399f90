"""Every method, and every thought with full and with LoRA tuning, on the quickstart's task.

    python -m benchmarks.variants               17 runs a seed, seeds 0 and 1; about an hour on two cores
    python -m benchmarks.variants --dry-run     their commands

The quickstart's recipe with the paper's loss throughout, each run one process.  LoRA runs start from the CoT
run of their seed, as LoRA needs a model that knows the task's words.  Finished runs are skipped, so the same
command resumes; after every run benchmarks/results/variants.json is written again.

Knows: the grid.  Does not know: how a run is started (coconut_ds/training/sweep.py) or trained.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from coconut_ds.config.methods import Method, registered
from coconut_ds.reports.run_records import RunRecord, read_run
from coconut_ds.training.sweep import Point, launch_command, points, run_all

CONFIG = "configs/quickstart/plain.yaml"
DS_CONFIG = "ds_configs/zero2_offload.json"
ROWS = 64  # the quickstart's two ranks of 32
NO_TEXT = "pause"  # the pause thought belongs to the methods of that name


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    label: str
    settings: tuple[str, ...]


def stages_of(run: RunRecord) -> dict[str, float]:
    """Validation accuracy at the end of every stage."""
    return {str(line["stage"]): line["accuracy"] for line in run.of("valid")}


def test_of(run: RunRecord) -> float | None:
    """Test accuracy, None before the run is over."""
    tests = run.of("test")
    return tests[-1]["accuracy"] if tests else None


def variants() -> Iterator[Variant]:
    """CoT first: LoRA starts from it."""
    for method in sorted(Method, key=lambda method: method is not Method.COT):
        # Token by token, as in its own paper; by whole steps it would be no_thoughts over again.
        extra = ("icot_tokens_per_epoch=1",) if method is Method.ICOT else ()
        yield Variant(f"method {method.value}", (f"method={method.value}", *extra))
    for thought in registered("thoughts"):
        if thought not in (NO_TEXT, "last_hidden"):
            yield Variant(f"thought {thought}, full", ("method=coconut", f"thought={thought}"))
    for thought in registered("thoughts"):
        if thought != NO_TEXT:
            settings = ("method=coconut", f"thought={thought}", "tuning=lora", "lora_r=32", "lora_alpha=64")
            yield Variant(f"thought {thought}, LoRA", settings)


def point_of(
    variant: Variant,
    seed: int,
    folder: Path,
    extra: list[str],
    config: str = CONFIG,
    name: str | None = None,
) -> Point:
    """The run of one variant and seed."""
    data = folder / f"data{seed}"
    name = name or f"{'-'.join(word.partition('=')[2] for word in variant.settings[:3])}-seed{seed}"
    settings = [
        f"save_path={folder}", f"name={name}", f"seed={seed}", f"batch_size_training={ROWS}",
        f"model_id={data}/gpt2", f"train_path={data}/arithmetic_train.json",
        f"val_path={data}/arithmetic_valid.json", f"test_path={data}/arithmetic_test.json",
        "coconut=false", *variant.settings, *extra,
    ]  # fmt: skip
    if "tuning=lora" in variant.settings:
        cot = point_of(next(variants()), seed, folder, extra)
        settings.append(f"load_model_path={cot.folder}/checkpoint_{cot.experiment.num_epochs}")
    (point,) = points(config, DS_CONFIG, settings, {}, name)
    return point


def make_data(seed: int, folder: Path) -> None:
    data = folder / f"data{seed}"
    if not (data / "gpt2" / "config.json").is_file():
        command = [sys.executable, "preprocessing/arithmetic.py", "--seed", str(seed)]
        command += ["--output-dir", str(data), "--model-dir", str(data / "gpt2")]
        subprocess.run(command, cwd=record.ROOT, check=True)


def collect(grid: list[tuple[Variant, int, Point]]) -> list[dict[str, Any]]:
    """Results of the runs that are finished."""
    found = []
    for variant, seed, point in grid:
        if point.is_finished():
            run = read_run(point.folder)
            result = {"label": variant.label, "seed": seed, "test": test_of(run), "stages": stages_of(run)}
            found.append(result)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--folder", type=Path, default=Path("runs/variants"))
    parser.add_argument("--set", dest="extra", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", help="variants whose label contains this text")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    chosen = [variant for variant in variants() if args.only is None or args.only in variant.label]
    grid = [
        (variant, seed, point_of(variant, seed, args.folder, args.extra))
        for seed in args.seeds
        for variant in chosen
    ]
    if args.dry_run:
        for _, _, point in grid:
            print(shlex.join(launch_command(point, 1)))
        return
    os.environ.setdefault("WANDB_MODE", "disabled")
    for seed in args.seeds:
        make_data(seed, args.folder)
    failed = []
    for _, _, point in grid:
        (outcome,) = run_all([point], 1, lambda line: print(line, flush=True))
        if outcome.state == "stopped":
            break
        if outcome.state == "failed":
            failed.append(point.experiment.name)
        record.write("variants", "python -m benchmarks.variants", collect(grid), args.results)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see sweep.log in their folders")


if __name__ == "__main__":
    main()
