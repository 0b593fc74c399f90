"""Read problems, the cards that describe their files, and grade answers.

    [{"question": "2 + 2 ?", "steps": ["<<2+2=4>>"], "answer": "4"}, ...]      data/gsm_valid.json
    {"name": "gsm", "grading": "exact", "max_new_tokens": 64, ...}             data/gsm.card.json beside it

Knows: the file format and the published rules of grading.  Does not know: tokens, stages, models.
"""

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from coconut_ds.data.json_items import Complaints, items_of, kind, read_text
from coconut_ds.errors import DataError

GRADINGS = ("exact", "latex")

_SCRIPTS = {  # how a missing data/NAME_*.json is made; the longest fitting name counts
    "gsm": "gsm8k.py",
    "prontoqa": "prontoqa.py",
    "prontoqa_like": "prontoqa.py --generate",
    "prosqa": "prosqa.py",
    "prosqa_like": "prosqa.py --generate",
    "math": "hendrycks_math.py",
    "arithmetic": "arithmetic.py",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_LATEX_CHARS = 500  # longer answers are graded by text alone
_LATEX_SECONDS = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, the steps of reasoning that lead to its answer, and the answer; all are plain text."""

    question: str
    steps: tuple[str, ...]
    answer: str


def read_problems(path: str | Path, limit: int | None = None) -> list[Problem]:
    """The problems of a JSON file, at most `limit` of them.  Fields other than the three are ignored.

    Blank steps are left out: the published conversion of an item without reasoning writes `[""]`.
    Raises DataError with the first 20 problems of the file, each with its item and field.
    """
    return list(each_problem(path, limit))


def each_problem(path: str | Path, limit: int | None = None) -> Iterator[Problem]:
    """The problems one by one, never the whole file in JSON form; raises as read_problems, at the end."""
    path = Path(path)
    complaints = Complaints(path)
    if limit is not None and limit < 1:
        raise DataError(f"{path}: a limit of {limit} problems leaves nothing; give at least 1")
    index = -1
    for index, item in enumerate(items_of(path, complaints, _how_to_make(path))):
        problem = _problem(item, index, complaints)
        if problem is not None:
            yield problem
        if index + 1 == limit:
            break
    complaints.raise_if_any()
    if index < 0:
        raise DataError(f"{path}: the list is empty; {_how_to_make(path)}")


@dataclass(frozen=True)
class Card:
    """What a data set is, where it comes from and how it is graded; `NAME.card.json` beside its files."""

    name: str
    grading: str = "exact"
    max_new_tokens: int = 128  # the published choice for everything but GSM8K, whose card says 64
    source: str = ""
    licence: str = ""
    split_rule: str = ""
    notes: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)  # file name -> digest
    counts: Mapping[str, int] = field(default_factory=dict)  # file name -> number of problems


def card_for(path: str | Path) -> Card:
    """The card beside a data file: data/gsm_train.json -> data/gsm.card.json; a default card when absent.

    Trailing parts of the name are dropped until a card fits (prosqa_7hop_test -> prosqa_7hop -> prosqa).
    """
    path = Path(path)
    parts = path.stem.split("_")
    for length in range(len(parts), 0, -1):
        candidate = path.with_name("_".join(parts[:length]) + ".card.json")
        if candidate.is_file():
            return read_card(candidate)
    return Card(name="_".join(parts[:-1]) or path.stem)


def read_card(path: str | Path) -> Card:
    """The card in a file; raises DataError with everything that is wrong with it."""
    path = Path(path)
    try:
        values = json.loads(read_text(path, _how_to_make(path)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: not JSON ({error}); delete it or run its preprocessing script again"
        ) from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: a card is a JSON object, got {kind(values)}")
    complaints = Complaints(path)
    for key in sorted(values.keys() - {f.name for f in fields(Card)}):
        complaints.add(f"'{key}' is not part of a card")
    for key in ("name", "grading", "source", "licence", "split_rule", "notes"):
        if not isinstance(values.get(key, ""), str):
            complaints.add(f"'{key}' must be text, got {kind(values[key])}")
    if not values.get("name"):
        complaints.add("'name' is missing or empty")
    if values.get("grading", "exact") not in GRADINGS:
        complaints.add(f"'grading' must be one of {', '.join(GRADINGS)}, got {values['grading']!r}")
    tokens = values.get("max_new_tokens", 1)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        complaints.add(f"'max_new_tokens' must be a whole number from 1, got {tokens!r}")
    for key, value_type in (("sha256", str), ("counts", int)):
        table = values.get(key, {})
        if not isinstance(table, dict) or not all(isinstance(value, value_type) for value in table.values()):
            complaints.add(f"'{key}' must map file names to {'digests' if value_type is str else 'numbers'}")
    complaints.raise_if_any()
    return Card(**values)


def is_correct(grading: str, predicted: str, expected: str) -> bool:
    """Whether an answer counts; an empty one never does.

    "exact", the published rule: equal text, commas and outer blanks aside.  "latex": one line with the same
    text, or with equal mathematics according to the math-verify library.
    """
    if grading not in GRADINGS:
        raise ValueError(f"grading must be one of {', '.join(GRADINGS)}, got {grading!r}")
    predicted, expected = predicted.strip(), expected.strip()
    if not predicted:
        return False
    if grading == "exact":
        return predicted.replace(",", "") == expected.replace(",", "")
    if predicted == expected:
        return True
    return "\n" not in predicted and _latex_equal(predicted, expected)


def split_completion(text: str, grading: str = "exact") -> tuple[str, str]:
    """Generated text after the prompt -> (reasoning, answer), by the published rule.

    The answer is what follows the last "#", without commas; "latex" keeps them, for (1,2) is not (12).
    Text without "#" has no answer: "".  (The published code compares it together with its question, which
    never equals an answer.)
    """
    reasoning, marker, rest = text.partition("#")
    answer = rest.rpartition("#")[2].strip() if marker else ""
    return reasoning.strip(), answer if grading == "latex" else answer.replace(",", "").strip()


def cot_matches(reasoning: str, steps: Sequence[str]) -> bool:
    """Whether the generated reasoning is word for word the reference's, one step a line."""
    return "\n".join(steps) == reasoning


def _how_to_make(path: Path) -> str:
    fitting = [name for name in _SCRIPTS if path.stem.startswith(name + "_")]
    if fitting:
        script = _SCRIPTS[max(fitting, key=len)]
        return f"`python preprocessing/{script}` makes it in data/ (see its --help for another folder)"
    return "the scripts in preprocessing/ make such files (see data/README.md)"


def _problem(item: Any, index: int, complaints: Complaints) -> Problem | None:
    if not isinstance(item, dict):
        complaints.add(f"item {index}: a problem is an object, got {kind(item)}")
        return None
    before = complaints.count
    for key in ("question", "answer"):
        if key not in item:
            complaints.add(f"item {index}, '{key}': missing")
        elif not isinstance(item[key], str):
            complaints.add(f"item {index}, '{key}': must be text, got {kind(item[key])}; put it in quotes")
        elif not item[key].strip():
            complaints.add(f"item {index}, '{key}': empty; fill it in or remove the item")
        elif _lone_surrogate(item[key]):
            complaints.add(f"item {index}, '{key}': half a surrogate pair (\\ud800-\\udfff) is no character")
    steps = item.get("steps")
    if "steps" not in item:
        complaints.add(f"item {index}, 'steps': missing; write [] for an answer without reasoning")
    elif not isinstance(steps, list):
        complaints.add(f"item {index}, 'steps': must be a list of texts, got {kind(steps)}")
    else:
        for number, step in enumerate(steps):
            if not isinstance(step, str):
                complaints.add(f"item {index}, 'steps'[{number}]: must be text, got {kind(step)}")
            elif _lone_surrogate(step):
                complaints.add(f"item {index}, 'steps'[{number}]: half a surrogate pair is no character")
    if complaints.count > before:
        return None
    return Problem(item["question"], tuple(step for step in steps or () if step.strip()), item["answer"])


@lru_cache(maxsize=65536)
def _latex_equal(predicted: str, expected: str) -> bool:
    if max(len(predicted), len(expected)) > _MAX_LATEX_CHARS:
        return False
    from math_verify import parse, verify  # takes a second to import, and only MATH needs it

    # math-verify bounds its work with SIGALRM, which only the main thread can receive.
    seconds = _LATEX_SECONDS if threading.current_thread() is threading.main_thread() else None
    gold, answer = (parse(f"${text}$", parsing_timeout=seconds) for text in (expected, predicted))
    return bool(gold and answer) and bool(verify(gold, answer, timeout_seconds=seconds))


def _lone_surrogate(text: str) -> bool:
    return not text.isascii() and _SURROGATE.search(text) is not None
