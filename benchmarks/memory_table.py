"""Plan the table of bytes in docs/memory.md: GPT-2 small to XL and Llama 1B, full, LoRA and QLoRA.

    python -m benchmarks.memory_table [MODEL ...] [--write]

Text: ProsQA's size (430 question tokens, six steps of 15, 12 answer tokens), Coconut with six latents,
accumulated micro-batches of 8 rows, two GPUs.  `--write` replaces the table in docs/memory.md.
"""

import argparse
import re
from pathlib import Path

from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import Experiment, validate_experiment
from coconut_ds.memory.plan_table import markdown
from coconut_ds.memory.planner import Plan, Planner, TextShape

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "benchmarks/shapes"
DOCUMENT = ROOT / "docs/memory.md"
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama-3.2-1b")
TEXT = TextShape(question=430, steps=6, step=15, answer=12)
MARKERS = re.compile(r"(<!-- bytes table -->\n).*?(<!-- end -->)", re.DOTALL)


def experiment_of(model: str, tuning: str) -> Experiment:
    """The run that is planned: every stage of the curriculum, one epoch each."""
    values = {
        "project": "table",
        "name": f"{model} {tuning}",
        "save_path": "runs",
        "model_id": str(SHAPES / model),
        "train_path": "data/none.json",
        "val_path": "data/none.json",
        "method": "coconut",
        "tuning": "full" if tuning == "full" else "lora",
        "quantization": "nf4" if tuning == "qlora" else "none",
        "c_thought": 1,
        "max_latent_stage": 6,
        "epochs_per_stage": 1,
        "num_epochs": 8,
        "batch_size_training": 8,
        "gradient_accumulation_steps": 8,
        "batch_size_eval": 16,
        "max_new_tokens": 64,
        "lr": 1e-4,
    }
    return validate_experiment(values, "memory_table")


def rows_of(model: str) -> list[tuple[str, Plan]]:
    rows = []
    for tuning in ("full", "lora", "qlora"):
        experiment = experiment_of(model, tuning)
        planner = Planner.of(experiment, TEXT)
        for path in sorted((ROOT / "ds_configs").glob("*.json")):
            if is_planned(path.stem, tuning):
                rows.append((f"{model} {tuning}", planner.plan(experiment, load_ds_config(path), ranks=2)))
    return rows


def is_planned(ds_config: str, tuning: str) -> bool:
    """Whether the table has a file for a tuning; files in bf16 need the bytes of those in fp16."""
    if "bf16" in ds_config or ("adam8bit" in ds_config and tuning != "full"):
        return False
    return ("qlora" in ds_config) == (tuning == "qlora")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--write", action="store_true", help="into docs/memory.md")
    args = parser.parse_args()
    table = markdown([row for model in args.models for row in rows_of(model)])
    print(table)
    if args.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(MARKERS.sub(lambda m: m[1] + table + "\n" + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
