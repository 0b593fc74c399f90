"""A record of the base model (weights, configuration, tokenizer) that a resumed run is compared with.

The record is made from the loaded model, not from its files: the model may move, and a folder, a .gguf file
and a snapshot of the hub's cache compare equal.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coconut_ds.data.tokenizer import Vocabulary

SAMPLES = 1024  # elements of each tensor whose values are hashed
CHUNK = 1 << 22  # elements summed at a time
# Configuration keys that do not affect what the model computes.
IGNORED_KEYS = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True)
class BaseRecord:
    """`weights` is None if checkpoints hold all weights."""

    weights: str | None
    config: Mapping[str, Any]
    tokenizer: str

    @classmethod
    def of(cls, base: PreTrainedModel, vocabulary: Vocabulary, with_weights: bool) -> Self:
        """Record a model that has its final weights and the special-token rows, but no adapters."""
        config = json.loads(base.config.to_json_string(use_diff=True))
        return cls(
            weights_digest(base, vocabulary.special_token_ids) if with_weights else None,
            {key: value for key, value in config.items() if key not in IGNORED_KEYS},
            vocabulary.digest(),
        )

    @classmethod
    def read(cls, values: Any) -> Self:
        """Read a record from JSON. Raises TypeError if it is not one."""
        record = cls(**values)
        if not (
            isinstance(record.weights, str | None)
            and isinstance(record.config, dict)
            and isinstance(record.tokenizer, str)
        ):
            raise TypeError("not the record of a base model")
        return record

    def differences(self, current: "BaseRecord") -> Iterator[tuple[str, Any, Any]]:
        """Yield (part, saved, current) for every difference.

        Configuration keys that only one of the two has come from another version and are not compared.
        """
        if self.weights and current.weights and self.weights != current.weights:
            yield "weights", self.weights, current.weights
        for key in sorted(self.config.keys() & current.config.keys()):
            if self.config[key] != current.config[key]:
                yield f"config.{key}", self.config[key], current.config[key]
        if self.tokenizer != current.tokenizer:
            yield "tokenizer", self.tokenizer, current.tokenizer


def weights_digest(base: PreTrainedModel, special_token_ids: Sequence[int]) -> str:
    """A short hash of all tensors, without the special-token rows, which are added here and may train.

    Per tensor: name, shape, evenly spaced elements, and the sum of all elements' bits. Changing one element
    always changes that sum; the order of additions does not.
    """
    digest = hashlib.sha256()
    modules: tuple[Any, Any] = (base.get_input_embeddings(), base.get_output_embeddings())
    vocabulary = {module.weight.data_ptr() for module in modules}
    for name, value in sorted(base.state_dict().items()):
        rows = special_token_ids if value.data_ptr() in vocabulary else ()
        for part in _without_rows(value, rows):
            flat = part.detach().cpu().flatten()
            sample = flat[:: max(1, flat.numel() // SAMPLES)].float()
            bits = sum(
                int(chunk.float().view(torch.int32).sum(dtype=torch.int64)) for chunk in flat.split(CHUNK)
            )
            digest.update(f"{name} {tuple(part.shape)} {bits}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def _without_rows(value: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
    if not rows:
        yield value
        return
    for before, after in pairwise([-1, *sorted(rows), len(value)]):
        if before + 1 < after:
            yield value[before + 1 : after]
