"""The training methods and thoughts, and every way in which a YAML may name them.

Knows: names.  Does not know: what a method does (curriculum.py) or a thought computes (thoughts/).
"""

import pkgutil
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any


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
    def has_stages(self) -> bool:
        return self in (Method.COCONUT, Method.NO_THOUGHTS, Method.ICOT, Method.PAUSE_AS_THOUGHT)

    @property
    def is_pause(self) -> bool:
        return self in (Method.PAUSE, Method.PAUSE_AS_THOUGHT)


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


def method_of(valid: Mapping[str, Any]) -> Method | None:
    """The one method that the settings name; None where they name none or several."""
    named = valid.get("method")
    if named is not None:
        return Method.NO_THOUGHTS if named == "without_thought" else Method(named)
    chosen = [key for key in METHOD_BOOLEANS if valid.get(key)]
    return Method(chosen[0]) if len(chosen) == 1 else None


def has_published_keys(values: Mapping[str, Any]) -> bool:
    """Whether a file names its method as the published code does: by the four booleans alone."""
    return values.get("method") is None and any(key in values for key in METHOD_BOOLEANS)


def thought_and_tuning(method: Method, settings: Mapping[str, Any]) -> tuple[str, str]:
    """What the two keys, `latent_variant` and the method say together."""
    thought, tuning = LATENT_VARIANTS.get(settings["latent_variant"], ("last_hidden", "full"))
    tuning = settings["tuning"] or tuning
    if not method.has_latents:
        return "last_hidden", tuning
    return settings["thought"] or ("pause" if method.is_pause else thought), tuning


def thought_names() -> list[str]:
    """Modules of thoughts/: the folder is the registry, so a new file needs no second edit."""
    folder = str(Path(__file__).parents[1] / "thoughts")
    return sorted(module.name for module in pkgutil.iter_modules([folder]) if not module.name.startswith("_"))
