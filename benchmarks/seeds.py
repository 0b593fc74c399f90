"""How many seeds of the quickstart learn every stage: the JSON file is written after each run.

    python -m benchmarks.seeds --seeds 100-139,7,32                       two minutes a run, one process each
    python -m benchmarks.seeds --seeds 100-109 --ranks 2                  as launch/quickstart.sh
    python -m benchmarks.seeds --seeds 100-102 --runs coconut,no_cot      some runs of some seeds

The same command resumes.  Results in benchmarks/results/seeds.json are kept, unless their recipe has changed.
`swap` is the validation accuracy when every latent is that of another question.
"""

import argparse
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.variants import ROWS, Variant, make_data, point_of, stages_of, test_of
from coconut_ds.config.schema import defaults, load_schema
from coconut_ds.reports.run_records import RunRecord, read_run
from coconut_ds.training.sweep import Point, launch_command, parse_seeds

LEARNED = 0.95
RUNS = {name: f"configs/quickstart/{name}.yaml" for name in ("coconut", "plain", "no_thoughts", "no_cot")}


def point(run: str, seed: int, folder: Path, extra: Sequence[str], ranks: int = 1) -> Point:
    """The run named `run` of one seed."""
    settings = [f"batch_size_training={ROWS // ranks}", *extra]
    name = f"{run}-{seed}" if ranks == 1 else f"{run}-{seed}-{ranks}ranks"
    return point_of(Variant(run, ()), seed, folder, settings, RUNS[run], name)


def recipe_of(experiment: Mapping[str, Any]) -> str:
    """A digest of the settings that affect what is learned and differ from the defaults, but for the seed."""
    standard = defaults(load_schema("experiment"))
    settings = {
        key: value for key, value in experiment.items() if key != "seed" and value != standard.get(key)
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def epoch_learned(run: RunRecord) -> int | None:
    """The first epoch of the last stage, from 1, with a validation accuracy of LEARNED; None if none has."""
    lines = run.of("valid")
    last = [line["accuracy"] for line in lines if line["stage"] == lines[-1]["stage"]]
    return next((epoch for epoch, accuracy in enumerate(last, 1) if accuracy >= LEARNED), None)


def result_of(name: str, seed: int, ranks: int, chosen: Point) -> dict[str, Any]:
    """What a finished run says."""
    run = read_run(chosen.folder)
    swaps = [line["accuracy"] for line in run.of("ablation")]  # after the last epoch of each stage
    return {
        "run": name,
        "seed": seed,
        "ranks": ranks,
        "recipe": recipe_of(chosen.experiment.learning),
        "test": test_of(run),
        "stages": stages_of(run),
        "epoch_learned": epoch_learned(run),
        "swap": swaps[-1] if swaps else None,
        "processor": record.processor(),
        "commit": record.commit(),
    }


def train(chosen: Point, ranks: int) -> bool:
    """Run one training; whether it finished."""
    chosen.folder.mkdir(parents=True, exist_ok=True)
    with open(chosen.folder / "seeds.log", "a") as log:
        done = subprocess.run(launch_command(chosen, ranks), stdout=log, stderr=log, cwd=record.ROOT)
    return done.returncode == 0 and chosen.is_finished()


def share_text(results: Sequence[Mapping[str, Any]], name: str) -> str:
    tests = [result["test"] for result in results if result["run"] == name]
    return f"{name}: {sum(test >= LEARNED for test in tests)} of {len(tests)} seeds at {LEARNED:.0%} or more"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=parse_seeds, default=parse_seeds("100-139,7,32"), metavar="A-B,C")
    parser.add_argument("--runs", default="coconut,no_cot,no_thoughts", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1, help="processes of a training")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--set", dest="extra", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args(arguments)
    names = args.runs.split(",")
    if unknown := sorted(set(names) - set(RUNS)):
        parser.error(f"--runs: {unknown[0]} is not one of {', '.join(RUNS)}")
    os.environ.setdefault("WANDB_MODE", "disabled")
    results = record.known("seeds", args.results)

    def measure(name: str, seed: int) -> None:
        chosen = point(name, seed, args.folder, args.extra, args.ranks)
        key = (name, seed, args.ranks)
        known = next((r for r in results if (r["run"], r["seed"], r["ranks"]) == key), None)
        if known and known["recipe"] == recipe_of(chosen.experiment.learning):
            return
        make_data(seed, args.folder)
        started = time.monotonic()
        if not (chosen.is_finished() or train(chosen, args.ranks)):
            print(f"{name}, seed {seed}: failed; see {chosen.folder}/seeds.log", flush=True)
            return
        result = result_of(name, seed, args.ranks, chosen)
        results[:] = [r for r in results if r is not known] + [result]
        results.sort(key=lambda r: (list(RUNS).index(r["run"]), r["ranks"], r["seed"]))
        record.write("seeds", f"python -m benchmarks.seeds --jobs {args.jobs}", results, args.results)
        took = f"{time.monotonic() - started:.0f} s"
        print(f"{name}, seed {seed}: {result['test']:.1%} in {took}; {share_text(results, name)}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for done in [pool.submit(measure, name, seed) for name in names for seed in args.seeds]:
            done.result()


if __name__ == "__main__":
    main()
