"""Files appear complete or not at all."""

import hashlib
import json
import os

import pytest

from coconut_ds.data.problems import Card, card_for, read_problems
from preprocessing.writing import markdown_table, write_dataset

ITEM = {"question": "2 + 2 ?", "steps": [], "answer": "4é"}


def test_files_have_the_bytes_of_json_dump_and_the_card_their_digests(tmp_path):
    items = [ITEM, ITEM | {"answer": "5"}]
    write_dataset(tmp_path / "data", Card("toy", licence="MIT"), {"train": items, "test": iter(items[:1])})
    assert (tmp_path / "data" / "toy_train.json").read_text() == json.dumps(items)
    assert len(read_problems(tmp_path / "data" / "toy_test.json")) == 1
    card = card_for(tmp_path / "data" / "toy_train.json")
    assert card.counts == {"toy_train.json": 2, "toy_test.json": 1} and card.licence == "MIT"
    for name, digest in card.sha256.items():
        assert hashlib.sha256((tmp_path / "data" / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in (tmp_path / "data").iterdir()} == {*card.sha256, "toy.card.json"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_a_failure_in_the_last_split_changes_nothing(tmp_path, error):
    write_dataset(tmp_path, Card("toy"), {"train": [ITEM], "test": [ITEM]})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def failing():
        yield ITEM
        raise error("in the middle")

    with pytest.raises(error):
        write_dataset(tmp_path, Card("toy"), {"train": [ITEM] * 3, "test": failing()})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_writing_again_gives_the_same_bytes_and_readable_files(tmp_path):
    write_dataset(tmp_path, Card("toy"), {"train": [ITEM]})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_dataset(tmp_path, Card("toy"), {"train": [ITEM]})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert all(os.stat(path).st_mode & 0o777 == 0o644 for path in tmp_path.iterdir())


def test_an_item_that_is_no_json_changes_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_dataset(tmp_path, Card("toy"), {"train": [ITEM | {"answer": object()}]})
    assert list(tmp_path.iterdir()) == []


def test_a_table_says_how_far_columns_are_from_the_first():
    table = markdown_table({"a": {"n": 1_000, "mean": 2.0}, "b": {"n": 10, "mean": 2.5}})
    assert "| n | 1,000 | 10 |" in table and "| mean | 2.000 | 2.500 (+25.0%) |" in table
