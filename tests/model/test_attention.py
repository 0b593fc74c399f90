"""Attention over the buffer against attention over joined keys and values."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from coconut_ds.errors import ConfigError
from coconut_ds.memory.fake_run import LiveBytes, looking_like_cuda
from coconut_ds.model.techniques import attention
from coconut_ds.model.techniques.attention import buffered_attention, install_buffered_attention
from coconut_ds.model.techniques.kv_buffer import KeyValueBuffer, make_mask
from coconut_ds.model.techniques.passes import Context, Pass, Step
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

BUFFERED = replace(PLAIN, segmented_cache=True)
COCONUT = (Pass(0, 5), Pass(5, 6, ((0, 5),)), Pass(6, 7, ((0, 6),)), Pass(7, 10, ((0, 7),)))
NO_SHORT = (Pass(0, 5), Pass(5, 8, ((0, 5),)))
# Every round sees the question and itself; the last passes see the question and the last round.
LOOPED = (
    Pass(0, 5),
    Pass(5, 8, ((0, 5),)),
    Pass(8, 11, ((0, 5),)),
    Pass(11, 13, ((0, 5), (8, 11))),
    Pass(13, 14, ((0, 5), (8, 13))),
    Pass(14, 16, ((0, 3), (8, 14))),
)
ALL_SHORT = (Pass(0, 5), Pass(5, 6, ((0, 5),)), Pass(6, 7, ((0, 3), (5, 6))))
SCHEDULES = {"coconut": COCONUT, "no_short": NO_SHORT, "looped": LOOPED, "all_short": ALL_SHORT}
B, H, K, E = 2, 4, 2, 8


class AttentionModule(torch.nn.Module):
    """Enough of an attention layer for the interface."""

    num_key_value_groups = H // K
    is_causal = True


def make_states(passes, dtype=torch.float32, seed=0):
    """Queries, keys and values of every pass."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, run):
        x = torch.randn(B, heads, run.stop - run.start, E, generator=generator)
        return x.to(dtype).requires_grad_()

    return tuple([draw(heads, run) for run in passes] for heads in (H, K, K))


def buffered(passes, queries, keys, values, mask_BT=None, dropout=0.0):
    """Outputs of every pass through one layer's buffer."""
    context, step = Context(), Step(passes, mask_BT=mask_BT)
    cache, outs = KeyValueBuffer(context, step, num_layers=1), []
    for run, query, key, value in zip(passes, queries, keys, values, strict=True):
        with context.running(step, run):
            mask = make_mask(
                batch_size=B,
                q_length=run.stop - run.start,
                kv_length=run.stop,
                q_offset=run.start,
                attention_mask=None if mask_BT is None else mask_BT[:, : run.stop],
                dtype=query.dtype,
            )
            slot, _ = cache.update(key, value, 0)
            query = step.enter(query) if run.past else query
            out = buffered_attention(AttentionModule(), query, slot, slot, mask, dropout=dropout)[0]
            outs.append(out if run.past else step.leave_first(out))
    step.forget_graph()
    return outs


def visible(passes, run, mask_BT=None):
    """[B, 1, S, T]: a column sees its pass causally and the ranges of its past; padding only itself."""
    columns = passes[-1].stop
    seen = torch.zeros(1 if mask_BT is None else B, 1, run.stop - run.start, columns, dtype=torch.bool)
    for start, stop in run.past:
        seen[..., start:stop] = True
    for row, column in enumerate(range(run.start, run.stop)):
        seen[:, :, row, run.start : column + 1] = True
    if mask_BT is not None:
        seen &= mask_BT[:, None, None]
    for row, column in enumerate(range(run.start, run.stop)):
        seen[:, :, row, column] = True
    return seen


