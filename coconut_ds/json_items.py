"""Decode a JSON list one element at a time, with everything that is wrong with the file in one message.

Knows: files, UTF-8, JSON.  Does not know: what the elements are.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coconut_ds.errors import DataError

MAX_REPORTED = 20
_BLANK = re.compile(r"[ \t\n\r]*")


class Complaints:
    """Everything wrong with one file, raised together."""

    def __init__(self, path: Path):
        self.path = path
        self.first: list[str] = []
        self.count = 0

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.first) < MAX_REPORTED:
            self.first.append(text)

    def raise_if_any(self) -> None:
        if self.count == 1:
            raise DataError(f"{self.path}: {self.first[0]}")
        if self.count:
            more = f"\n  ... and {self.count - MAX_REPORTED} more" if self.count > MAX_REPORTED else ""
            raise DataError(f"{self.path}: {self.count} problems\n  " + "\n  ".join(self.first) + more)


def read_text(path: Path, advice: str) -> str:
    """The UTF-8 text of a file that is not empty; `advice` says how to get one.  Raises DataError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {advice}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: this is a folder; name the JSON file inside it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not content.strip():
        raise DataError(f"{path}: the file is empty; {advice}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8 "
            f"(iconv -f LATIN1 -t UTF-8, if it is Latin-1)"
        ) from None


def items_of(path: Path, complaints: Complaints, advice: str) -> Iterator[Any]:
    """The elements of the file's outer list, decoded one at a time; a syntax error ends the iteration."""
    text = read_text(path, advice)
    position = _after_blanks(text, 0)
    if text[position : position + 1] != "[":
        lines = text[position : position + 1] == "{" and _looks_like_json_lines(text)
        advice = "it looks like JSON lines: wrap the lines in [ ] with commas between" if lines else ""
        advice = advice or 'write [{"question": "...", "steps": ["..."], "answer": "..."}, ...]'
        raise DataError(f"{path}: the file must hold a list of problems; {advice}")
    index = 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        item = dict(pairs)
        if len(item) != len(pairs):
            keys = [key for key, _ in pairs]
            for key in sorted({key for key in keys if keys.count(key) > 1}):
                complaints.add(f"item {index}, '{key}': the key occurs more than once; keep one")
        return item

    def not_json(constant: str) -> None:
        complaints.add(f"item {index}: {constant} is not JSON; write text in quotes")

    decode = json.JSONDecoder(object_pairs_hook=unique, parse_constant=not_json).raw_decode
    position = _after_blanks(text, position + 1)
    if text[position : position + 1] == "]":
        position += 1
    else:
        while True:
            try:
                item, position = decode(text, position)
            except RecursionError:
                complaints.add(f"item {index}: nested too deeply; a problem is one flat object")
                return
            except ValueError as error:
                complaints.add(f"item {index}: {_syntax(error)}")
                return
            yield item
            position = _after_blanks(text, position)
            separator = text[position : position + 1]
            position = _after_blanks(text, position + 1)
            index += 1
            if separator == "]":
                break
            if separator != ",":
                what = f"{separator!r}" if separator else "the end of the file (was it cut off?)"
                line = text.count("\n", 0, position) + 1
                complaints.add(f"after item {index - 1}, line {line}: expected ',' or ']' but found {what}")
                return
    if _after_blanks(text, position) != len(text):
        complaints.add(f"line {text.count(chr(10), 0, position) + 1}: more text follows the end of the list")


def _after_blanks(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _looks_like_json_lines(text: str) -> bool:
    lines = text.strip().splitlines()
    return len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines[:2])


def _syntax(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    return f"not JSON: {error}"


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
