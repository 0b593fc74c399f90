"""Sampled answers: pass@k and majority vote by hand, noise 0 is greedy, equal for every batch size."""

import json
from dataclasses import replace

import pytest
import torch

from coconut_ds.__main__ import main
from coconut_ds.data.run_data import load_evaluation_data
from coconut_ds.distributed import Ranks
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.evaluate import Prediction, ReadingEngine, evaluate, summarize
from coconut_ds.evaluation.intervals import wilson_interval
from coconut_ds.evaluation.pretrained import CoconutForCausalLM
from coconut_ds.evaluation.sampling import (
    NoisyThought,
    Sampler,
    Samples,
    Sampling,
    majority,
    parse_sampling,
    pass_at_k,
)
from coconut_ds.model.loading import load_config
from coconut_ds.thoughts import History
from tests.evaluation.test_evaluate import completions, problems_of
from tests.run_folders import make_run


@pytest.fixture(scope="module")
def run(tiny_experiment, tmp_path_factory):
    return make_run(tiny_experiment, tmp_path_factory.mktemp("sampling"), max_new_tokens=8)


@pytest.fixture(scope="module")
def model(run):
    return CoconutForCausalLM.from_pretrained(run, "cpu")


@pytest.mark.parametrize(
    "n, c, k, value",
    [
        (5, 2, 1, 2 / 5),
        (5, 2, 2, 1 - 3 / 10),  # C(3, 2) / C(5, 2)
        (5, 2, 3, 1 - 1 / 10),
        (5, 2, 4, 1.0),
        (4, 0, 2, 0.0),
        (10, 1, 5, 0.5),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(n, c, k, value):
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize(
    "answers, index",
    [
        (["7", "3", "3"], 1),
        (["7", "3", "3", "7"], 0),  # the earliest of two
        (["", "", "5"], 2),  # no text, no vote
        (["", ""], 0),
        (["12", "1,000", "1000"], 1),  # equal under the grading rule
    ],
)
def test_majority_by_hand(answers, index):
    assert majority(answers, "exact") == index


def evaluation(rights, dropped=0):
    answers = [
        Prediction(index, "", "1" if right else f"x{index}", "1", right, False, 2)
        for index, right in enumerate(rights)
    ]
    result = summarize(answers, 0.0, "exact")
    return replace(result, num_items=len(rights) + dropped, num_dropped=dropped)


def test_rates_and_vote_of_samples_by_hand():
    """Correct: 3, 1 and 0 of 3 samples; a fourth problem was too long."""
    samples = Samples(
        Sampling(3, latent_noise=0.5),
        (evaluation([1, 0, 0], 1), evaluation([1, 1, 0], 1), evaluation([1, 0, 0], 1)),
    )
    assert samples.ks() == [1, 2, 3]
    rates = samples.numbers()["pass_at_k"]
    assert [rate["value"] for rate in rates] == pytest.approx([4 / 12, (1 + 2 / 3) / 4, 2 / 4])
    assert (rates[2]["low"], rates[2]["high"]) == pytest.approx(wilson_interval(2, 4))
    voted = samples.voted()
    assert (voted.num_correct, voted.accuracy, voted.mean_tokens) == (1, 1 / 4, 6.0)
    assert str(samples).startswith("  3 samples, latent_noise 0.5: pass@1 33.3 % [")
    assert "majority vote 25.0 % [4.6, 69.9]" in str(samples)


def test_noise_0_is_greedy_to_the_last_digit(model):
    trained = model.trained
    config = load_config(trained.experiment.model_id)
    vocabulary, tests = load_evaluation_data(
        trained.experiment, config, trained.experiment.val_path, trained.stage, None
    )
    engine = ReadingEngine(model.model, Ranks(0, 1, torch.device("cpu")))

    def answers(sampling):
        sampler = sampling and Sampler(sampling, 3, 0)
        return evaluate(engine, tests, trained.stage, trained.experiment, vocabulary, sampler=sampler)

    greedy = answers(None).predictions
    assert answers(Sampling(2)).predictions == greedy
    assert answers(Sampling(2, temperature=1e-6, latent_noise=1e-12)).predictions == greedy
    assert answers(Sampling(2, latent_noise=3.0)).predictions != greedy
    assert answers(Sampling(2, latent_dropout=0.9)).predictions != greedy


@pytest.mark.parametrize("ranks, rows", [(1, 5), (2, 1), (2, 3)])
def test_samples_depend_on_neither_batch_size_nor_ranks(model, ranks, rows):
    tests = problems_of([20, 127, 126, 60, 119], model)
    sampling = Sampling(2, temperature=1.0, latent_noise=0.5, latent_dropout=0.2)
    first, second = (completions(model, tests, 1, 1, Sampler(sampling, 0, sample)) for sample in (0, 1))
    assert first != second
    assert completions(model, tests, ranks, rows, Sampler(sampling, 0, 0)) == first
    assert completions(model, tests, 1, 1, Sampler(sampling, 1, 0)) != first


class Ones(NoisyThought):
    def forward(self, history):
        return torch.ones(2, 20_000)


@pytest.mark.parametrize("scales", [{"latent_noise": 0.3}, {"latent_dropout": 0.25}])
def test_scales_of_noise_and_dropout(model, scales):
    sampler = Sampler(Sampling(1, **scales), 0, 0)
    batch = type("Batch", (), {"indices": (4, -1)})
    own = model.model.thought
    model.model.thought = Ones(own, sampler._sampling, ())
    with sampler.on(model.model, batch):
        first, second = (model.model.thought(History()) for _ in range(2))
    assert isinstance(model.model.thought, Ones)
    model.model.thought = own
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert first.mean() == pytest.approx(1, abs=0.01)
    if "latent_noise" in scales:
        assert first.std() == pytest.approx(0.3, abs=0.01)
    else:
        assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])
        assert (first == 0).float().mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    "given, text",
    [
        ({"latent_noise": 0.1}, "--latent_noise needs --num_samples N"),
        ({"num_samples": 0, "temperature": 1.0}, "--num_samples 0: must be at least 1"),
        ({"num_samples": 4}, "all samples would be the greedy answer; add --latent_noise 0.1"),
        ({"num_samples": 4, "latent_noise": -1.0}, "--latent_noise -1: must be at least 0"),
        ({"num_samples": 4, "temperature": float("nan")}, "--temperature nan: must be"),
        ({"num_samples": 4, "latent_dropout": 1.0}, "must be at least 0 and below 1"),
    ],
)
def test_wrong_options_are_one_message(given, text):
    with pytest.raises(ConfigError, match=text):
        parse_sampling(**{"num_samples": None} | given)


