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
from coconut_ds.curriculum import METHODS_WITH_LATENTS
from coconut_ds.ds_config import DeepSpeedConfig
from coconut_ds.lora import parameter_groups
from coconut_ds.memory.gradient_path import Peak, replay
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
    StageOfRun,
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

    def plan(self, experiment: Experiment, ds_config: DeepSpeedConfig, ranks: int | None = None) -> Plan:
        """The plan of one experiment under one ds_config.

        ranks: GPUs of the run, else those of the memory_budget, else 1.
        Raises ConfigError where the two files contradict each other or the model cannot have a technique.
        """
        budget = ds_config.memory_budget
        ranks = ranks or (budget.gpus if budget is not None else 1)
        ds_config.resolve(experiment, ranks)
        zero = ZeroSettings.of(ds_config, ranks, experiment.gradient_accumulation_steps > 1, self.device)
        sizes = self._sizes(self._phantom(experiment, ds_config, self.num_layers), experiment)
        states = gpu_states(sizes, zero)
        stages, governing = self._stages(experiment, ds_config, sizes, zero, sum(i.size for i in states))
        step = Phase(STEP, tuple(step_items(sizes, zero)))
        phases = [governing, step]
        if self.valid:
            phases.append(self._evaluation(experiment, ds_config))
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
            notes=self.notes + self._warnings(experiment, ds_config),
        )

    def _stages(
        self,
        experiment: Experiment,
        ds_config: DeepSpeedConfig,
        sizes: Sizes,
        zero: ZeroSettings,
        states: int,
    ) -> tuple[list[StagePlan], Phase]:
        rows = experiment.batch_size_training
        found = [
            (at, worst_batch(self.train, at, experiment, self.vocabulary, rows))
            for at in stages_of(experiment)
        ]
        scaled = [self._scaled(experiment, ds_config, batch) for _, batch in found]
        exact: dict[int, Phase] = {}

        def run(place: int) -> None:
            trace = self._trace(experiment, ds_config, found[place][1], self.num_layers)
            exact[place] = self._phase(replay(trace, sizes, zero), found[place][1], zero)

        if None in scaled:
            for place in range(len(found)):
                run(place)
        else:
            run(max(range(len(found)), key=lambda place: scaled[place] or 0))
        known = max(exact, key=lambda place: exact[place].size)

        def size_of(place: int) -> int:
            if place in exact:
                return states + exact[place].size
            difference = (scaled[place] or 0) - (scaled[known] or 0)
            return states + max(0, exact[known].size + int(difference * (1 + self._fragmentation)))

        plans = [
            StagePlan(at.epoch, str(at.stage), shape_of(batch), size_of(place), place in exact)
            for place, (at, batch) in enumerate(found)
        ]
        return plans, exact[known]

    @property
    def _fragmentation(self) -> float:
        return FRAGMENTATION if self.device == "cuda" else 0.0

    def _phase(self, peak: Peak, batch: Batch, zero: ZeroSettings) -> Phase:
        parts = peak.parts
        when = "in the backward" if peak.in_backward else "at the end of the forward"
        shape = shape_of(batch)
        items = [
            Item(
                ACTIVATIONS,
                "activations of all passes",
                parts.get(ACTIVATIONS, 0),
                f"run of the model, peak {when}",
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
            Item(
                COMMUNICATION,
                "reduce bucket and copies",
                parts.get(COMMUNICATION, 0),
                f"b R = {zero.model_bytes} x {zero.bucket:,}" + (" x 2" if zero.overlap else ""),
            ),
        ]
        workspace = self._attention_workspace(shape, zero)
        if workspace:
            items.insert(
                1, Item(ACTIVATIONS, "attention workspace", workspace, "fp32 dQ of the longest pass")
            )
        items = [item for item in items if item.size]
        if self._fragmentation:
            slack = int(self._fragmentation * sum(item.size for item in items))
            items.append(
                Item(
                    "fragmentation", "allocator's slack", slack, f"{FRAGMENTATION:.0%} of the phase, assumed"
                )
            )
        return Phase(FORWARD_BACKWARD, tuple(items), peak.own)

    def _attention_workspace(self, shape: BatchShape, zero: ZeroSettings) -> int:
        """Memory-efficient attention sums dQ in fp32 when the model is in 16 bits; no operator shows it."""
        if self.device != "cuda" or zero.model_bytes == 4:
            return 0
        return 4 * shape.rows * shape.prompt * self.config.get_text_config().hidden_size

    def _evaluation(self, experiment: Experiment, ds_config: DeepSpeedConfig) -> Phase:
        batch = worst_evaluation_batch(self.valid, experiment, self.vocabulary)
        depths = self._depths or (self.num_layers,)
        sizes = []
        for layers in depths:
            key = ("evaluation", *self._key(experiment, ds_config), layers, shape_of(batch))
            if key not in self._traces:
                self._traces[key] = record_evaluation(self._phantom(experiment, ds_config, layers), batch)
            sizes.append(self._traces[key].peak)
        forward = self._to_full_depth(sizes)
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        b = 4 if ds_config.precision == "fp32" else 2
        rows = experiment.batch_size_eval
        answers = 2 * b * rows * self.max_new_tokens * width * self.num_layers
        items = (
            Item(ACTIVATIONS, "forward without gradients", forward, f"{shape_of(batch)}"),
            Item(
                ACTIVATIONS,
                "keys and values of answers",
                answers,
                f"2 b x {rows} rows x {self.max_new_tokens} tokens x {width} x {self.num_layers} layers",
            ),
        )
        return Phase(EVALUATION, items)

    @property
    def _depths(self) -> tuple[int, int] | None:
        if self.num_layers <= SHALLOW[1] or not has_equal_layers(self.config.get_text_config()):
            return None
        return SHALLOW

    def _to_full_depth(self, sizes: list[int]) -> int:
        """What the whole model takes, from what the two shallow copies take."""
        if len(sizes) == 1:
            return sizes[0]
        low, high = sizes
        return low + (high - low) * (self.num_layers - SHALLOW[0]) // (SHALLOW[1] - SHALLOW[0])

    def _scaled(self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch) -> int | None:
        """Activations and loss of the whole model from two shallow copies; None where these say nothing."""
        if self._depths is None:
            return None
        sizes = []
        for layers in self._depths:
            trace = self._trace(experiment, ds_config, batch, layers)
            sizes.append(
                peak_of([e for e in trace.events if not (isinstance(e, tuple) and e[1] == GRADIENTS)])[0]
            )
        return self._to_full_depth(sizes)

    def _trace(self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch, layers: int) -> Trace:
        key = (*self._key(experiment, ds_config), layers, shape_of(batch))
        if key not in self._traces:
            self._traces[key] = record(self._phantom(experiment, ds_config, layers), batch)
        return self._traces[key]

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
                    parameter.ds_id = 0  # what techniques recognise ZeRO-3's weights by
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
            experiment.method in METHODS_WITH_LATENTS,
            ds_config.latent_memory,
            ds_config.precision == "fp32",
            ds_config.zero_stage == 3,
        )

    def _sizes(self, phantom: Phantom, experiment: Experiment) -> Sizes:
        model = phantom.model
        groups = parameter_groups(model, experiment)
        return Sizes(
            groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
            frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
            buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        )

    def _warnings(self, experiment: Experiment, ds_config: DeepSpeedConfig) -> tuple[str, ...]:
        notes = []
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        columns = max(
            worst_batch(self.train, at, experiment, self.vocabulary, experiment.batch_size_training).shape[1]
            for at in stages_of(experiment)
        )
        if most is not None and columns > most:
            notes.append(f"the longest rows have {columns} columns, and the model holds {most} positions")
        if ds_config.zero_stage == 3:
            notes.append(
                "ZeRO-3 is an estimate: DeepSpeed gathers weights as it sees fit up to max_live_parameters"
            )
        if (
            ds_config.offload_optimizer
            and self.device == "cuda"
            and "pinned_max_round_threshold_mb" not in os.environ.get("PYTORCH_ALLOC_CONF", "")
        ):
            notes.append(
                "PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:1 would save the rounding of pinned blocks (torch >= 2.13)"
            )
        return tuple(notes)


def shape_of(batch: Batch) -> BatchShape:
    rows, columns = batch.shape
    prompt = batch.first_latent if batch.num_latents else columns
    return BatchShape(rows, columns, prompt, batch.num_latents, len(batch.target_ids_N))


def with_rows(experiment: Experiment, rows: int, ranks: int) -> Experiment:
    """The same effective batch from micro-batches of `rows` rows, rounded up where it does not divide."""
    total = experiment.batch_size_training * experiment.gradient_accumulation_steps
    return replace(experiment, batch_size_training=rows, gradient_accumulation_steps=-(-total // rows))


def at_epoch(experiment: Experiment, epoch: int) -> StageOfRun:
    return next(at for at in reversed(stages_of(experiment)) if at.epoch <= epoch)
