"""MATH: answers recovered from solutions, steps that do not give the answer away, splits."""

import json
import os
import random
from pathlib import Path

import pytest

from coconut_ds.data.problems import card_for
from coconut_ds.errors import DataError
from preprocessing.hendrycks_math import (
    convert,
    fork_split,
    main,
    official_split,
    problem_of_row,
    read_source,
)
from preprocessing.math_solutions import boxed_answer, steps_by_line, steps_by_sentence

SHARED_DATA = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[3] / "shared")) / "data"


@pytest.fixture(scope="module")
def published():
    paths = [SHARED_DATA / f"math_{split}.json" for split in ("valid", "test")]
    for path in paths:
        if not path.is_file():
            pytest.skip(f"{path} is not on this machine")
    return [item for path in paths for item in json.loads(path.read_text())]


@pytest.mark.parametrize(
    "solution, answer",
    [
        (r"so $\boxed{4}$.", "4"),
        (r"so $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"first $\boxed{1}$, then $\boxed{2}$", "2"),
        (r"$\boxed{\text{a \} brace}}$", r"\text{a \} brace}"),
        (r"$\boxed 7$", "7"),
        (r"$\boxed\pi$", r"\pi"),
        (r"$\fbox{3}$", "3"),
        (r"$\boxed{ x  =  1 }$", "x = 1"),
        (r"$\boxed{1} and \boxed{open$", "1"),
        (r"$\boxed{\boxed{5}}$", r"\boxed{5}"),
    ],
)
def test_the_boxed_answer(solution, answer):
    assert boxed_answer(solution) == answer


def test_the_fork_reads_the_first_box():
    assert boxed_answer(r"$\boxed{1}$ $\boxed{2}$", first=True) == "1"


@pytest.mark.parametrize("solution", ["", "4", r"\boxed{4", r"\boxed"])
def test_a_solution_without_a_box_is_refused(solution):
    with pytest.raises(ValueError, match="boxed"):
        boxed_answer(solution)


def test_all_published_answers_are_recovered_from_rebuilt_solutions(published):
    assert len(published) == 2_500
    for item in published:
        solution = "\n".join(item["steps"])
        assert boxed_answer(solution, first=True) == item["answer"]
        assert steps_by_line(solution) == item["steps"]


def test_sentences_give_far_fewer_problems_of_one_step_and_no_box(published):
    steps = [steps_by_sentence("\n".join(item["steps"])) for item in published]
    assert sum(len(item["steps"]) == 1 for item in published) / 2_500 > 0.45
    assert sum(len(found) == 1 for found in steps) / 2_500 < 0.12
    assert all(found and all(step.strip() for step in found) for found in steps)
    assert not any("boxed" in step or "[asy]" in step or "\n" in step for found in steps for step in found)
    for step in (step for found in steps for step in found):
        assert step.replace(r"\$", "").count("$") % 2 == 0, step
        assert step.count(r"\begin{") == step.count(r"\end{"), step
        assert step.count(r"\left") - step.count(r"\leftarrow") <= step.count(r"\right"), step


@pytest.mark.parametrize(
    "solution, steps",
    [
        (r"Let $a=2$. Then $a^2=\boxed{4}$.", ["Let $a=2$.", "Then $a^2$"]),
        (r"We have $a = 2.$ So \[a^2 = \boxed{4}.\]", ["We have $a = 2.$", r"So \[a^2\]"]),
        (
            "See \\[x = 1.\\]Then\n\\[y = 2,\\]so $x + y = \\boxed{3}.$",
            [r"See \[x = 1.\]", r"Then \[y = 2,\]so $x + y$"],
        ),
        (r"It costs $\$3.50 + \$2$. The answer is $\boxed{5.50}$.", [r"It costs $\$3.50 + \$2$."]),
        (r"The answer is $\boxed{5}$.", ["The answer is"]),
        (
            r"By Prop. A. B. Smith, i.e. the rule, $x = \boxed{2}$.",
            ["By Prop. A. B. Smith, i.e. the rule, $x$"],
        ),
        (r"One $\boxed{1}$ here. Two $x=\boxed{2}$.", ["One $1$ here.", "Two $x$"]),
        ("Here.\n\n[asy]\ndraw((0,0)--(1,1));\n[/asy]\n\nSo $x = \\boxed{2}$.", ["Here.", "So $x$"]),
        (
            r"\begin{align*} a &= 1 \\ b &= \boxed{2} \end{align*}",
            [r"\begin{align*} a &= 1 \\ b\end{align*}"],
        ),
        (r"Then $\left(\frac{1}{\boxed{2}}\right)$", [r"Then $\left(\frac{1}{}\right.$"]),
        ("no box at all. Really.", ["no box at all.", "Really."]),
    ],
)
def test_steps_by_sentence(solution, steps):
    assert steps_by_sentence(solution) == steps


def write_tree(folder: Path, train: int, test: int) -> Path:
    for part, count in (("train", train), ("test", test)):
        for number in range(count):
            path = folder / part / "algebra" / f"{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                json.dumps({"problem": f"{part} {number}?", "solution": rf"So $x = \boxed{{{number}}}$."})
            )
    return folder


def questions(rows):
    return [row["problem"] for row in rows]


