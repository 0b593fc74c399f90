"""From the command to the first optimizer step of the quickstart, phase by phase, two ranks on the CPU.

    python -m benchmarks.startup            JSON: seconds and CPU seconds of each phase, medians

The run is the real one, `deepspeed --num_gpus 2 --module coconut_ds train configs/quickstart/coconut.yaml`,
with clocks around the trainer's calls, and ended after its first step.  DeepSpeed's operators are compiled.
  launcher      from the command until the rank's interpreter starts
  imports       until the trainer is imported
  data, distributed, plan, model, engine, first_step     the calls of that name;  other: what is between them
CPU seconds are those of rank 0 alone; with them runs compare on a busy machine too.

Knows: the launcher, the trainer's functions.  Does not know: what they do.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coconut_ds.engine.watchdog import free_port

ROOT = Path(__file__).resolve().parents[1]
OUT = "COCONUT_DS_STARTUP_OUT"
# Functions of coconut_ds.training.trainer, by the phase they make up.
PHASES = {
    "data": "load_run_data",
    "distributed": "start_distributed",
    "plan": "enforce_memory_budget",
    "model": "build_module",
    "engine": "Engine",
}
ORDER = ("launcher", "imports", *PHASES, "first_step", "other")


def interpreter_started() -> float:
    """When this process began, in seconds since 1970."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def rank_main() -> None:
    """One rank: the trainer with clocks around its calls, ended after the first step."""
    began = interpreter_started()
    from coconut_ds import __main__ as program
    from coconut_ds.cli import train as command  # noqa: F401  what the program would import
    from coconut_ds.training import trainer  # isort: skip

    seconds = {"imports": time.time() - began}
    cpu = {"imports": time.process_time()}

    def timed(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            start, cpu_start = time.time(), time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                seconds[phase], cpu[phase] = time.time() - start, time.process_time() - cpu_start

        return wrapper

    for phase, name in PHASES.items():
        if name != "Engine":
            setattr(trainer, name, timed(phase, getattr(trainer, name)))
    trainer.Engine.__init__ = timed("engine", trainer.Engine.__init__)  # type: ignore[method-assign]
    first_step = timed("first_step", trainer.Trainer.step)

    def step_and_end(self: Any, micro_batches: Any) -> None:
        first_step(self, micro_batches)
        ended = time.time()
        cpu["other"] = time.process_time() - sum(cpu.values())
        if self.engine.is_main:
            text = json.dumps({"began": began, "ended": ended, "seconds": seconds, "cpu_seconds": cpu})
            Path(os.environ[OUT]).write_text(text, encoding="utf-8")
        self.engine.barrier()
        os._exit(0)

    trainer.Trainer.step = step_and_end  # type: ignore[method-assign,assignment]
    sys.exit(program.main())


def start_once(data: Path, out: Path, ranks: int, port: int | None = None) -> dict[str, dict[str, float]]:
    """Seconds and CPU seconds of every phase of one start."""
    overrides = {
        "model_id": data / "gpt2",
        "save_path": out.parent / "runs",
        "name": out.stem,
        **{f"{key}_path": data / f"arithmetic_{split}.json" for key, split in SPLITS},
    }
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        launcher, "--num_gpus", ranks, "--master_port", port or free_port(),
        "--log_level", "error",
        "--module", "benchmarks.startup", "train", "configs/quickstart/coconut.yaml",
        "--deepspeed_config", "ds_configs/zero2_offload.json",
        *(word for key, value in overrides.items() for word in ("--set", f"{key}={value}")),
    ]  # fmt: skip
    environment = {
        **os.environ, OUT: str(out), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{launcher.parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    started = time.time()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    if not out.is_file():
        raise SystemExit(f"the run did not reach its first step:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found = json.loads(out.read_text(encoding="utf-8"))
    seconds = {"launcher": found["began"] - started, **found["seconds"]}
    seconds["other"] = found["ended"] - started - sum(seconds.values())
    return {"seconds": seconds, "cpu_seconds": found["cpu_seconds"]}


SPLITS = (("train", "train"), ("val", "valid"), ("test", "test"))


def medians(runs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Median of each phase, and of the whole."""
    record: dict[str, Any] = {}
    for kind in ("seconds", "cpu_seconds"):
        values = {
            phase: round(statistics.median(run[kind][phase] for run in runs), 3)
            for phase in ORDER
            if phase in runs[0][kind]
        }
        total = statistics.median(sum(run[kind].values()) for run in runs)
        record[kind] = {**values, "total": round(total, 3)}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=3, help="starts after one that warms the disk cache")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = [sys.executable, "preprocessing/arithmetic.py", "--output-dir", folder]
        make += ["--model-dir", folder / "gpt2"]
        subprocess.run([str(word) for word in make], cwd=ROOT, check=True, capture_output=True, timeout=120)
        runs = [start_once(folder, folder / f"start{i}.json", args.ranks) for i in range(args.repeats + 1)]
    print(json.dumps({"ranks": args.ranks, "repeats": args.repeats, **medians(runs[1:])}))


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank_main()
    else:
        main()
