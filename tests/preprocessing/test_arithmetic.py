"""The quickstart's data and model: true sums, no leak between splits, text that survives the tokenizer."""

import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut_ds.data.problems import card_for, cot_matches, is_correct, read_problems, split_completion
from coconut_ds.data.tokenizer import load_vocabulary, tokenize
from coconut_ds.errors import DataError
from preprocessing.arithmetic import main

SCRIPT = Path(__file__).parents[2] / "preprocessing" / "arithmetic.py"
SPLITS = ("train", "valid", "test")
SMALL = ("--train", "60", "--valid", "20", "--test", "20")


def make(folder: Path, *arguments: str) -> None:
    main(["--output-dir", str(folder), *arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    make(folder, *SMALL, "--model-dir", str(folder / "model"), "--seed", "3")
    return folder


@pytest.mark.parametrize("split", SPLITS)
def test_steps_follow_the_question_and_end_in_the_answer(made: Path, split: str):
    for problem in read_problems(made / f"arithmetic_{split}.json"):
        value, *terms = re.findall(r"[+*]?\d+", problem.question.removesuffix("=?"))
        expected = []
        for term in terms:
            result = eval(f"({value}{term}) % 7")
            expected.append(f"<<{value}{term}={result}>>")
            value = str(result)
        assert list(problem.steps) == expected and len(terms) == 3
        assert problem.answer == value
        assert "*0" not in problem.question


def test_no_question_is_in_two_splits_or_twice_in_one(made: Path):
    questions = [
        problem.question for split in SPLITS for problem in read_problems(made / f"arithmetic_{split}.json")
    ]
    assert len(questions) == len(set(questions)) == 100


def test_splits_can_use_up_every_question(tmp_path: Path):
    make(tmp_path, "--terms", "2", "--train", "51", "--valid", "20", "--test", "20")
    questions = {p.question for split in SPLITS for p in read_problems(tmp_path / f"arithmetic_{split}.json")}
    sums, products = product(range(7), range(7)), product(range(7), range(1, 7))
    assert questions == {f"{a}+{b}=?" for a, b in sums} | {f"{a}*{b}=?" for a, b in products}


def test_chains_of_sums_alone(tmp_path: Path):
    make(tmp_path, *SMALL, "--terms", "2", "--modulus", "10", "--operators", "+")
    questions = {p.question for split in SPLITS for p in read_problems(tmp_path / f"arithmetic_{split}.json")}
    assert questions == {f"{a}+{b}=?" for a, b in product(range(10), range(10))}


def test_the_card_says_how_to_grade(made: Path):
    card = card_for(made / "arithmetic_test.json")
    assert card.grading == "exact"
    assert dict(card.counts) == {f"arithmetic_{s}.json": n for s, n in zip(SPLITS, (60, 20, 20), strict=True)}
    vocabulary = load_vocabulary(str(made / "model"))
    for problem in tokenize(read_problems(made / "arithmetic_test.json"), vocabulary):
        assert sum(map(len, problem.steps)) + len(problem.answer) <= card.max_new_tokens


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(made: Path, tmp_path: Path):
    for folder, seed in (("again", "3"), ("other", "4")):
        make(tmp_path / folder, *SMALL, "--model-dir", str(tmp_path / folder / "model"), "--seed", seed)
    assert contents(tmp_path / "again") == contents(made)
    other = contents(tmp_path / "other")
    assert other.keys() == contents(made).keys()
    assert other["arithmetic_test.json"] != (made / "arithmetic_test.json").read_bytes()
    assert other["model/model.safetensors"] != (made / "model" / "model.safetensors").read_bytes()


def test_writing_over_an_earlier_result_leaves_nothing_of_it(made: Path, tmp_path: Path):
    for seed in ("4", "3"):
        make(tmp_path, *SMALL, "--model-dir", str(tmp_path / "model"), "--seed", seed)
    assert contents(tmp_path) == contents(made)


def test_text_survives_the_tokenizer_and_its_answer_is_graded_right(made: Path):
    vocabulary = load_vocabulary(str(made / "model"))
    problems = read_problems(made / "arithmetic_train.json")
    for problem, tokens in zip(problems, tokenize(problems, vocabulary), strict=True):
        completion = sum(tokens.steps, ()) + tokens.answer
        text = "\n".join([*problem.steps, f"### {problem.answer}"])
        assert vocabulary.decode(completion) == text
        reasoning, answer = split_completion(vocabulary.decode(completion))
        assert cot_matches(reasoning, problem.steps)
        assert is_correct("exact", answer, problem.answer)
        whole = vocabulary.tokenizer.encode(f"{problem.question}\n{text}", add_special_tokens=True)
        assert tuple(whole) == (tokens.question + completion)[:-1]


def test_markers_start_from_one_known_token(made: Path):
    vocabulary = load_vocabulary(str(made / "model"))
    (source,) = vocabulary.new_row_source_ids
    assert vocabulary.tokenizer.convert_ids_to_tokens(source) == "<<"
    assert len({*vocabulary.special_token_ids, vocabulary.eos_id, vocabulary.pad_id}) == 5


@given(text=st.text(alphabet="0123456789+*=? \n<>#"))
def test_pieces_encode_as_the_whole_does_when_cut_at_a_line(tokenizer, text: str):
    lines = text.splitlines(keepends=True)
    pieces = [token for line in lines for token in tokenizer.encode(line, add_special_tokens=False)]
    assert pieces == tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def tokenizer(made: Path):
    return load_vocabulary(str(made / "model")).tokenizer


def test_the_model_has_the_size_that_was_asked_for(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    flags = ("--layers", "1", "--width", "24", "--heads", "3", "--modulus", "12", "--terms", "6")
    make(tmp_path, *SMALL, *flags, "--model-dir", str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head) == (1, 24, 3)
    vocabulary = load_vocabulary(str(folder))
    assert model.get_input_embeddings().weight.shape == (vocabulary.start_id, 24)
    (longest,) = tokenize(read_problems(tmp_path / "arithmetic_train.json", 1), vocabulary)
    assert (
        len(longest.question) + sum(map(len, longest.steps)) + len(longest.answer) + 5 * 8
        <= config.n_positions
    )


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("--terms", "3"), "1183 different questions"),
        (("--train", "0"), "at least 1"),
        (("--train", "many"), "invalid whole number value: 'many'"),
        (("--width", "64", "--heads", "5"), "not a multiple"),
        (("--model-dir", str(SCRIPT)), "is a file"),
        (("--model-dir", str(SCRIPT.parent)), "not replaced"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str
):
    with pytest.raises((SystemExit, DataError)) as caught:
        make(tmp_path, *arguments)
    assert complaint in capsys.readouterr().err + str(caught.value)
    assert contents(tmp_path) == {}


def test_the_script_runs_as_a_file_from_anywhere(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), *SMALL, "--terms", "3"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=60, capture_output=True)
    assert len(read_problems(tmp_path / "data" / "arithmetic_test.json")) == 20
    command[-1] = "1"
    refused = subprocess.run(command, cwd=tmp_path, timeout=60, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--terms" in refused.stderr and "Traceback" not in refused.stderr
