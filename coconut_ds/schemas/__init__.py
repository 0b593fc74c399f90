"""The JSON Schemas of the two settings files, and plain words for what breaks them.

The schema files are the one home of every key's type, default and description.  Beside the standard
keywords they use three annotations: `group` (heading in the docs), `expects` (words for a rule that
has no short form) and `refused` (why a key is not accepted, and what to do instead).

Knows: JSON Schema.  Does not know: what any key means.
"""

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from functools import cache
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

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
    """The schema `experiment` or `ds_config`; shared, so not to be changed."""
    text = resources.files(__name__).joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    return json.loads(text)


def defaults(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Default of every property that has one."""
    return {key: rule["default"] for key, rule in schema["properties"].items() if "default" in rule}


def kinds(rule: Mapping[str, Any]) -> list[str]:
    """JSON types that a rule allows; empty where it does not say."""
    stated = rule.get("type", [])
    return [stated] if isinstance(stated, str) else list(stated)


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest known word, or nothing."""
    spellings = {str(one).lower(): one for one in known}
    near = difflib.get_close_matches(str(word).lower(), spellings, n=1, cutoff=0.6)
    return f"; did you mean '{spellings[near[0]]}'?" if near else ""


def shown(value: object) -> str:
    """The offending value as text that cannot flood the terminal."""
    text = repr(value)
    text = {"True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 80 else text[:77] + "..."


def expectation(rule: Mapping[str, Any]) -> str:
    """What a value must be, in words: 'a whole number of at least 1 or None'."""
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
    """Every way in which `values` break `schema`, one line a key: 'key: what, the value, what to do'.

    `noun` names a known key in the message about an unknown one ("a setting").
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
        for key in value:
            if key not in rule["properties"]:
                yield f"{inside}{key}", f"{inside}{key}: is not {noun}{did_you_mean(key, rule['properties'])}"
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
    if isinstance(value, float) and not math.isfinite(value):
        yield here
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{here}.{key}" if here else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{here}.{index}")
