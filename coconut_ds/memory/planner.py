"""Make plans: states from formulas, phases from cached fake runs of the model."""

import os
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from coconut_ds.config.deepspeed import DeepSpeedConfig
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.batching import Batch
from coconut_ds.data.problems import card_for
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary
from coconut_ds.memory.fake_model import FakeModel, build_fake_model, has_equal_layers, with_layers
from coconut_ds.memory.fake_trace import Trace, record, record_evaluation
from coconut_ds.memory.largest_batches import TextShape, read_lengths, shape_of
from coconut_ds.memory.phases import PlannedRun
from coconut_ds.memory.plan import (
    STEP,
    Phase,
    Plan,
    StagePlan,
)
from coconut_ds.memory.zero import (
    Sizes,
    ZeroSettings,
    gpu_states,
    host_states,
    step_items,
)
from coconut_ds.model.loading import load_config
from coconut_ds.model.lora import parameter_groups

# Layers of the two shallow copies that measure one layer.  Smaller models run in full.
SHALLOW = (2, 4)
PINNED_ROUNDING = "pinned_max_round_threshold_mb"


@dataclass
class Planner:
    """Plans variations of one experiment's model and data; fake runs are cached."""

    config: PretrainedConfig
    train: list[TokenizedProblem]
    valid: list[TokenizedProblem]
    vocabulary: Vocabulary
    vocabulary_size: int
    max_new_tokens: int
    notes: tuple[str, ...] = ()
    device: str = "cuda"
    _fake_models: dict[Any, FakeModel] = field(default_factory=dict, repr=False)
    _traces: dict[Any, Trace] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, experiment: Experiment, shape: TextShape | None = None, device: str = "cuda") -> "Planner":
        """Read the model's configuration and the lengths of the data.  Raises ConfigError, DataError."""
        config = load_config(experiment.model_id)
        train, valid, vocabulary = read_lengths(experiment, shape)
        return cls.from_run_data(experiment, train, valid, vocabulary, device, config)

    @classmethod
    def from_run_data(
        cls,
        experiment: Experiment,
        train: list[TokenizedProblem],
        valid: list[TokenizedProblem],
        vocabulary: Vocabulary | None,
        device: str,
        config: PretrainedConfig | None = None,
    ) -> "Planner":
        """A planner for tokenized problems."""
        config = load_config(experiment.model_id) if config is None else config
        size = config.get_text_config().vocab_size
        notes: tuple[str, ...] = ()
        if vocabulary is None:
            notes = ("token counts from the command line; data and tokenizer were not read",)
            no_tokenizer: Any = None
            vocabulary = Vocabulary(
                no_tokenizer, start_id=size, latent_id=size + 1, end_id=size + 2, eos_id=0, pad_id=0
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

    def plan(
        self,
        experiment: Experiment,
        ds_config: DeepSpeedConfig,
        ranks: int | None = None,
        *,
        quick_at: int | None = None,
    ) -> Plan:
        """The plan of one experiment under one ds_config.

        ranks: GPUs of the run; default: those of the memory_budget, else 1.
        quick_at: plan only the stage of this epoch, and only with shallow copies of the model.
        Raises ConfigError if the two files conflict or the model does not support a technique.
        """
        budget = ds_config.memory_budget
        ranks = ranks or (budget.gpus if budget is not None else 1)
        ds_config.resolve(experiment, ranks)
        zero = ZeroSettings.of(ds_config, ranks, experiment.gradient_accumulation_steps > 1, self.device)
        sizes = self._sizes(experiment, ds_config)
        states = gpu_states(sizes, zero)
        run = PlannedRun(self, experiment, ds_config, sizes, zero)
        stages, peak_phase = run.stages(sum(item.size for item in states), quick_at)
        phases = [peak_phase, Phase(STEP, tuple(step_items(sizes, zero)))]
        if self.valid:
            phases.append(run.evaluation())
        return Plan(
            experiment=experiment.name,
            ds_config=ds_config.path,
            model=f"{experiment.model_id}, {(sizes.trainable + sizes.frozen) / 1e6:,.1f} M parameters, "
            f"{sizes.trainable / 1e6:,.1f} M trainable",
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
        """Layers of the two shallow copies, or None if the model is small or its layers differ."""
        if self.num_layers <= SHALLOW[1] or not has_equal_layers(self.config.get_text_config()):
            return None
        return SHALLOW

    def to_full_depth(self, sizes: list[int]) -> int:
        """Bytes of the full model, extrapolated from the two shallow copies."""
        if len(sizes) == 1:
            return sizes[0]
        low, high = sizes
        return low + (high - low) * (self.num_layers - SHALLOW[0]) // (SHALLOW[1] - SHALLOW[0])

    def trace(self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch, layers: int) -> Trace:
        """The cached trace of forward and backward of `batch`."""
        key = self._trace_key(experiment, ds_config, batch, layers)
        if key not in self._traces:
            self._traces[key] = record(self._fake_model(experiment, ds_config, layers), batch)
        return self._traces[key]

    def has_trace(self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch) -> bool:
        """Whether the full model has run this batch."""
        return self._trace_key(experiment, ds_config, batch, self.num_layers) in self._traces

    def evaluation_trace(
        self,
        experiment: Experiment,
        ds_config: DeepSpeedConfig,
        batch: Batch,
        layers: int,
        max_new_tokens: int = 0,
    ) -> Trace:
        """The cached trace of a forward of `batch` without gradients, or of generation from it."""
        key = ("evaluation", max_new_tokens, *self._trace_key(experiment, ds_config, batch, layers))
        if key not in self._traces:
            fake_model = self._fake_model(experiment, ds_config, layers)
            self._traces[key] = record_evaluation(fake_model, batch, max_new_tokens)
        return self._traces[key]

    def _trace_key(
        self, experiment: Experiment, ds_config: DeepSpeedConfig, batch: Batch, layers: int
    ) -> tuple[Any, ...]:
        return (*self._key(experiment, ds_config), layers, shape_of(batch))

    def _fake_model(self, experiment: Experiment, ds_config: DeepSpeedConfig, layers: int) -> FakeModel:
        key = (*self._key(experiment, ds_config), layers)
        if key not in self._fake_models:
            fake_model = build_fake_model(
                experiment,
                with_layers(self.config, layers),
                self.vocabulary_size,
                self.vocabulary.special_token_ids,
                ds_config.latent_memory,
                ds_config.precision,
                self.device,
            )
            if ds_config.zero_stage == 3:
                for parameter in fake_model.model.parameters():
                    parameter.ds_id = 0  # type: ignore[attr-defined]  # how techniques detect ZeRO-3
            self._fake_models[key] = fake_model
        return self._fake_models[key]

    def _key(self, experiment: Experiment, ds_config: DeepSpeedConfig) -> tuple[Any, ...]:
        """The settings that change a trace, apart from the batch."""
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
        model = self._fake_model(experiment, ds_config, self.num_layers).model
        groups = parameter_groups(model, experiment)
        return Sizes(
            groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
            frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
            buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        )

    def _warnings(self, stages: list[StagePlan], ds_config: DeepSpeedConfig) -> tuple[str, ...]:
        notes = []
        num_positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        columns = max(stage.shape.columns for stage in stages)
        if num_positions is not None and columns > num_positions:
            notes.append(f"the longest rows have {columns} columns, the model only {num_positions} positions")
        if ds_config.zero_stage == 3:
            notes.append(
                "ZeRO-3 is an estimate: DeepSpeed gathers weights on demand, up to max_live_parameters"
            )
        rounds_pinned = PINNED_ROUNDING not in os.environ.get("PYTORCH_ALLOC_CONF", "")
        if ds_config.offload_optimizer and self.device == "cuda" and rounds_pinned:
            notes.append(
                f"PYTORCH_ALLOC_CONF={PINNED_ROUNDING}:1 avoids the rounding of pinned blocks (torch >= 2.13)"
            )
        return tuple(notes)


def with_rows(experiment: Experiment, rows: int) -> Experiment:
    """The same global batch size from micro-batches of `rows` rows, rounded up."""
    total = experiment.batch_size_training * experiment.gradient_accumulation_steps
    return replace(experiment, batch_size_training=rows, gradient_accumulation_steps=-(-total // rows))
