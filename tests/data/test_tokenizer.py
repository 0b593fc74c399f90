"""Cached tokens equal fresh ones, whatever happened to the cache."""

import io
import json
import os
import pickle
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from coconut_ds.data.problems import Problem, read_problems
from coconut_ds.data.tokenizer import cached_tokens, load_vocabulary, tokenize
from coconut_ds.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def vocabulary(arithmetic):
    return load_vocabulary(str(arithmetic / "gpt2"))


@pytest.fixture
def data(tmp_path):
    """Problems with no, one and many steps."""
    items = [
        {"question": f"{n}+{n}=?", "steps": [f"<<{n}+{n}={2 * n}>>"] * (n % 4), "answer": str(2 * n)}
        for n in range(50)
    ]
    path = tmp_path / "some_train.json"
    path.write_text(json.dumps(items))
    return path


def entries(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_cached_tokens_are_the_tokens(tmp_path, data, vocabulary):
    expected = tokenize(read_problems(data), vocabulary)
    for _ in range(2):
        cached = cached_tokens(data, vocabulary, tmp_path / "cache")
        assert len(cached) == 50 and list(cached) == expected
        assert cached[-1] == expected[-1] and cached[3:7] == expected[3:7] and cached[::-9] == expected[::-9]
        assert all(isinstance(token, int) for token in cached[0].question)
    with pytest.raises(IndexError):
        cached[50]
    with pytest.raises(IndexError):
        cached[-51]


def test_chunks_do_not_show(tmp_path, data, vocabulary, monkeypatch):
    monkeypatch.setattr("coconut_ds.data.tokenizer._CHUNK", 7)
    assert list(cached_tokens(data, vocabulary, tmp_path / "c")) == tokenize(read_problems(data), vocabulary)


def test_the_second_time_reads_no_problem(tmp_path, data, vocabulary, monkeypatch):
    cached_tokens(data, vocabulary, tmp_path / "cache")
    monkeypatch.setattr("coconut_ds.data.tokenizer.tokenize", None)
    assert len(cached_tokens(data, vocabulary, tmp_path / "cache")) == 50


def test_content_tokenizer_and_limit_have_entries_of_their_own(tmp_path, data, vocabulary, arithmetic):
    cache = tmp_path / "cache"
    cached_tokens(data, vocabulary, cache)
    assert len(cached_tokens(data, vocabulary, cache, limit=5)) == 5
    changed = load_vocabulary(str(arithmetic / "gpt2"))
    changed.tokenizer.add_tokens(["+1"])
    cached_tokens(data, changed, cache)
    data.write_text(data.read_text().replace('"0"', '"1"', 1))
    cached = cached_tokens(data, vocabulary, cache)
    assert len(entries(cache)) == 4
    assert vocabulary.decode(cached[0].answer).endswith("1")
    same_elsewhere = shutil.copy(data, tmp_path / "elsewhere.json")
    cached_tokens(same_elsewhere, vocabulary, cache)
    assert len(entries(cache)) == 4


def bomb(path):
    """A small file that unpacks to much more."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("tokens", "piece_ends", "first_pieces"):
            content = io.BytesIO()
            np.save(content, np.zeros(100_000, dtype=np.uint16))
            archive.writestr(f"{name}.npy", content.getvalue())


def arrays_of(path):
    with np.load(path) as arrays:
        return dict(arrays)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:300] + b"!" + path.read_bytes()[301:]),
    "removed": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_bytes(pickle.dumps([1])),
    "one array": lambda path: np.savez(path, tokens=np.zeros(3, dtype=np.uint16)),
    "objects": lambda path: np.savez(path, **arrays_of(path) | {"tokens": np.array([{}], dtype=object)}),
    "an id too large": lambda path: np.savez(
        path, **arrays_of(path) | {"tokens": arrays_of(path)["tokens"] | np.uint16(1 << 15)}
    ),
    "ends that go back": lambda path: np.savez(
        path, **arrays_of(path) | {"piece_ends": arrays_of(path)["piece_ends"][::-1]}
    ),
    "a header of a huge array": lambda path: path.write_bytes(
        path.read_bytes().replace(b"'shape': (", b"'shape': (9999999")
    ),
    "a bomb": bomb,
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "file").write_text("")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path: (path.rename(path.with_name("elsewhere")), path.symlink_to("elsewhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(tmp_path, data, vocabulary, damage):
    cache = tmp_path / "cache"
    expected = list(cached_tokens(data, vocabulary, cache))
    (file,) = cache.glob("*.npz")
    before = arrays_of(file)
    DAMAGES[damage](file)
    assert expected == tokenize(read_problems(data), vocabulary)
    assert list(cached_tokens(data, vocabulary, cache)) == expected
    assert len(list(cache.glob("*.npz"))) == 1 and file.is_file() and not file.is_symlink()
    after = arrays_of(file)
    assert all((after[name] == before[name]).all() for name in before)


def test_an_entry_that_unpacks_to_more_is_not_read(tmp_path, data, vocabulary, monkeypatch):
    cached_tokens(data, vocabulary, tmp_path)
    (file,) = tmp_path.glob("*.npz")
    bomb(file)
    monkeypatch.setattr(np, "load", None)
    assert len(cached_tokens(data, vocabulary, tmp_path)) == 50


def test_the_default_folder_is_beside_the_file_or_the_user_s(tmp_path, data, vocabulary, monkeypatch):
    cached_tokens(data, vocabulary)
    assert list((tmp_path / "cache" / "tokens").glob("*.npz"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of_the_user"))
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").symlink_to(tmp_path / "anywhere")
    cached_tokens(data, vocabulary)
    assert list((tmp_path / "of_the_user" / "coconut_ds" / "tokens").glob("*.npz"))


def test_many_at_once_leave_one_entry(tmp_path, data, vocabulary):
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(cached_tokens, data, vocabulary, tmp_path / "cache") for _ in range(8)]
    assert {tuple(job.result()) for job in jobs} == {tuple(tokenize(read_problems(data), vocabulary))}
    assert len(entries(tmp_path / "cache")) == 1


def test_a_wrong_file_leaves_nothing(tmp_path, data, vocabulary):
    data.write_text(data.read_text()[:-20])
    with pytest.raises(DataError, match="cut off|not JSON"):
        cached_tokens(data, vocabulary, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    with pytest.raises(DataError, match="no such file"):
        cached_tokens(tmp_path / "gsm_train.json", vocabulary, tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be stored"):
        cached_tokens(shutil.copy(data, tmp_path / "b.json"), vocabulary, tmp_path / "file" / "cache")


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} ? {% endfor %}"
    "{% if add_generation_prompt %}= {% endif %}"
)


@pytest.fixture
def chat_model(tmp_path, arithmetic):
    """The arithmetic tokenizer with the special token `<|user|>` and a chat template."""
    tokenizer = load_vocabulary(str(arithmetic / "gpt2")).tokenizer
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    shutil.copytree(arithmetic / "gpt2", tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


def test_a_question_in_the_chat_template(tmp_path, data, chat_model):
    problems = [Problem("3 + 4", ("<<3+4=7>>",), "7"), Problem("<|user|>", (), "1")]
    plain, chat = load_vocabulary(chat_model), load_vocabulary(chat_model, chat_template=True)
    without, inside = tokenize(problems, plain), tokenize(problems, chat)
    user = chat.tokenizer.convert_tokens_to_ids("<|user|>")
    words = chat.tokenizer.convert_tokens_to_ids
    assert inside[0].question == (user, *words(["3", "+", "4", "?", "="]))
    assert [ids.question.count(user) for ids in inside] == [1, 1]  # none from the data
    assert [(x.steps, x.answer) for x in inside] == [(x.steps, x.answer) for x in without]
    assert list(cached_tokens(data, chat, tmp_path / "c")) != list(cached_tokens(data, plain, tmp_path / "c"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no') }}", "that works"),
        ("hello", "leaves the question"),
    ],
)
def test_a_chat_template_that_is_of_no_use(chat_model, template, message):
    tokenizer = load_vocabulary(chat_model).tokenizer
    tokenizer.chat_template = template
    Path(chat_model, "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(chat_model)
    with pytest.raises(ConfigError, match=message):
        load_vocabulary(chat_model, chat_template=True)
