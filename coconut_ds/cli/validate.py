"""Check experiments, DeepSpeed configs and data files without starting anything.

    python -m coconut_ds validate FILE... [--model ID_OR_FOLDER] [--picture PNG]
    python -m coconut_ds validate CONFIG --deepspeed_config JSON... [--ranks N]   would `train` start?

YAML files are experiments.  JSON files may be DeepSpeed configs, data sets or data cards; the type is
detected from the content.  All errors in all files are reported at once.  Data files are checked together:
lengths, leaks between splits, problems longer than the model allows.
With --deepspeed_config, each experiment is checked as `train` checks it before the engine starts: both files
together, data, tokenizer, memory plan and weights.  Nothing is downloaded.
What only this machine cannot do, such as fp16 without a GPU, is named and is no error.
Exit code 2: a file is invalid, the splits leak, or `train` would refuse to start.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from coconut_ds.config.deepspeed import add_ds_config_argument, load_ds_config
from coconut_ds.config.experiment import (
    Experiment,
    add_overrides,
    load_with_notes,
    parse_overrides,
    validate_experiment,
)
from coconut_ds.config.schema import MAX_BYTES
from coconut_ds.data.forms import is_cached, is_hub, is_url, looks_like_data
from coconut_ds.data.problems import card_for
from coconut_ds.errors import ConfigError, UserError
from coconut_ds.files import counted, print_notes

CARD_SUFFIX = ".card.json"
# Stands for the experiment if only data files are given: no latents, nothing hidden.
ANY_DATA = {"name": "validate", "model_id": "-", "train_path": "-", "val_path": "-", "method": "cot"}
EVERY_STEP_SHOWN = validate_experiment(ANY_DATA, "validate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="YAML, JSON or JSON lines file")
    parser.add_argument(
        "--model", metavar="ID", help="count lengths in tokens of this model instead of words"
    )
    add_ds_config_argument(parser, needed=False, several=True)
    parser.add_argument(
        "--ranks",
        "--num-gpus",
        type=int,
        metavar="N",
        help="number of GPUs for --deepspeed_config (default: memory_budget.gpus)",
    )
    add_overrides(parser)
    parser.add_argument("--picture", metavar="PNG", help="write histograms of the lengths in the data files")


def run(args: argparse.Namespace) -> int:
    failed = 0
    data_files: list[Path] = []
    args.run_data = {}  # of each experiment, read once for all DeepSpeed configs
    for path, ds_path in _checks(args):
        try:
            if _is_data(path):
                data_files.append(path)
            else:
                print(f"{path}: ok, {_check_settings(path, ds_path, args)}")
        except UserError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    if data_files:
        failed += _check_data(data_files, args)
    return ConfigError.exit_code if failed else 0


def _checks(args: argparse.Namespace) -> Iterator[tuple[Path, str | None]]:
    """Every file, and an experiment once with each DeepSpeed config."""
    for path in map(Path, args.files):
        ds_paths = args.deepspeed_config if path.suffix in (".yaml", ".yml") else []
        yield from ((path, ds_path) for ds_path in ds_paths or [None])


def _check_settings(path: Path, ds_path: str | None, args: argparse.Namespace) -> str:
    """One line about a valid file; ConfigError or DataError with all errors of an invalid one."""
    if path.suffix in (".yaml", ".yml"):
        if ds_path:
            return _check_start(path, ds_path, args)
        experiment, notes = load_with_notes(path, args.overrides)
        print_notes(notes)
        kind = f"{experiment.method}, thought {experiment.thought}, {experiment.tuning}"
        return f"an experiment ({kind}){_check_run_data(experiment)}"
    if path.name.endswith(CARD_SUFFIX):
        card = card_for(path.with_name(path.name.removesuffix(CARD_SUFFIX) + "_train.json"))
        return f"the card of {card.name}, graded as {card.grading}"
    ds_config = load_ds_config(path, args.ds_overrides)
    print_notes(ds_config.notes)
    if ds_config.nvme_blocks:
        from coconut_ds.engine.engine import refuse_missing_operators  # imports DeepSpeed

        refuse_missing_operators(ds_config)
    precision = "fp16 (GPUs only)" if ds_config.precision == "fp16" else ds_config.precision
    if ds_config.stock.get("bf16", {}).get("enabled") == "auto":
        precision = "bf16 where the YAML says 'bf16: true'"
    return f"a DeepSpeed config (ZeRO stage {ds_config.zero_stage}, {precision})"


def _check_start(path: Path, ds_path: str, args: argparse.Namespace) -> str:
    """Check what `train` checks before its engine starts, with its functions; UserError as there."""
    from coconut_ds.data.run_data import read_files
    from coconut_ds.engine.engine import refusal_of_device
    from coconut_ds.evaluation.saved_models import find_trained
    from coconut_ds.memory.budget import read_settings
    from coconut_ds.runs.run_folder import refuse_unwritable, run_folder
    from coconut_ds.training.trainer import check_model, check_start

    settings = argparse.Namespace(**{**vars(args), "config": str(path), "deepspeed_config": ds_path})
    experiment, ds_config = read_settings(settings)
    assert ds_config.memory_budget is not None  # read_settings fills it in
    ranks = args.ranks or ds_config.memory_budget.gpus
    start = f"{experiment.method} on {counted(ranks, 'rank')} with {ds_path}"
    if not (experiment.only_eval or experiment.debug):
        refuse_unwritable(run_folder(experiment))
    if elsewhere := _elsewhere(experiment):
        ds_config.resolve(experiment, ranks)
        if not any(is_hub(path) for path in elsewhere):
            read_files(experiment)
        return start + _not_checked(elsewhere)
    if experiment.only_eval:
        find_trained(str(path), overrides=args.overrides)
    run_data = check_start(experiment, ds_config, ranks, args.run_data.get(path))
    args.run_data[path] = run_data
    check_model(experiment, ds_config, run_data, ranks)
    if refusal := refusal_of_device(ds_config):
        return f"`train` would start: {start}; not on this machine: {refusal}"
    return f"`train` would start: {start}"


def _not_checked(elsewhere: Sequence[str]) -> str:
    return f"; data not checked, since this machine does not have {', '.join(elsewhere)}"


def _elsewhere(experiment: Experiment) -> list[str]:
    """The model and the data sets of the hub that `train` would download first."""
    from coconut_ds.data.tokenizer import is_on_this_machine  # takes half a second to import

    paths = [experiment.train_path, experiment.val_path, experiment.test_path]
    missing = [path for path in paths if path and is_hub(path) and not is_cached(path)]
    return missing if is_on_this_machine(experiment.model_id) else [experiment.model_id, *missing]


def _check_run_data(experiment: Experiment) -> str:
    """Read the data as training does, with its notes; DataError.  A text that names what is not here."""
    paths = [path for path in (experiment.train_path, experiment.val_path, experiment.test_path) if path]
    missing = [path for path in paths if not is_hub(path) and not Path(path).exists()]
    try:
        elsewhere = [*_elsewhere(experiment), *missing]
    except ConfigError:  # a local model that does not exist, in a folder that does
        if len(missing) < len(paths):  # the data are here, so the model should be
            raise
        elsewhere = [experiment.model_id, *missing]
    if elsewhere:
        return _not_checked(elsewhere)
    from coconut_ds.data.run_data import load_run_data  # imports torch, which settings files do not need
    from coconut_ds.model.loading import load_config

    load_run_data(experiment, load_config(experiment.model_id))
    return ""


def _check_data(paths: list[Path], args: argparse.Namespace) -> int:
    """Print the report on the data files; return the number of errors and leaks."""
    from coconut_ds.data.checks import check_data_files  # imports torch, which settings files do not need
    from coconut_ds.data.run_data import LengthCheck, limit_of, load_test_set, unknown_id, unknown_text
    from coconut_ds.data.tokenizer import load_vocabulary, refuse_missing_rows, refuse_unsavable
    from coconut_ds.model.loading import load_config

    model, picture = args.model, args.picture
    fields = validate_experiment(ANY_DATA | parse_overrides(args.overrides), "--set").fields
    vocabulary, check = None, None
    if model is not None:
        vocabulary = load_vocabulary(model)
        refuse_unsavable(vocabulary, model)
        config = load_config(model)
        print_notes(refuse_missing_rows(vocabulary, config, model))
        check = LengthCheck(EVERY_STEP_SHOWN, vocabulary, limit_of(config))
    report = check_data_files(paths, vocabulary, check, fields)
    if vocabulary is not None and unknown_id(vocabulary) is not None and not report.errors:
        sets = {str(path): load_test_set(str(path), vocabulary, fields=fields) for path in paths}
        print_notes(unknown_text(vocabulary, [], "", sets, fields))
    print(report.table(), file=sys.stderr if report.errors or report.leaks else sys.stdout)
    if picture is not None:
        report.save_picture(picture)
        print(f"wrote {picture}")
    return len(report.errors) + len(report.leaks)


def _is_data(path: Path) -> bool:
    if path.suffix in (".yaml", ".yml") or path.name.endswith(CARD_SUFFIX):
        return False
    if path.suffix != ".json" or is_hub(path) or is_url(path):
        return True
    try:
        with open(path, "rb") as file:
            return looks_like_data(file.read(MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
