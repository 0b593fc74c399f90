"""Decode the items of a data file one at a time, and collect all errors of the file in one message.

[{...}, {...}]                              a list
{"data": [{...}, {...}]}                    the list under one key
{"question": [...], "answer": [...]}        a list for every key
{...}\n{...}                                JSON lines
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coconut_ds.errors import DataError
from coconut_ds.files import read_bytes

MAX_REPORTED = 20
LIST_FORM = 'write [{"question": "...", "steps": ["..."], "answer": "..."}, ...]'
BOM = b"\xef\xbb\xbf"
_BLANK = re.compile(r"[ \t\n\r]*")
_DATA_KEY = re.compile(rb'\{\s*"(data|problems|examples|items|rows|train|valid|test|steps|answer)"\s*:\s*\[')


ORIGINAL_ANSWER = "####"  # before the answer in GSM8K's own files
CONVERT_GSM8K = "`python preprocessing/gsm8k.py --form {} --source FOLDER` converts a folder of such files"


class FileErrors:
    """All errors of one file, raised together."""

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
            raise DataError(f"{self.path}: {self.count} errors\n  " + "\n  ".join(self.first) + more)


def read_text(path: Path, advice: str) -> str:
    """Read a UTF-8 file that is not empty. Raises DataError, with `advice` on how to get the file."""
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
    if download := unfinished_download(content):
        raise DataError(f"{path}: {download}; {advice}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8 "
            f"(from Latin-1: iconv -f LATIN1 -t UTF-8)"
        ) from None


def unfinished_download(content: bytes) -> str:
    """A message for a Git LFS pointer or an HTML page in place of the file; empty for other files."""
    start = content[:200].removeprefix(BOM).lstrip().lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not the file itself; download the raw file"
    return ""


def looks_like_data(content: bytes) -> bool:
    """Whether a JSON file holds problems, not settings; its first megabyte is enough."""
    start = content.removeprefix(BOM).lstrip()
    if start.startswith(b"[") or unfinished_download(content):
        return True
    return start.startswith(b"{") and (b'"question"' in start or _DATA_KEY.match(start) is not None)


def items_of(path: Path, errors: FileErrors, advice: str) -> Iterator[Any]:
    """Decode the items of a data file one at a time; a syntax error ends the iteration."""
    text = read_text(path, advice)
    decoder = _Decoder(text, errors)
    first = text[decoder.position : decoder.position + 1]
    if first == "[":
        return decoder.list_items()
    if first == "{":
        return decoder.object_items()
    line = text[decoder.position :].partition("\n")[0]
    if "||" in line and ORIGINAL_ANSWER in line:
        raise DataError(
            f"{path}: this is GSM8K's line format (question||steps #### answer); "
            + CONVERT_GSM8K.format("icot")
        )
    raise DataError(f"{path}: the file must hold a list of problems; {LIST_FORM}")


class _Decoder:
    """The text of one file and the current position in it."""

    def __init__(self, text: str, errors: FileErrors):
        self.text, self.errors = text, errors
        self.index = 0
        self.position = _after_blanks(text, 0)
        self._decode = json.JSONDecoder(
            object_pairs_hook=self._unique, parse_constant=self._not_json
        ).raw_decode

    def list_items(self) -> Iterator[Any]:
        text = self.text
        self.position = _after_blanks(text, self.position + 1)
        if text[self.position : self.position + 1] == "]":
            self.position += 1
        else:
            while True:
                item, is_valid = self._next()
                if not is_valid:
                    return
                yield item
                separator = text[self.position : self.position + 1]
                self.position = _after_blanks(text, self.position + 1)
                self.index += 1
                if separator == "]":
                    break
                if separator != ",":
                    what = f"{separator!r}" if separator else "the end of the file (was it cut off?)"
                    where = f"after item {self.index - 1}, line {self._line()}"
                    self.errors.add(f"{where}: expected ',' or ']' but found {what}")
                    return
        if _after_blanks(text, self.position) != len(text):
            self.errors.add(f"line {self._line()}: more text follows the end of the list; remove it")

    def object_items(self) -> Iterator[Any]:
        """JSON lines, or the items inside a single object."""
        item, is_valid = self._next()
        if is_valid and self.position == len(self.text):
            yield from _held_by(item, self.errors)
            return
        while is_valid:
            yield item
            self.index += 1
            if self.position == len(self.text):
                return
            item, is_valid = self._next()

    def _next(self) -> tuple[Any, bool]:
        """The value at the current position, and whether there is one."""
        try:
            item, position = self._decode(self.text, self.position)
        except RecursionError:
            self.errors.add(f"item {self.index}: nested too deeply; write a flat object")
            return None, False
        except ValueError as error:
            self.errors.add(f"item {self.index}: {_syntax(error)}")
            return None, False
        self.position = _after_blanks(self.text, position)
        return item, True

    def _line(self) -> int:
        return self.text.count("\n", 0, self.position) + 1

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        item = dict(pairs)
        if len(item) != len(pairs):
            keys = [key for key, _ in pairs]
            for key in sorted({key for key in keys if keys.count(key) > 1}):
                self.errors.add(f"item {self.index}, '{key}': the key occurs more than once; keep one")
        return item

    def _not_json(self, constant: str) -> None:
        self.errors.add(f"item {self.index}: {constant} is not JSON; write text in quotes")


def _held_by(value: dict[str, Any], errors: FileErrors) -> Iterator[Any]:
    """The items of {"data": [...]} or {"question": [...], ...}; otherwise the object is the only item."""
    lists = {key: items for key, items in value.items() if isinstance(items, list)}
    if isinstance(value.get("question"), str):
        yield value
    elif "question" in lists:
        lengths = {key: len(items) for key, items in lists.items()}
        if len(set(lengths.values())) > 1:
            described = ", ".join(f"'{key}' has {length}" for key, length in lengths.items())
            errors.add(f"the columns differ in length: {described}")
            return
        for row in zip(*lists.values(), strict=True):
            yield dict(zip(lists, row, strict=True))
    elif len(lists) == 1:
        yield from next(iter(lists.values()))
    else:
        errors.add(f"the file must hold a list of problems; {LIST_FORM}")


def _after_blanks(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _syntax(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    return f"not JSON: {error}"


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
