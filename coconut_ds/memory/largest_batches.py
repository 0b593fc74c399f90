"""The micro-batch of a stage that takes the most memory: longest question, longest continuation, most labels.

Rows are drawn at random, so some step of a long run may meet them together; the plan counts on it.

Knows: token counts, stages, batches.  Does not know: models, bytes.
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
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary, load_vocabulary, tokenize
from coconut_ds.errors import ConfigError
from coconut_ds.memory.plan import BatchShape
from coconut_ds.model.build import DEBUG_TRAIN_ITEMS

# Of a larger file only the problems with the most characters in some part are tokenised.
MAX_TOKENISED = 4000


@dataclass(frozen=True)
class TextShape:
    """Tokens of every problem, where neither data nor a tokenizer is at hand."""

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
    found: dict[Stage, StageOfRun] = {}
    for epoch in range(experiment.num_epochs):
        stage = stage_at(epoch, experiment)
        found.setdefault(stage, StageOfRun(epoch, stage))
    return list(found.values())


def read_lengths(
    experiment: Experiment, shape: TextShape | None
) -> tuple[list[TokenizedProblem], list[TokenizedProblem], Vocabulary | None]:
    """Problems to train on, problems to evaluate, and the tokenizer; of large files the longest alone.

    With `shape` nothing is read.  Raises ConfigError, naming the shape options, where something is absent.
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
                f"{key}: {path} does not exist, so the longest problem is not known.\n  {SHAPE_HINT}"
            )
        limit = DEBUG_TRAIN_ITEMS if experiment.debug else None
        files.append(tokenize(longest(read_problems(path, limit)), vocabulary) if path else [])
    train, valid = files
    return train or valid, valid, vocabulary


SHAPE_HINT = (
    "To plan without it, give the token counts: --question-tokens 430 --num-steps 6 --step-tokens 15 "
    "--answer-tokens 12"
)


def longest(problems: Sequence[Problem], most: int = MAX_TOKENISED) -> list[Problem]:
    """The problems that can matter: those with the most characters in the question, the steps or all."""
    sizes = [(len(p.question), sum(map(len, p.steps)), len(p.answer), len(p.steps)) for p in problems]
    return [problems[i] for i in _longest(sizes, most)]


def longest_tokenized(
    problems: Sequence[TokenizedProblem], most: int = MAX_TOKENISED
) -> list[TokenizedProblem]:
    """The same of tokenized problems; of a large cached file only these are held."""
    sizes = [(len(p.question), sum(map(len, p.steps)), len(p.answer), len(p.steps)) for p in problems]
    return [problems[i] for i in _longest(sizes, most)]


def _longest(sizes: Sequence[tuple[int, int, int, int]], most: int) -> list[int]:
    """Places of the largest (question, reasoning, answer, number of steps) by several measures, sorted."""
    if len(sizes) <= most:
        return list(range(len(sizes)))
    measures: tuple[Callable[[int], int], ...] = (
        lambda i: sizes[i][0],
        lambda i: sizes[i][1],
        lambda i: sum(sizes[i][:3]),
        lambda i: sizes[i][3],
    )
    share = most // len(measures)
    return sorted({i for measure in measures for i in heapq.nlargest(share, range(len(sizes)), key=measure)})


def largest_batch(
    problems: Sequence[TokenizedProblem],
    at: StageOfRun,
    experiment: Experiment,
    vocabulary: Vocabulary,
    rows: int,
) -> Batch:
    """A micro-batch of `rows` rows that no micro-batch of this stage exceeds in columns."""
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
    most = max((stages[p].num_latents for p in problems), default=0)
    padded = at.stage.num_latents if experiment.pad_latent_to_max else max(s.num_latents for s in samples)
    return collate(samples, vocabulary.pad_id, max(most, padded) if _mixes(experiment) else None, 1)


def evaluated_stages(experiment: Experiment) -> list[StageOfRun]:
    """Every stage that the run validates or tests."""
    stages = stages_of(experiment)
    last = StageOfRun(last_epoch(experiment), final_stage(experiment))
    return stages if stages and last.stage in [at.stage for at in stages] else [*stages, last]


def largest_evaluation_batch(
    problems: Sequence[TokenizedProblem], at: StageOfRun, experiment: Experiment, vocabulary: Vocabulary
) -> Batch:
    """A batch of the loss at a stage; no batch of it has more columns or labels."""
    unmixed = replace(experiment, uniform_prob=0.0)  # evaluation draws no other stages
    return largest_batch(problems, at, unmixed, vocabulary, experiment.batch_size_eval)


def longest_prompts(
    problems: Sequence[TokenizedProblem], experiment: Experiment, vocabulary: Vocabulary
) -> Batch:
    """The batch of the longest prompts of all stages: no batch to answer has more columns."""
    samples = [
        prompt_only(render(problem, at.stage, experiment, vocabulary))
        for at in evaluated_stages(experiment)
        for problem in problems
    ]
    longest_one = max(samples, key=lambda sample: sample.num_prompt)
    return collate([longest_one] * experiment.batch_size_eval, vocabulary.pad_id)


def _mixes(experiment: Experiment) -> bool:
    return experiment.uniform_prob > 0 and experiment.method.has_stages


def _largest_stage(problem: TokenizedProblem, stage: Stage, experiment: Experiment) -> Stage:
    """Of the stages one sample may be drawn at, the one with the longest text."""
    if not _mixes(experiment) or stage.hidden_tokens:
        return stage
    candidates = [stage, *(numbered_stage(number, experiment) for number in range(len(problem.steps) + 1))]
    return max(candidates, key=lambda s: sum(map(len, problem.steps[s.hidden_steps :])) + s.num_latents)


def shape_of(batch: Batch) -> BatchShape:
    rows, columns = batch.shape
    prompt = batch.first_latent if batch.num_latents else columns
    return BatchShape(rows, columns, prompt, batch.num_latents, len(batch.target_ids_N))
