"""A KV cache for generation: preallocated columns, and rows that can be dropped.

A concatenating cache copies all its keys and values for every new token.  This one allocates its buffers once
and returns views of their filled part; `keep` drops the rows with a complete answer.

Shapes: B rows, K key-value heads, S new columns, E head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class AnswerLayer(CacheLayerMixin):
    """One layer's keys and values, [B, K, columns, E]; the first `length` columns are filled."""

    is_sliding = False
    keys: Any  # a Tensor after the first update
    values: Any

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys = _allocate(key_states, self.columns)
        self.values = _allocate(value_states, self.columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, K, S, E]; returns all filled columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in transformers before 5.20."""
        return -1


class AnswerCache(Cache):
    """A cache of `num_layers` layers with room for `columns` columns."""

    def __init__(self, num_layers: int, columns: int) -> None:
        super().__init__(layers=[AnswerLayer(columns) for _ in range(num_layers)])

    def fill(self, columns: int) -> None:
        """Mark the first `columns` as filled, for a run on fake tensors."""
        for layer in self.layers:
            assert isinstance(layer, AnswerLayer)
            layer.length = columns

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        for layer in self.layers:
            assert isinstance(layer, AnswerLayer)
            layer.keep(rows)


def _allocate(states_BKSE: Tensor, columns: int) -> Tensor:
    B, K, _, E = states_BKSE.shape
    return torch.empty(B, K, columns, E, dtype=states_BKSE.dtype, device=states_BKSE.device)
