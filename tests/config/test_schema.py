"""Files that no later reader may see: one clear message each, with the path and the line."""

from datetime import date

import pytest

from coconut_ds.config.experiment import validate_experiment
from coconut_ds.config.schema import MAX_BYTES, kinds, load_schema, read_json, read_yaml, violations
from coconut_ds.errors import ConfigError

BAD_TEXTS = [
    ("lr: 1\nlr: 2\n", "'lr' appears twice (first in line 1); remove one in line 2"),
    ("a: &x [1]\nb: *x\n", "aliases (*name) are not allowed"),
    ("a: {x: 1, x: 2}\n", "'x' appears twice"),
    ("- a\n- b\n", "holds a list"),
    ("", "is empty"),
    ("just words\n", "holds text"),
    ("a: [1\n", "not valid YAML"),
    ("a: b: c\n", "not valid YAML"),
    ("\tname: x\n", "not valid YAML"),
    ("5: x\n", "keys must be words, got 5"),
    ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML: could not determine a constructor"),
    ('lr: !!float "abc"\n', "not valid YAML"),
    ("a: " + "[" * 5000 + "\n", "nested too deeply"),
    (b"name: \xff\xfe\n", "is not UTF-8 text (byte 6)"),
    (b"name: a\x00b\n", "not valid YAML"),
    ("#" * (MAX_BYTES + 1), "is larger than 128 KiB"),
]


@pytest.mark.parametrize("text, part", BAD_TEXTS, ids=[part[:40] for _, part in BAD_TEXTS])
def test_bad_yaml(tmp_path, text, part):
    path = tmp_path / "experiment.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert part in str(caught.value) and str(path) in str(caught.value)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    "text, part",
    [
        ('{"fp16": {}, "fp16": {}}', "'fp16' appears twice"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "'stage' appears twice"),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
        ('{\n  // comment\n  "fp16": {}}', "JSON has no comments"),
        ('{"fp16": {},}', "not valid JSON"),
        ("[1]", "holds a list"),
        ("", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_json(tmp_path, text, part):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_json(path)
    assert part in str(caught.value) and str(path) in str(caught.value)


SETTINGS = {"name": "run", "model_id": "gpt2", "method": "coconut", "train_path": "a", "val_path": "b"}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"name": "x" * 300}, "name: must be text of at most 200 characters"),
        ({"name": date(2024, 1, 2)}, "got 2024-01-02; put it in quotes"),
        ({"val_path": None}, "val_path: is missing, and has no default. Validation problems"),
        ({"val_path": None}, "tail -n 500 ALL.jsonl > valid.jsonl"),
        *(
            ({key: "true"}, f"{key}: must be true or false, got 'true'; write true without quotes")
            for key, rule in load_schema("experiment")["properties"].items()
            if rule.get("type") == "boolean"
        ),
    ],
)
def test_messages_of_settings(values, message):
    with pytest.raises(ConfigError) as caught:
        validate_experiment(SETTINGS | values, "x.yaml")
    assert message in str(caught.value)


def unquoted(schema, path=()):
    """(path, quoted value) of every number and boolean of a schema."""
    for key, rule in schema.get("properties", {}).items():
        named = [kind for option in rule.get("anyOf", [rule]) for kind in kinds(option)]
        samples = {"number": "1.0", "integer": "2", "boolean": "true"}
        text = next((text for kind, text in samples.items() if kind in named), "")
        if text and "refused" not in rule and "inert" not in rule and rule.get("maximum", 1) >= 1:
            yield ".".join([*path, key]), text
        yield from unquoted(rule, (*path, key))


@pytest.mark.parametrize("path, text", [*unquoted(load_schema("ds_config"))])
def test_a_number_in_quotes_is_answered_without_them(path, text):
    *blocks, name = path.split(".")
    value = {name: text}
    for block in reversed(blocks):
        value = {block: value}
    message = next(m for m in violations(value, load_schema("ds_config"), "a setting") if m.startswith(path))
    assert message.endswith(f"write {text} without quotes"), message


@pytest.mark.parametrize(
    "key", ["memory_budget.x", "memory_budget.components_mib.x", "latent_memory.x", "bf16.x"]
)
def test_own_blocks_are_not_called_deepspeeds(key):
    *blocks, value = key.split(".")
    for name in [value, *reversed(blocks)]:
        value = {name: value}
    owner = "DeepSpeed" if key == "bf16.x" else "coconut_ds"
    messages = violations(value, load_schema("ds_config"), "a setting of DeepSpeed")
    assert any(message.startswith(f"{key}: is not a setting of {owner};") for message in messages)


def test_integers_are_read_as_written(tmp_path):
    """Not as YAML 1.1: octal and base 60."""
    path = tmp_path / "x.yaml"
    path.write_text("a: 010\nb: -007\nc: 1_000\nd: 0x10\ne: 1:30\nf: 08\n")
    assert read_yaml(path) == {"a": 10, "b": -7, "c": 1000, "d": 16, "e": "1:30", "f": "08"}
