"""Problems of the real sets' lengths without their texts, and a whole engine around random weights.

Lengths are in GPT-2 tokens.  ProsQA: a fact of the graph is about 12 tokens, the number of facts and of hops
is that of the released validation set.  GSM8K: 1.3 tokens a word of the question, 9 a step, 4 the answer.

Knows: tokenised problems, experiments, engines.  Does not know: what a benchmark measures.
Lengths of the real sets were counted in the released files (docs/datasets.md).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import Experiment, validate_experiment
from coconut_ds.data.batching import BatchConfig
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary
from coconut_ds.engine.engine import Engine, schedule, start_distributed
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import parameter_groups
from coconut_ds.model.lora import add_adapters
from coconut_ds.thoughts import ThoughtSettings, build_thought

ROOT = Path(__file__).resolve().parents[1]
GSM_STEPS = {1: 32, 2: 155, 3: 140, 4: 91, 5: 53, 6: 18, 7: 8, 8: 3}
PROSQA_HOPS = {3: 41.3, 4: 44.3, 5: 12.0, 6: 2.4}
PROSQA_TRAIN, GSM_VALID, GSM_TRAIN = 17_886, 500, 385_620


@dataclass(frozen=True)
class Lengths:
    """Tokens of one problem."""

    question: int
    steps: tuple[int, ...]
    answer: int


def prosqa_lengths(draw: random.Random) -> Lengths:
    facts = min(max(round(draw.gauss(36.3, 5.6)), 22), 53)
    hops = draw.choices(list(PROSQA_HOPS), list(PROSQA_HOPS.values()))[0]
    return Lengths(12 * facts + 10, (12,) * hops, 12)


def gsm_lengths(draw: random.Random) -> Lengths:
    words = min(max(round(draw.gauss(45, 17)), 18), 141)
    steps = draw.choices(list(GSM_STEPS), list(GSM_STEPS.values()))[0]
    return Lengths(round(1.3 * words), (9,) * steps, 4)


LENGTHS: dict[str, Callable[[random.Random], Lengths]] = {"prosqa": prosqa_lengths, "gsm": gsm_lengths}
SCHEDULES: dict[str, dict[str, int]] = {
    "prosqa": {"c_thought": 1, "max_latent_stage": 6},
    "gsm": {"c_thought": 2, "max_latent_stage": 3},
}


def vocabulary_of(size: int) -> Vocabulary:
    """Ids without a tokenizer: the markers are the last three, eos the first."""
    no_tokenizer: Any = None
    return Vocabulary(no_tokenizer, size - 3, size - 1, size - 2, eos_id=0, pad_id=0)


def problems_like(name: str, count: int, vocabulary_size: int, shrink: int = 1) -> list[TokenizedProblem]:
    """`count` random problems of the lengths of `name`; `shrink` divides the question's length."""
    draw = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, vocabulary_size - 3) for _ in range(max(1, length)))

    problems = []
    for _ in range(count):
        lengths = LENGTHS[name](draw)
        steps = tuple(tokens(length) for length in lengths.steps)
        question = tokens(lengths.question // shrink)
        problems.append(TokenizedProblem(question, steps, (*tokens(lengths.answer - 1), 0)))
    return problems


def experiment_like(name: str, **changes: Any) -> Experiment:
    """Coconut on the schedule of `name`, one epoch a stage, with `changes` to the settings."""
    values: dict[str, Any] = {
        "project": "benchmarks", "name": name, "save_path": "runs", "model_id": "random weights",
        "train_path": "none.json", "val_path": "none.json", "lr": 1e-4, "weight_decay": 0.01,
        "method": "coconut", "num_epochs": 50, "epochs_per_stage": 1, "batch_size_training": 8,
        **SCHEDULES[name], **changes,
    }  # fmt: skip
    return validate_experiment(values, "benchmarks")


def layout_alone(experiment: Experiment) -> BatchConfig:
    return BatchConfig(experiment.batch_size_training, experiment.gradient_accumulation_steps, 1, 0)


def coconut_around(
    base: Any, experiment: Experiment, latent_memory: Any, special_token_ids: Sequence[int]
) -> Coconut:
    """The trainable module around `base`, with adapters where the experiment says so."""
    thought = build_thought(experiment.thought, base.config.hidden_size, ThoughtSettings.of(experiment))
    if experiment.tuning == "lora":
        base = add_adapters(base, experiment, tuple(special_token_ids))
    return Coconut(base, thought, latent_memory).train()


def engine_around(
    base: Any, experiment: Experiment, ds_config: str = "zero2_offload", overrides: Sequence[str] = ()
) -> Engine:
    """A one-process engine under ds_configs/NAME.json; several may follow one another in a process."""
    config = load_ds_config(ROOT / "ds_configs" / f"{ds_config}.json", overrides)
    ranks = start_distributed(config.precision)
    markers = vocabulary_of(base.config.vocab_size).special_token_ids
    module = coconut_around(base, experiment, config.latent_memory, markers)
    settings = config.resolve(experiment, 1)
    return Engine(module, parameter_groups(module, experiment), settings, ranks, schedule("constant", 0, 1))
