"""Collect the accuracies of quickstart runs into benchmarks/results/quickstart.json.

    for SEED in 0 1 2; do SEED=$SEED bash launch/quickstart.sh; done
    python -m benchmarks.quickstart runs/quickstart-*

Knows: run folders.  Does not know: training.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import record
from coconut_ds.reports.run_records import RunRecord, read_run


def stages_of(run: RunRecord) -> dict[str, float]:
    """Validation accuracy at the end of every stage."""
    return {str(line["stage"]): line["accuracy"] for line in run.of("valid")}


def test_of(run: RunRecord) -> float | None:
    """Test accuracy, None before the run is over."""
    tests = run.of("test")
    return tests[-1]["accuracy"] if tests else None


def collect(folder: Path) -> dict[str, Any]:
    """What one run folder says."""
    run = read_run(folder)
    times = [line["time"] for line in run.lines]
    return {
        "run": folder.name,
        "method": str(run.experiment.method),
        "seed": run.experiment.seed,
        "stages": stages_of(run),
        "test": test_of(run),
        "minutes": round((max(times) - min(times)) / 60, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    records = [collect(folder) for folder in args.runs]
    records.sort(key=lambda found: (found["method"], found["seed"]))
    unfinished = [found["run"] for found in records if found["test"] is None]
    if unfinished:
        raise SystemExit(f"not finished: {', '.join(unfinished)}")
    seeds = " ".join(str(seed) for seed in sorted({found["seed"] for found in records}))
    command = (
        f"for SEED in {seeds}; do SEED=$SEED bash launch/quickstart.sh; done; "
        "python -m benchmarks.quickstart runs/quickstart-*"
    )
    print(record.write("quickstart", command, records, args.results))


if __name__ == "__main__":
    main()
