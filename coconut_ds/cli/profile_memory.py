"""Measure the memory of real optimizer steps on the largest batch, by phase.

    deepspeed --num_gpus 2 --module coconut_ds profile CONFIG --deepspeed_config JSON
    python -m coconut_ds profile CONFIG --deepspeed_config JSON JSON     planned beside measured

Phases: initialize; every pass, loss, backward, reduce and optimizer step, twice; evaluation; checkpoint.
Prints the measured memory beside the plan and the budget, and writes memory/plan.json and memory/profile.json
in the run folder for `report`.  No weights are kept.  Several DeepSpeed configs are profiled one after the
other, each on all GPUs and in a run folder of its own, NAME-JSON.
"""

import argparse
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coconut_ds.config.deepspeed import DeepSpeedConfig, add_ds_config_argument
from coconut_ds.config.experiment import (
    Experiment,
    add_experiment_arguments,
    experiment_to_yaml,
    read_experiment,
)
from coconut_ds.data.curriculum import Stage, final_stage
from coconut_ds.data.run_data import RunData, TestSet
from coconut_ds.distributed import lost_ranks_explained
from coconut_ds.engine.engine import Engine, Ranks, start_distributed, world_size_from_environment
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.evaluate import evaluate
from coconut_ds.files import json_text, make_folder, read_json, replace_text
from coconut_ds.memory.allocations import recorder_for
from coconut_ds.memory.budget import MemoryGuard, read_ds_config, read_settings
from coconut_ds.memory.phases import largest_batch, shape_of, stages_of
from coconut_ds.memory.planner import Planner
from coconut_ds.memory.profiler import BETWEEN, INITIALISE, PhaseMeter, profile_steps
from coconut_ds.model.loading import write_model
from coconut_ds.reports.memory_tables import profile_text, profiles_side_by_side
from coconut_ds.runs.run_folder import RunLock, run_folder
from coconut_ds.training.sweep import launch_module
from coconut_ds.training.trainer import check_start, start_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_arguments(parser)
    add_ds_config_argument(parser, several=True)
    parser.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="GPUs for each of several DeepSpeed configs (default: all)",
    )
    parser.add_argument(
        "--snapshot",
        action="store_true",
        help="on GPUs: also write memory/snapshot_rank_N.pickle for pytorch.org/memory_viz",
    )


def run(args: argparse.Namespace) -> int:
    if len(args.deepspeed_config) > 1:
        return profile_each(args)
    (args.deepspeed_config,) = args.deepspeed_config
    experiment, ds_config = read_settings(args)
    if experiment.only_eval:
        raise ConfigError(
            f"{args.config}: only_eval is true, so there are no steps to profile; --set only_eval=false"
        )
    with lost_ranks_explained():
        result = profile(experiment, ds_config, args.snapshot)
    if result is not None:
        print(result)
    return 0


def profile_each(args: argparse.Namespace) -> int:
    """Profile every DeepSpeed config in processes of its own, and print one table.  Raises ConfigError."""
    if world_size_from_environment() > 1:
        raise ConfigError("start several DeepSpeed configs without the launcher, with --num-gpus N")
    experiment = read_experiment(args)
    paths = {Path(path).stem: path for path in args.deepspeed_config}
    if len(paths) < len(args.deepspeed_config):
        raise ConfigError("--deepspeed_config: two files have one name, and would write to one run folder")
    for path in paths.values():
        read_ds_config(path, experiment, args.ds_overrides)
    num_gpus = args.num_gpus or torch.cuda.device_count() or 1
    results, code = {}, 0
    for number, (name, path) in enumerate(paths.items(), 1):
        print(f"profiling with {path} ({number} of {len(paths)})", flush=True)
        named = f"{experiment.name}-{name}"
        settings = [word for text in (*args.overrides, f"name={named}") for word in ("--set", text)]
        settings += [word for text in args.ds_overrides for word in ("--ds", text)]
        settings += ["--snapshot"] if args.snapshot else []
        command = [*launch_module("coconut_ds", num_gpus), "profile", args.config, "--deepspeed_config", path]
        done = subprocess.run([*command, *settings], capture_output=True, text=True)
        if done.returncode == 0:
            folder = run_folder(replace(experiment, name=named)) / "memory"
            results[name] = (read_json(folder / "profile.json"), read_json(folder / "plan.json"))
        else:
            code = code or done.returncode
            print("\n".join((done.stderr or done.stdout).strip().splitlines()[-3:]))
    if results:
        print(f"\n{profiles_side_by_side(results).text()}")
    return code


