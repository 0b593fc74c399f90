"""Make plans: run the phantom on the worst batches, replay ZeRO over its traces, add the states.

One run of the full model is made for the stage that governs.  Which one that is, and what the other stages
take, is told by two shallow copies: activations grow by the same bytes with every layer.

Knows: phantoms, traces, ZeRO's formulas, worst batches.  Does not know: the command line, tables.
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from coconut_ds.batching import Batch
from coconut_ds.config import Experiment
from coconut_ds.ds_config import DeepSpeedConfig
from coconut_ds.lora import parameter_groups
from coconut_ds.memory.gradient_path import replay
from coconut_ds.memory.phantom import Phantom, build_phantom, has_equal_layers, with_layers
from coconut_ds.memory.plan import (
    EVALUATION,
    FORWARD_BACKWARD,
    STEP,
    BatchShape,
    Phase,
    Plan,
    StagePlan,
)
from coconut_ds.memory.trace import ACTIVATIONS, GRADIENTS, LOSS, Trace, peak_of, record, record_evaluation
from coconut_ds.memory.worst import (
    TextShape,
    read_lengths,
    stages_of,
    worst_batch,
    worst_evaluation_batch,
)
from coconut_ds.memory.zero import (
    COMMUNICATION,
    Item,
    Sizes,
    ZeroSettings,
    gpu_states,
    host_states,
    step_items,
)
from coconut_ds.model.loading import load_config
from coconut_ds.problems import card_for
from coconut_ds.tokens import TokenizedProblem, Vocabulary

# Layers of the two copies that tell how much a layer takes; fewer than this and the model itself is run.
SHALLOW = (2, 4)
# The caching allocator's blocks do not fit together exactly.  An assumption, to be checked on a GPU.
FRAGMENTATION = 0.05
PINNED_ROUNDING = "pinned_max_round_threshold_mb"


@dataclass
class Planner:
    """Plans variations of one experiment's model and data; runs made once are remembered."""

    config: PretrainedConfig
    train: list[TokenizedProblem]
    valid: list[TokenizedProblem]
    vocabulary: Vocabulary
    vocabulary_size: int
    max_new_tokens: int
    notes: tuple[str, ...] = ()
    device: str = "cuda"
    _phantoms: dict[Any, Phantom] = field(default_factory=dict, repr=False)
    _traces: dict[Any, Trace] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, experiment: Experiment, shape: TextShape | None = None, device: str = "cuda") -> "Planner":
        """Read the model's configuration and the data's lengths.  Raises ConfigError, DataError."""
        config = load_config(experiment.model_id)
        train, valid, vocabulary = read_lengths(experiment, shape)
        return cls.from_material(experiment, train, valid, vocabulary, device, config)

    @classmethod
    def from_material(
        cls,
        experiment: Experiment,
        train: list[TokenizedProblem],
        valid: list[TokenizedProblem],
        vocabulary: Vocabulary | None,
        device: str,
        config: PretrainedConfig | None = None,
    ) -> "Planner":
        """A planner for problems that are tokenised already."""
        config = load_config(experiment.model_id) if config is None else config
        size = config.get_text_config().vocab_size
        notes = ()
        if vocabulary is None:
            notes = ("token counts as given; no data and no tokenizer was read",)
            stand_in: Any = None
            vocabulary = Vocabulary(
                stand_in, start_id=size, latent_id=size + 1, end_id=size + 2, eos_id=0, pad_id=0
            )
            size += 3
        else:
            size = max(size, len(vocabulary.tokenizer))
        limit = experiment.max_new_tokens
        if limit is None:
            limit = card_for(experiment.val_path).max_new_tokens
        return cls(config, train, valid, vocabulary, size, limit, notes, device)

    @property
    def num_layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    @property
    def fragmentation(self) -> float:
        return FRAGMENTATION if self.device == "cuda" else 0.0

    def plan(
        self,
        experiment: Experiment,
        ds_config: DeepSpeedConfig,
        ranks: int | None = None,
        *,
        quick_at: int | None = None,
    ) -> Plan:
        """The plan of one experiment under one ds_config.

        ranks: GPUs of the run, else those of the memory_budget, else 1.
        quick_at: look at the stage of this epoch alone, and at shallow copies of the model alone.
        Raises ConfigError where the two files contradict each other or the model cannot have a technique.
        """
        budget = ds_config.memory_budget
        ranks = ranks or (budget.gpus if budget is not None else 1)
        ds_config.resolve(experiment, ranks)
        zero = ZeroSettings.of(ds_config, ranks, experiment.gradient_accumulation_steps > 1, self.device)
        sizes = self._sizes(experiment, ds_config)
        states = gpu_states(sizes, zero)
        run = _Run(self, experiment, ds_config, sizes, zero)
        stages, governing = run.stages(sum(item.size for item in states), quick_at)
        phases = [governing, Phase(STEP, tuple(step_items(sizes, zero)))]
        if self.valid:
            phases.append(run.evaluation())
        return Plan(
            experiment=experiment.name,
            ds_config=ds_config.path,
            model=f"{experiment.model_id}, {(sizes.trainable + sizes.frozen) / 1e6:,.1f} M parameters, "
            f"{sizes.trainable / 1e6:,.1f} M train",
            ranks=ranks,
            budget=budget,
            states=tuple(states),
            phases=tuple(phases),
            stages=tuple(stages),
            host=tuple(host_states(sizes, zero)),
            notes=self.notes + self._warnings(stages, ds_config),
        )

    @property
    def depths(self) -> tuple[int, int] | None:
        """Layers of the two shallow copies; None where they would say nothing about the whole."""
        if self.num_layers <= SHALLOW[1] or not has_equal_layers(self.config.get_text_config()):
            return None
        return SHALLOW

    def to_full_depth(self, sizes: list[int]) -> int:
        """What the whole model takes, from what the two shallow copies take."""
        if len(sizes) == 1:
            return sizes[0]
        low, high = sizes
        return low + (high - low) * (self.num_layers - SHALLOW[0]) // (SHALLOW[1] - SHALLOW[0])

    def trace(self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch, layers: int) -> Trace:
        """Forward and backward of `batch`, run or remembered."""
        key = self._trace_key(experiment, ds_config, batch, layers)
        if key not in self._traces:
            self._traces[key] = record(self._phantom(experiment, ds_config, layers), batch)
        return self._traces[key]

    def remembers(self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch) -> bool:
        """Whether the whole model has run this batch."""
        return self._trace_key(experiment, ds_config, batch, self.num_layers) in self._traces

    def evaluation_trace(
        self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch, layers: int
    ) -> Trace:
        """Forward of `batch` without gradients, run or remembered."""
        key = ("evaluation", *self._trace_key(experiment, ds_config, batch, layers))
        if key not in self._traces:
            self._traces[key] = record_evaluation(self._phantom(experiment, ds_config, layers), batch)
        return self._traces[key]

    def _trace_key(
        self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch, layers: int
    ) -> tuple[Any, ...]:
        return (*self._key(experiment, ds_config), layers, shape_of(batch))

    def _phantom(self, experiment: Experiment, ds_config: DeepSpeedConfig, layers: int) -> Phantom:
        key = (*self._key(experiment, ds_config), layers)
        if key not in self._phantoms:
            phantom = build_phantom(
                experiment,
                with_layers(self.config, layers),
                self.vocabulary_size,
                self.vocabulary.marker_ids,
                ds_config.latent_memory,
                ds_config.precision,
                self.device,
            )
            if ds_config.zero_stage == 3:
                for parameter in phantom.model.parameters():
                    parameter.ds_id = 0  # type: ignore[attr-defined]  # what techniques know ZeRO-3's by
            self._phantoms[key] = phantom
        return self._phantoms[key]

    def _key(self, experiment: Experiment, ds_config: DeepSpeedConfig) -> tuple[Any, ...]:
        """What changes a trace, the batch apart."""
        learned = [
            getattr(experiment, name)
            for name in vars(experiment)
            if name.startswith(("lora_", "latent_window_")) or name in ("thought", "tuning")
        ]
        return (
            *learned,
            experiment.method.has_latents,
            ds_config.latent_memory,
            ds_config.precision == "fp32",
            ds_config.zero_stage == 3,
        )

    def _sizes(self, experiment: Experiment, ds_config: DeepSpeedConfig) -> Sizes:
        model = self._phantom(experiment, ds_config, self.num_layers).model
        groups = parameter_groups(model, experiment)
        return Sizes(
            groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
            frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
            buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        )

    def _warnings(self, stages: list[StagePlan], ds_config: DeepSpeedConfig) -> tuple[str, ...]:
        notes = []
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        columns = max(stage.shape.columns for stage in stages)
        if most is not None and columns > most:
            notes.append(f"the longest rows have {columns} columns, and the model holds {most} positions")
        if ds_config.zero_stage == 3:
            notes.append(
                "ZeRO-3 is an estimate: DeepSpeed gathers weights as it goes, up to max_live_parameters"
            )
        rounds_pinned = PINNED_ROUNDING not in os.environ.get("PYTORCH_ALLOC_CONF", "")
        if ds_config.offload_optimizer and self.device == "cuda" and rounds_pinned:
            notes.append(
                f"PYTORCH_ALLOC_CONF={PINNED_ROUNDING}:1 saves the rounding of pinned blocks (torch >= 2.13)"
            )
        return tuple(notes)


