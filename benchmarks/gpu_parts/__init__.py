"""The parts of benchmarks/gpu.py, a module each.

cases(setting) -> ["case", ...]              what there is to measure
run(case, setting, seconds) -> {...}         one case, within the seconds that are left
ISOLATED = True                              a process for every case
LIMIT_GIB = CARD_GIB                         GPU memory of its processes; without it, all there is
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GIB = 2**30
CARD_GIB = 10.22  # what an 11 GB GPU has for tensors: 11,264 MiB less 800


@dataclass(frozen=True)
class Setting:
    """Where to measure, and how large."""

    device: str  # "cuda" or "cpu"
    tiny: bool
    gib: float | None  # of GPU memory a process may use; None: all
    model: str | None = None  # SmolLM2-135M for part e

    def arguments(self) -> list[str]:
        """The same setting as a command line."""
        given = ["--model", self.model] if self.model else []
        given += ["--gib", str(self.gib)] if self.gib else []
        return ["--device", self.device, *(["--tiny"] if self.tiny else []), *given]

    def check(self) -> None:
        """Raises SystemExit where there is no such device."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no CUDA device; `--device cpu --tiny` is a dry run without one")
        if self.device == "cpu" and not self.tiny:
            raise SystemExit("on the CPU this is a dry run: add --tiny")

    def prepare(self) -> None:
        """Limit this process's GPU memory; attention as under an engine (engine.py, _choose_device)."""
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.device == "cuda" and self.gib is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.gib * GIB / total))
        elif self.device == "cpu":
            torch.set_num_threads(1)

    def described(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return {"device": name, "tiny": self.tiny, "limit_gib": self.gib}

    def forget(self) -> None:
        """Give cached memory back.  Raises after an error that leaves the GPU unusable to this process."""
        gc.collect()
        self.wait()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call, until the device has finished it."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def peak(self, call: Callable[[], Any]) -> int | None:
        """The allocator's peak in bytes during a call; None without a GPU."""
        if self.device != "cuda":
            call()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated()
