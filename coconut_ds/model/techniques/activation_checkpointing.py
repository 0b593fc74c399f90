"""Activation checkpointing by layer that keeps the KV cache.

Hugging Face's own switch drops the cache with one warning, and a latent loop then trains on wrong logits.
Here a layer call is a function of tensors: hidden states in, hidden states and this pass's keys and values
out.  The cache is written once, outside the function; recomputation reads only the earlier passes.

    hidden, key, value = checkpoint(layer, hidden)      cache.write(key, value)

Passes of one column are cheap and run without checkpointing.
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from coconut_ds.errors import ConfigError
from coconut_ds.model.techniques.backward_queue import Deferral


class PureCache(Protocol):
    """A cache that can be read as it was after `num_past` passes."""

    def num_passes(self, layer_index: int) -> int: ...

    def read(self, key: Tensor, value: Tensor, layer_index: int, num_past: int) -> tuple[Any, Any]: ...

    def write(self, key: Tensor, value: Tensor, layer_index: int) -> None: ...

    def forget_graph(self) -> None: ...


class ConcatenatingCache(DynamicCache):
    """transformers' DynamicCache with the length of each layer after every pass."""

    layers: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lengths: dict[int, list[int]] = {}

    def num_passes(self, layer_index: int) -> int:
        return len(self._lengths.get(layer_index, []))

    def read(self, key: Tensor, value: Tensor, layer_index: int, num_past: int) -> tuple[Tensor, Tensor]:
        if num_past == 0:
            return key, value
        length, layer = self._lengths[layer_index][num_past - 1], self.layers[layer_index]
        return torch.cat([layer.keys[:, :, :length], key], 2), torch.cat(
            [layer.values[:, :, :length], value], 2
        )

    def write(self, key: Tensor, value: Tensor, layer_index: int) -> None:
        keys, _ = super().update(key, value, layer_index)
        self._lengths.setdefault(layer_index, []).append(keys.shape[2])

    def forget_graph(self) -> None:
        """Release the graph; recomputation needs the values only."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        self.write(key_states, value_states, layer_idx)
        return self.layers[layer_idx].keys, self.layers[layer_idx].values


def install_activation_checkpointing(model: PreTrainedModel, deferral: Deferral | None) -> None:
    """Route every decoder layer of `model` through `_checkpointed`.

    Raises ConfigError if the model has no such layers, or if Hugging Face's own switch is on.
    """
    refuse_native_checkpointing(model)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"latent_memory.activation_checkpointing: {type(model).__name__} does not support it; "
            'set it to "none"'
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        # Otherwise the layer drops the cache before it calls us.
        layer._can_checkpoint_with_cache = True
        layer._gradient_checkpointing_func = partial(_checkpointed, deferral)


def refuse_native_checkpointing(model: nn.Module) -> None:
    """Raise ConfigError if `gradient_checkpointing_enable()` was called on `model`."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        is_ours = isinstance(function, partial) and function.func is _checkpointed
        if getattr(module, "gradient_checkpointing", False) and not is_ours:
            raise ConfigError(
                "Hugging Face's gradient checkpointing drops the KV cache, so latent passes would not see "
                "the question. Do not call gradient_checkpointing_enable(); set "
                'latent_memory.activation_checkpointing to "layers" in the ds_config.'
            )


def _checkpointed(deferral: Deferral | None, call: partial, hidden_BTD: Tensor, *args: Any) -> Any:
    """Run `call(hidden, *args)`, a layer's forward, without saving its activations.

    `call` holds the layer's keyword arguments; the cache is one of these or of `args`.
    """
    if hidden_BTD.shape[1] == 1 or not torch.is_grad_enabled():
        return call(hidden_BTD, *args)
    cache: Any = next((x for x in (*args, *call.keywords.values()) if isinstance(x, Cache)), None)
    layer = _PureLayer(call, args, cache, deferral)
    output, key, value = checkpoint(layer, hidden_BTD, use_reentrant=False)
    if layer.position is not None:
        cache.write(key, value, layer.position[0])
    return output


class _PureLayer:
    """A decoder layer as a function of its hidden states; the second call is the recomputation."""

    def __init__(
        self, call: partial, args: tuple, cache: PureCache | None, deferral: Deferral | None
    ) -> None:
        self.call, self.args, self.cache = call, args, cache
        self.position: tuple[int, int] | None = None  # layer index in the cache, number of earlier passes
        self.deferral = deferral if deferral is not None and deferral.is_active else None
        self.is_recomputing = False

    def __call__(self, hidden_BTD: Tensor) -> tuple[Any, Tensor | None, Tensor | None]:
        if self.is_recomputing and self.deferral is not None:
            with self.deferral.recomputing():
                return self._run(hidden_BTD)
        self.is_recomputing = True
        return self._run(hidden_BTD)

    def _run(self, hidden_BTD: Tensor) -> tuple[Any, Tensor | None, Tensor | None]:
        if self.cache is None:
            return self.call(hidden_BTD, *self.args), None, None
        reader = _Reader(self.cache, self.position)
        args = [reader if x is self.cache else x for x in self.args]
        keywords = {name: reader if x is self.cache else x for name, x in self.call.keywords.items()}
        output = self.call.func(*self.call.args, hidden_BTD, *args, **keywords)
        self.position = reader.position
        return output, reader.key, reader.value


class _Reader(Cache):
    """A read-only view of the cache for one layer call: `update` returns what the cache would."""

    def __init__(self, cache: PureCache, position: tuple[int, int] | None) -> None:
        super().__init__(layers=[])
        self.cache, self.position = cache, position
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        self.key, self.value = key_states.contiguous(), value_states.contiguous()
        if self.position is None:
            self.position = layer_idx, self.cache.num_passes(layer_idx)
        return self.cache.read(self.key, self.value, *self.position)