def profile(experiment: Experiment, ds_config: DeepSpeedConfig, snapshot: bool) -> str | None:
    """Profile on every rank; the main rank writes the files and returns the text.  Collective."""
    folder = run_folder(experiment) / "memory"
    run_data = check_start(experiment, ds_config, world_size_from_environment())
    ranks = start_distributed(ds_config.precision)
    locks: list[RunLock] = []  # keep other runs out of the folder
    ranks.on_main(lambda: locks.append(RunLock(folder.parent)))
    picture = folder / f"snapshot_rank_{ranks.rank}.pickle" if snapshot else None
    meter = PhaseMeter(ranks.device, recorder_for(ranks.device, picture))
    meter.begin(INITIALISE)
    engine = start_engine(experiment, ds_config, run_data, ranks)
    meter.begin(BETWEEN)
    planned = _plan(experiment, ds_config, run_data, ranks) if ranks.is_main else None
    plan, evaluated = engine.broadcast_object(planned)
    stage = max(plan["stages"], key=lambda stage: stage["gpu_mib"])
    at = next(at for at in stages_of(experiment) if at.epoch == stage["first_epoch"])
    num_rows = experiment.batch_size_training
    batch = largest_batch(list(run_data.train), at, experiment, run_data.vocabulary, num_rows)
    with MemoryGuard(folder, ranks.rank, ranks.world_size, ranks.device, plan):
        own = profile_steps(
            engine,
            meter,
            batch,
            experiment.gradient_accumulation_steps,
            lambda: _evaluate(engine, experiment, run_data, evaluated),
            lambda where: write_model(engine.module, run_data.vocabulary, where),
            folder,
        )
    result = {
        "experiment": experiment.name,
        "ds_config": ds_config.path,
        "budget": plan["budget"],
        "batch": str(shape_of(batch)),
        "stage": stage["stage"],
        "ranks": engine.gather(own),
    }
    text = None
    if engine.is_main:
        make_folder(folder)
        replace_text(folder / "plan.json", json_text(plan, indent=2) + "\n")
        replace_text(folder / "profile.json", json_text(result) + "\n")
        if not (folder.parent / "experiment.yaml").exists():
            settings = ds_config.resolve(experiment, ranks.world_size)
            replace_text(folder.parent / "experiment.yaml", experiment_to_yaml(experiment))
            replace_text(folder.parent / "ds_config.json", json_text(settings, indent=2, default=str) + "\n")
        text = profile_text(result, plan) + f"\n\n{folder / 'profile.json'}"
    engine.close()
    for lock in locks:
        lock.release()
    return text


def _plan(
    experiment: Experiment, ds_config: DeepSpeedConfig, run_data: RunData, ranks: Ranks
) -> tuple[dict[str, Any], Stage]:
    """The plan, and the stage whose evaluation it plans."""
    valid = list(run_data.valid.tokenized)
    train = list(run_data.train) or valid
    planner = Planner.from_run_data(experiment, train, valid, run_data.vocabulary, ranks.device.type)
    plan = planner.plan(experiment, ds_config, ranks.world_size)
    evaluated = next((phase.stage for phase in plan.phases if phase.stage), final_stage(experiment))
    return plan.to_json(), evaluated


def _evaluate(engine: Engine, experiment: Experiment, run_data: RunData, stage: Stage) -> None:
    """One evaluation batch per rank, of the longest problems."""
    valid = run_data.valid
    lengths = [len(p.question) + sum(map(len, p.steps)) for p in valid.tokenized]
    limit = experiment.batch_size_eval * engine.world_size
    chosen = sorted(range(len(valid)), key=lengths.__getitem__, reverse=True)[:limit]
    longest = TestSet([valid.problems[i] for i in chosen], [valid.tokenized[i] for i in chosen], valid.card)
    evaluate(engine, longest, stage, experiment, run_data.vocabulary)
