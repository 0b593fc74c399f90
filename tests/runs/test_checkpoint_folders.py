"""The best checkpoint of every stage: `best`, retention, and runs of older versions."""

from dataclasses import asdict, replace

import pytest
import torch

from coconut_ds.config.experiment import Method, validate_experiment
from coconut_ds.data.curriculum import Stage
from coconut_ds.errors import CheckpointError
from coconut_ds.runs.checkpoint_folders import (
    LONGEST_REASONING,
    Manifest,
    TrainState,
    misleading_best,
    resolve_pointer,
)
from coconut_ds.runs.checkpoints import Checkpoints
from tests.runs.fake_shards import FakeShards, write_model

BASE = {"name": "n", "save_path": "runs", "model_id": "gpt2", "train_path": "t", "val_path": "v"}
STAGED = {"method": "coconut", "c_thought": 2, "epochs_per_stage": [2, 3], "max_latent_stage": 2}
# Stage 0: epochs 1, 2.  Stage 1: 3 to 5.  Stage 2: 6 to 8.  All steps hidden from epoch 9 on, also past 11.
ACCURACIES = (0.98, 0.97, 0.6, 0.7, 0.65, 0.3, 0.2, 0.25, 0.1, 0.12, 0.11, 0.12, 0.1)


def checkpoints(folder, settings=STAGED, extra=None, **options):
    experiment = validate_experiment({**BASE, "num_epochs": 20, **settings}, "test")
    saved = {"experiment": asdict(experiment), **(extra or {})}
    return Checkpoints(folder, FakeShards(torch.zeros(1)), saved, log=lambda line: None, **options)


def save(made, accuracies=ACCURACIES, first=1):
    for epoch, accuracy in enumerate(accuracies, first):
        made.save(TrainState(epoch, accuracy=accuracy, global_step=epoch), write_model)


def named(made, *words):
    return [made.folders.named(word) for word in words]


def epochs(made):
    return [int(name.split("_")[1]) for name in made.folders.names()]


@pytest.mark.parametrize(
    "num_epochs, best", [(1, 1), (2, 1), (3, 3), (5, 4), (6, 6), (8, 6), (9, 9), (13, 10)]
)
def test_best_is_of_the_newest_stage(tmp_path, num_epochs, best):
    made = checkpoints(tmp_path)
    save(made, ACCURACIES[:num_epochs])
    assert named(made, "best") == [f"checkpoint_{best}"]
    assert (tmp_path / "best").read_text() == f"checkpoint_{best}\n"


@pytest.mark.parametrize("options", [{}, {"keep": 1}, {"keep": 1, "only_improving": True}])
def test_the_best_of_every_stage_is_kept_and_has_a_name(tmp_path, options):
    made = checkpoints(tmp_path, **options)
    save(made)
    words = [f"best_stage_{number}" for number in range(4)]
    expected = ["checkpoint_1", "checkpoint_4", "checkpoint_6", "checkpoint_10"]
    assert named(made, *words) == expected
    assert [resolve_pointer(tmp_path / word).name for word in [*words, "best", "latest"]] == [
        *expected, "checkpoint_10", "checkpoint_13",
    ]  # fmt: skip
    if options:
        assert epochs(made) == [1, 4, 6, 10, 13]
    with pytest.raises(CheckpointError, match="no best_stage_7; available: best_stage_0, best_stage_1"):
        resolve_pointer(tmp_path / "best_stage_7")


def test_improvement_counts_within_a_stage(tmp_path):
    made = checkpoints(tmp_path, only_improving=True)
    save(made)
    assert epochs(made) == [1, 3, 4, 6, 9, 10, 13]
    states = [Manifest.read(tmp_path / name).state for name in made.folders.names()]
    assert [(state.stage, state.best_accuracy) for state in states][:4] == [
        (0, 0.98), (1, 0.6), (1, 0.7), (2, 0.3),
    ]  # fmt: skip


def test_a_step_of_the_next_stage_leaves_best_where_it_is(tmp_path):
    made = checkpoints(tmp_path)
    save(made, ACCURACIES[:2])
    made.save(TrainState(2, 7, accuracy=0.97), write_model)
    assert named(made, "best") == ["checkpoint_1"]
    assert Manifest.read(tmp_path / "checkpoint_2_step_0000007").state.stage == 1


def test_going_back_makes_best_that_of_what_is_left(tmp_path):
    made = checkpoints(tmp_path)
    save(made)
    assert made.load("best_stage_2").epoch == 6
    assert named(made, "best", "latest") == ["checkpoint_6", "checkpoint_6"]
    assert made.load("best_stage_0").epoch == 1
    with pytest.raises(CheckpointError, match="no best_stage_2; available: best_stage_0"):
        made.load("best_stage_2")


@pytest.mark.parametrize("method", [m for m in Method if not m.has_stages])
def test_methods_without_stages_have_one_best(tmp_path, method):
    made = checkpoints(tmp_path, {"method": method}, keep=1)
    save(made, (0.1, 0.3, 0.2))
    assert epochs(made) == [2, 3] and named(made, "best", "best_stage_0") == ["checkpoint_2"] * 2


def test_token_wise_icot_compares_epochs_that_hide_the_same(tmp_path):
    """8 tokens more at every epoch, until all 20 of the longest reasoning are hidden."""
    settings = {"method": "icot", "icot_tokens_per_epoch": 8}
    made = checkpoints(tmp_path, settings, {LONGEST_REASONING: 20}, keep=1)
    save(made, (0.9, 0.8, 0.7))
    assert named(made, "best") == ["checkpoint_3"]
    save(made, (0.3, 0.5, 0.4), first=4)
    assert named(made, "best", "best_stage_0") == ["checkpoint_5", "checkpoint_1"]
    assert epochs(made) == [1, 5, 6]


def as_older_versions_wrote(folder, names):
    """Their stage was always 0, and `best` the best of the run."""
    for name in names:
        manifest = Manifest.read(folder / name)
        replace(manifest, state=replace(manifest.state, stage=0, best_accuracy=0.98)).write(folder / name)
    (folder / "best").write_text("checkpoint_1\n")


def test_a_run_of_an_older_version_says_what_its_best_is_and_gets_a_better_one(tmp_path):
    made = checkpoints(tmp_path)
    save(made, ACCURACIES[:7])
    assert misleading_best(tmp_path / "best") is None
    as_older_versions_wrote(tmp_path, made.folders.names())
    note = misleading_best(tmp_path / "best")
    assert f"checkpoint_1: epoch 1, stage 0 ({Stage(0, 0)})" in note
    assert "newest stage is 2; its best checkpoint is best_stage_2 (checkpoint_6)" in note
    assert named(made, "best", "best_stage_1", "best_stage_2") == [
        "checkpoint_1", "checkpoint_4", "checkpoint_6",
    ]  # fmt: skip
    resumed = checkpoints(tmp_path, keep=1)
    resumed.load()
    save(resumed, ACCURACIES[7:8], first=8)
    assert named(resumed, "best") == ["checkpoint_6"] and epochs(resumed) == [1, 4, 6, 8]
    assert misleading_best(tmp_path / "best") is None
