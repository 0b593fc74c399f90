"""One gradient per weight and backward, early, and the same as autograd's own."""

import gc
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from coconut_ds.memory.fake_run import LiveBytes
from coconut_ds.model.coconut import Coconut
from coconut_ds.thoughts import ThoughtSettings, build_thought
from tests.model.cases import (
    ARCHITECTURES,
    EQUAL_ROWS,
    HIDDEN,
    PLAIN,
    RAGGED_ROWS,
    assert_same_gradients,
    gradients,
    loss_and_gradients,
    make_batch,
    make_coconut,
    make_model,
)

DEFERRED = replace(PLAIN, deferred_weight_gradients=True)
TIED = replace(DEFERRED, supervised_logits_only=True)


def hook_order(coconut: Coconut, batch) -> list[str]:
    """Names of the parameters and of the layers whose first pass has ended, as the backward reaches them."""
    events: list[str] = []
    for name, parameter in coconut.causal_lm.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    loss = coconut(batch)
    loss.backward()
    return events


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hooks_fire_once_and_layer_by_layer(architecture):
    events = hook_order(make_coconut(architecture, TIED), make_batch(EQUAL_ROWS))
    assert len(events) == len(set(events))
    layers = [name.split(".")[2] for name in events if ".h." in name or ".layers." in name]
    assert layers == sorted(layers, reverse=True)
    assert layers[0] == "2" and layers[-1] == "0"


def test_unreduced_gradients_do_not_pile_up():
    """The reason to exist: without deferral all gradients wait for the first pass's backward."""
    live_gradients = {}
    for settings in (DEFERRED, PLAIN):
        coconut = make_coconut("gpt2", settings)
        bytes_of_layers = sum(p.numel() * 4 for p in coconut.causal_lm.transformer.h.parameters())
        for parameter in coconut.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loss = coconut(make_batch(((2, 3, 1),)))
        with LiveBytes() as live:
            loss.backward()
        live_gradients[settings] = live.peak / bytes_of_layers
    assert live_gradients[PLAIN] - live_gradients[DEFERRED] > 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accumulates_over_micro_batches(architecture):
    batches = [make_batch(EQUAL_ROWS, seed=1), make_batch(RAGGED_ROWS, seed=2)]
    totals = []
    for settings in (PLAIN, TIED):
        coconut = make_coconut(architecture, settings)
        for batch in batches:
            coconut(batch).backward()
        totals.append(gradients(coconut.causal_lm))
    assert_same_gradients(totals[1], totals[0])


def test_two_forwards_before_their_backwards():
    batches = [make_batch(EQUAL_ROWS, seed=1), make_batch(RAGGED_ROWS, seed=2)]
    totals = []
    for settings in (PLAIN, TIED):
        coconut = make_coconut("gpt2", settings)
        losses = [coconut(batch) for batch in batches]
        for loss in losses:
            loss.backward()
        totals.append(gradients(coconut.causal_lm))
    assert_same_gradients(totals[1], totals[0])


def test_second_backward_through_the_same_graph():
    coconut = make_coconut("gpt2", TIED)
    loss = coconut(make_batch(EQUAL_ROWS))
    loss.backward(retain_graph=True)
    once = gradients(coconut.causal_lm)
    loss.backward()
    assert_same_gradients(gradients(coconut.causal_lm), {name: 2 * g for name, g in once.items()})


@pytest.mark.parametrize("thought", ["pause", "mlp_projection", "learnable_window"])
def test_thoughts_that_cut_or_lengthen_the_graph(thought):
    """With `pause` nothing of the first pass's last MLP is used: its node runs for the later passes only."""
    batch = make_batch(EQUAL_ROWS)
    _, expected = loss_and_gradients(make_coconut("gpt2", PLAIN, thought=thought), batch)
    _, deferred = loss_and_gradients(make_coconut("gpt2", TIED, thought=thought), batch)
    assert_same_gradients(deferred, expected)


