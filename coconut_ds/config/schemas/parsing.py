"""Read a settings file into a mapping, and refuse content that is easily misread."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from coconut_ds.errors import ConfigError
from coconut_ds.files import read_bytes
from coconut_ds.terminal import is_printable

MAX_BYTES = 1 << 17  # PyYAML takes about a second for this size


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.  ConfigError: unreadable, too large, not UTF-8, not a plain mapping."""
    text = _read_text(path)
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_marked(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; settings are flat 'key: value' lines") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    return _mapping(value, path, "'key: value' lines")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.  ConfigError as for YAML, and for NaN and duplicate keys."""
    text = _read_text(path)
    try:
        value = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_int=_sane_int
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        hint = " (JSON has no comments)" if _starts_comment(text, error.pos) else ""
        raise ConfigError(f"{path}: not valid JSON: {error.msg} at {where}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {str(error)[:300]}") from None
    return _mapping(value, path, "a JSON object")


def parse_yaml_value(text: str, where: str) -> Any:
    """Parse one value as YAML: '3' is a number, 'true' a boolean, '[6, 3]' a list."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{where}: the value {text[:80]!r} is not valid YAML; quote it") from None


def _read_text(path: str | Path) -> str:
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give a file in it")
    try:
        data = read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EFBIG:
            raise ConfigError(
                f"{path}: is larger than {MAX_BYTES >> 10} KiB, so it is not a settings file"
            ) from None
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _mapping(value: object, path: str | Path, wanted: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = "is empty" if value is None else f"holds a {type(value).__name__}"
        raise ConfigError(f"{path}: {kind}; expected {wanted}")
    odd = [key for key in value if not isinstance(key, str)]
    if odd:
        raise ConfigError(f"{path}: keys must be words, got {odd[0]!r}")
    for key, text in _texts(value):
        if not is_printable(text):
            raise ConfigError(f"{path}: {key[:80]!r} holds control characters ({text[:80]!r}); remove them")
    return value


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (outermost key, text) for every text in a value, including keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield str(name), str(name)
            yield from _texts(item, key or str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without aliases (a small file could unfold to gigabytes) and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not allowed; write the value out", problem_mark=mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in getattr(node, "value", []):
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in seen:
                problem = f"'{key}' appears twice (first in line {seen[key]}); remove one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


def _marked(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{error.problem or error.context}{where}"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"'{key}' appears twice in one block; remove one")
        result[key] = value
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number; write a finite number")


def _sane_int(text: str) -> int:
    if len(text) > len(str(2**63)):
        raise ValueError(f"{text[:30]}... is too large a number")
    return int(text)


def _starts_comment(text: str, position: int) -> bool:
    return text[position : position + 2] in ("//", "/*") or text[position : position + 1] == "#"
