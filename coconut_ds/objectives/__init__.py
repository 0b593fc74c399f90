"""Latent supervision: the tokens of a hidden step that its latents are trained to predict.

    question . . .  <start>  [L0] [L1]  [L2] [L3]  <end> . . .      c_thought 2, steps <<3+5=8>> <<8+2=0>>
    step_tokens     <<       3    <<    8
    step_result     8             0

The column before a latent predicts its target through the LM head, as in LOTUS (arXiv 2606.31779): step k has
the c_thought latents of block k, and target i of a step belongs to latent i of its block.  A step with more
targets than latents is cut off at the end of its block; a latent without a target has no loss.

This folder is the registry: a module `NAME.py` with a function `targets(step_ids, tokenizer)`, which returns
token ids, defines `latent_supervision: NAME`.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def available_objectives() -> tuple[str, ...]:
    """Names of all objectives: the modules of this folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def latent_targets(
    name: str, steps: Sequence[tuple[int, ...]], c_thought: int, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[int, int]]:
    """Yield (latent slot, token id) of the hidden `steps` by the objective `name`."""
    for block, step in enumerate(steps):
        for place, token in enumerate(_targets(name, step, tokenizer)[:c_thought]):
            yield block * c_thought + place, token


@lru_cache(maxsize=1 << 16)
def _targets(name: str, step: tuple[int, ...], tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    module = importlib.import_module(f"{__name__}.{name}")
    return tuple(module.targets(step, tokenizer))
