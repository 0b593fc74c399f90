"""The DeepSpeed schema is drawn by hand; DeepSpeed's own models say whether it is complete."""

from typing import Any

from coconut_ds.config.schema import load_schema


def accepted(rule: dict[str, Any]) -> set[str]:
    return {key for key, value in rule["properties"].items() if "refused" not in value}


def test_zero_keys_are_deepspeed_s():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    schema = load_schema("ds_config")
    fields = DeepSpeedZeroConfig.model_fields
    spellings = set(fields) | {field.alias for field in fields.values() if field.alias}
    ours = schema["properties"]["zero_optimization"]["properties"]
    assert spellings <= set(ours), "DeepSpeed has a key that the schema does not know"
    assert accepted({"properties": ours}) <= spellings
    for name, model in (
        ("offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("offload_param", DeepSpeedZeroOffloadParamConfig),
    ):
        assert set(schema["$defs"][name]["properties"]) == set(model.model_fields)


def test_precision_keys_are_deepspeed_s():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    properties = load_schema("ds_config")["properties"]
    assert set(properties["fp16"]["properties"]) == set(DeepSpeedFP16Config.model_fields)
    assert set(properties["bf16"]["properties"]) == set(DeepSpeedBF16Config.model_fields)


def test_defaults_are_deepspeed_s():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    properties = load_schema("ds_config")["properties"]
    for block, model in (
        ("zero_optimization", DeepSpeedZeroConfig),
        ("fp16", DeepSpeedFP16Config),
        ("bf16", DeepSpeedBF16Config),
    ):
        theirs = {field.alias or name: field.default for name, field in model.model_fields.items()}
        ours = {
            key: rule["default"] for key, rule in properties[block]["properties"].items() if "default" in rule
        }
        assert {key: theirs[key] for key in ours} == ours


def test_removed_keys_are_all_refused():
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

    properties = load_schema("ds_config")["properties"]
    assert all("refused" in properties[key] for key in _REMOVED_TOP_LEVEL_CONFIG_KEYS)
    zero = properties["zero_optimization"]["properties"]
    assert all("refused" in zero[key] for key in _REMOVED_ZERO_CONFIG_KEYS)
