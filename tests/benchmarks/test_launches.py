"""Operators per latent and layer: a further launch in a one-column pass is seen here."""

import pytest
import torch

from benchmarks.launches import WARM_UP, LaunchCounter, count, make_batch, make_model, variant

# forward + backward of one more latent and one more layer:
# gpt2   norms 2 + 2, products 4 + 4, copies of q, k and v 2, attention 3 + 5, gelu 1 + 1, sums 2 + 2, cat 1
# llama  norms 12 + 10, products 7 + 7, rotation 4 + 4, copies 3, attention 3 + 5, gate 2 + 3, sums 2 + 5
PER_LATENT_AND_LAYER = {"gpt2": 29, "llama": 67}
RECORDED = {"gpt2": 29, "llama": 62}  # the rotation is one product, 1 + 1, and no query is copied
LAYERS = {"gpt2": "n_layer", "llama": "num_hidden_layers"}
PER_LATENT = {"gpt2": 13, "llama": 25}  # the final norm, the thought and its embedding


def operators(name: str, layers: int, latents: int, warm_up: int) -> int:
    loss_of = variant("coconut_ds", make_model(name, **{LAYERS[name]: layers}))
    batch = make_batch(latents)
    for _ in range(warm_up):
        loss_of(batch).backward()
    return count(loss_of, batch).total


@pytest.mark.parametrize("name", PER_LATENT_AND_LAYER)
@pytest.mark.parametrize("warm_up", [0, WARM_UP])
def test_operators_per_latent_and_layer(name, warm_up):
    latent = {n: operators(name, n, 4, warm_up) - operators(name, n, 3, warm_up) for n in (2, 3)}
    expected = RECORDED if warm_up else PER_LATENT_AND_LAYER
    assert latent[3] - latent[2] <= expected[name], latent
    assert latent[2] - 2 * (latent[3] - latent[2]) <= PER_LATENT[name], latent


@pytest.mark.parametrize("below_autograd", [False, True])
def test_a_reshape_that_copies_is_counted(below_autograd):
    x = torch.zeros(2, 3, 4).transpose(0, 1)
    with LaunchCounter() as counter:
        if below_autograd:
            with torch._C._AutoDispatchBelowAutograd():
                x.reshape(6, 4)
                x.reshape(3, 2, 4, 1)
        else:
            x.reshape(6, 4)
    assert counter.counts == {"clone": 1}
