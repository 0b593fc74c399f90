"""GSM8K: the iCoT step form (385,620 problems) or OpenAI's original release -> data/gsm_*.json.

question||<<4-2=2>> <<2/.5=4>> #### 4                           iCoT text, one problem a line
{"question": "...", "answer": "... <<4-2=2>>2 ...\\n#### 4"}     OpenAI, JSON lines
"""

import os
import sys

if not __package__:  # run as a file
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from coconut_ds.data.problems import Card
from coconut_ds.errors import DataError
from preprocessing.downloading import Download, fetch
from preprocessing.writing import run_script, script_arguments, write_dataset

_ICOT = "da03/Internalize_CoT_Step_by_Step/e06a32ee5e4cd117171daeb4755d2a97ece62761/data/gsm8k"
_OPENAI = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
DOWNLOADS = {
    "icot": {
        "train": Download(  # a Git LFS object; this is the digest its pointer states
            f"https://media.githubusercontent.com/media/{_ICOT}/train.txt",
            "0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c",
        ),
        "valid": Download(f"https://raw.githubusercontent.com/{_ICOT}/valid.txt"),
        "test": Download(f"https://raw.githubusercontent.com/{_ICOT}/test.txt"),
    },
    "original": {
        "train": Download(
            f"{_OPENAI}/train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"
        ),
        "test": Download(
            f"{_OPENAI}/test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
        ),
    },
}
COUNTS = {
    "icot": {"train": 385_620, "valid": 500, "test": 1_319},
    "original": {"train": 7_473, "test": 1_319},
}
_ANNOTATION = re.compile(r"<<[^<>]*>>")


def problem_of_icot_line(line: str) -> dict[str, Any]:
    """One line of the iCoT text.  Raises ValueError when a part is missing.

    The published conversion, save that an item without reasoning gets no step instead of one empty step.
    """
    question, separator, rest = line.partition("||")
    reasoning, marker, answer = rest.rpartition("####")
    if not separator or not marker:
        raise ValueError("expected 'question||reasoning #### answer'")
    return _checked(question.strip(), reasoning.split(), answer.strip())


def problem_of_original_line(line: str) -> dict[str, Any]:
    """One line of OpenAI's release: its calculator annotations are the steps.  Raises ValueError."""
    item = json.loads(line)
    if not isinstance(item, dict) or not all(
        isinstance(item.get(key), str) for key in ("question", "answer")
    ):
        raise ValueError("expected an object with the texts 'question' and 'answer'")
    reasoning, marker, answer = item["answer"].rpartition("####")
    if not marker:
        raise ValueError("'answer' has no final line '#### ...'")
    steps = ["".join(step.split()) for step in _ANNOTATION.findall(reasoning)]
    return _checked(item["question"].strip(), steps, answer.strip())


def _checked(question: str, steps: list[str], answer: str) -> dict[str, Any]:
    if not question or not answer:
        raise ValueError("the question or the answer is empty")
    return {"question": question, "steps": steps, "answer": answer}


FORMS: dict[str, Callable[[str], dict[str, Any]]] = {
    "icot": problem_of_icot_line,
    "original": problem_of_original_line,
}


def convert(path: Path, form: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The problems of a text file.  Raises DataError with the number of the line that is wrong."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(islice(lines, limit), start=1):
            if not line.strip():
                continue
            try:
                line.encode()  # fails on bytes that are not UTF-8
                problem = FORMS[form](line)
            except ValueError as error:
                reason = "not UTF-8" if isinstance(error, UnicodeError) else error
                raise DataError(
                    f"{path}, line {number}: {reason}; is this GSM8K in the {form} form?"
                ) from None
            yield problem


def main() -> None:
    parser = script_arguments(
        "GSM8K: download, convert to {question, steps, answer}, write data/gsm_{train,valid,test}.json.",
        "Without network: put the text files in a folder and give --source FOLDER.",
    )
    parser.add_argument(
        "--form",
        choices=sorted(FORMS),
        default="icot",
        help="icot: equations as steps; original: OpenAI's jsonl",
    )
    parser.add_argument(
        "--source",
        type=Path,
        help="folder with {train,valid,test}.txt (icot) or {train,test}.jsonl (original)",
    )
    parser.add_argument(
        "--valid", type=int, default=500, help="original form only: the last N training problems validate"
    )
    arguments = parser.parse_args()
    form, cache = arguments.form, arguments.output_dir / "cache" / "gsm8k"
    ending = "txt" if form == "icot" else "jsonl"
    files: dict[str, Path] = {}
    for split, download in DOWNLOADS[form].items():
        files[split] = (arguments.source or cache) / f"{split}.{ending}"
        if arguments.source is None:
            fetch(download, files[split])
        elif not files[split].is_file():
            raise DataError(
                f"{files[split]}: no such file; --source must hold the files that {download.url} gives"
            )
    write_gsm8k(arguments.output_dir, form, files, arguments.limit, arguments.valid)


def write_gsm8k(output_dir: Path, form: str, files: dict[str, Path], limit: int | None, valid: int) -> None:
    """Convert the text files of all splits.  The original release has no validation part: one is cut off."""
    splits: dict[str, Any] = {split: convert(path, form, limit) for split, path in files.items()}
    rule = "as published by iCoT"
    if form == "original":
        train = list(convert(files["train"], form))
        if not 0 < valid < len(train):
            raise DataError(
                f"--valid {valid}: must be between 1 and {len(train) - 1}, to leave something to train on"
            )
        splits = {"train": train[:-valid][:limit], "valid": train[-valid:][:limit], "test": splits["test"]}
        rule = f"OpenAI's train and test; the last {valid} training problems are the validation part"
    write_dataset(
        output_dir,
        Card(
            name="gsm",
            grading="exact",
            max_new_tokens=64,
            source=DOWNLOADS[form]["train"].url.rsplit("/", 1)[0],
            licence="MIT (openai/grade-school-math)",
            split_rule=rule,
            notes="Steps are equations. Answers keep their thousands separators; grading ignores commas.",
        ),
        splits,
        None if limit else COUNTS[form],
    )


if __name__ == "__main__":
    run_script(main)
