"""Queues that pass work from one backward node to a later one, and the forward pass they belong to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class BackwardQueue:
    """Work that one backward node leaves for another node that runs later in the same backward.

    Holds no graph. A second backward through the same graph starts with an empty queue.
    """

    setting: str  # of latent_memory

    def __init__(self) -> None:
        self._is_watched = False

    @property
    def is_empty(self) -> bool:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def watch(self) -> None:
        """Have autograd check at the end of this backward that no work is left."""
        if not self._is_watched:
            self._is_watched = True
            torch.autograd.Variable._execution_engine.queue_callback(self._assert_collected)

    def _assert_collected(self) -> None:
        self._is_watched = False
        left_behind = not self.is_empty
        self.clear()
        if left_behind:
            raise RuntimeError(
                "this backward ran the later passes of a layer but not its first, so the layer's gradient is "
                "incomplete. Call backward() on the complete loss; for torch.autograd.grad() of some inputs "
                f"set latent_memory.{self.setting} to false."
            )


class WeightQueue(BackwardQueue):
    """Gradient contributions of the later passes to one weight."""

    setting = "deferred_weight_gradients"

    def __init__(self) -> None:
        super().__init__()
        self.anchor: Tensor | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.sums: list[Tensor] = []  # [product, bias sum] of pairs that outgrew the weight
        self.additions: list[
            Callable[[Tensor | None], Tensor]
        ] = []  # from other layers: gradient -> gradient

    @property
    def is_empty(self) -> bool:
        return not (self.pairs or self.sums or self.additions)

    def clear(self) -> None:
        self.pairs, self.sums, self.additions = [], [], []


class Deferral:
    """The forward in progress: which layers have run, and the queue of each.

    All deferring layers of a model share one instance. Outside `forward()` they act as ordinary layers.
    """

    def __init__(self) -> None:
        self._queues: dict[int, WeightQueue] | None = None
        self.is_recomputing = False

    @property
    def is_active(self) -> bool:
        return self._queues is not None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Enclose one forward of several passes, to be followed by one backward."""
        outer, self._queues = self._queues, {}
        try:
            yield
        finally:
            # Anchors hold the graph, and the graph must not outlive the loss.
            for queue in self._queues.values():
                queue.anchor = None
            self._queues = outer

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Enclose a recomputation in the backward: layers save the same tensors again and queue nothing."""
        self.is_recomputing = True
        try:
            with self.forward():
                yield
        finally:
            self.is_recomputing = False

    def queue_of(self, weight: Tensor) -> WeightQueue | None:
        """The queue of an embedding's weight that this forward has already looked up."""
        return None if self._queues is None else self._queues.get(id(weight))

    def open_queue(self, key: object) -> WeightQueue:
        """The queue of `key`: a linear layer, or an embedding's weight."""
        assert self._queues is not None
        return self._queues.setdefault(id(key), WeightQueue())

    def applies_to(self, weight: Tensor) -> bool:
        """Whether to defer a call on this weight now."""
        return (
            self._queues is not None
            and weight.requires_grad
            and torch.is_grad_enabled()
            and not is_partitioned(weight)
            and not torch.is_autocast_enabled(weight.device.type)
        )


def is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 owns the weight, so that its gradient cannot be deferred.

    Such a weight exists only between the hooks of its module's own forward and backward, and a queue would
    need it at another time.
    """
    return hasattr(weight, "ds_id")


def take(items: list) -> list:
    """Empty `items` and return what it held."""
    taken = items[:]
    items.clear()
    return taken
