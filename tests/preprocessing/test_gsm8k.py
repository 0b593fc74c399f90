"""GSM8K from both published forms."""

import json
import os
from pathlib import Path

import pytest

from coconut_ds.errors import DataError
from preprocessing.gsm8k import convert, problem_of_icot_line, problem_of_original_line, write_gsm8k

SHARED_DATA = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[3] / "shared")) / "data"


def shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    return path


@pytest.mark.parametrize(
    "line, steps, answer",
    [
        ("Q?||<<4-2=2>> <<2/.5=4>> #### 4", ["<<4-2=2>>", "<<2/.5=4>>"], "4"),
        ("Q?||<<4-2=2>>  <<2/.5=4>> ####  2,125 \n", ["<<4-2=2>>", "<<2/.5=4>>"], "2,125"),
        ("Q? #### a||<<1=1>> #### -3", ["<<1=1>>"], "-3"),
        ("Q?|| #### 9", [], "9"),
        ("Q?||#### 9", [], "9"),
    ],
)
def test_icot_line(line, steps, answer):
    problem = problem_of_icot_line(line)
    assert problem["question"] == line.partition("||")[0] and problem["steps"] == steps
    assert problem["answer"] == answer


@pytest.mark.parametrize("line", ["", "Q?", "Q?||<<1=1>>", "Q?||<<1=1>> #### ", "||<<1=1>> #### 1"])
def test_a_line_with_a_part_missing_is_refused(line):
    with pytest.raises(ValueError, match="expected|empty"):
        problem_of_icot_line(line)


def test_the_wrong_line_of_a_file_is_named(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes(b"Q?||<<1=1>> #### 1\n\nno separators\n")
    with pytest.raises(DataError, match="line 3: expected"):
        list(convert(path, "icot"))
    path.write_bytes(b"Q?||<<1=1>> #### 1\ncaf\xe9||<<1=1>> #### 1\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        list(convert(path, "icot"))
    with pytest.raises(DataError, match="line 1"):
        list(convert(path, "original"))


@pytest.mark.parametrize("split, without_reasoning", [("valid", 6), ("test", 18)])
def test_published_files_come_back_byte_for_byte(tmp_path, split, without_reasoning):
    """The text form rebuilt from the published JSON converts back to its bytes, "no step" aside."""
    published = shared(f"gsm_{split}.json").read_bytes()
    problems = json.loads(published)
    text = tmp_path / "text"
    text.mkdir()
    lines = [f"{p['question']}||{' '.join(p['steps'])} #### {p['answer']}\n" for p in problems]
    (text / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    write_gsm8k(tmp_path, "icot", {split: text / f"{split}.txt"}, limit=None, valid=500)
    assert published.count(b'"steps": [""]') == without_reasoning
    expected = published.replace(b'"steps": [""]', b'"steps": []')
    assert (tmp_path / f"gsm_{split}.json").read_bytes() == expected


def test_the_original_release_has_the_steps_of_the_published_test_file():
    original = convert(shared("gsm8k_original_test.jsonl"), "original")
    published = json.loads(shared("gsm_test.json").read_text())
    for ours, theirs in zip(original, published, strict=True):
        assert ours == theirs | {"steps": [step for step in theirs["steps"] if step]}


def test_the_original_release_gives_a_validation_part_from_the_end_of_training(tmp_path):
    def line(n):
        return json.dumps({"question": f"q{n}", "answer": f"so <<{n}+0={n}>>{n}.\n#### {n}"}) + "\n"

    (tmp_path / "train.jsonl").write_text("".join(line(n) for n in range(10)))
    (tmp_path / "test.jsonl").write_text(line(99))
    files = {"train": tmp_path / "train.jsonl", "test": tmp_path / "test.jsonl"}
    write_gsm8k(tmp_path, "original", files, limit=5, valid=3)
    answers = {
        split: [problem["answer"] for problem in json.loads((tmp_path / f"gsm_{split}.json").read_text())]
        for split in ("train", "valid", "test")
    }
    assert answers == {"train": ["0", "1", "2", "3", "4"], "valid": ["7", "8", "9"], "test": ["99"]}
    with pytest.raises(DataError, match="--valid 10"):
        write_gsm8k(tmp_path, "original", files, limit=None, valid=10)


@pytest.mark.parametrize("line", ["[]", '{"question": "q"}', '{"question": "q", "answer": "no end"}'])
def test_an_original_line_without_its_parts_is_refused(line):
    with pytest.raises(ValueError, match="expected|final line"):
        problem_of_original_line(line)
