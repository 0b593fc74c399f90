"""Attention over segments against attention over the joined keys and values."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2LMHeadModel

from coconut_ds.errors import ConfigError
from coconut_ds.memory.fake_run import LiveBytes
from coconut_ds.model.techniques import segment_attention
from coconut_ds.model.techniques.segment_attention import Records, Segments
from coconut_ds.model.techniques.segments import (
    SegmentedCache,
    install_segmented_attention,
    segmented_attention,
    segmented_mask,
)
from tests.model.cases import (
    ARCHITECTURES,
    PLAIN,
    RAGGED_ROWS,
    assert_same_gradients,
    gpt2,
    loss_and_gradients,
    make_batch,
    make_coconut,
)

SEGMENTED = replace(PLAIN, segmented_cache=True)


class Layer(torch.nn.Module):
    """Enough of an attention layer for the interface."""

    num_key_value_groups = 2
    is_causal = True


def joined_attention(query, keys, values, keep=None, dropout=0.0):
    """softmax(q K^T / sqrt(E)) V over all columns, causal, in plain operations."""
    key = torch.cat(keys, 2).repeat_interleave(2, 1)
    value = torch.cat(values, 2).repeat_interleave(2, 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(
        key.shape[2] - query.shape[2] + 1
    )
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    if keep is not None:
        weights = weights * keep / (1 - dropout)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_three_passes(monkeypatch, dropout, block):
    """5, 1 and 3 columns through one cache; outputs and all gradients."""
    monkeypatch.setattr(segment_attention, "BLOCK_ELEMENTS", block)
    torch.manual_seed(0)
    lengths = (5, 1, 3)
    queries = [torch.randn(2, 4, n, 8, requires_grad=True) for n in lengths]
    keys = [torch.randn(2, 2, n, 8, requires_grad=True) for n in lengths]
    values = [torch.randn(2, 2, n, 8, requires_grad=True) for n in lengths]
    torch.manual_seed(1)
    cache, ours = SegmentedCache(), []
    for query, key, value in zip(queries, keys, values, strict=True):
        mask = segmented_mask(
            batch_size=2,
            q_length=query.shape[2],
            kv_length=cache.get_seq_length() + query.shape[2],
            q_offset=cache.get_seq_length(),
            dtype=torch.float32,
        )
        k, v = cache.update(key, value, 0)
        ours.append(segmented_attention(Layer(), query, k, v, mask, dropout=dropout)[0])
    torch.manual_seed(1)
    theirs = []
    for index, query in enumerate(queries):
        columns = sum(lengths[: index + 1])
        keep = torch.rand(2, 4, query.shape[2], columns) >= dropout if dropout else None
        theirs.append(joined_attention(query, keys[: index + 1], values[: index + 1], keep, dropout))
    inputs = [*queries, *keys, *values]
    weights = [torch.randn_like(out) for out in ours]
    got = torch.autograd.grad(sum((o * w).sum() for o, w in zip(ours, weights, strict=True)), inputs)
    wanted = torch.autograd.grad(sum((o * w).sum() for o, w in zip(theirs, weights, strict=True)), inputs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_blocks_change_nothing(monkeypatch, architecture):
    batch = make_batch(RAGGED_ROWS)
    _, expected = loss_and_gradients(make_coconut(architecture, PLAIN), batch)
    monkeypatch.setattr(segment_attention, "BLOCK_ELEMENTS", 100)
    _, ours = loss_and_gradients(make_coconut(architecture, SEGMENTED), batch)
    assert_same_gradients(ours, expected)


def test_a_latent_pass_does_not_copy_the_question():
    """What a further latent adds to the graph must not depend on the question's length."""
    growth = {}
    for question in (8, 48):
        held = {}
        for latents in (2, 6):
            coconut = make_coconut("llama", SEGMENTED)
            with LiveBytes() as live:
                loss = coconut(make_batch(((question, latents, 3),) * 2))
                held[latents] = live.current
            del loss
        growth[question] = held[6] - held[2]
    # Masks are shared by the layers and have one float per column.
    assert growth[48] - growth[8] <= 4 * 2 * 40 * 4 + 4 * 2 * 40 * 8


def test_padding_sees_itself_and_nothing_is_nan():
    attention = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    mask = segmented_mask(batch_size=2, q_length=4, kv_length=4, attention_mask=attention)
    visible = mask == 0
    assert visible[0, 0].tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, False, True, False],
        [False, False, True, True],
    ]
    assert visible[1, 0].equal(torch.ones(4, 4, dtype=torch.bool).tril())
    assert segmented_mask(batch_size=2, q_length=4, kv_length=4, attention_mask=None) is None


def test_an_architecture_without_exchangeable_attention_is_refused(monkeypatch):
    monkeypatch.setattr(GPT2LMHeadModel, "_supports_attention_backend", False)
    with pytest.raises(ConfigError, match="segmented_cache to false"):
        install_segmented_attention(gpt2())


def test_soft_capping_is_refused():
    key = torch.zeros(1, 2, 3, 8)
    pair = Segments((), key, key, (), Records())
    with pytest.raises(ConfigError, match="soft capping"):
        segmented_attention(Layer(), torch.zeros(1, 4, 3, 8), pair, pair, None, softcap=30.0)


def test_the_saved_configuration_does_not_name_our_attention(tmp_path):
    coconut = make_coconut("gpt2", SEGMENTED)
    coconut.causal_lm.save_pretrained(tmp_path)
    assert "coconut" not in (tmp_path / "config.json").read_text()
    assert GPT2LMHeadModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
