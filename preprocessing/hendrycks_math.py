"""MATH (Hendrycks et al. 2021) -> data/math_{train,valid,test}.json.

    python preprocessing/hendrycks_math.py               official 7,500/5,000; 500 of train validate
                             ... --test math500          tested on the 500 problems of MATH-500 instead
                             ... --split fork            the 80/10/10 of the learnable-window fork; comparable
                                                         with nothing else
                             ... --source FOLDER         from a folder or file on this machine

A source is the original tree (train/SUBJECT/NUMBER.json, test/...), or parquet, JSON lines or JSON files with
the fields `problem` and `solution`; a file belongs to the part, train or test, that its path names.
"""

import os
import sys

if not __package__:  # run as a file
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from coconut_ds.data.problems import Card
from coconut_ds.errors import DataError
from coconut_ds.files import hides_bar
from preprocessing.downloading import Download, fetch
from preprocessing.math_solutions import boxed_answer, steps_by_line, steps_by_sentence
from preprocessing.writing import positive, run_script, script_arguments, write_dataset

_HUB = "https://huggingface.co/datasets"
_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
OFFICIAL = [
    (
        f"{part}/{subject}.parquet",
        f"{_HUB}/EleutherAI/hendrycks_math/resolve/main/{subject}/{part}-00000-of-00001.parquet",
    )
    for part in ("train", "test")
    for subject in _SUBJECTS
]
MATH500 = f"{_HUB}/HuggingFaceH4/MATH-500/resolve/main/test.jsonl"
FORK = f"{_HUB}/qwedsacf/competition_math/resolve/main/data/train-00000-of-00001-7320a6f3aba8ebd2.parquet"
Row = dict[str, Any]


def read_source(path: Path) -> dict[str, list[Row]]:
    """The rows of a file or folder by part: "train", "test", or "" where no part is named.

    Files are read in the order of their names, numbers by value.  Raises DataError with the file and row.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; --source names the MATH data on this machine")
    files = [path] if path.is_file() else sorted(_data_files(path), key=_by_number)
    if not files:
        raise DataError(f"{path}: holds no .json, .jsonl or .parquet file")
    parts: dict[str, list[Row]] = {}
    for file in tqdm(files, desc=f"reading {path}", unit=" files", disable=hides_bar()):
        named = re.findall(r"train|test", str(file.relative_to(path.parent)).lower())
        rows = parts.setdefault(named[-1] if named else "", [])
        for number, row in enumerate(_rows(file)):
            if not isinstance(row, dict) or not all(
                isinstance(row.get(k), str) for k in ("problem", "solution")
            ):
                raise DataError(f"{file}, row {number}: needs the texts 'problem' and 'solution'")
            rows.append(row | {"from": f"{file}, row {number}"})
    return parts


def _data_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".parquet"))


def _by_number(path: Path) -> list[tuple[int, int | str]]:
    pieces = re.split(r"(\d+)", str(path))
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in pieces]


def _rows(path: Path) -> list[Row]:
    try:
        if path.suffix == ".parquet":
            return _parquet_rows(path)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        value = json.loads(text)
        return value if isinstance(value, list) else [value]
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _parquet_rows(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowInvalid, parquet  # only this form of MATH needs it
    except ImportError:
        raise DataError(
            f"{path}: parquet needs pyarrow (pip install pyarrow); the original tree and JSON lines do not"
        ) from None
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({error})") from None


def download(files: Iterable[tuple[str, str]], folder: Path) -> Path:
    """All files of the hub in a folder; what is there already is kept."""
    for name, url in files:
        fetch(Download(url), folder / name)
    return folder


def problem_of_row(row: Row, by: str) -> dict[str, Any]:
    """Raises ValueError when there is no boxed answer, or nothing is asked."""
    question = row["problem"]
    if by == "line":
        answer, steps = boxed_answer(row["solution"], first=True), steps_by_line(row["solution"])
    else:
        question, answer = question.strip(), boxed_answer(row["solution"])
        steps = steps_by_sentence(row["solution"])
    if not question.strip() or not answer:
        raise ValueError("the question or the answer is empty")
    return {"question": question, "answer": answer, "steps": steps}


def convert(rows: Sequence[Row], by: str) -> list[dict[str, Any]]:
    """The problems of the rows that have an answer; the others are named on stderr."""
    problems, refused = [], []
    for row in tqdm(rows, desc="solutions to steps", unit=" problems", disable=hides_bar()):
        try:
            problems.append(problem_of_row(row, by))
        except ValueError as error:
            refused.append(f"  {row['from']}: {error}")
    if refused:
        print(f"left out, {len(refused)} of {len(rows)} problems:", *refused, sep="\n", file=sys.stderr)
    return problems


def official_split(parts: dict[str, list[Row]], valid: int, seed: int) -> dict[str, list[Row]]:
    """The official train and test, `valid` training rows set aside by the seed, both in their order."""
    if not parts.get("train") or not parts.get("test"):
        raise DataError(
            f"the official split needs a train and a test part, found {sorted(parts)}; name the files or "
            "folders train and test, or use --split fork for a single file"
        )
    train = parts["train"]
    if not 0 < valid < len(train):
        raise DataError(
            f"--valid {valid}: must be between 1 and {len(train) - 1}, to leave something to train on"
        )
    aside = set(random.Random(seed).sample(range(len(train)), valid))
    return {
        "train": [row for index, row in enumerate(train) if index not in aside],
        "valid": [train[index] for index in sorted(aside)],
        "test": parts["test"],
    }


def fork_split(parts: dict[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """All rows shuffled by Python's `random`: the first tenth validates, the second tests, the rest trains.

    The rows must be in the order of the fork's source, the official training part before the test part.
    """
    rows = [row for part in sorted(parts, reverse=True) for row in parts[part]]
    random.Random(seed).shuffle(rows)
    tenth = len(rows) // 10
    return {"train": rows[2 * tenth :], "valid": rows[:tenth], "test": rows[tenth : 2 * tenth]}


def report_long(splits: dict[str, list[dict[str, Any]]], tokenizer_name: str, most: int) -> str:
    """Say which problems are longer than the model, marker tokens aside; none is dropped."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--tokenizer {tokenizer_name}: cannot be loaded ({str(error).splitlines()[0]})"
        ) from None
    found = []
    for split, problems in splits.items():
        for index, item in enumerate(problems):
            text = "\n".join((item["question"], *item["steps"], f"### {item['answer']}"))
            length = len(tokenizer(text, verbose=False)["input_ids"])
            if length > most:
                found.append(f"  {split} {index}: {length} tokens")
    summary = f"{len(found)} problems are longer than {most} tokens of {tokenizer_name}; all are kept"
    print(summary, *found, sep="\n", file=sys.stderr)
    return summary


