"""Turn problems into token ids, in the text format of the Coconut release.

{question}\\n  <|start-latent|> <|latent|>... <|end-latent|>  {step}\\n ...  ### {answer}<eos>
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from coconut_ds.data.problems import Problem
from coconut_ds.errors import ConfigError, DataError, first_line

START, LATENT, END = "<|start-latent|>", "<|latent|>", "<|end-latent|>"
NEW_ROW_SOURCE = "<<"  # the new embedding rows start as a copy of this token's row (released code, run.py)

TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")

# For every `from_pretrained`: never run code from a model folder, and do not ask whether to.
DATA_ONLY: Any = {"trust_remote_code": False}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with the three special tokens, and the ids that other modules use."""

    tokenizer: PreTrainedTokenizerBase
    start_id: int
    latent_id: int
    end_id: int
    eos_id: int
    pad_id: int

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


def locate_model(model_id: str) -> tuple[str, dict[str, str]]:
    """The arguments of `from_pretrained`; for `folder/file.gguf`: (folder, {"gguf_file": file}).

    Raises ConfigError if model_id is a path that does not exist.
    """
    path = Path(model_id)
    looks_local = model_id.startswith((".", "/", "~")) or path.suffix == ".gguf" or model_id.count("/") > 1
    if looks_local and not path.expanduser().exists():
        raise ConfigError(
            f"model_id: {model_id} does not exist; give a Hugging Face id or an existing folder or .gguf file"
        )
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return model_id, {}


def load_vocabulary(model_id: str) -> Vocabulary:
    """Load the tokenizer of a Hugging Face id, a folder or a .gguf file, and add the special tokens.

    Raises ConfigError if it cannot be loaded or has no end-of-sequence token.
    """
    where, extra = locate_model(model_id)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(where, **DATA_ONLY, **extra)
        tokenizer.add_tokens([START, END, LATENT], special_tokens=True)
    except Exception as error:  # transformers and tokenizers raise anything on a damaged file
        raise ConfigError(
            f"model_id: cannot load a tokenizer from {model_id!r}: {first_line(error)}\n"
            "  Give a Hugging Face id (needs network or a filled cache) or a folder with tokenizer files."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model_id: the tokenizer of {model_id!r} has no eos token to end answers with")
    pad_id = tokenizer.pad_token_id
    return Vocabulary(
        tokenizer=tokenizer,
        start_id=tokenizer.convert_tokens_to_ids(START),
        latent_id=tokenizer.convert_tokens_to_ids(LATENT),
        end_id=tokenizer.convert_tokens_to_ids(END),
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.eos_token_id if pad_id is None else pad_id,
    )


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

    def encode(texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        # A special token in the data stays text; only `render` inserts special tokens.
        options = dict(add_special_tokens=special, split_special_tokens=True, return_attention_mask=False)
        try:
            return vocabulary.tokenizer(texts, **options)["input_ids"]
        except Exception as error:  # a word-level tokenizer without an unknown token raises nothing narrower
            raise DataError(_cannot_encode(texts, vocabulary, error)) from error

    questions = encode([problem.question + "\n" for problem in problems], special=True)
    answers = encode(["### " + problem.answer for problem in problems], special=False)
    step_lines = iter(encode([step + "\n" for problem in problems for step in problem.steps], special=False))
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
