"""Trainable rows of a frozen embedding, without a copy or a gradient of the complete matrix.

Shapes: B rows, T columns, N positions, K special tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn


class SpecialTokenRows(TrainableTokensLayer):
    """PEFT's trainable token rows with memory for K rows only.

    PEFT copies the V x D matrix with the new rows on every call, and autograd then fills a V x D gradient.
    Here the frozen layer runs unchanged, which is also where ZeRO-3 gathers its weight, and only the outputs
    of the K rows are replaced.  Saving and merging stay PEFT's.
    """

    base_layer: nn.Module
    special_token_ids_K: Tensor

    @classmethod
    def take_over(cls, layer: TrainableTokensLayer) -> None:
        """Turn a PEFT layer into this class, in place."""
        layer.__class__ = cls
        (ids,) = layer.token_indices.values()
        layer.register_buffer("special_token_ids_K", torch.tensor(ids), persistent=False)
        if layer.tied_adapter:
            layer.register_state_dict_post_hook(_drop_second_name)

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        plain = self.disable_adapters or self.merged or len(active_adapters) != 1
        if plain or self._get_embed_scale() is not None:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        (adapter,) = active_adapters
        rows_KD = self.trainable_tokens_delta[adapter]
        if isinstance(self.base_layer, nn.Embedding):
            return self._look_up(x, rows_KD)
        return self._score(x, rows_KD - self.trainable_tokens_original[adapter].to(rows_KD))

    def _look_up(self, ids_BT: Tensor, rows_KD: Tensor) -> Tensor:
        # y = rows[k] where id = special_token_ids[k], else E[id]
        hits_BTK = ids_BT[..., None] == self.special_token_ids_K
        special_BTD = nn.functional.embedding(hits_BTK.int().argmax(-1), rows_KD)
        frozen_BTD = self.base_layer(ids_BT)
        return torch.where(hits_BTK.any(-1, keepdim=True), special_BTD.to(frozen_BTD.dtype), frozen_BTD)

    def _score(self, hidden_ND: Tensor, change_KD: Tensor) -> Tensor:
        """Logits of a tied head: the frozen matrix's plus the change of the special tokens' columns."""
        # z = h E^T;  z[special_token_ids] += h (rows - original rows)^T
        logits_NV = self.base_layer(hidden_ND)
        change_NK = nn.functional.linear(hidden_ND, change_KD.to(hidden_ND.dtype))
        # In place: a linear layer's backward does not need its output.
        return logits_NV.index_add_(-1, self.special_token_ids_K, change_NK.to(logits_NV.dtype))


def _drop_second_name(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Drop the embedding's matrix from a tied head's state.

    A checkpoint without frozen weights would not recognize this second name and would save the matrix.
    """
    state.pop(f"{prefix}base_layer.weight", None)
