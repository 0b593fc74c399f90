"""The README is true: its tree, its links, its commands and the files they name."""

import re
import shlex
import subprocess

import pytest
import yaml

from coconut_ds.__main__ import COMMANDS
from tests.conftest import ROOT
from tests.launched.start import environment
from tests.run_folders import make_run

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = TEXT.split("<!-- tree -->")[1].split("<!-- /tree -->")[0]
COMMAND_LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


def names_in_tree(indented):
    lines = [line for line in TREE.splitlines() if line.startswith("  ") is indented and line.strip("`\n ")]
    words = {word for line in lines for word in re.findall(r"[\w]+(?:\.py|/)", line.strip())}
    return {word.rstrip("/") for word in words}


def test_tree_has_every_module_of_the_package_and_no_other():
    there = {
        path.name for path in (ROOT / "coconut_ds").iterdir() if path.suffix == ".py" or path.is_dir()
    } - {"__init__.py", "__pycache__"}
    listed = names_in_tree(indented=True)
    assert there <= listed, f"not in the tree: {sorted(there - listed)}"
    assert {name for name in listed if name.endswith(".py")} <= there


def test_tree_has_every_folder_at_the_top():
    known = (
        "configs",
        "ds_configs",
        "coconut_ds",
        "launch",
        "preprocessing",
        "data",
        "benchmarks",
        "tests",
        "docs",
    )
    assert set(known) <= names_in_tree(indented=False)
    assert all((ROOT / name).is_dir() for name in known)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", TEXT))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_name_what_exists(line):
    words = shlex.split(line)
    for word in words:
        if word.startswith(("configs/", "ds_configs/", "launch/", "preprocessing/")):
            assert (ROOT / word).exists(), word
    if "coconut_ds" in words:
        assert words[words.index("coconut_ds") + 1] in COMMANDS


NOT_RUN = ("launch/", "preprocessing/")  # set-up, downloads


@pytest.mark.slow
def test_commands_run_as_printed(tiny_experiment, tmp_path):
    """Every line of "Use", with a tiny experiment in the place of GSM8K's."""
    settings = {
        **tiny_experiment, "name": "gsm-coconut", "save_path": "runs", "num_epochs": 2, "max_new_tokens": 8,
        "test_path": tiny_experiment["val_path"],
    }  # fmt: skip
    (tmp_path / "configs" / "full").mkdir(parents=True)
    (tmp_path / "configs" / "full" / "gsm_coconut.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    lines = [line for line in COMMAND_LINES if not any(word in line for word in NOT_RUN)]
    assert len(lines) == 5
    for line in lines:
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", ["README.md", "docs/understanding.md"])
def test_python_examples_run(page, tiny_experiment, tmp_path, monkeypatch):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    make_run(tiny_experiment, tmp_path / "runs", name="quickstart-coconut", max_new_tokens=4)
    monkeypatch.chdir(tmp_path)
    assert examples
    for example in examples:
        exec(example, {})


@pytest.mark.parametrize(
    "name", re.findall(r"`(\w[\w/]*test_\w+\.py(?:::\w+)?)`", (ROOT / "docs" / "reliability.md").read_text())
)
def test_reliability_names_tests_that_exist(name):
    file, _, function = name.partition("::")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert not function or f"def {function}(" in text
