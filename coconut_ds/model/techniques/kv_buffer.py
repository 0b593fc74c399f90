"""One buffer of keys and values for all passes of a forward, with deferred gradients of the question's.

With a concatenating cache, every pass copies and saves its own full-length keys and values.  Here every layer
has one buffer for all columns of a batch; a pass writes its columns in place and reads the others there:

    keys      [ question | L0 | L1 | L2, answer ]     one tensor per layer
    pass 2                  ^ written, all columns read, with a mask that hides what comes later

dK and dV of the question's columns are computed once, in the first pass's backward, from what the later
passes leave (attention.py).  Those of the columns in between are summed in small tails.

Shapes: B rows, K key-value heads, N = B * K, S columns of a pass, T columns of the buffer, Q columns of the
first pass, M one-column passes, E head size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from coconut_ds.errors import ConfigError
from coconut_ds.model.techniques.passes import Context, Pass, Step, keeps_graph

if TYPE_CHECKING:
    from coconut_ds.model.techniques.attention import Wide

# On CUDA a buffer's columns are a multiple of this, so that batches of similar length share their shapes.
COLUMN_BUCKET = 32
WITHOUT_BUFFER = '"latent_memory": {"segmented_cache": false}'


class PassCache(Cache):
    """A cache that takes its lengths from the current pass."""

    def __init__(self, context: Context, step: Step) -> None:
        super().__init__(layers=[])
        self.context, self.step = context, step

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.context.current.start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.context.current.start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.context.current.start + query_length, 0


class ConcatenatingCache(PassCache):
    """Keys and values of each pass, joined on every read, as in transformers' DynamicCache."""

    def __init__(self, context: Context, step: Step) -> None:
        super().__init__(context, step)
        self.states: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        past = self.states.setdefault(layer_idx, [])
        index = self.step.passes.index(self.context.current)
        if not self.context.is_recomputing:
            past.append((key_states, value_states))
        pairs = [*past[:index], (key_states, value_states)]
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([key for key, _ in pairs], dim=2), torch.cat([value for _, value in pairs], dim=2)

    def forget_graph(self) -> None:
        """Release the graph; recomputation needs the values only."""
        for layer, pairs in self.states.items():
            self.states[layer] = [(key.detach(), value.detach()) for key, value in pairs]


class Mask:
    """Which columns a column sees, by one of the model's rules; what all layers of a step share."""

    def __init__(self, own: Tensor | None, rule: dict[str, Any]) -> None:
        self.own = own  # additive, of the pass that it was made for; None: causal
        self._rule = rule
        self._later: dict[int, Tensor] = {}
        self._make: Callable[[], None] | None = None

    def prepare(self, step: Step, num_columns: int, kv_heads: int, dtype: torch.dtype) -> None:
        """Say what the masks of later passes are for; they are made when the first one asks."""
        if self._make is None and not self._later:
            self._make = partial(self._make_later, step, num_columns, kv_heads, dtype)

    def later(self, run: Pass) -> Tensor:
        """Additive mask of a later pass, [N, 1, S, visible columns]; of one column, [N, 1, T]."""
        if self._make is not None:
            self._make()
            self._make = None
        return self._later[run.start]

    def _make_later(self, step: Step, num_columns: int, kv_heads: int, dtype: torch.dtype) -> None:
        first = step.passes[0].stop
        allowed_B1ST = sdpa_mask(
            **self._rule,
            q_length=step.passes[-1].stop - first,
            kv_length=num_columns,
            q_offset=first,
            attention_mask=None if step.mask_BT is None else step.mask_BT.bool(),
            allow_is_causal_skip=False,
        )
        assert allowed_B1ST is not None
        mask_B1ST = _additive(allowed_B1ST, first, dtype)
        for run in step.passes[1:]:
            own_B1ST = mask_B1ST[:, :, run.start - first : run.stop - first]
            if run.is_short:
                for start, stop in run.hidden:
                    own_B1ST[..., start:stop] = float("-inf")
            else:
                own_B1ST = run.visible(own_B1ST, dim=3)
            own_N1ST = own_B1ST.repeat_interleave(kv_heads, 0)
            self._later[run.start] = own_N1ST.squeeze(1) if run.is_short else own_N1ST


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Mask:
    """transformers' mask interface.

    A query in the left padding sees only itself: a softmax over nothing would be NaN.
    """
    allowed = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and (attention_mask is None or q_length == kv_length),
        **kwargs,
    )
    rule = {"batch_size": batch_size, **kwargs}
    return Mask(None if allowed is None else _additive(allowed, q_offset, dtype), rule)


