"""Run a grid of experiments one after another; what is finished is skipped, what fails is reported.

    grid.yaml       config: configs/full/gsm_coconut.yaml
                    deepspeed_config: ds_configs/zero2_offload.json
                    set: [num_epochs=10]
                    grid: {method: [coconut, cot], seed: [0, 1, 2], deepspeed_config: [A.json, B.json]}

Every run is named after the grid's values and trains in a process of its own, so a crash ends one run alone.
Knows: settings, run folders, the launcher's command line.  Does not know: training.
"""

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import Experiment, load_experiment, parse_overrides
from coconut_ds.config.methods import METHOD_BOOLEANS
from coconut_ds.config.schemas.parsing import parse_yaml_value, read_yaml
from coconut_ds.engine.rendezvous import free_port
from coconut_ds.errors import ConfigError, StopRequested
from coconut_ds.files import open_append
from coconut_ds.reports.run_records import read_run
from coconut_ds.runs.run_folder import run_folder

DS_CONFIG = "deepspeed_config"
KEYS = ("config", DS_CONFIG, "set", "grid", "name")
FINISHED, SKIPPED, FAILED, STOPPED = "finished", "already finished", "failed", "stopped"
LOG = "sweep.log"
PID_FOLDER = "COCONUT_PID_FOLDER"  # where ranks leave their process ids
SAVE_SECONDS = 600


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    config: str
    ds_config: str
    overrides: tuple[str, ...]
    experiment: Experiment

    @property
    def folder(self) -> Path:
        return run_folder(self.experiment)

    def is_finished(self) -> bool:
        """Whether its folder holds the result of the last epoch, of these very settings."""
        if not (self.folder / "experiment.yaml").is_file():
            return False
        run = read_run(self.folder)
        if run.experiment != self.experiment:
            return False
        last = self.experiment.num_epochs - 1
        kind = "test" if self.experiment.test_path else "valid"
        return any(int(line["epoch"]) >= last for line in run.of(kind))


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `said` is its last words."""

    point: Point
    state: str
    seconds: float = 0.0
    said: str = ""


def read_grid(path: str | Path) -> dict[str, Any]:
    """A grid file.  Raises ConfigError for keys that it cannot have."""
    values = read_yaml(path)
    unknown = sorted(values.keys() - set(KEYS))
    if unknown:
        raise ConfigError(f"{path}: '{unknown[0]}' is not a key of a grid; there are {', '.join(KEYS)}")
    if "config" not in values or not isinstance(values.get("grid"), dict):
        raise ConfigError(
            f"{path}: needs 'config', an experiment YAML, and 'grid', lists of values by setting"
        )
    return values


def parse_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """{'seed': [0, 1]} from ['seed=0,1'].  Raises ConfigError."""
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise ConfigError(f"--grid {text}: must be KEY=VALUE,VALUE,...")
        axes[key.strip()] = [parse_yaml_value(value, f"--grid {text}") for value in values.split(",")]
    return axes


def points(
    config: str,
    ds_config: str | None,
    overrides: Sequence[str],
    axes: Mapping[str, Sequence[Any]],
    name: str | None = None,
) -> list[Point]:
    """Every combination of the axes' values, checked; the first axis changes slowest.

    Raises ConfigError with the problems of all combinations, and for two of the same name.
    """
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid: '{key}' needs a list of values, got {values!r}")
    base = name or load_experiment(config, overrides).name
    found, problems = [], []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        path = chosen.pop(DS_CONFIG, ds_config)
        if path is None:
            raise ConfigError("name a --deepspeed_config, or put deepspeed_config into the grid")
        words = [f"{key}-{_word(value)}" for key, value in chosen.items()]
        words += [Path(path).stem] if DS_CONFIG in axes else []
        more = [*overrides, f"name={'-'.join([base, *words])}"]
        more += [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
        if "method" in chosen:  # the file's own boolean would name a second method
            more += _no_booleans(config, more)
        try:
            load_ds_config(path)
            found.append(Point(config, path, tuple(more), load_experiment(config, more)))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    names = [str(point.folder) for point in found]
    if any(point.experiment.debug for point in found):
        raise ConfigError(
            "debug: true saves nothing, so a sweep could not tell what is finished; set it to false"
        )
    for twice in {path for path in names if names.count(path) > 1}:
        raise ConfigError(f"grid: two combinations would write to {twice}")
    return found


def _no_booleans(config: str, overrides: Sequence[str]) -> list[str]:
    given = {**read_yaml(config), **parse_overrides(overrides)}
    return [f"{key}=false" for key in METHOD_BOOLEANS if given.get(key)]


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isalnum() or letter in "._+" else "_" for letter in text)


def launch_command(point: Point, num_gpus: int, port: int | None = None) -> list[str]:
    """The command line that trains a point: through the `deepspeed` launcher, or as one process."""
    settings = [word for override in point.overrides for word in ("--set", override)]
    arguments = ["train", point.config, "--deepspeed_config", point.ds_config, *settings]
    if num_gpus == 1:
        return [sys.executable, "-m", "coconut_ds", *arguments]
    beside = Path(sys.executable).with_name("deepspeed")
    launcher = str(beside) if beside.exists() else shutil.which("deepspeed") or "deepspeed"
    ranks = ["--num_gpus", str(num_gpus), "--master_port", str(port or free_port())]
    return [launcher, *ranks, "--module", "coconut_ds", *arguments]


def run_all(grid: Sequence[Point], num_gpus: int, say: Callable[[str], None] = print) -> list[Outcome]:
    """Train every point that is not finished; a failure is noted and the next one begins.

    A run that was asked to stop (exit code 75, Ctrl-C) ends the sweep: the same command goes on from there.
    """
    outcomes: list[Outcome] = []
    for place, point in enumerate(grid, 1):
        title = f"[{place}/{len(grid)}] {point.experiment.name}"
        if point.is_finished():
            say(f"{title}: already finished")
            outcomes.append(Outcome(point, SKIPPED))
            continue
        say(f"{title}: {shlex.join(launch_command(point, num_gpus))}")
        with _termination_as_interrupt():
            outcomes.append(_run(point, num_gpus))
        said = f" ({outcomes[-1].said})" if outcomes[-1].said else ""
        say(f"{title}: {outcomes[-1].state} after {outcomes[-1].seconds:.0f} s{said}")
        if outcomes[-1].state == STOPPED:
            break
    return outcomes


def _run(point: Point, num_gpus: int) -> Outcome:
    point.folder.mkdir(parents=True, exist_ok=True)
    log = point.folder / LOG
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as ids, open_append(log, "a") as writer:
        process = subprocess.Popen(
            launch_command(point, num_gpus),
            stdout=writer,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, PID_FOLDER: ids},
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _stop(process, Path(ids))
            code = StopRequested.exit_code
    seconds = time.monotonic() - started
    if code == 0 and point.is_finished():
        return Outcome(point, FINISHED, seconds)
    if code == StopRequested.exit_code:
        return Outcome(point, STOPPED, seconds, "the same command goes on")
    return Outcome(point, FAILED, seconds, f"exit code {code}: {last_words(log)}; {log}")


def _stop(process: subprocess.Popen[bytes], ids: Path) -> None:
    """Have the ranks save and end; a launcher that is told itself would kill them instead."""
    ranks = _living(ids)
    if not ranks:
        os.killpg(process.pid, signal.SIGTERM)
    for rank in ranks:
        os.kill(rank, signal.SIGTERM)
    deadline = time.monotonic() + SAVE_SECONDS
    while (process.poll() is None or _living(ids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _living(ids: Path) -> list[int]:
    """Processes that left a file of their id in the folder (signals.py) and still run."""
    return [int(path.name) for path in ids.iterdir() if Path("/proc", path.name).exists()]


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_words(log: Path) -> str:
    """The line of a log that tells most: the last one that names an error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    telling = [line for line in lines if "rror" in line and "exits with return code" not in line]
    return (telling or [line for line in lines if line] or ["no output"])[-1][:200]
