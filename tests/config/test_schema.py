"""Files that no later reader may see: one clear message each, with the path and the line."""

import pytest

from coconut_ds.config.schema import MAX_BYTES, read_json, read_yaml
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
