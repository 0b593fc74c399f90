"""Everything this project claims about a GPU, measured in one go: correctness, memory, speed, size, learning.

    python -m benchmarks.gpu                                 all parts, an hour in all
    python -m benchmarks.gpu --parts a,b --minutes 20        two of them
    python -m benchmarks.gpu --device cpu --tiny             a dry run of every part in seconds

Parts are the modules of benchmarks/gpu_parts/:  a correctness, b capacity, c speed, d largest, e learning.
Every process may use 11 GiB of the GPU (`set_per_process_memory_fraction`).  Each case is written to the
journal as soon as it is measured; the same command goes on with what is missing; --again
measures failures anew.
At the end benchmarks/results/gpu.json is made of the journal, for `python -m benchmarks.render`.

Needs torch 2.11, transformers 5.17 and DeepSpeed or newer, and this repository.  No network.
Knows: processes, time, the journal.  Does not know: what a part measures.
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
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import record
from benchmarks.gpu_parts import Setting

PARTS = {"a": "correctness", "b": "capacity", "c": "speed", "d": "largest", "e": "learning"}
GRACE_SECONDS = 30  # a worker ends by itself before its time is over; this is for the case in progress


def part_module(letter: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.gpu_parts.{PARTS[letter]}")


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


def missing(letter: str, setting: Setting, journal: Path, again: bool) -> list[str]:
    """Cases without a result, and with `again` those that failed."""
    done = {
        entry["case"]
        for entry in read_journal(journal)
        if entry["part"] == letter and not (entry.get("unfinished") or (again and "error" in entry))
    }
    return [case for case in part_module(letter).cases(setting) if case not in done]


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


def run_part(letter: str, setting: Setting, journal: Path, seconds: float, again: bool) -> None:
    """Start workers for what is missing of a part: one, or one a case where a case may end its process."""
    end = time.monotonic() + seconds
    todo = missing(letter, setting, journal, again)
    isolated = getattr(part_module(letter), "ISOLATED", False) and not setting.tiny
    for group in [[case] for case in todo] if isolated else [todo] if todo else []:
        left = end - time.monotonic()
        if left <= 0:
            break
        command = [
            sys.executable, "-m", "benchmarks.gpu", "--worker", letter, "--cases", json.dumps(group),
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
    parser.add_argument("--parts", default="a,b,c,d,e")
    parser.add_argument("--minutes", type=float, default=60, help="for all parts together (default: 60)")
    parser.add_argument("--gib", type=float, default=11, help="GPU memory a process may use (default: 11)")
    parser.add_argument(
        "--journal", type=Path, help="default: runs/gpu.jsonl, runs/gpu_tiny.jsonl with --tiny"
    )
    parser.add_argument("--again", action="store_true", help="measure cases anew that failed")
    parser.add_argument("--model", help=".gguf file or folder of SmolLM2-135M for part e")
    for hidden in ("--worker", "--cases", "--seconds"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", args.device)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    setting = Setting(args.device, args.tiny, args.gib, args.model)
    journal = args.journal or record.ROOT / "runs" / ("gpu_tiny.jsonl" if args.tiny else "gpu.jsonl")
    if args.worker:
        work(args.worker, json.loads(args.cases), setting, journal, float(args.seconds))
        return
    setting.check()
    letters = [letter for letter in PARTS if letter in args.parts.split(",")]
    end = time.monotonic() + 60 * args.minutes
    for place, letter in enumerate(letters):
        share = (end - time.monotonic()) / (len(letters) - place)  # what one part leaves goes to the next
        run_part(letter, setting, journal, share, args.again)
    if not args.tiny:
        path = record.write(
            "gpu", f"python -m benchmarks.gpu --minutes {args.minutes:g}", read_journal(journal)
        )
        print(f"{path}; now: python -m benchmarks.render")


if __name__ == "__main__":
    main()
