"""Collectives over all ranks, and an engine for evaluation only.  Does not import DeepSpeed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coconut_ds.data.batching import Batch
from coconut_ds.model.coconut import Coconut


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of ranks, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class Collectives:
    """Collective operations; `ranks` identifies this process."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @property
    def is_main(self) -> bool:
        return self.ranks.is_main

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    def barrier(self) -> None:
        dist.barrier()

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Exact sums (float64) of each value over the ranks. Collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks. Collective."""
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def any_over_ranks(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Collective."""
        return self.max_over_ranks([float(flag)])[0] > 0

    def all_over_ranks(self, flag: bool) -> bool:
        """Whether `flag` is true on every rank. Collective."""
        return not self.any_over_ranks(not flag)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank. Collective."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` on every rank. Collective."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]


class ReadingEngine(Collectives):
    """The complete model on every rank, without gradients or an optimizer, for evaluation."""

    zero_stage = 0

    def __init__(self, module: Coconut, ranks: Ranks, dtype: torch.dtype = torch.float32) -> None:
        self.ranks = ranks
        self.module = module.to(device=ranks.device, dtype=dtype).requires_grad_(False)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def loss(self, batch: Batch) -> Tensor:
        """Sum of this rank's token losses / `batch.loss_denominator`."""
        return self.module(batch)
