"""Fused activations and norms compute the originals' values and gradients, and change no file."""

import copy

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm

from coconut_ds.memory.live_bytes import LiveBytes
from coconut_ds.model.fused_activations import fuse_activations, recipe_of
from tests.model.cases import ARCHITECTURES, gpt2, make_model

MODULES = {
    "gelu_new": NewGELUActivation,
    "layer_norm": lambda: torch.nn.LayerNorm(16),
    "rms_norm": lambda: LlamaRMSNorm(16),
    "gated_mlp": lambda: LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)),
}


def pair(name, dtype=torch.float32):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(MODULES[name]()).to(dtype)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    fused = copy.deepcopy(plain)
    assert fuse_activations(fused) == 1
    return plain, fused


@pytest.mark.parametrize("name", MODULES)
def test_same_values_and_gradients(name):
    plain, fused = pair(name)
    x = torch.randn(3, 5, 16, requires_grad=True)
    weight = torch.randn(3, 5, 16)
    results = []
    for module in (plain, fused):
        output = module(x)
        results.append([output, *torch.autograd.grad((output * weight).sum(), [x, *module.parameters()])])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["rms_norm", "gated_mlp"])
def test_same_values_in_bf16(name):
    plain, fused = pair(name, torch.bfloat16)
    x = torch.randn(3, 5, 16, dtype=torch.bfloat16)
    assert torch.equal(plain(x), fused(x))


@pytest.mark.parametrize("name", ["gelu_new", "layer_norm", "rms_norm"])
def test_the_recipe_gives_the_output_bit_by_bit(name):
    _, fused = pair(name)
    output = fused(torch.randn(3, 5, 16, requires_grad=True))
    recipe = recipe_of(output)
    assert torch.equal(recipe.function(*recipe.inputs), output)
    assert not any(x.requires_grad for x in recipe.inputs)


@pytest.mark.parametrize("name, most", [("gelu_new", 1), ("rms_norm", 1)])
def test_keeps_no_more_than_its_output(name, most):
    plain, fused = pair(name)
    x = torch.randn(64, 16, requires_grad=True)
    with LiveBytes() as live:
        output = fused(x)
        held = live.current
        del output
        original = plain(x)
        assert live.current > 2 * held
        del original
    assert held <= most * x.numel() * 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_of_weights_stay(architecture):
    model = make_model(architecture)
    names = list(model.state_dict())
    assert fuse_activations(model) > 0
    assert list(model.state_dict()) == names


def test_the_configuration_keeps_its_name(tmp_path):
    model = gpt2()
    fuse_activations(model)
    model.save_pretrained(tmp_path)
    assert GPT2LMHeadModel.from_pretrained(tmp_path).config.activation_function == "gelu_new"
