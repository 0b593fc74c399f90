"""Read problems and data cards, and grade answers.

[{"question": "2 + 2 ?", "steps": ["<<2+2=4>>"], "answer": "4"}, ...]      data/gsm_valid.json
{"name": "gsm", "grading": "exact", "max_new_tokens": 64, ...}             data/gsm.card.json beside it
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from coconut_ds.data.json_items import CONVERT_GSM8K, ORIGINAL_ANSWER, FileErrors, items_of, kind, read_text
from coconut_ds.errors import DataError

GRADINGS = ("exact", "latex")

_SCRIPTS = {  # the script that makes data/NAME_*.json; the longest matching name counts
    "gsm": "gsm8k.py",
    "prontoqa": "prontoqa.py",
    "prontoqa_like": "prontoqa.py --generate",
    "prosqa": "prosqa.py",
    "prosqa_like": "prosqa.py --generate",
    "math": "hendrycks_math.py",
    "arithmetic": "arithmetic.py",
}
_OFFER = re.compile(r"(\w+) or (?:an? )?(\w+)\s*\?\s*$")  # ProsQA: "Is Tom a terpus or brimpus?"
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_LATEX_CHARS = 500  # longer answers are only compared as text
_LATEX_SECONDS = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its reasoning steps, and the answer, as plain text."""

    question: str
    steps: tuple[str, ...]
    answer: str


def read_problems(path: str | Path, limit: int | None = None) -> list[Problem]:
    """Read the problems of a JSON file, at most `limit` of them.  Other fields are ignored.

    Blank steps are dropped: the published conversion writes `[""]` for an item without reasoning.
    Raises DataError with the first 20 errors of the file, each with its item and field.
    """
    return list(each_problem(path, limit))


def each_problem(path: str | Path, limit: int | None = None) -> Iterator[Problem]:
    """Yield the problems one by one, to save memory. Raises like read_problems, at the end."""
    path = Path(path)
    errors = FileErrors(path)
    if limit is not None and limit < 1:
        raise DataError(f"{path}: the limit must be at least 1, got {limit}")
    index = -1
    for index, item in enumerate(items_of(path, errors, _how_to_make(path))):
        problem = _problem(item, index, errors)
        if problem is not None:
            yield problem
        if index + 1 == limit:
            break
    errors.raise_if_any()
    if index < 0:
        raise DataError(f"{path}: the list is empty; {_how_to_make(path)}")


@dataclass(frozen=True)
class Card:
    """A data card: origin and grading of a data set; `NAME.card.json` beside its files."""

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
    """The card of a data file: data/gsm_train.json -> data/gsm.card.json; a default card if there is none.

    Trailing parts of the name are dropped until a card exists (prosqa_7hop_test -> prosqa_7hop -> prosqa).
    """
    path = Path(path)
    parts = path.stem.split("_")
    for length in range(len(parts), 0, -1):
        candidate = path.with_name("_".join(parts[:length]) + ".card.json")
        if candidate.is_file():
            return read_card(candidate)
    return Card(name="_".join(parts[:-1]) or path.stem)


def read_card(path: str | Path) -> Card:
    """Read a card. Raises DataError with all errors of the file."""
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
        raise DataError(f"{path}: a data card must be a JSON object, got {kind(values)}")
    errors = FileErrors(path)
    for key in sorted(values.keys() - {f.name for f in fields(Card)}):
        errors.add(f"'{key}' is not a key of a data card")
    for key in ("name", "grading", "source", "licence", "split_rule", "notes"):
        if not isinstance(values.get(key, ""), str):
            errors.add(f"'{key}' must be text, got {kind(values[key])}")
    if not values.get("name"):
        errors.add("'name' is missing or empty")
    if values.get("grading", "exact") not in GRADINGS:
        errors.add(f"'grading' must be one of {', '.join(GRADINGS)}, got {values['grading']!r}")
    tokens = values.get("max_new_tokens", 1)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        errors.add(f"'max_new_tokens' must be an integer of at least 1, got {tokens!r}")
    for key, value_type in (("sha256", str), ("counts", int)):
        table = values.get(key, {})
        if not isinstance(table, dict) or not all(isinstance(value, value_type) for value in table.values()):
            errors.add(f"'{key}' must map file names to {'digests' if value_type is str else 'numbers'}")
    errors.raise_if_any()
    return Card(**values)


