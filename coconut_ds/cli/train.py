"""Train an experiment, or continue it from its newest checkpoint.

    deepspeed --num_gpus 2 --module coconut_ds train CONFIG --deepspeed_config JSON

Starts anew when the run folder save_path/name has no checkpoint, else goes on from the newest whole one.
With `only_eval: true` in CONFIG it evaluates `load_model_path` on `val_path`, as `eval` does.
"""

import argparse

from coconut_ds.config.arguments import add_ds_config_argument, add_experiment_arguments
from coconut_ds.evaluation.measure import EvalOptions, measure
from coconut_ds.evaluation.saved_models import find_trained
from coconut_ds.training.run_settings import read_settings
from coconut_ds.training.train import train
from coconut_ds.training.trainer import Options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_arguments(parser)
    add_ds_config_argument(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="resume from this checkpoint (a name, best, best_stage_N), not the newest",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY",
        help="a setting that may differ from the checkpoint's (world_size: the number of ranks; "
        "stage, with only_eval: evaluate at another stage than trained at); "
        "may be given several times",
    )
    parser.add_argument("--max-minutes", type=float, metavar="N", help="save and stop after N minutes")
    parser.add_argument(
        "--stuck-seconds",
        type=float,
        default=300.0,
        metavar="N",
        help="end with stack traces when no rank moved for N seconds; 0: wait for ever (default: 300)",
    )
    parser.add_argument(
        "--skip-plan", action="store_true", help="start without checking the plan against the memory budget"
    )


def run(args: argparse.Namespace) -> int:
    experiment, ds_config = read_settings(args)
    if experiment.only_eval:
        measure(
            find_trained(args.config, overrides=args.overrides, allow=args.allow), ds_config, EvalOptions()
        )
    else:
        options = Options(
            args.checkpoint, tuple(args.allow), args.max_minutes, args.stuck_seconds, args.skip_plan
        )
        train(experiment, ds_config, options)
    return 0
