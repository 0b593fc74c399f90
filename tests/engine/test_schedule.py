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


@pytest.mark.parametrize("name", NAMES)
def test_the_recorded_rate_is_the_one_that_the_step_applied(name):
    """The last step of a decay is not at 0."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scheduler = LambdaLR(optimizer, schedule(name, 0, 8))

    def step():
        optimizer.step()
        scheduler.step()

    stock = SimpleNamespace(
        step=step,
        was_step_applied=lambda: True,
        get_lr=lambda: [group["lr"] for group in optimizer.param_groups],
    )
    engine = SimpleNamespace(_engine=stock, _optimizer=optimizer)
    for _ in range(8):
        before, weight.grad = weight.item(), torch.ones_like(weight)
        assert Engine.step(engine)
        assert engine.learning_rate == pytest.approx(before - weight.item()) and engine.learning_rate > 0
