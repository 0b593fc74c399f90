"""Mutated settings, data and manifests: each a correct reading or a clear message, no traceback, no hang."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import load_experiment
from coconut_ds.data.problems import read_problems
from coconut_ds.errors import UserError
from coconut_ds.runs.checkpoint_folders import (
    CheckpointFolders,
    Manifest,
    TrainState,
    digest_of,
    sync_and_hash,
)
from coconut_ds.runs.run_folder import run_folder
from tests.faults.conftest import EXPERIMENT
from tests.launched.forked import ROOT
from tests.mutations import as_bytes, mutate, time_limit

EACH = 130

COUNTS: Counter[str] = Counter()


def read(name: str, reader: Callable[[], object]) -> None:
    """Count a right reading or a clear message; everything else is a failure of the test."""
    with time_limit():
        try:
            reader()
            COUNTS[f"{name}: read"] += 1
        except UserError as error:
            assert len(str(error)) > 20 and "Traceback" not in str(error)
            COUNTS[f"{name}: refused"] += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


@pytest.fixture(scope="module", autouse=True)
def _report(folder: Path) -> Iterator[None]:
    yield
    total = sum(COUNTS.values())
    print(f"\n{total} mutated inputs, 0 tracebacks, 0 hangs: {dict(sorted(COUNTS.items()))}")


many = settings(
    max_examples=EACH, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
seeds = st.integers(0, 2**32)


@many
@given(seeds)
def test_experiment_yaml(folder: Path, seed: int) -> None:
    path = folder / "experiment.yaml"
    path.write_bytes(
        as_bytes(random.Random(seed), EXPERIMENT, lambda tree: yaml.dump(tree, allow_unicode=True))
    )
    read("YAML", lambda: run_folder(load_experiment(path)))


@many
@given(seeds)
def test_deepspeed_json(folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    path = folder / "ds_config.json"
    path.write_bytes(as_bytes(draw, json.loads(draw.choice(files).read_text()), json.dumps))
    experiment = load_experiment(ROOT / "configs/full/gsm_coconut.yaml")
    read("DeepSpeed JSON", lambda: load_ds_config(path).resolve(experiment, 2))


@many
@given(seeds)
def test_problems(folder: Path, seed: int) -> None:
    problems = [
        {"question": f"{i}+1=?", "steps": [f"<<{i}+1={i + 1}>>"], "answer": str(i + 1)} for i in range(3)
    ]
    path = folder / "problems.json"
    path.write_bytes(as_bytes(random.Random(seed), problems, json.dumps))
    read("data", lambda: read_problems(path))


@many
@given(seeds)
def test_manifest(folder: Path, seed: int) -> None:
    """Half of the mutants carry a digest that fits, as if someone had meant it."""
    draw = random.Random(seed)
    checkpoint = folder / "run" / "checkpoint_1"
    (checkpoint / "engine").mkdir(parents=True, exist_ok=True)
    (checkpoint / "engine/shard").write_text("shard")
    files = sync_and_hash(checkpoint, ["engine/shard"])
    Manifest(TrainState(1), {"experiment": {"lr": 1.0}}, 1, True, files).write(checkpoint)
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_text())
    if draw.random() < 0.5:
        body.pop("sha256")
        body = mutate(draw, body)
        path.write_bytes(json.dumps({"sha256": digest_of(body), **body}).encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(as_bytes(draw, body, json.dumps))
    read("manifest", lambda: CheckpointFolders(folder / "run", lambda _: None).check("checkpoint_1"))
