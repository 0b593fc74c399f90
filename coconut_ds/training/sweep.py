"""Run a grid of experiments one after another; skip finished runs and report failed ones.

    grid.yaml       config: configs/full/gsm_coconut.yaml
                    deepspeed_config: ds_configs/zero2_offload.json
                    set: [num_epochs=10]
                    grid: {method: [coconut, cot], seed: [0, 1, 2], deepspeed_config: [A.json, B.json]}

Every run is named after its grid values and trains in its own process, so a crash ends only that run.
"""

import itertools
import json
import os
import re
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

from coconut_ds.config.deepspeed import default_ds_config, load_ds_config
from coconut_ds.config.experiment import Experiment, load_experiment, parse_overrides
from coconut_ds.config.methods import METHOD_BOOLEANS
from coconut_ds.config.schema import parse_yaml_value, read_json, read_yaml
from coconut_ds.engine.watchdog import free_port
from coconut_ds.errors import ConfigError, StopRequested
from coconut_ds.files import VERBOSE, open_append
from coconut_ds.reports.run_records import read_run
from coconut_ds.runs.changes import data_hashes, learned_ds_settings
from coconut_ds.runs.checkpoint_folders import CheckpointFolders
from coconut_ds.runs.run_folder import run_folder

DS_CONFIG = "deepspeed_config"
KEYS = ("config", DS_CONFIG, "set", "grid", "name")
FINISHED, SKIPPED, FAILED, STOPPED = "finished", "already finished", "failed", "stopped"
LOG = "sweep.log"
SAVE_SECONDS = 600
MAX_SEEDS = 10_000  # of one range


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    config: str
    ds_config: str
    overrides: tuple[str, ...]
    experiment: Experiment
    ds_overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return run_folder(self.experiment)

    def is_finished(self) -> bool:
        """Whether the run folder has the last epoch's result, from the same data and settings."""
        if not (self.folder / "experiment.yaml").is_file():
            return False
        run = read_run(self.folder)
        last = self.experiment.num_epochs - 1
        kind = "test" if self.experiment.test_path else "valid"
        manifests = list(CheckpointFolders(self.folder).manifests().values())
        ended_early = kind == "valid" and bool(manifests) and manifests[-1].state.epoch > last
        ended = ended_early or any(int(line["epoch"]) >= last for line in run.of(kind))
        if run.experiment.identity != self.experiment.identity or not ended:
            return False
        before = learned_ds_settings(run.ds_config)
        now = learned_ds_settings(read_json(self.ds_config))
        if any(before.get(key, value) != value for key, value in now.items()):
            return False
        saved = manifests[-1].settings.get("data", {}) if manifests else {}
        return all(saved.get(name, value) == value for name, value in data_hashes(self.experiment).items())


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    point: Point
    state: str
    seconds: float = 0.0
    message: str = ""


