"""Training methods and thoughts: how a YAML chooses them, and the settings that they need, exclude or ignore.

In all functions, `valid` holds the valid settings of the file, and `settings` also the defaults.
"""

import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from coconut_ds.config.schema import did_you_mean, settings_with, shown


class Method(StrEnum):
    """Training method: what replaces the reasoning steps, and when (paper, Table 1)."""

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
    def has_stages(self) -> bool:
        return self in (Method.COCONUT, Method.NO_THOUGHTS, Method.ICOT, Method.PAUSE_AS_THOUGHT)

    @property
    def is_pause(self) -> bool:
        return self in (Method.PAUSE, Method.PAUSE_AS_THOUGHT)


METHOD_BOOLEANS = ("coconut", "cot", "no_thoughts", "no_cot")
# (thought, tuning) of each latent_variant of the published code.
LATENT_VARIANTS = {
    "basic": ("last_hidden", "full"),
    "coconut": ("last_hidden", "full"),
    "fixed_window": ("fixed_window", "full"),
    "learnable_weights": ("learnable_window", "full"),
    "learnable_weights_lora": ("learnable_window", "lora"),
    "mlp_projection": ("mlp_projection", "full"),
    "mlp_projection_lora": ("mlp_projection", "lora"),
}


def method_of(valid: Mapping[str, Any]) -> Method | None:
    """The method that the settings choose; None if they choose none or several."""
    named = valid.get("method")
    if named is not None:
        return Method.NO_THOUGHTS if named == "without_thought" else Method(named)
    chosen = [key for key in METHOD_BOOLEANS if valid.get(key)]
    return Method(chosen[0]) if len(chosen) == 1 else None


def has_published_keys(values: Mapping[str, Any]) -> bool:
    """Whether a file chooses its method with the four booleans of the published code."""
    return values.get("method") is None and any(key in values for key in METHOD_BOOLEANS)