def joined(passes, queries, keys, values, mask_BT=None, keeps=None, dropout=0.0):
    """softmax(q K^T / sqrt(E)) V over all columns, in plain operations."""
    key, value = (torch.cat(list(parts), 2).repeat_interleave(H // K, 1) for parts in (keys, values))
    outs = []
    for index, (run, query) in enumerate(zip(passes, queries, strict=True)):
        scores = query @ key.mT * E**-0.5
        weights = scores.masked_fill(~visible(passes, run, mask_BT), float("-inf")).softmax(-1)
        if keeps is not None:
            weights = weights * keeps[index] / (1 - dropout)
        outs.append((weights @ value).transpose(1, 2))
    return outs


def drawn_keeps(passes, dropout):
    """The masks that dropout draws, pass by pass, with the random numbers that follow."""
    columns, keeps = passes[-1].stop, []
    for run in passes:
        S = run.stop - run.start
        keep = torch.zeros(B, H, S, columns, dtype=torch.bool)
        if run.is_short:
            drawn = torch.native_dropout(torch.ones(B * K, H // K, columns), dropout, True)[1]
            keep[:] = drawn.view(B, H, 1, columns)
        else:
            seen = torch.cat([torch.arange(start, stop) for start, stop in run.ranges])
            drawn = torch.rand(B * K, H // K, S, len(seen)) >= dropout
            keep[..., seen] = drawn.view(B, H, S, len(seen))
        keeps.append(keep)
    return keeps


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_passes_equal_attention_over_all_visible_columns(monkeypatch, schedule, padded, block, dropout):
    """Outputs and all gradients."""
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", block)
    passes = SCHEDULES[schedule]
    states = make_states(passes)
    mask_BT = None
    if padded:
        mask_BT = torch.ones(B, passes[-1].stop, dtype=torch.bool)
        mask_BT[0, :2] = mask_BT[1, -1:] = False
    torch.manual_seed(1)
    ours = buffered(passes, *states, mask_BT=mask_BT, dropout=dropout)
    torch.manual_seed(1)
    keeps = drawn_keeps(passes, dropout) if dropout else None
    theirs = joined(passes, *states, mask_BT=mask_BT, keeps=keeps, dropout=dropout)
    inputs = [x for kind in states for x in kind]
    weights = [torch.randn_like(out) for out in ours]
    got = torch.autograd.grad(sum((o * w).sum() for o, w in zip(ours, weights, strict=True)), inputs)
    wanted = torch.autograd.grad(sum((o * w).sum() for o, w in zip(theirs, weights, strict=True)), inputs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("score", [448.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_of_16_bits(dtype, score):
    """Products past fp16's 65,504, and scores whose rounding to 16 bits would move the softmax."""
    states = make_states(COCONUT, torch.float32)
    with torch.no_grad():
        for kind in states[:2]:
            for x in kind:
                x.mul_((score * 2 / E) ** 0.5)
    states = tuple([x.detach().to(dtype).requires_grad_() for x in kind] for kind in states)
    largest = max(
        (q.double() @ k.double().repeat_interleave(2, 1).mT).abs().max()
        for q, k in zip(*states[:2], strict=True)
    )
    assert largest > score
    outs = buffered(COCONUT, *states)
    exact_states = tuple([x.detach().double().requires_grad_() for x in kind] for kind in states)
    exact = joined(COCONUT, *exact_states)
    precision = torch.finfo(dtype).eps
    torch.autograd.backward(sum(out.float().sum() for out in outs[1:]))
    torch.autograd.backward(sum(out.sum() for out in exact[1:]))
    for out, reference in zip(outs[1:], exact[1:], strict=True):
        assert (out.double() - reference).abs().max() < 4 * precision * reference.abs().max()
    for kind, exact_kind in zip(states, exact_states, strict=True):
        for x, reference in zip(kind[1:], exact_kind[1:], strict=True):
            error, size = (x.grad.double() - reference.grad).norm(), exact_kind[1].grad.norm()
            assert error <= 16 * precision * max(reference.grad.norm(), size) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dropout_in_16_bits(dtype):
    """A pass of one column with dropout, as GPT-2 trains: gradients as near to fp32's as 16 bits allow."""
    gradients = []
    for kind in (torch.float32, dtype):
        states = tuple(
            [x.detach().to(kind).requires_grad_() for x in part]
            for part in make_states(COCONUT, torch.float32)
        )
        torch.manual_seed(1)
        outs = buffered(COCONUT, *states, dropout=0.3)
        inputs = [x for part in states for x in part]
        gradients.append(torch.autograd.grad(sum(out.float().square().sum() for out in outs), inputs))
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == dtype
        assert (rounded.float() - exact).norm() <= 16 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_blocks_change_nothing(monkeypatch, architecture):
    batch = make_batch(RAGGED_ROWS)
    _, expected = loss_and_gradients(make_coconut(architecture, PLAIN), batch)
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", 100)
    _, ours = loss_and_gradients(make_coconut(architecture, BUFFERED), batch)
    assert_same_gradients(ours, expected)


def test_a_latent_pass_does_not_copy_the_question():
    """What a further latent adds to the graph: of the question's columns, probabilities and a mask only."""
    growth = {}
    for question in (8, 48):
        held = {}
        for latents in (2, 6):
            coconut = make_coconut("llama", BUFFERED)
            with LiveBytes() as live:
                loss = coconut(make_batch(((question, latents, 3),) * 2))
                held[latents] = live.current
            del loss
        growth[question] = held[6] - held[2]
    # 4 latents, 40 columns: probabilities of 3 layers, 2 rows and 4 heads; masks of 2 rows and 2 heads
    assert growth[48] - growth[8] <= 4 * 40 * 4 * (3 * 2 * 4 + 2 * 2)


def test_joining_records_needs_no_second_copy_of_all():
    """Only what the question's gradient needs is left, a part of the records after the other."""
    passes = (Pass(0, 8), *(Pass(t, t + 1, ((0, t),)) for t in range(8, 12)), Pass(12, 64, ((0, 12),)))
    step = Step(passes)
    cache = KeyValueBuffer(Context(), step, num_layers=3)
    cache.update(*(torch.zeros(2, 2, 8, 16) for _ in range(2)), 0)
    layers = cache.layers_of_buffer
    records = [[tuple(torch.randn(4, 1, n) for n in (16, 16, 64, 64)) for _ in passes[1:-1]] for _ in layers]
    parts = [[torch.cat(part, dim=1) for part in zip(*own, strict=True)] for own in records]
    expected = [[query, dout, weights[..., :8], dscores[..., :8]] for query, dout, weights, dscores in parts]
    with LiveBytes() as live:
        for layer, own in zip(layers, records, strict=True):
            layer.records = [tuple(x.clone() for x in record) for record in own]
        before = live.current
        for join in step.at_barrier:
            join()
    torch.testing.assert_close([layer.joined for layer in layers], expected, rtol=0, atol=0)
    complete, left = ([sum(4 * own[n].numel() for own in x) for n in range(4)] for x in (parts, expected))
    assert live.peak <= before + max(complete) and live.current == sum(left)


def test_padding_sees_itself_and_nothing_is_nan():
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    mask = make_mask(batch_size=2, q_length=4, kv_length=4, attention_mask=padding)
    seen = mask.own == 0
    assert seen[0, 0].tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, False, True, False],
        [False, False, True, True],
    ]
    assert seen[1, 0].equal(torch.ones(4, 4, dtype=torch.bool).tril())
    assert make_mask(batch_size=2, q_length=4, kv_length=4, attention_mask=None).own is None


def test_an_architecture_without_exchangeable_attention_is_refused(monkeypatch):
    monkeypatch.setattr(GPT2LMHeadModel, "_supports_attention_backend", False)
    with pytest.raises(ConfigError, match='"segmented_cache": false'):
        install_buffered_attention(gpt2())


def test_soft_capping_is_refused():
    key = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ConfigError, match="soft capping"):
        buffered_attention(AttentionModule(), torch.zeros(1, 4, 3, 8), key, key, None, softcap=30.0)


def test_the_saved_configuration_does_not_name_our_attention(tmp_path):
    coconut = make_coconut("gpt2", BUFFERED)
    coconut.causal_lm.save_pretrained(tmp_path)
    assert "coconut" not in (tmp_path / "config.json").read_text()
    assert GPT2LMHeadModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("columns", [5, 8, 13])
def test_rows_of_a_mask_are_aligned(columns):
    mask_BT = torch.ones(2, columns, dtype=torch.bool)
    mask_BT[0, :2] = False
    mask = make_mask(2, columns, columns, attention_mask=mask_BT).own
    assert mask.shape[-1] == columns and all(stride % 8 == 0 for stride in mask.stride()[:-1])


@pytest.mark.parametrize(
    ("dtype", "capability", "repeats"),
    [
        (torch.float32, (8, 6), True),
        (torch.float16, (7, 5), True),
        (torch.float16, None, True),
        (torch.bfloat16, (8, 0), False),
    ],
)
def test_grouped_heads_are_repeated_where_no_fused_kernel_takes_them(monkeypatch, dtype, capability, repeats):
    """Without a mask, as one row a micro-batch has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    seen = []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **options: seen.append((k, options))
    )
    with torch.device("meta"), looking_like_cuda():
        query, key = (torch.zeros(1, heads, 6, 4, dtype=dtype) for heads in (4, 2))
        attention._first_pass(query, key, key, None, None, 1.0, 0.0)
    ((used, options),) = seen
    assert used.shape[1] == (4 if repeats else 2) and options["enable_gqa"] == (not repeats)
