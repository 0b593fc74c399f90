"""The JSON Schemas of the two settings files, and readable messages for violations.

The schema files define every key's type, default and description.  Besides the standard keywords they use
these annotations: `group` (heading in the docs), `expects` (description of a rule that has no short form),
`refused` (why a key is not accepted, and what to do instead), `inert` (why a key is ignored),
`published_default` (the default in files of the published code), `also_called` (names of a key in other
programs) and, beside `properties`, `elsewhere` (advice for keys that only other programs have).

Each key of an experiment also has `affects`, which resuming, reports, sweeps and model cards read: `learning`
(other results), `shapes` (other results, and a checkpoint cannot be continued), `accuracy` (the same weights
are measured in another way) or `running` (none of these).  Paths to `data` or `weights` have `path_to`.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from functools import cache
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

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
    text = resources.files(__name__).joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    return json.loads(text)


def defaults(schema: Mapping[str, Any], published: bool = False) -> dict[str, Any]:
    """Defaults of all properties that have one; `published`: for a file of the published code."""
    rules = {key: rule for key, rule in schema["properties"].items() if "default" in rule}
    return {
        key: rule["published_default"] if published and "published_default" in rule else rule["default"]
        for key, rule in rules.items()
    }


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
    """'; did you mean X?' if `word` is a misspelled known word, else ''.

    Up to one letter may be wrong, and up to two in words of eight letters or more.
    """
    written = str(word).lower()
    limit = 2 if len(written) >= 8 else 1
    near = {
        one: edit_distance(written, one.lower()) for one in known if abs(len(one) - len(written)) <= limit
    }
    best = min(near, key=lambda one: near[one], default="")
    return f"; did you mean '{best}'?" if best and near[best] <= limit else ""


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


def unknown_keys(keys: Iterable[str], schema: Mapping[str, Any]) -> dict[str, str]:
    """A hint for each unknown key of a block: its name here, or the key that it misspells.

    The last key without a hint gets the list of valid keys.
    """
    names = {
        other: f"; write '{key}' instead"
        for key, rule in schema["properties"].items()
        for other in rule.get("also_called", ())
    } | {other: f"; {advice}" for other, advice in schema.get("elsewhere", {}).items()}
    accepted = [key for key, rule in schema["properties"].items() if "refused" not in rule]
    hints = {
        key: names.get(str(key).lower().replace("-", "_")) or did_you_mean(key, schema["properties"])
        for key in keys
    }
    for key in [key for key, hint in hints.items() if not hint][-1:]:
        hints[key] = f"; valid keys: {', '.join(accepted)}"
    return hints


def shown(value: object) -> str:
    """A value as text of at most 80 characters."""
    text = repr(value)
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
    errors = sorted(
        Draft202012Validator(schema).iter_errors(values),
        key=lambda error: list(map(str, error.absolute_path)),
    )
    for error in errors:
        for key, message in _explain(error, noun):
            messages.setdefault(key, message)
    return list(messages.values())


def _explain(error: ValidationError, noun: str) -> Iterator[tuple[str, str]]:
    here = ".".join(str(part) for part in error.absolute_path)
    inside = f"{here}." if here else ""
    rule: Any = error.schema
    value: Any = error.instance
    if error.validator == "additionalProperties":
        unknown = [key for key in value if key not in rule["properties"]]
        for key, hint in unknown_keys(unknown[:MAX_UNKNOWN], rule).items():
            yield f"{inside}{key}", f"{inside}{key}: is not {noun}{hint}"
    elif error.validator == "required":
        for key in rule["required"]:
            if key not in value:
                what = rule["properties"][key].get("description", "")
                yield f"{inside}{key}", f"{inside}{key}: is missing, and has no default. {what}".rstrip()
    elif "refused" in rule:
        yield here, f"{here}: {rule['refused']}"
    elif value == "auto":
        text = f"'auto' is not filled in here (DeepSpeed would drop it silently); write {expectation(rule)}"
        yield here, f"{here}: {text}"
    else:
        hint = did_you_mean(value, map(str, rule["enum"])) if "enum" in rule else ""
        if "string" in kinds(rule) and isinstance(value, int | float | date):
            hint = "; put it in quotes"
        wanted = "text that is not empty" if error.validator == "minLength" else expectation(rule)
        yield here, f"{here}: must be {wanted}, got {shown(value)}{hint}"


def _not_finite(value: object, here: str) -> Iterator[str]:
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:  # NaN, and 10**400 too
        yield here
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{here}.{key}" if here else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{here}.{index}")
