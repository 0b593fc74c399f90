"""Operators per latent and layer: a further launch in a one-column pass is seen here."""

import pytest

from benchmarks.launches import count, make_batch, make_model, variant

# forward + backward of one more latent and one more layer:
# gpt2   norms 2 + 2, products 4 + 4, copies of q, k, v 3, attention 3 + 5, gelu 1 + 1, sums 2 + 2, cat 1
# llama  norms 12 + 10, products 7 + 7, rotation 4 + 4, copies 3, attention 3 + 5, gate 2 + 3, sums 2 + 5
PER_LATENT_AND_LAYER = {"gpt2": 30, "llama": 67}
LAYERS = {"gpt2": "n_layer", "llama": "num_hidden_layers"}
PER_LATENT = {"gpt2": 13, "llama": 25}  # the final norm, the thought and its embedding


def operators(name: str, layers: int, latents: int) -> int:
    loss_of = variant("coconut_ds", make_model(name, **{LAYERS[name]: layers}))
    return count(loss_of, make_batch(latents)).total


@pytest.mark.parametrize("name", PER_LATENT_AND_LAYER)
def test_operators_per_latent_and_layer(name):
    latent = {layers: operators(name, layers, 4) - operators(name, layers, 3) for layers in (2, 3)}
    assert latent[3] - latent[2] <= PER_LATENT_AND_LAYER[name]
    assert latent[2] - 2 * (latent[3] - latent[2]) <= PER_LATENT[name]
