"""Evaluate a model: token loss, accuracy and CoT match, as exact totals over all ranks.

Sums and counts are added up and divided once at the end, so uneven batches and ranks are weighted correctly.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coconut_ds.config.experiment import Experiment
from coconut_ds.data.batching import PADDING_ROW, Batch, BatchConfig, evaluation_batches
from coconut_ds.data.curriculum import Stage
from coconut_ds.data.problems import Card, chance_of, cot_matches, is_correct, split_completion
from coconut_ds.data.run_data import TestSet
from coconut_ds.data.tokenizer import Vocabulary
from coconut_ds.distributed import Ranks, phase
from coconut_ds.model.coconut import Coconut

if TYPE_CHECKING:  # programs that only read a model do not import DeepSpeed
    from coconut_ds.engine.engine import Engine


class ReadingEngine(Ranks):
    """The complete model on every rank, without gradients or an optimizer, for evaluation."""

    zero_stage = 0

    def __init__(self, module: Coconut, ranks: Ranks, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(ranks.rank, ranks.world_size, ranks.device)
        self.module = module.to(device=ranks.device, dtype=dtype).requires_grad_(False)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def loss(self, batch: Batch) -> Tensor:
        """Sum of this rank's token losses / `batch.loss_denominator`."""
        return self.module(batch)


@dataclass(frozen=True)
class Prediction:
    """The model's answer to one problem."""

    index: int
    completion: str
    predicted: str
    expected: str
    correct: bool
    cot_match: bool
    num_tokens: int  # generated, without latents


@dataclass(frozen=True)
class Evaluation:
    """Totals over all items; rates are fractions of 1."""

    loss: float
    accuracy: float
    cot_match: float
    num_items: int
    num_correct: int
    mean_tokens: float  # generated, without latents
    predictions: tuple[Prediction, ...]  # all items, in the order of the file
    grading: str  # the rule behind `accuracy`
    chance: float = 0.0  # accuracy of guessing on this set (chance_of)
    seconds_per_item: float = 0.0  # of generation, with all ranks
    num_dropped: int = 0  # of num_items: not asked, since they are too long for the model
    examples: str = ""  # hash of the evaluated problems (examples_digest)

    def numbers(self) -> dict[str, Any]:
        """Numbers for a log line."""
        names = ("loss", "accuracy", "cot_match", "num_items", "num_correct", "mean_tokens")
        return {
            name: getattr(self, name)
            for name in (*names, "seconds_per_item", "grading", "chance", "examples")
        } | ({"num_dropped": self.num_dropped} if self.num_dropped else {})


@phase("evaluation")
def evaluate(
    engine: "Engine | ReadingEngine",
    test_set: TestSet,
    stage: Stage,
    experiment: Experiment,
    vocabulary: Vocabulary,
    progress: Callable[[Iterable[Batch], str], Iterable[Batch]] = lambda batches, _: batches,
    keep_going: Callable[[], None] = lambda: None,
    ablation: str | None = None,
) -> Evaluation:
    """Loss and generated answers of every problem at `stage`; every item counts once.  Collective.

    Prompts must fit the model's positions, which load_run_data and load_evaluation_data check.
    `progress` wraps the batches for display.  `keep_going` is called once per batch and may raise to stop.
    `ablation` names the replacement for the model's thoughts (ablation.py).
    """
    ablator = None
    if ablation:
        from coconut_ds.evaluation.ablation import Ablator, ablated_stage  # not needed to train

        ablator, stage = Ablator(ablation, experiment.seed), ablated_stage(stage, ablation)
    layout = BatchConfig(experiment.batch_size_eval, 1, engine.world_size, engine.rank)
    engine.eval()

    def batches(prompts: bool, name: str) -> Iterable[Batch]:
        rank_batches = evaluation_batches(test_set.tokenized, stage, experiment, vocabulary, layout, prompts)
        for batch in progress(rank_batches, name):
            keep_going()
            yield batch.to(engine.device)

    losses, num_tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches(False, "loss"):
            with ablator.on(engine.module, batch) if ablator else nullcontext():
                losses += float(engine.loss(batch))
            num_tokens += len(batch.target_ids_N)
    own: list[Prediction] = []
    limit, grading = max_new_tokens(experiment, test_set.card), grading_of(experiment, test_set.card)
    started = time.perf_counter()
    for batch in batches(True, "answers"):
        with ablator.on(engine.module, batch) if ablator else nullcontext():
            answers = engine.module.generate(batch, limit, vocabulary.eos_id, engine.all_over_ranks)
        own += [
            grade(index, vocabulary.decode(ids), len(ids), test_set, grading)
            for index, ids in zip(batch.indices, answers, strict=True)
            if index != PADDING_ROW
        ]
    (seconds,) = engine.max_over_ranks([time.perf_counter() - started])
    engine.train()
    loss_sum, token_sum = engine.sum_over_ranks([losses, num_tokens])
    predictions = [prediction for share in engine.gather(own) for prediction in share]
    result = summarize(sorted(predictions, key=lambda p: p.index), loss_sum / max(token_sum, 1), grading)
    return replace(
        result,
        num_items=result.num_items + test_set.num_dropped,
        num_dropped=test_set.num_dropped,
        accuracy=result.num_correct / max(result.num_items + test_set.num_dropped, 1),
        seconds_per_item=seconds / max(result.num_items, 1),
        chance=chance_of(test_set.problems),
        examples=test_set.examples,
    )


def max_new_tokens(experiment: Experiment, card: Card) -> int:
    """The limit of the experiment, else of the data set."""
    return card.max_new_tokens if experiment.max_new_tokens is None else experiment.max_new_tokens


def grading_of(experiment: Experiment, card: Card) -> str:
    """The grading rule of the experiment, else of the data set."""
    return card.grading if experiment.grading is None else experiment.grading


def grade(index: int, completion: str, num_tokens: int, test_set: TestSet, grading: str) -> Prediction:
    """Grade one completion by the rule `grading`."""
    problem = test_set.problems[index]
    reasoning, predicted = split_completion(completion, grading)
    return Prediction(
        index=index,
        completion=completion,
        predicted=predicted,
        expected=problem.answer,
        correct=is_correct(grading, predicted, problem.answer),
        cot_match=cot_matches(reasoning, problem.steps),
        num_tokens=num_tokens,
    )


def summarize(predictions: Sequence[Prediction], loss: float, grading: str) -> Evaluation:
    """Totals of graded predictions."""
    count = max(len(predictions), 1)
    correct = sum(p.correct for p in predictions)
    return Evaluation(
        loss=loss,
        accuracy=correct / count,
        cot_match=sum(p.cot_match for p in predictions) / count,
        num_items=len(predictions),
        num_correct=correct,
        mean_tokens=sum(p.num_tokens for p in predictions) / count,
        predictions=tuple(predictions),
        grading=grading,
    )
