"""One small folder of every kind that a person can be sent, made once."""

import contextlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from coconut_ds.config.experiment import experiment_to_yaml, validate_experiment
from coconut_ds.data.tokenizer import cached_tokens, load_vocabulary
from coconut_ds.evaluation.export import export_hf
from coconut_ds.runs.checkpoint_folders import MANIFEST, digest_of, list_files, sync_and_hash
from tests.reports.made_profile import plan, profile
from tests.run_folders import make_run

WEIGHTS = {"run": "run/checkpoint_4", "full": "full", "peft": "peft", "published": "published"}
KEY = {"checkpoint": "checkpoint_4", "split": "valid", "latents": 3, "ablation": "intact"}
MEASURED = {
    "loss": 1.0, "accuracy": 0.5, "cot_match": 0.0, "num_items": 4, "num_correct": 2, "mean_tokens": 2.0,
}  # fmt: skip


def make_kinds(tiny_experiment: dict[str, Any], root: Path) -> None:
    """./{model,data,run,lora,full,peft,published} in `root`: base model, data with its cache, runs, exports.

    All settings name their files relative to `root`, so that a copy of it is as good: commands run in it.
    """
    source = Path(tiny_experiment["model_id"])
    with contextlib.chdir(root):
        _model(source, Path("model"))
        data = Path("data")
        data.mkdir()
        for path in source.parent.glob("arithmetic*.json"):
            values = json.loads(path.read_text())
            (data / path.name).write_text(json.dumps(values[:6] if isinstance(values, list) else values))
        settings = {
            **tiny_experiment,
            "model_id": "./model",
            "train_path": "data/arithmetic_train.json",
            "val_path": "data/arithmetic_valid.json",
            "test_path": "data/arithmetic_test.json",
            "max_new_tokens": 2,
            "lora_r": 2,
        }
        cached_tokens(settings["train_path"], load_vocabulary("./model"), data / "cache" / "tokens")
        window = {"thought": "learnable_window", "latent_window_size": 2}
        for name, more in (("run", window), ("lora", {**window, "tuning": "lora"})):
            run = make_run(settings, Path("."), epochs=(4,), name=name, **more)
            _records(run)
        export_hf("run", "full", None, False, "fp32")
        export_hf("lora", "peft", None, False, "fp32")
        _published()
        for name, weights in WEIGHTS.items():
            values = {**settings, **window, "name": f"of_{name}", "save_path": "results"}
            values |= {"load_model_path": weights, "only_eval": True, "resume": 3}
            values |= {"tuning": "lora"} if name in ("peft", "published") else {}
            values |= {"latent_window_scope": "pass"} if name == "published" else {}
            Path(f"{name}.yaml").write_text(experiment_to_yaml(validate_experiment(values, name)))


def sign(checkpoint: Path, body: Any = None) -> None:
    """Make the manifest fit, as whoever changed the files, or its `body`, would."""
    path = checkpoint / MANIFEST
    if body is None:
        body = json.loads(path.read_text())
        names = [name for name in list_files(checkpoint) if name != MANIFEST]
        body["files"] = {name: asdict(record) for name, record in sync_and_hash(checkpoint, names).items()}
        body.pop("sha256")
    text = json.dumps({"sha256": digest_of(body), **body})
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _model(source: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_embd=8, n_head=1, n_positions=96,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _records(run: Path) -> None:
    lines = [{"kind": "train", "time": 1.0 * n, "epoch": n // 2, "loss": 2.0, "step": n} for n in range(8)]
    lines += [{"kind": "memory", "epoch": n, "host_rss_peak_mib": 300.0} for n in range(4)]
    more = {"window_weights": [0.5, 0.5]}
    lines += [{"kind": "valid", "time": 9.0, "epoch": n, "stage": n, **MEASURED, **more} for n in range(4)]
    predictions = [{**KEY, "index": n, "correct": n % 2 == 0} for n in range(4)]
    evaluations = [{"time": 1.0, **KEY, **MEASURED}]
    for name, records in (
        ("metrics", lines), ("predictions", predictions), ("evaluations", evaluations), ("samples", [KEY]),
    ):  # fmt: skip
        (run / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "memory").mkdir()
    (run / "memory/plan.json").write_text(json.dumps(plan()))
    (run / "memory/profile.json").write_text(json.dumps(profile()))
    (run / "environment.json").write_text(json.dumps({"devices": ["cpu"], "libraries": {"torch": "2"}}))


def _published() -> None:
    """The layout of the published LoRA code: peft/ and latent.pt."""
    folder = Path("published")
    (folder / "peft").mkdir(parents=True)
    shutil.copy("peft/adapter_config.json", folder / "peft")
    weights = load_file("peft/adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "trainable_tokens" not in name}
    save_file(kept, folder / "peft/adapter_model.safetensors")
    torch.save({"latent_weights": torch.zeros(2)}, folder / "latent.pt")
