"""What an evaluation is planned to take, against what a real model takes: every stage, loss and answers."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, LlamaConfig

from benchmarks.plan_accuracy import peak_of_events, real_model, with_padding
from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.memory.phases import PlannedRun, evaluated_stages, largest_evaluation_batch, longest_prompts
from coconut_ds.memory.planner import Planner, TextShape

ROOT = Path(__file__).resolve().parents[2]
TEXT = TextShape(question=40, steps=3, step=20, answer=5)
COMMON = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
CONFIGS = {
    "large vocabulary": GPT2Config(n_embd=64, n_head=4, n_layer=5, vocab_size=20_000, **COMMON),
    "grouped queries": LlamaConfig(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3,
        intermediate_size=200, vocab_size=300, tie_word_embeddings=False, **COMMON,
    ),
}  # fmt: skip
WITHIN = 0.09


def measured(call):
    with torch.no_grad():
        call()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    return peak_of_events(profiler)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_planned_evaluation_holds_every_stage(name):
    values = {
        "project": "p", "name": "n", "save_path": "runs", "method": "coconut", "model_id": "a model",
        "train_path": "none.json", "val_path": "none.json", "c_thought": 2, "epochs_per_stage": 1,
        "max_latent_stage": 2, "num_epochs": 3, "batch_size_training": 2, "batch_size_eval": 8, "lr": 1e-4,
        "max_new_tokens": 60, "uniform_prob": 0.2,
    }  # fmt: skip
    experiment = validate_experiment(values, "test")
    ds_config = load_ds_config(ROOT / "ds_configs/zero1.json")
    ds_config.resolve(experiment, 1)
    config, problems = CONFIGS[name], [TEXT.problem()]
    planner = Planner.from_run_data(experiment, problems, problems, None, "cpu", config)
    run = PlannedRun(planner, experiment, ds_config, 1)
    vocabulary = planner.vocabulary
    model = real_model(
        experiment, config, planner.vocabulary_size, vocabulary, ds_config.latent_memory
    ).eval()
    stages = evaluated_stages(experiment)
    assert [at.stage.num_latents for at in stages] == [0, 2, 4]
    peaks = []
    for at in stages:
        batch = with_padding(largest_evaluation_batch(problems, at, experiment, vocabulary))
        peaks.append(measured(lambda batch=batch: model(batch)))
        assert peaks[-1] <= 1.005 * run.evaluated(batch, 0) <= (1 + WITHIN) * peaks[-1]
    prompts = with_padding(longest_prompts(problems, experiment, vocabulary))
    peaks.append(measured(lambda: model.generate(prompts, 60, eos_id=-1)))
    assert peaks[-1] <= 1.005 * run.evaluated(prompts, 60) <= (1 + WITHIN) * peaks[-1]
    assert max(peaks) <= 1.005 * run.evaluation().size <= (1 + WITHIN) * max(peaks)
    assert peaks[0] == max(peaks)
    assert name != "large vocabulary" or peaks[0] > 2 * peaks[len(stages) - 1]
