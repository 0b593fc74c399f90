"""Latent supervision against a naive loop and LOTUS's golden numbers: targets, losses, gradients, log, plan.

Shapes: T columns, V vocabulary.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import GPT2Config

from benchmarks.plan_accuracy import Case, compare
from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import load_with_notes, validate_experiment
from coconut_ds.data.batching import BatchConfig, evaluation_batches, training_steps
from coconut_ds.data.curriculum import mixed_stage, render, stage_at, supervise
from coconut_ds.data.problems import Problem
from coconut_ds.data.run_data import load_run_data
from coconut_ds.data.tokenizer import load_vocabulary, tokenize
from coconut_ds.errors import ConfigError, DataError
from coconut_ds.model.loading import build_module, load_config
from coconut_ds.objectives import available_objectives, latent_targets
from tests.model.cases import assert_same_gradients
from tests.plain_engine import plain_trainer
from tests.training.test_trainer import CHEAP, lines_of

GOLDEN = Path(os.environ.get("GOLDEN_LOTUS_DIR", Path(__file__).parents[3] / "shared" / "golden_lotus"))
LOTUS = ("lotus_gpt2_ragged", "lotus_gpt2_after_loop", "lotus_llama_ragged")
RESULT = {"latent_supervision": "step_result", "c_thought": 1}
TOKENS = {"latent_supervision": "step_tokens", "c_thought": 3}
LAYOUTS = {"1 rank": (8, 1, 1), "2 ranks, 2 micro-batches": (2, 2, 2), "3 ranks, filler rows": (3, 1, 3)}
EPOCH = 2  # two steps hidden, and a share of other stages


@pytest.fixture(scope="module")
def vocabulary(tiny_experiment):
    return load_vocabulary(tiny_experiment["model_id"])


def words_of(vocabulary, objective, c_thought, *steps):
    (problem,) = tokenize([Problem("1+1=?", steps, "2")], vocabulary)
    found = latent_targets(objective, problem.steps, c_thought, vocabulary.tokenizer)
    return [(slot, vocabulary.spell([token])) for slot, token in found]


def test_the_folder_is_the_registry():
    assert available_objectives() == ("step_result", "step_tokens")


def test_each_block_has_the_targets_of_its_step(vocabulary):
    steps = ("<<3+5=1>>", "<<1*2=2>>")
    assert words_of(vocabulary, "step_result", 1, *steps) == [(0, "1"), (1, "2")]
    assert words_of(vocabulary, "step_result", 2, *steps) == [(0, "1"), (2, "2")]
    cut_off = [(0, "<<"), (1, "3"), (2, "+"), (3, "<<"), (4, "1"), (5, "*")]
    assert words_of(vocabulary, "step_tokens", 3, *steps) == cut_off
    assert len(words_of(vocabulary, "step_tokens", 10, *steps)) == 2 * 8  # with the newline


def test_a_result_of_several_tokens_is_cut_off_at_its_block(vocabulary):
    assert words_of(vocabulary, "step_result", 3, "<<3=5+1+2>>") == [(0, "5"), (1, "+"), (2, "1")]
    assert words_of(vocabulary, "step_result", 1, "<<3+5=>>") == []


def naive_losses(model, samples):
    """Row by row without a cache, every prefix read again: (sum of text losses, sum of latent losses)."""
    text, latent = torch.zeros(()), torch.zeros(())
    for sample in samples:
        ids_T = torch.tensor(sample.tokens)
        embeds_1TD = model.get_input_embeddings()(ids_T)[None]
        for column in range(sample.first_latent, sample.first_latent + sample.num_latents):
            read = model(inputs_embeds=embeds_1TD[:, :column], output_hidden_states=True)
            thought_11D = read.hidden_states[-1][:, -1:]
            embeds_1TD = torch.cat([embeds_1TD[:, :column], thought_11D, embeds_1TD[:, column + 1 :]], dim=1)
        logits_TV = model(inputs_embeds=embeds_1TD).logits[0]
        for column in range(sample.num_prompt, len(ids_T)):
            text = text + F.cross_entropy(logits_TV[column - 1], ids_T[column])
        for slot, token in sample.latent_targets:
            column = sample.first_latent + slot
            latent = latent + F.cross_entropy(logits_TV[column - 1], torch.tensor(token))
    return text, latent


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("settings", [RESULT, TOKENS], ids=["result", "tokens"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_the_naive_loop_on_any_number_of_ranks(
    tiny_experiment, tuning, settings, layout
):
    values = tiny_experiment | settings | {"tuning": tuning, "lora_dropout": 0, "pad_latent_to_max": True}
    experiment = validate_experiment(values | {"latent_supervision_weight": 0.3}, "test")
    run_data = load_run_data(experiment, load_config(experiment.model_id))
    vocabulary = run_data.vocabulary
    memories = [LatentMemory(), LatentMemory(supervised_logits_only=False), LatentMemory(loss_chunk_tokens=3)]
    rows, accumulation, ranks = LAYOUTS[layout]
    for memory in memories if layout == "1 rank" else memories[:1]:
        module = build_module(experiment, vocabulary, memory).train()
        module.zero_grad()
        loss = latent = 0.0
        shares = [BatchConfig(rows, accumulation, ranks, rank) for rank in range(ranks)]
        for share in shares:
            for batch in next(training_steps(run_data.train[:8], EPOCH, experiment, vocabulary, share)):
                part = module(batch)
                part.backward()
                loss, latent = loss + part.item(), latent + module.latent_loss.item()
        ours = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        samples = [
            supervise(render(problem, stage, experiment, vocabulary), problem, stage, experiment, vocabulary)
            for index, problem in enumerate(run_data.train[:8])
            for stage in [mixed_stage(len(problem.steps), EPOCH, index, experiment)]
        ]
        plain = build_module(experiment, vocabulary, LatentMemory(False, 64, False, False, "none", False))
        text_sum, latent_sum = naive_losses(plain.train().causal_lm, samples)
        num_text = sum(len(sample.tokens) - sample.num_prompt for sample in samples)
        num_latent = sum(len(sample.latent_targets) for sample in samples)
        expected = text_sum / num_text + 0.3 * latent_sum / num_latent
        expected.backward()
        theirs = {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert latent == pytest.approx(latent_sum.item() / num_latent, rel=1e-6)
        assert_same_gradients(ours, theirs)


def test_only_supervised_columns_pass_through_the_head(tiny_experiment):
    experiment = validate_experiment(tiny_experiment | RESULT, "test")
    run_data = load_run_data(experiment, load_config(experiment.model_id))
    module = build_module(experiment, run_data.vocabulary, LatentMemory())
    layout = BatchConfig(8, 1, 1, 0)
    (batch,) = next(training_steps(run_data.train[:8], EPOCH, experiment, run_data.vocabulary, layout))
    seen = []
    module.techniques.losses = lambda hidden, batch, head, inner=module.techniques.losses: seen.append(
        inner(hidden, batch, head)
    ) or seen[-1]  # fmt: skip
    module(batch)
    labels = int((batch.labels_BT != -100).sum())
    assert len(seen[0]) == labels + batch.num_latent_targets
    assert batch.latent_denominator == batch.num_latent_targets > 8


def test_the_validation_loss_is_that_of_the_text(tiny_experiment, vocabulary):
    experiment = validate_experiment(tiny_experiment | RESULT, "test")
    problems = tokenize([Problem("1+1=?", ("<<1+1=2>>",), "2")], vocabulary)
    layout = BatchConfig(8, 1, 1, 0)
    (batch,) = evaluation_batches(problems, stage_at(1, experiment), experiment, vocabulary, layout, False)
    assert batch.num_latent_targets == batch.latent_denominator == 0


@pytest.mark.parametrize("name", LOTUS)
def test_columns_and_targets_are_those_of_lotus(name):
    """The step loss of LOTUS's own logits; latents are computed in another order there."""
    if not (GOLDEN / f"{name}.json").is_file():
        pytest.skip(f"no golden cases in {GOLDEN}; set GOLDEN_LOTUS_DIR")
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    logits_BTV = tensors[f"logits.iter{facts['loops']}"]  # of <start> and the latents
    total, count = 0.0, 0
    for row, (_, lengths, _) in enumerate(facts["rows"]):
        hidden = zip(tensors["replaced_cot_steps"][row], lengths[: facts["blocks"]], strict=False)
        steps = [tuple(ids[:length].tolist()) for ids, length in hidden]
        for slot, token in latent_targets("step_tokens", steps, facts["c_thought"], None):
            total += F.cross_entropy(logits_BTV[row, slot], torch.tensor(token)).item()
            count += 1
    assert count == facts["loss_parts"]["n_step_tokens"]
    assert total == pytest.approx(facts["loss_parts"]["step_loss_sum"], rel=1e-6)