def test_the_original_tree_is_read_in_the_order_of_its_numbers(tmp_path):
    parts = read_source(write_tree(tmp_path / "MATH", 12, 3))
    assert questions(parts["train"]) == [f"train {n}?" for n in range(12)]
    assert questions(parts["test"]) == [f"test {n}?" for n in range(3)]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_the_other_forms_give_the_same_rows(tmp_path, form):
    rows = [{"problem": f"{n}?", "solution": rf"$\boxed{{{n}}}$", "level": "Level 1"} for n in range(3)]
    path = tmp_path / f"train.{form}"
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, needed for parquet only, is not installed")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert questions(read_source(path)["train"]) == ["0?", "1?", "2?"]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("train.jsonl", '{"problem": "a"}', "train.jsonl, row 0: needs the texts"),
        ("train.jsonl", "{", "cannot be read"),
        ("train.parquet", "PAR", "not a parquet file"),
        ("notes.txt", "", "holds no .json"),
    ],
)
def test_what_is_wrong_with_a_source_is_said(tmp_path, name, content, expected):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow, needed for parquet only, is not installed")
    (tmp_path / "MATH").mkdir()
    (tmp_path / "MATH" / name).write_text(content)
    with pytest.raises(DataError, match=expected):
        read_source(tmp_path / "MATH")
    with pytest.raises(DataError, match="no such file or folder"):
        read_source(tmp_path / "absent")


def test_the_official_split_sets_training_problems_aside_by_the_seed(tmp_path):
    parts = read_source(write_tree(tmp_path / "MATH", 20, 5))
    split = official_split(parts, valid=4, seed=1)
    assert [len(split[part]) for part in ("train", "valid", "test")] == [16, 4, 5]
    assert sorted(questions(split["train"] + split["valid"])) == sorted(questions(parts["train"]))
    assert questions(split["valid"]) == questions(official_split(parts, valid=4, seed=1)["valid"])
    assert questions(split["valid"]) != questions(official_split(parts, valid=4, seed=2)["valid"])
    with pytest.raises(DataError, match="--valid 20"):
        official_split(parts, valid=20, seed=1)
    with pytest.raises(DataError, match="needs a train and a test part"):
        official_split({"": parts["train"]}, valid=4, seed=1)


def test_the_fork_split_is_the_fork_s():
    """Its rule in flat form: shuffle by the global generator, first tenth valid, second test, rest train."""
    rows = [{"problem": f"{number}?"} for number in range(12_500)]
    shuffled = list(rows)
    state = random.getstate()
    random.seed(42)
    random.shuffle(shuffled)
    random.setstate(state)
    for parts in ({"": rows}, {"test": rows[7_500:], "train": rows[:7_500]}):
        split = fork_split(parts, seed=42)
        assert split["valid"] == shuffled[:1_250] and split["test"] == shuffled[1_250:2_500]
        assert split["train"] == shuffled[2_500:]


SUBJECTS = {  # of the source's rows in their order: official training part, then test part
    "algebra": (1744, 1187), "counting": (771, 474), "geometry": (870, 479), "intermediate": (1295, 903),
    "number theory": (869, 540), "prealgebra": (1205, 871), "precalculus": (746, 546),
}  # fmt: skip
WORDS_OF_PRECALCULUS = (r"\begin{pmatrix}", r"\arcsin", r"\mathbf", r"\cos \theta", r"\sin \theta")


def test_the_published_files_lie_where_the_fork_split_deals_them(published):
    """Put back by the split's rule, they are in the order of the source: subject after subject."""
    subjects = [name for part in (0, 1) for name, sizes in SUBJECTS.items() for _ in range(sizes[part])]
    split = fork_split({"": [{"index": index} for index in range(12_500)]}, seed=42)
    dealt = [subjects[row["index"]] for row in split["valid"] + split["test"]]

    def found(words):
        hits = zip(published, dealt, strict=True)
        return [subject for item, subject in hits if any(word in item["question"] for word in words)]

    assert set(found(WORDS_OF_PRECALCULUS)) == {"precalculus"} and len(found(WORDS_OF_PRECALCULUS)) > 90
    assert found(["probability"]).count("counting") > 0.8 * len(found(["probability"]))


def test_lines_keep_the_question_as_it_is(published):
    """The fork's questions end with a line break where the source's do."""
    assert sum(item["question"] != item["question"].strip() for item in published) == 107
    row = {"problem": " What?\n", "solution": r"$\boxed{1}$"}
    assert problem_of_row(row, "line")["question"] == " What?\n"
    assert problem_of_row(row, "sentence")["question"] == "What?"


@pytest.mark.parametrize(
    "options, grading, tokens", [(["--split", "fork"], "exact", 128), (["--valid", "2"], "latex", 512)]
)
def test_the_card_grades_the_fork_s_split_as_the_fork_does(tmp_path, monkeypatch, options, grading, tokens):
    folder = write_tree(tmp_path / "MATH", 20, 10)
    monkeypatch.setattr(
        "sys.argv",
        ["hendrycks_math.py", "--source", str(folder), "--output-dir", str(tmp_path / "out"), *options],
    )
    main()
    card = card_for(tmp_path / "out" / "math_test.json")
    assert (card.grading, card.max_new_tokens) == (grading, tokens)


def test_a_problem_without_an_answer_is_named_not_dropped_silently(tmp_path, capsys):
    folder = write_tree(tmp_path / "MATH", 3, 1)
    (folder / "train" / "algebra" / "1.json").write_text('{"problem": "q", "solution": "no box"}')
    assert len(convert(read_source(folder)["train"], "sentence")) == 2
    message = capsys.readouterr().err
    assert "left out, 1 of 3" in message and "1.json" in message and "boxed" in message
