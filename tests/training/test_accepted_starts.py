"""What `validate` accepts starts: files drawn from the whole schema, each with an engine and one step.

DS_CONFIG_EXAMPLES=300 python -m pytest tests/training/test_accepted_starts.py      more than every day
"""

import json
import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from coconut_ds.config.deepspeed import validate_ds_config
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.config.schema import load_schema
from coconut_ds.engine.engine import refusal_of_device, refuse_missing_operators
from coconut_ds.errors import ConfigError

EXAMPLES = int(os.environ.get("DS_CONFIG_EXAMPLES", "24"))
SCHEMA = load_schema("ds_config")
NUMBERS = (0, 1, 2, 3, 16, 1000, 50_000, 0.1, 0.5, 0.999, 1e-8)
STRINGS = {"output_path": "monitor", "job_name": "job", "output_file": "profile.txt"}
# Numbers of the YAML: the file repeats them, or is refused.
OF_THE_YAML = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "optimizer.params.lr": 0.001,
    "optimizer.params.weight_decay": 0.0,
}
NOT_DRAWN = ("memory_budget", "$schema", "zero_optimization.stage", "fp16.enabled", "bf16.enabled")


def values_of(rule):
    """A strategy for one key."""
    if "const" in rule:
        return st.just(rule["const"])
    if "enum" in rule:
        return st.sampled_from(rule["enum"])
    if "anyOf" in rule:
        return st.one_of([values_of(option) for option in rule["anyOf"]])
    kinds = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
    options = []
    for kind in kinds:
        if kind == "boolean":
            options.append(st.booleans())
        elif kind in ("integer", "number"):
            options.append(st.sampled_from([*numbers_of(rule, kind == "integer")]))
        elif kind == "array":
            options.append(st.just([0.9, 0.95] if rule["items"]["type"] == "number" else ["ln_f"]))
        elif kind == "string":
            options.append(st.just("text"))
    return st.one_of(options)


def numbers_of(rule, whole):
    for number in (*NUMBERS, *([rule["default"]] if rule.get("default") is not None else [])):
        inside = rule.get("minimum", number) <= number <= rule.get("maximum", number)
        positive = number > rule.get("exclusiveMinimum", number - 1)
        if (
            inside
            and positive
            and not (whole and number != int(number))
            and not number % rule.get("multipleOf", 1)
        ):
            yield int(number) if whole else number


def leaves(rules, inside=""):
    """(dotted key, strategy) of every setting that is not refused."""
    for key, rule in rules.items():
        name = inside + key
        if "$ref" in rule:
            rule = SCHEMA["$defs"][rule["$ref"].rsplit("/", 1)[1]]
        if name in NOT_DRAWN or rule.get("not") == {}:
            continue
        if "properties" in rule:
            yield from leaves(rule["properties"], f"{name}.")
        elif name in OF_THE_YAML:
            yield name, st.sampled_from(["auto", OF_THE_YAML[name]])
        elif key in STRINGS:
            yield name, st.just(STRINGS[key])
        elif rule.get("type") != "object":
            yield name, values_of(rule)


LEAVES = dict(leaves(SCHEMA["properties"]))


@st.composite
def ds_configs(draw):
    """A ZeRO stage, precision and offload, and four to twelve other settings of the schema."""
    stage = draw(st.sampled_from([1, 2, 3]))
    values = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": stage}}
    if draw(st.booleans()):
        values["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if stage == 3 and draw(st.booleans()):
        values["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if draw(st.booleans()):
        values["bf16"] = {"enabled": True}
    for key in draw(st.lists(st.sampled_from(sorted(LEAVES)), unique=True, min_size=4, max_size=12)):
        *blocks, name = key.split(".")
        inside = values
        for block in blocks:
            inside = inside.setdefault(block, {})
        inside[name] = draw(LEAVES[key])
        if "enabled" in dict(SCHEMA["properties"].get(blocks[0], {}) if blocks else {}).get("properties", {}):
            inside.setdefault("enabled", blocks[0] not in ("fp16", "bf16"))
    return values


def is_accepted(values, experiment):
    """Whether `validate` accepts it on one rank; another error than ConfigError fails the test."""
    try:
        ds_config = validate_ds_config(values, "drawn")
        ds_config.resolve(experiment, 1)
        refuse_missing_operators(ds_config)
        if refusal_of_device(ds_config):
            return False
    except ConfigError as error:
        assert str(error).startswith("drawn: "), error
        return False
    return True


def draw_accepted(experiment, number):
    """So many accepted files, and how many were refused on the way."""
    accepted, refused = [], []

    @settings(
        max_examples=20 * number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(ds_configs())
    def collect(values):
        if len(accepted) < number:
            (accepted if is_accepted(values, experiment) else refused).append(values)

    collect()
    return accepted, refused


def test_what_is_accepted_starts(tiny_experiment, tmp_path, warm):
    values = tiny_experiment | {
        "lr": 0.001,
        "weight_decay": 0.0,
        "gradient_clipping": 0.0,
        "uniform_prob": 0.0,
    }
    accepted, refused = draw_accepted(validate_experiment(values, "test"), EXAMPLES)
    assert len(accepted) == EXAMPLES
    (tmp_path / "cases.json").write_text(json.dumps({"experiment": values, "ds_configs": accepted}))
    files = (tmp_path / "cases.json", tmp_path / "out.json")
    warm.run("tests.launched.starts", *files, ranks=1, cwd=tmp_path, timeout=30 * EXAMPLES)
    results = json.loads((tmp_path / "out.json").read_text())
    failed = [(case, text) for case, text in zip(accepted, results, strict=True) if isinstance(text, str)]
    print(f"{len(accepted)} started, {len(refused)} refused, {len(failed)} tracebacks")
    assert not failed, "\n".join(f"{json.dumps(case)}\n{text}" for case, text in failed)
    for case, loss in zip(accepted, results, strict=True):
        tolerance = 0.02 if "bf16" in case else 1e-4
        assert loss == pytest.approx(results[0], rel=tolerance), case
