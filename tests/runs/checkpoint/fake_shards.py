"""An engine without DeepSpeed: one tensor file as shard; its collectives use torch.distributed or nothing."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class FakeShards:
    def __init__(self, weights: torch.Tensor, rank: int = 0, world_size: int = 1) -> None:
        self.weights, self.rank, self.world_size = weights, rank, world_size
        self.fails_in_save: Exception | None = None
        self.converted = False  # whether the shards came through a conversion

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        holder = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def _file(self, folder: Path) -> Path:
        return folder / f"zero_rank_{self.rank}.pt"

    def save_shards(self, folder: Path, client_state: dict[str, Any]) -> None:
        if self.fails_in_save is not None:
            raise self.fails_in_save
        torch.save({"weights": self.weights, "client_state": client_state}, self._file(folder))

    def load_shards(self, folder: Path) -> dict[str, Any]:
        content = torch.load(self._file(folder), weights_only=True)
        self.weights = content["weights"]
        return content["client_state"]

    def convert_shards(self, folder: Path, target: Path) -> None:
        if self.fails_in_save is not None:
            raise self.fails_in_save
        for file in folder.iterdir():
            shutil.copy(file, target)

    def load_converted_shards(self, folder: Path) -> dict[str, Any]:
        self.converted = True
        return self.load_shards(folder)


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