def test_options_are_checked_before_anything_loads(run, capsys):
    assert main(["eval", "nowhere", "--latent_noise", "0.1"]) == 2
    assert "--num_samples" in capsys.readouterr().err
    noise = ["--num_samples", "2", "--latent_noise", "0.1"]
    assert main(["eval", str(run), "--checkpoint", "best_stage_0", *noise]) == 2
    assert "has no latents at its stage" in capsys.readouterr().err


def test_eval_records_samples_and_report_shows_them(run, tmp_path, capsys):
    words = ["--num_samples", "2", "--latent_noise", "0.5", "--json", str(tmp_path / "all.json")]
    assert main(["eval", str(run), "--limit", "6", "--checkpoint", "checkpoint_4", *words]) == 0
    assert "2 samples, latent_noise 0.5: pass@1 " in capsys.readouterr().out
    intact, sampled = json.loads((tmp_path / "all.json").read_text())
    assert sampled["ablation"] == "majority of 2 samples, latent_noise 0.5"
    assert sampled["latent_noise"] == 0.5 and [rate["k"] for rate in sampled["pass_at_k"]] == [1, 2]
    assert sampled["loss"] == intact["loss"] and "pass_at_k" not in intact
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    drawn = [(line["sample"], line["index"]) for line in lines if "sample" in line]
    assert drawn == [(sample, index) for sample in (0, 1) for index in range(6)]
    assert main(["report", str(run), "--no-page"]) == 0
    report = capsys.readouterr().out
    assert "sampled answers" in report and "2 samples, latent_noise 0.5  pass@1 " in report


def test_several_checkpoints_end_in_one_table(run, capsys):
    names = ["best_stage_0", "best_stage_3"]
    assert main(["eval", str(run), "--limit", "3", "--checkpoint", *names, "--set", "max_new_tokens=1"]) == 0
    *_, head, first, last = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "checkpoint" and "accuracy (valid), 95 % interval" in head
    assert first.startswith("checkpoint_1  0 steps hidden, 0 latents  intact")
    assert last.startswith("checkpoint_4  3 steps hidden, 3 latents  intact")
