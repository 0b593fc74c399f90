"""The peak memory of this process, light enough to stay on during training.

Knows: the CUDA allocator's counters, the process's resident size.  Does not know: models, phases.
"""

import resource

import torch

MIB = 2**20


class PeakMeter:
    """Peak since `start`: tensors allocated on a GPU; on the CPU the process's resident size, ever."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def numbers(self) -> dict[str, float]:
        """MiB by name, and the allocator's retries (a sign of fragmentation)."""
        host = {"host_rss_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        if self._device.type != "cuda":
            return host
        statistics = torch.cuda.memory_stats(self._device)
        return {
            "gpu_allocated_peak_mib": torch.cuda.max_memory_allocated(self._device) / MIB,
            "gpu_reserved_peak_mib": torch.cuda.max_memory_reserved(self._device) / MIB,
            "gpu_alloc_retries": statistics.get("num_alloc_retries", 0),
            **host,
        }

    def summary(self) -> str:
        """The figure for a line on the screen."""
        numbers = self.numbers()
        if self._device.type == "cuda":
            return f"peak {numbers['gpu_allocated_peak_mib']:.0f} MiB GPU"
        return f"peak {numbers['host_rss_peak_mib']:.0f} MiB RSS"
