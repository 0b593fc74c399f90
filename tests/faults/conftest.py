"""A tiny task with all that a resume could get wrong: dropout, moments, a schedule, stages, their mixture."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import make_arithmetic
from tests.faults.comparing import Numbers, numbers_of
from tests.faults.processes import under_launcher
from tests.launched.forked import ROOT, Ended, Faults, Warm, WarmRun

EXPERIMENT: dict[str, Any] = {
    "project": "faults", "name": "run", "save_path": "runs", "seed": 1, "coconut": True, "c_thought": 1,
    "epochs_per_stage": 1, "max_latent_stage": 2, "num_epochs": 3, "uniform_prob": 0.3, "model_id": "model",
    "train_path": "data/arithmetic_train.json", "val_path": "data/arithmetic_valid.json",
    "test_path": "data/arithmetic_test.json", "batch_size_training": 1, "gradient_accumulation_steps": 2,
    "batch_size_eval": 2, "lr": 0.01, "lr_schedule": "linear", "warmup_ratio": 0.2, "reset_optimizer": True,
    "max_new_tokens": 4, "save_steps": 4, "keep_checkpoints": 2,
}  # fmt: skip
PATHS = ("save_path", "model_id", "train_path", "val_path", "test_path")
STEPS_PER_EPOCH = 6  # 24 problems, 2 ranks of 2 rows a step


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a model with dropout."""
    folder = tmp_path_factory.mktemp("task")
    sizes = "--train 24 --valid 6 --test 2 --terms 3 --layers 1 --width 16 --heads 2"
    make_arithmetic(folder / "data", folder / "model", sizes)
    config = json.loads((folder / "model/config.json").read_text())
    config.update(resid_pdrop=0.1, embd_pdrop=0.1)
    (folder / "model/config.json").write_text(json.dumps(config))
    return folder


class Bench:
    """A copy of the task to break things in."""

    def __init__(self, task: Path, folder: Path, warm: Warm) -> None:
        self.folder, self.warm = folder, warm
        shutil.copytree(task, folder, dirs_exist_ok=True)
        self.run_folder = folder / "runs" / "run"
        paths = {key: str(folder / EXPERIMENT[key]) for key in PATHS}
        self.experiment = folder / "experiment.yaml"
        self.experiment.write_text(yaml.safe_dump({**EXPERIMENT, **paths}))

    def arguments(self, *more: str) -> list[str]:
        return [
            "train",
            str(self.experiment),
            "--deepspeed_config",
            str(ROOT / "ds_configs/zero2.json"),
            *more,
        ]

    def start(
        self, *more: str, faults: Faults = (), ranks: int = 2, variables: Mapping[str, str] | None = None
    ) -> WarmRun:
        """Ranks without a launcher."""
        return self.warm.start(self.arguments(*more), self.folder, faults, ranks, variables)

    def train(
        self, *more: str, faults: Faults = (), ranks: int = 2, variables: Mapping[str, str] | None = None
    ) -> Ended:
        """The same, to their end."""
        return self.start(*more, faults=faults, ranks=ranks, variables=variables).wait()

    def launch(self, *more: str, faults: Faults = ()) -> Ended:
        """Two ranks under the deepspeed launcher."""
        return under_launcher(self.arguments(*more), self.folder, faults)

    def numbers(self) -> Numbers:
        return numbers_of(self.run_folder)

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.run_folder.glob("checkpoint_*"))

    def steps(self) -> list[int]:
        lines = (self.run_folder / "metrics.jsonl").read_text().splitlines()
        return [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]


@pytest.fixture
def bench(task: Path, tmp_path: Path, warm: Warm) -> Bench:
    return Bench(task, tmp_path / "bench", warm)


def _reference(task: Path, folder: Path, warm: Warm, ranks: int) -> Numbers:
    bench = Bench(task, folder, warm)
    ended = bench.train(ranks=ranks)
    assert ended.codes == [0] * ranks, ended.output
    return bench.numbers()


@pytest.fixture(scope="session")
def reference(task: Path, tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Numbers:
    """What two ranks come to when nothing happens."""
    return _reference(task, tmp_path_factory.mktemp("reference"), warm, 2)


@pytest.fixture(scope="session")
def alone(task: Path, tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Numbers:
    """What one rank comes to when nothing happens."""
    return _reference(task, tmp_path_factory.mktemp("alone"), warm, 1)
