"""Plan the memory of each phase beyond the persistent states, from fake runs of the model.

The full model runs only for the stages that may be the peak.  Two shallow copies of the model select these
and size the others: activations grow by the same number of bytes with every layer.
"""

from dataclasses import dataclass
from typing import Protocol

from transformers import PretrainedConfig

from coconut_ds.config.deepspeed import DeepSpeedConfig
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.batching import Batch
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary
from coconut_ds.memory.fake_trace import ACTIVATIONS, GRADIENTS, LOSS, Trace, peak_of
from coconut_ds.memory.gradient_path import replay
from coconut_ds.memory.largest_batches import (
    evaluated_stages,
    largest_batch,
    largest_evaluation_batch,
    longest_prompts,
    shape_of,
    stages_of,
)
from coconut_ds.memory.plan import EVALUATION, FORWARD_BACKWARD, BatchShape, Phase, StagePlan
from coconut_ds.memory.zero import COMMUNICATION, Item, Sizes, ZeroSettings

# Assumed, to be checked on a GPU: share lost between the blocks of the caching allocator.
FRAGMENTATION = 0.05
# Stages at least this close to the largest are run on the full model too, at most MAX_EXACT of them.
NEAR, MAX_EXACT = 0.95, 2


class Source(Protocol):
    """The source of traces: planner.Planner."""

    config: PretrainedConfig
    train: list[TokenizedProblem]
    valid: list[TokenizedProblem]
    vocabulary: Vocabulary
    max_new_tokens: int
    device: str

    @property
    def num_layers(self) -> int: ...

    @property
    def depths(self) -> tuple[int, int] | None: ...

    def to_full_depth(self, sizes: list[int]) -> int: ...

    def trace(
        self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch, layers: int
    ) -> Trace: ...

    def evaluation_trace(
        self,
        experiment: Experiment,
        ds_config: DeepSpeedConfig,
        batch: Batch,
        layers: int,
        max_new_tokens: int = 0,
    ) -> Trace: ...

    def has_trace(self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch) -> bool: ...


@dataclass(frozen=True)
class PlannedRun:
    """One experiment under one ds_config."""

    planner: Source
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
        is_scaled = len(stages) > 1 or quick_at is not None
        scaled = [self.scaled(batch) if is_scaled else None for batch in batches]
        exact: dict[int, Phase] = {}
        if None in scaled:
            exact = {index: self.exact_phase(batch) for index, batch in enumerate(batches)}
        else:
            top = max(size or 0 for size in scaled)
            near = [index for index, size in enumerate(scaled) if (size or 0) >= NEAR * top]
            for index in sorted(near, key=lambda index: scaled[index] or 0, reverse=True)[:MAX_EXACT]:
                batch = batches[index]
                is_known = quick_at is None or planner.has_trace(self.experiment, self.ds_config, batch)
                exact[index] = self.exact_phase(batch) if is_known else self.quick_phase(scaled[index] or 0)
        known = max(exact, key=lambda index: exact[index].size)

        def size_of(index: int) -> int:
            if index in exact:
                return states + exact[index].size
            difference = (scaled[index] or 0) - (scaled[known] or 0)
            return states + max(0, exact[known].size + int(difference * (1 + self.fragmentation)))

        plans = [
            StagePlan(at.epoch, str(at.stage), shape_of(batch), size_of(index), index in exact)
            for index, (at, batch) in enumerate(zip(stages, batches, strict=True))
        ]
        return plans, exact[known]

    def scaled(self, batch: Batch) -> int | None:
        """Activations and loss of the full model from two shallow copies, or None if layers differ."""
        if self.planner.depths is None:
            return None
        sizes = []
        for layers in self.planner.depths:
            events = self.planner.trace(self.experiment, self.ds_config, batch, layers).events
            sizes.append(peak_of([e for e in events if not (isinstance(e, tuple) and e[1] == GRADIENTS)])[0])
        return self.planner.to_full_depth(sizes)

    def exact_phase(self, batch: Batch) -> Phase:
        """Forward and backward, from a run of the full model."""
        trace = self.planner.trace(self.experiment, self.ds_config, batch, self.planner.num_layers)
        peak = replay(trace, self.sizes, self.zero)
        parts, shape, zero = peak.parts, shape_of(batch), self.zero
        when = "in the backward" if peak.in_backward else "at the end of the forward"
        bucket = f"b R = {zero.model_bytes} x {zero.bucket:,}" + (" x 2" if zero.overlap else "")
        items = [
            Item(
                ACTIVATIONS,
                "activations of all passes",
                parts.get(ACTIVATIONS, 0),
                f"run of the model, peak {when}",
            ),
            Item(
                ACTIVATIONS,
                "attention workspace",
                self.attention_workspace(shape),
                "fp32 dQ of the longest pass",
            ),
            Item(
                LOSS,
                "logits and their gradient",
                parts.get(LOSS, 0),
                f"{shape.labels} labels x vocabulary",
            ),
            Item(
                GRADIENTS,
                "gradients not yet reduced",
                parts.get(GRADIENTS, 0),
                f"replay of ZeRO-{zero.stage}",
            ),
            Item(COMMUNICATION, "reduce bucket and copies", parts.get(COMMUNICATION, 0), bucket),
        ]
        return self.phase(items, peak.own)

    def quick_phase(self, activations: int) -> Phase:
        """Forward and backward, from shallow copies of the model and formulas."""
        zero, b = self.zero, self.zero.model_bytes
        waiting = {
            1: b * self.sizes.trainable,
            2: 0 if zero.offload_optimizer else b * self.sizes.trainable // zero.ranks,
        }
        items = [
            Item(ACTIVATIONS, "activations of all passes", activations, "scaled from shallow copies"),
            Item(
                GRADIENTS,
                "accumulated gradients",
                waiting.get(zero.stage, 0),
                "b P for ZeRO-1, b P/N for ZeRO-2",
            ),
            Item(COMMUNICATION, "reduce bucket", b * zero.bucket * (1 + zero.overlap), "b R"),
        ]
        return self.phase(items, {})

    def phase(self, items: list[Item], own_peaks: dict[str, int]) -> Phase:
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
            (self._evaluated(batch, 0), f"stage of epoch {at.epoch + 1}, {shape_of(batch)}")
            for at in evaluated_stages(self.experiment)
            for batch in [largest_evaluation_batch(planner.valid, at, self.experiment, planner.vocabulary)]
        ]
        loss, where = max(losses)
        prompts = longest_prompts(planner.valid, self.experiment, planner.vocabulary)
        answers = self._evaluated(prompts, tokens)
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

    def _evaluated(self, batch: Batch, max_new_tokens: int) -> int:
        """Peak bytes of the loss of a batch, or of generation from it, from shallow copies if possible."""
        planner = self.planner
        depths = planner.depths or (planner.num_layers,)
        traces = [
            planner.evaluation_trace(self.experiment, self.ds_config, batch, layers, max_new_tokens)
            for layers in depths
        ]
        return planner.to_full_depth([trace.peak for trace in traces])
