"""Build the largest micro-batch of a stage: longest question, longest continuation, most labels.

Rows are shuffled, so some step of a long run may get them together.  The plan assumes that it does.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coconut_ds.config.experiment import Experiment
from coconut_ds.data.batching import Batch, collate
from coconut_ds.data.curriculum import (
    Stage,
    final_stage,
    last_epoch,
    numbered_stage,
    prompt_only,
    render,
    stage_at,
)
from coconut_ds.data.problems import Problem, read_problems
from coconut_ds.data.run_data import DEBUG_TRAIN_ITEMS
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary, load_vocabulary, tokenize
from coconut_ds.errors import ConfigError
from coconut_ds.memory.plan import BatchShape

# In a larger file, only the problems with the most characters in some part are tokenized.
MAX_TOKENIZED = 4000


@dataclass(frozen=True)
class TextShape:
    """Token counts of every problem, instead of data and tokenizer."""

    question: int
    steps: int
    step: int
    answer: int

    def problem(self) -> TokenizedProblem:
        step = (0,) * self.step
        return TokenizedProblem((0,) * self.question, (step,) * self.steps, (0,) * self.answer)


@dataclass(frozen=True)
class StageOfRun:
    """A stage and the first epoch (from 0) that trains it."""

    epoch: int
    stage: Stage


def stages_of(experiment: Experiment) -> list[StageOfRun]:
    """Every stage that the run trains, in order."""
    stages: dict[Stage, StageOfRun] = {}
    for epoch in range(experiment.num_epochs):
        stage = stage_at(epoch, experiment)
        stages.setdefault(stage, StageOfRun(epoch, stage))
    return list(stages.values())


def read_lengths(
    experiment: Experiment, shape: TextShape | None
) -> tuple[list[TokenizedProblem], list[TokenizedProblem], Vocabulary | None]:
    """(training problems, evaluation problems, vocabulary); only the longest problems of large files.

    With `shape` nothing is read.  Raises ConfigError, with the shape options, if a file is missing.
    """
    if shape is not None:
        return [shape.problem()], [shape.problem()], None
    try:
        vocabulary = load_vocabulary(experiment.model_id)
    except ConfigError as error:
        raise ConfigError(f"{error}\n  {SHAPE_HINT}") from error
    files = []
    for path, key in ((experiment.train_path, "train_path"), (experiment.val_path, "val_path")):
        if path and not Path(path).exists():
            raise ConfigError(
                f"{key}: {path} does not exist, so the longest problem is unknown.\n  {SHAPE_HINT}"
            )
        limit = DEBUG_TRAIN_ITEMS if experiment.debug else None
        files.append(tokenize(longest(read_problems(path, limit)), vocabulary) if path else [])
    train, valid = files
    return train or valid, valid, vocabulary


SHAPE_HINT = (
    "To plan without it, give token counts: --question-tokens 430 --num-steps 6 --step-tokens 15 "
    "--answer-tokens 12"
)


def longest(problems: Sequence[Problem], limit: int = MAX_TOKENIZED) -> list[Problem]:
    """The problems with the most characters in the question, in the steps or in total."""
    sizes = [(len(p.question), sum(map(len, p.steps)), len(p.answer), len(p.steps)) for p in problems]
    return [problems[i] for i in _longest(sizes, limit)]


def longest_tokenized(
    problems: Sequence[TokenizedProblem], limit: int = MAX_TOKENIZED
) -> list[TokenizedProblem]:
    """`longest` for tokenized problems, by tokens."""
    sizes = [(len(p.question), sum(map(len, p.steps)), len(p.answer), len(p.steps)) for p in problems]
    return [problems[i] for i in _longest(sizes, limit)]


def _longest(sizes: Sequence[tuple[int, int, int, int]], limit: int) -> list[int]:
    """Sorted indices of the largest (question, reasoning, answer, number of steps) by several measures."""
    if len(sizes) <= limit:
        return list(range(len(sizes)))
    measures: tuple[Callable[[int], int], ...] = (
        lambda i: sizes[i][0],
        lambda i: sizes[i][1],
        lambda i: sum(sizes[i][:3]),
        lambda i: sizes[i][3],
    )
    share = limit // len(measures)
    return sorted({i for measure in measures for i in heapq.nlargest(share, range(len(sizes)), key=measure)})


def largest_batch(
    problems: Sequence[TokenizedProblem],
    at: StageOfRun,
    experiment: Experiment,
    vocabulary: Vocabulary,
    rows: int,
) -> Batch:
    """A micro-batch of `rows` rows with at least as many columns as any micro-batch of this stage."""
    stages = {problem: _largest_stage(problem, at.stage, experiment) for problem in problems}

    def after(problem: TokenizedProblem) -> int:
        stage = stages[problem]
        reasoning = sum(map(len, problem.steps[stage.hidden_steps :]))
        return max(0, reasoning - stage.hidden_tokens) + len(problem.answer)

    by_labels = sorted(problems, key=after, reverse=True)
    if rows == 1:
        chosen = [max(problems, key=lambda problem: len(problem.question) + after(problem))]
    else:
        chosen = [max(problems, key=lambda problem: len(problem.question)), *by_labels[: rows - 1]]
    while len(chosen) < rows:
        chosen += chosen[: rows - len(chosen)]
    samples = [render(p, stages[p], experiment, vocabulary, i) for i, p in enumerate(chosen)]
    max_latents = max((stages[p].num_latents for p in problems), default=0)
    padded = at.stage.num_latents if experiment.pad_latent_to_max else max(s.num_latents for s in samples)
    return collate(samples, vocabulary.pad_id, max(max_latents, padded) if _mixes(experiment) else None, 1)


def evaluated_stages(experiment: Experiment) -> list[StageOfRun]:
    """Every stage at which the run validates or tests."""
    stages = stages_of(experiment)
    last = StageOfRun(last_epoch(experiment), final_stage(experiment))
    return stages if stages and last.stage in [at.stage for at in stages] else [*stages, last]


def largest_evaluation_batch(
    problems: Sequence[TokenizedProblem], at: StageOfRun, experiment: Experiment, vocabulary: Vocabulary
) -> Batch:
    """The evaluation batch for the loss at a stage with the most columns and labels."""
    unmixed = replace(experiment, uniform_prob=0.0)  # evaluation does not mix stages
    return largest_batch(problems, at, unmixed, vocabulary, experiment.batch_size_eval)


def longest_prompts(
    problems: Sequence[TokenizedProblem], experiment: Experiment, vocabulary: Vocabulary
) -> Batch:
    """The batch of prompts with the most columns over all stages."""
    samples = [
        prompt_only(render(problem, at.stage, experiment, vocabulary))
        for at in evaluated_stages(experiment)
        for problem in problems
    ]
    prompt = max(samples, key=lambda sample: sample.num_prompt)
    return collate([prompt] * experiment.batch_size_eval, vocabulary.pad_id)


def _mixes(experiment: Experiment) -> bool:
    return experiment.uniform_prob > 0 and experiment.method.has_stages


def _largest_stage(problem: TokenizedProblem, stage: Stage, experiment: Experiment) -> Stage:
    """The stage with the longest text among those at which this problem may be sampled."""
    if not _mixes(experiment) or stage.hidden_tokens:
        return stage
    candidates = [stage, *(numbered_stage(number, experiment) for number in range(len(problem.steps) + 1))]
    return max(candidates, key=lambda s: sum(map(len, problem.steps[s.hidden_steps :])) + s.num_latents)


def shape_of(batch: Batch) -> BatchShape:
    rows, columns = batch.shape
    prompt = batch.first_latent if batch.num_latents else columns
    return BatchShape(rows, columns, prompt, batch.num_latents, len(batch.target_ids_N))
