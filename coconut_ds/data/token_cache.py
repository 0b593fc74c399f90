"""Tokenize a data file once, and read it back from memory-mapped arrays.

    cache/tokens/3f0c.../tokens.npy        ids of all pieces, one after the other
                         piece_ends.npy    where each piece ends: question, steps ..., answer, question ...
                         first_pieces.npy  which piece is the question of each problem; last, their number
                         cache.json        digests of the three

The folder's name is a digest of the file's content, the tokenizer and the limit, so a changed file or another
tokenizer never reads old ids.  An id takes two bytes in vocabularies up to 65,536, four above.  All ranks of
a machine share the pages.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np
from transformers import PreTrainedTokenizerFast

from coconut_ds.data.problems import Problem, each_problem
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary, tokenize
from coconut_ds.errors import DataError
from coconut_ds.files import json_text, open_append, read_json

FORMAT = 1  # increase it when the text format of tokenizer.py or the arrays change
_CHUNK = 4_096  # problems tokenized at a time
_ARRAYS = ("tokens", "piece_ends", "first_pieces")


class CachedProblems(Sequence[TokenizedProblem]):
    """Tokenized problems that stay on disk; an index returns one, a slice a list of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._tokens, self._piece_ends, self._first_pieces = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS
        )

    def __len__(self) -> int:
        return len(self._first_pieces) - 1

    def num_tokens(self) -> np.ndarray:
        """Tokens of every problem, without reading them."""
        ends = self._piece_ends[self._first_pieces[1:] - 1]
        return np.diff(ends, prepend=0)

    @overload
    def __getitem__(self, index: int) -> TokenizedProblem: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedProblem]: ...
    def __getitem__(self, index: int | slice) -> TokenizedProblem | list[TokenizedProblem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        first, last = self._first_pieces[index % len(self) :][:2].tolist()
        start = int(self._piece_ends[first - 1]) if first else 0
        ends = self._piece_ends[first:last].tolist()
        ids = self._tokens[start : ends[-1]].tolist()
        cuts = [0, *(end - start for end in ends)]
        question, *steps, answer = (tuple(ids[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
        return TokenizedProblem(question, tuple(steps), answer)


def cached_tokens(
    path: str | Path, vocabulary: Vocabulary, folder: str | Path, limit: int | None = None
) -> CachedProblems:
    """The tokenized problems of a data file, from the cache in `folder`; adds them if they are missing.

    If several ranks start at once, one tokenizes and the others wait.  A damaged entry is replaced.
    Raises DataError like read_problems, and if the entry cannot be stored.
    """
    path, folder = Path(path), Path(folder)
    entry = folder / _key(path, vocabulary, limit)
    size = _num_ids(vocabulary)
    if not _is_complete(entry, size):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open_append(folder / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_complete(entry, size):
                    _make(entry, path, vocabulary, limit)
        except OSError as error:
            raise DataError(
                f"{error.filename or folder}: the tokenized {path.name} cannot be stored ({error.strerror}); "
                "free disk space, or use a folder that can be written"
            ) from error
    return CachedProblems(entry)


def cache_folder(path: str | Path) -> Path:
    """The cache folder of a data file: beside the file, or in the user's cache if that is not writable."""
    parent = Path(path).parent
    folder = parent / "cache" / "tokens"
    # Do not follow links: they may come with a received folder and lead anywhere.
    if os.access(parent, os.W_OK) and not folder.is_symlink() and not folder.parent.is_symlink():
        return folder
    return Path.home() / ".cache" / "coconut_ds" / "tokens"


def _make(entry: Path, path: Path, vocabulary: Vocabulary, limit: int | None) -> None:
    working = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        _write(working, each_problem(path, limit), vocabulary)
        _put_in_place(working, entry, _num_ids(vocabulary))
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _key(path: Path, vocabulary: Vocabulary, limit: int | None) -> str:
    digest = hashlib.sha256(f"{FORMAT} {limit}\n".encode())
    try:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        list(islice(each_problem(path), 1))  # raises a DataError with the reason and the fix
        raise
    tokenizer = vocabulary.tokenizer
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer_rules = tokenizer.backend_tokenizer.to_str()
    else:
        tokenizer_rules = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    digest.update(tokenizer_rules.encode())
    digest.update(f"{tokenizer.init_kwargs.get('add_bos_token')} {vocabulary.eos_id}".encode())
    return digest.hexdigest()[:32]


def _write(folder: Path, problems: Iterator[Problem], vocabulary: Vocabulary) -> None:
    id_type = _id_type(_num_ids(vocabulary))
    piece_ends, first_pieces = array("q"), array("q", [0])
    end = 0
    raw = folder / "tokens.raw"
    with raw.open("wb") as file:
        while chunk := list(islice(problems, _CHUNK)):
            ids: list[int] = []
            for problem in tokenize(chunk, vocabulary):
                for piece in (problem.question, *problem.steps, problem.answer):
                    ids += piece
                    piece_ends.append(end + len(ids))
                first_pieces.append(len(piece_ends))
            end += len(ids)
            np.asarray(ids, dtype=id_type).tofile(file)
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", id_type, (end,))
    tokens[:] = np.memmap(raw, id_type, "r", shape=(end,))
    tokens.flush()
    raw.unlink()
    np.save(folder / "piece_ends.npy", np.asarray(piece_ends, dtype=np.int64))
    np.save(folder / "first_pieces.npy", np.asarray(first_pieces, dtype=np.int64))
    digests = {name: _digest(folder / f"{name}.npy") for name in _ARRAYS}
    (folder / "cache.json").write_text(json_text({"problems": len(first_pieces) - 1, "sha256": digests}))


def _put_in_place(working: Path, entry: Path, num_ids: int) -> None:
    for file in working.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if os.path.lexists(entry) and not _is_complete(entry, num_ids):
        if entry.is_symlink() or not entry.is_dir():
            entry.unlink()
        else:
            shutil.rmtree(entry, ignore_errors=True)
    try:
        os.rename(working, entry)
    except OSError:
        if not _is_complete(entry, num_ids):  # otherwise another process stored the same content first
            raise


def _is_complete(entry: Path, num_ids: int) -> bool:
    """Whether the digests match and the arrays are valid (a digest can be forged)."""
    try:
        expected = read_json(entry / "cache.json", 1 << 16)["sha256"]
        if any(_digest(entry / f"{name}.npy") != expected[name] for name in _ARRAYS):
            return False
        tokens, piece_ends, first_pieces = (np.load(entry / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return False
    return (
        tokens.ndim == piece_ends.ndim == first_pieces.ndim == 1
        and tokens.dtype == _id_type(num_ids)
        and piece_ends.dtype == first_pieces.dtype == np.int64
        and len(piece_ends) > 0 < len(first_pieces)
        and first_pieces[0] == 0
        and first_pieces[-1] == len(piece_ends)
        and bool((np.diff(first_pieces) >= 2).all())  # a question and an answer at least
        and bool((np.diff(piece_ends, prepend=0) >= 0).all())
        and piece_ends[-1] == len(tokens)
        and (len(tokens) == 0 or int(tokens.max()) < num_ids)
    )


def _num_ids(vocabulary: Vocabulary) -> int:
    """One more than the largest id; some tokenizers skip ids."""
    return max(vocabulary.tokenizer.get_vocab().values(), default=0) + 1


def _id_type(num_ids: int) -> type[np.unsignedinteger]:
    return np.uint16 if num_ids <= 1 << 16 else np.uint32


def _digest(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
