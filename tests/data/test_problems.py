"""Reading problems and cards, and the published rules of grading."""

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut_ds.__main__ import main
from coconut_ds.data.problems import (
    GRADINGS,
    Card,
    Problem,
    card_for,
    cot_matches,
    is_correct,
    read_problems,
    split_completion,
)
from coconut_ds.errors import DataError

SHARED_DATA = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[3] / "shared")) / "data"
GOOD = {"question": "2 + 2 ?", "steps": ["<<2+2=4>>"], "answer": "4"}


def write(path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_fields_become_a_problem_and_other_fields_are_ignored(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([GOOD | {"edges": [[0, 1]]}, GOOD | {"steps": []}]))
    assert read_problems(path) == [Problem("2 + 2 ?", ("<<2+2=4>>",), "4"), Problem("2 + 2 ?", (), "4")]


def test_blank_steps_of_the_published_files_are_left_out(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([GOOD | {"steps": [""]}, GOOD | {"steps": ["a", " ", "b"]}]))
    assert [problem.steps for problem in read_problems(path)] == [(), ("a", "b")]


def test_limit_stops_before_what_follows(tmp_path):
    path = write(tmp_path / "a.json", f"[{json.dumps(GOOD)}, {json.dumps(GOOD)}, broken")
    assert len(read_problems(path, limit=2)) == 2
    with pytest.raises(DataError, match="item 2: not JSON at line 1"):
        read_problems(path)


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    assert read_problems(write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps([GOOD]).encode()))


