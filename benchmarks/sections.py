"""What docs/benchmarks.md and README say about each result.

Knows: the records that the benchmarks print.  Does not know: files, pictures.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_section import gpu_text
from benchmarks.memory_sections import engine_text, quantized_text
from coconut_ds.evaluation.intervals import wilson_interval

MB = 1e6
STEP_NAMES = {
    "textbook": "textbook loop, as published",
    "single_pass": "one ordinary pass, no latents",
    "coconut_ds": "coconut_ds",
    "coconut_ds+checkpointing": "coconut_ds + activation checkpointing",
}
SHAPES = {
    "train_step": "8 rows x 64 question tokens, 6 latents, 16 labels",
    "train_step_prosqa": "4 rows x 430 question tokens, 6 latents, 12 labels",
}


@dataclass(frozen=True)
class Section:
    """One heading of docs/benchmarks.md."""

    name: str  # of the JSON
    title: str
    about: str
    command: str  # while there is no JSON
    text: Callable[[Any], str]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; columns after the first are numbers."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def step_text(result: Any) -> str:
    rows = [
        (
            STEP_NAMES.get(record["variant"], record["variant"].replace("coconut_ds-", "without ")),
            f"{record['seconds']:.2f} ({record['seconds_min']:.2f} to {record['seconds_max']:.2f})",
            f"{record['time_over_single_pass']:.2f}",
            f"{record['peak_bytes'] / MB:,.0f}",
            f"{record['peak_over_single_pass']:.2f}",
            f"{record['peak_over_textbook']:.2f}",
        )
        for record in result["records"]
    ]
    head = ("variant", "seconds (least to most)", "time / one pass", "peak MB", "peak / one pass")
    return table((*head, "peak / textbook"), rows)


def launches_text(result: Any) -> str:
    records = result["records"]
    theirs = {(r["model"], r["latents"]): r for r in records if r["variant"] == "textbook"}
    rows = [
        (
            f"{record['model']}, {record['latents']} latents",
            STEP_NAMES[record["variant"]],
            f"{record['forward']:,}",
            f"{record['backward']:,}",
            f"{record['operators']:,}",
            f"{record['operators'] / theirs[record['model'], record['latents']]['operators']:.2f}",
            f"{record['cpu_ms']:.1f}",
            f"{record['cpu_ms'] / theirs[record['model'], record['latents']]['cpu_ms']:.2f}",
        )
        for record in records
    ]
    head = ("model", "variant", "forward", "backward", "operators", "/ textbook", "host CPU ms", "/ textbook")
    return table(head, rows)


def plan_text(result: Any) -> str:
    records = result["records"]
    keys = (
        "model",
        "tuning",
        "method",
        "thought",
        "activation_checkpointing",
        "precision",
        "rows",
        "question",
    )
    units = {"rows": " rows", "question": " tokens"}
    rows = [
        (
            ", ".join(f"{record[key]}{units.get(key, '')}" for key in keys if key in record),
            f"{record['planned_bytes'] / MB:,.1f}",
            f"{record['measured_bytes'] / MB:,.1f}",
            f"{100 * record['error']:+.2f} %",
        )
        for record in records
    ]
    return (
        f"Largest error {percent(largest_error(records))} of {len(records)} cases.\n\n"
        "<details><summary>every case</summary>\n\n"
        f"{table(('case', 'planned MB', 'measured MB', 'error'), rows)}\n\n</details>"
    )


def largest_error(records: Sequence[Mapping[str, Any]]) -> float:
    return max(abs(record["error"]) for record in records)


def decode_text(result: Any) -> str:
    (record,) = result["records"]
    ours, theirs = (1000 * record[f"seconds_per_prompt_{how}"] for how in ("batched", "one_by_one"))
    return (
        f"{record['times_faster']:.1f} times as fast: {ours:.0f} ms a prompt against {theirs:.0f} ms. "
        f"{record['equal_tokens']} compared tokens are equal."
    )


def startup_text(result: Any) -> str:
    (record,) = result["records"]
    seconds, cpu = record["seconds"], record["cpu_seconds"]
    rows = [
        (phase.replace("_", " "), f"{seconds[phase]:.2f}", f"{cpu[phase]:.2f}" if phase in cpu else "")
        for phase in seconds
    ]
    return table(("phase", "seconds", "CPU seconds of rank 0"), rows)


def switch_text(result: Any) -> str:
    rows = [
        (f"{record['items']:,} problems", f"{record['switch_seconds']:.3f}", record["whole_epoch_seconds"])
        for record in result["records"]
    ]
    return table(("", "switch, seconds", "laying out the whole epoch, seconds"), rows)


def checkpoint_text(result: Any) -> str:
    (record,) = result["records"]
    rows = [
        ("save", f"{record['bytes'] / MB:,.0f}", record["save_seconds"]),
        ("load and verify", f"{record['bytes'] / MB:,.0f}", record["load_seconds"]),
        ("torch.save", f"{record['torch_save_bytes'] / MB:,.0f}", record["torch_save_seconds"]),
    ]
    return table((f"{record['parameters'] / 1e6:.0f} M parameters", "MB", "seconds"), rows)


def overhead_text(result: Any) -> str:
    rows = [
        (
            f"{record['case']}, {record['ds_config']}",
            f"{record['bare_ms']:.1f}",
            f"{record['engine_ms']:.1f}",
            f"{record['engine_over_bare']:.2f}",
        )
        for record in result["records"]
    ]
    return table(("", "bare loop, ms", "engine, ms", "engine / bare"), rows)


def scaling_text(result: Any) -> str:
    sizes = [record for record in result["records"] if record["axis"] == "size"]
    rows = [
        (
            f"{record['size']}, {record['parameters'] / 1e6:.0f} M",
            STEP_NAMES[record["variant"]],
            f"{record['seconds']:.2f}",
            f"{record['peak_bytes'] / MB:,.0f}",
        )
        for record in sizes
    ]
    picture = "![peak memory and time over latents, rows and question length](pictures/scaling.png)"
    return f"{picture}\n\n{table(('model', 'variant', 'seconds', 'peak MB'), rows)}"


RUN_NAMES = {
    "coconut": "Coconut, latents supervised",
    "plain": "Coconut, the paper's loss",
    "no_thoughts": "steps hidden, no latents",
    "no_cot": "no CoT",
}
LEARNED = 0.95
RANKS = {1: "", 2: ", two ranks"}


def seed_shares(records: Sequence[Mapping[str, Any]]) -> str:
    """One row per kind of run: how many seeds learned the task, and what other latents leave of it."""
    rows = []
    for (run, name), ranks in itertools.product(RUN_NAMES.items(), (1, 2)):
        own = [record for record in records if (record["run"], record["ranks"]) == (run, ranks)]
        if tests := [record["test"] for record in own]:
            learned = sum(test >= LEARNED for test in tests)
            low, high = wilson_interval(learned, len(tests))
            swaps = [record["swap"] for record in own if record["swap"] is not None]
            share = f"{learned} of {len(tests)} ({100 * low:.0f} to {100 * high:.0f} %)"
            rows.append((f"{name}{RANKS[ranks]}", share, _range(tests), _range(swaps)))
    head = (
        "every step hidden",
        "seeds at 95 % or more",
        "test accuracy",
        "another question's latents",
    )
    return table(head, rows)


def _range(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    low, high = percent(min(shares)), percent(max(shares))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def seeds_text(result: Any) -> str:
    records = result["records"]
    found = {(record["run"], record["seed"], record["ranks"]): record for record in records}
    stages = sorted({stage for record in records for stage in record["stages"]}, key=int)
    rows = []
    for (run, seed, ranks), record in found.items():
        if run not in ("coconut", "plain"):
            continue
        controls = [found.get((name, seed, ranks), {}).get("test") for name in ("no_thoughts", "no_cot")]
        rows.append(
            (
                f"{run}, seed {seed}{RANKS[ranks]}",
                *(percent(record["stages"].get(stage)) for stage in stages),
                percent(record["test"]),
                record["epoch_learned"] or "never",
                percent(record["swap"]),
                *map(percent, controls),
            )
        )
    head = (
        "validation",
        *(f"stage {stage}" for stage in stages),
        "test",
        "last stage's epoch with 95 %",
    )
    head += ("another question's latents", "no latents, test", "no CoT, test")
    picture = "![accuracy by stage](pictures/seeds.png)"
    return f"{seed_shares(records)}\n\n{picture}\n\n{table(head, rows)}"


def variants_text(result: Any) -> str:
    seeds = sorted({record["seed"] for record in result["records"]})
    by_label: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in result["records"]:
        by_label.setdefault(record["label"], {})[record["seed"]] = record
    rows = [
        (label, *(percent(found[seed]["test"]) if seed in found else "not measured" for seed in seeds))
        for label, found in by_label.items()
    ]
    return table(("test accuracy", *(f"seed {seed}" for seed in seeds)), rows)


SECTIONS = (
    Section(
        "train_step", "A training step, GPT-2 124M, short questions",
        f"Forward and backward, fp32, two threads, {SHAPES['train_step']}; peak above weights and gradients.",
        "python -m benchmarks.train_step", step_text,
    ),
    Section(
        "train_step_prosqa", "A training step, GPT-2 124M, ProsQA's length",
        f"The same with {SHAPES['train_step_prosqa']}.",
        "python -m benchmarks.train_step --rows 4 --question 430 --answer 12", step_text,
    ),
    Section(
        "scaling", "Scaling",
        "The same measurement over latents, rows, question length and model size, around 4 rows x 64 "
        "question tokens, 6 latents, 16 labels.",
        "python -m benchmarks.scaling", scaling_text,
    ),
    Section(
        "launches", "Operators and host time",
        "Operators of one step (forward and backward, gradients allocated) that launch a kernel; views and "
        "metadata are left out. Tiny tensors, one thread: the time is the host's. GPT-2 with 12 layers, a "
        "Llama with 16 and grouped queries. On a GPU an operator may be several kernels.",
        "python -m benchmarks.launches", launches_text,
    ),
    Section(
        "plan_accuracy", "Planned against measured activations",
        "What `plan` predicts without storage, against the allocator's own events.",
        "python -m benchmarks.plan_accuracy", plan_text,
    ),
    Section(
        "decode", "Decoding",
        "64 prompts of 64 tokens in one batch with a cache, against the published decoder: one prompt at "
        "a time, the whole prefix for every token. GPT-2 124M, 6 latents, 64 new tokens.",
        "python -m benchmarks.decode", decode_text,
    ),
    Section(
        "startup", "Start-up",
        "From the command to the first optimizer step of the quickstart, two ranks on the CPU, operators "
        "compiled.",
        "python -m benchmarks.startup", startup_text,
    ),
    Section(
        "stage_switch", "Stage switch",
        "Between the last step of one stage and the first of the next, GSM8K's sizes.",
        "python -m benchmarks.stage_switch", switch_text,
    ),
    Section(
        "checkpoint", "Checkpoints",
        "GPT-2 124M with its optimizer, ZeRO-2 with offload, hashed and on the disk, beside a plain file.",
        "python -m benchmarks.checkpoint", checkpoint_text,
    ),
    Section(
        "engine_overhead", "The engine against a bare loop",
        "One optimizer step of the same model on the same batch, one process.",
        "python -m benchmarks.engine_overhead", overhead_text,
    ),
    Section(
        "seeds", "Quickstart seeds",
        "The runs of launch/quickstart.sh (quickstart.md), each in one process, with other seeds. "
        "Intervals are 95 % (Wilson). Accuracy with another question's latents is on the validation set; "
        "chance is 14 %.",
        "python -m benchmarks.seeds", seeds_text,
    ),
    Section(
        "variants", "All methods and thoughts on the quickstart task",
        "Measured on the quickstart's task and recipe of before 2026-11-27 (chains of sums modulo 10). "
        "LoRA starts from the CoT run of its seed.",
        "python -m benchmarks.variants", variants_text,
    ),
    Section(
        "engine_bytes", "Planned against measured engine states",
        "GPT-2, 4 layers of width 256, under DeepSpeed on the CPU: states, and peaks of a micro-batch and a "
        "step beyond them. 8+4+4: moments, master weights, gradients; alone: `fp32_optimizer_states: false`.",
        "python -m benchmarks.engine_bytes", engine_text,
    ),
    Section(
        "quantized", "4-bit weights and 8-bit moments",
        "20 steps in bf16 on the CPU, straight against killed and resumed: numbers and weights to the last "
        "digit. Stock transformers and PEFT read the exports (QLoRA: adapter, merged). Memory by `profile`, "
        "GPU and host together.",
        "python -m benchmarks.quantized", quantized_text,
    ),
    Section("gpu", "GPU", "One script of nine minutes.", "python -m benchmarks.gpu", gpu_text),
)  # fmt: skip


def readme_block(results: Mapping[str, Any]) -> str:
    """README's results, short; everything else is in docs/benchmarks.md."""
    parts = [
        readme_steps(results),
        readme_accuracy(results.get("seeds")),
        f"**Planning**: {readme_plan(results.get('plan_accuracy'))}. `python -m benchmarks.plan_accuracy`",
        f"**Decoding**, GPT-2 124M, 64 prompts: {readme_decode(results.get('decode'))}. "
        "`python -m benchmarks.decode`",
        f"**GPU**: {'[measured](docs/benchmarks.md#gpu)' if 'gpu' in results else 'not measured'}. "
        "`python -m benchmarks.gpu`",
        "All numbers, machines and versions: [docs/benchmarks.md](docs/benchmarks.md).",
    ]
    return "\n\n".join(parts) + "\n"


