"""Saving and loading: incomplete or damaged checkpoints are skipped or refused, with the reason."""

import dataclasses
import errno
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from coconut_ds.cli.validate import ANY_DATA
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.errors import CheckpointError
from coconut_ds.runs import checkpoints as checkpoint_files
from coconut_ds.runs.checkpoint_folders import MANIFEST, Manifest, TrainState
from coconut_ds.runs.checkpoints import Checkpoints, check_disk
from tests.runs.fake_shards import FakeShards, write_model

SETTINGS = {"experiment": {"lr": 1e-4, "method": "coconut"}, "ds_config": {}, "data": {"train": "abc"}}


class Bench:
    """One process with a run folder; every `fresh()` stands for a restarted process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    def fresh(self, *, settings=None, **options) -> Checkpoints:
        self.lines.clear()
        self.engine = FakeShards(torch.zeros(4))
        return Checkpoints(self.folder, self.engine, settings or SETTINGS, log=self.lines.append, **options)

    def save(self, checkpoints: Checkpoints, epoch: int, step: int = 0, accuracy: float | None = None) -> str:
        global_step = 10 * epoch + step
        self.engine.weights = torch.full((4,), float(global_step))
        return checkpoints.save(
            TrainState(epoch, step, global_step=global_step, accuracy=accuracy), write_model
        )

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.folder.iterdir() if entry.is_dir())

    def pointer(self, name: str) -> str:
        return (self.folder / name).read_text().strip()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_nothing_to_load(bench: Bench) -> None:
    assert bench.fresh().load() is None


def test_save_then_load_gives_state_weights_and_random_numbers_back(bench: Bench) -> None:
    checkpoints = bench.fresh()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    torch.randn(1), np.random.normal()  # both generators keep a spare normal value
    assert bench.save(checkpoints, 3, 420) == "checkpoint_3_step_0000420"
    expected = (random.random(), np.random.normal(), torch.randn(2).tolist())
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    state = bench.fresh().load()
    assert state == TrainState(3, 420, global_step=450)
    assert bench.engine.weights.tolist() == [450.0] * 4
    assert (random.random(), np.random.normal(), torch.randn(2).tolist()) == expected


def test_newest_is_by_epoch_and_step_not_by_spelling(bench: Bench) -> None:
    checkpoints = bench.fresh()
    for epoch, step in ((9, 0), (9, 7), (10, 0), (10, 12)):
        bench.save(checkpoints, epoch, step)
    assert bench.fresh().folders.latest() == "checkpoint_10_step_0000012" == bench.pointer("latest")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda f: os.truncate(f / "engine/zero_rank_0.pt", 100), "has 100 bytes"),
        (lambda f: flip_bit(f / "engine/zero_rank_0.pt"), "sha256"),
        (lambda f: flip_bit(f / "random/rank_00000.pt"), "sha256"),
        (lambda f: (f / "model/config.json").unlink(), "is missing"),
        (lambda f: (f / "engine/zero_rank_1.pt").write_text("of another run"), "does not belong"),
        (lambda f: replace_by_link(f / "model/config.json"), "is a link"),
        (lambda f: (f / MANIFEST).unlink(), "is missing"),
        (lambda f: (f / MANIFEST).write_text("{"), "cannot be read"),
        (lambda f: (f / MANIFEST).write_text("[" * 100_000), "cannot be read"),
        (lambda f: (f / MANIFEST).write_text("[1]"), "cannot be read"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "cannot be read"),
        (
            lambda f: edit(f / MANIFEST, '"global_step": 20', '"global_step": 19'),
            "changed after it was written",
        ),
    ],
)
def test_damaged_is_skipped_and_asked_for_is_refused(bench: Bench, damage, reason: str) -> None:
    checkpoints = bench.fresh()
    bench.save(checkpoints, 1)
    bench.save(checkpoints, 2)
    damage(bench.folder / "checkpoint_2")
    state = bench.fresh().load()
    assert state is not None and state.epoch == 1 and bench.engine.weights.tolist() == [10.0] * 4
    assert any("checkpoint_2" in line and reason in line for line in bench.lines)
    # the damaged one was set aside; put it back and ask for it
    shutil.move(next(bench.folder.glob("superseded-*-checkpoint_2")), bench.folder / "checkpoint_2")
    with pytest.raises(CheckpointError, match=reason):
        bench.fresh().load("checkpoint_2")


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    elsewhere = path.parent.parent.parent / "elsewhere"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_all_damaged_is_an_error_not_a_new_beginning(bench: Bench) -> None:
    bench.save(bench.fresh(), 1)
    flip_bit(bench.folder / "checkpoint_1/engine/zero_rank_0.pt")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        bench.fresh().load()


def test_absent_checkpoint_lists_what_is_there(bench: Bench) -> None:
    bench.save(bench.fresh(), 1)
    for wanted in ("checkpoint_7", "../checkpoint_1", "newest"):
        with pytest.raises(CheckpointError, match="no such checkpoint; available: checkpoint_1"):
            bench.fresh().load(wanted)


def test_renamed_checkpoint_is_refused(bench: Bench) -> None:
    bench.save(bench.fresh(), 1)
    (bench.folder / "checkpoint_1").rename(bench.folder / "checkpoint_5")
    with pytest.raises(CheckpointError, match="was renamed"):
        bench.fresh().load("checkpoint_5")


@pytest.mark.parametrize("content", ["checkpoint_9\n", "", "../../etc", "\x00"])
def test_latest_that_points_nowhere_is_not_needed(bench: Bench, content: str) -> None:
    bench.save(bench.fresh(), 1)
    (bench.folder / "latest").write_text(content)
    state = bench.fresh().load()
    assert state is not None and state.epoch == 1
    assert bench.pointer("latest") == "checkpoint_1"


@pytest.mark.parametrize("keep, expected", [(None, [1, 2, 3, 4]), (2, [2, 3, 4]), (1, [2, 4])])
def test_retention_keeps_the_best_and_the_newest(bench: Bench, keep, expected: list[int]) -> None:
    checkpoints = bench.fresh(keep=keep)
    for epoch, accuracy in enumerate((0.1, 0.3, 0.2, 0.3), 1):
        bench.save(checkpoints, epoch, accuracy=accuracy)
    assert bench.names() == [f"checkpoint_{epoch}" for epoch in expected]
    assert bench.pointer("best") == "checkpoint_2"


def test_mid_epoch_checkpoints_go_when_a_newer_one_exists(bench: Bench) -> None:
    checkpoints = bench.fresh()
    bench.save(checkpoints, 1)
    bench.save(checkpoints, 1, 5)
    assert bench.names() == ["checkpoint_1", "checkpoint_1_step_0000005"]
    bench.save(checkpoints, 1, 9)
    assert bench.names() == ["checkpoint_1", "checkpoint_1_step_0000009"]
    bench.save(checkpoints, 2)
    assert bench.names() == ["checkpoint_1", "checkpoint_2"]


def test_only_improving_epochs_stay_besides_the_newest(bench: Bench) -> None:
    checkpoints = bench.fresh(only_improving=True)
    for epoch, accuracy in enumerate((0.2, 0.2, 0.3, 0.1), 1):
        bench.save(checkpoints, epoch, accuracy=accuracy)
    assert bench.names() == ["checkpoint_1", "checkpoint_3", "checkpoint_4"]
    state = bench.fresh(only_improving=True).load()
    assert state is not None and state.epoch == 4  # the last, not the best


def test_going_on_from_an_older_one_sets_the_newer_aside(bench: Bench) -> None:
    checkpoints = bench.fresh()
    for epoch in (1, 2, 3):
        bench.save(checkpoints, epoch, accuracy=(0.2, 0.1, 0.3)[epoch - 1])
    state = bench.fresh().load("checkpoint_2")
    assert state is not None and state.epoch == 2
    assert [name.split("-")[-1] for name in bench.names() if name.startswith("superseded")] == [
        "checkpoint_3"
    ]
    assert bench.pointer("best") == "checkpoint_1" and bench.pointer("latest") == "checkpoint_2"
    assert bench.fresh().folders.latest() == "checkpoint_2"


def test_a_name_in_use_is_replaced_whole(bench: Bench) -> None:
    bench.save(bench.fresh(), 1)
    (bench.folder / "checkpoint_1/engine/stray").write_text("left behind")
    bench.save(bench.fresh(), 1)
    assert bench.fresh().folders.latest() == "checkpoint_1"
    assert not (bench.folder / "checkpoint_1/engine/stray").exists()


class Killed(BaseException):
    """Simulates SIGKILL: nothing in the program catches it."""


@pytest.mark.parametrize("step", ["save_random_state", "sync_and_hash", "replace_text", "sync_path"])
@pytest.mark.parametrize("call", [1, 2, 5, 7])
def test_killed_at_any_step_of_saving_leaves_the_older_one(
    bench: Bench, monkeypatch, step: str, call: int
) -> None:
    import coconut_ds.runs.checkpoint_folders as folders
    import coconut_ds.runs.checkpoints as protocol

    bench.save(bench.fresh(), 1)
    checkpoints = bench.fresh()
    calls = 0

    def killed(real):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise Killed
            return real(*args, **kwargs)

        return wrapper

    for module in (protocol, folders):
        if hasattr(module, step):
            monkeypatch.setattr(module, step, killed(getattr(module, step)))
    try:
        bench.save(checkpoints, 2)
        died = False
    except Killed:
        died = True
    assert died == (calls == call)
    monkeypatch.undo()
    published = (bench.folder / "checkpoint_2").exists()
    state = bench.fresh().load()
    assert state is not None and state.epoch == (2 if published else 1)
    assert bench.engine.weights.tolist() == [10.0 * state.epoch] * 4
    assert not list(bench.folder.glob(".tmp-*"))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_disk_full_while_saving_names_remaining(bench: Bench, error: Exception) -> None:
    checkpoints = bench.fresh()
    bench.save(checkpoints, 1)
    bench.engine.fails_in_save = error
    with pytest.raises(CheckpointError, match="The newest checkpoint is still checkpoint_1"):
        bench.save(checkpoints, 2)
    assert bench.names() == ["checkpoint_1"]


def test_free_space_is_checked_before_anything_is_written(bench: Bench) -> None:
    checkpoints = bench.fresh(expected_bytes=2**60)
    with pytest.raises(CheckpointError, match="free disk space"):
        bench.save(checkpoints, 1)
    assert bench.names() == []


REFUSED, WARNED = "2 checkpoints of 1 MiB will", "up to .* checkpoints of 1 MiB will"
KEEP = "keep_checkpoints"


@pytest.mark.parametrize(
    "settings, saved, room, expected",
    [
        ({}, (), 8, None),
        ({}, (), 7, r"8 checkpoints of 1 MiB will .* \(--set keep_checkpoints=6\)"),
        ({}, (), 0, "enough for 0 more; free disk space, or write to another disk"),
        ({KEEP: 1}, (), 1, REFUSED),
        ({KEEP: 1}, (), 2, WARNED),  # the best of each stage may be another one
        ({KEEP: 1}, (), 6, None),
        ({"save_only_improve": True}, (), 2, WARNED),
        ({"save_only_improve": True}, (), 8, None),
        ({"advance_at": 0.9}, (), 1, REFUSED),
        ({"advance_at": 0.9}, (), 2, WARNED),
        ({"save_steps": 3}, (), 8, "up to 9 checkpoints"),
        ({}, ((6, 0),), 2, None),
        ({}, ((6, 0),), 1, "3 checkpoints of 1 MiB will .*enough for 1 more"),
        ({}, ((6, 0), (7, 3)), 1, None),  # the newest is removed once the next is complete
        ({}, ((8, 0),), 0, None),  # nothing left to train
    ],
)
def test_all_checkpoints_of_a_run_are_counted_before_it_trains(
    bench, tmp_path, monkeypatch, settings, saved, room, expected
):
    """Eight epochs of four stages; `room`: how many more checkpoints the disk holds."""
    values = ANY_DATA | {"method": "coconut", "num_epochs": 8, "epochs_per_stage": [2, 2, 2, 2]} | settings
    experiment = validate_experiment(
        values | {"save_path": str(tmp_path.parent), "name": tmp_path.name, "max_latent_stage": 3}, "test"
    )
    for epoch, step in saved:
        bench.save(bench.fresh(), epoch, step)
    free = room * 2**20 + checkpoint_files.SPARE_BYTES
    monkeypatch.setattr(checkpoint_files, "_free_bytes", lambda folder: free)
    lines: list[str] = []
    if expected is not None and not expected.startswith("up to"):
        with pytest.raises(CheckpointError, match=expected):
            check_disk(experiment, 2**20, lines.append)
    else:
        check_disk(experiment, 2**20, lines.append)
    assert len(lines) == (expected or "").startswith("up to")
    assert all(re.search(expected, line) for line in lines)


def test_room_for_what_is_expected_is_asked_for_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is listed for the message only where there is one."""
    checkpoints = bench.fresh(expected_bytes=100)
    monkeypatch.setattr(checkpoints, "_remaining", lambda: pytest.fail("nothing went wrong"))
    bench.save(checkpoints, 1)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41342"),
        torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:94, remote process exited"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
