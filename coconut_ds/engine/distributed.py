"""Ranks and their collectives, and an engine for evaluation only.  Does not import DeepSpeed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from coconut_ds.data.batching import Batch
from coconut_ds.errors import UserError
from coconut_ds.model.coconut import Coconut

Result = TypeVar("Result")


@dataclass(eq=False)
class Ranks:
    """This process among all ranks; every method is collective."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(reduced, op=operation)
        return reduced.tolist()

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Exact sums (float64) of each value over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any_over_ranks(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return self.max_over_ranks([float(flag)])[0] > 0

    def all_over_ranks(self, flag: bool) -> bool:
        """Whether `flag` is true on every rank."""
        return not self.any_over_ranks(not flag)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        holder = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action` on the main rank; return its result, or raise its UserError, on all ranks."""
        result, failure = None, None
        if self.is_main:
            try:
                result = action()
            except UserError as error:
                failure = error
        result, failure = self.broadcast_object((result, failure))
        if failure is not None:
            raise failure
        return result


class ReadingEngine(Ranks):
    """The complete model on every rank, without gradients or an optimizer, for evaluation."""

    zero_stage = 0

    def __init__(self, module: Coconut, ranks: Ranks, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(ranks.rank, ranks.world_size, ranks.device)
        self.module = module.to(device=ranks.device, dtype=dtype).requires_grad_(False)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def loss(self, batch: Batch) -> Tensor:
        """Sum of this rank's token losses / `batch.loss_denominator`."""
        return self.module(batch)
