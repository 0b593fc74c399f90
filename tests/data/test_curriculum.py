"""The curriculum against the paper's tables, and the text format against the released code's rules."""

from dataclasses import replace

import pytest

from coconut_ds.config.experiment import Method, validate_experiment
from coconut_ds.data.curriculum import (
    ALL_STEPS,
    Stage,
    final_stage,
    is_stage_switch,
    mixed_stage,
    next_epoch,
    prompt_only,
    render,
    stage_at,
    stage_number,
)
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary

START, LATENT, END = 101, 102, 103
VOCABULARY = Vocabulary(None, START, LATENT, END, eos_id=104, pad_id=104)
PROBLEM = TokenizedProblem(question=(1, 2), steps=((3, 4), (5,), (6,)), answer=(7, 104))


def experiment(**changes):
    values = {
        "name": "test",
        "save_path": "runs",
        "model_id": "gpt2",
        "train_path": "train.json",
        "val_path": "valid.json",
        "method": "coconut",
        "c_thought": 2,
        "epochs_per_stage": 3,
        "max_latent_stage": 3,
        "num_epochs": 50,
        "uniform_prob": 0.0,
    }
    return validate_experiment(values | changes, "test")


@pytest.mark.parametrize(
    "epoch, expected",
    [
        (0, Stage(0, 0)),
        (2, Stage(0, 0)),
        (3, Stage(1, 2)),
        (8, Stage(2, 4)),
        (9, Stage(3, 6)),
        (12, Stage(ALL_STEPS, 6)),
        (49, Stage(ALL_STEPS, 6)),
    ],
)
def test_gsm8k_schedule(epoch, expected):
    assert stage_at(epoch, experiment()) == expected


@pytest.mark.parametrize("epoch, number", [(0, 0), (5, 0), (6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4)])
def test_paper_gives_the_first_stage_more_epochs(epoch, number):
    assert stage_number(epoch, experiment(epochs_per_stage=[6, 3])) == number


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"method": "cot"}, Stage(0, 0)),
        ({"method": "no_cot"}, Stage(ALL_STEPS, 0)),
        ({"method": "coconut"}, Stage(ALL_STEPS, 6)),
        ({"method": "coconut", "num_epochs": 8}, Stage(2, 4)),
        ({"method": "coconut", "only_eval": True, "resume": 9, "load_model_path": "c"}, Stage(3, 6)),
        ({"method": "no_thoughts"}, Stage(ALL_STEPS, 0)),
        ({"method": "icot"}, Stage(ALL_STEPS, 0)),
        ({"method": "icot", "icot_tokens_per_epoch": 8}, Stage(0, 0, hidden_tokens=8 * 49)),
        ({"method": "pause"}, Stage(ALL_STEPS, 6)),
        ({"method": "pause_as_thought"}, Stage(ALL_STEPS, 6)),
        ({"method": "without_curriculum"}, Stage(ALL_STEPS, 6)),
    ],
    ids=str,
)
def test_final_stage_is_the_one_of_the_last_epoch(changes, expected):
    assert final_stage(experiment(**changes)) == expected


def test_stages_beyond_the_last_have_its_number():
    late = experiment(epochs_per_stage=5, max_latent_stage=6)
    assert [stage_number(epoch, late) for epoch in (30, 35, 49)] == [6, 7, 7]
    token_wise = experiment(method="icot", icot_tokens_per_epoch=8)
    assert [stage_number(epoch, token_wise) for epoch in (0, 1, 49)] == [0, 1, 1]


def test_prosqa_evaluation_epoch_has_six_latents():
    assert stage_at(40, experiment(c_thought=1, epochs_per_stage=5, max_latent_stage=6)) == Stage(
        ALL_STEPS, 6
    )


@pytest.mark.parametrize(
    "method, epoch, expected",
    [
        ("cot", 30, Stage(0, 0)),
        ("no_cot", 0, Stage(ALL_STEPS, 0)),
        ("no_thoughts", 4, Stage(1, 0)),
        ("icot", 4, Stage(1, 0)),
        ("pause", 0, Stage(ALL_STEPS, 6)),
        ("without_curriculum", 0, Stage(ALL_STEPS, 6)),
        ("pause_as_thought", 4, Stage(1, 2)),
    ],
)
def test_methods_of_table_1(method, epoch, expected):
    assert stage_at(epoch, experiment(method=method)) == expected


def test_token_wise_icot_removes_more_every_epoch():
    icot = experiment(method="icot", icot_tokens_per_epoch=2)
    assert stage_at(0, icot).hidden_tokens == 0
    sample = render(PROBLEM, stage_at(1, icot), icot, VOCABULARY)
    assert sample.tokens == (1, 2, 5, 6, 7, 104)


