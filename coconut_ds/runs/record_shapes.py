"""Schemas of the files that training, `profile` and `eval` write; checked before anything is computed.

metric_lines, evaluation_lines, prediction_lines      invalid lines are skipped
read_record(path, PLAN)                               an invalid file is an error
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from coconut_ds.config.schema import record_schema, schema_error
from coconut_ds.data.problems import GRADINGS, enough_tokens
from coconut_ds.errors import ConfigError, first_line
from coconut_ds.files import parse_json, read_json

MAX_NUMBER = 1e15  # larger values are invalid; matplotlib cannot draw the largest floats
MAX_LINE = 1 << 20  # characters
REMEDY = "delete it, or create it again"
MEASURED = ("epoch", "num_items", "num_correct", "accuracy", "mean_tokens")
# Required numbers in metrics.jsonl, by kind of line.  A loss may be NaN.
REQUIRED = {"train": ("epoch", "time", "loss"), "valid": MEASURED, "test": MEASURED, "memory": ("epoch",)}
MEASURED_ON = ("file", "role", "examples", "stage")  # texts; lines of older versions have none of them
RESULT_KEY = (
    "checkpoint", "split", "file", "examples", "stage", "latents", "ablation", "grading", "differences",
)  # fmt: skip
OPTIONAL = (
    "loss", "cot_match", "seconds_per_item", "stage", "step", "time", "lr", "chance",
    "gradient_norm", "step_seconds", "tokens_per_s", "supervised_tokens_per_s",
)  # fmt: skip
CUT = ("num_cut", "max_new_tokens", "longest_answer")  # counts of a line, if wrong answers were cut
TRAIN = '"kind": "train"'  # as `train` writes it
MAX_TRAIN_LINES = 10_000  # of a longer run, every n-th line is read

NUMBER = {"type": "number", "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER}
COUNT = {"type": "integer", "minimum": 0, "maximum": 10**9}
TEXT = {"type": "string"}
NUMBERS = {"type": "object", "additionalProperties": NUMBER, "maxProperties": 1_000}
BLOCK = {"type": ["object", "null"], "properties": {"enabled": {}}}


def _list(items: Any, min_items: int = 0, max_items: int = 10_000) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": min_items, "maxItems": max_items}


BUDGET = record_schema(
    {"device": TEXT, "gpu_memory_mib": NUMBER, "reserved_mib": NUMBER, "host_memory_gib": NUMBER},
    {"components_mib": NUMBERS},
)
MAYBE_BUDGET = {"anyOf": [{"type": "null"}, BUDGET]}
FORWARD_BACKWARD, STEP, EVALUATION = "forward and backward", "optimizer step", "evaluation"  # of a plan
PLAN = record_schema(
    {
        "budget": MAYBE_BUDGET,
        "fits": {"type": "boolean"},
        "verdict": TEXT,
        "states": _list(record_schema({"component": TEXT, "mib": NUMBER})),
        "host_per_rank": _list(record_schema({"component": TEXT, "mib": NUMBER})),
        "phases": _list(record_schema({"name": TEXT, "mib": NUMBER})),
        "stages": _list(record_schema({"first_epoch": COUNT, "gpu_mib": NUMBER}), min_items=1),
    }
)
PHASE_NAME = {
    "type": "string",
    "maxLength": 100,
    "pattern": r"^(step \d{1,3}: )?"
    r"(initialise|embed|pass|loss|backward|reduce|optimizer|evaluation|checkpoint)( |$)",
}
GPU_READING = {"reserved_peak": NUMBER, "device_used": NUMBER, "pinned": NUMBER, "retries": NUMBER}
PHASE = record_schema(
    {name: NUMBER for name in ("seconds", "start_seconds", "peak_mib", "end_mib")}
    | {"name": PHASE_NAME, "reading": record_schema({"rss": NUMBER}, GPU_READING)}
)
RANK = record_schema(
    {
        "device": TEXT,
        "peak_mib": NUMBER,
        "phases": _list(PHASE, max_items=500)
        | {
            "allOf": [
                {"contains": {"properties": {"name": {"pattern": pattern}}}}
                for pattern in ("^step 2: (?!optimizer)", "^step 2: optimizer step$", "^evaluation$")
            ]
        },
        "states_mib": record_schema({"step 2": {"type": "object", "additionalProperties": NUMBERS}}),
        "at_peak": record_schema({"phase": TEXT, "made_in_mib": {**NUMBERS, "minProperties": 1}}),
        "timeline": _list(_list(NUMBER, 2, 2), max_items=200_000),
    }
)
PROFILE = record_schema(
    {
        "experiment": TEXT,
        "ds_config": TEXT,
        "stage": TEXT,
        "batch": TEXT,
        "budget": MAYBE_BUDGET,
        "ranks": _list(RANK, min_items=1, max_items=256),
    }
)
OFFLOAD = {"type": ["object", "null"], "properties": {"device": TEXT}}
ZERO = record_schema({}, {"offload_optimizer": OFFLOAD})
DS_CONFIG = record_schema({}, {"zero_optimization": ZERO, "fp16": BLOCK, "bf16": BLOCK})
LIBRARIES = {"type": "object", "additionalProperties": TEXT}
ENVIRONMENT = record_schema({}, {"devices": _list(TEXT), "libraries": LIBRARIES})

PASS_AT_K = _list(record_schema({"k": COUNT, "value": NUMBER, "low": NUMBER, "high": NUMBER}), min_items=1)


def read_record(path: Path, schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read one JSON file of a run folder; None if it is missing. Raises ConfigError if it is invalid."""
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not JSON ({first_line(error)}); {REMEDY}") from None
    if fault := schema_error(value, schema):
        raise ConfigError(f"{path}: {fault}; {REMEDY}")
    if schema is PROFILE:
        names = [[phase["name"] for phase in rank["phases"]] for rank in value["ranks"]]
        readings = [phase["reading"] for rank in value["ranks"] for phase in rank["phases"]]
        on_gpu = any(rank["device"].startswith("cuda") for rank in value["ranks"])
        if any(other != names[0] for other in names) or (
            on_gpu and not all(reading.keys() >= GPU_READING.keys() for reading in readings)
        ):
            raise ConfigError(f"{path}: its ranks are from different runs; {REMEDY}")
    return value


