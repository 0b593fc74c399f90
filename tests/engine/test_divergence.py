"""Divergence ends the run and saves the batch to a file."""

import json
import math
from pathlib import Path

import pytest
import torch

from coconut_ds.data.batching import Batch
from coconut_ds.engine.divergence import LossGuard
from coconut_ds.errors import Diverged


@pytest.fixture
def batch() -> Batch:
    ids = torch.tensor([[5, 6, 7]])
    return Batch.from_padded(ids, torch.ones_like(ids), torch.arange(3)[None], ids, latent_id=99)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("applied", [True, False])
def test_a_loss_that_is_not_finite(tmp_path: Path, batch: Batch, loss: float, applied: bool) -> None:
    guard = LossGuard(tmp_path, rank=3)
    guard.check(1, 0.5, True, [batch], [0.5])
    with pytest.raises(Diverged, match="loss of step 2"):
        guard.check(2, loss, applied, [batch, batch], [0.25, loss])
    records = json.loads((tmp_path / "diverged/step_2_rank_3.json").read_text())
    assert [record["loss"] for record in records][0] == 0.25 and records[1]["loss"] is None
    assert records[0]["input_ids"] == [[5, 6, 7]] and records[0]["problems"] == [0]


def test_an_overflow_is_not_the_end_but_many_in_a_row_are(tmp_path: Path, batch: Batch) -> None:
    guard = LossGuard(tmp_path, rank=0, max_skipped=3)
    for applied in (False, False, True, False, False):
        guard.check(1, 1.0, applied, [batch], [1.0])
    with pytest.raises(Diverged, match="3 steps in a row"):
        guard.check(9, 1.0, False, [batch], [1.0])


def test_a_loss_scale_at_its_minimum_is_a_divergence(monkeypatch):
    from coconut_ds.engine.engine import SCALER_AT_MINIMUM, Engine

    class Overflowing:
        def step(self):
            raise Exception(f"Current {SCALER_AT_MINIMUM} - cannot decrease scale anymore. Exiting run.")

    engine = Engine.__new__(Engine)
    engine._engine = Overflowing()
    monkeypatch.setattr(Engine, "_forget_powers_of_beta", lambda self: None)
    with pytest.raises(Diverged, match="train in fp32"):
        engine.step()
