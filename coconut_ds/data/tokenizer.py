"""Turn problems into token ids, in the text format of the Coconut release, and keep those of a file on disk.

{question}\\n  <|start-latent|> <|latent|>... <|end-latent|>  {step}\\n ...  ### {answer}<eos>

With `chat_template`, the question is a user's message in the tokenizer's chat template instead of a line.

    cache/tokens/3f0c....npz    tokens         ids of all pieces, one after the other
                                piece_ends     where each one ends: question, steps ..., answer, question, ...
                                first_pieces   which piece is each problem's question; last, their number
                                marks          of each problem: 1 for '#' in the answer, 2 for special tokens
"""

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from filelock import FileLock
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from coconut_ds.data.forms import local_file, use_cache_without_network
from coconut_ds.data.problems import Problem, each_problem
from coconut_ds.errors import ConfigError, DataError, first_line
from coconut_ds.files import counted, hash_file, meant_child, replace_bytes, run_folder_of, similar_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

START, LATENT, END = "<|start-latent|>", "<|latent|>", "<|end-latent|>"
HASHED, SPECIAL = 1, 2  # bits of `mark_of`
MAX_NAMED_TOKENS = 5
NEW_ROW_SOURCE = "<<"  # the new embedding rows start as a copy of this token's row (released code, run.py)

TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model")
CACHE_FORMAT = 4  # increase it when the text format or the arrays change
ARRAYS = ("tokens", "piece_ends", "first_pieces", "marks")  # of a cache entry
_CHUNK = 4_096  # problems tokenized at a time

