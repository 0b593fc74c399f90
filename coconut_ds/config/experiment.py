"""The experiment YAML: what is learned, validated once and then frozen; and its command-line arguments.

    load_experiment("configs/full/gsm_coconut.yaml", ["lr=3e-5"])  ->  Experiment

The flat keys of the published code keep their meaning.  Types, ranges and defaults live in
schemas/experiment.schema.json, and rules that involve several keys in methods.py.  Whether data and model
paths exist is not checked here.
"""

import argparse
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from coconut_ds.config.methods import (
    LATENT_VARIANTS,
    METHOD_BOOLEANS,
    Method,
    contradictions,
    has_published_keys,
    method_of,
    thought_and_tuning,
    unread,
    without_effect,
)
from coconut_ds.config.schema import (
    affects,
    defaults,
    did_you_mean,
    kinds,
    load_schema,
    parse_yaml_value,
    read_yaml,
    settings_with,
    shown,
    synonyms,
    unknown_keys,
    violations,
)
from coconut_ds.errors import ConfigError
from coconut_ds.files import exists, from_start, home_expanded, print_notes, run_folder_of


@dataclass(frozen=True)
class Experiment:
    """One run.  configs/README.md describes every field."""

    project: str
    name: str
    save_path: str
    seed: int
    debug: bool

    method: Method
    thought: str
    tuning: str  # "full" | "lora"
    latent_supervision: str | None  # a module of objectives/
    latent_supervision_weight: float
    c_thought: int
    epochs_per_stage: int | tuple[int, ...]  # a tuple for stage 0, 1, ...; its last number repeats
    advance_at: float | None
    min_epochs_per_stage: int
    early_stopping_patience: int | None
    max_latent_stage: int
    pad_latent_to_max: bool
    uniform_prob: float
    num_epochs: int
    icot_tokens_per_epoch: int | None

    latent_window_size: int
    latent_window_init: str  # "recent" | "uniform"
    latent_window_scope: str  # "sequence" | "pass"
    latent_window_weights: tuple[float, ...]

    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_target_modules: tuple[str, ...] | None
    lora_use_rslora: bool
    lora_use_dora: bool
    quantization: str  # "none" | "nf4"

    model_id: str
    load_model_path: str | None
    train_path: str  # "" with only_eval if the file has none
    val_path: str
    test_path: str | None
    too_long: str  # "error" | "drop" | "truncate_question"
    max_tokens: int | None  # of one example with its latents
    fields: Mapping[str, Any] | None  # question, steps, answer -> the data files' names of them
    chat_template: bool
    max_new_tokens: int | None
    grading: str | None  # "exact" | "latex"

    batch_size_training: int  # rows per GPU and micro-batch
    gradient_accumulation_steps: int
    lr: float
    thought_lr: float | None
    weight_decay: float
    lr_schedule: str  # "constant" | "linear" | "cosine"
    warmup_ratio: float
    gradient_clipping: float
    reset_optimizer: str  # "never" | "stage_switch" | "every_epoch"
    bf16: bool

    only_eval: bool
    resume: int
    batch_size_eval: int
    eval_max_items: int | None
    ablate_after_stage: tuple[str, ...] | None
    save_only_improve: bool
    keep_checkpoints: int | None
    save_minutes: float | None
    save_steps: int | None
    allow_pickle: bool

    @property
    def learning(self) -> dict[str, Any]:
        """The settings that this method, thought and tuning learn by, without paths."""
        values = asdict(self)
        no_effect = [keys for _, keys in unread(self.method, self.thought, self.tuning, values)]
        left_out = {*settings_with("path_to", "data", "weights"), *chain.from_iterable(no_effect)}
        return {
            key: value
            for key, value in values.items()
            if affects(key) in ("learning", "shapes") and key not in left_out
        }

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that affect results; runs that differ only in others are equal."""
        return {key: value for key, value in asdict(self).items() if affects(key) != "running"}


RESETS = {True: "stage_switch", False: "never"}


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and validate one YAML; `overrides` are 'key=value' texts whose values are parsed as YAML.

    ConfigError with all errors of the file in one message.
    """
    return load_with_notes(path, overrides)[0]


def load_with_notes(
    path: str | Path, overrides: Sequence[str] = (), at_start: bool = False
) -> tuple[Experiment, list[str]]:
    """The experiment, and a note for each setting that has no effect or an unexpected default.

    `at_start`: relative paths in a run folder count from where the run was started (from_start).
    """
    values = read_yaml(path)
    if isinstance(values.get("zero_optimization"), dict):
        raise ConfigError(
            f"{path}: is a DeepSpeed config, not an experiment; write CONFIG.yaml --deepspeed_config {path}"
        )
    notes: list[str] = []
    if at_start and Path(path).name == "experiment.yaml":
        for key in settings_with("path_to", "data", "weights", "runs"):
            if isinstance(values.get(key), str):
                values[key] = from_start(values[key], path)
    elif Path(path).name != "experiment.yaml":
        notes += _from_its_project(values, Path(path))
    published = has_published_keys(values)  # from the file alone: --set method=cot does not change its origin
    where = str(path)
    if overrides:
        changes = parse_overrides(overrides)
        values = _without_replaced(values, changes) | changes
        where += " with --set " + " ".join(overrides)
    experiment, more = _check(values, where, published)
    return experiment, [f"{path}: {note}" for note in [*notes, *more]]


