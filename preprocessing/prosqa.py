"""ProsQA as released (17,886/300/500 problems), or ProsQA-like problems drawn here without network.

python preprocessing/prosqa.py                        -> data/prosqa_{train,valid,test}.json
python preprocessing/prosqa.py --generate             -> data/prosqa_like_{train,valid,test}.json
python preprocessing/prosqa.py --generate --ood       -> data/prosqa_like_{7hop,8hop,dense}_test.json as well
python preprocessing/prosqa.py --statistics FILE...   compares files, as a table
"""

import os
import sys

if not __package__:  # run as a file
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from coconut_ds.data.problems import Card
from coconut_ds.errors import DataError
from preprocessing.downloading import Download, fetch
from preprocessing.prosqa_like import Recipe, generate, statistics, violations
from preprocessing.writing import markdown_table, positive, run_script, script_arguments, write_dataset

_RELEASE = "https://raw.githubusercontent.com/facebookresearch/coconut/main/data"
DOWNLOADS = {
    "train": Download(
        f"{_RELEASE}/prosqa_train.json", "99e40ce7e9107fd02e35bcd78a7a4479bd57f415bab0a6efd37cc11a72e594f6"
    ),
    "valid": Download(
        f"{_RELEASE}/prosqa_valid.json", "c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249"
    ),
    "test": Download(
        f"{_RELEASE}/prosqa_test.json", "82ddc0afe6ee30eb31bb16fa208e293e55278a20fa987098d48519cae7e12680"
    ),
}
COUNTS = {"train": 17_886, "valid": 300, "test": 500}
OUT_OF_DISTRIBUTION: dict[str, dict[str, Any]] = {  # what changes against the recipe of the training data
    "7hop": {"min_hops": 7, "max_hops": 7, "slots": 38},
    "8hop": {"min_hops": 8, "max_hops": 8, "slots": 42},
    "dense": {"parents_mean": 2.5},
}


def write_released(output_dir: Path, source: Path | None, limit: int | None) -> None:
    """The released files, from the network or from a folder; their digests are checked either way."""
    files = {}
    for split, download in DOWNLOADS.items():
        if source is not None and not (source / f"prosqa_{split}.json").is_file():
            raise DataError(f"{source / f'prosqa_{split}.json'}: no such file; it is {download.url}")
        files[split] = fetch(download, (source or output_dir / "cache" / "prosqa") / f"prosqa_{split}.json")
    card = Card(
        name="prosqa",
        max_new_tokens=128,
        source=_RELEASE,
        licence="MIT (facebookresearch/coconut)",
        split_rule="as released",
        notes="Exact match on the whole sentence.",
    )
    write_dataset(
        output_dir, card, {split: json.loads(path.read_text())[:limit] for split, path in files.items()}
    )


def write_generated(
    output_dir: Path, name: str, recipe: Recipe, counts: Mapping[str, int], seed: int
) -> None:
    """ProsQA-like problems; no question occurs twice, within a split or across splits."""
    seen: set[str] = set()
    rngs = {split: partial(_rng, name, seed, split) for split in counts}
    splits = {split: generate(count, recipe, rngs[split], seen) for split, count in counts.items()}
    settings = ", ".join(f"{key}={value}" for key, value in asdict(recipe).items())
    card = Card(
        name=name,
        max_new_tokens=128,
        source=f"python preprocessing/prosqa.py --generate --seed {seed}",
        licence="MIT (made by this project)",
        split_rule=f"every problem drawn by itself from the seed {seed}, its split and its number",
        notes=f"ProsQA-like, not ProsQA. Recipe: {settings}.",
    )
    write_dataset(output_dir, card, splits, counts)


def _rng(name: str, seed: int, split: str, index: int) -> random.Random:
    return random.Random(f"{name}/{seed}/{split}/{index}")


def print_statistics(paths: Sequence[Path]) -> None:
    """A table of the first file's means, and of every other file's with the difference."""
    tables = {}
    for path in paths:
        items = list(_read_graphs(path))
        bad = sum(bool(violations(item, 1, 99)) for item in items)
        tables[path.name] = {"problems": len(items), "breaking an invariant": bad, **statistics(items)}
    print(markdown_table(tables))


def _read_graphs(path: Path) -> Iterator[dict[str, Any]]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        needed = {"question", "answer", "steps", "idx_to_symbol", "edges", "root", "target", "neg_target"}
        if not isinstance(items, list) or not items or not all(needed <= item.keys() for item in items):
            raise ValueError(f"not a list of problems with the fields {', '.join(sorted(needed))}")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: {error}") from None
    return iter(items)


def hop_range(text: str) -> tuple[int, int]:
    """argparse type: "3-6" or "4"."""
    low, _, high = text.partition("-")
    hops = int(low), int(high or low)
    if not 1 <= hops[0] <= hops[1] <= 8:
        raise argparse.ArgumentTypeError(f"must lie between 1 and 8, got {text}")
    return hops


def arguments() -> argparse.Namespace:
    parser = script_arguments(
        "ProsQA: the released files, or ProsQA-like problems drawn here.",
        "Without network: put the three released files in a folder and give --source FOLDER, or --generate.",
    )
    parser.add_argument("--source", type=Path, help="folder with the released prosqa_{train,valid,test}.json")
    parser.add_argument("--generate", action="store_true", help="draw ProsQA-like problems instead")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    parser.add_argument(
        "--hops", type=hop_range, default=(3, 6), metavar="A-B", help="path lengths (default: 3-6)"
    )
    parser.add_argument(
        "--depth-matched",
        action="store_true",
        help="decoys as deep as the target: in the release they are shallower, which gives them away",
    )
    for split, count in COUNTS.items():
        parser.add_argument(f"--{split}", type=positive, default=count, metavar="N", help=f"default: {count}")
    parser.add_argument(
        "--ood", action="store_true", help="1,000 test problems each with 7 hops, 8 hops, dense graphs"
    )
    parser.add_argument("--name", help="of the generated data set (default: prosqa_like)")
    parser.add_argument("--statistics", type=Path, nargs="+", metavar="FILE", help="compare files and stop")
    given = parser.parse_args()
    if given.ood and given.depth_matched:
        parser.error("--ood draws plain decoys: 7 and 8 hops hardly ever have one as deep as the target")
    return given


def main() -> None:
    given = arguments()
    if given.statistics:
        return print_statistics(given.statistics)
    if not given.generate:
        return write_released(given.output_dir, given.source, given.limit)
    low, high = given.hops
    more_slots = 38 if high == 7 else 42 if high == 8 else Recipe.slots
    recipe = Recipe(slots=more_slots, min_hops=low, max_hops=high, depth_matched=given.depth_matched)
    name = given.name or ("prosqa_like_matched" if given.depth_matched else "prosqa_like")
    limit = given.limit or sys.maxsize
    counts = {split: min(getattr(given, split), limit) for split in COUNTS}
    write_generated(given.output_dir, name, recipe, counts, given.seed)
    for suffix, changes in OUT_OF_DISTRIBUTION.items() if given.ood else ():
        changed = replace(Recipe(), **changes)
        write_generated(given.output_dir, f"{name}_{suffix}", changed, {"test": min(1000, limit)}, given.seed)


if __name__ == "__main__":
    run_script(main)
