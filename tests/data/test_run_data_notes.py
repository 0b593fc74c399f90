"""Notes at the start of training: questions in two files, and text that the tokenizer does not know."""

import json
import re
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from coconut_ds.__main__ import main
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.problems import enough_tokens
from coconut_ds.data.run_data import (
    load_run_data,
    load_test_set,
    shared_questions,
    unknown_id,
    unknown_text,
)
from coconut_ds.data.tokenizer import load_vocabulary, refuse_missing_rows, tokenize
from coconut_ds.errors import ConfigError, first_line
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


def test_marks_in_any_file_are_counted(notes, tmp_path, tiny_experiment):
    eos = load_vocabulary(tiny_experiment["model_id"]).tokenizer.eos_token
    odd = [problem("1+1=?"), problem("2+2=?", answer="#4"), problem("3+<|latent|>=?"), problem("4=?" + eos)]
    more = [
        problem("5+1=?"),
        problem("6+1=?", answer="1\n### 2"),
        problem("7=?", steps=["<|end-latent|>"] * 3),
    ]
    for _ in ("tokenized", "from the cache"):
        lines = notes(train_path=odd, val_path=more)
        train, valid = tmp_path / "train_path.json", tmp_path / "val_path.json"
        for start in (f"{train}: 1 of 4 answers contain '#'", f"{valid}: 1 of 3 answers contain '#'"):
            assert sum(start in line and "the first is item 1" in line for line in lines) == 1
        assert any(f"{train}: 2 of 4 problems contain the text of a special token" in line for line in lines)
        assert any(f"{valid}: 1 of 3 problems contain the text of a special token" in line for line in lines)


def test_references_longer_than_max_new_tokens(tiny_experiment, tmp_path, capsys):
    """The suggested number removes the note; the stage is the first that is evaluated."""
    (tmp_path / "valid.json").write_text(json.dumps([problem("1+1=?"), problem("2+2=?", steps=[])]))
    values = tiny_experiment | {"val_path": str(tmp_path / "valid.json"), "max_new_tokens": 5}

    def note(**changes):
        capsys.readouterr()
        experiment = validate_experiment(values | changes, "test")
        load_run_data(experiment, load_config(values["model_id"]))
        return next((line for line in capsys.readouterr().err.splitlines() if "references" in line), "")

    text = note()
    assert "valid.json: 1 of 2 references are longer than 5 tokens (0 steps hidden, 0 latents)" in text
    needed = int(text.rpartition("max_new_tokens: ")[2].rstrip("'"))
    (longest,) = [
        n for n in range(needed - 8, needed) if note(max_new_tokens=n - 1) and not note(max_new_tokens=n)
    ]
    assert needed == enough_tokens(longest) and not note(max_new_tokens=needed)
    assert not note(method="no_cot") and note(method="no_cot", max_new_tokens=1)


def test_a_test_set_with_questions_of_the_validation_set(notes, tmp_path):
    lines = notes(val_path=[problem("9+9=?")], test_path=[problem("9+9=?")])
    assert any(
        f"test_path.json: 1 of 1 questions are also in {tmp_path / 'val_path.json'}" in x for x in lines
    )


def test_tokens_without_a_row_in_the_model(tiny_experiment):
    vocabulary = load_vocabulary(tiny_experiment["model_id"])
    size = len(vocabulary.tokenizer)

    def refuse(rows):
        return refuse_missing_rows(vocabulary, GPT2Config(vocab_size=rows), "m")

    assert refuse(size) == refuse(size - 3) == refuse(size + 64) == []  # resized, as published, padded
    with pytest.raises(
        ConfigError, match=r"have no row in the model \(5 rows\); use the model's own tokenizer"
    ):
        refuse(5)
    vocabulary.tokenizer.add_tokens(["[PAD]"], special_tokens=True)
    (note,) = refuse(size - 3)
    assert "1 token of the tokenizer of 'm' ('[PAD]') have no row" in note


def test_a_run_and_data_files_with_a_model_of_too_few_rows(tiny_experiment, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_experiment["model_id"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    experiment = validate_experiment(tiny_experiment | {"model_id": str(folder)}, "test")
    with pytest.raises(ConfigError, match="have no row in the model"):
        load_run_data(experiment, load_config(str(folder)))
    assert main(["validate", tiny_experiment["val_path"], "--model", str(folder)]) == 2
    assert "have no row in the model" in capsys.readouterr().err


def test_one_file_for_validation_and_test(tiny_experiment, capsys):
    values = tiny_experiment | {"test_path": tiny_experiment["val_path"]}
    load_run_data(validate_experiment(values, "test"), load_config(values["model_id"]))
    assert "note: test_path is val_path (" in capsys.readouterr().err


def test_the_message_of_a_library_ends_with_a_word():
    assert first_line(ValueError("a b\nc")) == "a b"
    assert first_line(ValueError(f"{'a' * 390} https://example.com")) == "a" * 390 + "..."
    assert len(first_line(ValueError("a" * 1000))) == 400
