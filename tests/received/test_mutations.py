"""Mutated folders, caches, adapters and reports: each is read or refused in one message, without a hang.

MUTATION_SHARES=10 python -m pytest tests/received/test_mutations.py      all 500 instead of 200
"""

import json
import os
import random
import shutil
import zipfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from coconut_ds.config.experiment import load_experiment
from coconut_ds.data.tokenizer import cached_tokens, load_vocabulary
from coconut_ds.errors import UserError
from coconut_ds.reports import figures as pictures
from coconut_ds.runs.checkpoints import Checkpoints
from tests.mutations import as_bytes, damage, mutate, time_limit
from tests.received.commands import call
from tests.received.kinds import sign
from tests.runs.fake_shards import FakeShards

NUM = 500
SHARES = int(os.environ.get("MUTATION_SHARES", "4"))  # of ten; all but the first are `slow`
SECONDS = 60  # of one mutation; a busy machine takes ten times as long as a quiet one
PAGE, TEXT = ("report", "run"), ("report", "run", "lora")
EVAL = ("eval", "run", "--limit", "2")


def generate(target: str, *more: str) -> tuple[str, ...]:
    return ("generate", target, "--prompt", "1+1=?", *more)


def export(target: str) -> tuple[str, ...]:
    return ("export", target, "--output", "exported")


def inspect(target: str) -> tuple[str, ...]:
    return ("inspect", target, "--question", "1+1=?", "--html", "page.html")


DATA = (
    ("validate", "data/arithmetic_train.json", "data/arithmetic_valid.json"), ("show", "run/experiment.yaml"),
)  # fmt: skip
# File -> (how often it is taken, commands that read it)
FILES: dict[str, tuple[int, tuple[tuple[str, ...], ...]]] = {
    "run/metrics.jsonl": (50, (PAGE, TEXT)),
    "run/predictions.jsonl": (20, (TEXT, EVAL)),
    "run/evaluations.jsonl": (10, (export("run"),)),
    "run/environment.json": (10, (PAGE,)),
    "run/memory/plan.json": (30, (PAGE,)),
    "run/memory/profile.json": (60, (PAGE,)),
    "run/ds_config.json": (20, (TEXT, EVAL)),
    "run/experiment.yaml": (30, (TEXT, ("show", "run/experiment.yaml"), generate("run"))),
    "run/latest": (5, (generate("run"), generate("run", "--checkpoint", "best"))),
    "run/best": (5, (generate("run"), generate("run", "--checkpoint", "best"))),
    "run/checkpoint_4/manifest.json": (30, (generate("run"), ("resume", "run"))),
    "run/checkpoint_4/random/rank_00000.pt": (5, (("resume", "run"),)),
    "run/checkpoint_4/model/config.json": (15, (inspect("run"),)),
    "run/checkpoint_4/model/model.safetensors": (10, (generate("run"),)),
    "run/checkpoint_4/model/thought.safetensors": (5, (generate("run"),)),
    "full/coconut.json": (20, (generate("full"), export("full"))),
    "full/config.json": (20, (generate("full"), export("full"))),
    "full/generation_config.json": (5, (export("full"),)),
    "full/model.safetensors": (15, (generate("full"), inspect("full"))),
    "full/thought.safetensors": (5, (generate("full"),)),
    "full/tokenizer.json": (15, (generate("full"),)),
    "full/tokenizer_config.json": (15, (generate("full"), export("full"))),
    "peft/coconut.json": (10, (generate("peft"),)),
    "peft/base.json": (10, (generate("peft"),)),
    "peft/adapter_config.json": (15, (generate("peft"), export("peft"))),
    "peft/adapter_model.safetensors": (10, (generate("peft"),)),
    "peft/thought.safetensors": (5, (generate("peft"),)),
    "published/latent.pt": (5, (generate("published.yaml"),)),
    "published/peft/adapter_config.json": (5, (generate("published.yaml"),)),
    "model/config.json": (5, (("plan", "run/experiment.yaml", "--deepspeed_config", "run/ds_config.json"),)),
    "data/arithmetic_train.json": (5, DATA),
    "data/arithmetic_valid.json": (5, (*DATA, EVAL)),
    "data/arithmetic.card.json": (5, (*DATA, EVAL)),
    "CACHE": (20, (("cache", ""),)),
}
ORDER = [name for name, (often, _) in FILES.items() for _ in range(often)]
random.Random(0).shuffle(ORDER)


def test_there_are_as_many_as_promised():
    assert len(ORDER) == NUM


