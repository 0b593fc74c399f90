"""What the phases of a run take on a GPU beyond the lasting states: from runs of the model or of its copies.

The full model is run for the stages that may govern.  Which these are, and what the other stages
take, is told by two shallow copies: activations grow by the same bytes with every layer.

Knows: traces, ZeRO's gradient path, worst batches.  Does not know: where traces come from, states, budgets.
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

# The caching allocator's blocks do not fit together exactly.  An assumption, to be checked on a GPU.
FRAGMENTATION = 0.05
# Stages that come so close to the largest are run on the whole model too, at most so many.
NEAR, MAX_EXACT = 0.95, 2


class Source(Protocol):
    """Where traces come from: planner.Planner."""

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

    def remembers(self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch) -> bool: ...


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
        """Every stage, and the phase of the one that governs.  `states`: bytes that are there anyway."""
        planner, rows = self.planner, self.experiment.batch_size_training
        places = stages_of(self.experiment)
        if quick_at is not None:
            places = [at for at in places if at.epoch <= quick_at][-1:]
        found = [
            (at, largest_batch(planner.train, at, self.experiment, planner.vocabulary, rows)) for at in places
        ]
        scaled = [
            self.scaled(batch) if len(found) > 1 or quick_at is not None else None for _, batch in found
        ]
        exact: dict[int, Phase] = {}
        if None in scaled:
            exact = {place: self.exact_phase(batch) for place, (_, batch) in enumerate(found)}
        else:
            top = max(size or 0 for size in scaled)
            near = [place for place, size in enumerate(scaled) if (size or 0) >= NEAR * top]
            for place in sorted(near, key=lambda place: scaled[place] or 0, reverse=True)[:MAX_EXACT]:
                batch = found[place][1]
                is_known = quick_at is None or planner.remembers(self.experiment, self.ds_config, batch)
                exact[place] = self.exact_phase(batch) if is_known else self.quick_phase(scaled[place] or 0)
        known = max(exact, key=lambda place: exact[place].size)

        def size_of(place: int) -> int:
            if place in exact:
                return states + exact[place].size
            difference = (scaled[place] or 0) - (scaled[known] or 0)
            return states + max(0, exact[known].size + int(difference * (1 + self.fragmentation)))

        plans = [
            StagePlan(at.epoch, str(at.stage), shape_of(batch), size_of(place), place in exact)
            for place, (at, batch) in enumerate(found)
        ]
        return plans, exact[known]

    def scaled(self, batch: Batch) -> int | None:
        """Activations and loss of the whole model from two shallow copies; None where these say nothing."""
        if self.planner.depths is None:
            return None
        sizes = []
        for layers in self.planner.depths:
            events = self.planner.trace(self.experiment, self.ds_config, batch, layers).events
            sizes.append(peak_of([e for e in events if not (isinstance(e, tuple) and e[1] == GRADIENTS)])[0])
        return self.planner.to_full_depth(sizes)

    def exact_phase(self, batch: Batch) -> Phase:
        """Forward and backward, from a run of the whole model."""
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
                f"{shape.labels} labels, vocabulary wide",
            ),
            Item(
                GRADIENTS, "gradients on their way", parts.get(GRADIENTS, 0), f"replay of ZeRO-{zero.stage}"
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
                "gradients that wait",
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
        """Memory-efficient attention sums dQ in fp32 when the model is in 16 bits; no operator shows it."""
        if self.planner.device != "cuda" or self.zero.model_bytes == 4:
            return 0
        return 4 * shape.rows * shape.prompt * self.planner.config.get_text_config().hidden_size

    def evaluation(self) -> Phase:
        """The loss of the stage that takes the most, or the longest answers to the longest prompts."""
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
        """Bytes of the loss of a batch, or of answers to it, from shallow copies where they tell enough."""
        planner = self.planner
        depths = planner.depths or (planner.num_layers,)
        traces = [
            planner.evaluation_trace(self.experiment, self.ds_config, batch, layers, max_new_tokens)
            for layers in depths
        ]
        return planner.to_full_depth([trace.peak for trace in traces])
