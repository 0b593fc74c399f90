"""LoRA through PEFT: adapters, the three special-token rows that train with them, files and merging."""

from coconut_ds.model.lora.adapters import (
    Origin,
    add_adapters,
    assert_tied,
    default_target_modules,
    merge,
    parameter_groups,
    trainable_parameters,
)
from coconut_ds.model.lora.files import (
    THOUGHT_FILE,
    install_thought,
    is_published_lora,
    load_adapter,
    load_published_lora,
    origin_of,
    read_origin,
    read_published_window,
    save_adapter,
    save_thought,
)

__all__ = [
    "THOUGHT_FILE",
    "Origin",
    "add_adapters",
    "assert_tied",
    "default_target_modules",
    "install_thought",
    "is_published_lora",
    "load_adapter",
    "load_published_lora",
    "merge",
    "origin_of",
    "parameter_groups",
    "read_origin",
    "read_published_window",
    "save_adapter",
    "save_thought",
    "trainable_parameters",
]