def is_correct(grading: str, predicted: str, expected: str) -> bool:
    """Whether an answer is correct; an empty one never is.

    "exact", the published rule: equal text, ignoring commas and outer whitespace.  "latex": one line with the
    same text, or with equal mathematics according to the math-verify library.
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
    """Split the generated text after the prompt into (reasoning, answer), by the published rule.

    The answer is the text after the last "#", without commas; "latex" keeps them, since (1,2) is not (12).
    Text without "#" has the answer "".  (The published code then compares the text with its question, which
    never equals an answer.)
    """
    reasoning, separator, rest = text.partition("#")
    answer = rest.rpartition("#")[2].strip() if separator else ""
    return reasoning.strip(), answer if grading == "latex" else answer.replace(",", "").strip()


def cot_matches(reasoning: str, steps: Sequence[str]) -> bool:
    """Whether the generated reasoning equals the reference, one step per line."""
    return "\n".join(steps) == reasoning


def examples_digest(problems: Sequence[Problem]) -> str:
    """A short hash of the questions and answers of an evaluation set, in their order."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(ascii((problem.question, problem.answer)).encode())
    return digest.hexdigest()[:16]


def chance_of(problems: Sequence[Problem]) -> float:
    """The accuracy of guessing on an evaluation set, as a fraction: the larger of two guesses.

    One always answers with the most frequent answer, which is at least as good as drawing a random one.
    The other picks one of the two answers that a question offers at its end ("... a terpus or brimpus?").
    """
    if not problems:
        return 0.0
    answers = Counter(problem.answer for problem in problems)
    offered = sum(1 / 2 for problem in problems if _offers_its_answer(problem))
    return max(answers.most_common(1)[0][1], offered) / len(problems)


def _offers_its_answer(problem: Problem) -> bool:
    offer = _OFFER.search(problem.question)
    words = set(re.findall(r"\w+", problem.answer))
    return offer is not None and len(words & set(offer.groups())) == 1


def _how_to_make(path: Path) -> str:
    fitting = [name for name in _SCRIPTS if path.stem.startswith(name + "_")]
    if fitting:
        script = _SCRIPTS[max(fitting, key=len)]
        return f"`python preprocessing/{script}` makes it in data/ (see its --help for another folder)"
    return "the scripts in preprocessing/ make such files (see data/README.md)"


def _problem(item: Any, index: int, errors: FileErrors) -> Problem | None:
    if not isinstance(item, dict):
        errors.add(f"item {index}: must be an object, got {kind(item)}")
        return None
    before = errors.count
    for key in ("question", "answer"):
        if key not in item:
            errors.add(f"item {index}, '{key}': missing")
        elif not isinstance(item[key], str):
            errors.add(f"item {index}, '{key}': must be text, got {kind(item[key])}; put it in quotes")
        elif not item[key].strip():
            errors.add(f"item {index}, '{key}': empty; fill it in or remove the item")
        elif _lone_surrogate(item[key]):
            errors.add(f"item {index}, '{key}': half a surrogate pair (\\ud800-\\udfff) is not a character")
    steps = item.get("steps")
    if "steps" not in item:
        remedy = "write [] for an answer without reasoning"
        if isinstance(item.get("answer"), str) and ORIGINAL_ANSWER in item["answer"]:
            remedy = "the answer holds them, as in GSM8K's own files; " + CONVERT_GSM8K.format("original")
        errors.add(f"item {index}, 'steps': missing; {remedy}")
    elif not isinstance(steps, list):
        errors.add(f"item {index}, 'steps': must be a list of texts, got {kind(steps)}")
    else:
        for number, step in enumerate(steps):
            if not isinstance(step, str):
                errors.add(f"item {index}, 'steps'[{number}]: must be text, got {kind(step)}")
            elif _lone_surrogate(step):
                errors.add(f"item {index}, 'steps'[{number}]: half a surrogate pair is not a character")
    if errors.count > before:
        return None
    return Problem(item["question"], tuple(step for step in steps or () if step.strip()), item["answer"])


@lru_cache(maxsize=65536)
def _latex_equal(predicted: str, expected: str) -> bool:
    if max(len(predicted), len(expected)) > _MAX_LATEX_CHARS:
        return False
    from math_verify import parse, verify  # takes a second to import, and only MATH needs it

    # math-verify limits its time with SIGALRM, which only the main thread can receive.
    seconds = _LATEX_SECONDS if threading.current_thread() is threading.main_thread() else None
    gold, answer = (parse(f"${text}$", parsing_timeout=seconds) for text in (expected, predicted))
    return bool(gold and answer) and bool(verify(gold, answer, timeout_seconds=seconds))


def _lone_surrogate(text: str) -> bool:
    return not text.isascii() and _SURROGATE.search(text) is not None
