"""All tokens of the step, one per latent (LOTUS); needs a c_thought near the length of a step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def targets(step_ids: tuple[int, ...], tokenizer: "PreTrainedTokenizerBase") -> Sequence[int]:
    return step_ids
