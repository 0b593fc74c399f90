"""Evaluate a checkpoint on `val_path`: loss, exact-match accuracy, CoT match.

    deepspeed --num_gpus 2 --module coconut_ds eval CONFIG --deepspeed_config JSON

CONFIG names the weights in `load_model_path` and the stage through `resume`, the epoch it was trained to.
"""

import argparse
from dataclasses import replace

from coconut_ds.settings import add_ds_config_argument, add_experiment_arguments, read_settings
from coconut_ds.train import evaluate_only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment_arguments(parser)
    add_ds_config_argument(parser)


def run(args: argparse.Namespace) -> int:
    experiment, ds_config = read_settings(args)
    evaluate_only(replace(experiment, only_eval=True), ds_config)
    return 0