def _from_its_project(values: dict[str, Any], path: Path) -> Iterator[str]:
    """Complete relative paths that exist beside or above a YAML and not in the working folder; note them."""
    above = Path(os.path.abspath(path)).parents[:4]
    moved: dict[Path, list[str]] = {}
    for key in settings_with("path_to", "data", "weights"):
        value = values.get(key)
        if not isinstance(value, str) or os.path.isabs(value) or exists(Path(value)):
            continue
        if root := next((folder for folder in above if value and exists(folder / value)), None):
            values[key] = str(root / value)
            moved.setdefault(root, []).append(key)
    for root, keys in moved.items():
        yield f"{', '.join(keys)}: not in this folder, read from {root}"


def _in_its_folder(experiment: Experiment, path: str | Path, overrides: Sequence[str]) -> Experiment:
    """A run folder that is not where its settings say was moved or copied: it keeps writing to itself."""
    folder = run_folder_of(path)
    recorded = os.path.join(experiment.save_path, experiment.name)
    if folder is None or folder != Path(os.path.abspath(path)).parent:
        return experiment
    if os.path.realpath(recorded) == os.path.realpath(folder):
        return experiment
    place: dict[str, Any] = {"save_path": str(folder.parent), "name": folder.name}
    chosen = parse_overrides(overrides)
    return replace(experiment, **{key: value for key, value in place.items() if key not in chosen})


