"""The run folder: complete files, one writer, no line twice after a resume."""

import contextlib
import errno
import fcntl
import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coconut_ds.config.experiment import Experiment, load_experiment, validate_experiment
from coconut_ds.errors import ConfigError
from coconut_ds.runs.run_folder import MAX_SAMPLES, Run, code_version, replace_text, run_folder
from tests.conftest import ROOT

PUBLISHED = {
    "project": "coconut", "name": "first", "coconut": True, "c_thought": 1, "epochs_per_stage": 1,
    "max_latent_stage": 1, "num_epochs": 2, "model_id": "gpt2", "train_path": "train.json",
    "val_path": "valid.json", "batch_size_training": 2, "lr": 1e-4, "seed": 0,
}  # fmt: skip


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return validate_experiment({**PUBLISHED, "save_path": str(tmp_path / "runs")}, "test")


@pytest.fixture(autouse=True)
def _logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def lines(run: Run, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run.folder / name).read_text().splitlines()]


def test_settings_and_environment_are_there(experiment: Experiment) -> None:
    with Run(experiment, {"train_batch_size": 8}, devices=["cpu"], command=["python", "a b"]) as run:
        run.write_settings()
        assert run.folder == run_folder(experiment)
        assert load_experiment(run.folder / "experiment.yaml") == experiment
        assert json.loads((run.folder / "ds_config.json").read_text()) == {"train_batch_size": 8}
        environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["command"] == "python 'a b'" and environment["devices"] == ["cpu"]
    assert {"torch", "deepspeed", "transformers"} <= environment["libraries"].keys()
    assert environment["code"] == code_version()


def test_a_line_is_on_disk_when_log_returns(experiment: Experiment) -> None:
    with Run(experiment, {}) as run:
        run.log("train", step=1, loss=float("nan"))
        run.sample(predicted="naïve ∑", correct=True)
        (line,) = lines(run)
        assert line["kind"] == "train" and line["step"] == 1 and line["loss"] is None and "time" in line
        assert lines(run, "samples.jsonl") == [{"predicted": "naïve ∑", "correct": True}]


def test_rewind_forgets_what_came_after_the_checkpoint(experiment: Experiment) -> None:
    with Run(experiment, {}) as run:
        run.log("train", step=1)
        positions = run.positions()
        run.log("train", step=2)
        run.sample(step=2)
    with Run(experiment, {}) as run:
        run.rewind(positions)
        run.log("train", step=2)
        assert [line["step"] for line in lines(run)] == [1, 2]
        assert lines(run, "samples.jsonl") == []
        run.rewind({})
        assert lines(run) == []


def test_a_line_cut_by_a_kill_does_not_spoil_the_next(experiment: Experiment) -> None:
    with Run(experiment, {}) as run:
        run.log("train", step=1)
    with open(run.folder / "metrics.jsonl", "a") as writer:
        writer.write('{"kind": "tr')
    with Run(experiment, {}) as run:
        run.log("train", step=2)
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1 and json.loads(lines[2])["step"] == 2


def test_two_runs_cannot_share_a_folder(experiment: Experiment) -> None:
    with Run(experiment, {"first": True}) as run:
        run.write_settings()
        program = f"""
            from coconut_ds.config.experiment import load_experiment
            from coconut_ds.runs.run_folder import Run
            Run(load_experiment({str(run.folder / "experiment.yaml")!r}), {{}})
        """
        second = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
        )
        assert "another run is writing here" in second.stderr and f"pid {os.getpid()}" in second.stderr
        assert json.loads((run.folder / "ds_config.json").read_text()) == {"first": True}
    with Run(experiment, {}):  # the lock went with the first run
        pass


