"""Read the items of a data file in the forms that the field uses.

    .json .jsonl       a list, JSON lines, or one object with the list under any key or a list for every field
    .csv .tsv          rows under a line of column names, divided by commas, semicolons or tabs
    .parquet           needs pyarrow
    .gz                any of the text forms, compressed
    hf://OWNER/NAME[/CONFIG][@REVISION]:SPLIT     files of a data set of the Hugging Face hub, from its cache

A number stays the text that the file holds.  Which fields a problem needs is decided in problems.py.
"""

import codecs
import csv
import gzip
import io
import json
import re
import socket
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from coconut_ds.errors import DataError, first_line
from coconut_ds.files import json_text, make_folder, read_bytes, replace_text, similar_path

FIELDS = ("question", "steps", "answer")
HUB = "hf:/"  # of hf://, also after pathlib merged the slashes
LIST_FORM = 'write [{"question": "...", "steps": ["..."], "answer": "..."}, ...]'
CONVERT_GSM8K = "`python preprocessing/gsm8k.py --form {} --source FOLDER` converts a folder of such files"
ORIGINAL_ANSWER = "####"  # before the answer in GSM8K's own files
TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_SCRIPTS = {  # the script that makes data/NAME_*.json; the longest matching name counts
    "gsm": "gsm8k.py",
    "prontoqa": "prontoqa.py",
    "prontoqa_like": "prontoqa.py --generate",
    "prosqa": "prosqa.py",
    "prosqa_like": "prosqa.py --generate",
    "math": "hendrycks_math.py",
    "arithmetic": "arithmetic.py",
}
_HUB_NAME = re.compile(r"hf:/+([\w.-]+/[\w.-]+)(/[\w./-]+)?(@[\w./-]+)?:([\w.-]+)")
_EXCEL = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # Excel's first line of a file for another country
_BLANK = re.compile(r"[ \t\n\r]*")
_BOM = b"\xef\xbb\xbf"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_DATA_KEY = re.compile(rb'\{\s*"(data|problems|examples|items|rows|train|valid|test|steps|answer)"\s*:\s*\[')
_MAX_BYTES = 1 << 33  # of a file and of what it unpacks to
_CONVERSATIONS = ("messages", "conversations", "conversation")


class Number(str):
    """A number of a data file, as the file writes it; 8.0 is 8."""

    def __new__(cls, text: object) -> "Number":
        return super().__new__(cls, str(text).removesuffix(".0"))


def is_hub(path: str | Path) -> bool:
    """Whether `path` names a data set of the hub."""
    return str(path).startswith(HUB)


def is_url(path: str | Path) -> bool:
    return str(path).startswith(("http:/", "https:/"))  # also after pathlib merged the slashes


def local_file(path: str | Path) -> Path:
    """The file itself; for a data set of the hub, its rows as JSON lines in the user's cache folder.

    Raises DataError if the data set is neither cached nor can be downloaded.
    """
    return _from_hub(str(path)) if is_hub(path) else Path(path)


def is_cached(path: str) -> bool:
    """Whether a data set of the hub can be read without a network.  Raises DataError for a wrong name."""
    parts = _parts_of(path)
    try:
        _hub_files(path, *parts, local_files_only=True)
    except DataError:
        return False
    return True