def test_frozen_weights_are_left_alone():
    results = []
    for settings in (PLAIN, TIED):
        coconut = make_coconut("llama", settings)
        for name, parameter in coconut.causal_lm.named_parameters():
            parameter.requires_grad_("q_proj" in name or "layers.1" in name)
        results.append(loss_and_gradients(coconut, make_batch(RAGGED_ROWS))[1])
    assert_same_gradients(results[1], results[0])


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_lora(architecture):
    targets = {"gpt2": ["c_attn", "c_proj"], "qwen2": ["q_proj", "down_proj"]}[architecture]
    results = []
    for settings in (
        PLAIN,
        replace(TIED, segmented_cache=True, fused_activations=True, activation_checkpointing="layers"),
    ):
        config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=architecture == "gpt2")
        base = get_peft_model(make_model(architecture), config)
        torch.manual_seed(3)
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        coconut = Coconut(base, build_thought("last_hidden", HIDDEN, ThoughtSettings()), settings).train()
        results.append(loss_and_gradients(coconut, make_batch(RAGGED_ROWS))[1])
    assert_same_gradients(results[1], results[0])


def test_a_queue_never_outgrows_the_weight():
    """A long answer: its pairs would take more than the gradient, so they are folded into it."""
    batch = make_batch(((3, 2, 40),) * 4)
    _, expected = loss_and_gradients(make_coconut("gpt2", PLAIN), batch)
    _, deferred = loss_and_gradients(make_coconut("gpt2", TIED), batch)
    assert_same_gradients(deferred, expected)


def test_loss_scaling():
    batch = make_batch(EQUAL_ROWS)
    _, expected = loss_and_gradients(make_coconut("gpt2", PLAIN), batch)
    coconut = make_coconut("gpt2", TIED)
    (coconut(batch) * 2**16).backward()
    assert_same_gradients({n: g / 2**16 for n, g in gradients(coconut.causal_lm).items()}, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_is_as_near_to_fp32_as_without(architecture):
    batch = make_batch(RAGGED_ROWS)
    _, exact = loss_and_gradients(make_coconut(architecture, PLAIN), batch)
    errors = []
    for settings in (PLAIN, replace(TIED, segmented_cache=True, fused_activations=True)):
        _, ours = loss_and_gradients(make_coconut(architecture, settings).to(torch.bfloat16), batch)
        assert all(gradient.dtype == torch.bfloat16 for gradient in ours.values())
        errors.append(
            sum((ours[n].float() - g).norm() / g.norm() for n, g in exact.items() if g.norm() > 1e-6)
        )
    assert errors[1] < 1.2 * errors[0]


def test_zero3_weights_are_not_deferred():
    """DeepSpeed marks the weights that it partitions with `ds_id`."""
    coconut = make_coconut("gpt2", TIED)
    for parameter in coconut.parameters():
        parameter.ds_id = 0
    loss = coconut(make_batch(EQUAL_ROWS))
    names, stack = set(), [loss.grad_fn]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        stack += [parent for parent, _ in node.next_functions]
    assert not {"_LinearProductBackward", "_RowLookupBackward", "_HeadLossBackward"} & names


def test_a_partial_backward_is_refused():
    """torch.autograd.grad of one weight runs a part of the graph, and queues of others would stay full."""
    coconut = make_coconut("gpt2", TIED)
    loss = coconut(make_batch(EQUAL_ROWS))
    with pytest.raises(RuntimeError, match="deferred_weight_gradients to false"):
        torch.autograd.grad(loss, [coconut.causal_lm.transformer.h[2].mlp.c_proj.weight])


@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_no_graph_is_left_behind(recompute):
    """Neither after a backward nor after a forward that never gets one; without the garbage collector."""
    settings = replace(TIED, segmented_cache=True, fused_activations=True, activation_checkpointing=recompute)
    coconut, batch = make_coconut("llama", settings), make_batch(RAGGED_ROWS)
    coconut(batch).backward()
    gc.collect()
    gc.disable()
    try:
        for parameter in coconut.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes() as live:
            coconut(batch).backward()
            after_backward = live.current
            coconut(batch)
            after_forward = live.current
    finally:
        gc.enable()
    assert after_backward <= 64 and after_forward <= 64
