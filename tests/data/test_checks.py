"""The report on data files."""

import json

import pytest

from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.checks import check_data_files
from coconut_ds.data.problems import read_problems
from coconut_ds.data.run_data import LengthCheck, Limit
from coconut_ds.data.tokenizer import load_vocabulary, tokenize
from coconut_ds.errors import DataError

GOOD = {"question": "What is 2 + 2 ?", "steps": ["<<2+2=4>>"], "answer": "4"}


def write(path, *items, **changes):
    path.write_text(json.dumps([GOOD | item for item in items]))
    return path


def test_sound_files_have_no_findings(tmp_path):
    train = write(tmp_path / "a_train.json", {}, {"question": "What is 3 + 3 ?"})
    test = write(tmp_path / "a_test.json", {"question": "What is 4 + 4 ?", "steps": ["one two", "three"]})
    report = check_data_files([train, test])
    assert report.is_valid and [len(file.steps) for file in report.files] == [2, 1]
    assert report.files[1].lengths == [10] and report.files[1].steps == [2]
    assert "a_test.json" in report.table() and "2.0 (2)" in report.table()


def test_questions_in_two_splits_are_a_leak_even_when_written_otherwise(tmp_path):
    train = write(tmp_path / "a_train.json", {"question": "other"}, {})
    valid = write(tmp_path / "a_valid.json", {"question": "what is  2 + 2 ?"})
    test = write(tmp_path / "a_test.json", {"question": "WHAT IS 2 + 2 ?"}, {"question": "new"})
    report = check_data_files([train, valid, test])
    assert len(report.leaks) == 3 and not report.is_valid
    assert f"1 question in {train} and in {valid}: items 1 = 0" in report.table()


@pytest.mark.parametrize(
    "item, finding",
    [
        ({"steps": []}, "1 of 2 have no steps"),
        ({"steps": [""]}, "1 of 2 have no steps"),
        ({"question": "a <|latent|> b"}, "1 of 2 contain a special token"),
        ({"answer": "#4"}, "1 of 2 have '#' in the answer"),
        ({"question": "Plain "}, "1 of 2 repeat the question of an earlier problem in the file"),
        (
            {"question": "plain", "answer": "77"},
            "1 of 2 repeat the question of an earlier problem with another",
        ),
    ],
)
def test_findings_name_the_items(tmp_path, item, finding):
    report = check_data_files([write(tmp_path / "a.json", {"question": "plain"}, item)])
    assert f"note: {tmp_path / 'a.json'}: {finding}" in report.table()
    assert report.table().endswith("items 1") and not report.is_valid


def test_a_file_that_cannot_be_used_does_not_hide_the_others(tmp_path):
    good = write(tmp_path / "a.json", {})
    bad = write(tmp_path / "b.json", {"answer": [5]})
    report = check_data_files([bad, good, tmp_path / "gsm_absent.json"])
    assert len(report.files) == 1 and len(report.errors) == 2 and not report.is_valid
    assert "error: " in report.table() and "gsm8k.py" in report.table()
    with pytest.raises(DataError, match="nothing to draw"):
        check_data_files([bad]).save_picture(tmp_path / "a.png")
    assert "problems" not in check_data_files([bad]).table(), "no row, no head"


def test_a_file_that_left_its_card_is_noticed(tmp_path):
    path = write(tmp_path / "a_test.json", {})
    card = {"name": "a", "counts": {"a_test.json": 2}}
    (tmp_path / "a.card.json").write_text(json.dumps(card))
    assert "its card says 2" in check_data_files([path]).table()
    (tmp_path / "a.card.json").write_text(json.dumps({"name": "a", "sha256": {"a_test.json": "0" * 64}}))
    assert "was changed after its card" in check_data_files([path]).table()


def test_lengths_are_tokens_with_a_vocabulary_and_long_items_are_found(arithmetic):
    vocabulary = load_vocabulary(str(arithmetic / "gpt2"))
    path = arithmetic / "arithmetic_test.json"
    problems = tokenize(read_problems(path), vocabulary)
    expected = [len(p.question) + sum(map(len, p.steps)) + len(p.answer) for p in problems]
    report = check_data_files([path], vocabulary)
    assert report.files[0].lengths == expected and report.is_valid, report.table()
    experiment = validate_experiment(
        {"name": "n", "model_id": "m", "train_path": "t", "val_path": "v", "method": "cot"}, "test"
    )
    for is_hard in (True, False):
        short = check_data_files(
            [path], vocabulary, LengthCheck(experiment, vocabulary, Limit(max(expected) - 1, is_hard))
        )
        too_long = expected.index(max(expected))
        if is_hard:  # refused, as in training
            assert f"{path}, item {too_long}: this example has {max(expected)} tokens" in short.errors[0]
        else:
            assert "are longer than the model's" in short.table() and not short.errors


def test_the_picture_is_a_png(tmp_path):
    report = check_data_files([write(tmp_path / "a.json", {}, {"question": "b", "steps": []})])
    report.save_picture(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
