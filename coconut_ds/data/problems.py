"""Read problems and data cards, and grade answers.

[{"question": "2 + 2 ?", "steps": ["<<2+2=4>>"], "answer": "4"}, ...]      data/gsm_valid.json
{"name": "gsm", "grading": "exact", "max_new_tokens": 64, ...}             data/gsm.card.json beside it

A data file may also be JSON lines, or one object with the list under any key or a list for every field.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from coconut_ds.config.schema import violations
from coconut_ds.errors import DataError
from coconut_ds.files import parse_json, read_bytes

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
_BLANK = re.compile(r"[ \t\n\r]*")
_DATA_KEY = re.compile(rb'\{\s*"(data|problems|examples|items|rows|train|valid|test|steps|answer)"\s*:\s*\[')
_BOM = b"\xef\xbb\xbf"
_MAX_REPORTED = 20
_ORIGINAL_ANSWER = "####"  # before the answer in GSM8K's own files
_CONVERT_GSM8K = "`python preprocessing/gsm8k.py --form {} --source FOLDER` converts a folder of such files"
_LIST_FORM = 'write [{"question": "...", "steps": ["..."], "answer": "..."}, ...]'
_MAX_LATEX_CHARS = 500  # longer answers are only compared as text
_LATEX_SECONDS = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its reasoning steps, and the answer, as plain text."""

    question: str
    steps: tuple[str, ...]
    answer: str


def _raise_errors(path: Path, errors: Sequence[str]) -> None:
    """Raise all errors of a file together, if there are any."""
    if len(errors) == 1:
        raise DataError(f"{path}: {errors[0]}")
    if errors:
        more = f"\n  ... and {len(errors) - _MAX_REPORTED} more" if len(errors) > _MAX_REPORTED else ""
        raise DataError(f"{path}: {len(errors)} errors\n  " + "\n  ".join(errors[:_MAX_REPORTED]) + more)


def read_problems(path: str | Path, limit: int | None = None) -> list[Problem]:
    """Read the problems of a JSON file, at most `limit` of them.  Other fields are ignored.

    Blank steps are dropped: the published conversion writes `[""]` for an item without reasoning.
    Raises DataError with the first 20 errors of the file, each with its item and field.
    """
    return list(each_problem(path, limit))


def each_problem(path: str | Path, limit: int | None = None) -> Iterator[Problem]:
    """Yield the problems one by one, to save memory. Raises like read_problems, at the end."""
    path = Path(path)
    errors: list[str] = []
    if limit is not None and limit < 1:
        raise DataError(f"{path}: the limit must be at least 1, got {limit}")
    index = -1
    for index, item in enumerate(_items(path, errors)):
        problem = _problem(item, index, errors)
        if problem is not None:
            yield problem
        if index + 1 == limit:
            break
    _raise_errors(path, errors)
    if index < 0:
        raise DataError(f"{path}: the list is empty; {_how_to_make(path)}")


def looks_like_data(content: bytes) -> bool:
    """Whether a JSON file holds problems, not settings; its first megabyte is enough."""
    start = content.removeprefix(_BOM).lstrip()
    if start.startswith(b"[") or _unfinished_download(content):
        return True
    return start.startswith(b"{") and (b'"question"' in start or _DATA_KEY.match(start) is not None)


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
    text = _read_text(path)
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


def _read_text(path: Path) -> str:
    """Read a UTF-8 file that is not empty. Raises DataError with how to get the file."""
    advice = _how_to_make(path)
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"{path}: no such file{where}; {advice}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: this is a folder; give the JSON file inside it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not content.strip():
        raise DataError(f"{path}: the file is empty; {advice}")
    if download := _unfinished_download(content):
        raise DataError(f"{path}: {download}; {advice}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8 "
            f"(from Latin-1: iconv -f LATIN1 -t UTF-8)"
        ) from None


def _unfinished_download(content: bytes) -> str:
    """A message for a Git LFS pointer or an HTML page in place of the file; empty for other files."""
    start = content[:200].removeprefix(_BOM).lstrip().lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not the file itself; download the raw file"
    return ""


