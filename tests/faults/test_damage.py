"""Checkpoints, data and settings that are not what they were: used, skipped or refused, with the reason."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoModelForCausalLM

from coconut_ds.engine.engine import Engine
from tests.faults.comparing import Numbers
from tests.faults.conftest import Bench
from tests.launched.forked import Ended, Warm

STEP = "coconut_ds.engine.engine:Engine.step"
OLDER = "checkpoint_1"  # the newest is of the second epoch, where the stop was noticed


@pytest.fixture(scope="module")
def stopped(task: Path, tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """A run of one rank that was stopped in its second epoch."""
    bench = Bench(task, tmp_path_factory.mktemp("stopped"), warm)
    stop = {"at": "coconut_ds.engine.engine:Engine.step", "call": 15, "do": "TERM@self"}
    ended = bench.train(ranks=1, faults=[stop])
    assert ended.codes == [75], ended.output
    return bench.folder


@pytest.fixture
def broken(task: Path, stopped: Path, tmp_path: Path, warm: Warm) -> Bench:
    """The stopped run, ready to be broken and started again."""
    bench = Bench(task, tmp_path / "bench", warm)
    shutil.copytree(stopped / "runs", bench.folder / "runs")
    return bench


def newest(bench: Bench) -> Path:
    return bench.run_folder / bench.checkpoints()[-1]


def shard(bench: Bench) -> Path:
    return next(newest(bench).glob("engine/*optim_states.pt"))


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def edit_manifest(bench: Bench) -> None:
    path = newest(bench) / "manifest.json"
    content = json.loads(path.read_text())
    content["state"]["global_step"] = 17
    path.write_text(json.dumps(content))


def replace_shard_by_link(bench: Bench) -> None:
    path = shard(bench)
    shutil.move(path, bench.folder / "elsewhere")
    path.symlink_to(bench.folder / "elsewhere")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES: dict[str, tuple[Callable[[Bench], object], str]] = {
    "shard truncated": (lambda b: os.truncate(shard(b), 1000), "has 1000 bytes"),
    "shard with one bit flipped": (lambda b: flip_bit(shard(b)), "is damaged"),
    "shard missing": (lambda b: shard(b).unlink(), "is missing"),
    "shard of another run": (lambda b: shutil.copy(shard(b), f"{shard(b)}.1"), "does not belong"),
    "shard replaced by a link": (replace_shard_by_link, "is a link"),
    "weights with one bit flipped": (lambda b: flip_bit(newest(b) / "model/model.safetensors"), "is damaged"),
    "manifest edited": (edit_manifest, "was changed after it was written"),
    "manifest missing": (lambda b: (newest(b) / "manifest.json").unlink(), "not a complete checkpoint"),
    "folder empty": (lambda b: empty(newest(b)), "not a complete checkpoint"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_is_skipped(broken: Bench, alone: Numbers, kind: str) -> None:
    damage, reason = DAMAGES[kind]
    name = newest(broken).name
    damage(broken)
    ended = broken.train(ranks=1)
    assert ended.codes == [0], ended.output
    assert f"skipped {name}" in ended.output and reason in ended.output
    assert f"resumed from {broken.run_folder}/{OLDER}:" in ended.output
    assert broken.numbers() == alone


def test_all_checkpoints_damaged(broken: Bench) -> None:
    for name in broken.checkpoints():
        os.truncate(broken.run_folder / name / "model/model.safetensors", 10)
    assert_refused(broken.train(ranks=1), "every checkpoint is damaged")


def test_latest_points_nowhere(broken: Bench, alone: Numbers) -> None:
    (broken.run_folder / "latest").write_text("checkpoint_99\n")
    ended = broken.train(ranks=1)
    assert ended.codes == [0] and "names checkpoint_99; the newest complete checkpoint is" in ended.output
    assert broken.numbers() == alone


def test_asked_for_checkpoint(broken: Bench, alone: Numbers) -> None:
    assert_refused(broken.train("--checkpoint", "checkpoint_7", ranks=1), "no such checkpoint")
    damaged = newest(broken) / "model/model.safetensors"
    name = newest(broken).name
    content = damaged.read_bytes()
    flip_bit(damaged)
    assert_refused(broken.train("--checkpoint", name, ranks=1), "is damaged")
    damaged.write_bytes(content)
    ended = broken.train("--checkpoint", OLDER, ranks=1)
    assert ended.codes == [0] and f"set aside {name}" in ended.output
    assert broken.numbers() == alone


def test_draft_of_a_dead_run_is_swept(broken: Bench, alone: Numbers) -> None:
    shutil.copytree(newest(broken), broken.run_folder / ".tmp-checkpoint_2-12345678")
    assert broken.train(ranks=1).codes == [0]
    assert broken.numbers() == alone and not list(broken.run_folder.glob(".tmp-*"))


def assert_refused(ended: Ended, *reasons: str) -> None:
    assert set(ended.codes) == {2}, ended.output
    assert ended.output.count("error: ") == 1 and "Traceback" not in ended.output, ended.output
    for reason in reasons:
        assert reason in ended.output


def test_training_file_changed(broken: Bench) -> None:
    path = broken.folder / "data/arithmetic_train.json"
    problems = json.loads(path.read_text())
    path.write_text(json.dumps(problems[::-1]))
    assert_refused(broken.train(ranks=1), "the training file's content changed", "--allow data.train")
    assert broken.train("--allow", "data.train", ranks=1).codes == [0]


@pytest.mark.parametrize(
    "setting, reasons",
    [
        ("lr=0.02", ("lr: 0.01 when saved, 0.02 now", "--allow lr")),
        ("gradient_accumulation_steps=1", ("--allow gradient_accumulation_steps",)),
        ("method=cot", ("impossible", "load_model_path")),
    ],
)
def test_settings_changed(broken: Bench, setting: str, reasons: tuple[str, ...]) -> None:
    assert_refused(broken.train("--set", setting, ranks=1), *reasons)


def test_new_learning_rate_counts(broken: Bench) -> None:
    """DeepSpeed's own load would bring the old one back."""
    ended = broken.train("--set", "lr=0.02", "--allow", "lr", ranks=1)
    assert ended.codes == [0], ended.output
    lines = [json.loads(line) for line in (broken.run_folder / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if line["kind"] == "train"}
    num_steps, warm_up = 36, 7

    def rate(step: int, peak: float) -> float:
        return peak * (num_steps + 1 - step) / (num_steps - warm_up)

    assert rates[15] == pytest.approx(rate(15, 0.01)) and rates[20] == pytest.approx(rate(20, 0.02))


def test_another_zero_stage(broken: Bench) -> None:
    stage1 = broken.arguments()[:-1] + [broken.arguments()[-1].replace("zero2", "zero1")]
    ended = broken.warm.start(stage1, broken.folder).wait()
    assert_refused(ended, "zero_optimization.stage: 2 when saved, 1 now")


def test_another_number_of_ranks(broken: Bench) -> None:
    assert_refused(broken.train(ranks=2), "world_size: 1 when saved, 2 now", "--allow world_size")


def test_two_runs_in_one_folder(bench: Bench) -> None:
    first = bench.start(ranks=1, faults=[{"at": STEP, "call": 5, "do": "sleep"}])
    while not (bench.run_folder / "environment.json").exists():  # the plan is there before it
        assert first.processes[0].is_alive(), first.output
    plan = bench.run_folder / "memory/plan.json"
    written = plan.stat().st_mtime_ns
    try:
        assert_refused(bench.train(ranks=2), "another run is writing here (pid")
        assert plan.stat().st_mtime_ns == written
    finally:
        first.processes[0].kill()
        first.wait()
    assert bench.train(ranks=1).codes == [0]  # the lock went with the process


@pytest.mark.parametrize("more", [(), ("--skip-plan",)])
def test_save_path_that_cannot_be_written(bench: Bench, more: tuple[str, ...]) -> None:
    (bench.folder / "file").write_text("")
    ended = bench.train("--set", f"save_path={bench.folder}/file/runs", *more)
    assert_refused(ended, "cannot write here (Not a directory", "choose another 'save_path'")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def on_disk(bench: Bench, folder: Path) -> None:
    experiment = yaml.safe_load(bench.experiment.read_text())
    bench.experiment.write_text(yaml.safe_dump({**experiment, "save_path": str(folder)}))
    bench.run_folder = folder / "run"


def test_the_first_checkpoint_is_as_large_as_expected(broken: Bench) -> None:
    """What the free-space check asks for, against the files of a real checkpoint."""
    engine = Engine.__new__(Engine)
    engine._engine = SimpleNamespace(module=AutoModelForCausalLM.from_pretrained(broken.folder / "model"))
    engine.zero_stage, engine.excludes_frozen, engine.moments_bytes = 2, False, 8
    files = [*newest(broken).glob("engine/*.pt"), newest(broken) / "model/model.safetensors"]
    written = sum(path.stat().st_size for path in files)
    expected = engine.checkpoint_bytes()
    assert expected <= written <= expected + 2**15, (expected, written)


def test_disk_too_small_for_a_checkpoint(bench: Bench, small_disk: Path, alone: Numbers) -> None:
    """Found before anything is written; with room again, the run goes on."""
    on_disk(bench, small_disk)
    filler = {
        "at": "coconut_ds.runs.checkpoints:Checkpoints.save",
        "call": 2,
        "do": f"fill {small_disk}/filler",
    }
    ended = bench.train(ranks=1, faults=[filler])
    assert_refused(
        ended,
        "a checkpoint needs",
        "free disk space",
        "The newest checkpoint is still checkpoint_0_step_0000004",
    )
    (small_disk / "filler").unlink()
    assert bench.train(ranks=1).codes == [0]
    assert bench.numbers() == alone


@pytest.mark.parametrize("rank", [0, 1])
def test_disk_full_in_the_middle_of_saving(
    bench: Bench, small_disk: Path, reference: Numbers, rank: int
) -> None:
    """Another program takes the space after the check."""
    on_disk(bench, small_disk)
    filler = {"rank": rank, "at": "coconut_ds.runs.checkpoints:save_random_state", "call": 2}
    ended = bench.train(faults=[{**filler, "do": f"fill {small_disk}/filler"}])
    assert ended.left == [] and 2 in ended.codes, ended.output
    assert f"rank {rank}: " in ended.output and "the disk is full" in ended.output, ended.output
    assert "The newest checkpoint is still checkpoint_0_step_0000004" in ended.output
    (small_disk / "filler").unlink()
    assert bench.train().codes == [0, 0]
    assert bench.numbers() == reference
