"""Run one benchmark and keep what it says, with the machine, the versions, the date and the commit.

    python -m benchmarks.record NAME MODULE ARGUMENT...     benchmarks/results/NAME.json

Runs `python -m benchmarks.MODULE ARGUMENT...`, shows its output, and collects every JSON object it prints.

Knows: processes, JSON, this machine.  Does not know: what a benchmark measures.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
LIBRARIES = ("torch", "deepspeed", "transformers", "peft")


def surroundings() -> dict[str, Any]:
    """Where and when: processor, cores, memory, versions, date, commit."""
    return {
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in LIBRARIES},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
    }


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def commit() -> str | None:
    """The commit that is checked out, with a + where tracked files differ from it; None outside git."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    name = git("rev-parse", "--short", "HEAD") if shutil.which("git") else None
    if name is None:
        return None
    return name + ("+" if git("status", "--porcelain", "-uno", "--", "coconut_ds", "benchmarks/*.py") else "")


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object that begins a line of `text`, over however many lines it runs."""
    decoder, position = json.JSONDecoder(), 0
    while position < len(text):
        line_end = text.find("\n", position)
        line_end = len(text) if line_end < 0 else line_end
        if text[position] == "{":
            try:
                value, position = decoder.raw_decode(text, position)
            except json.JSONDecodeError:
                position = line_end
            else:
                yield value
        else:
            position = line_end
        position += 1


def run(module: str, arguments: Sequence[str]) -> tuple[list[dict[str, Any]], float]:
    """The records a benchmark printed and the seconds it took.  Raises SystemExit with its exit code."""
    started = time.perf_counter()
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    shown = []
    for line in process.stdout:
        print(line, end="", flush=True)
        shown.append(line)
    if process.wait() != 0:
        raise SystemExit(process.returncode)
    return list(objects_in("".join(shown))), time.perf_counter() - started


def known(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records in results/NAME.json; none without the file."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["records"] if path.is_file() else []


def write(name: str, command: str, records: Sequence[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Write results/NAME.json in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    draft = path.with_suffix(".tmp")
    text = json.dumps(
        {"name": name, "command": command, **surroundings(), "records": list(records)}, indent=1
    )
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    parser.add_argument("name")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    records, seconds = run(args.module, args.arguments)
    command = " ".join(["python", "-m", f"benchmarks.{args.module}", *args.arguments])
    path = write(args.name, command, records, args.results)
    print(f"{path}: {len(records)} records, {seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
