"""Train a grid of experiments one after another, go on where it was, and print one table at the end.

    python -m coconut_ds sweep CONFIG --deepspeed_config JSON --grid seed=0,1,2 --grid method=coconut,cot
    python -m coconut_ds sweep GRID.yaml

GRID.yaml:  config: CONFIG            deepspeed_config: JSON          set: [num_epochs=10]
            grid: {method: [coconut, cot], seed: [0, 1, 2], deepspeed_config: [A.json, B.json]}

Runs are named after CONFIG and the grid's values. Finished runs are skipped, so the same command goes on
after an interruption; a failed run is reported and the others go on. What a run printed: RUN/sweep.log.
Exit code 0: all are finished; 1: one failed; 75: it was stopped.
"""

import argparse

from coconut_ds.config.arguments import DS_CONFIG_FLAGS, add_overrides
from coconut_ds.config.schemas.parsing import read_yaml
from coconut_ds.errors import ConfigError, StopRequested
from coconut_ds.reports.comparison import group_runs, paired_tests, stage_table, summary_table
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
    points,
    read_grid,
    run_all,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG|GRID.yaml", help="experiment YAML, or a grid file")
    parser.add_argument(*DS_CONFIG_FLAGS, metavar="JSON", help="how memory is split")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="values of one setting; may be given again",
    )
    add_overrides(parser, "of every run")
    parser.add_argument(
        "--name", metavar="NAME", help="what the runs' names begin with (default: CONFIG's name)"
    )
    parser.add_argument(
        "--num_gpus", type=int, metavar="N", help="ranks of every run (default: all GPUs, or 2)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and train nothing")


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
        axes = {**values["grid"], **parse_axes(args.grid)}
        overrides = [*map(str, values.get("set") or ()), *overrides]
        ds_config = args.deepspeed_config or values.get("deepspeed_config")
        return points(values["config"], ds_config, overrides, axes, args.name or values.get("name"))
    if not args.grid:
        raise ConfigError(f"sweep: {args.config} is one experiment; give --grid KEY=VALUE,VALUE,...")
    return points(args.config, args.deepspeed_config, overrides, parse_axes(args.grid), args.name)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() or 2


def summary(outcomes: list[Outcome]) -> str:
    """The tables of what is finished, and what is not."""
    done = [outcome.point for outcome in outcomes if outcome.state in (FINISHED, SKIPPED)]
    parts = []
    if done:
        groups = group_runs([read_run(point.folder) for point in done])
        parts += ["", stage_table(groups).text(), "", summary_table(groups).text(), ""]
        parts += [str(test) for test in paired_tests(groups)]
    parts += [
        f"{outcome.state}: {outcome.point.experiment.name}: {outcome.message}"
        for outcome in outcomes
        if outcome.state in (FAILED, STOPPED)
    ]
    parts.append(f"{len(done)} of {len(outcomes)} runs are finished")
    return "\n".join(parts)
