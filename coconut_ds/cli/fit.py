"""Find the largest micro-batch that fits the memory budget; the effective batch stays the same.

    python -m coconut_ds fit CONFIG --deepspeed_config JSON [--output NEW.yaml]

If a single row does not fit, `fit` tries activation checkpointing, a smaller reduce bucket, optimizer offload
and, with --precision, 16-bit training.  It prints the settings to use, or writes them to --output.
Exit code 3: nothing fits.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from coconut_ds.cli.plan import add_planning_arguments
from coconut_ds.config.deepspeed import DeepSpeedConfig, add_ds_config_argument
from coconut_ds.config.experiment import add_experiment_arguments, experiment_to_yaml, read_experiment
from coconut_ds.files import json_text

if TYPE_CHECKING:
    from coconut_ds.memory.fit import Fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_arguments(parser)
    add_ds_config_argument(parser)
    add_planning_arguments(parser)
    parser.add_argument(
        "--precision", choices=("bf16", "fp16"), help="also try 16-bit training if nothing else fits"
    )
    parser.add_argument(
        "--output", metavar="YAML", help="write the experiment here, and a changed DeepSpeed config beside it"
    )


def run(args: argparse.Namespace) -> int:
    from coconut_ds.memory.cases import read_machine, read_planner  # these import torch
    from coconut_ds.memory.fit import fit

    experiment = read_experiment(args)
    ds_config = read_machine(args, args.deepspeed_config, experiment)
    planner = read_planner(args, experiment)
    result = fit(planner, experiment, ds_config, args.ranks, args.precision)
    shape = result.experiment
    print(
        f"{shape.batch_size_training} rows x {shape.gradient_accumulation_steps} micro-batches x "
        f"{result.plan.ranks} GPUs; up to {result.max_rows} rows would fit"
    )
    print(result.plan.verdict())
    for memory_option in result.memory_options:
        print(f"set in the DeepSpeed config: {memory_option}")
    if args.output:
        write(result, Path(args.output))
    else:
        print(result.settings)
    return 0


def write(result: "Fit", path: Path) -> None:
    """Write the experiment, and the DeepSpeed config if memory options changed it."""
    path.write_text(experiment_to_yaml(result.experiment), encoding="utf-8")
    print(f"wrote {path}")
    if result.memory_options:
        beside = path.with_suffix(".ds_config.json")
        beside.write_text(json_text(as_json(result.ds_config), indent=2) + "\n", encoding="utf-8")
        print(f"wrote {beside}")


def as_json(ds_config: DeepSpeedConfig) -> dict:
    """The content of a file that loads as `ds_config`."""
    values = {**ds_config.stock, "latent_memory": asdict(ds_config.latent_memory)}
    if ds_config.memory_budget is not None:
        values["memory_budget"] = asdict(ds_config.memory_budget)
    return values
