"""Cached tokens equal fresh ones, whatever happened to the cache."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from coconut_ds.data.problems import read_problems
from coconut_ds.data.token_cache import cached_tokens
from coconut_ds.data.tokenizer import load_vocabulary, tokenize
from coconut_ds.errors import DataError


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
    monkeypatch.setattr("coconut_ds.data.token_cache._CHUNK", 7)
    assert list(cached_tokens(data, vocabulary, tmp_path / "c")) == tokenize(read_problems(data), vocabulary)


def test_the_second_time_reads_no_problem(tmp_path, data, vocabulary, monkeypatch):
    cached_tokens(data, vocabulary, tmp_path / "cache")
    monkeypatch.setattr("coconut_ds.data.token_cache.tokenize", None)
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


@pytest.mark.parametrize("name", ["tokens.npy", "piece_ends.npy", "first_pieces.npy", "cache.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_entry_is_made_again(tmp_path, data, vocabulary, name, damage):
    cache = tmp_path / "cache"
    cached_tokens(data, vocabulary, cache)
    file = cache / entries(cache)[0] / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    assert list(cached_tokens(data, vocabulary, cache)) == tokenize(read_problems(data), vocabulary)
    assert len(entries(cache)) == 1


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
