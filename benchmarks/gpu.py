"""Measure on a GPU what this project claims: correctness, speed, size, the engine, capacity, learning.

    python -m benchmarks.gpu                                      nine minutes, the most valuable cases first
    python -m benchmarks.gpu --parts c --cases "bf16 stage 6"     cases whose names contain a text
    python -m benchmarks.gpu --parts a,c,d,f,b,e --minutes 60     all of it
    python -m benchmarks.gpu --device cpu --tiny                  a dry run, in minutes

Parts are the modules of benchmarks/gpu_parts/:  a correctness, c speed, d largest, f engine, b capacity,
e learning (half an hour, so only where it is named).  Correctness and speed may use the complete GPU, because
the textbook loop needs it; the others what an 11 GB GPU has for tensors.  Each case is written to the journal
as soon as it is measured; the same command continues with what is missing; --again measures failures again.
At the end benchmarks/results/gpu.json is made of the journal, for `python -m benchmarks.render`.

Needs torch 2.11, transformers 5.17 and DeepSpeed or newer, and this repository.  No network.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import record
from benchmarks.gpu_parts import Setting

# Most valuable first, with the seconds of each; all but the last are nine minutes.
PARTS = {
    "a": ("correctness", 100),
    "c": ("speed", 110),
    "d": ("largest", 170),
    "f": ("engine", 60),
    "b": ("capacity", 100),
    "e": ("learning", 1800),
}
DEFAULT_PARTS = "a,c,d,f,b"
BUILD_ADAM = """from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("CPUAdamBuilder").load(verbose=False)"""
GRACE_SECONDS = 30  # a worker ends by itself before its time is over; this is for the case in progress


def part_module(letter: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.gpu_parts.{PARTS[letter][0]}")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The newest record of every case."""
    if not path.is_file():
        return []
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        records[entry["part"], entry["case"]] = entry
    return list(records.values())


def write_journal(path: Path, entry: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as writer:
        writer.write(json.dumps(entry) + "\n")


def missing(letter: str, setting: Setting, journal: Path, again: bool, text: str = "") -> list[str]:
    """Cases with `text` in their names without a result, and with `again` those that failed."""
    done = {
        entry["case"]
        for entry in read_journal(journal)
        if entry["part"] == letter and not (entry.get("unfinished") or (again and "error" in entry))
    }
    return [case for case in part_module(letter).cases(setting) if text in case and case not in done]


def work(letter: str, cases: Sequence[str], setting: Setting, journal: Path, seconds: float) -> None:
    """The worker: measure cases until the time is over, each into the journal."""
    end = time.monotonic() + seconds
    setting.prepare()
    for case in cases:
        left = end - time.monotonic()
        if left <= 0:
            return
        started = time.monotonic()
        try:
            result = part_module(letter).run(case, setting, left)
        except Exception as error:  # one case that fails must not take the others with it
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        setting.forget()
        seconds_taken = round(time.monotonic() - started, 1)
        entry = {"part": letter, "case": case, **setting.described(), "took_seconds": seconds_taken, **result}
        write_journal(journal, entry)
        print(json.dumps(entry), flush=True)


def run_part(
    letter: str, setting: Setting, journal: Path, seconds: float, again: bool, text: str = ""
) -> None:
    """Start workers for what is missing of a part: one, or one per case where a case may end its process."""
    end = time.monotonic() + seconds
    setting = replace(setting, gib=setting.gib or getattr(part_module(letter), "LIMIT_GIB", None))
    todo = missing(letter, setting, journal, again, text)
    isolated = getattr(part_module(letter), "ISOLATED", False) and not setting.tiny
    for group in [[case] for case in todo] if isolated else [todo] if todo else []:
        left = end - time.monotonic()
        if left <= 0:
            break
        command = [
            sys.executable, "-m", "benchmarks.gpu", "--worker", letter, "--group", json.dumps(group),
            "--seconds", f"{left:.0f}", "--journal", str(journal), *setting.arguments(),
        ]  # fmt: skip
        said = None
        try:
            code = subprocess.run(command, cwd=record.ROOT, timeout=left + GRACE_SECONDS).returncode
            said = f"the process ended with code {code}" if code else None
        except subprocess.TimeoutExpired:
            said = "the time was over"
        if said and isolated and group[0] in missing(letter, setting, journal, again):
            entry = {"part": letter, "case": group[0], **setting.described(), "error": said}
            write_journal(journal, entry | ({"unfinished": True} if "time" in said else {}))
        elif said:
            print(f"part {letter}: {said}", file=sys.stderr)


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
    if args.worker:
        work(args.worker, json.loads(args.group), setting, journal, float(args.seconds))
        return
    setting.check()
    letters = [letter for letter in PARTS if letter in args.parts.split(",")]
    adam = None
    if args.device == "cuda":
        for interface in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            os.environ.setdefault(interface, "lo")
        adam = subprocess.Popen([sys.executable, "-c", BUILD_ADAM])  # beside part a; killed, it leaves a lock
    end = time.monotonic() + 60 * args.minutes
    for place, letter in enumerate(letters):
        if adam is not None and letter in "def":
            adam.wait()
        # What one part leaves goes to the next ones.
        weights = [PARTS[later][1] for later in letters[place:]]
        share = (end - time.monotonic()) * weights[0] / sum(weights)
        run_part(letter, setting, journal, share, args.again, args.cases)
    if not args.tiny:
        path = record.write(
            "gpu", f"python -m benchmarks.gpu --minutes {args.minutes:g}", read_journal(journal)
        )
        print(f"{path}; now: python -m benchmarks.render")


if __name__ == "__main__":
    main()
