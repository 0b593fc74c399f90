"""Plan the memory of each phase beyond the persistent states, from fake runs of the model.

Each stage is planned with its largest micro-batch: longest question, longest continuation, most labels.  Rows
are shuffled, so some step of a long run may get them together.

Models of many equal layers are planned from runs of two shallow copies (depth.py).
"""

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter, le
from typing import TYPE_CHECKING, Any, TypeVar

from coconut_ds.config.deepspeed import DeepSpeedConfig
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.batching import Batch, collate
from coconut_ds.data.curriculum import (
    Stage,
    final_stage,
    last_epoch,
    latents_of,
    numbered_stage,
    prompt_only,
    render,
    stage_at,
)
from coconut_ds.data.problems import Problem
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary
from coconut_ds.memory.depth import sizes_with_depth, with_depth
from coconut_ds.memory.fake_run import (
    ACTIVATIONS,
    GRADIENTS,
    LOSS,
    FakeModel,
    Trace,
    build_fake_model,
    record,
    record_evaluation,
    with_layers,
)
from coconut_ds.memory.zero import COMMUNICATION, Item, Sizes, ZeroSettings, replay
from coconut_ds.model.loading import parameter_groups, saved_dtype
from coconut_ds.runs.record_shapes import EVALUATION, FORWARD_BACKWARD

if TYPE_CHECKING:
    from coconut_ds.memory.planner import Planner

WORKSPACES = "workspaces"
# GPUs from Hopper on, by what torch and users call them.
LARGE_WORKSPACES = re.compile(r"\b(G?[HB][1-9]\d+|RTX 50\d\d|RTX PRO)\b")
# In a larger file, only the problems with the most characters in some part are tokenized.
MAX_TOKENIZED = 4000
# Assumed, to be checked on a GPU: share lost between the blocks of the caching allocator.
FRAGMENTATION = 0.05

AnyProblem = TypeVar("AnyProblem", Problem, TokenizedProblem)


@dataclass(frozen=True)
class StageOfRun:
    """A stage and the first epoch (from 0) that trains it."""

    epoch: int
    stage: Stage


def cublas_bytes(gpu: str) -> int:
    """Workspaces of the forward's thread and of autograd's, by the name of the GPU.

    aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize: 8 x 4096 KiB from Hopper on
    """
    kib = 8 * 4096 if LARGE_WORKSPACES.search(gpu) else 2 * 4096 + 8 * 16
    return 2 * kib * 1024


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
    possible = {problem: _possible_stages(problem, at.stage, experiment) for problem in problems}
    stages = {problem: _largest_stage(problem, drawn) for problem, drawn in possible.items()}
    num_latents = max(
        latents_of(problem, stage, experiment) for problem, drawn in possible.items() for stage in drawn
    )

    def after(problem: TokenizedProblem) -> int:
        stage = stages[problem]
        reasoning = sum(map(len, problem.steps[stage.hidden_steps :]))
        return max(0, reasoning - stage.hidden_tokens) + len(problem.answer)

    def total(problem: TokenizedProblem) -> int:
        return len(problem.question) + after(problem)

    by_labels = sorted(problems, key=after, reverse=True)
    if num_latents and rows > 1:  # aligned: the longest question is padded to the most labels
        chosen = [max(problems, key=lambda problem: len(problem.question)), *by_labels[: rows - 1]]
    else:
        chosen = [max(problems, key=total), *by_labels[: rows - 1]]
    while len(chosen) < rows:
        chosen += chosen[: rows - len(chosen)]
    samples = [render(p, stages[p], experiment, vocabulary, i) for i, p in enumerate(chosen)]
    if experiment.latent_supervision is not None:  # at most one target per latent
        samples = [
            replace(s, latent_targets=tuple((slot, 0) for slot in range(s.num_latents))) for s in samples
        ]
    return collate(samples, vocabulary.pad_id, num_latents, 1, sum(len(s.latent_targets) for s in samples))


def _possible_stages(problem: TokenizedProblem, stage: Stage, experiment: Experiment) -> list[Stage]:
    """The stages at which this problem may be trained in an epoch of `stage` (curriculum.mixed_stage)."""
    if experiment.uniform_prob == 0 or not experiment.method.has_stages or stage.hidden_tokens:
        return [stage]
    return [stage, *(numbered_stage(number, experiment) for number in range(len(problem.steps) + 1))]


