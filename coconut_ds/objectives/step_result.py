"""The tokens of the step's result: of `<<3+5=8>>`, the 8.  A step without "=" ends with its result."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def targets(step_ids: tuple[int, ...], tokenizer: "PreTrainedTokenizerBase") -> Sequence[int]:
    text = str(tokenizer.decode(list(step_ids), clean_up_tokenization_spaces=False))
    result = result_of(text)
    if not result:
        return ()
    start = text.rindex(result)
    # As the step has them: behind a space, a word has other tokens than alone.
    before, until = (
        tokenizer.encode(part, add_special_tokens=False)
        for part in (text[:start].removesuffix(" "), text[: start + len(result)])
    )
    if until[: len(before)] == before:
        return until[len(before) :]
    return tokenizer.encode(result, add_special_tokens=False)


def result_of(step: str) -> str:
    """The text after the last '=' of a step (`<<3+4=7>>`: 7), else its last word."""
    step = step.strip()
    result = step.rpartition("=")[2] if "=" in step else step.rpartition(" ")[2]
    return result.strip(" .<>\n")