def metric_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl with valid numbers; kinds that no report uses are not checked.

    Of more than MAX_TRAIN_LINES train lines, every n-th is kept.
    """
    step = -(-sum(TRAIN in text for text in _texts(path)) // MAX_TRAIN_LINES)
    numbers = itertools.count()
    texts = (text for text in _texts(path) if step < 2 or TRAIN not in text or next(numbers) % step == 0)
    kept = [line for line in map(_with_nan, _objects(texts)) if _is_metric(line)]
    last: dict[str, Any] = next((line for line in reversed(kept) if "window_weights" in line), {})
    size = len(last.get("window_weights", ()))
    for line in kept:
        if len(line.get("window_weights", ())) != size:  # from a run with another window
            line.pop("window_weights", None)
    defaults = {"loss": math.nan, "cot_match": 0.0}
    return [defaults | line if line["kind"] in ("valid", "test") else line for line in kept]


def _with_nan(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line with NaN for every null and every number that is not finite, also in lists."""

    def number(value: Any) -> Any:
        return math.nan if value is None or (isinstance(value, float) and not math.isfinite(value)) else value

    return {
        key: [number(item) for item in value] if isinstance(value, list) else number(value)
        for key, value in line.items()
    }


def _is_metric(line: Mapping[str, Any]) -> bool:
    kind = line.get("kind")
    if kind not in REQUIRED:
        return isinstance(kind, str)
    given = [name for name in OPTIONAL if name in line] + [name for name in line if name.endswith("_mib")]
    if not all(_is_number(line.get(name), name not in MEASURED) for name in (*REQUIRED[kind], *given)):
        return False
    if not all(type(line.get(name, 0)) is int for name in CUT):
        return False
    epoch, weights = line["epoch"], line.get("window_weights", [])
    if not (0 <= epoch <= 1e6 and epoch == int(epoch)):
        return False
    if "accuracy" in REQUIRED[kind] and not (
        0 <= line["num_correct"] <= line["num_items"] and 0 <= line["accuracy"] <= 1
    ):
        return False
    return isinstance(weights, list) and all(_is_number(weight, True) for weight in weights)


def cut_answers(line: Mapping[str, Any]) -> str | None:
    """How many answers of a validation or test line are wrong and were cut, and what to write."""
    num_cut, limit, longest = (line.get(name, 0) for name in CUT)
    if not num_cut:
        return None
    text = f"{num_cut} of {line['num_items']} answers are wrong and were cut at max_new_tokens ({limit})"
    if longest <= limit:
        return f"{text}; the longest correct one has {longest} tokens"
    enough = enough_tokens(longest)
    return f"{text}, but correct ones have up to {longest} tokens: write max_new_tokens: {enough}"


def evaluation_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The valid lines of evaluations.jsonl."""
    for line in json_lines(path):
        texts, counts = ("checkpoint", "split", "ablation"), ("latents", "num_correct", "num_items")
        has_texts = all(isinstance(line.get(name), str) for name in texts)
        has_numbers = all(_is_number(line.get(name)) for name in (*counts, "mean_tokens"))
        if has_texts and has_numbers and 0 <= line["num_correct"] <= line["num_items"]:
            if not _is_number(line.get("p_value")):
                line.pop("p_value", None)
            if line.get("grading") not in GRADINGS:
                line.pop("grading", None)
            for name in MEASURED_ON:
                if not isinstance(line.get(name), str):
                    line.pop(name, None)
            if "pass_at_k" in line and schema_error(line["pass_at_k"], PASS_AT_K):
                line.pop("pass_at_k")
            if _has_differences(line):
                yield line


def newest_evaluations(path: Path) -> list[dict[str, Any]]:
    """The newest line of every measurement in evaluations.jsonl."""
    return list(
        {tuple(line.get(name) for name in RESULT_KEY): line for line in evaluation_lines(path)}.values()
    )


def prediction_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The valid lines of predictions.jsonl."""
    for line in json_lines(path):
        names = all(isinstance(line.get(name), str) for name in ("checkpoint", "split"))
        numbers = all(type(line.get(name)) is int for name in ("index", "latents"))
        if names and numbers and isinstance(line.get("correct"), bool) and _has_differences(line):
            yield line


def _has_differences(line: dict[str, Any]) -> bool:
    """Whether `differences` is a list of texts; it becomes a tuple, empty for lines of older versions."""
    texts = line.get("differences", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return False
    line["differences"] = tuple(texts)
    return True


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one per line; truncated and other invalid lines are skipped."""
    return _objects(_texts(path))


def _texts(path: Path) -> Iterator[str]:
    """The lines of a file, none if it is missing."""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as reader:
            while text := reader.readline(MAX_LINE):
                yield text


def _objects(texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    for text in texts:
        try:
            value = parse_json(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _is_number(value: Any, may_be_nan: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= MAX_NUMBER or (may_be_nan and math.isnan(value))
