"""ProntoQA from the official generator's raw output, or ProntoQA-like problems drawn here.

    python preprocessing/prontoqa.py --raw 5hop_0shot_random.json  -> data/prontoqa_{train,valid,test}.json
    python preprocessing/prontoqa.py --generate                    -> data/prontoqa_like_*.json
    python preprocessing/prontoqa.py --statistics FILE...          compares files, as a table

The raw output comes from https://github.com/asaparov/prontoqa, commit f0145b8:
    python run_experiment.py --model-name json --model-size dummy --ordering random --num-trials 10000
        --few-shot-examples 0 --ontology fictional --min-hops 5 --max-hops 5 --hops-skip 1
"""

import os
import sys

if not __package__:  # run as a file
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coconut_ds.data.problems import Card, read_problems
from coconut_ds.errors import DataError
from preprocessing.prontoqa_like import draw_problem, pairs, statistics, violations
from preprocessing.writing import markdown_table, positive, run_script, script_arguments, write_dataset

COUNTS = {"train": 9_000, "valid": 200, "test": 800}


def read_raw(path: Path) -> list[dict[str, Any]]:
    """The problems of the official generator's file, in its order.  Raises DataError with the wrong item."""
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make it with the official generator (see --help)") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); was the generator stopped half-way?") from None
    if not isinstance(examples, dict) or not examples:
        raise DataError(f'{path}: expected {{"example1": {{"test_example": ...}}, ...}}, the raw output')
    problems = []
    for key, example in examples.items():
        try:
            problems.append(problem_of_raw(example["test_example"]))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}, {key}: {error} is missing or of the wrong type; is this raw output?"
            ) from None
    return problems


def problem_of_raw(example: Mapping[str, Any]) -> dict[str, Any]:
    """The published conversion: the query follows the question, two sentences of the proof make a step."""
    return {
        "question": example["question"] + " " + example["query"],
        "steps": pairs(example["chain_of_thought"]),
        "answer": example["answer"],
    }


def generated(count: int, seed: int, split: str, hops: int, seen: set[str]) -> Iterator[dict[str, Any]]:
    """`count` checked problems; number i follows from (seed, split, i), unless its question was `seen`."""
    for index in range(count):
        rng = random.Random(f"prontoqa_like/{seed}/{split}/{hops}/{index}")
        item = draw_problem(rng, hops)
        while item["question"] in seen:
            item = draw_problem(rng, hops)
        seen.add(item["question"])
        wrong = violations(item, hops)
        if wrong:
            raise AssertionError(f"problem {index} of {split}: {wrong}")
        yield item


def write_raw(output_dir: Path, raw: Path, counts: Mapping[str, int], limit: int | None) -> None:
    """Convert and split by order: train, valid, and all the rest as test."""
    problems = read_raw(raw)
    train, valid = counts["train"], counts["train"] + counts["valid"]
    if len(problems) <= valid:
        raise DataError(
            f"{raw}: {len(problems)} problems leave nothing to test after {counts['train']} for training and "
            f"{counts['valid']} for validation; give smaller --train and --valid"
        )
    splits = {"train": problems[:train], "valid": problems[train:valid], "test": problems[valid:]}
    card = Card(
        name="prontoqa",
        max_new_tokens=128,
        source="https://github.com/asaparov/prontoqa, 5 hops, fictional ontology, random order",
        licence="Apache 2.0 (asaparov/prontoqa)",
        split_rule=f"in order: {counts['train']} train, {counts['valid']} validation, the rest test",
    )
    write_dataset(output_dir, card, {split: items[:limit] for split, items in splits.items()})


def write_generated(output_dir: Path, counts: Mapping[str, int], seed: int, hops: int) -> None:
    name = "prontoqa_like" if hops == 5 else f"prontoqa_like_{hops}hop"
    seen: set[str] = set()
    card = Card(
        name=name,
        max_new_tokens=128,
        source=f"python preprocessing/prontoqa.py --generate --seed {seed} --hops {hops}",
        licence="MIT (made by this project)",
        split_rule=f"every problem drawn by itself from the seed {seed}, its split and its number",
        notes="ProntoQA-like, not ProntoQA: the ontology, distractors and wording of the official generator.",
    )
    splits = {split: generated(count, seed, split, hops, seen) for split, count in counts.items()}
    write_dataset(output_dir, card, splits, counts)


def print_statistics(paths: list[Path]) -> None:
    tables = {}
    for path in paths:
        problems = read_problems(path)
        items = [{"question": p.question, "steps": p.steps, "answer": p.answer} for p in problems]
        bad = sum(bool(violations(item, len(item["steps"]) - 1)) for item in items)
        tables[path.name] = {"problems": len(items), "of another form": bad, **statistics(items)}
    print(markdown_table(tables))


def arguments() -> argparse.Namespace:
    parser = script_arguments("ProntoQA.", (__doc__ or "").partition("\n")[2])
    parser.add_argument("--raw", type=Path, metavar="FILE", help="raw output of the official generator")
    parser.add_argument("--generate", action="store_true", help="draw ProntoQA-like problems instead")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    parser.add_argument(
        "--hops", type=int, default=5, choices=range(1, 6), help="rules to chain (default: 5)"
    )
    for split, count in COUNTS.items():
        parser.add_argument(f"--{split}", type=positive, default=count, metavar="N", help=f"default: {count}")
    parser.add_argument("--statistics", type=Path, nargs="+", metavar="FILE", help="compare files and stop")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    counts = {split: getattr(given, split) for split in COUNTS}
    if given.statistics:
        print_statistics(given.statistics)
    elif given.generate:
        limited = {split: min(count, given.limit or count) for split, count in counts.items()}
        write_generated(given.output_dir, limited, given.seed, given.hops)
    else:
        raw = given.raw or given.output_dir / "5hop_0shot_random.json"
        if not raw.is_file():
            raise DataError(
                f"{raw}: no such file. The official ProntoQA has no download: make it with the generator at "
                "https://github.com/asaparov/prontoqa (the command is in --help), put it there or give "
                "--raw FILE, and run this again; or --generate draws ProntoQA-like problems without network"
            )
        write_raw(given.output_dir, raw, counts, given.limit)


if __name__ == "__main__":
    run_script(main)
