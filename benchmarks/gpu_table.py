"""Plan the table of ds_configs/README.md: which file for which model and GPU, and how many rows fit.

    python -m benchmarks.gpu_table [--write]

Text: GSM8K's size (rows of up to 298 columns), Coconut with up to six latents, accumulated micro-batches, two
GPUs and 64 GiB of host memory.  Of each GPU's files, fastest first, the table names the first that fits
MIN_ROWS rows, else the one that fits most.  `--write` replaces the table.  Takes half an hour of CPU time.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import Experiment, load_experiment
from coconut_ds.memory.cases import built_in_config, text_of, with_machine
from coconut_ds.memory.fit import max_rows
from coconut_ds.memory.known import short
from coconut_ds.memory.planner import GIB, MIB, Planner
from coconut_ds.tables import Table

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "ds_configs/README.md"
MARKERS = re.compile(r"(<!-- gpu table -->\n).*?(<!-- end -->)", re.DOTALL)
MIN_ROWS, RANKS, HOST_GIB = 4, 2, 64
# The files of each GPU for full tuning and LoRA, fastest first, and the file for QLoRA.
FILES = {
    "GTX 1080 Ti": (
        ("zero2", "zero2_offload", "zero2_offload_recompute", "zero3_offload"),
        ("zero2", "zero2_offload_recompute"),
    ),
    "RTX 2080 Ti": (
        ("zero2_offload_fp16", "zero2_adam8bit_fp16", "zero2_offload_fp16_checkpointing"),
        ("zero2_qlora_fp16",),
    ),
    "RTX 3060": (
        ("zero2_offload_bf16", "zero2_adam8bit_bf16", "zero2_offload_bf16_checkpointing"),
        ("zero2_qlora_bf16",),
    ),
}
MODELS = {
    "openai-community/gpt2": ("full", "lora"),
    "openai-community/gpt2-medium": ("full", "lora"),
    "openai-community/gpt2-large": ("full", "lora"),
    "openai-community/gpt2-xl": ("full", "lora"),
    "meta-llama/Llama-3.2-1B": ("full", "lora"),
    "Qwen/Qwen2.5-0.5B": ("full", "lora"),
    "Qwen/Qwen2.5-1.5B": ("full", "lora", "qlora"),
    "Qwen/Qwen2.5-7B": ("qlora",),
}


def experiment_of(model: str, tuning: str) -> Experiment:
    """The shipped GSM8K run with this model, in micro-batches of MIN_ROWS rows."""
    settings = [f"batch_size_training={MIN_ROWS}", f"gradient_accumulation_steps={64 // MIN_ROWS}"]
    settings += [f"batch_size_eval={MIN_ROWS}", f"model_id={model}"]
    settings += [f"tuning={'full' if tuning == 'full' else 'lora'}"]
    settings += [f"quantization={'nf4' if tuning == 'qlora' else 'none'}"]
    return load_experiment(ROOT / "configs/full/gsm_coconut.yaml", settings)


def planner_of(model: str, tuning: str) -> Planner:
    return Planner.of(experiment_of(model, tuning), text_of("gsm"), config=built_in_config(model))


def cell(planner: Planner, experiment: Experiment, files: tuple[str, ...]) -> str:
    """The first file that fits MIN_ROWS rows, else the one with most: its rows, and bytes at MIN_ROWS."""
    best, text = 0, "-"
    for name in files:
        ds_config = with_machine(load_ds_config(ROOT / f"ds_configs/{name}.json"), None, HOST_GIB)
        plan = planner.plan(experiment, ds_config, RANKS)
        if (rows := max_rows(planner, experiment, ds_config, RANKS, plan.peak_stage.epoch)) > best:
            if rows < MIN_ROWS:
                plan = planner.plan(replace(experiment, batch_size_training=rows), ds_config, RANKS)
            size = f"{plan.gpu_bytes / MIB:,.0f} MiB, host {plan.host_bytes / GIB:.0f} GiB"
            best, text = rows, f"`{name}`: {rows} rows; {min(rows, MIN_ROWS)}: {size}"
        if best >= MIN_ROWS:
            break
    return text


def rows_of(model: str) -> Iterator[list[str]]:
    """A line of the table for each tuning of a model."""
    for tuning in MODELS[model]:
        planner, experiment = planner_of(model, tuning), experiment_of(model, tuning)
        cells = [cell(planner, experiment, files[tuning == "qlora"]) for files in FILES.values()]
        yield [f"{short(model)} {tuning}", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--write", action="store_true", help="into ds_configs/README.md")
    args = parser.parse_args()
    lines = []
    for model in MODELS:
        for line in rows_of(model):
            print(*line, sep=" | ", flush=True)
            lines.append(line)
    table = Table(["", *FILES], lines, align="l").markdown()
    if args.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(MARKERS.sub(lambda m: m[1] + table + "\n" + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
