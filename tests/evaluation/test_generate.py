"""Questions in, answers out: prompts, files, the terminal, streaming."""

import io
import json

import pytest

from coconut_ds.__main__ import main
from coconut_ds.errors import ConfigError, DataError
from coconut_ds.evaluation.pretrained import CoconutForCausalLM
from tests.run_folders import make_run

QUESTIONS = ["3+4+2+7=?", "1+1+1+1=?", "9=?"]


@pytest.fixture(scope="module")
def run(tiny_experiment, tmp_path_factory):
    return make_run(tiny_experiment, tmp_path_factory.mktemp("generate"), max_new_tokens=9)


@pytest.fixture(scope="module")
def asked(run):
    return CoconutForCausalLM.from_pretrained(run)


def test_a_list_is_answered_as_one_by_one(asked):
    answers = asked.answer_questions(QUESTIONS, batch_size=2)
    assert answers == [asked.answer_questions(question) for question in QUESTIONS]
    assert len(set(answers)) > 1


def test_streamed_pieces_are_the_answer(asked):
    for question in QUESTIONS:
        pieces = list(asked.stream_answer(question))
        assert "".join(pieces) == asked.answer_questions(question)
        assert len(pieces) > 1


def test_the_number_of_latents_is_free(asked):
    prompts = asked.prompts(QUESTIONS, 5)
    assert prompts.latents_per_row_B.tolist() == [5, 5, 5]
    assert asked.prompts(QUESTIONS).num_latents == 3


def test_limits(asked):
    assert asked.max_new_tokens == 9
    with pytest.raises(DataError, match="question 3 has .* positions: shorten it"):
        asked.answer_questions(["1=?", "2=?", "1+" * 80 + "1=?"], batch_size=1)
    with pytest.raises(ConfigError, match="max_new_tokens 0: must be 1 or more"):
        asked.answer_questions("1=?", max_new_tokens=0)


def test_prompt_and_file_and_standard_input(run, asked, tmp_path, capsys, monkeypatch):
    expected = asked.answer_questions(QUESTIONS)
    assert main(["generate", str(run), "--prompt", QUESTIONS[0]]) == 0
    assert capsys.readouterr().out == expected[0] + "\n"
    problems = tmp_path / "p.json"
    problems.write_text(json.dumps([{"question": q, "steps": [], "answer": "1"} for q in QUESTIONS]))
    output = tmp_path / "answers.jsonl"
    assert main(["generate", str(run), "--file", str(problems), "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert found == [{"question": q, "answer": a} for q, a in zip(QUESTIONS, expected, strict=True)]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(QUESTIONS)))
    assert main(["generate", str(run), "--batch_size", "2"]) == 0
    pairs = zip(QUESTIONS, expected, strict=True)
    assert capsys.readouterr().out == "".join(f"{question}\n{answer}\n\n" for question, answer in pairs)


def test_at_the_terminal_until_an_empty_line(run, asked, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal(f"{QUESTIONS[0]}\n{'1+' * 80}1=?\n\n"))
    assert main(["generate", str(run)]) == 0
    output = capsys.readouterr().out
    assert "3 latents" in output and asked.answer_questions(QUESTIONS[0]) in output and "shorten it" in output


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--prompt", " "], "no question"),
        (["--file", "absent.txt"], "cannot be read"),
        (["--file", "absent.json"], "no such file"),
        (["--prompt", "1", "--batch_size", "0"], "--batch_size 0"),
        (["--prompt", "1", "--latents", "-2"], "--latents -2"),
        (["--prompt", "1", "--checkpoint", "all"], "takes one model"),
    ],
)
def test_wrong_use(run, capsys, arguments, text):
    assert main(["generate", str(run), *arguments]) == 2
    assert text in capsys.readouterr().err