def without_permissions(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Settings of a received file: `allow_pickle` is taken from the command line only."""
    return replace(experiment, allow_pickle=bool(parse_overrides(overrides).get("allow_pickle", False)))


def load_run_experiment(folder: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The settings of a run folder, to read its data and weights.  Raises ConfigError."""
    return load_with_notes(folder / "experiment.yaml", overrides, at_start=True)[0]


def load_named_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Load an experiment named on a command line; a YAML in a run folder counts as received."""
    return load_named_with_notes(path, overrides)[0]


def load_named_with_notes(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Experiment, list[str]]:
    """`load_named_experiment`, with the notes of `load_with_notes`."""
    experiment, notes = load_with_notes(path, overrides, at_start=True)
    if Path(path).name == "experiment.yaml":
        experiment = _in_its_folder(experiment, path, overrides)
    is_received = Path(path).name == "experiment.yaml" or run_folder_of(path) is not None
    return without_permissions(experiment, overrides) if is_received else experiment, notes


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """{'lr': 3e-5} from ['lr=3e-5'].  ConfigError: no '=', or a key that is not a setting."""
    schema = load_schema("experiment")
    known = schema["properties"]
    changes: dict[str, Any] = {}
    errors = []
    keys = [override.partition("=")[0].strip() for override in overrides if "=" in override]
    hints = unknown_keys([key for key in keys if key not in known], schema)
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals:
            errors.append(f"--set {override}: must be KEY=VALUE")
        elif key not in known:
            errors.append(f"--set {override}: '{key}' is not a setting{hints[key]}")
        else:
            value = parse_yaml_value(text, f"--set {override}")
            is_text = "string" in kinds(known[key]) and not isinstance(value, str | None)
            changes[key] = text.strip() if is_text else value
    if errors:
        raise ConfigError("\n".join(errors))
    return changes


def validate_experiment(values: Mapping[str, Any], where: str) -> Experiment:
    """Validate `values`; `where` names their source in messages."""
    return _check(values, where, has_published_keys(values))[0]


def _check(values: Mapping[str, Any], where: str, published: bool) -> tuple[Experiment, list[str]]:
    schema = load_schema("experiment")
    given = {key: _as_meant(value, schema["properties"].get(key, {})) for key, value in values.items()}
    given = {key: value for key, value in given.items() if value is not None or key not in schema["required"]}
    errors = violations(given, schema, "a setting")
    invalid = {error.split(":", 1)[0].split(".", 1)[0] for error in errors}
    valid = {key: value for key, value in given.items() if key not in invalid and key in schema["properties"]}
    standard = defaults(schema, published)
    settings = standard | valid
    errors += [text for keys, text in contradictions(valid, settings) if not invalid.intersection(keys)]
    if errors:
        raise ConfigError("\n".join(f"{where}: {error}" for error in errors))
    method = method_of(valid)
    assert method is not None
    notes = without_effect(method, valid, standard, settings)
    return _record(method, settings), _notes_on_defaults(valid, standard, schema) + notes


def _notes_on_defaults(
    valid: Mapping[str, Any], standard: Mapping[str, Any], schema: Mapping[str, Any]
) -> list[str]:
    """A note for each default that differs because the file is one of the published code."""
    return [
        f"{key} is {shown(value)}, the published code's value, because the file has no 'method:' "
        f"(with it: {shown(ours)}); write '{key}: {shown(value)}' or '{key}: {shown(ours)}'"
        for key, value in standard.items()
        if key not in valid and value != (ours := schema["properties"][key]["default"])
    ]


def experiment_to_yaml(experiment: Experiment) -> str:
    """The resolved settings as YAML; loading it returns an equal record."""
    values = asdict(experiment)
    values["method"] = str(experiment.method)
    if not experiment.method.has_latents:
        del values["thought"]
    if not experiment.train_path:
        values["train_path"] = None
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _as_meant(value: Any, rule: Mapping[str, Any]) -> Any:
    """Convert what YAML reads as text: `None`, `1e-4` (without a dot), and `~` at the start of a path."""
    if not isinstance(value, str):
        return value
    if value in ("None", "none", "null") and value not in rule.get("enum", ()):
        return None
    if "path_to" in rule:
        return home_expanded(value)
    if "string" not in kinds(rule) and {"number", "integer"}.intersection(kinds(rule)):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if "integer" in kinds(rule) and number.is_integer() else number
    return value


def _without_replaced(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the file without those that a --set key replaces under another name."""
    kept = dict(values)
    if changes.get("method") is not None or any(changes.get(key) is True for key in METHOD_BOOLEANS):
        for key in ("method", *METHOD_BOOLEANS):
            kept.pop(key, None)
    variant = kept.get("latent_variant")
    if "latent_variant" in changes:
        kept.pop("thought", None)
        kept.pop("tuning", None)
    elif variant in LATENT_VARIANTS and ("thought" in changes or "tuning" in changes):
        del kept["latent_variant"]
        kept["thought"], kept["tuning"] = LATENT_VARIANTS[variant]
    return kept


def _record(method: Method, settings: dict[str, Any]) -> Experiment:
    thought, tuning = thought_and_tuning(method, settings)
    epochs = settings["epochs_per_stage"]
    if isinstance(epochs, list) and len(set(epochs)) == 1:
        epochs = epochs[0]  # the last number repeats
    settings |= {
        "method": method,
        "thought": thought,
        "tuning": tuning,
        "train_path": settings["train_path"] or "",
        "epochs_per_stage": epochs,
        "reset_optimizer": RESETS.get(settings["reset_optimizer"], settings["reset_optimizer"]),
    }
    return Experiment(
        **{field.name: _exact(settings[field.name], str(field.type)) for field in fields(Experiment)}
    )


def _exact(value: Any, annotation: str) -> Any:
    """Convert to the annotated type: JSON Schema accepts 3.0 as an integer and 1 as a number."""
    if isinstance(value, list):
        return tuple(_exact(item, "float" if "float" in annotation else "int") for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return float(value) if "float" in annotation else int(value)


def add_experiment_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """CONFIG and --set."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?" if optional else None,
        help="experiment YAML, for example configs/full/gsm_coconut.yaml",
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


def add_allow_stage(parser: argparse.ArgumentParser) -> None:
    """--allow, for commands that read a trained model."""
    paths = settings_with("path_to", "data", "weights")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=(
            "stage",
            *(key for key in settings_with("affects", "learning", "shapes") if key not in paths),
        ),
        metavar="stage|KEY",
        help="stage: accept another stage than the trained one; KEY: accept another value of a setting that "
        "the weights were trained with",
    )


def read_experiment(args: argparse.Namespace) -> Experiment:
    """The experiment of a command line; the main rank prints the notes on it.  Raises ConfigError."""
    experiment, notes = load_named_with_notes(args.config, args.overrides)
    print_notes(notes)
    return experiment


def unrecognized_flags(
    flags: Sequence[str], arguments: Sequence[str], options: Collection[str] = (), has_set: bool = True
) -> str:
    """The error for `flags` of a command line: `--set` for a setting, else the option that it misspells.

    --learning_rate 1e-4      unrecognized arguments: --learning_rate 1e-4; write --set lr=1e-4
    `options`: those of the command; `has_set`: whether `--set` is one of them.
    """
    schema = load_schema("experiment")
    settings = synonyms(schema) | {key: key for key in schema["properties"]} if has_set else {}
    elsewhere = schema["elsewhere"] if has_set else {}
    following = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    written, remedies, hints = [], [], ""
    for word in flags:
        if not word.startswith("--"):
            continue
        flag, equals, value = word.partition("=")
        if not equals and not following.get(word, "").startswith("--"):
            value = following.get(word, "")
        written.append(word if equals else f"{word} {value}".strip())
        name = flag.removeprefix("--").replace("-", "_")
        if name in settings:
            remedies.append(f"--set {settings[name]}={value or 'true'}")
        elif name in elsewhere:
            hints += f"; {elsewhere[name]}"
        else:
            hints += did_you_mean(flag, options)
    for two_before, before, word in zip(["", "", *arguments], ["", *arguments], arguments, strict=False):
        key, equals, value = word.partition("=")
        if two_before == "--set" and before in settings:  # --set lr 1e-4
            remedies.append(f"--set {settings[before]}={word}")
        elif equals and key in settings and not before.startswith("--"):  # lr=1e-4
            remedies.append(f"--set {settings[key]}={value}")
    text = f"unrecognized arguments: {' '.join(written or flags)}"
    return text + (f"; write {' '.join(remedies)}" if remedies else "") + hints
