"""Convert DeepSpeed JSONs written for other programs to the schema, with a note for every change.

    {"scheduler": {...}, "zero_optimization": {"stage": 0}}     a file of another program
    {"optimizer": {...}, "zero_optimization": {"stage": 1}}     the same here, with three notes

Covers files for the Hugging Face Trainer, older versions of DeepSpeed and older versions of this program.
Settings that cannot be converted are left for the schema to refuse.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from coconut_ds.config.schemas import load_schema

COMMENT = ("_", "//", "#")
# Refused keys whose `false` has an effect: it turns off a default.
FALSE_COUNTS = ("cpu_offload_use_pin_memory",)
ADAM = ("adam", "adamw")


def adapted(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The converted settings, and a note for every change."""
    result = _without_comments(values)
    notes = [*_with_optimizer(result), *_with_stage(result), *_with_current_names(result)]
    schema = load_schema("ds_config")
    notes += _drop_without_effect(result, schema, schema["$defs"], "")
    return result, notes


def _without_comments(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {k: _without_comments(v) for k, v in value.items() if not str(k).startswith(COMMENT)}


def _with_optimizer(values: dict[str, Any]) -> Iterator[str]:
    """Use AdamW if the file has no optimizer; DeepSpeed's Adam is AdamW by default."""
    if "optimizer" not in values:
        values["optimizer"] = {"type": "AdamW", "params": {}}
        yield "optimizer: is missing; AdamW with the YAML's lr and weight_decay is used"
        return
    optimizer = values["optimizer"]
    if not isinstance(optimizer, dict):
        return
    kind = optimizer.get("type")
    if isinstance(kind, str) and kind != "AdamW" and kind.lower() in ADAM:
        optimizer["type"] = "AdamW"
        if kind.lower() == "adam":
            yield 'optimizer.type: is "Adam", which DeepSpeed runs as AdamW'
    params = optimizer.get("params")
    if isinstance(params, dict):
        for key in ("betas", "eps"):
            if params.get(key) == "auto":
                del params[key]  # the defaults of AdamW, as in the Trainer


def _with_stage(values: dict[str, Any]) -> Iterator[str]:
    """Use ZeRO stage 1 for 0: the same on one GPU, and less memory on several."""
    zero = values.setdefault("zero_optimization", {})
    if isinstance(zero, dict) and (
        "stage" not in zero or (zero["stage"] == 0 and zero["stage"] is not False)
    ):
        why = "is 0" if "stage" in zero else "is missing"
        zero["stage"] = 1
        yield f"zero_optimization.stage: {why}; stage 1 is used, which shards the optimizer states"


def _with_current_names(values: dict[str, Any]) -> Iterator[str]:
    """Rename `latent_memory.recompute`, which files of earlier versions use."""
    latent = values.get("latent_memory")
    if isinstance(latent, dict) and "recompute" in latent and "activation_checkpointing" not in latent:
        latent["activation_checkpointing"] = latent.pop("recompute")
        yield "latent_memory.recompute: is now called activation_checkpointing"


def _drop_without_effect(
    values: dict[str, Any], schema: Mapping[str, Any], definitions: Mapping[str, Any], inside: str
) -> Iterator[str]:
    """Remove keys that have no effect here, and refused keys that are switched off."""
    rules = _rules(values, schema)
    for key in [key for key in values if key in rules]:
        rule, value = rules[key], values[key]
        if "inert" in rule:
            del values[key]
            yield f"{inside}{key}: {rule['inert']}; it is ignored"
        elif rule.get("not") == {} and _is_off(value) and key not in FALSE_COUNTS:
            del values[key]
            yield f"{inside}{key}: is off, and is not a setting here; it is ignored, delete it"
        elif isinstance(value, dict):
            if "$ref" in rule:
                block = definitions[rule["$ref"].rsplit("/", 1)[1]]
                rule = {"properties": {**block["properties"], **rule.get("properties", {})}}
            yield from _drop_without_effect(value, rule, definitions, f"{inside}{key}.")


def _rules(values: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The rule of every key, including the rules for the file's ZeRO stage."""
    rules = dict(schema.get("properties", {}))
    for condition in schema.get("allOf", ()):
        stages = condition.get("if", {}).get("properties", {}).get("stage", {}).get("enum", ())
        if values.get("stage") in stages:
            for key, rule in condition["then"]["properties"].items():
                rules[key] = {**rules.get(key, {}), **rule}
    return rules


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return (
            _is_off(value["enabled"])
            if "enabled" in value
            else bool(value) and all(map(_is_off, value.values()))
        )
    return value is False or value is None