def test_switches_are_where_the_stage_changes():
    assert [epoch for epoch in range(20) if is_stage_switch(epoch, experiment())] == [3, 6, 9, 12]


def test_render_replaces_leading_steps():
    assert render(PROBLEM, Stage(0, 0), experiment(), VOCABULARY).tokens == (
        1,
        2,
        START,
        END,
        3,
        4,
        5,
        6,
        7,
        104,
    )
    sample = render(PROBLEM, Stage(2, 4), experiment(), VOCABULARY, index=9)
    assert sample.tokens == (1, 2, START, LATENT, LATENT, LATENT, LATENT, END, 6, 7, 104)
    assert (sample.index, sample.num_prompt, sample.num_latents, sample.first_latent) == (9, 8, 4, 3)
    assert prompt_only(sample).tokens == sample.tokens[:8]
    assert render(PROBLEM, Stage(ALL_STEPS, 6), experiment(), VOCABULARY).tokens[-2:] == (7, 104)


def test_methods_without_latents_have_no_markers():
    assert render(PROBLEM, Stage(0, 0), experiment(method="cot"), VOCABULARY).tokens == (
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        104,
    )
    assert render(PROBLEM, Stage(ALL_STEPS, 0), experiment(method="no_cot"), VOCABULARY).tokens == (
        1,
        2,
        7,
        104,
    )


def test_pad_latent_to_max_false_gives_no_more_latents_than_steps():
    short = replace(PROBLEM, steps=((3,),))
    assert render(short, Stage(2, 4), experiment(pad_latent_to_max=True), VOCABULARY).num_latents == 4
    assert render(short, Stage(2, 4), experiment(pad_latent_to_max=False), VOCABULARY).num_latents == 2


def test_mixing_is_reproducible_and_as_frequent_as_asked():
    mixed = experiment(uniform_prob=0.3)
    draws = [mixed_stage(3, 6, index, mixed) for index in range(4000)]
    assert draws == [mixed_stage(3, 6, index, mixed) for index in range(4000)]
    other = sum(stage != Stage(2, 4) for stage in draws) / len(draws)
    assert 0.3 * 3 / 4 - 0.03 < other < 0.3 * 3 / 4 + 0.03  # one draw in four is the epoch's own stage
    assert set(draws) == {Stage(0, 0), Stage(1, 2), Stage(2, 4), Stage(3, 6)}


def test_mixing_leaves_methods_without_stages_alone():
    assert mixed_stage(3, 6, 1, experiment(method="cot", uniform_prob=1.0)) == Stage(0, 0)
    assert experiment(method="cot").method is Method.COT


@pytest.mark.parametrize(
    "stage, text",
    [
        (Stage(0, 0), "0 steps hidden, 0 latents"),
        (Stage(1, 1), "1 step hidden, 1 latent"),
        (Stage(2, 4), "2 steps hidden, 4 latents"),
        (Stage(ALL_STEPS, 6), "all steps hidden, 6 latents"),
        (Stage(0, 0, hidden_tokens=1), "first 1 reasoning token hidden"),
        (Stage(0, 0, hidden_tokens=8), "first 8 reasoning tokens hidden"),
    ],
)
def test_a_stage_is_written_and_read_back(stage, text):
    assert str(stage) == text and Stage.parse(text) == stage


def test_stages_of_older_versions_and_other_texts():
    assert Stage.parse("1 steps hidden, 1 latents") == Stage(1, 1)
    for other in (
        None,
        3,
        "",
        "as logged",
        "x steps hidden, 1 latents",
        "1 steps hidden, 99999999999 latents",
    ):
        assert Stage.parse(other) is None


@pytest.mark.parametrize(
    "epoch, accuracy, stale, expected",
    [
        (0, 0.95, 0, 1),  # min_epochs_per_stage
        (1, 0.95, 0, 3),
        (1, 0.89, 9, 2),  # patience is of the last stage
        (2, 0.10, 0, 3),  # all epochs of the stage
        (4, 0.90, 0, 5),
        (6, 0.99, 1, 7),  # the last stage does not advance
        (5, 0.99, 2, 6),
        (6, 0.99, 2, 9),
        (8, 0.50, 0, 9),
    ],
)
def test_the_epoch_after_an_early_end_is_the_first_of_the_next_stage(epoch, accuracy, stale, expected):
    early = experiment(
        epochs_per_stage=[3, 2, 4], num_epochs=9, max_latent_stage=3, advance_at=0.9,
        min_epochs_per_stage=2, early_stopping_patience=2,
    )  # fmt: skip
    assert next_epoch(epoch, accuracy, stale, early) == expected
    never = experiment(epochs_per_stage=[3, 2, 4], num_epochs=9, max_latent_stage=3)
    assert next_epoch(epoch, accuracy, stale, never) == epoch + 1
