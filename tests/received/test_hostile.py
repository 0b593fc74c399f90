"""Folders from a hostile sender: nothing in them runs, nothing outside them is written.

Every place that a file of a received folder could hold code, or lead out of the folder, holds a canary: a
pickle, a module, a template, a link.  Whether a command succeeds or refuses is its own affair here.
"""

import builtins
import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import load_named_experiment
from coconut_ds.data.run_data import load_run_data
from coconut_ds.data.tokenizer import load_vocabulary
from coconut_ds.engine.watchdog import Watchdog, write_batches
from coconut_ds.errors import UserError
from coconut_ds.files import is_printable
from coconut_ds.memory.budget import MemoryGuard
from coconut_ds.model.loading import build_module, load_config
from coconut_ds.reports.figures import draw_window_weights
from coconut_ds.runs.checkpoints import Checkpoints
from coconut_ds.runs.run_folder import Run
from tests.received.commands import CHEAP, PAGE, PLANS, READING, call
from tests.received.kinds import sign
from tests.runs.fake_shards import FakeShards

CANARIES = Path("/nonexistent")  # set by the fixture; a canary that runs makes a folder in it
MODEL_FOLDERS = (
    "model", "full", "peft", "published/peft", "run/checkpoint_4/model", "lora/checkpoint_4/model",
)  # fmt: skip
RUNS = ("run", "lora")
LINKED_FILES = (
    ".lock", "metrics.jsonl", "samples.jsonl", "predictions.jsonl", "evaluations.jsonl", "page.html",
    "all.json", "window_weights.png", "sweep.log", "environment.json", ".experiment.yaml.tmp",
    ".metrics.jsonl.tmp", ".predictions.jsonl.tmp", ".environment.json.tmp", ".ds_config.json.tmp",
    ".latest.tmp", "memory/report.html", "memory/accuracy.png", "memory/.report.html.tmp",
)  # fmt: skip
LINKED_FOLDERS = ("heartbeats", "stuck", "diverged", "wandb")
SCREEN = "\x1b]0;owned\x07\x1b[2J\u202e"
MARKUP = "<img src=x onerror=alert(1)>$\\frac{"


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, name: str) -> None:
        self.path = str(CANARIES / name)

    def __reduce__(self):
        return os.makedirs, (self.path,)


def torch_pickle(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"latent_weights": torch.zeros(2), "x": Canary(str(path).replace("/", "_"))}, path)


def module(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import os\nos.makedirs({str(CANARIES / str(path).replace('/', '_'))!r})\n")


def edit(path: Path, **changes) -> None:
    if path.is_file():
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_settings(run: Path, **changes) -> None:
    path = run / "experiment.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def plant_code(folder: Path, **config) -> None:
    """Modules and pickles beside a model, and settings that name them."""
    for name in (
        "evil",
        "modeling_evil",
        "tokenization_evil",
        "configuration_evil",
        "custom_generate/generate",
    ):
        module(folder / f"{name}.py")
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "vocab.pkl"):
        torch_pickle(folder / name)
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    template = "{{ cycler.__init__.__globals__.os.makedirs('%s') }}" % (CANARIES / "template")
    edit(folder / "config.json", auto_map=auto, custom_pipelines={"x": {"impl": "evil.P"}}, **config)
    edit(folder / "tokenizer_config.json", auto_map=auto, chat_template=template)
    edit(folder / "generation_config.json", custom_generate=".", trust_remote_code=True)
    edit(
        folder / "adapter_config.json", auto_mapping={"base_model_class": "M", "parent_library": "evil"},
        megatron_core="evil", megatron_config={"x": 1}, base_model_name_or_path="./evil_base",
    )  # fmt: skip


def code_beside_everything(root: Path) -> None:
    """Everything works, and code lies beside it."""
    for folder in MODEL_FOLDERS:
        plant_code(root / folder)
    for run in RUNS:
        torch_pickle(root / run / "checkpoint_4/random/rank_00001.pt")
        torch_pickle(root / run / "checkpoint_4/engine/mp_rank_00_model_states.pt")
        torch_pickle(root / run / "checkpoint_5")


