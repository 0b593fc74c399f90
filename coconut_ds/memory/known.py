"""Shapes of well-known models, sizes of GPUs and lengths of data sets, for plans without network and data."""

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from coconut_ds.config.deepspeed import MIN_GPU_MIB
from coconut_ds.errors import ConfigError

# The settings behind each word of --tuning.
TUNINGS = {
    "full": ["tuning=full", "quantization=none"],
    "lora": ["tuning=lora", "quantization=none"],
    "qlora": ["tuning=lora", "quantization=nf4"],
}
CUSTOM = ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocab")


@cache
def known() -> Mapping[str, Any]:
    """known.json."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def short(model_id: str) -> str:
    """The name by which a built-in shape is known: 'Qwen/Qwen2.5-7B-Instruct' -> 'qwen2.5-7b'."""
    return re.sub(r"-(instruct|base|it)$", "", model_id.rpartition("/")[2].lower())


def find_gpu(name: str) -> Mapping[str, Any]:
    """The entry of a GPU, by a name such as 'rtx 3060' or '2080ti', or one of so many MiB.

    Raises ConfigError.
    """
    if name.isdecimal():
        if int(name) < MIN_GPU_MIB:
            raise ConfigError(f"--gpu {name}: is {name} MiB; for {name} GiB write --gpu {int(name) * 1024}")
        return {"name": f"GPU of {int(name):,} MiB", "mib": int(name), "compute_capability": "inf"}
    gpus = {_letters(gpu["name"]): gpu for gpu in known()["gpus"]}
    wanted = _letters(name)
    matches = [gpu for key, gpu in gpus.items() if wanted and wanted in key]
    if _letters(name) in gpus:
        return gpus[wanted]
    if len(matches) == 1:
        return matches[0]
    near = matches or [gpus[key] for key in get_close_matches(wanted, gpus, 3)] or known()["gpus"]
    names = ", ".join(gpu["name"] for gpu in near)
    raise ConfigError(
        f"--gpu: {name} is not one GPU of the table; write one of: {names}; or for another GPU its MiB, as "
        "nvidia-smi shows them: --gpu 12282"
    )


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