def _additive(allowed_B1ST: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """0 where allowed and where a query sees itself, -inf elsewhere.

    Rows start at multiples of 8 elements: CUDA's memory-efficient kernel would copy any other mask in each
    layer.
    """
    *leading, columns = allowed_B1ST.shape
    padded = torch.zeros(*leading, -(-columns // 8) * 8, dtype=dtype, device=allowed_B1ST.device)
    mask_B1ST = padded[..., :columns]
    mask_B1ST.masked_fill_(~allowed_B1ST, float("-inf"))
    mask_B1ST.diagonal(offset, dim1=2, dim2=3).fill_(0)
    return mask_B1ST


class Slot(NamedTuple):
    """What the cache hands to attention: this pass's keys and values, and the layer's buffer."""

    key_BKSE: Tensor
    value_BKSE: Tensor
    layer: "Layer"
    cache: "KeyValueBuffer"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigError(
            "latent_memory.segmented_cache: the attention of this model computes with cached keys, which the "
            "buffer does not support; "
            f"write {WITHOUT_BUFFER} in the ds_config"
        )


class KeyValueBuffer(PassCache):
    """One buffer for all layers and columns."""

    def __init__(self, context: Context, step: Step, num_layers: int) -> None:
        super().__init__(context, step)
        self.num_layers = num_layers
        self.layers_of_buffer: list[Layer] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.layers_of_buffer:
            self._allocate(key_states)
        slot = Slot(key_states, value_states, self.layers_of_buffer[layer_idx], self)
        return slot, slot

    def open(self, index: int, key_BKSE: Tensor, mask: Mask, defers: bool) -> None:
        """Prepare a layer for the first pass."""
        if not self.layers_of_buffer:
            self._allocate(key_BKSE)
        layer = self.layers_of_buffer[index]
        dtype = torch.float64 if key_BKSE.dtype == torch.float64 else torch.float32
        mask.prepare(self.step, layer.keys_BKTE.shape[2], key_BKSE.shape[1], dtype)
        layer.mask, layer.defers = mask, defers

    def _allocate(self, key_BKSE: Tensor) -> None:
        B, K, _, E = key_BKSE.shape
        columns = self.step.passes[-1].stop
        if key_BKSE.is_cuda:
            columns = -(-columns // COLUMN_BUCKET) * COLUMN_BUCKET
        # Zeros, because a masked column counts with probability 0 and must be finite.
        buffer = key_BKSE.new_zeros(self.num_layers, 2, B, K, columns, E)
        tails = Tails(self.step.passes, self.num_layers)
        layers = [Layer(index, tails, states) for index, states in enumerate(buffer.unbind())]
        self.layers_of_buffer = layers
        self.step.layers += layers
        self.step.at_barrier.append(partial(_join, layers))


class Tails:
    """Sums of dK and dV of the later columns that other passes see, for all layers.

    first, stop: range of these columns.
    """

    def __init__(self, passes: Sequence[Pass], num_layers: int) -> None:
        self.num_layers = num_layers
        self.first = passes[0].stop
        stops = [stop for run in passes for _, stop in run.past]
        self.stop = max(stops + [run.stop for run in passes if run.is_short])
        self.clear()

    def clear(self) -> None:
        self._sums_LWNE: Tensor | None = None  # L: dK and dV of each layer
        self._of: list[tuple[Tensor, Tensor]] = []
        self._own: dict[int, tuple[Tensor, ...]] = {}

    def of(self, layer: "Layer") -> tuple[Tensor, Tensor]:
        """dK and dV, [N, columns, E]; allocated for all layers in the first backward."""
        if not self._of:
            N, _, E = layer.keys_NTE.shape
            self._sums_LWNE = layer.keys_NTE.new_zeros(2 * self.num_layers, self.stop - self.first, N, E)
            parts = self._sums_LWNE.transpose(1, 2).unbind()
            self._of = list(zip(parts[::2], parts[1::2], strict=True))
        return self._of[layer.index]

    def own(self, layer: "Layer", run: Pass) -> tuple[Tensor, ...]:
        """dK and dV of a pass of one column, [N, E]."""
        if run.start not in self._own:
            assert self._sums_LWNE is not None
            self._own[run.start] = self._sums_LWNE.select(1, run.start - self.first).unbind()
        return self._own[run.start][2 * layer.index : 2 * layer.index + 2]


class Layer:
    """One layer's keys and values, and what its later passes leave in the backward.

    Backward nodes hold it, so it holds neither the cache nor the step.
    """

    def __init__(self, index: int, tails: Tails, states_2BKTE: Tensor) -> None:
        self.index, self.tails, self.states_2BKTE = index, tails, states_2BKTE
        self.keys_BKTE, self.values_BKTE = states_2BKTE.unbind()
        self.keys_NTE, self.values_NTE = states_2BKTE.flatten(1, 2).unbind()
        self.mask: Mask | None = None
        self.defers = False  # whether the question's keys or values need a gradient
        # (Q, dO, P * D, dS) of one-column passes; joined, the last two of the question's columns
        self.records: list[tuple[Tensor, ...]] = []
        self.joined: list[Tensor] = []
        self.wide: list[Wide] = []

    def write(self, key_BKSE: Tensor, value_BKSE: Tensor, run: Pass) -> None:
        start, width = run.start, run.stop - run.start
        states_2BKSE = _in_one(key_BKSE, value_BKSE)
        if states_2BKSE is not None:
            self.states_2BKTE.narrow(3, start, width).copy_(states_2BKSE)
        else:
            self.keys_BKTE.narrow(2, start, width).copy_(key_BKSE)
            self.values_BKTE.narrow(2, start, width).copy_(value_BKSE)

    def first_states(self, run: Pass | None, key_BKQE: Tensor, value_BKQE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the first pass's states, unless run is None; returns them as the buffer has them."""
        if run is not None:
            self.write(key_BKQE, value_BKQE, run)
        Q = key_BKQE.shape[2]
        # `data` has a version counter of its own, so autograd does not mistake what later passes write
        # elsewhere in the buffer for a change of these columns.
        return self.keys_BKTE[:, :, :Q].data, self.values_BKTE[:, :, :Q].data

    def collect(self, dkey_BKQE: Tensor, dvalue_BKQE: Tensor, scale: float) -> None:
        """Add what the later passes left to the gradients of the question's keys and values, in place."""
        N, _, E = self.keys_NTE.shape
        sums = self.keys_NTE.new_empty(2, N, self.tails.first, E)
        beta = 0
        if self.joined:
            query, dout, weights, dscores = self.joined
            add_products(sums[0], sums[1], query, dout, weights, dscores, scale, beta)
            beta = 1
        for wide in self.wide:
            for block in wide.gradients():
                wide.add_products(block, 0, self.tails.first, sums[0], sums[1], beta)
                beta = 1
        if beta:
            dkey_BKQE.add_(sums[0].view(dkey_BKQE.shape))
            dvalue_BKQE.add_(sums[1].view(dvalue_BKQE.shape))
        self.clear()
        if not keeps_graph():
            del self.keys_NTE, self.values_NTE, self.keys_BKTE, self.values_BKTE, self.states_2BKTE

    def clear(self) -> bool:
        had_any = bool(self.records or self.joined or self.wide)
        self.records, self.joined, self.wide = [], [], []
        return had_any


def _in_one(key_BKSE: Tensor, value_BKSE: Tensor) -> Tensor | None:
    """Keys and values as one tensor, if one projection has made both."""
    distance = value_BKSE.storage_offset() - key_BKSE.storage_offset()
    strides = key_BKSE.stride()
    if distance <= 0 or strides != value_BKSE.stride():
        return None
    if key_BKSE.untyped_storage()._cdata != value_BKSE.untyped_storage()._cdata:
        return None
    return key_BKSE.as_strided((2, *key_BKSE.shape), (distance, *strides))


def _join(layers: list[Layer]) -> None:
    """Join the records of all layers, part by part.  No later pass is left."""
    tails = layers[0].tails
    tails.clear()
    recording = [layer for layer in layers if layer.records]
    if not recording:
        return
    parts = list(zip(*(record for layer in recording for record in layer.records), strict=True))
    for layer in recording:
        layer.records, layer.joined = [], []
    # Each part is released once it is joined: two copies of all of them would be the peak of short batches.
    while parts:
        joined = torch.cat(parts.pop(0), dim=1)
        if len(parts) < 2:
            joined = joined.narrow(2, 0, tails.first).contiguous()
        for layer, own in zip(recording, joined.chunk(len(recording), dim=1), strict=True):
            layer.joined.append(own)


def add_products(
    dkeys_NTE: Tensor,
    dvalues_NTE: Tensor,
    query_NRE: Tensor,
    dout_NRE: Tensor,
    weights_NRT: Tensor,
    dscores_NRT: Tensor,
    scale: float,
    beta: int = 1,
) -> None:
    """Add the gradients of keys and values from some queries, in place; beta 0 overwrites."""
    # dK += scale dS^T Q,  dV += (P * D)^T dO
    dkeys_NTE.baddbmm_(dscores_NRT.mT, query_NRE, beta=beta, alpha=scale)
    dvalues_NTE.baddbmm_(weights_NRT.mT, dout_NRE, beta=beta)
