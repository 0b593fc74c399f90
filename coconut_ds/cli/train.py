"""Train an experiment, or resume it.

    deepspeed --num_gpus 2 --module coconut_ds train CONFIG --deepspeed_config JSON

Resumes from the newest complete checkpoint in save_path/name, or starts from scratch if there is none.
With `only_eval: true` in CONFIG, evaluates `load_model_path` on `val_path`, as `eval` does.
"""

import argparse

from coconut_ds.config.deepspeed import add_ds_config_argument, default_ds_config, load_ds_config
from coconut_ds.config.experiment import add_experiment_arguments, read_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_arguments(parser)
    add_ds_config_argument(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="resume from this checkpoint instead of the newest: a name, best or best_stage_N",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY",
        help="accept that this setting differs from the checkpoint's; world_size is the number of GPUs, "
        "ds_layout the ZeRO stage, offload and order of the shards; "
        "with only_eval, stage accepts another stage than the trained one; can be repeated",
    )
    parser.add_argument("--max-minutes", type=float, metavar="N", help="save and stop after N minutes")
    parser.add_argument(
        "--stuck-seconds",
        type=float,
        default=300.0,
        metavar="N",
        help="abort with stack traces if no rank makes progress for N seconds (0: never; default: 300)",
    )
    parser.add_argument(
        "--skip-plan",
        action="store_true",
        help="do not check the plan against the memory budget at the start",
    )


def run(args: argparse.Namespace) -> int:
    # An error of these files is said at once; the imports take seconds.
    experiment = read_experiment(args)
    load_ds_config(args.deepspeed_config or default_ds_config(), args.ds_overrides)
    from coconut_ds.memory.budget import read_ds_config  # these import torch
    from coconut_ds.training.trainer import Options, train

    ds_config = read_ds_config(args.deepspeed_config, experiment, args.ds_overrides)
    if experiment.only_eval:
        from coconut_ds.evaluation.measure import EvalOptions, measure  # not needed to train
        from coconut_ds.evaluation.saved_models import find_trained

        models = find_trained(args.config, overrides=args.overrides, allow=args.allow)
        measure(models, ds_config, EvalOptions())
    else:
        options = Options(
            args.checkpoint, tuple(args.allow), args.max_minutes, args.stuck_seconds, args.skip_plan
        )
        train(experiment, ds_config, options)
    return 0
