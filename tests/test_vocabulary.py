"""Words that were given up for the field's own do not return."""

import re

import pytest

from tests.conftest import ROOT

FILES = sorted((ROOT / "coconut_ds").rglob("*.py"))
# Given up -> the word to use.
NAMES = {
    "Phantom": "FakeModel",
    "Material": "RunData",
    "Layout": "BatchConfig",
    "Lever": "MemoryOption",
    "marker_ids": "special_token_ids",
    "MarkerRows": "SpecialTokenRows",
    "governing": "peak_phase",
    "hold_to_budget": "enforce_memory_budget",
    "worst_batch": "largest_batch",
    "install_recompute": "install_activation_checkpointing",
}
WORDS = {"anew": "again", "for ever": "without limit", "phantom": "fake model", "mend": "fix"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_words_of_the_field(path):
    text = path.read_text(encoding="utf-8")
    found = [f"{old}: write {new}" for old, new in NAMES.items() if re.search(rf"\b{old}\b", text)]
    found += [f"{old}: write {new}" for old, new in WORDS.items() if re.search(rf"(?i)\b{old}\b", text)]
    assert not found
