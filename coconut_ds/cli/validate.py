"""Check settings and data files without starting anything.

    python -m coconut_ds validate FILE... [--model ID_OR_FOLDER] [--picture PNG]

YAML files are experiments; JSON files are DeepSpeed settings, problems or cards, as what they hold tells.
Every problem of every file is listed; data files are looked at together: lengths, leaks between splits, items
longer than the model. The exit code is 2 when a file cannot be used or the splits leak.
"""

import argparse
import sys
from pathlib import Path

from coconut_ds.config.arguments import print_notes
from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import Experiment, load_with_notes
from coconut_ds.config.schemas.parsing import MAX_BYTES
from coconut_ds.data.json_items import looks_like_data
from coconut_ds.data.problems import card_for
from coconut_ds.errors import ConfigError, UserError

CARD_SUFFIX = ".card.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="YAML or JSON file")
    parser.add_argument("--model", metavar="ID", help="count lengths in this model's tokens, not in words")
    parser.add_argument("--picture", metavar="PNG", help="draw the histograms of the data files' lengths")


def run(args: argparse.Namespace) -> int:
    failed = 0
    data_files = []
    for path in map(Path, args.files):
        try:
            if _is_data(path):
                data_files.append(path)
            else:
                print(f"{path}: ok, {_check_settings(path)}")
        except UserError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    if data_files:
        failed += _check_data(data_files, args.model, args.picture)
    return ConfigError.exit_code if failed else 0


def _check_settings(path: Path) -> str:
    """One line about a sound file; ConfigError or DataError with everything wrong in it."""
    if path.suffix in (".yaml", ".yml"):
        experiment, notes = load_with_notes(path)
        print_notes([*notes, *_length_notes(experiment)])
        return f"an experiment ({experiment.method}, thought {experiment.thought}, {experiment.tuning})"
    if path.suffix != ".json":
        raise ConfigError(
            f"{path}: neither .yaml nor .json; give experiments, DeepSpeed settings or data files"
        )
    if path.name.endswith(CARD_SUFFIX):
        card = card_for(path.with_name(path.name.removesuffix(CARD_SUFFIX) + "_train.json"))
        return f"the card of {card.name}, graded as {card.grading}"
    ds_config = load_ds_config(path)
    print_notes(ds_config.notes)
    precision = "fp16 (GPUs only)" if ds_config.precision == "fp16" else ds_config.precision
    if ds_config.stock.get("bf16", {}).get("enabled") == "auto":
        precision = "bf16 where the YAML says 'bf16: true'"
    return f"DeepSpeed settings (ZeRO stage {ds_config.zero_stage}, {precision})"


def _length_notes(experiment: Experiment) -> list[str]:
    """Notes on long examples where data and model are on this machine; DataError as in training."""
    paths = [experiment.train_path, experiment.val_path, experiment.test_path]
    if not all(Path(path).exists() for path in [experiment.model_id, *paths] if path):
        return []
    from coconut_ds.data.problems import read_problems
    from coconut_ds.data.tokenizer import load_vocabulary, tokenize
    from coconut_ds.model.build import length_check  # loads torch, which settings files need not wait for

    vocabulary = load_vocabulary(experiment.model_id)
    check = length_check(experiment, vocabulary)
    return (
        check.refuse(*(tokenize(read_problems(p), vocabulary) if p else [] for p in paths)) if check else []
    )


def _check_data(paths: list[Path], model: str | None, picture: str | None) -> int:
    """Print the report on the data files; gives the number of errors and leaks."""
    from coconut_ds.data.checks import check_data_files  # loads torch, which settings files need not wait for
    from coconut_ds.data.positions import limit_of
    from coconut_ds.data.tokenizer import load_vocabulary
    from coconut_ds.model.loading import load_config

    vocabulary = None if model is None else load_vocabulary(model)
    limit = None if model is None else limit_of(load_config(model))
    report = check_data_files(paths, vocabulary, limit.positions if limit else None)
    print(report.table(), file=sys.stderr if report.errors or report.leaks else sys.stdout)
    if picture is not None:
        report.save_picture(picture)
        print(f"lengths drawn in {picture}")
    return len(report.errors) + len(report.leaks)


def _is_data(path: Path) -> bool:
    if path.suffix not in (".json", ".jsonl") or path.name.endswith(CARD_SUFFIX):
        return False
    try:
        with open(path, "rb") as file:
            return path.suffix == ".jsonl" or looks_like_data(file.read(MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