def each_item(path: Path, errors: list[str]) -> Iterator[Any]:
    """Yield the items of a file; a syntax error is added to `errors` and ends them.  Raises DataError."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    text = read_text(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix in (".csv", ".tsv"):
        yield from _csv_rows(text, "\t" if suffix == ".tsv" else ",", errors)
    else:
        yield from _json_items(path, text, errors)


def looks_like_data(content: bytes) -> bool:
    """Whether a JSON file holds problems, not settings; its first megabyte is enough."""
    if content.startswith(_UTF16):
        content = content.decode("utf-16", errors="ignore").encode()
    start = content.removeprefix(_BOM).lstrip()
    if start.startswith(b"[") or _unfinished_download(content):
        return True
    return start.startswith(b"{") and (b'"question"' in start or _DATA_KEY.match(start) is not None)


def read_text(path: Path) -> str:
    """Read a UTF-8 file that is not empty. Raises DataError with how to get the file."""
    content = _read(path)
    if path.suffix == ".gz":
        try:
            with gzip.open(io.BytesIO(content)) as reader:
                content = reader.read(_MAX_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be unpacked ({first_line(error)}); download it again") from None
    if not content.strip():
        raise DataError(f"{path}: the file is empty; {how_to_make(path)}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith(_UTF16):
            raise DataError(f"{path}: is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)") from None
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8 "
            f"(from Latin-1: iconv -f LATIN1 -t UTF-8)"
        ) from None


def how_to_make(path: Path) -> str:
    fitting = [name for name in _SCRIPTS if path.stem.startswith(name + "_")]
    if fitting:
        script = _SCRIPTS[max(fitting, key=len)]
        return f"`python preprocessing/{script}` makes it in data/ (see its --help for another folder)"
    return "the scripts in preprocessing/ make such files (see data/README.md)"


def _read(path: Path) -> bytes:
    advice = how_to_make(path)
    if is_url(path):
        raise DataError(f"{path}: is a URL; download the file, and give its path")
    try:
        content = read_bytes(path, _MAX_BYTES)
    except FileNotFoundError:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"{path}: no such file{where}{similar_path(path) or f'; {advice}'}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: this is a folder; give the JSON file inside it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if download := _unfinished_download(content):
        raise DataError(f"{path}: {download}; {advice}")
    return content


def _unfinished_download(content: bytes) -> str:
    """A message for a Git LFS pointer or an HTML page in place of the file; empty for other files."""
    start = content[:200].removeprefix(_BOM).lstrip().lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not the file itself; download the raw file"
    return ""


def _json_items(path: Path, text: str, errors: list[str]) -> Iterator[Any]:
    """Decode the items of JSON text one at a time."""
    index = 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        item = dict(pairs)
        if len(item) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            errors.extend(f"item {index}, '{key}': the key occurs more than once; keep one" for key in twice)
        return item

    def not_json(constant: str) -> None:
        errors.append(f"item {index}: {constant} is not JSON; write text in quotes")

    hooks: Any = {"parse_constant": not_json, "parse_int": Number, "parse_float": Number}
    decode = json.JSONDecoder(object_pairs_hook=unique, **hooks).raw_decode
    position = _after_blanks(text, 0)
    is_list = text.startswith("[", position)
    if not is_list and not text.startswith("{", position):
        first = text[position:].partition("\n")[0]
        if "||" in first and ORIGINAL_ANSWER in first:
            form = "this is GSM8K's line format (question||steps #### answer); "
            raise DataError(f"{path}: {form}{CONVERT_GSM8K.format('icot')}")
        hint = "a table ends in .csv or .tsv; " if "," in first or "\t" in first else ""
        raise DataError(f"{path}: the file must hold a list of problems; {hint}{LIST_FORM}")
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


def _held_by(value: dict[str, Any], errors: list[str]) -> Iterable[Any]:
    """The items of {"data": [...]} or {"question": [...], ...}; otherwise the object is the only item."""
    lists = {key: items for key, items in value.items() if isinstance(items, list)}
    held = {key: items for key, items in lists.items() if items and isinstance(items[0], dict)}
    has_text = any(isinstance(other, str) for other in value.values())
    if isinstance(value.get("question"), str) or any(key in held for key in _CONVERSATIONS):
        return [value]
    if len(held) > 1:
        errors.append(f"the file holds several lists ({', '.join(held)}); write each to a file of its own")
        return []
    if held or len(lists) == len(value) == 1:
        return next(iter((held or lists).values()))
    if has_text:
        return [value]
    if len(lists) < 2 or not any(lists.values()):
        errors.append(f"the file must hold a list of problems; {LIST_FORM}")
        return []
    lengths = {key: len(items) for key, items in lists.items()}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"'{key}' has {length}" for key, length in lengths.items())
        errors.append(f"the columns differ in length: {described}")
        return []
    return (dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))


def _after_blanks(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _syntax_error(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply; write a flat object"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    return f"not JSON: {error}"


def _csv_rows(text: str, delimiter: str, errors: list[str]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    if named := _EXCEL.match(text):
        delimiter, text = named[1], text[named.end() :]
    header = text.partition("\n")[0]
    if delimiter not in header:  # Excel writes semicolons where a comma is the decimal sign
        delimiter = next((other for other in ";\t," if other in header), delimiter)
    options: Any = {"delimiter": delimiter, "skipinitialspace": True, "strict": True}
    reader = csv.DictReader(io.StringIO(text, newline=""), **options)
    try:
        for index, row in enumerate(reader):
            if None in row:
                errors.append(f"item {index}: has more values than the first line has columns")
                continue
            yield {key: value for key, value in row.items() if value is not None}
    except csv.Error as error:
        errors.append(f"line {reader.line_num}: not CSV: {error}")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet  # optional: only for this form
    except ImportError:
        raise DataError(f"{path}: Parquet needs a package; `pip install pyarrow` installs it") from None
    content = _read(path)
    try:
        for batch in parquet.ParquetFile(io.BytesIO(content)).iter_batches():
            for row in batch.to_pylist():
                yield {key: _plain(value) for key, value in row.items() if value is not None}
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as Parquet ({first_line(error)}); download it again"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return Number(int(value) if float(value).is_integer() else value)


def _parts_of(name: str) -> tuple[str, str, str, str]:
    """(owner/name, configuration, revision, split).  Raises DataError."""
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise DataError(f"{name}: must be hf://OWNER/NAME:SPLIT or hf://OWNER/NAME/CONFIG:SPLIT")
    owner, config, revision, split = match.groups()
    return owner, (config or "").strip("/"), (revision or "@main")[1:], split


def _from_hub(name: str) -> Path:
    from platformdirs import user_cache_path

    owner, config, revision, split = _parts_of(name)
    files = _hub_files(name, owner, config, revision, split)
    snapshot = next(folder for folder in files[0].parents if folder.parent.name == "snapshots")
    folder = user_cache_path("coconut_ds") / "hub" / owner.replace("/", "--") / snapshot.name
    target = folder / f"{config.replace('/', '-') or 'default'}_{split}.jsonl"
    if not target.is_file():
        errors: list[str] = []
        rows = [json_text(item, default=str) for file in files for item in each_item(file, errors)]
        if errors:
            raise DataError(f"{name}: {errors[0]}")
        make_folder(folder)
        replace_text(target, "\n".join(rows) + "\n")
    return target


@cache
def use_cache_without_network() -> None:
    """Without a network, have the hub's client read its cache at once; it would retry for a minute."""
    from huggingface_hub import constants

    if getproxies():  # which resolve names themselves
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _hub_files(
    name: str, owner: str, config: str, revision: str, split: str, local_files_only: bool = False
) -> list[Path]:
    """The files of a split in the hub's cache, downloaded if they are missing."""
    from huggingface_hub import snapshot_download  # takes half a second to import

    use_cache_without_network()
    suffixes = (".parquet", *TEXT_SUFFIXES)
    patterns = [f"*{split}*{suffix}{packed}" for suffix in suffixes for packed in ("", ".gz")]
    try:
        folder = Path(
            snapshot_download(
                owner,
                repo_type="dataset",
                revision=revision,
                allow_patterns=patterns,
                local_files_only=local_files_only,
            )
        )
    except Exception as error:  # the hub's client raises many types, also for no network
        raise DataError(
            f"{name}: cannot be downloaded and is not in the cache: {first_line(error)}\n"
            f"  On a machine with network: huggingface-cli download --repo-type dataset {owner}"
        ) from error
    part = re.compile(rf"(.*[/_.-])?{re.escape(split)}([/_.-].*)?")
    files = sorted(file for pattern in patterns for file in folder.rglob(pattern.rpartition("/")[2]))
    files = [file for file in dict.fromkeys(files) if part.fullmatch(str(file.relative_to(folder)))]
    groups: dict[str, list[Path]] = {}
    for file in files:
        inner = file.relative_to(folder).parent.as_posix()
        if config in ("", inner, inner.removeprefix("data/")) or config in file.relative_to(folder).parts:
            groups.setdefault(inner, []).append(file)
    if not groups:
        raise DataError(
            f"{name}: the data set has no file of split {split!r}; its files are on the hub's page"
        )
    if len(groups) > 1:
        choices = ", ".join(f"hf://{owner}/{group}:{split}" for group in groups)
        raise DataError(f"{name}: the data set has this split in several folders; write one of {choices}")
    (files,) = groups.values()
    kind = next(suffix for suffix in suffixes if any(suffix in file.suffixes for file in files))
    return [file for file in files if kind in file.suffixes]


