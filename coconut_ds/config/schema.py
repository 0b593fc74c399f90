"""Read a settings file, check it against its JSON Schema, and describe every violation.

The schema files in schemas/ define every key's type, default and description.  Besides the standard keywords
they use these annotations: `group` (heading in the docs), `expects` (description of a rule that has no short
form), `noun` (what an unknown key of a block is not), `if_missing` (how to get a required value), `refused`
(why a key is not accepted, and what to do instead), `inert` (why a key is ignored), `published_default` (the
default in files of the published code), `also_called` (names of a key in other programs) and, beside
`properties`, `elsewhere` (advice for keys that only other programs have).

Each key of an experiment also has `affects`, which resuming, reports, sweeps and model cards read: `learning`
(other results), `shapes` (other results, and a checkpoint cannot be continued), `accuracy` (the same weights
are measured in another way) or `running` (none of these).  Paths have `path_to`: `data`, `weights` or `runs`.
"""

import errno
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import date
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match

from coconut_ds.errors import ConfigError
from coconut_ds.files import home_expanded, is_printable, parse_json, read_bytes, similar_path

MAX_BYTES = 1 << 17  # PyYAML takes about a second for this size
LONG_WORD = 8  # letters; short words are near many others
MAX_UNKNOWN = 20  # keys in a message; each is compared with all known keys
TYPE_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a block",
    "null": "None",
}


@cache
def load_schema(name: str) -> dict[str, Any]:
    """The schema `experiment` or `ds_config`.  The dict is shared: do not modify it."""
    text = resources.files(__package__).joinpath("schemas", f"{name}.schema.json").read_text(encoding="utf-8")
    return json.loads(text)


def default_of(name: str, key: str) -> Any:
    """The default of a setting, named with dots, in schema `name`; None if it has none."""
    schema = rule = load_schema(name)
    for part in key.split("."):
        rule = rule.get("properties", {}).get(part, {})
        if "$ref" in rule:
            rule = schema["$defs"][rule["$ref"].rsplit("/", 1)[1]]
    return rule.get("default")


def defaults(schema: Mapping[str, Any], published: bool = False) -> dict[str, Any]:
    """Defaults of all properties that have one; `published`: for a file of the published code."""
    name = "published_default" if published else "default"
    rules = schema["properties"].items()
    return {key: rule.get(name, rule["default"]) for key, rule in rules if "default" in rule}


def affects(key: str) -> str:
    """What a setting of an experiment affects.  A key of another version counts as `learning`."""
    return load_schema("experiment")["properties"].get(key, {}).get("affects", "learning")


def settings_with(annotation: str, *values: str) -> tuple[str, ...]:
    """The settings of an experiment whose annotation has one of `values`."""
    rules = load_schema("experiment")["properties"]
    return tuple(key for key, rule in rules.items() if rule.get(annotation) in values)


def kinds(rule: Mapping[str, Any]) -> list[str]:
    """JSON types that a rule allows; empty if it has no `type`."""
    stated = rule.get("type", [])
    return [stated] if isinstance(stated, str) else list(stated)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """'; did you mean X?' if `word` is a misspelled known word, else ''."""
    best = nearest(word, known)
    return f"; did you mean '{best}'?" if best else ""


def nearest(word: object, known: Iterable[str]) -> str:
    """The known word that `word` misspells, or ''.

    Up to one letter may be wrong, and up to two in words of eight letters or more.  Numbers and words of one
    or two letters have no near misses.
    """
    written = str(word).lower()
    if len(written) < 3 or written.isnumeric():
        return ""
    limit = 2 if len(written) >= LONG_WORD else 1
    near = {
        one: edit_distance(written, one.lower()) for one in known if abs(len(one) - len(written)) <= limit
    }
    best = min(near, key=lambda one: near[one], default="")
    return best if best and near[best] <= limit else ""


def edit_distance(first: str, second: str) -> int:
    """Number of letters to add, delete, replace or swap with a neighbor (optimal string alignment)."""
    before: list[int] = []
    previous = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        current = [i]
        for j, b in enumerate(second, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b)))
            if i > 1 and j > 1 and a == second[j - 2] and first[i - 2] == b:
                current[-1] = min(current[-1], before[j - 2] + 1)
        before, previous = previous, current
    return previous[-1]


def synonyms(schema: Mapping[str, Any]) -> dict[str, str]:
    """Names of keys in other programs, and the key here."""
    return {other: key for key, rule in schema["properties"].items() for other in rule.get("also_called", ())}


def unknown_keys(keys: Iterable[str], schema: Mapping[str, Any]) -> dict[str, str]:
    """A hint for each unknown key of a block: its name here, or the key that it misspells.

    The last key without a hint gets the list of valid keys.
    """
    names = {other: f"; write '{key}' instead" for other, key in synonyms(schema).items()}
    names |= {other: f"; {advice}" for other, advice in schema.get("elsewhere", {}).items()}
    accepted = [key for key, rule in schema["properties"].items() if "refused" not in rule]
    hints = {
        key: names.get(str(key).lower().replace("-", "_"))
        or did_you_mean(key, schema["properties"])
        or names.get(nearest(key, [name for name in names if len(name) >= LONG_WORD]), "")
        for key in keys
    }
    for key in [key for key, hint in hints.items() if not hint][-1:]:
        hints[key] = f"; valid keys: {', '.join(accepted)}"
    return hints


