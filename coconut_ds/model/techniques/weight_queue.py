"""The queues of one model's weights, and the forward in progress that they belong to.

Knows: weights and the tokens of their first pass.  Does not know: layers, products, lookups.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from coconut_ds.model.techniques.backward_queue import BackwardQueue


class WeightQueue(BackwardQueue):
    """What the later passes of one forward owe to one weight."""

    setting = "deferred_weight_gradients"

    def __init__(self) -> None:
        super().__init__()
        self.token: Tensor | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.sums: list[Tensor] = []  # [product, bias sum] of pairs that outgrew the weight
        self.additions: list[Callable[[Tensor | None], Tensor]] = []  # parts of others: gradient -> gradient

    @property
    def is_empty(self) -> bool:
        return not (self.pairs or self.sums or self.additions)

    def clear(self) -> None:
        self.pairs, self.sums, self.additions = [], [], []


class Deferral:
    """The forward in progress of one model: which layers ran already, and their queues.

    One instance is shared by all deferring layers of a model; outside `forward()` they are ordinary layers.
    """

    def __init__(self) -> None:
        self._queues: dict[int, WeightQueue] | None = None
        self.is_replay = False

    @property
    def is_active(self) -> bool:
        return self._queues is not None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Everything inside is one forward of several passes, to be followed by one backward."""
        outer, self._queues = self._queues, {}
        try:
            yield
        finally:
            # The tokens hold the graph; the graph must not outlive the loss.
            for queue in self._queues.values():
                queue.token = None
            self._queues = outer

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Recomputation in the backward: layers save what they saved before, and queue nothing."""
        self.is_replay = True
        try:
            with self.forward():
                yield
        finally:
            self.is_replay = False

    def queue_of(self, weight: Tensor) -> WeightQueue | None:
        """The queue of an embedding's weight that was looked up already in this forward."""
        return None if self._queues is None else self._queues.get(id(weight))

    def open_queue(self, key: object) -> WeightQueue:
        """The queue of `key`: a linear layer, or an embedding's weight."""
        assert self._queues is not None
        return self._queues.setdefault(id(key), WeightQueue())

    def applies_to(self, weight: Tensor) -> bool:
        """Whether a call on this weight is to be deferred now."""
        return (
            self._queues is not None
            and weight.requires_grad
            and torch.is_grad_enabled()
            and not is_partitioned(weight)
            and not torch.is_autocast_enabled(weight.device.type)
        )


def is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 owns the weight, so that its gradient cannot be deferred.

    Such a weight exists only between the hooks of its module's own forward and backward; a queue would need
    it at another time.
    """
    return hasattr(weight, "ds_id")


def take(items: list) -> list:
    taken = items[:]
    items.clear()
    return taken