def arguments() -> argparse.Namespace:
    parser = script_arguments("MATH.", (__doc__ or "").partition("\n")[2])
    parser.add_argument(
        "--source", type=Path, help="file or folder; default: DATA/MATH if there, else the hub"
    )
    parser.add_argument("--split", choices=("official", "fork"), default="official")
    parser.add_argument(
        "--test", choices=("official", "math500"), default="official", help="official split only"
    )
    parser.add_argument(
        "--math500", type=Path, metavar="FILE", help="MATH-500's test.jsonl; default: the hub"
    )
    parser.add_argument(
        "--valid", type=positive, default=500, metavar="N", help="official split only (default: 500)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the split (default: 42, the fork's)")
    parser.add_argument(
        "--steps", choices=("sentence", "line"), help="line: the fork's, and the default of --split fork"
    )
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="report problems longer than the model"
    )
    parser.add_argument(
        "--tokenizer", default="openai-community/gpt2", help="for --max-tokens (default: GPT-2)"
    )
    given = parser.parse_args()
    given.steps = given.steps or ("line" if given.split == "fork" else "sentence")
    if given.split == "fork" and given.test == "math500":
        parser.error(
            "--test math500 goes with --split official: the fork's training part holds MATH-500 problems"
        )
    return given


def read_parts(given: argparse.Namespace) -> tuple[dict[str, list[Row]], str]:
    """The rows and a word on where they come from: --source, DATA/MATH, or the hub."""
    cache = given.output_dir / "cache" / "math"
    local = given.source or given.output_dir / "MATH"
    if given.source is not None or local.exists():
        return read_source(local), f"{local.name}, on the machine that made these files"
    if given.split == "fork":
        return read_source(download([("fork.parquet", FORK)], cache / "fork")), FORK
    return read_source(download(OFFICIAL, cache / "official")), f"{_HUB}/EleutherAI/hendrycks_math"


def main() -> None:
    given = arguments()
    parts, source = read_parts(given)
    if given.split == "fork":
        rows = fork_split(parts, given.seed)
        rule = f"all problems shuffled with seed {given.seed}, 80/10/10: not the official split"
        grading, max_new_tokens = "exact", 128  # the fork's
    else:
        rows = official_split(parts, given.valid, given.seed)
        rule = f"official train and test; {given.valid} training problems, seed {given.seed}, validate"
        grading, max_new_tokens = "latex", 512
    if given.test == "math500":
        file = given.math500 or fetch(
            Download(MATH500), given.output_dir / "cache" / "math" / "math500.jsonl"
        )
        rows["test"] = [row for part in read_source(file).values() for row in part]
        rule += "; tested on MATH-500"
    splits = {split: convert(part[: given.limit], given.steps) for split, part in rows.items()}
    notes = (
        "Steps are lines, the box stays in the last."
        if given.steps == "line"
        else ("Steps are sentences up to the boxed answer; drawings are left out of them.")
    )
    if given.max_tokens:
        notes += f" {report_long(splits, given.tokenizer, given.max_tokens)}."
    card = Card(
        name="math", grading=grading, max_new_tokens=max_new_tokens, source=source,
        licence="MIT (hendrycks/math)", split_rule=rule, notes=notes,
    )  # fmt: skip
    write_dataset(given.output_dir, card, splits)


if __name__ == "__main__":
    run_script(main)
