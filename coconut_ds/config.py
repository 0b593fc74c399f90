"""The experiment YAML: what is learned, checked once and then frozen.

    load_experiment("configs/full/gsm_coconut.yaml", ["lr=3e-5"])  ->  Experiment

The flat keys of the published code keep their meaning.  Types, ranges and defaults live in
schemas/experiment.schema.json; here are the rules that join several keys.

Knows: settings and which of them contradict each other.
Does not know: torch, DeepSpeed, or whether a data or model path exists.
"""

import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from coconut_ds.errors import ConfigError
from coconut_ds.schemas import defaults, did_you_mean, load_schema, shown, violations
from coconut_ds.schemas.parsing import parse_yaml_value, read_yaml


class Method(StrEnum):
    """What replaces the reasoning steps, and when (paper, Table 1)."""

    COCONUT = "coconut"
    COT = "cot"
    NO_COT = "no_cot"
    NO_THOUGHTS = "no_thoughts"
    ICOT = "icot"
    PAUSE = "pause"
    PAUSE_AS_THOUGHT = "pause_as_thought"
    WITHOUT_CURRICULUM = "without_curriculum"

    @property
    def has_latents(self) -> bool:
        return self in (Method.COCONUT, Method.WITHOUT_CURRICULUM) or self.is_pause

    @property
    def is_pause(self) -> bool:
        return self in (Method.PAUSE, Method.PAUSE_AS_THOUGHT)


@dataclass(frozen=True)
class Experiment:
    """One run.  Every field is described in configs/README.md, which is made from the schema."""

    project: str
    name: str
    save_path: str
    seed: int
    debug: bool

    method: Method
    thought: str
    tuning: str  # "full" | "lora"
    c_thought: int
    epochs_per_stage: int | tuple[int, ...]  # a tuple: stage 0, 1, ...; its last number repeats
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

    model_id: str
    load_model_path: str | None
    train_path: str  # "" with only_eval where the file names none
    val_path: str
    test_path: str | None
    max_new_tokens: int | None

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
    save_only_improve: bool
    keep_checkpoints: int | None
    save_minutes: float | None
    save_steps: int | None
    allow_pickle: bool


METHOD_BOOLEANS = ("coconut", "cot", "no_thoughts", "no_cot")
# What each published latent_variant names: (thought, tuning).
LATENT_VARIANTS = {
    "basic": ("last_hidden", "full"),
    "coconut": ("last_hidden", "full"),
    "fixed_window": ("fixed_window", "full"),
    "learnable_weights": ("learnable_window", "full"),
    "learnable_weights_lora": ("learnable_window", "lora"),
    "mlp_projection": ("mlp_projection", "full"),
    "mlp_projection_lora": ("mlp_projection", "lora"),
}
RESETS = {True: "stage_switch", False: "never"}


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and check one YAML; `overrides` are 'key=value' texts whose values are read as YAML.

    ConfigError with every problem of the file in one message.
    """
    values = read_yaml(path)
    where = str(path)
    if overrides:
        changes = parse_overrides(overrides)
        values = _without_replaced(values, changes) | changes
        where += " with --set " + " ".join(overrides)
    return validate_experiment(values, where)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """{'lr': 3e-5} from ['lr=3e-5'].  ConfigError: no '=', or a key that is not a setting."""
    known = load_schema("experiment")["properties"]
    changes: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals:
            problems.append(f"--set {override}: must be KEY=VALUE")
        elif key not in known:
            problems.append(f"--set {override}: '{key}' is not a setting{did_you_mean(key, known)}")
        else:
            changes[key] = parse_yaml_value(text, f"--set {override}")
    if problems:
        raise ConfigError("\n".join(problems))
    return changes


def validate_experiment(values: Mapping[str, Any], where: str) -> Experiment:
    """The record that `values` describe; `where` names their source in messages."""
    schema = load_schema("experiment")
    given = {key: _as_meant(value, schema["properties"].get(key, {})) for key, value in values.items()}
    problems = violations(given, schema, "a setting")
    broken = {problem.split(":", 1)[0].split(".", 1)[0] for problem in problems}
    sound = {key: value for key, value in given.items() if key not in broken and key in schema["properties"]}
    settings = defaults(schema) | sound
    problems += [text for keys, text in _contradictions(sound, settings) if not broken.intersection(keys)]
    if problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return _record(sound, settings)


def experiment_to_yaml(experiment: Experiment) -> str:
    """The resolved settings as YAML; loading it gives an equal record."""
    values = asdict(experiment)
    values["method"] = str(experiment.method)
    if not experiment.method.has_latents:
        del values["thought"]
    if not experiment.train_path:
        values["train_path"] = None
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def thought_names() -> list[str]:
    """Modules of thoughts/: the folder is the registry, so a new file needs no second edit."""
    folder = str(Path(__file__).with_name("thoughts"))
    return sorted(module.name for module in pkgutil.iter_modules([folder]) if not module.name.startswith("_"))


def _as_meant(value: Any, rule: Mapping[str, Any]) -> Any:
    """Undo two YAML surprises of published files: `None` is text, and so is `1e-4` (no dot)."""
    if not isinstance(value, str):
        return value
    if value in ("None", "none", "null") and value not in rule.get("enum", ()):
        return None
    kinds = rule.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if "string" not in kinds and {"number", "integer"}.intersection(kinds):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if "integer" in kinds and number.is_integer() else number
    return value


def _without_replaced(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The file's settings less those that a --set key says anew in other words."""
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


