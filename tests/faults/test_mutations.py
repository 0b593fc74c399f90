"""Mutated settings, data and manifests: each a correct reading or a clear message, no traceback, no hang."""

import copy
import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coconut_ds.checkpoint import CheckpointFolders, TrainState
from coconut_ds.checkpoint.manifest import Manifest, settle_files
from coconut_ds.config import load_experiment
from coconut_ds.ds_config import load_ds_config
from coconut_ds.errors import UserError
from coconut_ds.problems import read_problems
from coconut_ds.runs import run_folder
from tests.faults.conftest import EXPERIMENT
from tests.faults.processes import ROOT

SECONDS = 5  # a reader that takes longer hangs
EACH = 130

BILLION_LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1e308, -1e-320, float("nan"), float("inf"), "", " ",
    "None", "nan", "1e-4", "../../etc/passwd", "/etc/passwd", "a\x00b", "\ud800", "\u202e\u0007", 
    "x" * 10_000,
    [], {}, [[]], {"a": {"b": {}}}, [None], ["x"] * 1000, {"": ""}, "!!python/object/apply:os.system [id]",
    "${HOME}", "%s%n",
]  # fmt: skip
ODD_BYTES = [
    b"", b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"\x00" * 64, b"[" * 200_000, b"{" * 200_000,
    b'{"a":' * 100_000,
    b"- " * 50_000, BILLION_LAUGHS.encode(), b"!!python/object/apply:os.system ['id']", b"&a [*a]",
    b"a: &a\n  b: *a\n", b'{"a": 1, "a": 2}', b"9" * 10_000, b"[1e999999999]", b"<<: *x", b"? [a]\n: b",
    b"%YAML 9.9\n---\na", b"\r\n\x85", "naïve: ∑".encode("utf-16"), b"NaN", b"-Infinity", b"null", b"true",
    b'"text"',
]  # fmt: skip


def mutate(draw: random.Random, tree: Any) -> Any:
    """The tree with one to three places changed: a value replaced, a key dropped, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            break
        holder, key = draw.choice(places)
        match draw.randrange(4):
            case 0 | 1:
                holder[key] = copy.deepcopy(draw.choice(ODD_VALUES))
            case 2:
                del holder[key]
            case _ if isinstance(holder, dict):
                holder[draw.choice([f"{key}x", "", "a" * 300, "\u202e", str(key)[1:]])] = draw.choice(
                    ODD_VALUES
                )
            case _:
                holder.insert(0, copy.deepcopy(draw.choice(ODD_VALUES)))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def damage(draw: random.Random, content: bytes) -> bytes:
    """Bytes cut, flipped, doubled, moved, or replaced by something odd."""
    place = draw.randrange(len(content) + 1)
    match draw.randrange(5):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]
        case 2:
            return content[:place] + draw.choice(ODD_BYTES) + content[place:]
        case 3:
            return content[place:] + content[:place]
        case _:
            return draw.choice(ODD_BYTES)


def as_bytes(draw: random.Random, tree: Any, dump: Callable[[Any], str]) -> bytes:
    if draw.random() < 0.6:
        return dump(mutate(draw, tree)).encode("utf-8", "surrogatepass")
    return damage(draw, dump(tree).encode())


@contextmanager
def time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"still reading after {SECONDS} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


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
    files = settle_files(checkpoint, ["engine/shard"])
    Manifest(TrainState(1), {"experiment": {"lr": 1.0}}, 1, True, files).write(checkpoint)
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_text())
    if draw.random() < 0.5:
        from coconut_ds.checkpoint.manifest import _digest

        body.pop("sha256")
        body = mutate(draw, body)
        path.write_bytes(json.dumps({"sha256": _digest(body), **body}).encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(as_bytes(draw, body, json.dumps))
    read("manifest", lambda: CheckpointFolders(folder / "run", lambda _: None).check("checkpoint_1"))
