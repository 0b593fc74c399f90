"""The learning rate equals that of the Transformers schedules of the same names."""

from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from coconut_ds.engine.engine import Engine, schedule

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def rates(build):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, found = build(optimizer), []
    for _ in range(25):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_rates_are_those_of_transformers(name, warmup_steps):
    theirs = rates(lambda optimizer: get_scheduler(NAMES[name], optimizer, warmup_steps, 20))
    assert rates(lambda optimizer: LambdaLR(optimizer, schedule(name, warmup_steps, 20))) == pytest.approx(
        theirs, abs=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_skipped_steps_leave_the_rate_of_that_many_steps_later(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = LambdaLR(optimizer, factor := schedule(name, 7, 20))
    engine = SimpleNamespace(_engine=SimpleNamespace(lr_scheduler=scheduler))
    optimizer.step()
    for skipped, position in ((2, 2), (3, 5), (10, 15)):
        Engine.skip_steps(engine, skipped)
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == 0.5 * factor(position)
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5 * factor(16)]