def test_the_latents_loss_is_logged_beside_the_texts(tiny_experiment, tmp_path):
    values = tiny_experiment | CHEAP | {"save_path": str(tmp_path), "num_epochs": 2}
    with plain_trainer(values, num_epochs=1) as trainer:
        trainer.run_all()
        plain = lines_of(trainer.run, "train")
    with plain_trainer(values, **RESULT, name="supervised") as trainer:
        trainer.run_all()
        supervised = lines_of(trainer.run, "train")
    assert supervised[0]["loss"] == plain[0]["loss"]  # the first stage has no latents
    assert not any("latent_loss" in line for line in plain)
    assert ["latent_loss" in line for line in supervised] == [line["stage"] > 0 for line in supervised]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_planned_peak_is_the_measured_one(tuning):
    config = GPT2Config(n_layer=3, n_embd=192, n_head=3, vocab_size=4000, bos_token_id=0, eos_token_id=0)
    case = Case("gpt2", "coconut last stage", "none", "last_hidden", tuning, 4)
    assert abs(compare(replace(case, latent_supervision="step_tokens"), config).error) < 0.03


def test_a_misspelled_objective_is_named_with_a_proposal(tiny_experiment):
    with pytest.raises(ConfigError, match="latent_supervision: must be one of step_result, step_tokens, got"):
        validate_experiment(tiny_experiment | {"latent_supervision": "step_token"}, "test")


def test_none_is_plain_coconut_and_a_weight_alone_has_no_effect(tmp_path):
    file = tmp_path / "e.yaml"
    keys = "name: a\nmethod: coconut\nmodel_id: m\ntrain_path: t\nval_path: v\n"
    file.write_text(keys + "latent_supervision: none\nlatent_supervision_weight: 0.5\n")
    experiment, notes = load_with_notes(file)
    assert experiment.latent_supervision is None
    assert any("latent_supervision_weight: 0.5: no effect" in note for note in notes)


def test_data_whose_steps_have_no_target_is_refused(tiny_experiment, tmp_path):
    data = tmp_path / "t.json"
    data.write_text(json.dumps([{"question": "1+1=?", "steps": ["<<1+1=>>"], "answer": "2"}]))
    experiment = validate_experiment(tiny_experiment | RESULT | {"train_path": str(data)}, "test")
    with pytest.raises(DataError, match="latent_supervision: step_result"):
        load_run_data(experiment, load_config(experiment.model_id))
