"""Models of random weights and batches of the real sets' lengths, on the device.

Knows: shapes, synthetic problems, variants of a training step.  Does not know: what is measured.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.gpu_parts import Setting
from benchmarks.synthetic import experiment_like, problems_like, vocabulary_of
from coconut_ds.data.batching import Batch, collate
from coconut_ds.data.curriculum import numbered_stage, render
from coconut_ds.data.tokenizer import TokenizedProblem
from coconut_ds.model.loading import load_config

SHAPES = Path(__file__).parents[1] / "shapes"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TINY_SHRINK = 16  # of question lengths
LAST_STAGE = {"prosqa": 6, "gsm": 3}


def config_of(name: str, setting: Setting) -> PretrainedConfig:
    """The configuration of benchmarks/shapes/NAME; with --tiny two narrow layers of it."""
    config = load_config(str(SHAPES / name))
    config.vocab_size += 3  # the markers
    if setting.tiny:
        config.vocab_size = 103
        if config.model_type == "gpt2":
            config.n_layer, config.n_embd, config.n_head = 2, 32, 4
        else:
            config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 32, 64
            config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 8
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def model_of(name: str, setting: Setting, precision: str = "fp32", on_host: bool = False) -> PreTrainedModel:
    """Random weights, drawn on the device, where it is fast; `on_host`: moved, as DeepSpeed gets them."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config_of(name, setting), dtype=DTYPES[precision])
    if on_host:
        model = model.cpu()
        setting.forget()
    return model.train()


@functools.cache
def problems_of(dataset: str, count: int, vocabulary_size: int, setting: Setting) -> list[TokenizedProblem]:
    return problems_like(dataset, count, vocabulary_size, TINY_SHRINK if setting.tiny else 1)


def batch_of(
    problems: Sequence[TokenizedProblem], dataset: str, stage: int, vocabulary_size: int, device: str
) -> Batch:
    """One micro-batch of these problems at a stage of the data set's curriculum."""
    experiment = experiment_like(dataset)
    vocabulary = vocabulary_of(vocabulary_size)
    at = numbered_stage(stage, experiment)
    samples = [render(problem, at, experiment, vocabulary, i) for i, problem in enumerate(problems)]
    labels = sum(len(sample.tokens) - sample.num_prompt for sample in samples)
    return collate(samples, vocabulary.pad_id, loss_denominator=labels).to(device)


def longest_batch(dataset: str, stage: int, rows: int, vocabulary_size: int, setting: Setting) -> Batch:
    """`rows` problems as long as the longest of a thousand: what memory must be ready for.

    The last one is a token shorter: padding decides which kernels run.
    """
    problems = problems_of(dataset, 40 if setting.tiny else 1000, vocabulary_size, setting)
    longest = max(problems, key=lambda p: len(p.question) + sum(map(len, p.steps)))
    shorter = replace(longest, question=longest.question[1:])
    chosen = [longest] * (rows - 1) + [shorter if rows > 1 else longest]
    return batch_of(chosen, dataset, stage, vocabulary_size, setting.device)


def step(loss_of: Callable[[Batch], Tensor], batch: Batch) -> Any:
    loss = loss_of(batch)
    loss.backward()
    return loss.detach()