@pytest.mark.parametrize("place", ["shards", "model", "random state", "conversion"])
def test_a_lost_rank_or_a_full_memory_is_not_a_disk_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    import coconut_ds.runs.checkpoints as protocol

    def failing(*_: object) -> None:
        raise error

    bench.save(bench.fresh(), 1)
    as_of_two_ranks(bench.folder / "checkpoint_1")
    checkpoints = bench.fresh()
    if place in ("shards", "conversion"):
        bench.engine.fails_in_save = error
    if place == "random state":
        monkeypatch.setattr(protocol, "save_random_state", failing)
    with pytest.raises(type(error)) as caught:
        if place == "conversion":
            checkpoints.load(allow=["world_size", "rows_per_step"])
        else:
            checkpoints.save(TrainState(2), failing if place == "model" else write_model)
    assert caught.value is error


def test_settings_that_need_leave(bench: Bench) -> None:
    bench.save(bench.fresh(), 1)
    changed = {**SETTINGS, "experiment": {"lr": 3e-4, "method": "coconut"}}
    with pytest.raises(CheckpointError, match="--allow lr"):
        bench.fresh(settings=changed).load()
    assert bench.fresh(settings=changed).load(allow=["lr"]) is not None
    assert any("lr: 0.0001 when saved, 0.0003 now" in line for line in bench.lines)