def test_other_ranks_and_debug_write_nothing(experiment: Experiment) -> None:
    for run in (Run(experiment, {}, is_main=False), Run(replace(experiment, debug=True), {})):
        with run:
            run.log("train", step=1)
            run.sample(step=1)
            run.rewind({"metrics.jsonl": 3})
            assert run.positions() == {} and run.start_wandb() is None
        assert not run.folder.exists()


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../other", "/etc", "a\0b"])
def test_a_name_that_leaves_save_path(experiment: Experiment, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        run_folder(replace(experiment, name=name))


UNWRITABLE = {
    "a file in the way": ({"save_path": "{tmp}/file"}, None, "Not a directory.*choose another 'save_path'"),
    "too long a name": ({"name": "n" * 300}, None, "File name too long.*shorten 'name'"),
    "read-only": ({}, errno.EROFS, "Read-only file system.*choose another 'save_path'"),
    "no permission": ({}, errno.EACCES, "Permission denied.*choose another 'save_path'"),
    "full disk": ({}, errno.ENOSPC, "No space left on device.*free disk space"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
@pytest.mark.parametrize("written", ["lock", "settings"])
def test_a_folder_that_cannot_be_written(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, written: str
) -> None:
    (tmp_path / "file").write_text("")
    changes, number, message = UNWRITABLE[name]
    changed = replace(experiment, **{key: value.format(tmp=tmp_path) for key, value in changes.items()})
    real = os.open

    def refusing(path, flags, *args, **kwargs):
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *args, **kwargs)

    with pytest.raises(ConfigError, match=message), contextlib.ExitStack() as stack:
        run = stack.enter_context(Run(changed, {})) if written == "settings" and number else None
        if number is not None:
            monkeypatch.setattr(os, "open", refusing)
        if run is None:
            Run(changed, {})
        else:
            run.write_settings()


def test_a_disk_that_fills_up_ends_the_writing_and_leaves_no_half_line(experiment: Experiment) -> None:
    with Run(experiment, {}) as run:
        run.log("train", step=1)
        content = (run.folder / "metrics.jsonl").read_bytes()
        real = run._lines["metrics.jsonl"]._file

        class Full:
            """Writes some bytes and then fails, like a disk that becomes full."""

            truncate = staticmethod(real.truncate)
            close = staticmethod(real.close)

            @staticmethod
            def write(line: bytes) -> int:
                return real.write(line[:7])

        run._lines["metrics.jsonl"]._file = Full()
        run.log("train", step=2)
        message = "metrics.jsonl: cannot write here (No space left on device); free disk space"
        assert message in str(run.write_error)
        run.log("train", step=3)
        run.sample(step=3)
        assert (run.folder / "metrics.jsonl").read_bytes() == content
        assert lines(run, "samples.jsonl") == []


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_and_fsync(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if number != errno.ENOLCK:
        monkeypatch.setattr(os, "fsync", refuse)
    with (
        pytest.warns(UserWarning, match="has no locks.*do not start a second run"),
        Run(experiment, {}) as run,
    ):
        run.write_settings()
        run.log("train", step=1)
        run.rewind({})
    assert load_experiment(run.folder / "experiment.yaml") == experiment


def test_a_disk_error_is_not_taken_for_a_missing_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        replace_text(tmp_path / "latest", "one")


def test_replace_text_leaves_no_temporary_file(tmp_path: Path) -> None:
    replace_text(tmp_path / "latest", "one")
    replace_text(tmp_path / "latest", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert (tmp_path / "latest").read_text() == "two"


@pytest.mark.slow
def test_wandb_is_offline_without_an_account_and_goes_on_under_its_id(experiment, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    ids: list[str | None] = []
    for _ in range(2):
        with Run(experiment, {}) as run:
            ids.append(run.start_wandb(ids[0] if ids else None))
            run.log("train", step=1, loss=0.5)
        time.sleep(1)  # wandb names its folder by the second
    assert ids[0] is not None and ids[0] == ids[1]
    assert len(list((run.folder / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2


def test_wandb_that_does_not_start_is_a_warning(experiment: Experiment, monkeypatch) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    with Run(experiment, {}) as run, pytest.warns(UserWarning, match="wandb did not start.*no service"):
        assert run.start_wandb("old") == "old"
        run.log("train", step=1)
        assert len(lines(run)) == 1


class FakeWandb:
    """Records its calls."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.artifacts: list[tuple[str, str, str]] = []

    def log(self, numbers: dict[str, Any]) -> None:
        self.logged.append(numbers)

    def log_artifact(self, path: str, name: str, type: str) -> None:
        self.artifacts.append((path, name, type))

    def finish(self) -> None:
        self.logged.append({})


def test_wandb_gets_curves_over_the_step_a_bounded_table_and_files(
    experiment: Experiment, tmp_path: Path
) -> None:
    import wandb

    told = FakeWandb()
    with Run(experiment, {}) as run:
        run._wandb = told
        run.log("valid", step=3, accuracy=0.5, window_weights=[0.75, 0.25])
        for index in range(MAX_SAMPLES + 20):
            run.sample(kind="valid", index=index, predicted="7")
        run.show_samples()
        run.attach(tmp_path / "report.html", "report")
    curves, table, _ = told.logged
    assert curves == {
        "step": 3, "valid/accuracy": 0.5, "valid/window_weights/0": 0.75, "valid/window_weights/1": 0.25
    }  # fmt: skip
    assert isinstance(table["samples"], wandb.Table)
    assert len(table["samples"].data) == MAX_SAMPLES
    assert table["samples"].data[-1] == ["valid", str(MAX_SAMPLES + 19), "7"]
    assert told.artifacts == [(str(tmp_path / "report.html"), f"{experiment.name}-report", "report")]


@pytest.mark.parametrize("is_stopping", [True, False])
def test_a_wandb_whose_service_was_ended_prints_no_traceback(experiment, tmp_path, is_stopping) -> None:
    """As after Ctrl-C under `deepspeed`, whose launcher ends the children of a rank too."""
    program = (
        "import pickle, psutil, sys, warnings\n"
        "from coconut_ds.runs.run_folder import Run\n"
        "with Run(pickle.loads(bytes.fromhex(sys.argv[1])), {}) as run:\n"
        "    run.start_wandb()\n"
        f"    run.is_stopping = lambda: {is_stopping}\n"
        "    for child in psutil.Process().children(recursive=True):\n"
        "        child.kill()\n"
        "        child.wait()\n"
        "    run.log('train', step=1, loss=1.0)\n"
        "print('stopped', file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", program, pickle.dumps(experiment).hex()]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("wandb stopped" in done.stderr) is not is_stopping
    assert done.stderr.splitlines()[-1] == "stopped"
    assert is_stopping is False or done.stderr.splitlines() == ["stopped"]


def test_a_wandb_that_breaks_off_is_a_warning(experiment: Experiment, tmp_path: Path) -> None:
    class Broken(FakeWandb):
        def log_artifact(self, path: str, name: str, type: str) -> None:
            raise RuntimeError("gone")

    with Run(experiment, {}) as run:
        run._wandb = Broken()
        with pytest.warns(UserWarning, match="wandb stopped.*gone"):
            run.attach(tmp_path / "report.html", "report")
        assert not run.has_wandb
        run.log("train", step=1)
        assert len(lines(run)) == 1
