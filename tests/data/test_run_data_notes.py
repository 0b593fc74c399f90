"""Notes at the start of training: questions in two files, and text that the tokenizer does not know."""

import json
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coconut_ds.__main__ import main
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.run_data import (
    load_run_data,
    load_test_set,
    shared_questions,
    unknown_id,
    unknown_text,
)
from coconut_ds.data.tokenizer import load_vocabulary, tokenize
from coconut_ds.model.loading import load_config


def problem(question, steps=("1+1=2",) * 3, answer="2"):
    return {"question": question, "steps": list(steps), "answer": answer}


@pytest.fixture
def notes(tiny_experiment, tmp_path, capsys):
    """The notes that training prints for the questions of each file."""

    def read(**files):
        values = dict(tiny_experiment)
        for key, problems in files.items():
            values[key] = str(tmp_path / f"{key}.json")
            (tmp_path / f"{key}.json").write_text(json.dumps(problems))
        capsys.readouterr()
        load_run_data(validate_experiment(values, "test"), load_config(values["model_id"]))
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]

    return read


def test_files_without_shared_questions_have_no_note(notes):
    assert (
        notes(train_path=[problem("1+1=?")], val_path=[problem("1+2=?")], test_path=[problem("2+1=?")]) == []
    )


def test_shared_questions_are_counted_and_the_first_is_named(notes, tmp_path):
    lines = notes(
        train_path=[problem("1+1=?"), problem("2+2=?"), problem("3+3=?")],
        val_path=[problem("4+4=?"), problem("3+3=?", answer="6"), problem("2+2=?")],
        test_path=[problem("1+1=?")],
    )
    train, valid, test = (tmp_path / f"{key}.json" for key in ("train_path", "val_path", "test_path"))
    assert lines == [
        f"note: {valid}: 2 of 3 questions are also in {train}, so accuracy on them does not measure "
        "generalization; the first is item 1 = item 2: '3+3=?'",
        f"note: {test}: 1 of 1 questions are also in {train}, so accuracy on them does not measure "
        "generalization; the first is item 0 = item 0: '1+1=?'",
    ]


def test_the_training_file_as_validation_file_is_a_note(notes):
    same = [problem("1+1=?")]
    assert "1 of 1 questions are also in" in notes(train_path=same, val_path=same)[0]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "no problem has steps, so no stage hides anything"),
        (["1+1=2"], "no problem has more than 1 step, so .* than stage 1: --set max_latent_stage=1"),
        (["1+1=2"] * 3, None),
    ],
    ids=["none", "one", "three"],
)
def test_stages_beyond_the_steps_of_the_data_are_a_note(notes, steps, message):
    lines = notes(
        train_path=[problem("1+1=?", steps)], val_path=[problem("1+2=?")], test_path=[problem("2+1=?")]
    )
    assert (re.search(message, "\n".join(lines)) is not None) if message else lines == []


def words(folder, model):
    """A tokenizer of a few words with an unknown token."""
    names = ["[UNK]", "<eos>", "two", "plus", "###", "2"]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(model(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>").save_pretrained(
        folder
    )
    return load_vocabulary(str(folder))


@pytest.mark.parametrize("model", [models.WordLevel, models.WordPiece])
def test_text_that_the_tokenizer_does_not_know_is_counted_and_named(tmp_path, model):
    vocabulary = words(tmp_path / "words", model)
    sets = {}
    for name, problems in {
        "train": [problem("two plus two", ["2"]), problem("two é two", ["ß 2"], "zwei é")],
        "valid": [problem("two plus two", ["2"])],
        "test": [problem("two drei two", ["2"])],
    }.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(problems))
        sets[str(path)] = load_test_set(str(path), vocabulary)
    train = str(tmp_path / "train.json")
    tokens = tokenize(sets.pop(train).problems, vocabulary)
    (note,) = unknown_text(vocabulary, tokens, train, sets)
    assert note.startswith(
        f"{train}, {tmp_path / 'test.json'}: the tokenizer of model_id does not know 5 pieces"
    )
    assert note.endswith("'é' (2), 'ß' (1), 'zwei' (1), 'drei' (1)")
    unknown = unknown_id(vocabulary)
    # "drei" and "é" are one token, "two plus two" is really in both files.
    assert list(shared_questions(tokens[1:], train, sets, unknown)) == []
    assert len(list(shared_questions(tokens, train, sets, unknown))) == 1
    del sets[str(tmp_path / "test.json")]
    assert list(unknown_text(vocabulary, tokens[:1], train, sets)) == []


def test_validate_names_text_that_the_tokenizer_does_not_know(tmp_path, arithmetic, capsys):
    (tmp_path / "a.json").write_text(json.dumps([problem("zwei+2=?")]))
    assert main(["validate", str(tmp_path / "a.json"), "--model", str(arithmetic / "gpt2")]) == 0
    assert "does not know" in capsys.readouterr().err
