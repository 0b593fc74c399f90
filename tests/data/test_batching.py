"""Batches: aligned latents, exact labels, equal work on every rank, every problem once."""

import random
from itertools import chain

import pytest
import torch

from coconut_ds.data.batching import (
    NO_LABEL,
    Batch,
    BatchConfig,
    collate,
    epoch_order,
    evaluation_batches,
    training_steps,
)
from coconut_ds.data.curriculum import Stage, render
from coconut_ds.data.tokenizer import TokenizedProblem
from tests.data.test_curriculum import LATENT, VOCABULARY, experiment


def problems(count, seed=0):
    draw = random.Random(seed)
    words = lambda low, high: tuple(draw.randrange(50) for _ in range(draw.randint(low, high)))  # noqa: E731
    return [
        TokenizedProblem(
            words(2, 7), tuple(words(1, 4) for _ in range(draw.randint(1, 4))), (*words(1, 2), 104)
        )
        for _ in range(count)
    ]


def test_first_latents_share_a_column():
    samples = [render(p, Stage(2, 4), experiment(), VOCABULARY, i) for i, p in enumerate(problems(6))]
    batch = collate(samples, pad_id=0)
    first = (batch.input_ids_BT == LATENT).int().argmax(dim=1)
    assert (first == batch.first_latent).all()
    assert batch.num_latents == 4
    for row, sample in enumerate(samples):
        shown = batch.input_ids_BT[row][batch.attention_mask_BT[row].bool()]
        assert tuple(shown.tolist()) == sample.tokens
        labels = batch.labels_BT[row]
        assert tuple(labels[labels != NO_LABEL].tolist()) == sample.tokens[sample.num_prompt :]
        positions = batch.position_ids_BT[row][batch.attention_mask_BT[row].bool()]
        assert positions.tolist() == list(range(len(sample.tokens)))


def test_targets_are_the_shifted_labels():
    batch = collate(
        [render(p, Stage(1, 2), experiment(), VOCABULARY, i) for i, p in enumerate(problems(5))], 0
    )
    rows, columns = batch.target_positions_N // batch.shape[1], batch.target_positions_N % batch.shape[1]
    assert torch.equal(batch.labels_BT[rows, columns + 1], batch.target_ids_N)
    assert len(batch.target_ids_N) == int((batch.labels_BT != NO_LABEL).sum())


def test_rows_may_use_fewer_latents_than_there_are_columns():
    samples = [
        render(problems(1)[0], Stage(1, 2), experiment(), VOCABULARY),
        render(problems(1)[0], Stage(0, 0), experiment(), VOCABULARY),
    ]
    batch = collate(samples, 0, num_latents=4)
    assert batch.num_latents == 4
    seen = [batch.is_latent_B(batch.first_latent + k).tolist() for k in range(4)]
    assert seen == [[True, False], [True, False], [False, False], [False, False]]


@pytest.mark.parametrize("method", ["coconut", "cot", "no_thoughts"])
def test_without_latents_rows_are_padded_on_the_right_only(method):
    settings = experiment(method=method)
    samples = [render(p, Stage(0, 0), settings, VOCABULARY, i) for i, p in enumerate(problems(6))]
    batch = collate([*samples, None], pad_id=0)
    lengths = [len(sample.tokens) for sample in samples]
    assert batch.shape == (7, max(lengths))
    columns = torch.arange(batch.shape[1])
    for row, length in enumerate([*lengths, lengths[0]]):
        assert torch.equal(batch.attention_mask_BT[row].bool(), columns < length)
        assert tuple(batch.input_ids_BT[row, :length].tolist()) == samples[row % 6].tokens


def test_from_padded_finds_what_collate_knew():
    made = collate(
        [render(p, Stage(1, 2), experiment(), VOCABULARY, i) for i, p in enumerate(problems(4))], 0
    )
    found = Batch.from_padded(
        made.input_ids_BT, made.attention_mask_BT, made.position_ids_BT, made.labels_BT, LATENT
    )
    assert (found.first_latent, found.num_latents) == (made.first_latent, made.num_latents)
    assert torch.equal(found.target_positions_N, made.target_positions_N)


def run_epoch(count, rows, accumulation, world_size, first_sample=0, **changes):
    settings = experiment(**changes)
    return [
        list(
            training_steps(
                problems(count),
                3,
                settings,
                VOCABULARY,
                BatchConfig(rows, accumulation, world_size, rank),
                first_sample,
            )
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(
    "count, rows, accumulation, world_size", [(23, 2, 3, 2), (8, 4, 1, 2), (9, 4, 2, 1), (5, 1, 2, 4)]
)
def test_every_problem_once_and_every_rank_in_step(count, rows, accumulation, world_size):
    ranks = run_epoch(count, rows, accumulation, world_size, uniform_prob=0.5)
    assert len({tuple(len(step) for step in steps) for steps in ranks}) == 1
    used = [i for steps in ranks for i in chain.from_iterable(b.indices for b in chain(*steps)) if i >= 0]
    assert sorted(used) == list(range(count))
    for together in zip(*ranks, strict=True):
        for micro in zip(*together, strict=True):
            assert len({batch.num_latents for batch in micro}) == 1
        labels = sum(len(batch.target_ids_N) for share in together for batch in share)
        assert {batch.loss_denominator for share in together for batch in share} == {labels}


def test_steps_hold_the_same_problems_for_any_layout():
    def sets(rows, accumulation, world_size):
        ranks = run_epoch(24, rows, accumulation, world_size)
        return [
            {i for share in together for batch in share for i in batch.indices if i >= 0}
            for together in zip(*ranks, strict=True)
        ]

    assert sets(8, 1, 1) == sets(2, 4, 1) == sets(2, 2, 2) == sets(1, 2, 4)


def test_an_epoch_resumes_at_any_step():
    (complete,), (rest,) = run_epoch(23, 2, 2, 1), run_epoch(23, 2, 2, 1, first_sample=12)
    assert [b.indices for step in complete[3:] for b in step] == [b.indices for step in rest for b in step]


def test_an_epoch_resumes_with_other_ranks_and_rows():
    begun, rest = run_epoch(23, 2, 2, 1)[0][:3], run_epoch(23, 1, 1, 3, first_sample=12)
    used = [i for steps in (begun, *rest) for step in steps for batch in step for i in batch.indices]
    assert sorted(i for i in used if i >= 0) == list(range(23))


def test_order_depends_on_seed_and_epoch():
    assert epoch_order(50, 1, 2) == epoch_order(50, 1, 2)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_every_problem_once(world_size):
    ranks = [
        list(
            evaluation_batches(
                problems(10),
                Stage(1, 2),
                experiment(),
                VOCABULARY,
                BatchConfig(4, 1, world_size, rank),
                prompts=True,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    indices = [i for batches in ranks for batch in batches for i in batch.indices if i >= 0]
    assert sorted(indices) == list(range(10))
    assert all(len(batch.target_ids_N) == 0 for batches in ranks for batch in batches)
