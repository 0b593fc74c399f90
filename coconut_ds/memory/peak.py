"""Peak memory of this process, cheap enough for every training run."""

import resource

import torch

MIB = 2**20


class PeakMeter:
    """GPU: peak of allocated tensors since `start`.  CPU: peak resident size of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def numbers(self) -> dict[str, float]:
        """MiB by name, and the allocator's retries, a sign of fragmentation."""
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
        """The peak as text for one log line."""
        numbers = self.numbers()
        if self._device.type == "cuda":
            return f"peak {numbers['gpu_allocated_peak_mib']:.0f} MiB GPU"
        return f"peak {numbers['host_rss_peak_mib']:.0f} MiB RSS"
