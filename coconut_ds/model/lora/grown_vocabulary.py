"""The embedding and the head that PEFT saves inside an adapter when the vocabulary grew before training.

Of these frozen matrices only the special-token rows are news: the others must be the base model's own.

Knows: PEFT's names.  Does not know: files, thoughts.
Shapes: K special tokens, D hidden size, V vocabulary.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coconut_ds.errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftModel

PREFIX = "base_model.model."


def take_vocabulary(base: "PeftModel", weights: dict[str, Tensor], file: Path) -> Tensor | None:
    """Take embedding and head out of an adapter's `weights`; return the special-token rows, rows_KD.

    None where the adapter has no embedding.  The rows of a head of its own are put into `base`.
    Raises CheckpointError where the other rows are not those of `base`.
    """
    causal_lm: Any = base.get_base_model()
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    adapter = embedding.token_adapter
    (special_token_ids,) = adapter.token_indices.values()
    given = {name: _take(causal_lm, module, weights) for name, module in (("in", embedding), ("out", head))}
    frozen = {"in": adapter.base_layer.weight, "out": _frozen_weight(head)}
    for name, given_VD in given.items():
        if given_VD is not None:
            _compare_rows(given_VD, frozen[name].detach(), special_token_ids, file)
    if given["out"] is not None and frozen["out"] is not frozen["in"]:
        with torch.no_grad():
            frozen["out"][special_token_ids] = given["out"][special_token_ids].to(frozen["out"])
    return None if given["in"] is None else given["in"][special_token_ids].to(frozen["in"])


def _take(causal_lm: Any, module: Any, weights: dict[str, Tensor]) -> Tensor | None:
    names = [name for name, other in causal_lm.named_modules() if other is module]
    taken = [weights.pop(f"{PREFIX}{name}.weight", None) for name in names]
    return next((value for value in taken if value is not None), None)


def _frozen_weight(head: Any) -> Tensor:
    adapter = getattr(head, "token_adapter", None)
    return (head if adapter is None else adapter.base_layer).weight


def _compare_rows(given_VD: Tensor, own_VD: Tensor, special_token_ids: list[int], file: Path) -> None:
    if given_VD.shape[1:] != own_VD.shape[1:] or len(given_VD) <= max(special_token_ids):
        raise CheckpointError(
            f"{file}: its embedding is {tuple(given_VD.shape)}, this model's {tuple(own_VD.shape)}; "
            "is model_id the model that it was trained on?"
        )
    rows = min(len(given_VD), len(own_VD))
    same_V = (given_VD[:rows] == own_VD[:rows].to(given_VD.dtype)).all(dim=1)
    same_V[list(special_token_ids)] = True
    if not bool(same_V.all()):
        raise CheckpointError(
            f"{file}: {int((~same_V).sum())} rows of its frozen embedding are not this model's own; "
            "is model_id the model that it was trained on?"
        )