# For every `from_pretrained`: never run code from a model folder, and do not ask whether to.
DATA_ONLY: Any = {"trust_remote_code": False}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with the three special tokens, and the ids that other modules use."""

    tokenizer: "PreTrainedTokenizerBase"
    start_id: int
    latent_id: int
    end_id: int
    eos_id: int
    pad_id: int
    chat: tuple[str, str] | None = None  # what the chat template writes before and after a question

    @property
    def special_token_ids(self) -> tuple[int, int, int]:
        return self.start_id, self.end_id, self.latent_id

    @property
    def new_row_source_ids(self) -> list[int]:
        """Ids whose embedding rows initialize the special tokens; empty if the tokenizer has no `<<`."""
        try:
            ids = self.tokenizer.encode(NEW_ROW_SOURCE, add_special_tokens=False)
        except Exception:  # a vocabulary without an unknown token raises no narrower type
            return []
        return [] if self.tokenizer.unk_token_id in ids else ids

    def digest(self) -> str:
        """A short hash of the tokenization rules and of the ids of special tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            rules: Any = [type(self.tokenizer).__name__, self.tokenizer.get_vocab()]
        else:
            rules = json.loads(backend.to_str())
            for changing in ("truncation", "padding"):  # state of the last call, not of the tokenizer
                rules.pop(changing, None)
        content = [
            rules,
            self.tokenizer.init_kwargs.get("add_bos_token"),
            *self.special_token_ids,
            self.eos_id,
            *(self.chat or ()),
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without eos and special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def spell(self, ids: Sequence[int]) -> str:
        """Text of ids with all special tokens visible, for display."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


@dataclass(frozen=True)
class TokenizedProblem:
    """Token ids of one problem: the question line, each step line, the answer with eos."""

    question: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    answer: tuple[int, ...]


def mark_of(problem: Problem, vocabulary: Vocabulary | None) -> int:
    """HASHED for '#' in the answer of a problem, and SPECIAL for special tokens in its text, added.

    Without a vocabulary, text of its eos token is not known.
    """
    text = "\n".join((problem.question, *problem.steps, problem.answer))
    names = [START, LATENT, END, *([str(vocabulary.tokenizer.eos_token)] if vocabulary else [])]
    return HASHED * ("#" in problem.answer) + SPECIAL * any(name in text for name in names)


def locate_model(model_id: str) -> tuple[str, dict[str, str]]:
    """The arguments of `from_pretrained`; for `folder/file.gguf`: (folder, {"gguf_file": file}).

    `a/b` is a path if a folder `a` is here, unless it is a model of the hub in the cache.  Raises ConfigError
    if model_id is a path that does not exist.
    """
    path = Path(model_id)
    looks_local = model_id.startswith((".", "/", "~")) or path.suffix == ".gguf" or model_id.count("/") > 1
    if not looks_local and "/" in model_id and Path(path.parts[0]).is_dir():
        looks_local = path.exists() or not _is_cached(model_id)
    if looks_local and not path.expanduser().exists():
        raise ConfigError(
            f"model_id: {model_id} does not exist{similar_path(path)}; give a Hugging Face id or an existing "
            "folder or .gguf file"
        )
    if (path / "experiment.yaml").is_file() and not (path / "config.json").is_file():
        raise ConfigError(
            f"model_id: {model_id} is a run folder; write the model that it started from, and in "
            f"load_model_path the checkpoint: {path / 'best'}"
        )
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        if child := meant_child(path, lambda entry: (entry / "config.json").is_file()):
            raise ConfigError(f"model_id: {model_id} has no config.json{child}")
        if child := meant_child(path, lambda entry: entry.suffix == ".gguf"):
            raise ConfigError(f"model_id: {model_id} is the folder of a .gguf file{child}")
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if not path.exists():
        use_cache_without_network()
    return model_id, {}


def is_on_this_machine(model_id: str) -> bool:
    """Whether the model is a local path or in the hub's cache.  Raises ConfigError for a missing path."""
    where, _ = locate_model(model_id)
    return Path(where).exists() or _is_cached(where)


def _is_cached(model_id: str) -> bool:
    """Whether the hub's cache has the model."""
    try:
        return isinstance(try_to_load_from_cache(model_id, "config.json"), str)
    except HFValidationError:  # no id that the hub could have
        return False


def where_to_load_from(model_id: str, what: str) -> str:
    """What to write for a model that cannot be loaded."""
    path = Path(model_id).expanduser()
    if (run := run_folder_of(path)) is not None and (run / "experiment.yaml").is_file():
        return f"  It belongs to the run {run}: write 'load_model_path: {model_id}', or export it."
    is_local = path.exists()
    no_folder = "" if is_local else f"{Path.cwd()} has no folder {model_id}. "
    return f"  {no_folder}Give a Hugging Face id (needs network or a filled cache){what}."


def load_vocabulary(model_id: str, chat_template: bool = False) -> Vocabulary:
    """Load the tokenizer of a Hugging Face id, a folder or a .gguf file, and add the special tokens.

    `chat_template`: put questions into the tokenizer's template.  transformers runs it in Jinja's sandbox.
    Raises ConfigError if it cannot be loaded, or has no end-of-sequence token or no template.
    """
    from transformers import AutoTokenizer  # loads torch, which `report` and `validate` do not need

    where, extra = locate_model(model_id)
    try:
        is_folder = not extra and Path(where).is_dir()
        if is_folder and not any(path for name in TOKENIZER_FILES for path in Path(where).glob(name)):
            raise ValueError("the folder has no tokenizer files, such as tokenizer.json")
        tokenizer: Any = AutoTokenizer.from_pretrained(where, **DATA_ONLY, **extra)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is empty; are vocab.json or tokenizer.json missing?")
        tokenizer.add_tokens([START, END, LATENT], special_tokens=True)
    except Exception as error:  # transformers and tokenizers raise anything on a damaged file
        raise ConfigError(
            f"model_id: cannot load a tokenizer from {model_id!r}: {first_line(error)}\n"
            + where_to_load_from(model_id, " or a folder with tokenizer files")
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model_id: the tokenizer of {model_id!r} has no eos token to end answers with; name one of its "
            'tokens in its tokenizer_config.json: "eos_token": "..."'
        )
    pad_id = tokenizer.pad_token_id
    return Vocabulary(
        tokenizer=tokenizer,
        start_id=tokenizer.convert_tokens_to_ids(START),
        latent_id=tokenizer.convert_tokens_to_ids(LATENT),
        end_id=tokenizer.convert_tokens_to_ids(END),
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.eos_token_id if pad_id is None else pad_id,
        chat=_around_question(tokenizer, model_id) if chat_template else None,
    )


def _around_question(tokenizer: Any, model_id: str) -> tuple[str, str]:
    question = "the question's place"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # there is no template, or it raises anything
        raise ConfigError(
            f"chat_template: the tokenizer of {model_id!r} has no chat template that works "
            f"({first_line(error)}); write 'chat_template: false'"
        ) from error
    before, question, after = text.partition(question)
    if not question:
        raise ConfigError(
            f"chat_template: the template of {model_id!r} leaves the question out; "
            "write 'chat_template: false'"
        )
    return before, after


def refuse_missing_rows(vocabulary: Vocabulary, config: "PretrainedConfig", model_id: str) -> list[str]:
    """Raise ConfigError for text tokens without a row in the embedding; a note for added tokens without one.

    `config`: the model's, which may have more rows than the tokenizer has tokens (padding).
    """
    num_rows = getattr(config.get_text_config(), "vocab_size", len(vocabulary.tokenizer))
    own = {id: text for text, id in vocabulary.tokenizer.get_vocab().items() if id >= num_rows}
    own = {id: text for id, text in sorted(own.items()) if text not in (START, LATENT, END)}
    if not own:
        return []
    named = ", ".join(map(repr, list(own.values())[:MAX_NAMED_TOKENS]))
    text = f"model_id: {counted(len(own), 'token')} of the tokenizer of {model_id!r} ({named}) "
    if all(id in vocabulary.tokenizer.added_tokens_decoder for id in own):
        return [f"{text}have no row in the model ({num_rows:,} rows); their rows start at random"]
    raise ConfigError(f"{text}have no row in the model ({num_rows:,} rows); use the model's own tokenizer")


def refuse_unsavable(vocabulary: Vocabulary, model_id: str) -> None:
    """Raise ConfigError for a tokenizer that a checkpoint could not contain, before training starts.

    Saves it once to a temporary folder.  A chat template's name becomes a file name, so it is checked first.
    """
    templates = vocabulary.tokenizer.chat_template
    for name in templates if isinstance(templates, dict) else ():
        if not isinstance(name, str) or not TEMPLATE_NAME.fullmatch(name):
            raise ConfigError(
                f"model_id: the tokenizer of {model_id!r} has a chat template named {str(name)[:80]!r}, "
                "which cannot be saved as a file; rename it to letters, digits, - and _, or delete it, in "
                "chat_template of tokenizer_config.json or in additional_chat_templates/"
            )
    with tempfile.TemporaryDirectory() as folder:
        try:
            vocabulary.tokenizer.save_pretrained(folder)
        except OSError:  # says nothing about the tokenizer: the disk of temporary files may be full
            return
        except Exception as error:  # transformers raises anything for settings of the wrong type
            raise ConfigError(
                f"model_id: the tokenizer of {model_id!r} cannot be saved, so checkpoints would fail: "
                f"{first_line(error)}; fix its tokenizer_config.json"
            ) from error


def tokenize(problems: Sequence[Problem], vocabulary: Vocabulary) -> list[TokenizedProblem]:
    """Tokenize every problem piece by piece, so that hiding a step does not change its neighbors' ids.

    Raises DataError for text that the tokenizer cannot encode.
    """

    def encode(texts: list[str], special: bool = False, is_data: bool = True) -> list[list[int]]:
        if not texts:
            return []
        # A special token in the data stays text; only `render` and the chat template insert special tokens.
        options = dict(add_special_tokens=special, split_special_tokens=is_data, return_attention_mask=False)
        try:
            return vocabulary.tokenizer(texts, **options)["input_ids"]
        except Exception as error:  # a word-level tokenizer without an unknown token raises nothing narrower
            raise DataError(_cannot_encode(texts, vocabulary, error)) from error

    if vocabulary.chat is None:
        questions = encode([problem.question + "\n" for problem in problems], special=True)
    else:
        before, after = encode([*vocabulary.chat], is_data=False)
        questions = [[*before, *ids, *after] for ids in encode([problem.question for problem in problems])]
    answers = encode(["### " + problem.answer for problem in problems])
    step_lines = iter(encode([step + "\n" for problem in problems for step in problem.steps]))
    return [
        TokenizedProblem(
            question=tuple(question),
            steps=tuple(tuple(next(step_lines)) for _ in problem.steps),
            answer=(*answer, vocabulary.eos_id),
        )
        for problem, question, answer in zip(problems, questions, answers, strict=True)
    ]


def _cannot_encode(texts: Sequence[str], vocabulary: Vocabulary, error: Exception) -> str:
    """The message for the first of `texts` that the tokenizer cannot encode."""
    for text in texts:
        try:
            vocabulary.tokenizer(text)
        except Exception:
            return (
                f"the tokenizer of model_id cannot encode {text.strip()[:80]!r} ({error}); "
                "use a tokenizer with an unknown token, or remove the text from the data"
            )
    return f"the tokenizer of model_id cannot encode the data ({error})"


class CachedProblems(Sequence[TokenizedProblem]):
    """The tokenized problems of a file as arrays; an index returns one, a slice a list of them."""

    def __init__(
        self, tokens: np.ndarray, piece_ends: np.ndarray, first_pieces: np.ndarray, marks: np.ndarray
    ):
        self.tokens, self.piece_ends, self.first_pieces, self.marks = tokens, piece_ends, first_pieces, marks

    def __len__(self) -> int:
        return len(self.first_pieces) - 1

    def num_pieces(self) -> np.ndarray:
        """Pieces of every problem: question, steps, answer."""
        return np.diff(self.first_pieces)

    def num_tokens(self) -> np.ndarray:
        """Tokens of every problem."""
        return np.diff(self.piece_ends[self.first_pieces[1:] - 1], prepend=0)

    @overload
    def __getitem__(self, index: int) -> TokenizedProblem: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedProblem]: ...
    def __getitem__(self, index: int | slice) -> TokenizedProblem | list[TokenizedProblem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        first, last = self.first_pieces[index % len(self) :][:2].tolist()
        start = int(self.piece_ends[first - 1]) if first else 0
        ends = self.piece_ends[first:last].tolist()
        ids = self.tokens[start : ends[-1]].tolist()
        cuts = [0, *(end - start for end in ends)]
        question, *steps, answer = (tuple(ids[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
        return TokenizedProblem(question, tuple(steps), answer)

    def is_valid(self, num_ids: int) -> bool:
        """Whether these arrays of a file from anywhere are what `_tokenize_file` makes."""
        tokens, ends, first, marks = self.tokens, self.piece_ends, self.first_pieces, self.marks
        return (
            all(
                isinstance(array, np.ndarray) for array in (tokens, ends, first, marks)
            )  # a damaged npz has bytes
            and tokens.ndim == ends.ndim == first.ndim == marks.ndim == 1
            and marks.dtype == np.uint8
            and len(marks) + 1 == len(first)
            and tokens.dtype == _id_type(num_ids)
            and ends.dtype == first.dtype == np.int64
            and len(ends) > 0 < len(first)
            and first[0] == 0
            and first[-1] == len(ends)
            and bool((np.diff(first) >= 2).all())  # a question and an answer at least
            and bool((np.diff(ends, prepend=0) >= 0).all())
            and ends[-1] == len(tokens)
            and (len(tokens) == 0 or int(tokens.max()) < num_ids)
        )


def cached_tokens(
    path: str | Path,
    vocabulary: Vocabulary,
    folder: str | Path | None = None,
    limit: int | None = None,
    fields: Mapping[str, Any] | None = None,
) -> CachedProblems:
    """The tokenized problems of a data file, from the cache; adds them if they are missing or damaged.

    The entry's name is a digest of the file's content, the tokenizer, the limit and the field names.
    If several ranks start at once, one tokenizes and the others wait.  `folder`: by default beside the file,
    else the user's cache.  Raises DataError like read_problems, and if the entry cannot be stored.
    """
    path = local_file(path)
    try:
        content = hash_file(path)
    except OSError:
        list(islice(each_problem(path), 1))  # raises a DataError with the reason and the fix
        raise
    key = f"{CACHE_FORMAT} {limit} {vocabulary.digest()} {content} {sorted((fields or {}).items())}"
    folder = Path(folder or _cache_folder(path))
    entry = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    num_ids = max(vocabulary.tokenizer.get_vocab().values(), default=0) + 1  # some tokenizers skip ids
    if (cached := _read_entry(entry, num_ids)) is not None:
        return cached
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if (cached := _read_entry(entry, num_ids)) is None:
                cached = _tokenize_file(each_problem(path, limit, fields), vocabulary, num_ids)
                _write_entry(entry, cached)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: the tokenized {path.name} cannot be stored ({error.strerror}); "
            "free disk space, or use a folder that can be written"
        ) from error
    return cached


def _cache_folder(path: Path) -> Path:
    from platformdirs import user_cache_path

    folder = path.parent / "cache" / "tokens"
    # Do not follow links: they may come with a received folder and lead anywhere.
    if os.access(path.parent, os.W_OK) and not folder.is_symlink() and not folder.parent.is_symlink():
        return folder
    return user_cache_path("coconut_ds") / "tokens"


def _id_type(num_ids: int) -> type[np.unsignedinteger]:
    return np.uint16 if num_ids <= 1 << 16 else np.uint32


def _tokenize_file(problems: Iterator[Problem], vocabulary: Vocabulary, num_ids: int) -> CachedProblems:
    tokens, piece_ends, first_pieces, marks = array("I"), array("q"), array("q", [0]), array("B")
    while chunk := list(islice(problems, _CHUNK)):
        for problem in tokenize(chunk, vocabulary):
            for piece in (problem.question, *problem.steps, problem.answer):
                tokens.extend(piece)
                piece_ends.append(len(tokens))
            first_pieces.append(len(piece_ends))
        marks.extend(mark_of(problem, vocabulary) for problem in chunk)
    ids = np.asarray(tokens).astype(_id_type(num_ids))
    return CachedProblems(ids, *map(np.asarray, (piece_ends, first_pieces, marks)))


def _read_entry(entry: Path, num_ids: int) -> CachedProblems | None:
    if entry.is_symlink() or not entry.is_file():
        return None
    try:
        with zipfile.ZipFile(entry) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > entry.stat().st_size:  # compressed, and perhaps without end
            return None
        with np.load(entry, allow_pickle=False) as arrays:
            cached = CachedProblems(*(arrays[name] for name in ARRAYS))
    except Exception:  # zipfile and numpy raise anything on a damaged file
        return None
    return cached if cached.is_valid(num_ids) else None


def _write_entry(entry: Path, cached: CachedProblems) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    content = io.BytesIO()
    np.savez(content, **{name: getattr(cached, name) for name in ARRAYS})
    replace_bytes(entry, content.getvalue())