def thought_and_tuning(method: Method, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Thought and tuning, from their keys, `latent_variant` and the method."""
    thought, tuning = LATENT_VARIANTS.get(settings["latent_variant"], ("last_hidden", "full"))
    tuning = settings["tuning"] or tuning
    if not method.has_latents:
        return "last_hidden", tuning
    return settings["thought"] or ("pause" if method.is_pause else thought), tuning


def registered(registry: str) -> list[str]:
    """The modules of a registry folder: thoughts or objectives."""
    folder = str(Path(__file__).parents[1] / registry)
    return sorted(module.name for module in pkgutil.iter_modules([folder]) if not module.name.startswith("_"))


# (keys that a rule reads, the error); the caller skips rules whose keys already failed the schema.
Contradiction = tuple[set[str], str]
METHOD_KEYS = {"method", *METHOD_BOOLEANS}


def contradictions(valid: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Contradiction]:
    """Yield an error for settings that are valid alone and contradict each other."""
    yield from _method_contradictions(valid)
    method = method_of(valid)
    if method is not None and method.has_latents:
        yield from _latent_contradictions(method, valid, settings)
    yield from _thought_contradictions(valid)
    if method is None or method.has_latents:
        yield from _window_contradictions(valid, settings)
    if method is not None and settings["quantization"] != "none":
        tuning = thought_and_tuning(method, settings)[1]
        yield from _quantization_contradictions(tuning, settings)
    yield from _path_contradictions(valid)
    yield from _running_contradictions(settings)


def _method_contradictions(valid: Mapping[str, Any]) -> Iterator[Contradiction]:
    chosen = [key for key in METHOD_BOOLEANS if valid.get(key)]
    named = valid.get("method")
    if len(chosen) > 1:
        text = f"{', '.join(chosen)}: {len(chosen)} methods are true; set exactly one to true"
    elif named is not None and chosen and chosen[0] != method_of(valid):
        text = f"method: says {named}, but '{chosen[0]}: true' chooses another; keep one of them"
    elif named is None and not chosen:
        text = f"method: is not set; set one of {', '.join(METHOD_BOOLEANS)} to true, or 'method: NAME'"
    else:
        return
    yield METHOD_KEYS, text


def _latent_contradictions(
    method: Method, valid: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[Contradiction]:
    for key in ("c_thought", "max_latent_stage"):
        if settings[key] == 0:
            text = f"{key}: is 0, so method {method} has no latents; set it to at least 1"
            yield METHOD_KEYS | {key}, text
    variant = valid.get("latent_variant")
    if method.is_pause and variant not in (None, "basic", "coconut"):
        text = (
            f"latent_variant: is {variant}, but method {method} always uses thought pause; remove it "
            "(LoRA is 'tuning: lora')"
        )
        yield METHOD_KEYS | {"latent_variant"}, text
    if method.is_pause and valid.get("thought") not in (None, "pause"):
        text = f"thought: is {valid['thought']}, but method {method} always uses pause; remove it"
        yield METHOD_KEYS | {"thought"}, text


def _thought_contradictions(valid: Mapping[str, Any]) -> Iterator[Contradiction]:
    for key, registry in (("thought", "thoughts"), ("latent_supervision", "objectives")):
        name, names = valid.get(key), registered(registry)
        if name is not None and name not in names:
            text = f"{key}: must be one of {', '.join(names)}, got {shown(name)}"
            yield {key}, text + did_you_mean(name, names)
    variant = valid.get("latent_variant")
    for key, meant in zip(("thought", "tuning"), LATENT_VARIANTS.get(str(variant), ()), strict=False):
        if valid.get(key) not in (None, meant):
            text = f"{key}: is {valid[key]}, but latent_variant {variant} means {meant}; keep one of the two"
            yield {key, "latent_variant"}, text


def _window_contradictions(valid: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Contradiction]:
    weights, size = settings["latent_window_weights"], settings["latent_window_size"]
    if "fixed_window" not in (valid.get("thought"), valid.get("latent_variant")):
        return
    if len(weights) != size:
        text = (
            f"{len(weights)} weights {weights} for latent_window_size {size}; give {size}, newest state first"
        )
    elif not weights[0] > 0:
        text = (
            f"{weights} start with 0, and a short row has only the newest state; give a first weight above 0"
        )
    else:
        return
    keys = {"thought", "latent_variant", "latent_window_size", "latent_window_weights"}
    yield keys, f"latent_window_weights: {text}"


def _quantization_contradictions(tuning: str, settings: Mapping[str, Any]) -> Iterator[Contradiction]:
    if tuning == "full":
        text = (
            f"quantization: {settings['quantization']} freezes the weights, but tuning is full, which trains "
            "them; write 'tuning: lora' (QLoRA), or remove quantization"
        )
        yield {"quantization", "tuning", "latent_variant"} | METHOD_KEYS, text
    if settings["lora_use_dora"]:
        text = "lora_use_dora: DoRA needs the weights that 'quantization: nf4' compresses; remove one"
        yield {"quantization", "lora_use_dora"}, text


def _path_contradictions(valid: Mapping[str, Any]) -> Iterator[Contradiction]:
    for key in settings_with("path_to", "data", "weights", "runs"):
        value = str(valid.get(key))
        hub_id = value.partition("://huggingface.co/")[2]
        if value.startswith(("~", "$")):  # `~` has been expanded where there is a home folder
            text = f"{value} stands for no folder here; write the complete path"
        elif re.match(r"(?!hf:/)[a-z0-9]+:/", value):
            is_id = hub_id and key == "model_id"
            advice = f"write '{key}: {hub_id}'" if is_id else "download it, and write the path"
            text = f"{value} is a URL; {advice}"
        else:
            continue
        yield {key}, f"{key}: {text}"


def _running_contradictions(settings: Mapping[str, Any]) -> Iterator[Contradiction]:
    name, epochs, resume = settings.get("name"), settings["num_epochs"], settings["resume"]
    if isinstance(name, str) and (not name.isprintable() or re.search(r"[/\\]|^[~$. ]|[. ]$", name)):
        text = "is not a folder name inside save_path; use letters, digits, '-', '_', '.'"
        yield {"name"}, f"name: {shown(name)} {text}"
    if settings["only_eval"]:
        if settings["load_model_path"] is None:
            text = "load_model_path: is missing, but 'only_eval: true' evaluates a checkpoint; add its path"
            yield {"only_eval", "load_model_path"}, text
        return
    if settings["train_path"] is None:
        yield {"only_eval", "train_path"}, "train_path: is missing; set it to the training data"
    if epochs <= resume:
        text = f"num_epochs: is {epochs}, but resume skips {resume} of them, so none is left"
        yield {"num_epochs", "resume"}, f"{text}; set num_epochs above {resume}"


# Values that mean "off"; CoT files of the published code have them.
OFF = {"c_thought": 0, "max_latent_stage": 0, "epochs_per_stage": 1}
NO_WINDOW = ("last_hidden", "normalized_hidden", "mlp_projection", "pause")


def without_effect(
    method: Method, valid: Mapping[str, Any], defaults: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[str]:
    """One line per reason, with the keys of the file that the method, thought or tuning does not read.

    Defaults and values that mean "off" are not listed.
    """

    def is_set(key: str) -> bool:
        value = valid.get(key)
        if key == "latent_variant":
            return LATENT_VARIANTS.get(str(value), ("last_hidden",))[0] != "last_hidden"
        return key in valid and value != defaults[key] and value != OFF.get(key)

    lines = []
    for reason, keys in unread(method, *thought_and_tuning(method, settings), settings):
        named = [f"{key}: {shown(valid[key])}" for key in keys if is_set(key)]
        if named:
            lines.append(f"{', '.join(named)}: no effect, {reason}")
    skipped = settings["resume"]
    if skipped and settings["load_model_path"] is None and not settings["only_eval"]:
        lines.append(
            f"resume: {skipped} skips the first {skipped} epochs, and load_model_path is None, so epoch "
            f"{skipped + 1} starts from model_id; set load_model_path to weights trained for them"
        )
    return lines


def unread(
    method: Method, thought: str, tuning: str, settings: Mapping[str, Any]
) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield (reason, keys that are not read)."""
    window = settings_with("group", "Latent window")
    if not method.has_latents:
        kept = f"; tuning is {tuning}" if settings.get("latent_variant") and tuning != "full" else ""
        keys = ["thought", "latent_variant", "c_thought", "pad_latent_to_max", "thought_lr"]
        keys += ["latent_supervision", "latent_supervision_weight"]
        yield f"method {method} has no latents{kept}", [*keys, *window, "ablate_after_stage"]
    if not method.has_stages:
        last = [] if method.has_latents else ["max_latent_stage"]
        yield f"method {method} has no stages", ["epochs_per_stage", "advance_at", "uniform_prob", *last]
    if method is not Method.ICOT:
        yield f"method {method} is not icot", ["icot_tokens_per_epoch"]
    elif settings["icot_tokens_per_epoch"] is not None:
        keys = ["epochs_per_stage", "max_latent_stage", "advance_at", "early_stopping_patience"]
        yield "icot_tokens_per_epoch takes the place of stages", keys
    if method.has_latents and thought in NO_WINDOW:
        yield f"thought {thought} has no window", window
    if method.has_latents and thought == "fixed_window":
        yield "thought fixed_window learns no weights", ["latent_window_init"]
    if method.has_latents and thought == "learnable_window":
        yield "thought learnable_window learns its weights", ["latent_window_weights"]
    if method.has_latents and thought in ("last_hidden", "normalized_hidden", "fixed_window"):
        yield f"thought {thought} has no parameters", ["thought_lr"]
    if settings["advance_at"] is None and settings["early_stopping_patience"] is None:
        yield "no stage ends early", ["min_epochs_per_stage"]
    if method.has_latents and settings["latent_supervision"] is None:
        yield "latent_supervision is not set", ["latent_supervision_weight"]
    if tuning == "full":
        yield "tuning is full, not lora", settings_with("group", "LoRA")