def types_that_need_code(root: Path) -> None:
    """Configurations and tokenizers of a class that only the sender's code has."""
    for folder in MODEL_FOLDERS:
        plant_code(root / folder, model_type="evil", architectures=["EvilForCausalLM"])
        edit(root / folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")


def pickles_for_tensors(root: Path) -> None:
    """Pickles under every name that weights may have, and settings that allow them."""
    for folder in MODEL_FOLDERS:
        for path in (root / folder).glob("*.safetensors"):
            path.unlink()
            torch_pickle(path)
        torch_pickle(root / folder / "pytorch_model.bin")
        plant_code(root / folder)
    torch_pickle(root / "published/latent.pt")
    for run in RUNS:
        torch_pickle(root / run / "checkpoint_4/random/rank_00000.pt")


def only_bin_weights(root: Path) -> None:
    """No safetensors at all; real weights and a canary in one .bin."""
    for folder in MODEL_FOLDERS:
        for name in ("model.safetensors", "adapter_model.safetensors"):
            path = root / folder / name
            if path.is_file():
                weights = {**load_file(path), "x": Canary(f"{folder.replace('/', '_')}_bin")}
                path.unlink()
                torch.save(weights, path.with_suffix(".bin"))
                torch.save(weights, root / folder / "pytorch_model.bin")


def settings_that_point_elsewhere(root: Path) -> None:
    """The settings inside allow pickles, and name some outside of the folder."""
    torch_pickle(root / "outside.bin")
    (root / "outside.bin").rename(root.parent / "outside.bin")
    evil = {"allow_pickle": True, "load_model_path": "../outside.bin"}
    for run in RUNS:
        change_settings(root / run, **evil)
    for kind in ("full", "peft"):
        values = json.loads((root / kind / "coconut.json").read_text())
        edit(root / kind / "coconut.json", experiment=values["experiment"] | evil)
    for folder in ("peft", "lora/checkpoint_4/model"):
        edit(root / folder / "base.json", weights="../outside.bin")
    for run in RUNS:
        (root / run / "latest").write_text("../../outside.bin")
        (root / run / "best").write_text("../../outside.bin")
    cache = next((root / "data/cache/tokens").glob("*.npz"))
    evil = np.array([Canary("npy")], dtype=object)
    np.savez(cache, tokens=evil, piece_ends=evil, first_pieces=evil, allow_pickle=True)
    cache.with_name(f"{cache.stem}2.npz").write_bytes(pickle.dumps(Canary("cache")))


VARIANTS = (
    code_beside_everything, types_that_need_code, pickles_for_tensors, only_bin_weights,
    settings_that_point_elsewhere,
)  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def outside(received, tmp_path, monkeypatch):
    """A folder that no command may write into; pickles that run make folders in `canaries`."""
    monkeypatch.setattr("tests.received.test_hostile.CANARIES", tmp_path / "canaries")
    (tmp_path / "canaries").mkdir()

    def nobody(*_: object) -> str:
        raise AssertionError("a question was asked on the terminal")

    monkeypatch.setattr(builtins, "input", nobody)
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("victim", "victim.json"):
        (folder / name).write_text("precious\n")
    return folder


def link_everywhere(root: Path, outside: Path) -> None:
    for kind in (*RUNS, "full", "peft", "run/checkpoint_4"):
        for name in LINKED_FILES:
            path = root / kind / name
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(outside / "victim")
        for name in LINKED_FOLDERS:
            (root / kind / name).symlink_to(outside)
    lock = root / "data/cache/tokens/.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(outside / "victim")


def canaries(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "canaries").iterdir())


def run_all(commands) -> dict[str, int]:
    codes = {}
    for command in commands:
        ended = call(*command)
        codes[" ".join(command)] = ended.code
        assert "Traceback" not in ended.output, (command, ended.output[-2000:])
        assert is_printable(ended.output), (command, ended.output[-2000:])
    return codes


