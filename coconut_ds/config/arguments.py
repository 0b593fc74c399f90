"""The command-line arguments for the two settings files, the same in every command."""

import argparse
import os
import sys
from collections.abc import Iterable

from coconut_ds.config.experiment import Experiment, load_named_with_notes


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and --set."""
    parser.add_argument(
        "config", metavar="CONFIG", help="experiment YAML, for example configs/full/gsm_coconut.yaml"
    )
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser, of: str = "of the YAML") -> None:
    """--set, into `overrides`."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override one setting {of}; can be repeated",
    )


# The spellings of DeepSpeed's guide and of the Hugging Face Trainer.
DS_CONFIG_FLAGS = ("--deepspeed_config", "--deepspeed-config", "--deepspeed")


def add_allow_stage(parser: argparse.ArgumentParser) -> None:
    """--allow stage, for commands that read a trained model."""
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=("stage",),
        help="stage: accept another stage than the trained one",
    )


def add_ds_config_argument(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--deepspeed_config."""
    parser.add_argument(
        *DS_CONFIG_FLAGS,
        required=required,
        metavar="JSON",
        help="DeepSpeed config, for example ds_configs/zero2_offload.json",
    )


def read_experiment(args: argparse.Namespace) -> Experiment:
    """The experiment of a command line; the main rank prints the notes on it.  Raises ConfigError."""
    experiment, notes = load_named_with_notes(args.config, args.overrides)
    if is_main_process():
        print_notes(notes)
    return experiment


def print_notes(notes: Iterable[str]) -> None:
    """Print notes to stderr, so that stdout has only a command's result."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """Whether this is rank 0 or the only process."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
