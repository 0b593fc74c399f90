"""Check settings and data files without starting anything.

    python -m coconut_ds validate FILE...

YAML files are experiments. JSON files are DeepSpeed settings or problems, told apart by what they hold.
Every problem of every file is listed; the exit code is 2 when there is any.
"""

import argparse
import sys
from pathlib import Path

from coconut_ds.config import load_experiment
from coconut_ds.ds_config import load_ds_config
from coconut_ds.errors import ConfigError, UserError
from coconut_ds.problems import card_for, read_problems

CARD_SUFFIX = ".card.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="YAML or JSON file")


def run(args: argparse.Namespace) -> int:
    failed = 0
    for name in args.files:
        try:
            print(f"{name}: ok, {_check(Path(name))}")
        except UserError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    if failed:
        print(f"{failed} of {len(args.files)} files cannot be used", file=sys.stderr)
    return ConfigError.exit_code if failed else 0


def _check(path: Path) -> str:
    if path.suffix in (".yaml", ".yml"):
        experiment = load_experiment(path)
        return f"an experiment ({experiment.method}, thought {experiment.thought}, {experiment.tuning})"
    if path.suffix != ".json":
        raise ConfigError(
            f"{path}: neither .yaml nor .json; give experiments, DeepSpeed settings or data files"
        )
    if path.name.endswith(CARD_SUFFIX):
        card = card_for(path.with_name(path.name.removesuffix(CARD_SUFFIX) + "_train.json"))
        return f"the card of {card.name}, graded as {card.grading}"
    if _holds_a_list(path):
        problems = read_problems(path)
        steps = sum(len(problem.steps) for problem in problems) / len(problems)
        card = card_for(path)
        return f"{len(problems)} problems, {steps:.1f} steps on average, graded as {card.grading}"
    ds_config = load_ds_config(path)
    return f"DeepSpeed settings (ZeRO stage {ds_config.zero_stage}, {ds_config.precision})"


def _holds_a_list(path: Path) -> bool:
    """Data files are lists; a list starts with '['."""
    try:
        with open(path, "rb") as file:
            return file.read(4096).lstrip().startswith(b"[")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