def _method_of(sound: Mapping[str, Any]) -> Method | None:
    named = sound.get("method")
    if named is not None:
        return Method.NO_THOUGHTS if named == "without_thought" else Method(named)
    chosen = [key for key in METHOD_BOOLEANS if sound.get(key)]
    return Method(chosen[0]) if len(chosen) == 1 else None


def _record(sound: Mapping[str, Any], settings: dict[str, Any]) -> Experiment:
    method = _method_of(sound)
    assert method is not None
    thought, tuning = LATENT_VARIANTS.get(settings["latent_variant"], ("last_hidden", "full"))
    if method.is_pause:
        thought = "pause"
    settings |= {
        "method": method,
        "thought": settings["thought"] or thought,
        "tuning": settings["tuning"] or tuning,
        "train_path": settings["train_path"] or "",
        "reset_optimizer": RESETS.get(settings["reset_optimizer"], settings["reset_optimizer"]),
    }
    return Experiment(
        **{field.name: _exact(settings[field.name], str(field.type)) for field in fields(Experiment)}
    )


def _exact(value: Any, annotation: str) -> Any:
    """JSON Schema takes 3.0 for an integer and 1 for a number; the record does not."""
    if isinstance(value, list):
        return tuple(_exact(item, "float" if "float" in annotation else "int") for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return float(value) if "float" in annotation else int(value)


# --- settings that contradict each other ---------------------------------------------------------------


def _contradictions(sound: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    """(keys the rule looks at, problem) for every rule that joins several keys."""
    yield from _method_contradictions(sound)
    method = _method_of(sound)
    if method is not None:
        yield from _latent_contradictions(method, sound, settings)
    yield from _thought_contradictions(sound)
    yield from _window_contradictions(sound, settings)
    yield from _running_contradictions(settings)
    yield from _name_problems(settings)


def _method_contradictions(sound: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    keys = {"method", *METHOD_BOOLEANS}
    chosen = [key for key in METHOD_BOOLEANS if sound.get(key)]
    named = sound.get("method")
    if len(chosen) > 1:
        yield keys, f"{', '.join(chosen)}: {len(chosen)} methods are true; exactly one may be"
    elif named is not None and chosen and chosen[0] != _method_of(sound):
        yield keys, f"method: says {named}, but '{chosen[0]}: true' says otherwise; keep one of them"
    elif named is None and not chosen:
        yield (
            keys,
            f"method: none is chosen; set one of {', '.join(METHOD_BOOLEANS)} to true, or 'method: NAME'",
        )


def _latent_contradictions(
    method: Method, sound: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[set[str], str]]:
    keys = {"method", *METHOD_BOOLEANS}
    if method.has_latents:
        for key in ("c_thought", "max_latent_stage"):
            if settings[key] == 0:
                yield (
                    keys | {key},
                    f"{key}: is 0, which leaves method {method} without latents; give at least 1",
                )
    elif sound.get("thought") is not None:
        yield (
            keys | {"thought"},
            f"thought: {sound['thought']} is given, but method {method} has no latents; remove it",
        )
    variant = sound.get("latent_variant")
    if variant not in (None, "basic", "coconut") and (method.is_pause or not method.has_latents):
        why = "always uses thought pause" if method.is_pause else "has no latents"
        text = f"latent_variant: is {variant}, but method {method} {why}; remove it (LoRA is 'tuning: lora')"
        yield keys | {"latent_variant"}, text
    if method.is_pause and sound.get("thought") not in (None, "pause"):
        yield (
            keys | {"thought"},
            f"thought: is {sound['thought']}, but method {method} always uses pause; remove it",
        )
    if settings["icot_tokens_per_epoch"] is not None and method is not Method.ICOT:
        text = f"icot_tokens_per_epoch: is given, but the method is {method}; it belongs to 'method: icot'"
        yield keys | {"icot_tokens_per_epoch"}, text


def _thought_contradictions(sound: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    thought, names = sound.get("thought"), thought_names()
    if thought is not None and thought not in names:
        text = (
            f"thought: must be one of {', '.join(names)}, got {shown(thought)}{did_you_mean(thought, names)}"
        )
        yield {"thought"}, text
    variant = sound.get("latent_variant")
    for key, meant in zip(("thought", "tuning"), LATENT_VARIANTS.get(str(variant), ()), strict=False):
        if sound.get(key) not in (None, meant):
            text = f"{key}: is {sound[key]}, but latent_variant {variant} means {meant}; keep one of the two"
            yield {key, "latent_variant"}, text


def _window_contradictions(
    sound: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[set[str], str]]:
    keys = {"thought", "latent_variant", "latent_window_size", "latent_window_weights"}
    weights, size = settings["latent_window_weights"], settings["latent_window_size"]
    if "fixed_window" not in (sound.get("thought"), sound.get("latent_variant")):
        return
    if len(weights) != size:
        yield (
            keys,
            (
                f"latent_window_weights: {len(weights)} weights {weights} for latent_window_size {size}; "
                f"give {size}, newest state first"
            ),
        )
    elif not sum(weights) > 0:
        yield keys, f"latent_window_weights: {weights} sum to 0; at least one must be positive"


def _running_contradictions(settings: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    if settings["only_eval"]:
        if settings["load_model_path"] is None:
            text = "load_model_path: is missing, but 'only_eval: true' evaluates a checkpoint; name it"
            yield {"only_eval", "load_model_path"}, text
        return
    if settings["train_path"] is None:
        yield {"only_eval", "train_path"}, "train_path: is missing; name the training problems"
    if settings["num_epochs"] <= settings["resume"]:
        yield (
            {"num_epochs", "resume"},
            (
                f"num_epochs: is {settings['num_epochs']}, but resume skips {settings['resume']}, "
                "so none is left; num_epochs counts the skipped ones too"
            ),
        )


def _name_problems(settings: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    name = settings.get("name")
    if isinstance(name, str) and (
        any(character in "/\\" or not character.isprintable() for character in name)
        or name.strip(". ") != name
    ):
        text = (
            f"name: {shown(name)} is not a folder name inside save_path; use letters, digits, '-', '_', '.'"
        )
        yield {"name"}, text