def field_of(item: Mapping[str, Any], path: str) -> Any:
    """The value at `path` of an item, `messages.1.content` for nested ones; KeyError if there is none."""
    if path in item:
        return item[path]
    value: Any = item
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise KeyError(path) from None
    return value


# Names of our fields in other data sets, in any case; the first that an item has counts.
_NAMES = {
    "question": ("question", "problem", "instruction", "query", "prompt", "input"),
    "steps": ("steps", "cot", "rationale", "reasoning", "chain_of_thought", "solution", "explanation"),
    "answer": (
        "answer", "final_answer", "expected_answer", "gold", "gold_answer", "ground_truth", "label", "output",
        "response", "completion", "target",
    ),
}  # fmt: skip
_DIVIDED = f"the lines before {ORIGINAL_ANSWER} are the steps, the text after it the answer"
ASKING, ANSWERING = ("user", "human"), ("assistant", "gpt", "model")  # roles in conversations


def other_form(item: Any, values: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """A message for the first item of a file in another form: its fields, and what reads or converts it.

    `values`: what the item has under our names; `names`: the file's names for them, as far as they are given.
    Empty if the item needs no other reading.
    """
    missing = [key for key in ("question", "answer") if key not in values]
    if missing == ["answer"] and names["answer"] and names["answer"] == names["steps"]:
        return ""  # the item lacks only ORIGINAL_ANSWER
    in_answer = "steps" not in values and ORIGINAL_ANSWER in str(values.get("answer"))
    if not isinstance(item, dict) or not (in_answer or (missing and set(item) - set(FIELDS))):
        return ""
    has = f"item 0 has the fields {', '.join(map(str, list(item)[:12]))}"
    if in_answer:
        form = "the answer holds the steps, as in GSM8K's own files"
        reads = f"write 'fields: {{steps: answer}}' in the YAML: {_DIVIDED}"
        return f"{has}: {form}; {reads}; or {CONVERT_GSM8K.format('original')}"
    if {"problem", "solution"} <= set(item) and "\\boxed" in str(item["solution"]):
        convert = "`python preprocessing/hendrycks_math.py --source FOLDER` converts a folder of such files"
        return f"{has}: this is MATH's own form; {convert}"
    own = {str(name).lower(): name for name in reversed(item)}
    guess = {field: next((own[n] for n in names if n in own), "...") for field, names in _NAMES.items()}
    if conversation := next((key for key in _CONVERSATIONS if isinstance(item.get(key), list)), ""):
        form, guess["question"], guess["answer"] = _turns(conversation, item[conversation])
        has = f"{has}: this is {form}"
    elif "instruction" in item:
        has, guess["answer"] = f"{has}: this is Alpaca's form", own.get("output", "...")
    given = {key: names[key] or key for key in values}
    guess |= {key: name if isinstance(name, str) else f"[{', '.join(name)}]" for key, name in given.items()}
    with suppress(KeyError):
        if guess["steps"] == "..." and ORIGINAL_ANSWER in str(field_of(item, guess["answer"])):
            guess["steps"] = guess["answer"]
    no_steps = "" if guess["steps"] != "..." else "; without steps, it can only be evaluated on"
    divided = f"; {_DIVIDED}" if guess["steps"] == guess["answer"] else ""
    shown = {key: name for key, name in guess.items() if name != key and not (no_steps and key == "steps")}
    line = ", ".join(f"{key}: {name}" for key, name in shown.items())
    wanted = " and ".join(f"'{key}'" for key in missing)
    return f"{has}, not {wanted}; name them in the YAML: 'fields: {{{line}}}'{no_steps}{divided}"


def missing_steps(item: dict[str, Any], name: str | Sequence[str]) -> str:
    """How an item without steps may name them, for a message; '' if nothing looks like it.

    `name`: what 'fields' says, '' if it does not name them.
    """
    if name:
        return f" ('fields' names {name!r}, none of {', '.join(map(repr, list(item)[:12]))})"
    own = {str(key).lower(): key for key in reversed(item)}
    similar = [*_NAMES["steps"], *get_close_matches("steps", own, 1, 0.7)]
    guess = next((own[key] for key in similar if key in own), None)
    return (
        "" if guess is None else f" (if '{guess}' holds them, write 'fields: {{steps: {guess}}}' in the YAML)"
    )


def _turns(key: str, turns: list[Any]) -> tuple[str, str, str]:
    """(form, question, answer) of a conversation: the first turn of a user, and the answer to it."""
    speakers = [turn.get("role", turn.get("from")) if isinstance(turn, dict) else None for turn in turns]
    question = next((i for i, name in enumerate(speakers) if name in ASKING), 0)
    replies = (i for i, name in enumerate(speakers) if i > question and name in ANSWERING)
    answer = next(replies, question + 1)
    is_chat = any(isinstance(turn, dict) and "content" in turn for turn in turns)
    form, text = ("the chat form", "content") if is_chat else ("ShareGPT's form", "value")
    return form, f"{key}.{question}.{text}", f"{key}.{answer}.{text}"
