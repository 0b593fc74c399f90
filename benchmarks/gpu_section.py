"""What docs/benchmarks.md says about a run of benchmarks/gpu.py."""

from collections.abc import Mapping, Sequence
from typing import Any

MIB = 2**20
TITLES = {
    "a": "Equal to the textbook loop",
    "c": "Speed over ProsQA's curriculum",
    "c host": "Host and kernel milliseconds of a step, six latents",
    "d": "Largest model, ZeRO-2 with offload, one row, activation checkpointing",
    "f": "The engine: overlapped communication, 16 bits beside fp32, DeepSpeed's launcher",
    "b": "Largest micro-batch, GPT-2 124M, weights and gradients on the GPU",
    "e": "Learning",
}


def gpu_text(result: Any) -> str:
    """A table a part: the cases, and whatever numbers each has."""
    records = result["records"]
    parts = [f"{records[0]['device']}."]
    for part, title in TITLES.items():
        letter, _, kind = part.partition(" ")
        own = [r for r in records if r["part"] == letter and (" host " in r["case"]) == bool(kind)]
        limit = own[0]["limit_gib"] if own else None
        where = f"{title}, at most {limit:g} GiB" if limit else title
        parts.append(f"### {where}\n\n{part_table(own) if own else 'Not measured.'}")
    return "\n\n".join(parts)


def part_table(records: Sequence[Mapping[str, Any]]) -> str:
    hidden = {"part", "case", "device", "tiny", "limit_gib", "took_seconds", "unfinished"}
    keys = list(dict.fromkeys(key for record in records for key in record if key not in hidden))
    lines = [f"| case | {' | '.join(key.replace('_', ' ') for key in keys)} |", "|---|" + "---:|" * len(keys)]
    for record in records:
        cells = [shown(key, record[key]) if key in record else "" for key in keys]
        lines.append(f"| {record['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(key: str, value: Any) -> str:
    """A cell: bytes as MiB, nested numbers in a line."""
    if value is None:
        return "not measured"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(name, inner)}" for name, inner in value.items())
    if key.endswith("_bytes"):
        return f"{value / MIB:,.0f} MiB"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
