"""Evaluate a model: token loss, accuracy and CoT match, as exact totals over all ranks.

Sums and counts are added up and divided once at the end, so uneven batches and ranks are weighted correctly.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from coconut_ds.config.experiment import Experiment
from coconut_ds.data.batching import PADDING_ROW, Batch, BatchConfig, evaluation_batches
from coconut_ds.data.curriculum import Stage, answer_lengths
from coconut_ds.data.problems import Card, chance_of, cot_matches, is_correct, split_completion
from coconut_ds.data.run_data import TestSet
from coconut_ds.data.tokenizer import Vocabulary
from coconut_ds.distributed import Ranks, phase
from coconut_ds.files import LINE_SECONDS, duration, hides_bar, print_now
from coconut_ds.model.coconut import Choose, Coconut, most_likely
from coconut_ds.runs.record_shapes import CUT

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


class Around(Protocol):
    """What changes the model for one batch: an ablation, or the drawing of a sample."""

    def on(self, model: Coconut, batch: Batch) -> AbstractContextManager[Choose]: ...


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
    num_cut: int = 0  # wrong answers that reached `max_new_tokens`
    max_new_tokens: int = 0
    longest_answer: int = 0  # tokens of the longest correct answer, if any was cut

    def numbers(self) -> dict[str, Any]:
        """Numbers for a log line."""
        names: tuple[str, ...] = ("loss", "accuracy", "cot_match", "num_items", "num_correct", "mean_tokens")
        names += ("seconds_per_item", "grading", "chance", "examples")
        names += ("num_dropped",) if self.num_dropped else ()
        names += CUT if self.num_cut else ()
        return {name: getattr(self, name) for name in names}


@phase("evaluation")
def evaluate(
    engine: "Engine | ReadingEngine",
    test_set: TestSet,
    stage: Stage,
    experiment: Experiment,
    vocabulary: Vocabulary,
    progress: Callable[[Iterable[Batch], str, int], Iterable[Batch]] = lambda batches, *_: batches,
    keep_going: Callable[[], None] = lambda: None,
    ablation: str | None = None,
    sampler: "Around | None" = None,
) -> Evaluation:
    """Loss and generated answers of every problem at `stage`; every item counts once.  Collective.

    Prompts must fit the model's positions, which load_run_data and load_evaluation_data check.
    `progress` wraps the batches for display: (batches, name, how many there are).  `keep_going` is called
    once per batch and may raise to stop.  `ablation` names the replacement for the model's thoughts
    (ablation.py).  `sampler` draws answers (sampling.py); their loss is not computed and 0.
    """
    around = sampler
    if ablation:
        from coconut_ds.evaluation.ablation import Ablator, ablated_stage  # not needed to train

        around, stage = Ablator(ablation, experiment.seed), ablated_stage(stage, ablation)
    layout = BatchConfig(experiment.batch_size_eval, 1, engine.world_size, engine.rank)
    total = layout.num_steps(len(test_set.tokenized))
    engine.eval()

    def batches(prompts: bool, name: str) -> Iterable[Batch]:
        rank_batches = evaluation_batches(test_set.tokenized, stage, experiment, vocabulary, layout, prompts)
        for batch in progress(rank_batches, name, total):
            keep_going()
            yield batch.to(engine.device)

    losses, num_tokens = 0.0, 0
    with torch.no_grad():
        for batch in () if sampler else batches(False, "loss"):
            with around.on(engine.module, batch) if around else nullcontext():
                losses += float(engine.loss(batch))
            num_tokens += len(batch.target_ids_N)
    own, seconds = _answers(engine, batches(True, "answers"), around, test_set, experiment, vocabulary)
    engine.train()
    loss_sum, token_sum = engine.sum_over_ranks([losses, num_tokens])
    predictions = [prediction for share in engine.gather(own) for prediction in share]
    predictions.sort(key=lambda prediction: prediction.index)
    grading = grading_of(experiment, test_set.card)
    result = summarize(predictions, loss_sum / max(token_sum, 1), grading)
    limit = max_new_tokens(experiment, test_set.card)
    num_cut = sum(p.num_tokens >= limit and not p.correct for p in predictions)
    lengths = answer_lengths(test_set.tokenized, stage, experiment, vocabulary) if num_cut else []
    return replace(
        result,
        num_cut=num_cut,
        max_new_tokens=limit,
        longest_answer=max(lengths, default=0),
        num_items=result.num_items + test_set.num_dropped,
        num_dropped=test_set.num_dropped,
        accuracy=result.num_correct / max(result.num_items + test_set.num_dropped, 1),
        seconds_per_item=seconds / max(result.num_items, 1),
        chance=chance_of(test_set.problems),
        examples=test_set.examples,
    )


def _answers(
    engine: "Engine | ReadingEngine",
    batches: Iterable[Batch],
    around: "Around | None",
    test_set: TestSet,
    experiment: Experiment,
    vocabulary: Vocabulary,
) -> tuple[list[Prediction], float]:
    """This rank's graded answers, and the seconds of the slowest rank.  Collective."""
    own: list[Prediction] = []
    limit, grading = max_new_tokens(experiment, test_set.card), grading_of(experiment, test_set.card)
    started = time.perf_counter()
    for batch in batches:
        with around.on(engine.module, batch) if around else nullcontext(most_likely) as choose:
            answers = engine.module.generate(batch, limit, vocabulary.eos_id, engine.all_over_ranks, choose)
        own += [
            grade(index, vocabulary.decode(ids), len(ids), test_set, grading)
            for index, ids in zip(batch.indices, answers, strict=True)
            if index != PADDING_ROW
        ]
    (seconds,) = engine.max_over_ranks([time.perf_counter() - started])
    return own, seconds


def show_progress(
    batches: Iterable[Batch],
    name: str,
    total: int,
    is_main: bool,
    print_line: Callable[[str], None] = print_now,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Batch]:
    """Yield `total` batches with a bar on a terminal, elsewhere with a line every LINE_SECONDS."""
    shown = tqdm(batches, desc=name, total=total, leave=False, disable=hides_bar(is_main))
    started = printed = clock()
    for number, batch in enumerate(shown, 1):
        now = clock()
        if is_main and shown.disable and number > 1 and now - printed >= LINE_SECONDS:
            printed, left = now, (now - started) / (number - 1) * (total - number + 1)
            print_line(f"  evaluation, {name}: batch {number} of {total}, ends in {duration(left)}")
        yield batch


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
