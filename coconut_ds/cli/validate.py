"""Check experiments, DeepSpeed configs and data files without starting anything.

    python -m coconut_ds validate FILE... [--model ID_OR_FOLDER] [--picture PNG]

YAML files are experiments.  JSON files may be DeepSpeed configs, data sets or data cards; the type is
detected from the content.  All errors in all files are reported at once.  Data files are checked together:
lengths, leaks between splits, problems longer than the model allows.
Exit code 2: a file is invalid, or the splits leak.
"""

import argparse
import sys
from pathlib import Path

from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import Experiment, load_with_notes
from coconut_ds.config.schema import MAX_BYTES
from coconut_ds.data.json_items import looks_like_data
from coconut_ds.data.problems import card_for
from coconut_ds.errors import ConfigError, UserError
from coconut_ds.terminal import print_notes

CARD_SUFFIX = ".card.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="YAML, JSON or JSON lines file")
    parser.add_argument(
        "--model", metavar="ID", help="count lengths in tokens of this model instead of words"
    )
    parser.add_argument("--picture", metavar="PNG", help="write histograms of the lengths in the data files")


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
    """One line about a valid file; ConfigError or DataError with all errors of an invalid one."""
    if path.suffix in (".yaml", ".yml"):
        experiment, notes = load_with_notes(path)
        print_notes([*notes, *_length_notes(experiment)])
        return f"an experiment ({experiment.method}, thought {experiment.thought}, {experiment.tuning})"
    if path.suffix != ".json":
        raise ConfigError(
            f"{path}: neither .yaml nor .json; give experiments, DeepSpeed configs or data files"
        )
    if path.name.endswith(CARD_SUFFIX):
        card = card_for(path.with_name(path.name.removesuffix(CARD_SUFFIX) + "_train.json"))
        return f"the card of {card.name}, graded as {card.grading}"
    ds_config = load_ds_config(path)
    print_notes(ds_config.notes)
    precision = "fp16 (GPUs only)" if ds_config.precision == "fp16" else ds_config.precision
    if ds_config.stock.get("bf16", {}).get("enabled") == "auto":
        precision = "bf16 where the YAML says 'bf16: true'"
    return f"a DeepSpeed config (ZeRO stage {ds_config.zero_stage}, {precision})"


def _length_notes(experiment: Experiment) -> list[str]:
    """Notes on long examples if data and model are on this machine; DataError as in training."""
    paths = [experiment.train_path, experiment.val_path, experiment.test_path]
    if not all(Path(path).exists() for path in [experiment.model_id, *paths] if path):
        return []
    from coconut_ds.data.problems import read_problems
    from coconut_ds.data.tokenizer import load_vocabulary, tokenize
    from coconut_ds.model.build import length_check  # imports torch, which settings files do not need

    vocabulary = load_vocabulary(experiment.model_id)
    check = length_check(experiment, vocabulary)
    return (
        check.refuse(*(tokenize(read_problems(p), vocabulary) if p else [] for p in paths)) if check else []
    )


def _check_data(paths: list[Path], model: str | None, picture: str | None) -> int:
    """Print the report on the data files; return the number of errors and leaks."""
    from coconut_ds.data.checks import check_data_files  # imports torch, which settings files do not need
    from coconut_ds.data.positions import limit_of
    from coconut_ds.data.tokenizer import load_vocabulary
    from coconut_ds.model.loading import load_config

    vocabulary = None if model is None else load_vocabulary(model)
    limit = None if model is None else limit_of(load_config(model))
    report = check_data_files(paths, vocabulary, limit.positions if limit else None)
    print(report.table(), file=sys.stderr if report.errors or report.leaks else sys.stdout)
    if picture is not None:
        report.save_picture(picture)
        print(f"wrote {picture}")
    return len(report.errors) + len(report.leaks)


def _is_data(path: Path) -> bool:
    if path.suffix not in (".json", ".jsonl") or path.name.endswith(CARD_SUFFIX):
        return False
    try:
        with open(path, "rb") as file:
            return path.suffix == ".jsonl" or looks_like_data(file.read(MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
