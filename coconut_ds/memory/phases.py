"""Plan the memory of each phase beyond the persistent states, from fake runs of the model.

Each stage is planned with its largest micro-batch: longest question, longest continuation, most labels.  Rows
are shuffled, so some step of a long run may get them together.

The full model runs only for the stages that may be the peak.  Two shallow copies of the model select these
and size the others: activations grow by the same number of bytes with every layer.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

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
from coconut_ds.data.problems import Problem
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary
from coconut_ds.memory.fake_run import (
    ACTIVATIONS,
    GRADIENTS,
    LOSS,
    FakeModel,
    Trace,
    build_fake_model,
    peak_of,
    record,
    record_evaluation,
    with_layers,
)
from coconut_ds.memory.zero import COMMUNICATION, Item, Sizes, ZeroSettings, replay
from coconut_ds.model.loading import parameter_groups

if TYPE_CHECKING:
    from coconut_ds.memory.planner import Planner

FORWARD_BACKWARD, STEP, EVALUATION = "forward and backward", "optimizer step", "evaluation"
# In a larger file, only the problems with the most characters in some part are tokenized.
MAX_TOKENIZED = 4000
# Assumed, to be checked on a GPU: share lost between the blocks of the caching allocator.
FRAGMENTATION = 0.05
# Stages at least this close to the largest are run on the full model too, at most MAX_EXACT of them.
NEAR, MAX_EXACT = 0.95, 2

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


def longest(problems: Sequence[AnyProblem], limit: int = MAX_TOKENIZED) -> list[AnyProblem]:
    """At most `limit` problems: those with the longest question, reasoning or total, or the most steps.

    Lengths are in characters, or in tokens for tokenized problems.
    """
    if len(problems) <= limit:
        return list(problems)
    sizes = []
    for p in problems:
        question, reasoning, num_steps = len(p.question), sum(map(len, p.steps)), len(p.steps)
        sizes.append((question, reasoning, question + reasoning + len(p.answer), num_steps))
    share = limit // len(sizes[0])
    chosen = {
        index
        for lengths in zip(*sizes, strict=True)
        for index in heapq.nlargest(share, range(len(lengths)), lengths.__getitem__)
    }
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
    if experiment.latent_supervision is not None:  # at most one target per latent
        samples = [
            replace(s, latent_targets=tuple((slot, 0) for slot in range(s.num_latents))) for s in samples
        ]
    max_latents = max((stages[p].num_latents for p in problems), default=0)
    padded = at.stage.num_latents if experiment.pad_latent_to_max else max(s.num_latents for s in samples)
    columns = max(max_latents, padded) if _mixes(experiment) else None
    return collate(samples, vocabulary.pad_id, columns, 1, sum(len(s.latent_targets) for s in samples))


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
    # Evaluation does not mix stages, and its loss is that of the text.
    unmixed = replace(experiment, uniform_prob=0.0, latent_supervision=None)
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
    ranks: int

    @property
    def fragmentation(self) -> float:
        return FRAGMENTATION if self.planner.device == "cuda" else 0.0

    @cached_property
    def zero(self) -> ZeroSettings:
        accumulates = self.experiment.gradient_accumulation_steps > 1
        return ZeroSettings.of(self.ds_config, self.ranks, accumulates, self.planner.device)

    @cached_property
    def sizes(self) -> Sizes:
        model = self.fake_model(self.planner.num_layers).model
        return Sizes.of(model, parameter_groups(model, self.experiment))

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """The settings that change a trace, apart from the batch."""
        learned = [
            value
            for name, value in vars(self.experiment).items()
            if name.startswith(("lora_", "latent_window_")) or name in ("thought", "tuning")
        ]
        ds_config = self.ds_config
        precision_and_stage = ds_config.precision == "fp32", ds_config.zero_stage == 3
        return (*learned, self.experiment.method.has_latents, ds_config.latent_memory, *precision_and_stage)

    def fake_model(self, layers: int) -> FakeModel:
        """The cached fake model with fewer layers."""
        planner, ds_config = self.planner, self.ds_config
        if (*self.key, layers) not in planner.fake_models:
            fake_model = build_fake_model(
                self.experiment,
                with_layers(planner.config, layers),
                planner.vocabulary_size,
                planner.vocabulary.special_token_ids,
                ds_config.latent_memory,
                ds_config.precision,
                planner.device,
            )
            if ds_config.zero_stage == 3:
                for parameter in fake_model.model.parameters():
                    parameter.ds_id = 0  # type: ignore[attr-defined]  # how techniques detect ZeRO-3
            planner.fake_models[(*self.key, layers)] = fake_model
        return planner.fake_models[(*self.key, layers)]

    def trace_key(self, batch: Batch, layers: int, new_tokens: int | None = None) -> tuple[Any, ...]:
        return (*self.key, shape_of(batch), layers, new_tokens)

    def trace(self, batch: Batch, layers: int, new_tokens: int | None = None) -> Trace:
        """The cached trace of forward and backward of `batch`.

        With `new_tokens`: of a forward without gradients (0), or of the generation of so many tokens.
        """
        key, traces = self.trace_key(batch, layers, new_tokens), self.planner.traces
        if key not in traces:
            model = self.fake_model(layers)
            traces[key] = (
                record(model, batch) if new_tokens is None else record_evaluation(model, batch, new_tokens)
            )
        return traces[key]

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
                if quick_at is None or self.trace_key(batches[index], planner.num_layers) in planner.traces
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
        traces = [self.trace(batch, layers) for layers in self.planner.depths or ()]
        return self.planner.to_full_depth([peak_of(trace.events, without=GRADIENTS) for trace in traces])

    def exact_phase(self, batch: Batch) -> Phase:
        """Forward and backward, from a run of the full model."""
        run = replay(self.trace(batch, self.planner.num_layers), self.sizes, self.zero)
        shape, zero = shape_of(batch), self.zero
        workspace = self.attention_workspace(shape)
        when = "in the backward" if run.peak_in_backward else "at the end of the forward"
        bucket = f"b R = {zero.model_bytes} x {zero.bucket:,}" + (" x 2" if zero.overlap else "")

        def part(kind: str, name: str, formula: str) -> Item:
            return Item(kind, name, run.parts[kind], formula)

        items = [
            part(ACTIVATIONS, "activations of all passes", f"run of the model, peak {when}"),
            Item(ACTIVATIONS, "attention workspace", workspace, "fp32 dQ of the longest pass"),
            part(LOSS, "logits and their gradient", f"{shape.labels} labels x vocabulary"),
            part(GRADIENTS, "gradients not yet reduced", f"replay of ZeRO-{zero.stage}"),
            part(COMMUNICATION, "reduce bucket and copies", bucket),
        ]
        return self.phase(items, run.own)

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
        depths = self.planner.depths or (self.planner.num_layers,)
        return self.planner.to_full_depth([self.trace(batch, layers, new_tokens).peak for layers in depths])
