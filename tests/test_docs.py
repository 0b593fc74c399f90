"""The pages of docs/: a budget of words; links and names of files that exist."""

import re

import pytest

from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
FILES = r"`((?:configs|ds_configs|preprocessing|launch|benchmarks|tests|docs|coconut_ds)/[\w./-]+)`"
MADE = re.compile(r"<!-- (?:bytes table|statistics) -->.*?<!-- end -->", re.DOTALL)  # by programs
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