item = json.dumps(GOOD)
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 123456789\n"
FORMS = {
    "list": f"[{item}, {item}]",
    "wrapped": f'{{"data": [{item}, {item}]}}',
    "described": f'{{"name": "gsm", "train": [{item}, {item}]}}',
    "columns": json.dumps({key: [value, value] for key, value in GOOD.items()}),
    "lines": f"{item}\n{item}\n",
    "spread lines": f"{json.dumps(GOOD, indent=1)}\n\n{item}",
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_problems_for_train_and_validate(tmp_path, form, mark, capsys):
    path = write(tmp_path / "a_train.json", mark + FORMS[form].encode())
    assert read_problems(path) == [Problem("2 + 2 ?", ("<<2+2=4>>",), "4")] * 2
    assert main(["validate", str(path)]) == 0
    output = capsys.readouterr()
    assert f"{path}         2" in output.out and "error" not in output.out + output.err


def test_one_line_is_one_problem(tmp_path):
    assert len(read_problems(write(tmp_path / "a.jsonl", item))) == 1


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "the file is empty"),
        (b" \n ", "the file is empty"),
        (b"\xef\xbb\xbf", "must hold a list"),
        (b'[{"question": "caf\xe9"}]', "byte 18 is not UTF-8"),
        ('"text"', "must hold a list"),
        ("{}", "must hold a list"),
        ('{"data": [], "more": []}', "must hold a list"),
        (
            '{"question": ["a"], "steps": [], "answer": ["4"]}',
            "'question' has 1, 'steps' has 0, 'answer' has 1",
        ),
        ('{"data": [{"question": "?"}]}', "item 0, 'answer': missing"),
        (f"{item}\n{item[:20]}", "item 1: not JSON at line 2"),
        (f"{item},\n{item}", "item 1: not JSON"),
        (LFS_POINTER, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        ("\n<!DOCTYPE html><html></html>", "is an HTML page, not the file itself; download the raw file"),
        ("[]", "the list is empty"),
        ("[[]]", "item 0: must be an object, got a list"),
        ("[null]", "item 0: must be an object, got null"),
        (f"[{item}, {item[:20]}", "item 1: not JSON"),
        (f"[{item}", "was it cut off"),
        (f"[{item} {item}]", "after item 0, line 1: expected ',' or ']' but found '{'"),
        (f"[{item},]", "item 1: not JSON"),
        (f"[{item}] []", "more text follows"),
        ('[{"steps": [], "answer": "4"}]', "item 0, 'question': missing"),
        ('[{"question": "?", "answer": "4"}]', "item 0, 'steps': missing"),
        ('[{"question": "?", "steps": 1, "answer": "4"}]', "'steps': must be a list of texts, got a number"),
        ('[{"question": "?", "steps": [1], "answer": "4"}]', "'steps'[0]: must be text, got a number"),
        ('[{"question": "?", "steps": [], "answer": true}]', "'answer': must be text, got true/false"),
        ('[{"question": " ", "steps": [], "answer": "4"}]', "'question': empty"),
        ('[{"question": "?", "steps": [], "answer": ""}]', "'answer': empty"),
        ('[{"question": "?", "steps": [], "answer": NaN}]', "item 0: NaN is not JSON"),
        (
            '[{"question": "?", "question": "!", "steps": [], "answer": "4"}]',
            "the key occurs more",
        ),
        ('[{"question": "\\ud800", "steps": [], "answer": "4"}]', "half a surrogate pair"),
        ("[" * 200_000, "nested too deeply"),
        ('[{"question": ' + "9" * 5000 + "}]", "item 0"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path, content, expected):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(DataError) as caught:
        read_problems(path)
    assert str(path) in str(caught.value) and expected in str(caught.value)


def test_all_problems_come_in_one_message_up_to_twenty(tmp_path):
    path = write(tmp_path / "bad.json", json.dumps([{}, GOOD, GOOD | {"answer": [1]}] + [[]] * 30))
    with pytest.raises(DataError) as caught:
        read_problems(path)
    text = str(caught.value)
    assert "34 errors" in text and "item 2, 'answer'" in text and "item 0, 'steps'" in text
    assert "14 more" in text and len(text.splitlines()) == 22


def test_a_missing_file_names_the_script_that_makes_it(tmp_path):
    for name, script in (
        ("gsm_train", "gsm8k.py"),
        ("prosqa_valid", "prosqa.py"),
        ("prosqa_like_test", "prosqa.py --gen"),
    ):
        with pytest.raises(DataError, match=f"no such file; .python preprocessing/{script}"):
            read_problems(tmp_path / f"{name}.json")
    with pytest.raises(DataError, match="data/README.md"):
        read_problems(tmp_path / "mine.json")
    with pytest.raises(DataError, match="this is a folder"):
        read_problems(tmp_path)
    with pytest.raises(DataError, match="at least 1"):
        read_problems(write(tmp_path / "a.json", f"[{item}]"), limit=0)


@given(st.lists(st.tuples(st.text(), st.lists(st.text(), max_size=3), st.text()), min_size=1, max_size=4))
def test_any_text_is_read_back_or_refused_by_name(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "a.json"
    values = [dict(zip(("question", "steps", "answer"), row, strict=True)) for row in rows]
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    if all(q.strip() and a.strip() for q, _, a in rows):
        texts = [(q.strip(), [step.strip() for step in steps], a.strip()) for q, steps, a in rows]
        expected = [Problem(q, tuple(filter(None, steps)), a) for q, steps, a in texts]
        assert read_problems(path) == expected
    else:
        with pytest.raises(DataError, match="empty"):
            read_problems(path)


@pytest.mark.parametrize(
    "name, count", [("gsm_valid", 500), ("gsm_test", 1319), ("prosqa_test", 500), ("prontoqa_test", 800)]
)
def test_published_files_are_read(name, count):
    path = SHARED_DATA / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    assert len(read_problems(path)) == count


def test_the_card_is_found_by_dropping_parts_of_the_name(tmp_path):
    write(tmp_path / "prosqa.card.json", '{"name": "prosqa", "max_new_tokens": 100}')
    write(tmp_path / "prosqa_7hop.card.json", '{"name": "ProsQA-like, 7 hops", "grading": "latex"}')
    assert card_for(tmp_path / "prosqa_train.json") == Card("prosqa", max_new_tokens=100)
    assert card_for(tmp_path / "prosqa_7hop_test.json").grading == "latex"
    assert card_for(tmp_path / "gsm_test.json") == Card("gsm", grading="exact", max_new_tokens=128)


def test_a_wrong_card_is_refused_with_everything_wrong(tmp_path):
    write(
        tmp_path / "x.card.json",
        '{"grading": "fuzzy", "max_new_tokens": 0, "hue": 1, "counts": {"a": "b"}}',
    )
    with pytest.raises(DataError) as caught:
        card_for(tmp_path / "x_test.json")
    for part in (
        "name: is missing",
        "grading: must be one of",
        "max_new_tokens: ",
        "hue: is not",
        "counts.a: ",
    ):
        assert part in str(caught.value)
    write(tmp_path / "x.card.json", "{")
    with pytest.raises(DataError, match="not JSON"):
        card_for(tmp_path / "x_test.json")


def test_exact_grading_ignores_commas_and_outer_blanks_only():
    assert is_correct("exact", " 1,000 ", "1000") and is_correct("exact", "5", "5 ")
    assert not is_correct("exact", "5.0", "5") and not is_correct("exact", "", "5")
    with pytest.raises(ValueError, match="one of exact, latex"):
        is_correct("fuzzy", "1", "1")


EQUAL = [
    (r"\frac{1}{2}", "0.5"), (r"\dfrac{3}{4}", r"\frac34"), ("(1, 2)", "(1,2)"), (r"2\sqrt{3}", r"\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"), (r"90^\circ", "90"), (r"\frac{16}{27}", r"\left(\frac{2}{3}\right)^3 \cdot 2"),
    (r"\text{(E)}", r"(\text{E})"), ("1,234", "1234"), (r"[0,\infty)", r"[0, \infty)"), ("10\\%", "10"),
]  # fmt: skip
DIFFERENT = [
    (r"\frac{1}{2}", r"\frac{1}{3}"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1 2)", "(1,2)"),
    ("x+1", "x+2"), ("", "5"), (r"\sqrt{2}", "1.41"), ("12", "1,3"), ("no idea", "5"), ("-3", "3"),
    ("10^{10^{10^{10}}}", "7"),
]  # fmt: skip


@pytest.mark.parametrize("predicted, expected", EQUAL)
def test_latex_grading_calls_equal_mathematics_equal(predicted, expected):
    assert is_correct("latex", predicted, expected)


@pytest.mark.parametrize("predicted, expected", DIFFERENT)
def test_latex_grading_keeps_different_mathematics_apart(predicted, expected, monkeypatch):
    monkeypatch.setattr("coconut_ds.data.problems._LATEX_SECONDS", 1)  # what a tower of powers is given
    assert not is_correct("latex", predicted, expected)


def test_latex_grading_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(is_correct("latex", r"\frac{7}{2}", "3.5")))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    "text, reasoning, answer",
    [
        ("<<2+2=4>>\n<<4*2=8>>\n### 8", "<<2+2=4>>\n<<4*2=8>>", "8"),
        ("### 1,234,567", "", "1234567"),
        ("no answer given", "no answer given", ""),
        ("8", "8", ""),
        ("a\n### b ### c", "a", "c"),
        ("", "", ""),
    ],
)
def test_a_completion_is_split_by_the_published_rule(text, reasoning, answer):
    assert split_completion(text) == (reasoning, answer)


