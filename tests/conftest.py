"""What several tests need: a tiny task with its tokenizer and model, made once a session."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parents[1]
# `pytest -m fast`: rooms that build at most tiny models, and the tests beside this file.
FAST_ROOMS = ("config", "data", "engine", "runs", "thoughts")
NOT_FAST = ("test_golden.py", "test_quickstart_assets.py")


def pytest_collection_modifyitems(items):
    for item in items:
        room, *rest = item.path.relative_to(ROOT / "tests").parts
        is_fast = room in FAST_ROOMS if rest else room not in NOT_FAST
        if is_fast and not any(item.get_closest_marker(name) for name in ("slow", "faults")):
            item.add_marker("fast")
    # Files with long tests first (launch/test.sh keeps this order), so that no worker is left alone with one.
    long = {
        item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("faults")
    }
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def same_environment():
    """What a test writes into the environment, a process group's address for instance, ends with the test."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory):
    """A folder with arithmetic_{train,valid,test}.json and the model folder `gpt2`."""
    folder = tmp_path_factory.mktemp("arithmetic")
    make_arithmetic(folder, folder / "gpt2", "--train 96 --valid 24 --test 24 --width 32")
    return folder


def make_arithmetic(data, model, options):
    """Run preprocessing/arithmetic.py in this process, whose random state stays."""
    import torch  # not for tests that need no model

    from preprocessing.arithmetic import main

    with torch.random.fork_rng():
        main(["--output-dir", str(data), "--model-dir", str(model), *options.split()])


@pytest.fixture(scope="session")
def warm():
    from tests.launched.forked import Warm  # imports torch

    return Warm()


@pytest.fixture(scope="session")
def tiny_experiment(arithmetic):
    """Keys of an experiment on the tiny task, to be changed at will."""
    return {
        "name": "tiny",
        "project": "test",
        "save_path": str(arithmetic / "runs"),
        "method": "coconut",
        "c_thought": 1,
        "epochs_per_stage": 1,
        "max_latent_stage": 3,
        "num_epochs": 4,
        "model_id": str(arithmetic / "gpt2"),
        "train_path": str(arithmetic / "arithmetic_train.json"),
        "val_path": str(arithmetic / "arithmetic_valid.json"),
        "batch_size_training": 8,
        "gradient_accumulation_steps": 1,
        "lr": 0.001,
        "uniform_prob": 0.2,
    }