@pytest.mark.parametrize("plant", VARIANTS, ids=lambda plant: plant.__name__)
def test_nothing_runs(plant, received, outside, tmp_path):
    plant(received)
    for run in RUNS:
        sign(received / run / "checkpoint_4")
    codes = run_all([*CHEAP, *PLANS[:1], *READING])
    start_training(received)
    assert canaries(tmp_path) == []
    assert set(codes.values()) <= {0, 2, 3}
    if plant is code_beside_everything:
        assert not {command: call(*command.split()).output[-300:] for command, code in codes.items() if code}
    if plant is only_bin_weights:
        assert 2 in codes.values()


def test_a_canary_runs_where_the_reader_says_so(received, outside, tmp_path):
    """The canaries are alive: with the permission on the command line the file is opened."""
    settings_that_point_elsewhere(received)
    weights = ("generate", "run.yaml", "--prompt", "1", "--set", "load_model_path=../outside.bin")
    assert call(*weights).code == 2 and canaries(tmp_path) == []
    assert "--set allow_pickle=true" in call(*weights).output
    call(*weights, "--set", "allow_pickle=true")
    assert canaries(tmp_path) != []


def test_a_yaml_of_the_readers_own_may_allow_it(received, outside, tmp_path):
    torch_pickle(received / "theirs.bin")
    values = yaml.safe_load(Path("run.yaml").read_text())
    values |= {"allow_pickle": True, "load_model_path": "theirs.bin"}
    inside = received / "run" / "mine.yaml"
    for path in (inside, received / "experiment.yaml"):
        path.write_text(yaml.safe_dump(values))
        assert call("generate", str(path), "--prompt", "1").code == 2
        assert canaries(tmp_path) == []
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    (received / "experiment.yaml").unlink()
    call("generate", "mine.yaml", "--prompt", "1")
    assert len(canaries(tmp_path)) == 1


def start_training(root: Path) -> None:
    """All that `train RUN/experiment.yaml` does but DeepSpeed, which loads the shards."""
    for name in RUNS:
        folder = root / name
        experiment = load_named_experiment(folder / "experiment.yaml")
        actions = (
            lambda e=experiment: load_run_data(e, load_config(e.model_id)),
            lambda e=experiment: build_module(e, load_vocabulary(e.model_id), LatentMemory()),
            lambda e=experiment: Run(e, {}).close(),
            lambda f=folder, e=experiment: Checkpoints(
                f, FakeShards(torch.zeros(2)), {"experiment": asdict(e)}
            ).load(),
            lambda f=folder: draw_window_weights(f),
            lambda f=folder: write_batches(f / "diverged" / "step.json", [], []),
            lambda f=folder: Watchdog(f, 0, 1, 60).__enter__().__exit__(None, None, None),
            lambda f=folder: MemoryGuard(f / "memory", 0, 1, torch.device("cpu"), None)._report("a", "b"),
        )
        for action in actions:
            try:
                action()
            except UserError as error:
                assert str(error)


def test_nothing_outside_is_written(received, outside):
    link_everywhere(received, outside)
    before = contents(outside)
    codes = run_all([PAGE, *CHEAP, *PLANS[:1], *READING])
    start_training(received)
    assert contents(outside) == before and sorted(os.listdir(outside)) == ["victim", "victim.json"]
    assert 2 in codes.values()


def test_a_linked_folder_of_records_is_refused(received, outside):
    for name in RUNS:
        shutil.rmtree(received / name / "memory")
        (received / name / "memory").symlink_to(outside)
    ended = call(*PAGE)
    assert ended.code == 2 and "is a link" in ended.output
    start_training(received)
    assert sorted(os.listdir(outside)) == ["victim", "victim.json"]