@dataclass(frozen=True)
class _Run:
    """One plan in the making."""

    planner: Planner
    experiment: Experiment
    ds_config: DeepSpeedConfig
    sizes: Sizes
    zero: ZeroSettings

    def stages(self, states: int, quick_at: int | None) -> tuple[list[StagePlan], Phase]:
        """Every stage, and the phase of the one that governs.  `states`: bytes that are there anyway."""
        planner, rows = self.planner, self.experiment.batch_size_training
        places = stages_of(self.experiment)
        if quick_at is not None:
            places = [at for at in places if at.epoch <= quick_at][-1:]
        found = [
            (at, worst_batch(planner.train, at, self.experiment, planner.vocabulary, rows)) for at in places
        ]
        scaled = [
            self.scaled(batch) if len(found) > 1 or quick_at is not None else None for _, batch in found
        ]
        exact: dict[int, Phase] = {}
        if None in scaled:
            exact = {place: self.exact_phase(batch) for place, (_, batch) in enumerate(found)}
        else:
            largest = max(range(len(found)), key=lambda place: scaled[place] or 0)
            batch = found[largest][1]
            is_known = quick_at is None or planner.remembers(self.experiment, self.ds_config, batch)
            exact[largest] = self.exact_phase(batch) if is_known else self.quick_phase(scaled[largest] or 0)
        known = max(exact, key=lambda place: exact[place].size)

        def size_of(place: int) -> int:
            if place in exact:
                return states + exact[place].size
            difference = (scaled[place] or 0) - (scaled[known] or 0)
            return states + max(0, exact[known].size + int(difference * (1 + planner.fragmentation)))

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
        if self.planner.fragmentation:
            slack = int(self.planner.fragmentation * sum(item.size for item in items))
            share = f"{FRAGMENTATION:.0%} of the phase, assumed"
            items.append(Item("fragmentation", "allocator's slack", slack, share))
        return Phase(FORWARD_BACKWARD, tuple(items), own_peaks)

    def attention_workspace(self, shape: BatchShape) -> int:
        """Memory-efficient attention sums dQ in fp32 when the model is in 16 bits; no operator shows it."""
        if self.planner.device != "cuda" or self.zero.model_bytes == 4:
            return 0
        return 4 * shape.rows * shape.prompt * self.planner.config.get_text_config().hidden_size

    def evaluation(self) -> Phase:
        """The longest rows of the last stage, and the keys and values of their answers."""
        planner, rows = self.planner, self.experiment.batch_size_eval
        batch = worst_evaluation_batch(planner.valid, self.experiment, planner.vocabulary)
        forward = planner.to_full_depth(
            [
                planner.evaluation_trace(self.experiment, self.ds_config, batch, layers).peak
                for layers in planner.depths or (planner.num_layers,)
            ]
        )
        text = planner.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        b, tokens = self.zero.model_bytes, planner.max_new_tokens
        formula = f"2 b x {rows} rows x {tokens} tokens x {width} x {planner.num_layers} layers"
        answers = 2 * b * rows * tokens * width * planner.num_layers
        items = (
            Item(ACTIVATIONS, "forward without gradients", forward, str(shape_of(batch))),
            Item(ACTIVATIONS, "keys and values of answers", answers, formula),
        )
        return Phase(EVALUATION, items)


def shape_of(batch: Batch) -> BatchShape:
    rows, columns = batch.shape
    prompt = batch.first_latent if batch.num_latents else columns
    return BatchShape(rows, columns, prompt, batch.num_latents, len(batch.target_ids_N))


def with_rows(experiment: Experiment, rows: int) -> Experiment:
    """The same effective batch from micro-batches of `rows` rows; a little more where that does not divide."""
    total = experiment.batch_size_training * experiment.gradient_accumulation_steps
    return replace(experiment, batch_size_training=rows, gradient_accumulation_steps=-(-total // rows))
