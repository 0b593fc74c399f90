"""Activation checkpointing: same numbers with dropout, less memory; Hugging Face's own switch is refused."""

from dataclasses import replace

import pytest
import torch

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.errors import ConfigError
from coconut_ds.memory.fake_run import LiveBytes
from coconut_ds.model import techniques
from coconut_ds.model.coconut import Coconut
from coconut_ds.thoughts import ThoughtSettings, build_thought
from tests.model.cases import (
    HIDDEN,
    NO_LATENT_ROWS,
    PLAIN,
    RAGGED_ROWS,
    gradients,
    make_batch,
    make_coconut,
    make_model,
)


def seeded_step(
    settings: LatentMemory, architecture: str, rows
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    coconut = make_coconut(architecture, settings, dropout=0.2)
    torch.manual_seed(5)
    loss = coconut(make_batch(rows))
    loss.backward()
    return loss.detach(), gradients(coconut.causal_lm)


@pytest.mark.parametrize("rows", [RAGGED_ROWS, NO_LATENT_ROWS], ids=["ragged", "no_latents"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("settings", [PLAIN, LatentMemory()], ids=["alone", "with_all"])
def test_dropout_is_reproduced(settings, architecture, rows):
    loss, expected = seeded_step(settings, architecture, rows)
    again, recomputed = seeded_step(replace(settings, activation_checkpointing="layers"), architecture, rows)
    assert torch.equal(loss, again)
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_dropout_with_deferral_is_the_same_dropout(architecture):
    loss, expected = seeded_step(PLAIN, architecture, RAGGED_ROWS)
    deferring = replace(PLAIN, deferred_weight_gradients=True, supervised_logits_only=True)
    again, deferred = seeded_step(deferring, architecture, RAGGED_ROWS)
    torch.testing.assert_close(again, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(deferred[name], gradient, atol=1e-5, rtol=1e-4)


def test_keeps_the_layers_inputs_and_the_cache_only():
    held = {}
    for recompute in ("none", "layers"):
        coconut = make_coconut("llama", replace(LatentMemory(), activation_checkpointing=recompute))
        with LiveBytes() as live:
            loss = coconut(make_batch(((40, 2, 4),) * 2))
            held[recompute] = live.current
        del loss
    assert held["layers"] < 0.6 * held["none"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_without_dropout_no_random_state_is_kept(architecture, monkeypatch):
    checkpointing, kept = replace(LatentMemory(), activation_checkpointing="layers"), []

    def checkpoint(*args, preserve_rng_state, **kwargs):
        kept.append(preserve_rng_state)
        return torch.utils.checkpoint.checkpoint(*args, preserve_rng_state=preserve_rng_state, **kwargs)

    expected = gradients_of(make_coconut(architecture, LatentMemory()))
    monkeypatch.setattr(techniques, "checkpoint", checkpoint)
    ours = gradients_of(make_coconut(architecture, checkpointing))
    assert {*kept} == {False} and all(torch.equal(ours[name], d) for name, d in expected.items())
    kept.clear()
    seeded_step(checkpointing, architecture, RAGGED_ROWS)
    assert {*kept} == {True}


def gradients_of(coconut: Coconut) -> dict[str, torch.Tensor]:
    coconut(make_batch(RAGGED_ROWS)).backward()
    return gradients(coconut.causal_lm)


def test_two_backwards_compute_a_layer_twice():
    coconut = make_coconut("llama", replace(LatentMemory(), activation_checkpointing="layers"))
    loss = coconut(make_batch(RAGGED_ROWS))
    loss.backward(retain_graph=True)
    once = gradients(coconut.causal_lm)
    loss.backward()
    for name, gradient in gradients(coconut.causal_lm).items():
        torch.testing.assert_close(gradient, 2 * once[name])


def coconut_of(model, settings) -> Coconut:
    return Coconut(model, build_thought("last_hidden", HIDDEN, ThoughtSettings()), settings)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_hugging_faces_switch_is_refused(architecture):
    model = make_model(architecture)
    model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="drops the KV cache"):
        coconut_of(model, PLAIN)


@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_hugging_faces_switch_is_refused_later_too(recompute):
    coconut = make_coconut("gpt2", replace(PLAIN, activation_checkpointing=recompute))
    coconut.causal_lm.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="drops the KV cache"):
        coconut(make_batch(RAGGED_ROWS))


def test_unknown_value_is_refused():
    with pytest.raises(ConfigError, match='"none" or "layers"'):
        make_coconut("gpt2", replace(PLAIN, activation_checkpointing="blocks"))