def _largest_stage(problem: TokenizedProblem, stages: Sequence[Stage]) -> Stage:
    """The stage with the longest text."""
    return max(stages, key=lambda s: sum(map(len, problem.steps[s.hidden_steps :])) + s.num_latents)


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
    stage: Stage | None = None  # of evaluation: the stage with the highest peak

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
        planner = self.planner
        saved_bytes = saved_dtype(planner.config).itemsize
        return ZeroSettings.of(
            self.ds_config, self.ranks, accumulates, planner.device, planner.rounds_up_to, saved_bytes
        )

    @cached_property
    def sizes(self) -> Sizes:
        fake_models = [self.fake_model(layers) for layers in self.planner.depths]
        groups = [parameter_groups(fake.model, self.experiment) for fake in fake_models]
        sizes = [Sizes.of(fake.model, own) for fake, own in zip(fake_models, groups, strict=True)]
        if len(sizes) == 1:
            return sizes[0]
        layers = [fake_models[1].layers_of(group["params"]) for group in groups[1]]
        return sizes_with_depth(sizes, self.planner.num_layers, layers)

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

    def trace(self, batch: Batch, new_tokens: int | None = None) -> Trace:
        """The cached trace of forward and backward of `batch`.

        With `new_tokens`: of a forward without gradients (0), or of the generation of so many tokens.
        """
        planner, key = self.planner, (*self.key, shape_of(batch), new_tokens)
        if key not in planner.traces:
            traces = [self.recorded(batch, layers, new_tokens) for layers in planner.depths]
            trace = with_depth(traces, planner.num_layers) if len(traces) > 1 else traces[0]
            planner.traces[key] = trace or self.recorded(batch, planner.num_layers, new_tokens)
        return planner.traces[key]

    def recorded(self, batch: Batch, layers: int, new_tokens: int | None) -> Trace:
        """The trace of a copy of the model with `layers` layers."""
        model = self.fake_model(layers)
        return record(model, batch) if new_tokens is None else record_evaluation(model, batch, new_tokens)

    def stages(self, states: int, only: int | None) -> tuple[list[StagePlan], Phase]:
        """Every stage, and the phase of the peak stage.

        `states`: bytes of the persistent states.  `only`: epoch of the only stage to plan.
        """
        rows, vocabulary = self.experiment.batch_size_training, self.planner.vocabulary
        stages = stages_of(self.experiment)
        if only is not None:
            stages = [at for at in stages if at.epoch <= only][-1:]
        phases, plans = [], []
        for at in stages:
            batch = largest_batch(self.planner.train, at, self.experiment, vocabulary, rows)
            phases.append(self.forward_backward(batch))
            plans.append(StagePlan(at.epoch, str(at.stage), shape_of(batch), states + phases[-1].size))
        return plans, max(phases, key=lambda phase: phase.size)

    def forward_backward(self, batch: Batch) -> Phase:
        """The phase of a micro-batch."""
        run = replay(self.trace(batch), self.sizes, self.zero)
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

    def phase(self, items: list[Item], own_peaks: Mapping[str, int]) -> Phase:
        items = [item for item in items if item.size]
        if self.fragmentation:
            slack = int(self.fragmentation * sum(item.size for item in items))
            share = f"{FRAGMENTATION:.0%} of the phase, assumed"
            items.append(Item("fragmentation", "allocator's slack", slack, share))
        return Phase(FORWARD_BACKWARD, tuple(items), own_peaks)

    def workspaces(self) -> list[Item]:
        """What cuBLAS keeps for the forward and for autograd's thread, from their first product on."""
        if self.planner.device != "cuda":
            return []
        budget = self.ds_config.memory_budget
        size = cublas_bytes("" if budget is None else budget.device)
        return [Item(WORKSPACES, "cuBLAS", size, f"2 threads x {size // 2048:,} KiB")]

    def attention_workspace(self, shape: BatchShape) -> int:
        """Bytes of the fp32 dQ that memory-efficient attention sums inside its operator for 16-bit models."""
        if self.planner.device != "cuda" or self.zero.model_bytes == 4:
            return 0
        text = self.planner.config.get_text_config()
        return 4 * shape.rows * shape.prompt * text.num_attention_heads * _head_dim(text)

    def evaluation(self) -> Phase:
        """The larger of the loss at the largest stage and generation from the longest prompts."""
        planner, tokens = self.planner, self.planner.max_new_tokens
        batches = {
            at: largest_evaluation_batch(planner.valid, at, self.experiment, planner.vocabulary)
            for at in evaluated_stages(self.experiment)
        }
        # A forward without gradients grows with the columns of its passes and the labels.
        shapes = {at: shape_of(batch) for at, batch in batches.items()}
        extents = {at: (s.prompt, s.columns, s.columns - s.prompt, s.labels) for at, s in shapes.items()}
        losses = {
            at: self.evaluated(batch, 0)
            for at, batch in batches.items()
            if not any(
                extents[at] != other and all(map(le, extents[at], other)) for other in extents.values()
            )
        }
        at, loss = max(losses.items(), key=itemgetter(1))
        prompts = longest_prompts(planner.valid, self.experiment, planner.vocabulary)
        answers = self.evaluated(prompts, tokens)
        if loss >= answers:
            where = f"stage of epoch {at.epoch + 1}, {shapes[at]}"
            item = Item(ACTIVATIONS, "loss without gradients", loss, where)
            return Phase(EVALUATION, (item,), stage=at.stage)
        text = planner.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = heads * _head_dim(text)
        rows, columns = prompts.shape
        cache = 2 * self.zero.model_bytes * rows * (columns + tokens) * width * planner.num_layers
        formula = (
            f"2 b x {rows} rows x ({columns} + {tokens}) columns x {width} x {planner.num_layers} layers"
        )
        items = (
            Item(ACTIVATIONS, "forward without gradients", answers - cache, str(shape_of(prompts))),
            Item(ACTIVATIONS, "keys and values of prompts and answers", cache, formula),
        )
        return Phase(EVALUATION, items, stage=final_stage(self.experiment))

    def evaluated(self, batch: Batch, new_tokens: int) -> int:
        """Peak bytes of the loss of a batch, or of generation from it."""
        return self.trace(batch, new_tokens).peak


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
