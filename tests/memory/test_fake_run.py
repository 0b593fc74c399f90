"""The tracker against sums done by hand, and fake tensors against real ones."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from coconut_ds.memory.fake_run import LiveBytes


def test_counts_new_storages_once():
    before = torch.zeros(1000)
    with LiveBytes() as live:
        x = torch.zeros(100)
        view, same = x.view(10, 10), x.add_(1)
        old = before.view(10, 100)
        assert live.current == 400
        y = x + 1
        assert live.current == 800
        del y
        assert live.current == 400
        del x, view
        assert live.current == 400
        del same, old
        assert live.current == 0
    assert live.peak == 800


def step(width: int) -> int:
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    with LiveBytes() as live:
        model(torch.ones(16, width)).sum().backward()
    return live.peak


def test_fake_tensors_take_the_same_bytes():
    real = step(32)
    with FakeTensorMode():
        assert step(32) == real
