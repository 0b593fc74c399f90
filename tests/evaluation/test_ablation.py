"""What is put into the latent slots, and that the model then computes with it."""

from dataclasses import replace

import pytest
import torch

from coconut_ds.data.batching import PADDING_ROW
from coconut_ds.data.curriculum import Stage
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.ablation import (
    ABLATIONS,
    Ablator,
    Comparison,
    ablated_stage,
    parse_ablations,
    record_latents,
)
from coconut_ds.evaluation.evaluate import Prediction
from tests.model.cases import PLAIN, RAGGED_ROWS, make_batch, make_coconut

ROWS = ((9, 3, 2), (6, 3, 2), (7, 3, 2), (5, 3, 2))


def replaced(name, rows=ROWS, indices=None, model=None):
    """(latents before, latents after, the batch) of one ablation."""
    model = model or make_coconut("gpt2", PLAIN).eval()
    batch = make_batch(rows)
    batch = replace(batch, indices=indices or batch.indices)
    own = record_latents(model, batch)
    with Ablator(name, seed=0).on(model, batch):
        new = record_latents(model, batch)
    return own, new, batch


def test_intact_latents_are_recorded_twice_alike_and_the_thought_comes_back():
    model = make_coconut("gpt2", PLAIN).eval()
    thought = model.thought
    own, _, batch = replaced("zero", model=model)
    assert model.thought is thought
    assert torch.equal(own, record_latents(model, batch))


def test_zero():
    own, new, _ = replaced("zero")
    assert own.abs().sum() > 0
    assert new.abs().sum() == 0


def test_mean_of_the_rows_that_count():
    own, new, _ = replaced("mean", indices=(0, 1, 2, PADDING_ROW))
    expected = own[:3].mean(0)
    for row in range(4):
        torch.testing.assert_close(new[row], expected)


def test_mean_of_a_slot_leaves_out_rows_without_it():
    own, new, batch = replaced("mean", RAGGED_ROWS)
    assert batch.latents_per_row_B.tolist() == [4, 1, 2]
    torch.testing.assert_close(new[0, 1], (own[0, 1] + own[2, 1]) / 2)
    torch.testing.assert_close(new[0, 3], own[0, 3])


def test_noise_keeps_every_norm_and_no_direction():
    own, new, _ = replaced("noise")
    torch.testing.assert_close(new.norm(dim=-1), own.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(own, new, dim=-1).abs().max() < 0.9


def test_shuffle_moves_every_latent_inside_its_row():
    own, new, _ = replaced("shuffle")
    for row in range(len(own)):
        order = [next(k for k in range(3) if torch.equal(new[row, slot], own[row, k])) for slot in range(3)]
        assert sorted(order) == [0, 1, 2]
        assert all(k != slot for slot, k in enumerate(order))


def test_shuffle_leaves_a_single_latent():
    own, new, _ = replaced("shuffle", ((9, 1, 2), (6, 1, 2)))
    assert torch.equal(own, new)


def test_swap_gives_everybody_another_rows_latents():
    own, new, _ = replaced("swap", indices=(0, 1, 2, PADDING_ROW))
    for row, donor in ((0, 2), (1, 0), (2, 1)):
        assert torch.equal(new[row], own[donor])


def test_swap_of_a_lone_row_takes_an_earlier_batch():
    model = make_coconut("gpt2", PLAIN).eval()
    ablator = Ablator("swap", seed=0)
    first, lone = make_batch(ROWS), make_batch(((8, 3, 2),), seed=5)
    own = record_latents(model, first)
    with ablator.on(model, first):
        record_latents(model, first)
    with ablator.on(model, lone):
        assert torch.equal(record_latents(model, lone)[0], own[0])


def test_one_slot():
    own, new, _ = replaced("zero:2")
    assert new[:, 1].abs().sum() == 0
    assert torch.equal(new[:, [0, 2]], own[:, [0, 2]])


@pytest.mark.parametrize("name", ["zero", "swap"])
def test_answers_and_loss_come_from_the_changed_latents(name):
    """Against a model whose embeddings are overwritten by hand, in one ordinary pass."""
    model = make_coconut("gpt2", PLAIN).eval()
    batch = make_batch(ROWS)
    _, new, _ = replaced(name, model=model)
    embeds = model.embedding(batch.input_ids_BT).detach().clone()
    embeds[:, batch.first_latent : batch.first_latent + 3] = new
    logits = model.causal_lm(
        inputs_embeds=embeds, attention_mask=batch.attention_mask_BT, position_ids=batch.position_ids_BT
    ).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1)[batch.target_positions_N], batch.target_ids_N
    )
    with torch.no_grad(), Ablator(name, seed=0).on(model, batch):
        changed, tokens = model(batch), model.generate(batch, 1, eos_id=-1)
    torch.testing.assert_close(changed, expected.detach())
    assert [row[0] for row in tokens] == logits[:, -1].argmax(-1).tolist()
    assert abs(float(model(batch).detach()) - float(changed)) > 1e-4


def test_stages():
    stage = Stage(3, 5)
    assert ablated_stage(stage, "fewer") == Stage(3, 2)
    assert ablated_stage(stage, "none") == Stage(3, 0)
    assert all(ablated_stage(stage, name) == stage for name in ("zero", "shuffle", "swap:2"))


def test_names():
    assert parse_ablations("zero, swap:2,zero") == ("zero", "swap:2")
    assert parse_ablations("all") == ABLATIONS
    assert parse_ablations("all,swap:2, zero") == (*ABLATIONS, "swap:2")
    with pytest.raises(ConfigError, match="'zeros' is not an ablation"):
        parse_ablations("zero,zeros")
    with pytest.raises(ConfigError, match="'fewer:2'"):
        parse_ablations("fewer:2")


def test_comparison_counts_pairs():
    def answers(*rights):
        return [Prediction(i, "", "", "", right, False, i) for i, right in enumerate(rights)]

    intact = answers(*[True] * 12, *[False] * 4)
    ablated = answers(*[False] * 10, *[True] * 2, True, *[False] * 3)
    result = Comparison.between("zero", intact, ablated)
    assert (result.lost, result.gained, result.num_correct, result.num_items) == (10, 1, 3, 16)
    assert result.p_value == pytest.approx(2 * (1 + 11) / 2**11)
    assert result.mean_tokens == 7.5
    assert "7.5 tokens, lost 10, gained 1" in str(result)