def read_grid(path: str | Path) -> dict[str, Any]:
    """Read a grid file. Raises ConfigError for unknown or missing keys."""
    values = read_yaml(path)
    unknown = sorted(values.keys() - set(KEYS))
    if unknown:
        raise ConfigError(f"{path}: '{unknown[0]}' is not a key of a grid; use one of {', '.join(KEYS)}")
    if "config" not in values or not isinstance(values.get("grid"), dict):
        raise ConfigError(
            f"{path}: needs 'config' (an experiment YAML) and 'grid' (a list of values per setting)"
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


def parse_seeds(text: str) -> list[int]:
    """[100, 101, 7] from '100-101,7'.  Raises ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + MAX_SEEDS:
            raise ConfigError(f"--seeds {text}: {part!r} is not a seed or a range like 0-19")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def points(
    config: str,
    ds_config: str | None,
    overrides: Sequence[str],
    axes: Mapping[str, Sequence[Any]],
    name: str | None = None,
    ds_overrides: Sequence[str] = (),
) -> list[Point]:
    """Check and return every combination of the axes' values; the first axis changes slowest.

    Raises ConfigError with the errors of all combinations, and for two combinations of the same name.
    """
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid: '{key}' needs a list of values, got {values!r}")
    base = name or load_experiment(config, overrides).name
    results, errors = [], []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        path = chosen.pop(DS_CONFIG, ds_config) or default_ds_config()
        words = [f"{key}-{_word(value)}" for key, value in chosen.items()]
        words += [Path(path).stem] if DS_CONFIG in axes else []
        more = [*overrides, f"name={'-'.join([base, *words])}"]
        more += [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
        if "method" in chosen:  # a boolean in the file would select a second method
            more += _no_booleans(config, more)
        try:
            load_ds_config(path, ds_overrides)
            experiment = load_experiment(config, more)
            results.append(Point(config, path, tuple(more), experiment, tuple(ds_overrides)))
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(dict.fromkeys(errors)))
    names = [str(point.folder) for point in results]
    if any(point.experiment.debug for point in results):
        raise ConfigError(
            "debug: true saves nothing, so a sweep cannot tell which runs are finished; set debug: false"
        )
    for twice in {path for path in names if names.count(path) > 1}:
        raise ConfigError(f"grid: two combinations would write to {twice}")
    return results


def _no_booleans(config: str, overrides: Sequence[str]) -> list[str]:
    given = {**read_yaml(config), **parse_overrides(overrides)}
    return [f"{key}=false" for key in METHOD_BOOLEANS if given.get(key)]


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isalnum() or letter in "._+" else "_" for letter in text)


def launch_module(module: str, num_gpus: int, port: int | None = None) -> list[str]:
    """The first words of a command line that runs a module: the `deepspeed` launcher, or one process."""
    if num_gpus == 1:
        return [sys.executable, "-m", module]
    beside = Path(sys.executable).with_name("deepspeed")
    launcher = str(beside) if beside.exists() else shutil.which("deepspeed") or "deepspeed"
    words = [*which_gpus(num_gpus), "--master_port", str(port or free_port())]
    quiet = [] if os.environ.get(VERBOSE) else ["--log_level", "error"]
    return [launcher, *words, *quiet, "--module", module]


def which_gpus(count: int) -> list[str]:
    """The launcher's arguments for `count` GPUs: it ignores CUDA_VISIBLE_DEVICES beside --num_gpus."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or os.environ.get("DS_ACCELERATOR") == "cpu":
        return ["--num_gpus", str(count)]
    numbers = visible.split(",")
    if count > len(numbers):
        raise ConfigError(f"{count} GPUs, but CUDA_VISIBLE_DEVICES={visible} names {len(numbers)}")
    return ["--include", "localhost:" + ",".join(numbers[:count])]


def launch_command(point: Point, num_gpus: int, port: int | None = None) -> list[str]:
    """The command line that trains a point."""
    settings = [word for override in point.overrides for word in ("--set", override)]
    settings += [word for override in point.ds_overrides for word in ("--ds", override)]
    arguments = ["train", point.config, "--deepspeed_config", point.ds_config, *settings]
    verbose = ["--verbose"] if os.environ.get(VERBOSE) else []
    return [*launch_module("coconut_ds", num_gpus, port), *arguments, *verbose]


def run_all(grid: Sequence[Point], num_gpus: int, log: Callable[[str], None] = print) -> list[Outcome]:
    """Train every point that is not finished; record failures and continue with the next point.

    A stopped run (exit code 75, Ctrl-C) ends the sweep; the same command resumes it.
    """
    outcomes: list[Outcome] = []
    for number, point in enumerate(grid, 1):
        title = f"[{number}/{len(grid)}] {point.experiment.name}"
        if point.is_finished():
            log(f"{title}: already finished")
            outcomes.append(Outcome(point, SKIPPED))
            continue
        log(f"{title}: {shlex.join(launch_command(point, num_gpus))}")
        with _termination_as_interrupt():
            outcomes.append(_run(point, num_gpus))
        message = f" ({outcomes[-1].message})" if outcomes[-1].message else ""
        log(f"{title}: {outcomes[-1].state} after {outcomes[-1].seconds:.0f} s{message}")
        if outcomes[-1].state == STOPPED:
            break
    return outcomes


def _run(point: Point, num_gpus: int) -> Outcome:
    from coconut_ds.distributed import PID_FOLDER  # imports torch, which --help does not need

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
        return Outcome(point, STOPPED, seconds, "run the same command to resume")
    return Outcome(point, FAILED, seconds, f"exit code {code}: {last_words(log)}; {log}")


def _stop(process: subprocess.Popen[bytes], ids: Path) -> None:
    """Ask the ranks to save and end. A signal to the launcher would make it kill them instead."""
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
    """Running processes that wrote a file named after their id into the folder (distributed.py)."""
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
    """The most informative line of a log: the last one that names an error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line for line in lines if "rror" in line and "exits with return code" not in line]
    return (errors or [line for line in lines if line] or ["no output"])[-1][:200]