def shown(value: object) -> str:
    """A value as text of at most 80 characters."""
    text = str(value) if isinstance(value, date) else repr(value)
    text = {"True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 80 else text[:77] + "..."


def expectation(rule: Mapping[str, Any]) -> str:
    """Description of the valid values: 'a whole number of at least 1 or None'."""
    if "expects" in rule:
        return rule["expects"]
    if "enum" in rule:
        names = [shown(value).strip("'") for value in rule["enum"]]
        return ("one of " if len(names) > 1 else "") + ", ".join(names)
    bounds = [
        f"{words} {rule[keyword]}"
        for keyword, words in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "more than"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "less than"),
        )
        if keyword in rule
    ]
    words = " or ".join(TYPE_WORDS[name] for name in kinds(rule) if name != "null")
    if "items" in rule:
        words += f" with each item {expectation(rule['items'])}"
    if bounds:
        words += " of " + " and ".join(bounds)
    return words + (" or None" if "null" in kinds(rule) else "")


def violations(values: object, schema: Mapping[str, Any], noun: str) -> list[str]:
    """All violations of `schema`, one line per key: 'key: what, the value, what to do'.

    `noun` is what an unknown key is not ("a setting").
    """
    messages: dict[str, str] = {}
    for key in _not_finite(values, ""):
        messages[key] = f"{key}: must be a finite number; NaN and infinity cannot be used"
    validator = Draft202012Validator(schema)
    errors = sorted(
        validator.iter_errors(values),
        key=lambda error: list(map(str, error.absolute_path)),
    )
    for error in errors:
        for key, message in _explain(error, noun, validator):
            messages.setdefault(key, message)
    return list(messages.values())


def _explain(error: ValidationError, noun: str, validator: Draft202012Validator) -> Iterator[tuple[str, str]]:
    here = ".".join(str(part) for part in error.absolute_path)
    inside = f"{here}." if here else ""
    rule: Any = error.schema
    value: Any = error.instance
    if error.validator == "additionalProperties":
        unknown = [key for key in value if key not in rule["properties"]]
        for key, hint in unknown_keys(unknown[:MAX_UNKNOWN], rule).items():
            yield f"{inside}{key}", f"{inside}{key}: is not {rule.get('noun', noun)}{hint}"
    elif error.validator == "required":
        for key in rule["required"]:
            if key not in value:
                what = " ".join(
                    rule["properties"][key].get(part, "") for part in ("description", "if_missing")
                )
                yield f"{inside}{key}", f"{inside}{key}: is missing, and has no default. {what}".rstrip()
    elif "refused" in rule:
        yield here, f"{here}: {rule['refused']}"
    elif value == "auto":
        text = f"'auto' is not filled in here (DeepSpeed would drop it silently); write {expectation(rule)}"
        yield here, f"{here}: {text}"
    else:
        hint = did_you_mean(value, map(str, rule["enum"])) if "enum" in rule else ""
        if isinstance(value, str) and _fits_unquoted(value, validator.evolve(schema=rule)):
            hint = f"; write {value.strip()} without quotes"
        if "string" in kinds(rule) and isinstance(value, int | float | date):
            hint = "; put it in quotes"
        wanted = {
            "minLength": "text that is not empty",
            "maxLength": f"text of at most {rule.get('maxLength')} characters",
        }.get(str(error.validator)) or expectation(rule)
        yield here, f"{here}: must be {wanted}, got {shown(value)}{hint}"


def _fits_unquoted(text: str, validator: Any) -> bool:
    """Whether the text would be a valid number, `true` or `false` without its quotes."""
    with suppress(ConfigError):
        value = parse_yaml_value(text, "")
        return isinstance(value, int | float) and validator.is_valid(value)
    return False


def _not_finite(value: object, here: str) -> Iterator[str]:
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:  # NaN, and 10**400 too
        yield here
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{here}.{key}" if here else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{here}.{index}")


def record_schema(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The schema of an object with these properties, and with any others."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def schema_error(value: Any, schema: Mapping[str, Any]) -> str | None:
    """Where and why a value does not match a schema; None if it does."""
    error = best_match(Draft202012Validator(schema).iter_errors(value))
    return error and f"{error.json_path.removeprefix('$.')}: {error.message[:200]}"


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
        value = parse_json(text, allow_nan=False)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        hint = " (JSON has no comments)" if _starts_comment(text, error.pos) else ""
        if Path(path).suffix in (".yaml", ".yml"):
            hint = "; this is a YAML file: write CONFIG.yaml --deepspeed_config FILE.json"
        raise ConfigError(f"{path}: not valid JSON: {error.msg} at {where}{hint}") from None
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
    path = Path(home_expanded(str(path)))
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give a file in it")
    try:
        data = read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{similar_path(path)}") from None
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
        names = {str: "text", list: "a list", bool: "true or false"}
        kind = "is empty" if value is None else f"holds {names.get(type(value), 'a number')}"
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

    def construct_yaml_int(self, node: Any) -> Any:
        """Numbers as YAML 1.2 has them: 010 is ten, not octal, and 1:30 is text."""
        digits = str(node.value).replace("_", "")
        if ":" in digits:
            return node.value
        return int(digits) if digits.lstrip("+-").isdecimal() else super().construct_yaml_int(node)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _marked(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{error.problem or error.context}{where}"


def _starts_comment(text: str, position: int) -> bool:
    return text[position : position + 2] in ("//", "/*") or text[position : position + 1] == "#"
