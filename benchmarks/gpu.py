"""Measure on a GPU what this project claims: correctness, speed, size, the engine, capacity, learning.

    python -m benchmarks.gpu                                      nine minutes, the most valuable cases first
    python -m benchmarks.gpu --parts c --cases "bf16 stage 6"     cases whose names contain a text
    python -m benchmarks.gpu --parts a,c,d,f,b,e --minutes 60     all of it
    python -m benchmarks.gpu --device cpu --tiny                  a dry run, in minutes

Parts are the modules of benchmarks/gpu_parts/:  a correctness, c speed, d largest, f engine, b capacity,
e learning (half an hour, so only where it is named).  Correctness and speed may use the complete GPU, because
the textbook loop needs it; the others what an 11 GB GPU has for tensors.

Each case has its own time limit and is written to the journal as soon as it is measured, also one that ended
its process.  The same command continues with what is missing; --again measures failures again.  After each
part gpu.json is made of the journal, in benchmarks/results/ or beside --journal; then
`python -m benchmarks.render`.

Needs torch 2.11, transformers 5.17 and DeepSpeed or newer, and this repository.  No network, no CUDA toolkit.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import record
from benchmarks.gpu_parts import Setting

# Most valuable first: seconds of the part and of one case; all but the last part are nine minutes.
PARTS = {
    "a": ("correctness", 90, 60),
    "c": ("speed", 130, 40),
    "d": ("largest", 150, 75),
    "f": ("engine", 90, 60),
    "b": ("capacity", 80, 60),
    "e": ("learning", 1800, 0),  # its runs stop by themselves
}
DEFAULT_PARTS = "a,c,d,f,b"
BUILD_ADAM = """from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("CPUAdamBuilder").load(verbose=False)"""


def part_module(letter: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.gpu_parts.{PARTS[letter][0]}")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The newest record of every case, without a line that a killed process left unfinished."""
    if not path.is_file():
        return []
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            entry = json.loads(line)
            records[entry["part"], entry["case"]] = entry
    return list(records.values())


