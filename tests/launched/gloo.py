"""Collectives on the CPU that return when gloo has let go of their tensors.

A thread of gloo drops its hold on a tensor a moment after the collective has returned.  Where it is the last
to hold a gradient that was sent, the gradient seems to stay: torch's profiler follows no other threads.
"""

import functools

import torch
from torch import Tensor


def wait_for_gloo():
    """From now on, in this process."""
    for name in ("all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "all_gather"):
        setattr(torch.distributed, name, _waiting(getattr(torch.distributed, name)))


def _waiting(collective):
    @functools.wraps(collective)
    def wait(*arguments, **named):
        held = [(t, t._use_count()) for t in [*arguments, *named.values()] if isinstance(t, Tensor)]
        work = collective(*arguments, **named)
        while work is None and any(tensor._use_count() > count for tensor, count in held):
            pass
        return work

    return wait
