"""Train a grid of experiments one after another, and print one table of the results.

    python -m coconut_ds sweep CONFIG --deepspeed_config JSON --grid seed=0,1,2 --grid method=coconut,cot
    python -m coconut_ds sweep CONFIG --deepspeed_config JSON --seeds 0-19     how many seeds learn it
    python -m coconut_ds sweep GRID.yaml

GRID.yaml:  config: CONFIG            deepspeed_config: JSON          set: [num_epochs=10]
            grid: {method: [coconut, cot], seed: [0, 1, 2], deepspeed_config: [A.json, B.json]}

Runs are named after CONFIG and their grid values.  Finished runs are skipped, so run the same command again
to resume.  If a run fails, the sweep reports it and continues with the next.  The output of a run is in
RUN/sweep.log.  Exit code 0: all runs finished; 1: at least one failed; 75: stopped.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from coconut_ds.config.deepspeed import add_ds_config_argument
from coconut_ds.config.experiment import add_overrides
from coconut_ds.config.schema import read_yaml
from coconut_ds.errors import ConfigError, StopRequested
from coconut_ds.reports.comparison import group_runs, stage_table, summary_table
from coconut_ds.reports.conclusions import conclusions
from coconut_ds.reports.pairing import pair
from coconut_ds.reports.run_records import read_run
from coconut_ds.training.sweep import (
    FAILED,
    FINISHED,
    SKIPPED,
    STOPPED,
    Outcome,
    Point,
    launch_command,
    parse_axes,
    parse_seeds,
    points,
    read_grid,
    run_all,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG|GRID.yaml", help="experiment YAML, or a grid file")
    add_ds_config_argument(parser)
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="values of one setting; can be repeated",
    )
    parser.add_argument("--seeds", metavar="A-B,C", help="seeds of every run: 0-19 or 1,2,7")
    add_overrides(parser, "of every run")
    parser.add_argument("--name", metavar="NAME", help="prefix of the run names (default: CONFIG's name)")
    parser.add_argument(
        "--num_gpus", type=int, metavar="N", help="GPUs per run (default: all, or 2 processes on the CPU)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands without running them")


def run(args: argparse.Namespace) -> int:
    grid = _grid(args)
    num_gpus = args.num_gpus or _num_gpus()
    if args.dry_run:
        for point in grid:
            state = "already finished: " if point.is_finished() else ""
            print(state + " ".join(launch_command(point, num_gpus)))
        return 0
    outcomes = run_all(grid, num_gpus, lambda line: print(line, flush=True))
    print(summary(outcomes))
    if any(outcome.state == STOPPED for outcome in outcomes):
        return StopRequested.exit_code
    return int(any(outcome.state == FAILED for outcome in outcomes))


def _grid(args: argparse.Namespace) -> list[Point]:
    overrides = list(args.overrides)
    if "grid" in read_yaml(args.config):
        values = read_grid(args.config)
        axes = _axes(args, values["grid"])
        overrides = [*map(str, values.get("set") or ()), *overrides]
        ds_config = args.deepspeed_config or values.get("deepspeed_config")
        name = args.name or values.get("name")
        return points(values["config"], ds_config, overrides, axes, name, args.ds_overrides)
    if not args.grid and not args.seeds:
        raise ConfigError(
            f"sweep: {args.config} is a single experiment; add --grid KEY=VALUE,VALUE,... or --seeds 0-19"
        )
    axes = _axes(args, {})
    return points(args.config, args.deepspeed_config, overrides, axes, args.name, args.ds_overrides)


def _axes(args: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    axes = {**given, **parse_axes(args.grid)}
    if args.seeds and "seed" in axes:
        raise ConfigError(f"--seeds {args.seeds}: the grid has 'seed' too; keep one of the two")
    return axes | ({"seed": parse_seeds(args.seeds)} if args.seeds else {})


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() or 2


def summary(outcomes: list[Outcome]) -> str:
    """Tables of the finished runs, and one line for each of the others."""
    done = [outcome.point for outcome in outcomes if outcome.state in (FINISHED, SKIPPED)]
    parts = []
    if done:
        groups = group_runs([read_run(point.folder) for point in done])
        parts += ["", stage_table(groups).text(), "", summary_table(groups).text(), ""]
        parts += [*conclusions(groups), *pair(groups).lines()]
    parts += [
        f"{outcome.state}: {outcome.point.experiment.name}: {outcome.message}"
        for outcome in outcomes
        if outcome.state in (FAILED, STOPPED)
    ]
    parts.append(f"{len(done)} of {len(outcomes)} runs finished")
    return "\n".join(parts)
