"""Every subset of the techniques against the textbook loop: same loss, same gradients."""

import itertools

import pytest

from benchmarks.textbook import textbook_loss
from coconut_ds.config.deepspeed import LatentMemory
from tests.model.cases import (
    ARCHITECTURES,
    EQUAL_ROWS,
    NO_LATENT_ROWS,
    RAGGED_ROWS,
    assert_same_gradients,
    gradients,
    loss_and_gradients,
    make_batch,
    make_coconut,
    make_model,
)

SHAPES = {"equal": EQUAL_ROWS, "ragged": RAGGED_ROWS, "no_latents": NO_LATENT_ROWS}
SUBSETS = [
    LatentMemory(logits, 7, segments, deferred, recompute, fused)
    for logits, segments, deferred, recompute, fused in itertools.product(
        (True, False), (True, False), (True, False), ("none", "layers"), (True, False)
    )
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_subset_equals_the_textbook_loop(architecture, shape):
    batch = make_batch(SHAPES[shape])
    reference = make_model(architecture)
    loss = textbook_loss(reference, batch)
    loss.backward()
    for settings in SUBSETS:
        ours, our_gradients = loss_and_gradients(make_coconut(architecture, settings), batch)
        assert ours == pytest.approx(loss.item(), rel=1e-6), settings
        assert_same_gradients(our_gradients, gradients(reference))