def mutated(draw: random.Random, name: str, content: bytes) -> bytes:
    suffix = Path(name).suffix
    if suffix == ".yaml":
        return as_bytes(draw, yaml.safe_load(content), lambda tree: yaml.dump(tree, allow_unicode=True))
    if suffix == ".json":
        return as_bytes(draw, json.loads(content), json.dumps)
    if suffix == ".jsonl":
        records = [json.loads(line) for line in content.splitlines()]
        return as_bytes(draw, records, lambda tree: "\n".join(map(json.dumps, as_list(tree))))
    if suffix == ".safetensors" and draw.random() < 0.6:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        described = draw.choice([key for key in header if key != "__metadata__"] or [""])
        if described and draw.random() < 0.5:
            header[described]["dtype"] = draw.choice(["I32", "F16", "BOOL", "U8", "F8_E4M3", "C64", "BF16"])
        else:
            header = mutate(draw, header)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + content[8 + length :]
    return damage(draw, content)


def as_list(tree: object) -> list[object]:
    return tree if isinstance(tree, list) else [tree]


def mutate_one(root: Path, seed: int, name: str) -> None:
    """Change one file; manifests around it fit again, as if its sender had meant it."""
    draw = random.Random(seed)
    if name == "CACHE":
        entry = next((root / "data/cache/tokens").glob("*.npz"))
        if draw.random() < 0.3:
            entry.write_bytes(damage(draw, entry.read_bytes()))
        else:  # the checksums fit again
            with zipfile.ZipFile(entry) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            damaged = draw.choice(sorted(members))
            with zipfile.ZipFile(entry, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, damage(draw, content) if name == damaged else content)
        return
    path = root / name
    if path.name == "manifest.json" and draw.random() < 0.5:
        body = json.loads(path.read_text())
        body.pop("sha256")
        sign(path.parent, mutate(draw, body))
        return
    path.write_bytes(mutated(draw, name, path.read_bytes()))
    if "checkpoint_4/" in name and path.name != "manifest.json":
        sign(root / "run/checkpoint_4")


def resume(folder: Path) -> None:
    """What `train` does before it reads the shards."""
    experiment = load_experiment(folder / "experiment.yaml")
    Checkpoints(folder, FakeShards(torch.zeros(2)), {"experiment": asdict(experiment)}).load()


def use_cache(expected: list[object]) -> None:
    cache = cached_tokens("data/arithmetic_train.json", load_vocabulary("./model"), "data/cache/tokens")
    assert list(cache) == expected


def ended(command: tuple[str, ...], expected: list[object]) -> str:
    """'read' or 'refused'; everything else raises."""
    if command[0] == "cache":
        use_cache(expected)
        return "read"
    if command[0] == "resume":
        try:
            resume(Path(command[1]))
        except UserError as error:
            assert len(str(error)) > 20
            return "refused"
        return "read"
    result = call(*command)
    assert "Traceback" not in result.output
    if result.code == 0:
        return "read"
    assert result.code in (2, 3) and "error: " in result.output or result.code == 3, result
    return "refused"


@pytest.fixture
def small_pictures(monkeypatch):
    """Pictures are laid out but not written: that takes most of a report's time."""

    def save(figure, folder, name):
        figure.draw_without_rendering()
        return folder / f"{name}.png", "data:,"

    monkeypatch.setattr(pictures, "save", save)


@pytest.mark.parametrize(
    "share", [pytest.param(n, marks=[pytest.mark.slow] if n else [], id=f"{n}") for n in range(SHARES)]
)
def test_mutated_folders(share, kinds, tmp_path, monkeypatch, small_pictures):
    monkeypatch.chdir(kinds)
    vocabulary = load_vocabulary("./model")
    expected = list(cached_tokens("data/arithmetic_train.json", vocabulary, "data/cache/tokens"))
    counts: Counter[str] = Counter()
    failed = {}
    for seed in range(share, NUM, 10):
        name, root = ORDER[seed], tmp_path / str(seed)
        shutil.copytree(kinds, root)
        monkeypatch.chdir(root)
        mutate_one(root, seed, name)
        for command in FILES[name][1]:
            try:
                with time_limit(SECONDS):
                    counts[ended(command, expected)] += 1
            except (Exception, SystemExit) as error:
                failed[f"{seed} {name} {' '.join(command)}"] = f"{type(error).__name__}: {error}"[:300]
        monkeypatch.chdir(kinds)
        shutil.rmtree(root)
    assert not failed, "\n".join(f"{what}: {error}" for what, error in failed.items())
    assert counts["read"] > 5 and counts["refused"] > 5, counts