def as_of_two_ranks(folder: Path) -> None:
    dataclasses.replace(Manifest.read(folder), world_size=2).write(folder)


def test_another_number_of_ranks_loads_through_a_conversion(bench: Bench) -> None:
    bench.save(bench.fresh(), 1)
    assert bench.fresh().load() is not None and not bench.engine.converted
    as_of_two_ranks(bench.folder / "checkpoint_1")
    with pytest.raises(CheckpointError, match="--allow world_size"):
        bench.fresh().load()
    state = bench.fresh().load(allow=["world_size", "rows_per_step"])
    assert state is not None and state.epoch == 1
    assert bench.engine.converted and bench.engine.weights.tolist() == [10.0] * 4
    assert bench.names() == ["checkpoint_1"]


def test_another_zero_stage_loads_through_a_conversion(bench: Bench) -> None:
    bench.save(bench.fresh(), 1)
    stage_3 = {**SETTINGS, "ds_config": {"zero_optimization": {"stage": 3}}}
    with pytest.raises(CheckpointError, match="--allow ds_layout"):
        bench.fresh(settings=stage_3).load()
    assert bench.fresh(settings=stage_3).load(allow=["ds_layout"]) is not None
    assert bench.engine.converted
    assert any("for the new ZeRO settings" in line for line in bench.lines)


