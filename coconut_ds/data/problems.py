"""Read problems and data cards, and grade answers.

[{"question": "2 + 2 ?", "steps": ["<<2+2=4>>"], "answer": "4"}, ...]      data/gsm_valid.json
{"name": "gsm", "grading": "exact", "max_new_tokens": 64, ...}             data/gsm.card.json beside it

forms.py lists the other forms of a data file.
"""

import ast
import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from coconut_ds.config.schema import violations
from coconut_ds.data.forms import (
    FIELDS,
    ORIGINAL_ANSWER,
    Number,
    each_item,
    field_of,
    how_to_make,
    local_file,
    missing_steps,
    other_form,
    read_text,
)
from coconut_ds.errors import DataError
from coconut_ds.files import parse_json

GRADINGS = ("exact", "latex")

_TEXT = {"type": "string"}
_CARD_SCHEMA = {
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "grading": {"enum": list(GRADINGS)},
        "max_new_tokens": {"type": "integer", "minimum": 1},
        **dict.fromkeys(("source", "licence", "split_rule", "notes"), _TEXT),
        "sha256": {"type": "object", "additionalProperties": _TEXT},
        "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
    },
}
_OFFER = re.compile(r"(\w+) or (?:an? )?(\w+)\s*\?\s*$")  # ProsQA: "Is Tom a terpus or brimpus?"
_SURROGATE = re.compile("[\ud800-\udfff]")
_CALCULATIONS = re.compile(r"(\s*<<[^<>]*>>)+\s*")
_MAX_REPORTED = 20
_MAX_LATEX_CHARS = 500  # longer answers are only compared as text
_LATEX_SECONDS = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its reasoning steps, and the answer, as plain text."""

    question: str
    steps: tuple[str, ...]
    answer: str


def _raise_errors(path: str | Path, errors: Sequence[str]) -> None:
    """Raise all errors of a file together, if there are any."""
    if len(errors) == 1:
        raise DataError(f"{path}: {errors[0]}")
    if errors:
        more = f"\n  ... and {len(errors) - _MAX_REPORTED} more" if len(errors) > _MAX_REPORTED else ""
        raise DataError(f"{path}: {len(errors)} errors\n  " + "\n  ".join(errors[:_MAX_REPORTED]) + more)


def read_problems(
    path: str | Path,
    limit: int | None = None,
    fields: Mapping[str, Any] | None = None,
    without_steps: dict[int, str] | None = None,
) -> list[Problem]:
    """Read the problems of a data file (forms.py), at most `limit` of them.  Other fields are ignored.

    `fields`: the file's name for question, steps or answer if that is another one; of a question also several
    names; with one name for steps and answer, `####` is between them.  Steps in one text are its lines or its
    <<calculations>>.  Blank steps are dropped: the published conversion writes `[""]` for an item without
    reasoning.  Whitespace around a text is removed.  Items without steps are errors unless `without_steps`
    collects their indices, the first with what may name its steps.  Raises DataError with the first 20 errors
    of the file, each with item and field.
    """
    return list(each_problem(path, limit, fields, without_steps))


def each_problem(
    path: str | Path,
    limit: int | None = None,
    fields: Mapping[str, Any] | None = None,
    without_steps: dict[int, str] | None = None,
) -> Iterator[Problem]:
    """Yield the problems one by one, to save memory. Raises like read_problems, at the end."""
    errors: list[str] = []
    if limit is not None and limit < 1:
        raise DataError(f"{path}: the limit must be at least 1, got {limit}")
    names = dict.fromkeys(FIELDS, "") | dict(fields or {})
    index = -1
    for index, item in enumerate(each_item(local_file(path), errors)):
        values = _values(item, names)
        if index == 0 and (message := other_form(item, values, names)):
            errors.append(message)
            break
        problem = _problem(item, values, index, errors, without_steps, names["steps"])
        if problem is not None:
            yield problem
        if index + 1 == limit:
            break
    _raise_errors(path, errors)
    if index < 0:
        raise DataError(f"{path}: the list is empty; {how_to_make(Path(path))}")


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
    text = read_text(path)
    try:
        values = parse_json(text)
    except ValueError as error:
        raise DataError(
            f"{path}: not JSON ({error}); delete it or run its preprocessing script again"
        ) from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: a data card must be a JSON object, got {_kind(values)}")
    _raise_errors(path, violations(values, _CARD_SCHEMA, "a key of a data card"))
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


def enough_tokens(longest: int) -> int:
    """A limit for answers of up to `longest` tokens and their eos token: the next multiple of 8."""
    return 8 * (longest // 8 + 1)


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


def _kind(value: Any) -> str:
    if isinstance(value, Number):
        return "a number"
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _values(item: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an item that a problem has, under our names."""
    values = {}
    for key in FIELDS if isinstance(item, dict) else ():
        for name in (names[key], key):
            with suppress(KeyError):
                parts = [field_of(item, part) for part in ([name] if isinstance(name, str) else name)]
                is_text = len(parts) > 1 and all(isinstance(part, str) for part in parts)
                values[key] = " ".join(parts) if is_text else parts[0] if len(parts) == 1 else parts
                break
    text = values.get("answer")
    same_field = (names["steps"] or "steps") == (names["answer"] or "answer")
    if same_field and isinstance(text, str):  # as in GSM8K's own files
        steps, mark, answer = text.rpartition(ORIGINAL_ANSWER)
        values |= {"steps": steps.strip(), "answer": answer.strip()}
        if not mark:
            del values["answer"]
    return values