def write_journal(path: Path, entry: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.read_bytes() if path.is_file() else b""
    with open(path, "a", encoding="utf-8") as writer:
        writer.write("\n" * (written[-1:] not in (b"", b"\n")) + json.dumps(entry) + "\n")


def missing(letter: str, setting: Setting, journal: Path, again: bool, text: str = "") -> list[str]:
    """Cases with `text` in their names without a result, and with `again` those that failed."""
    done = {
        entry["case"]
        for entry in read_journal(journal)
        if entry["part"] == letter and not (entry.get("unfinished") or (again and "error" in entry))
    }
    return [case for case in part_module(letter).cases(setting) if text in case and case not in done]


def work(letter: str, cases: Sequence[str], setting: Setting, journal: Path, seconds: float) -> None:
    """The worker: measure cases until the time is over, each into the journal.

    A case that takes longer than its limit ends the process; so does one that leaves the GPU unusable.
    """
    end = time.monotonic() + seconds
    setting.prepare()
    for case in cases:
        left = end - time.monotonic()
        if left <= 0:
            return
        started = time.monotonic()
        about = {"part": letter, "case": case, **setting.described()}
        write_journal(journal, about | {"error": "the process ended", "unfinished": True})
        if not setting.tiny:
            signal.alarm(PARTS[letter][2])
        try:
            result = part_module(letter).run(case, setting, left)
        except Exception as error:  # one case that fails must not take the others with it
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        signal.alarm(0)
        entry = about | {"took_seconds": round(time.monotonic() - started, 1), **result}
        write_journal(journal, entry)
        print(json.dumps(entry), flush=True)
        setting.forget()  # raises after a CUDA error, which every later case would meet too


def run_worker(command: Sequence[str], seconds: float) -> int | None:
    """The exit code of a worker; None if its time was over.  Nothing that it started is left."""
    worker = subprocess.Popen(command, cwd=record.ROOT, start_new_session=True)
    try:
        return worker.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def run_part(
    letter: str, setting: Setting, journal: Path, seconds: float, again: bool, text: str = ""
) -> None:
    """Start workers for what is missing of a part: one, or one per case where a case may end its process."""
    end = time.monotonic() + seconds
    setting = replace(setting, gib=setting.gib or getattr(part_module(letter), "LIMIT_GIB", None))
    todo = missing(letter, setting, journal, again, text)
    isolated = getattr(part_module(letter), "ISOLATED", False) and not setting.tiny
    while todo and (left := end - time.monotonic()) > 0:
        written = len(journal.read_bytes()) if journal.is_file() else 0
        command = [
            sys.executable, "-m", "benchmarks.gpu", "--worker", letter,
            "--group", json.dumps(todo[:1] if isolated else todo),
            "--seconds", f"{left:.0f}", "--journal", str(journal), *setting.arguments(),
        ]  # fmt: skip
        code = run_worker(command, left)
        lines = journal.read_bytes()[written:].splitlines() if journal.is_file() else []
        begun = [json.loads(line) for line in lines if line.endswith(b"}")]
        if not begun:
            print(f"part {letter}: no case was begun, exit code {code}", file=sys.stderr)
            return
        if code and begun[-1].get("unfinished"):
            how = "took longer than its limit" if code == -signal.SIGALRM else f"ended with code {code}"
            entry = {key: value for key, value in begun[-1].items() if key != "unfinished"}
            write_journal(journal, entry | {"error": f"the process {how}"})
        todo = [case for case in todo if case not in {entry["case"] for entry in begun}]


def build_adam() -> "subprocess.Popen[bytes]":
    """Compile CPU Adam beside the first part.  Killed, it would leave a lock: it gets no signal of ours."""
    return subprocess.Popen([sys.executable, "-c", BUILD_ADAM], start_new_session=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: tests the script, measures nothing")
    parser.add_argument("--parts", default=DEFAULT_PARTS, help=f"default: {DEFAULT_PARTS}")
    parser.add_argument("--cases", default="", help="a text in the names of the cases to measure")
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together (default: 9)")
    parser.add_argument("--gib", type=float, help="GPU memory a process may use (default: as the part says)")
    parser.add_argument(
        "--journal", type=Path, help="default: runs/gpu.jsonl, runs/gpu_tiny.jsonl with --tiny"
    )
    parser.add_argument("--again", action="store_true", help="measure cases again that failed")
    parser.add_argument("--model", help=".gguf file or folder of SmolLM2-135M for part e")
    for hidden in ("--worker", "--group", "--seconds"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", args.device)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    setting = Setting(args.device, args.tiny, args.gib, args.model)
    journal = args.journal or record.ROOT / "runs" / ("gpu_tiny.jsonl" if args.tiny else "gpu.jsonl")
    journal = journal.resolve()  # workers run in the repository
    if args.worker:
        work(args.worker, json.loads(args.group), setting, journal, float(args.seconds))
        return
    if unknown := set(args.parts.split(",")) - PARTS.keys():
        parser.error(f"--parts: no part {', '.join(sorted(unknown))}; write some of {','.join(PARTS)}")
    setting.check()
    letters = [letter for letter in PARTS if letter in args.parts.split(",")]
    adam = None
    if args.device == "cuda":
        for interface in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            os.environ.setdefault(interface, "lo")
        adam = build_adam()
    end = time.monotonic() + 60 * args.minutes
    for place, letter in enumerate(letters):
        if adam is not None and letter in "def":
            with suppress(subprocess.TimeoutExpired):
                adam.wait(max(0.0, end - time.monotonic()))
        # What one part leaves goes to the next ones.
        weights = [PARTS[later][1] for later in letters[place:]]
        share = (end - time.monotonic()) * weights[0] / sum(weights)
        run_part(letter, setting, journal, share, args.again, args.cases)
        if not args.tiny:
            folder = record.RESULTS if args.journal is None else journal.parent
            command = f"python -m benchmarks.gpu --minutes {args.minutes:g}"
            path = record.write("gpu", command, read_journal(journal), folder)
            print(f"{path}; with all parts: python -m benchmarks.render", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that run_worker ends what it started
    main()
    sys.stdout.flush()
    os._exit(0)  # without waiting for threads of an engine that ran out of memory