def test_conversion_that_cannot_be_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.save(bench.fresh(), 1)
    as_of_two_ranks(bench.folder / "checkpoint_1")
    checkpoints = bench.fresh()
    bench.engine.fails_in_save = RuntimeError("PytorchStreamWriter failed")
    with pytest.raises(CheckpointError, match="PytorchStreamWriter failed"):
        checkpoints.load(allow=["world_size", "rows_per_step"])
    usage = shutil.disk_usage(bench.folder)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match="converting .* for world size 1 needs .* free disk space"):
        bench.fresh().load(allow=["world_size", "rows_per_step"])
    assert bench.names() == ["checkpoint_1"]


def test_manifest_with_a_path_that_leads_out(bench: Bench) -> None:
    bench.save(bench.fresh(), 1)
    folder = bench.folder / "checkpoint_1"
    (bench.folder / "outside").write_text("secret")
    manifest = Manifest.read(folder)
    record = next(iter(manifest.files.values()))
    for path in ("../outside", str(bench.folder / "outside")):
        Manifest(manifest.state, {}, 1, False, {path: record}).write(folder)
        with pytest.raises(CheckpointError, match="leads out"):
            Manifest.read(folder).verify(folder)


def test_manifest_says_what_a_person_wants_to_know(bench: Bench) -> None:
    bench.save(bench.fresh(), 2, accuracy=0.5)
    content = json.loads((bench.folder / "checkpoint_2" / MANIFEST).read_text())
    assert content["state"]["epoch"] == 2 and content["world_size"] == 1 and content["improved"]
    assert content["settings"]["data"] == {"train": "abc"}
    assert set(content["files"]) == {"engine/zero_rank_0.pt", "model/config.json", "random/rank_00000.pt"}