def _items(path: Path, errors: list[str]) -> Iterator[Any]:
    """Decode the items of a data file one at a time; a syntax error ends the iteration."""
    text, index = _read_text(path), 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        item = dict(pairs)
        if len(item) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            errors.extend(f"item {index}, '{key}': the key occurs more than once; keep one" for key in twice)
        return item

    def not_json(constant: str) -> None:
        errors.append(f"item {index}: {constant} is not JSON; write text in quotes")

    decode = json.JSONDecoder(object_pairs_hook=unique, parse_constant=not_json).raw_decode
    position = _after_blanks(text, 0)
    is_list = text.startswith("[", position)
    if not is_list and not text.startswith("{", position):
        first_line = text[position:].partition("\n")[0]
        if "||" in first_line and _ORIGINAL_ANSWER in first_line:
            form = "this is GSM8K's line format (question||steps #### answer); "
            raise DataError(f"{path}: {form}{_CONVERT_GSM8K.format('icot')}")
        raise DataError(f"{path}: the file must hold a list of problems; {_LIST_FORM}")
    at_end = False
    if is_list:
        position = _after_blanks(text, position + 1)
        at_end = text.startswith("]", position)
        position += at_end
    while not at_end:
        try:
            item, position = decode(text, position)
        except (ValueError, RecursionError) as error:
            errors.append(f"item {index}: {_syntax_error(error)}")
            return
        position = _after_blanks(text, position)
        if not is_list:
            at_end = position == len(text)
            yield from _held_by(item, errors) if at_end and index == 0 else [item]
        else:
            yield item
            separator = text[position : position + 1]
            position = _after_blanks(text, position + 1)
            at_end = separator == "]"
            if separator not in ("]", ","):
                what = f"{separator!r}" if separator else "the end of the file (was it cut off?)"
                line = text.count("\n", 0, position) + 1
                errors.append(f"after item {index}, line {line}: expected ',' or ']' but found {what}")
                return
        index += 1
    if _after_blanks(text, position) != len(text):
        line = text.count("\n", 0, position) + 1
        errors.append(f"line {line}: more text follows the end of the list; remove it")


def _held_by(value: dict[str, Any], errors: list[str]) -> Iterator[Any]:
    """The items of {"data": [...]} or {"question": [...], ...}; otherwise the object is the only item."""
    lists = {key: items for key, items in value.items() if isinstance(items, list)}
    if isinstance(value.get("question"), str):
        yield value
    elif "question" in lists:
        lengths = {key: len(items) for key, items in lists.items()}
        if len(set(lengths.values())) > 1:
            described = ", ".join(f"'{key}' has {length}" for key, length in lengths.items())
            errors.append(f"the columns differ in length: {described}")
            return
        for row in zip(*lists.values(), strict=True):
            yield dict(zip(lists, row, strict=True))
    elif len(lists) == 1:
        yield from next(iter(lists.values()))
    else:
        errors.append(f"the file must hold a list of problems; {_LIST_FORM}")


def _after_blanks(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _syntax_error(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply; write a flat object"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    return f"not JSON: {error}"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _how_to_make(path: Path) -> str:
    fitting = [name for name in _SCRIPTS if path.stem.startswith(name + "_")]
    if fitting:
        script = _SCRIPTS[max(fitting, key=len)]
        return f"`python preprocessing/{script}` makes it in data/ (see its --help for another folder)"
    return "the scripts in preprocessing/ make such files (see data/README.md)"


def _problem(item: Any, index: int, errors: list[str]) -> Problem | None:
    if not isinstance(item, dict):
        errors.append(f"item {index}: must be an object, got {_kind(item)}")
        return None
    before = len(errors)
    for key in ("question", "answer"):
        value = item.get(key)
        if key not in item:
            errors.append(f"item {index}, '{key}': missing")
        elif not isinstance(value, str):
            errors.append(f"item {index}, '{key}': must be text, got {_kind(value)}; put it in quotes")
        elif not value.strip():
            errors.append(f"item {index}, '{key}': empty; fill it in or remove the item")
        elif _has_surrogate(value):
            errors.append(
                f"item {index}, '{key}': half a surrogate pair (\\ud800-\\udfff) is not a character"
            )
    steps = item.get("steps", [])
    if "steps" not in item:
        remedy = "write [] for an answer without reasoning"
        if _ORIGINAL_ANSWER in str(item.get("answer")):
            remedy = "the answer holds them, as in GSM8K's own files; " + _CONVERT_GSM8K.format("original")
        errors.append(f"item {index}, 'steps': missing; {remedy}")
    elif not isinstance(steps, list):
        errors.append(f"item {index}, 'steps': must be a list of texts, got {_kind(steps)}")
    for number, step in enumerate(steps if isinstance(steps, list) else ()):
        if not isinstance(step, str):
            errors.append(f"item {index}, 'steps'[{number}]: must be text, got {_kind(step)}")
        elif _has_surrogate(step):
            errors.append(f"item {index}, 'steps'[{number}]: half a surrogate pair is not a character")
    if len(errors) > before:
        return None
    return Problem(item["question"], tuple(step for step in steps if step.strip()), item["answer"])


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