def readme_steps(results: Mapping[str, Any]) -> str:
    found = {name: results[name] for name in SHAPES if name in results}
    title = "**A training step** (forward and backward, GPT-2 124M, fp32, two CPU threads"
    if not found:
        return f"{title}): not measured. `python -m benchmarks.train_step`"
    rows = []
    for variant, name in STEP_NAMES.items():
        cells = [name]
        for result in found.values():
            record = next((r for r in result["records"] if r["variant"] == variant), None)
            cells += (
                [f"{record['peak_bytes'] / MB:,.0f} MB", f"{record['time_over_single_pass']:.2f}"]
                if record
                else ["", ""]
            )
        rows.append(cells)
    short = {"train_step": "8 rows x 64 tokens", "train_step_prosqa": "4 rows x 430 tokens"}
    head = ["6 latents", *(cell for name in found for cell in (f"{short[name]}: peak", "time / one pass"))]
    said = f"{title}; peak above weights and gradients). `python -m benchmarks.train_step`"
    return f"{said}\n\n{table(head, rows)}"


def readme_accuracy(result: Any) -> str:
    title = "**Quickstart accuracy**"
    if result is None:
        return f"{title}: not measured. `python -m benchmarks.seeds`"
    said = (
        f"{title} (chains of sums and products; chance is 14 %; "
        "[every seed](docs/benchmarks.md#quickstart-seeds))."
    )
    return f"{said} `python -m benchmarks.seeds`\n\n{seed_shares(result['records'])}"


def readme_plan(result: Any) -> str:
    if result is None:
        return "not measured"
    records = result["records"]
    return (
        f"predicted activation memory is within {percent(largest_error(records))} of the measured in "
        f"{len(records)} cases"
    )


def readme_decode(result: Any) -> str:
    if result is None:
        return "not measured"
    return f"{result['records'][0]['times_faster']:.1f} times as fast as the published decoder"
