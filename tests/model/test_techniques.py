"""Every subset of the techniques against the textbook loop: same loss, same gradients."""

import copy
import itertools

import pytest
import torch
from torch.utils._pytree import tree_map_only
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from benchmarks.textbook import textbook_loss
from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import collate
from coconut_ds.data.curriculum import Sample
from coconut_ds.model.coconut import Coconut
from coconut_ds.thoughts import ThoughtSettings, build_thought
from tests.model.cases import (
    ARCHITECTURES,
    EQUAL_ROWS,
    HIDDEN,
    MORE_ARCHITECTURES,
    NO_LATENT_ROWS,
    RAGGED_ROWS,
    VOCABULARY,
    assert_same_gradients,
    gradients,
    loss_and_gradients,
    make_batch,
    make_coconut,
    make_model,
)

ONE_LATENT_ROWS = ((9, 1, 3), (5, 1, 4))
NO_ANSWER_ROWS = ((9, 3, 0), (5, 2, 1))  # the last pass has one column
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


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_padding_on_the_right_changes_no_loss(architecture):
    left = make_batch(NO_LATENT_ROWS)
    samples = [
        Sample(row, tuple(ids[mask.bool()].tolist()), question, 0, question)
        for row, (ids, mask, (question, _, _)) in enumerate(
            zip(left.input_ids_BT, left.attention_mask_BT, NO_LATENT_ROWS, strict=True)
        )
    ]
    right = collate(samples, pad_id=0, loss_denominator=left.loss_denominator)
    assert right.shape[1] < left.shape[1]
    model = make_coconut(architecture, LatentMemory())
    expected, expected_gradients = loss_and_gradients(model, left)
    loss, loss_gradients = loss_and_gradients(model, right)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(loss_gradients, expected_gradients)


def test_layers_of_one_shape_with_and_without_bias():
    """GPT-Neo's output projection has a bias; its queries, keys and values have none."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_layers": 2, "num_heads": 4}
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 6, "attention_dropout": 0.0}
    config = GPTNeoConfig(**sizes, **kinds, embed_dropout=0.0, resid_dropout=0.0, max_position_embeddings=64)
    reference = GPTNeoForCausalLM(config).train()
    model = copy.deepcopy(reference)
    batch = make_batch(RAGGED_ROWS)
    textbook_loss(reference, batch).backward()
    thought = build_thought("last_hidden", HIDDEN, ThoughtSettings())
    Coconut(model, thought, LatentMemory(segmented_cache=False))(batch).backward()
    assert_same_gradients(gradients(model), gradients(reference))


@pytest.mark.parametrize("rows", [RAGGED_ROWS, ONE_LATENT_ROWS, NO_ANSWER_ROWS, NO_LATENT_ROWS])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_windows_positions_and_odd_schedules(architecture, rows):
    batch = make_batch(rows)
    reference = make_model(architecture)
    loss = textbook_loss(reference, batch)
    loss.backward()
    for checkpointing in ("none", "layers"):
        settings = LatentMemory(activation_checkpointing=checkpointing)
        ours, our_gradients = loss_and_gradients(make_coconut(architecture, settings), batch)
        assert ours == pytest.approx(loss.item(), rel=1e-6), settings
        assert_same_gradients(our_gradients, gradients(reference))


@pytest.mark.parametrize("checkpointing", ["none", "layers"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_hooks_that_return_views(architecture, checkpointing):
    """As DeepSpeed's hooks do in ZeRO-3: what modules take and return keeps its values, not its identity."""

    def views(tensors):
        return tree_map_only(torch.Tensor, lambda x: x.view_as(x), tensors)

    settings, batch = LatentMemory(activation_checkpointing=checkpointing), make_batch(RAGGED_ROWS)
    loss, expected = loss_and_gradients(make_coconut(architecture, settings), batch)
    coconut = make_coconut(architecture, settings)
    for module in coconut.causal_lm.modules():
        module.register_forward_pre_hook(
            lambda _, inputs, keywords: (views(inputs), views(keywords)), with_kwargs=True
        )
        module.register_forward_hook(lambda _, inputs, outputs: views(outputs))
    ours, our_gradients = loss_and_gradients(coconut, batch)
    assert ours == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(our_gradients, expected)
