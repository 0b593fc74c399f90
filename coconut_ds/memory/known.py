"""Shapes of well-known models, sizes of GPUs and lengths of data sets, for plans without network and data."""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoConfig, PretrainedConfig

from coconut_ds.config.deepspeed import DeepSpeedConfig
from coconut_ds.data.tokenizer import is_on_this_machine
from coconut_ds.errors import ConfigError
from coconut_ds.memory.budget import RESERVED_MIB
from coconut_ds.memory.planner import GIB, TextShape
from coconut_ds.model.loading import load_config

CUSTOM = ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocab")


@cache
def known() -> Mapping[str, Any]:
    """known.json."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def short(model_id: str) -> str:
    """The name by which a built-in shape is known: 'Qwen/Qwen2.5-7B-Instruct' -> 'qwen2.5-7b'."""
    return re.sub(r"-(instruct|base|it)$", "", model_id.rpartition("/")[2].lower())


def built_in_config(model_id: str) -> PretrainedConfig | None:
    """The configuration of a model with a built-in shape."""
    shape = next((model for model in known()["models"] if short(model["id"]) == short(model_id)), None)
    if shape is None:
        return None
    values = {**known()["families"][shape["family"]], **shape}
    for key in ("id", "family", "parameters"):
        del values[key]
    return AutoConfig.for_model(**values)


def config_of(model_id: str) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """A configuration from this machine, else a built-in shape, else from the hub; and a note.

    `model_id` may be a config.json.  Raises ConfigError.
    """
    path = Path(model_id).expanduser()
    if path.suffix == ".json" and path.is_file():
        return load_config(str(path)), ()
    if not is_on_this_machine(model_id) and (config := built_in_config(model_id)) is not None:
        return config, (f"{model_id} is not on this machine; planned with its built-in shape",)
    try:
        return load_config(model_id), ()
    except ConfigError as error:
        names = ", ".join(model["id"].rpartition("/")[2] for model in known()["models"])
        raise ConfigError(
            f"{error}\n  built-in shapes: {names}; or --layers N --hidden N --heads N"
        ) from error


def custom_config(args: argparse.Namespace) -> PretrainedConfig | None:
    """A Llama of the size given by --layers, --hidden, --heads, ..., or None.  Raises ConfigError."""
    layers, hidden, heads, kv_heads, intermediate, vocab = (getattr(args, name) for name in CUSTOM)
    if not any(getattr(args, name) for name in CUSTOM):
        return None
    if not (layers and hidden and heads):
        raise ConfigError("a model of your own needs --layers N --hidden N --heads N")
    if min(layers, hidden, heads) < 1 or hidden % heads or heads % (kv_heads or heads):
        raise ConfigError("--hidden must be a multiple of --heads, and --heads of --kv-heads")
    return AutoConfig.for_model(
        "llama",
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        intermediate_size=intermediate or 4 * hidden,
        vocab_size=vocab or 50_257,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )


def text_of(data: str) -> TextShape:
    """The built-in lengths of a data set."""
    return TextShape(**known()["texts"][data])


def with_machine(ds_config: DeepSpeedConfig, gpu: str | None, host_gib: float | None) -> DeepSpeedConfig:
    """The DeepSpeed config with the budget of a named GPU and of a host.  Raises ConfigError."""
    budget = ds_config.memory_budget
    if budget is None or (gpu is None and host_gib is None):
        return ds_config
    if gpu is not None:
        found = find_gpu(gpu)
        host_gib = host_gib or round(psutil.virtual_memory().total / GIB, 1)
        budget = replace(
            budget,
            device=found["name"],
            gpu_memory_mib=found["mib"],
            reserved_mib=RESERVED_MIB,
            components_mib={},
        )
    host_gib = budget.host_memory_gib if host_gib is None else host_gib
    return replace(ds_config, memory_budget=replace(budget, host_memory_gib=host_gib))


def find_gpu(name: str) -> Mapping[str, Any]:
    """The entry of a GPU, by a name such as 'rtx 3060' or '2080ti'.  Raises ConfigError."""
    gpus = {_letters(gpu["name"]): gpu for gpu in known()["gpus"]}
    wanted = _letters(name)
    matches = [gpu for key, gpu in gpus.items() if wanted and wanted in key]
    if _letters(name) in gpus:
        return gpus[wanted]
    if len(matches) == 1:
        return matches[0]
    near = matches or [gpus[key] for key in get_close_matches(wanted, gpus, 3)] or known()["gpus"]
    names = ", ".join(gpu["name"] for gpu in near)
    raise ConfigError(f"--gpu: {name} is not one GPU of the table; write one of: {names}")


def precision_note(gpu: str, precision: str) -> str | None:
    """Why a precision is slow or refused on a GPU of the table."""
    capability = float(find_gpu(gpu)["compute_capability"])
    if precision == "bf16" and capability < 8:
        instead = "fp16" if capability >= 7 else "fp32"
        return f"{gpu} (compute capability {capability}) only emulates bf16; use {instead}"
    if precision == "fp16" and capability < 7:
        return f"DeepSpeed refuses fp16 on {gpu} (compute capability {capability}); use fp32"
    return None


def _letters(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
