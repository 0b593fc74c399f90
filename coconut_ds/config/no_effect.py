"""Valid settings without effect, because the chosen method, thought or tuning does not read them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coconut_ds.config.methods import LATENT_VARIANTS, Method, thought_and_tuning
from coconut_ds.config.schemas import settings_with, shown

# Values that mean "off"; CoT files of the published code have them.
OFF = {"c_thought": 0, "max_latent_stage": 0, "epochs_per_stage": 1}
NO_WINDOW = ("last_hidden", "mlp_projection", "pause")


def without_effect(
    method: Method, given: Mapping[str, Any], defaults: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[str]:
    """One line per reason, with the keys of the file that have no effect.

    `given` holds the settings of the file.  Defaults and values that mean "off" are not listed.
    """
    thought, tuning = thought_and_tuning(method, settings)
    lines = []
    for reason, keys in unread(method, thought, tuning, settings):
        named = [f"{key}: {shown(given[key])}" for key in keys if _is_set(key, given, defaults)]
        if named:
            lines.append(f"{', '.join(named)}: no effect, {reason}")
    return lines


def _is_set(key: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    value = given.get(key)
    if key == "latent_variant":
        return LATENT_VARIANTS.get(str(value), ("last_hidden",))[0] != "last_hidden"
    return key in given and value != defaults[key] and value != OFF.get(key)


def unread(
    method: Method, thought: str, tuning: str, settings: Mapping[str, Any]
) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield (reason, keys that are not read)."""
    window = settings_with("group", "Latent window")
    if not method.has_latents:
        kept = f"; tuning is {tuning}" if settings.get("latent_variant") and tuning != "full" else ""
        yield (
            f"method {method} has no latents{kept}",
            ("thought", "latent_variant", "c_thought", "pad_latent_to_max", "thought_lr", *window)
            + ("ablate_after_stage",),
        )
    if not method.has_stages:
        last = () if method.has_latents else ("max_latent_stage",)
        yield f"method {method} has no stages", ("epochs_per_stage", "uniform_prob", *last)
    if method is not Method.ICOT:
        yield f"method {method} is not icot", ["icot_tokens_per_epoch"]
    elif settings["icot_tokens_per_epoch"] is not None:
        yield "icot_tokens_per_epoch takes the place of stages", ["epochs_per_stage", "max_latent_stage"]
    if method.has_latents:
        yield from _unread_by_thought(thought)
    if tuning == "full":
        yield "tuning is full, not lora", settings_with("group", "LoRA")


def _unread_by_thought(thought: str) -> Iterator[tuple[str, Sequence[str]]]:
    if thought in NO_WINDOW:
        yield f"thought {thought} has no window", settings_with("group", "Latent window")
    if thought == "fixed_window":
        yield "thought fixed_window learns no weights", ["latent_window_init"]
    if thought == "learnable_window":
        yield "thought learnable_window learns its weights", ["latent_window_weights"]
    if thought in ("last_hidden", "fixed_window"):
        yield f"thought {thought} has no parameters", ["thought_lr"]