REASONING = "We add: $2+3=5$.\nSo the answer is $\\boxed{5}$."
COMPLETIONS = {  # completion -> the gradings that count it as right; the reference answer is 5
    "### 5": {"exact", "latex"},
    f"{REASONING}\n### 5": {"exact", "latex"},
    "###5": {"exact", "latex"},
    "# 5": {"exact", "latex"},
    "### 4\n### 5": {"exact", "latex"},
    "### 5,": {"exact", "latex"},
    "### 10/2": {"latex"},
    "### $5$": {"latex"},
    "### 5.0": {"latex"},
    "### 4 ### 5": {"exact", "latex"},
    "### 5\n### 4": set(),
    "### 5 ###": set(),
    "### 5\nThat is the answer.": set(),
    "### 5\n5": set(),
    "### 7\nThe answer is 5": set(),
    "### 5 6": set(),
    "###": set(),
    "### ": set(),
    "###\n": set(),
    "": set(),
    " \n": set(),
    "5": set(),
    "$5$": set(),
    "\\boxed{5}": set(),
    "The answer is 5": set(),
    "#5 of the list\n### ": set(),
    ",": set(),
    "### ,": set(),
}


@pytest.mark.parametrize("grading", GRADINGS)
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_what_counts_as_an_answer(grading, completion):
    _, predicted = split_completion(completion, grading)
    assert is_correct(grading, predicted, "5") is (grading in COMPLETIONS[completion])


@pytest.mark.parametrize("grading", GRADINGS)
def test_a_completion_that_is_cut_off_before_its_answer_is_wrong(grading):
    text = f"{REASONING}\n### 5"
    for length in range(len(text)):
        assert not is_correct(grading, split_completion(text[:length], grading)[1], "5"), text[:length]


@pytest.mark.parametrize("grading", GRADINGS)
def test_no_reference_solution_without_its_answer_counts(grading):
    path = SHARED_DATA / "math_test.json"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    for problem in read_problems(path, 200):
        _, predicted = split_completion("\n".join(problem.steps), grading)
        assert not is_correct(grading, predicted, problem.answer)


def test_commas_tell_latex_answers_apart():
    assert not is_correct("latex", "(12)", "(1,2)") and not is_correct("latex", "12", "1,2")


def test_commas_of_a_latex_answer_are_kept():
    assert split_completion("so\n### (1,2)", "latex") == ("so", "(1,2)")


def test_cot_match_is_word_for_word():
    assert cot_matches("a\nb", ("a", "b")) and cot_matches("", ())
    assert not cot_matches("a b", ("a", "b")) and not cot_matches("a", ("a", "b"))


@pytest.mark.parametrize("name", ["train.txt", "train.json", "train.jsonl"])
@pytest.mark.parametrize(
    "text, form",
    [
        ("Janet has 3 ducks.||<<3*2=6>> <<6-2=4>> #### 4\nTwo?||#### 2\n", "icot"),
        ('{"question": "Janet", "answer": "She has <<3*2=6>>6.\\n#### 6"}\n' * 2, "original"),
    ],
)
def test_gsm8ks_own_files_name_the_script_that_converts_them(tmp_path, name, text, form):
    (tmp_path / name).write_text(text)
    with pytest.raises(
        DataError, match=f"GSM8K.*python preprocessing/gsm8k.py --form {form} --source FOLDER"
    ):
        read_problems(tmp_path / name)
