"""Names of training methods and thoughts, and every way a YAML can choose them."""

import pkgutil
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any


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


def thought_names() -> list[str]:
    """The modules of thoughts/, which is the registry."""
    folder = str(Path(__file__).parents[1] / "thoughts")
    return sorted(module.name for module in pkgutil.iter_modules([folder]) if not module.name.startswith("_"))
