"""An engine without DeepSpeed: one tensor file as shard."""

import shutil
from pathlib import Path
from typing import Any

import torch

from coconut_ds.distributed import Ranks


class FakeShards(Ranks):
    def __init__(self, weights: torch.Tensor, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(rank, world_size, torch.device("cpu"))
        self.weights = weights
        self.fails_in_save: Exception | None = None
        self.converted = False  # whether the shards came through a conversion

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
