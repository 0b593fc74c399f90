"""Batched answers equal those of one prompt at a time, computed without a cache from the complete prefix."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.errors import DataError
from coconut_ds.model.coconut import AnswerCache
from tests.model.cases import ARCHITECTURES, LATENT_ID, PLAIN, make_batch, make_coconut

# (question, latents, <end> and a forced first step) of each prompt
PROMPTS = {
    "equal": ((9, 3, 1),) * 5,
    "ragged": ((9, 4, 1), (4, 1, 1), (6, 2, 3), (12, 0, 1), (3, 4, 2)),
    "no latents": ((9, 0, 1), (5, 0, 1), (7, 0, 1)),
    "alone": ((8, 3, 1),),
}


@torch.no_grad()
def textbook(model, ids, num_latents, max_new_tokens, eos_id):
    """One prompt: latents filled one by one, then tokens one by one, from the complete prefix each time."""
    lm = model.causal_lm
    embeds = lm.get_input_embeddings()(ids)[None]
    first = (ids == LATENT_ID).int().argmax() if num_latents else len(ids)
    for slot in range(int(first), int(first) + num_latents):
        hidden = lm.get_decoder()(inputs_embeds=embeds[:, :slot], use_cache=False).last_hidden_state
        embeds[:, slot] = hidden[:, -1]
    answer = []
    while len(answer) < max_new_tokens:
        token = lm(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()
        if token == eos_id:
            break
        answer.append(int(token))
        embeds = torch.cat([embeds, lm.get_input_embeddings()(token)[None, None]], dim=1)
    return answer


def prompt_of(batch, row):
    return batch.input_ids_BT[row][batch.attention_mask_BT[row].bool()]


def likely_end(model, batch):
    """A token that ends some answers early and some not."""
    answers = model.generate(batch, 12, eos_id=-1)
    return answers[0][2]


@pytest.mark.parametrize("settings", [PLAIN, LatentMemory()], ids=["plain", "techniques"])
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_is_one_by_one(architecture, prompts, settings):
    model = make_coconut(architecture, settings).eval()
    batch = make_batch(PROMPTS[prompts])
    eos_id = likely_end(model, batch)
    expected = [
        textbook(model, prompt_of(batch, row), latents, 12, eos_id)
        for row, (_, latents, _) in enumerate(PROMPTS[prompts])
    ]
    assert model.generate(batch, 12, eos_id) == expected
    assert len(expected[0]) < 12


def test_rows_that_finish_leave_and_the_rest_is_unchanged(monkeypatch):
    left = []
    keep = AnswerCache.keep
    monkeypatch.setattr(AnswerCache, "keep", lambda cache, rows: (left.append(len(rows)), keep(cache, rows)))
    model = make_coconut("gpt2", PLAIN).eval()
    batch = make_batch(PROMPTS["ragged"])
    eos_id = likely_end(model, batch)
    assert model.generate(batch, 12, eos_id) == [
        textbook(model, prompt_of(batch, row), latents, 12, eos_id)
        for row, (_, latents, _) in enumerate(PROMPTS["ragged"])
    ]
    assert left, "no row left early: choose another eos token"


def test_stream_yields_each_token_once():
    model = make_coconut("gpt2", PLAIN).eval()
    batch = make_batch(PROMPTS["equal"])
    eos_id = likely_end(model, batch)
    streamed = [[] for _ in range(5)]
    for tokens in model.stream(batch, 12, eos_id):
        for row, token in tokens.items():
            streamed[row].append(token)
    assert streamed == model.generate(batch, 12, eos_id)


def test_goes_on_while_other_ranks_do():
    model = make_coconut("gpt2", PLAIN).eval()
    batch = make_batch(PROMPTS["equal"])
    eos_id = likely_end(model, batch)
    calls = []
    answers = model.generate(batch, 12, eos_id, lambda done: calls.append(done) or False)
    assert answers == model.generate(batch, 12, eos_id)
    assert len(calls) == 11


POSITIONS = 16


@functools.cache
def short_model(architecture):
    """A model with few positions, learned ones where it learns them."""
    model = make_coconut(architecture, PLAIN).eval()
    model.causal_lm.config.max_position_embeddings = POSITIONS
    if architecture == "gpt2":
        decoder = model.causal_lm.transformer
        decoder.wpe = torch.nn.Embedding.from_pretrained(decoder.wpe.weight[:POSITIONS])
    return model


@st.composite
def prompts_up_to_the_last_position(draw):
    """(question, latents, <end>) of one to four prompts, many of them close to the model's length."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(2, POSITIONS) | st.integers(POSITIONS - 2, POSITIONS))
        latents = draw(st.integers(0, min(3, length - 2)))
        rows.append((length - latents - 1, latents, 1))
    return tuple(rows)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@given(prompts_up_to_the_last_position(), st.integers(1, 12), st.none() | st.integers(0, 9), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_row_has_its_own_limit(architecture, prompts, max_new_tokens, ends_at, others_go_on):
    """`ends_at`: the first answer's token that is the eos token; None: no answer ends early."""
    model = short_model(architecture)
    batch = make_batch(prompts)
    limits = [min(max_new_tokens, POSITIONS - sum(row) + 1) for row in prompts]
    expected = [
        textbook(model, prompt_of(batch, row), prompts[row][1], limit, eos_id=-1)
        for row, limit in enumerate(limits)
    ]
    assert [len(answer) for answer in expected] == limits
    eos_id = -1 if ends_at is None else expected[0][ends_at % limits[0]]
    expected = [answer[: answer.index(eos_id)] if eos_id in answer else answer for answer in expected]
    agree = {"agree": lambda done: False} if others_go_on else {}
    assert model.generate(batch, max_new_tokens, eos_id, **agree) == expected


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_prompt_longer_than_the_model_is_named_before_the_first_pass(architecture, monkeypatch):
    model = short_model(architecture)
    batch = make_batch(((5, 2, 1), (POSITIONS - 2, 2, 1)))
    monkeypatch.setattr(model, "_passes", None)
    with pytest.raises(DataError, match="row 2 has 17 tokens with its latents, .* 16 positions"):
        model.generate(batch, 4, eos_id=-1)