def test_a_linked_cache_is_not_used(received, outside, monkeypatch):
    monkeypatch.setenv("HOME", str(received / "home"))
    shutil.rmtree("data/cache")
    Path("data/cache").symlink_to(outside)
    start_training(received)
    assert sorted(os.listdir(outside)) == ["victim", "victim.json"]
    assert any((received / "home/.cache/coconut_ds/tokens").iterdir())


def test_a_run_folder_and_a_save_path_may_be_links(received, tmp_path):
    shutil.move("run", tmp_path / "elsewhere")
    Path("run").symlink_to(tmp_path / "elsewhere")
    codes = run_all([PAGE, ("eval", "run", "--limit", "2"), ("generate", "run", "--prompt", "1")])
    assert set(codes.values()) == {0}
    Run(load_named_experiment("run/experiment.yaml"), {}).close()


def test_names_and_texts_steer_nothing(received):
    """Markup and escape sequences in names, records, problems and tokens."""
    for run in RUNS:
        change_settings(received / run, project=MARKUP)
        for record in ("plan", "profile"):
            file = received / run / f"memory/{record}.json"
            edit(file, experiment=MARKUP + SCREEN, verdict=MARKUP + SCREEN, stage=SCREEN, ds_config=SCREEN)
        edit(received / run / "environment.json", host=MARKUP + SCREEN, libraries={MARKUP: SCREEN})
    problems = [{"question": MARKUP + SCREEN, "steps": [SCREEN], "answer": MARKUP + SCREEN}] * 2
    for split in ("train", "valid", "test"):
        (received / f"data/arithmetic_{split}.json").write_text(json.dumps(problems))
    edit(received / "data/arithmetic.card.json", name=SCREEN, notes=MARKUP)
    (received / "run/page.html").unlink(missing_ok=True)
    inspect = ("inspect", "full", "--file", "data/arithmetic_valid.json", "--html", "page.html")
    generate = ("generate", "full", "--file", "data/arithmetic_valid.json")
    codes = run_all([PAGE, *CHEAP, inspect, generate, ("eval", "full")])
    assert codes[" ".join(PAGE)] == codes[" ".join(inspect)] == 0
    for page in ("run/memory/report.html", "page.html"):
        text = Path(page).read_text()
        assert "<img src=x" not in text and "&lt;img src=x" in text and "<script" not in text


def test_settings_with_control_characters_are_refused(received):
    change_settings(received / "run", project=SCREEN)
    ended = call("show", "run/experiment.yaml")
    assert ended.code == 2 and "holds control characters" in ended.output


@pytest.mark.parametrize("kernel", ["evil/attention", "evil/attention@main:f"])
def test_a_kernel_to_download_is_refused(received, kernel):
    edit(received / "full/config.json", attn_implementation=kernel, _attn_implementation=kernel)
    ended = call("generate", "full", "--prompt", "1")
    assert ended.code in (0, 2)
    assert ended.code == 0 or "kernel" in ended.output


def test_read_only_commands_open_no_shard(received, monkeypatch):
    """engine/ is pickled by DeepSpeed; only a resume may read it."""
    opened = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda file, *a, **k: (opened.append(str(file)), load(file, *a, **k))[1]
    )
    run_all([*CHEAP, *READING])
    assert not [name for name in opened if "/engine/" in name or "/random/" in name]


RECORDS = (
    "metrics.jsonl", "predictions.jsonl", "evaluations.jsonl", "environment.json", "memory/plan.json",
    "memory/profile.json", "latest", "best",
)  # fmt: skip


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipes", "folders"])
def test_records_that_are_no_files(received, make):
    """Nobody waits for a pipe that nobody writes to."""
    for name in RECORDS:
        (received / "run" / name).unlink()
        make(received / "run" / name)
    codes = run_all(
        [
            ("report", "run", "--no-page"),
            ("eval", "run", "--limit", "2"),
            ("generate", "run", "--prompt", "1"),
        ]
    )
    assert set(codes.values()) <= {0, 2}
    start_training(received)
