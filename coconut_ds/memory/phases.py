"""Plan the memory of each phase beyond the persistent states, from fake runs of the model.

Each stage is planned with its largest micro-batch: longest question, longest continuation, most labels.  Rows
are shuffled, so some step of a long run may get them together.

The full model runs only for the stages that may be the peak.  Two shallow copies of the model select these
and size the others: activations grow by the same number of bytes with every layer.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from coconut_ds.config.deepspeed import DeepSpeedConfig
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
from coconut_ds.memory.fake_run import ACTIVATIONS, GRADIENTS, LOSS, peak_of
from coconut_ds.memory.zero import COMMUNICATION, Item, Sizes, ZeroSettings, replay

if TYPE_CHECKING:
    from coconut_ds.memory.planner import Planner

FORWARD_BACKWARD, STEP, EVALUATION = "forward and backward", "optimizer step", "evaluation"
# In a larger file, only the problems with the most characters in some part are tokenized.
MAX_TOKENIZED = 4000
# Assumed, to be checked on a GPU: share lost between the blocks of the caching allocator.
FRAGMENTATION = 0.05
# Stages at least this close to the largest are run on the full model too, at most MAX_EXACT of them.
NEAR, MAX_EXACT = 0.95, 2

SHAPE_HINT = (
    "To plan without it, give token counts: --question-tokens 430 --num-steps 6 --step-tokens 15 "
    "--answer-tokens 12"
)

AnyProblem = TypeVar("AnyProblem", Problem, TokenizedProblem)


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


def evaluated_stages(experiment: Experiment) -> list[StageOfRun]:
    """Every stage at which the run validates or tests."""
    stages = stages_of(experiment)
    last = StageOfRun(last_epoch(experiment), final_stage(experiment))
    return stages if stages and last.stage in [at.stage for at in stages] else [*stages, last]


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


def read_lengths(experiment: Experiment) -> tuple[list[TokenizedProblem], list[TokenizedProblem], Vocabulary]:
    """(training problems, evaluation problems, vocabulary); only the longest problems of large files.

    Raises ConfigError, with the shape options, if a file is missing.
    """
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


def longest(problems: Sequence[AnyProblem], limit: int = MAX_TOKENIZED) -> list[AnyProblem]:
    """The problems with the longest question, reasoning or total, or the most steps; sizes in characters or,
    for tokenized problems, in tokens.
    """
    if len(problems) <= limit:
        return list(problems)
    sizes = [(len(p.question), sum(map(len, p.steps)), len(p.answer), len(p.steps)) for p in problems]
    measures: tuple[Callable[[int], int], ...] = (
        lambda i: sizes[i][0],
        lambda i: sizes[i][1],
        lambda i: sum(sizes[i][:3]),
        lambda i: sizes[i][3],
    )
    share = limit // len(measures)
    chosen = {i for measure in measures for i in heapq.nlargest(share, range(len(sizes)), key=measure)}
    return [problems[i] for i in sorted(chosen)]


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

    if rows == 1:
        chosen = [max(problems, key=lambda problem: len(problem.question) + after(problem))]
    else:
        by_labels = sorted(problems, key=after, reverse=True)
        chosen = [max(problems, key=lambda problem: len(problem.question)), *by_labels[: rows - 1]]
    while len(chosen) < rows:
        chosen += chosen[: rows - len(chosen)]
    samples = [render(p, stages[p], experiment, vocabulary, i) for i, p in enumerate(chosen)]
    max_latents = max((stages[p].num_latents for p in problems), default=0)
    padded = at.stage.num_latents if experiment.pad_latent_to_max else max(s.num_latents for s in samples)
    return collate(samples, vocabulary.pad_id, max(max_latents, padded) if _mixes(experiment) else None, 1)


def _mixes(experiment: Experiment) -> bool:
    return experiment.uniform_prob > 0 and experiment.method.has_stages


def _largest_stage(problem: TokenizedProblem, stage: Stage, experiment: Experiment) -> Stage:
    """The stage with the longest text among those at which this problem may be sampled."""
    if not _mixes(experiment) or stage.hidden_tokens:
        return stage
    candidates = [stage, *(numbered_stage(number, experiment) for number in range(len(problem.steps) + 1))]
    return max(candidates, key=lambda s: sum(map(len, problem.steps[s.hidden_steps :])) + s.num_latents)


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


@dataclass(frozen=True)
class BatchShape:
    """The size of a micro-batch in rows and tokens."""

    rows: int
    columns: int
    prompt: int  # columns of the first pass
    num_latents: int
    labels: int

    def __str__(self) -> str:
        return (
            f"{self.rows} rows x {self.columns} columns: {self.prompt} before {self.num_latents} latents, "
            f"{self.labels} labels"
        )


def shape_of(batch: Batch) -> BatchShape:
    rows, columns = batch.shape
    prompt = batch.first_latent if batch.num_latents else columns
    return BatchShape(rows, columns, prompt, batch.num_latents, len(batch.target_ids_N))


@dataclass(frozen=True)
class Phase:
    """Allocations of one phase beyond the persistent states."""

    name: str
    items: tuple[Item, ...]
    own_peaks: Mapping[str, int] = field(default_factory=dict)  # of components whose peak is at another time

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items)


@dataclass(frozen=True)
class StagePlan:
    """Forward and backward of one stage with its largest micro-batch."""

    epoch: int  # the first, from 0
    name: str
    shape: BatchShape
    gpu_bytes: int
    is_exact: bool  # false: scaled from shallow runs


@dataclass(frozen=True)
class PlannedRun:
    """One experiment under one ds_config."""

    planner: "Planner"
    experiment: Experiment
    ds_config: DeepSpeedConfig
    sizes: Sizes
    zero: ZeroSettings

    @property
    def fragmentation(self) -> float:
        return FRAGMENTATION if self.planner.device == "cuda" else 0.0

    def stages(self, states: int, quick_at: int | None) -> tuple[list[StagePlan], Phase]:
        """Every stage, and the phase of the peak stage.  `states`: bytes of the persistent states."""
        planner, rows = self.planner, self.experiment.batch_size_training
        stages = stages_of(self.experiment)
        if quick_at is not None:
            stages = [at for at in stages if at.epoch <= quick_at][-1:]
        batches = [
            largest_batch(planner.train, at, self.experiment, planner.vocabulary, rows) for at in stages
        ]
        scaled = [0] * len(batches)
        if planner.depths is None or (len(stages) == 1 and quick_at is None):
            exact = {index: self.exact_phase(batch) for index, batch in enumerate(batches)}
        else:
            scaled = [self.scaled(batch) for batch in batches]
            near = [index for index, size in enumerate(scaled) if size >= NEAR * max(scaled)]
            exact = {
                index: self.exact_phase(batches[index])
                if quick_at is None or planner.has_trace(self.experiment, self.ds_config, batches[index])
                else self.quick_phase(scaled[index])
                for index in sorted(near, key=scaled.__getitem__, reverse=True)[:MAX_EXACT]
            }
        known = max(exact, key=lambda index: exact[index].size)

        def size_of(index: int) -> int:
            if index in exact:
                return states + exact[index].size
            difference = scaled[index] - scaled[known]
            return states + max(0, exact[known].size + int(difference * (1 + self.fragmentation)))

        plans = [
            StagePlan(at.epoch, str(at.stage), shape_of(batch), size_of(index), index in exact)
            for index, (at, batch) in enumerate(zip(stages, batches, strict=True))
        ]
        return plans, exact[known]

    def scaled(self, batch: Batch) -> int:
        """Activations and loss of the full model, from two shallow copies."""
        traces = [
            self.planner.trace(self.experiment, self.ds_config, batch, layers)
            for layers in self.planner.depths or ()
        ]
        return self.planner.to_full_depth([peak_of(trace.events, without=GRADIENTS) for trace in traces])

    def exact_phase(self, batch: Batch) -> Phase:
        """Forward and backward, from a run of the full model."""
        trace = self.planner.trace(self.experiment, self.ds_config, batch, self.planner.num_layers)
        peak = replay(trace, self.sizes, self.zero)
        shape, zero = shape_of(batch), self.zero
        workspace = self.attention_workspace(shape)
        when = "in the backward" if peak.in_backward else "at the end of the forward"
        bucket = f"b R = {zero.model_bytes} x {zero.bucket:,}" + (" x 2" if zero.overlap else "")

        def part(kind: str, name: str, formula: str) -> Item:
            return Item(kind, name, peak.parts.get(kind, 0), formula)

        items = [
            part(ACTIVATIONS, "activations of all passes", f"run of the model, peak {when}"),
            Item(ACTIVATIONS, "attention workspace", workspace, "fp32 dQ of the longest pass"),
            part(LOSS, "logits and their gradient", f"{shape.labels} labels x vocabulary"),
            part(GRADIENTS, "gradients not yet reduced", f"replay of ZeRO-{zero.stage}"),
            part(COMMUNICATION, "reduce bucket and copies", bucket),
        ]
        return self.phase(items, peak.own)

    def quick_phase(self, activations: int) -> Phase:
        """Forward and backward, from shallow copies of the model and formulas."""
        zero, b = self.zero, self.zero.model_bytes
        waiting = b * self.sizes.trainable
        if zero.stage > 1:
            waiting = 0 if zero.offload_optimizer or zero.stage == 3 else waiting // zero.ranks
        items = [
            Item(ACTIVATIONS, "activations of all passes", activations, "scaled from shallow copies"),
            Item(GRADIENTS, "accumulated gradients", waiting, "b P for ZeRO-1, b P/N for ZeRO-2"),
            Item(COMMUNICATION, "reduce bucket", b * zero.bucket * (1 + zero.overlap), "b R"),
        ]
        return self.phase(items, {})

    def phase(self, items: list[Item], own_peaks: Mapping[str, int]) -> Phase:
        items = [item for item in items if item.size]
        if self.fragmentation:
            slack = int(self.fragmentation * sum(item.size for item in items))
            share = f"{FRAGMENTATION:.0%} of the phase, assumed"
            items.append(Item("fragmentation", "allocator's slack", slack, share))
        return Phase(FORWARD_BACKWARD, tuple(items), own_peaks)

    def attention_workspace(self, shape: BatchShape) -> int:
        """Bytes of the fp32 dQ that memory-efficient attention sums inside its operator for 16-bit models."""
        if self.planner.device != "cuda" or self.zero.model_bytes == 4:
            return 0
        return 4 * shape.rows * shape.prompt * self.planner.config.get_text_config().hidden_size

    def evaluation(self) -> Phase:
        """The larger of the loss at the largest stage and generation from the longest prompts."""
        planner, tokens = self.planner, self.planner.max_new_tokens
        losses = [
            (self.evaluated(batch, 0), f"stage of epoch {at.epoch + 1}, {shape_of(batch)}")
            for at in evaluated_stages(self.experiment)
            for batch in [largest_evaluation_batch(planner.valid, at, self.experiment, planner.vocabulary)]
        ]
        loss, where = max(losses)
        prompts = longest_prompts(planner.valid, self.experiment, planner.vocabulary)
        answers = self.evaluated(prompts, tokens)
        if loss >= answers:
            return Phase(EVALUATION, (Item(ACTIVATIONS, "loss without gradients", loss, where),))
        text = planner.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        rows, columns = prompts.shape
        cache = 2 * self.zero.model_bytes * rows * (columns + tokens) * width * planner.num_layers
        formula = (
            f"2 b x {rows} rows x ({columns} + {tokens}) columns x {width} x {planner.num_layers} layers"
        )
        items = (
            Item(ACTIVATIONS, "forward without gradients", answers - cache, str(shape_of(prompts))),
            Item(ACTIVATIONS, "keys and values of prompts and answers", cache, formula),
        )
        return Phase(EVALUATION, items)

    def evaluated(self, batch: Batch, new_tokens: int) -> int:
        """Peak bytes of the loss of a batch, or of generation from it, from shallow copies if possible."""
        planner = self.planner
        traces = [
            planner.trace(self.experiment, self.ds_config, batch, layers, new_tokens)
            for layers in planner.depths or (planner.num_layers,)
        ]
        return planner.to_full_depth([trace.peak for trace in traces])
