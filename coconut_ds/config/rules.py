"""Experiment settings that are valid alone and contradict each other.

Every rule yields (the keys it reads, the error), so the caller can skip rules whose keys already failed the
schema.  `valid` holds the valid settings of the file, `settings` also the defaults.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from coconut_ds.config.methods import LATENT_VARIANTS, METHOD_BOOLEANS, Method, method_of, thought_names
from coconut_ds.config.schemas import did_you_mean, shown


def contradictions(valid: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    """Yield (keys the rule reads, error) for every contradiction."""
    yield from _method_contradictions(valid)
    method = method_of(valid)
    if method is not None:
        yield from _latent_contradictions(method, valid, settings)
    yield from _thought_contradictions(valid)
    if method is None or method.has_latents:
        yield from _window_contradictions(valid, settings)
    yield from _running_contradictions(settings)
    yield from _name_errors(settings)


def _method_contradictions(valid: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    keys = {"method", *METHOD_BOOLEANS}
    chosen = [key for key in METHOD_BOOLEANS if valid.get(key)]
    named = valid.get("method")
    if len(chosen) > 1:
        yield keys, f"{', '.join(chosen)}: {len(chosen)} methods are true; set exactly one to true"
    elif named is not None and chosen and chosen[0] != method_of(valid):
        yield keys, f"method: says {named}, but '{chosen[0]}: true' chooses another; keep one of them"
    elif named is None and not chosen:
        yield (
            keys,
            f"method: is not set; set one of {', '.join(METHOD_BOOLEANS)} to true, or 'method: NAME'",
        )


def _latent_contradictions(
    method: Method, valid: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[set[str], str]]:
    keys = {"method", *METHOD_BOOLEANS}
    if method.has_latents:
        for key in ("c_thought", "max_latent_stage"):
            if settings[key] == 0:
                yield (
                    keys | {key},
                    f"{key}: is 0, so method {method} has no latents; set it to at least 1",
                )
    variant = valid.get("latent_variant")
    if variant not in (None, "basic", "coconut") and method.is_pause:
        text = (
            f"latent_variant: is {variant}, but method {method} always uses thought pause; remove it "
            "(LoRA is 'tuning: lora')"
        )
        yield keys | {"latent_variant"}, text
    if method.is_pause and valid.get("thought") not in (None, "pause"):
        yield (
            keys | {"thought"},
            f"thought: is {valid['thought']}, but method {method} always uses pause; remove it",
        )


def _thought_contradictions(valid: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    thought, names = valid.get("thought"), thought_names()
    if thought is not None and thought not in names:
        text = (
            f"thought: must be one of {', '.join(names)}, got {shown(thought)}{did_you_mean(thought, names)}"
        )
        yield {"thought"}, text
    variant = valid.get("latent_variant")
    for key, meant in zip(("thought", "tuning"), LATENT_VARIANTS.get(str(variant), ()), strict=False):
        if valid.get(key) not in (None, meant):
            text = f"{key}: is {valid[key]}, but latent_variant {variant} means {meant}; keep one of the two"
            yield {key, "latent_variant"}, text


def _window_contradictions(
    valid: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[set[str], str]]:
    keys = {"thought", "latent_variant", "latent_window_size", "latent_window_weights"}
    weights, size = settings["latent_window_weights"], settings["latent_window_size"]
    if "fixed_window" not in (valid.get("thought"), valid.get("latent_variant")):
        return
    if len(weights) != size:
        yield (
            keys,
            (
                f"latent_window_weights: {len(weights)} weights {weights} for latent_window_size {size}; "
                f"give {size}, newest state first"
            ),
        )
    elif not weights[0] > 0:
        text = (
            f"latent_window_weights: {weights} start with 0, and a short row has only the newest state; "
            "give a first weight above 0"
        )
        yield keys, text


def _running_contradictions(settings: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    if settings["only_eval"]:
        if settings["load_model_path"] is None:
            text = "load_model_path: is missing, but 'only_eval: true' evaluates a checkpoint; add its path"
            yield {"only_eval", "load_model_path"}, text
        return
    if settings["train_path"] is None:
        yield {"only_eval", "train_path"}, "train_path: is missing; set it to the training data"
    if settings["num_epochs"] <= settings["resume"]:
        yield (
            {"num_epochs", "resume"},
            (
                f"num_epochs: is {settings['num_epochs']}, but resume skips {settings['resume']} of them, "
                f"so none is left; set num_epochs above {settings['resume']}"
            ),
        )


def _name_errors(settings: Mapping[str, Any]) -> Iterator[tuple[set[str], str]]:
    name = settings.get("name")
    if isinstance(name, str) and (
        any(character in "/\\" or not character.isprintable() for character in name)
        or name.strip(". ") != name
    ):
        text = (
            f"name: {shown(name)} is not a folder name inside save_path; use letters, digits, '-', '_', '.'"
        )
        yield {"name"}, text