def _problem(
    item: Any,
    values: Mapping[str, Any],
    index: int,
    errors: list[str],
    without_steps: dict[int, str] | None,
    steps_name: str | Sequence[str],
) -> Problem | None:
    if not isinstance(item, dict):
        errors.append(f"item {index}: must be an object, got {_kind(item)}")
        return None
    before = len(errors)
    missing = [key for key in ("question", "answer") if key not in values]
    errors += [f"item {index}, '{key}': missing" for key in missing]
    if "answer" in missing and isinstance(values.get("steps"), str):
        errors[-1] += f"; where one field holds steps and answer, it follows '{ORIGINAL_ANSWER}'"
    for key in ("question", "answer"):
        errors += [f"item {index}, '{key}': {error}" for error in _text_errors(key, values.get(key, "-"))]
    if "steps" not in values:
        is_shown = len(errors) < _MAX_REPORTED and not without_steps
        hint = missing_steps(item, steps_name) if is_shown else ""
        if without_steps is None:
            errors.append(f"item {index}, 'steps': missing{hint}; write [] for an answer without reasoning")
        else:
            without_steps[index] = hint
    steps = values.get("steps", [])
    if isinstance(steps, str) and not isinstance(steps, Number):
        steps = _steps_of_text(steps)
    if not isinstance(steps, list):
        errors.append(f"item {index}, 'steps': must be a list of texts, got {_kind(steps)}")
        return None
    for number, step in enumerate(steps):
        if not isinstance(step, str) or isinstance(step, Number):
            errors.append(f"item {index}, 'steps'[{number}]: must be text, got {_kind(step)}")
        elif _has_surrogate(step):
            errors.append(f"item {index}, 'steps'[{number}]: half a surrogate pair is not a character")
    if len(errors) > before:
        return None
    texts, answer = tuple(filter(None, map(str.strip, steps))), str(values["answer"]).strip()
    if texts and texts[-1].startswith(ORIGINAL_ANSWER) and texts[-1].strip("# ") == answer:
        texts = texts[:-1]  # the answer again, as GSM8K's own files end
    return Problem(values["question"].strip(), texts, answer)


def _text_errors(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str) or (isinstance(value, Number) and key == "question"):
        remedy = "; put it in quotes" if isinstance(value, Number | bool) else ""
        yield f"must be text, got {_kind(value)}{remedy}"
    elif not value.strip():
        yield "empty; fill it in or remove the item"
    elif _has_surrogate(value):
        yield "half a surrogate pair (\\ud800-\\udfff) is not a character"


def _steps_of_text(text: str) -> list[Any]:
    """The steps in one text: a list in JSON or Python, <<calculations>> in a row, or lines."""
    if text.lstrip().startswith("["):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(text.strip())  # as pandas and csv write a list
            if isinstance(value, list):
                return value
    if _CALCULATIONS.fullmatch(text):
        return re.findall(r"<<[^<>]*>>", text)
    return text.splitlines()


@lru_cache(maxsize=65536)
def _latex_equal(predicted: str, expected: str) -> bool:
    if max(len(predicted), len(expected)) > _MAX_LATEX_CHARS:
        return False
    from math_verify import parse, verify  # takes a second to import, and only MATH needs it

    # math-verify limits its time with SIGALRM, which only the main thread can receive.
    seconds = _LATEX_SECONDS if threading.current_thread() is threading.main_thread() else None
    gold, answer = (parse(f"${text}$", parsing_timeout=seconds) for text in (expected, predicted))
    return bool(gold and answer) and bool(verify(gold, answer, timeout_seconds=seconds))


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and _SURROGATE.search(text) is not None
