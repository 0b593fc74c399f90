"""The pages of docs/: a budget of words; links and names of files that exist."""

import json
import re
import shlex

import pytest

from coconut_ds.__main__ import main
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
FILES = r"`((?:configs|ds_configs|preprocessing|launch|benchmarks|tests|docs|coconut_ds)/[\w./-]+)`"
MADE = re.compile(r"<!-- (?:bytes table|statistics|transcript) -->.*?<!-- end -->", re.DOTALL)  # by programs
LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *ROOT.glob("*/README.md")]


def words(page):
    """Words that people wrote: without marked blocks, and tables and machine lines of benchmarks.md."""
    text = MADE.sub("", page.read_text(encoding="utf-8"))
    if page.name == "benchmarks.md":
        text = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "<sub>")))
    return sum(any(map(str.isalnum, word)) for word in text.split())


def test_docs_have_a_budget_of_words():
    counts = {page.name: words(page) for page in PAGES if page.name != "findings.md"}
    assert sum(counts.values()) <= 10_000, counts


def anchors(text):
    """The fragments that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/{page.name}" in readme for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_docs_exist(page):
    if page.name == "findings.md":  # names of their day
        pytest.skip()
    for name in re.findall(FILES, page.read_text(encoding="utf-8")):
        assert "NAME" in name or (ROOT / name).exists(), name


@pytest.mark.slow
def test_your_data_works_as_printed(tiny_experiment, tmp_path, monkeypatch):
    """Its problem, card, experiment, and every command that needs no training; a tiny model for GPT-2."""
    page = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
    blocks: dict[str, list[str]] = {}
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        blocks.setdefault(language, []).append(block)
    problem, card = blocks["json"]
    (experiment,) = blocks["yaml"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    for number, split in enumerate(("train", "valid", "test")):
        problems = [json.loads(problem)[0] | {"question": f"{number}{i}"} for i in range(8)]
        (tmp_path / "data" / f"mine_{split}.json").write_text(json.dumps(problems))
    (tmp_path / "data" / "mine.card.json").write_text(card)
    model = "openai-community/gpt2"
    (tmp_path / "mine.yaml").write_text(experiment.replace(model, tiny_experiment["model_id"]))
    lines = "".join(blocks[""]).splitlines()
    commands = [line for line in lines if re.match(r"python -m coconut_ds (validate|show|plan|fit) ", line)]
    assert len(commands) == 6
    for line in commands:
        words = shlex.split(line.replace(model, tiny_experiment["model_id"]), comments=True)
        assert main(words[3:]) == 0, line
