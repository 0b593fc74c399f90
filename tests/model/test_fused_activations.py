"""Fused activations and norms compute the originals' values and gradients, and change no file."""

import copy

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm

from coconut_ds.memory.fake_run import LiveBytes
from coconut_ds.model.techniques.deferred_grads import install_deferral
from coconut_ds.model.techniques.fused_activations import Recomputation, fuse_activations, recomputation_of
from coconut_ds.model.techniques.passes import Context, Step
from tests.model.cases import ARCHITECTURES, gpt2, make_model

MODULES = {
    "gelu_new": NewGELUActivation,
    "layer_norm": lambda: torch.nn.LayerNorm(16),
    "dropout": lambda: torch.nn.Dropout(0.3),
    "rms_norm": lambda: LlamaRMSNorm(16),
    "gated_mlp": lambda: LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)),
}


def pair(name, dtype=torch.float32):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(MODULES[name]()).to(dtype)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    fused = copy.deepcopy(plain)
    assert fuse_activations(fused, Context()) == 1
    return plain, fused


@pytest.mark.parametrize("name", MODULES)
def test_same_values_and_gradients(name):
    plain, fused = pair(name)
    x = torch.randn(3, 5, 16, requires_grad=True)
    weight = torch.randn(3, 5, 16)
    results = []
    for module in (plain, fused):
        torch.manual_seed(1)
        output = module(x)
        results.append([output, *torch.autograd.grad((output * weight).sum(), [x, *module.parameters()])])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["rms_norm", "gated_mlp", "dropout"])
def test_same_values_in_bf16(name):
    plain, fused = pair(name, torch.bfloat16)
    x = torch.randn(3, 5, 16, dtype=torch.bfloat16)
    with torch.random.fork_rng():
        expected = plain(x)
    assert torch.equal(expected, fused(x))


@pytest.mark.parametrize("name", ["gelu_new", "layer_norm", "rms_norm", "dropout"])
def test_recomputed_output_is_equal_bit_by_bit(name):
    _, fused = pair(name)
    output = fused(torch.randn(3, 5, 16, requires_grad=True))
    recomputation = recomputation_of(output)
    assert torch.equal(recomputation.function(*recomputation.inputs), output)
    assert not any(x.requires_grad for x in recomputation.inputs)


def test_a_recomputation_holds_no_tensor_in_its_function():
    """A tensor inside the function would stay through a checkpointed layer's forward."""
    fused = torch.nn.Sequential(NewGELUActivation(), torch.nn.Dropout(0.3))
    fuse_activations(fused, Context())
    cells = recomputation_of(fused(torch.randn(4, 4))).function.__closure__
    assert not any(isinstance(cell.cell_contents, (torch.Tensor, Recomputation)) for cell in cells)


@pytest.mark.parametrize("p, training", [(0.3, False), (0.0, True), (1.0, True)])
def test_dropout_that_draws_nothing_is_torchs_own(p, training):
    fused = torch.nn.Sequential(torch.nn.Dropout(p))
    assert fuse_activations(fused.train(training), Context()) == 1
    x = torch.ones(4, 4)
    assert torch.equal(fused(x), torch.zeros(4, 4) if training and p == 1 else x)


def test_an_adapter_keeps_a_mask_of_bytes_and_not_its_input():
    """Dropout behind an activation, as LoRA has it before the layer that is its own."""
    torch.manual_seed(0)
    adapter = torch.nn.Sequential(torch.nn.GELU("tanh"), torch.nn.Dropout(0.3), torch.nn.Linear(512, 1))
    adapter[0].__class__ = NewGELUActivation
    context = Context()
    fuse_activations(adapter, context)
    install_deferral(adapter, context)
    x = torch.randn(64, 512, requires_grad=True)
    with LiveBytes() as live, context.running(Step()):
        output = adapter(x)
        assert live.current < 1.1 * x.numel()  # bytes: the mask alone, x is there anyway
    del output


@pytest.mark.parametrize("name, most", [("gelu_new", 1), ("rms_norm", 1 + 1 / 16)])
def test_keeps_no_more_than_its_output(name, most):
    plain, fused = pair(name)
    x = torch.randn(64, 16, requires_grad=True)
    with LiveBytes() as live:
        output = fused(x)
        held = live.current
        del output
        original = plain(x)
        assert live.current > 1.9 * held
        del original
    assert held <= most * x.numel() * 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_of_weights_stay(architecture):
    model = make_model(architecture)
    names = list(model.state_dict())
    assert fuse_activations(model, Context()) > 0
    assert list(model.state_dict()) == names


def test_the_configuration_keeps_its_name(tmp_path):
    model = gpt2()
    fuse_activations(model, Context())
    model.save_pretrained(tmp_path)
    assert GPT2LMHeadModel.from_pretrained(tmp_path).config.activation_function == "gelu_new"
