"""Make plans: states from formulas, phases from cached fake runs of the model.

plan = Planner.of(experiment).plan(experiment, ds_config)
plan.gpu_bytes   peak of one GPU: the states plus the peak phase of the peak stage
plan.fits        whether the GPU stays within its budget less the reserve, and the host within its memory
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from coconut_ds.config.deepspeed import DeepSpeedConfig, MemoryBudget
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.forms import local_file
from coconut_ds.data.problems import card_for, read_problems
from coconut_ds.data.run_data import (
    DEBUG_TRAIN_ITEMS,
    LengthCheck,
    Use,
    limit_of,
    shortened,
    trained_stages,
)
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary, load_vocabulary, tokenize
from coconut_ds.errors import ConfigError
from coconut_ds.memory.depth import SHALLOW
from coconut_ds.memory.fake_run import FakeModel, Trace
from coconut_ds.memory.phases import WORKSPACES, Phase, PlannedRun, StagePlan, longest
from coconut_ds.memory.zero import Item, gpu_states, host_states, step_items
from coconut_ds.model.loading import load_config
from coconut_ds.runs.record_shapes import STEP

MIB, GIB = 2**20, 2**30
# Display order of components; those of `components_mib` first.
COMPONENTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "communication",
    WORKSPACES,
    "fragmentation",
)
BOTH = "GPU and host"  # target of a change
PINNED_ROUNDING = "pinned_max_round_threshold_mb"
SHAPE_HINT = (
    "To plan without it, give token counts: --question-tokens 430 --num-steps 6 --step-tokens 15 "
    "--answer-tokens 12"
)


@dataclass(frozen=True)
class MemoryOption:
    """A change that saves memory, the changed run, and what its plan says."""

    text: str
    setting: str  # the text to write or type
    experiment: Experiment
    ds_config: DeepSpeedConfig
    name: str = ""  # of options that `fit` may use
    ranks: int | None = None  # if it changes them
    rounds_pinned: bool = True  # false: with PYTORCH_ALLOC_CONF
    target: str = "GPU"  # or "host", or BOTH
    gpu_bytes: int = 0
    host_bytes: int = 0
    fits: bool = False  # the memory of its target


@dataclass(frozen=True)
class Plan:
    """One experiment under one ds_config on one machine; bytes unless a name says MiB."""

    experiment: str
    ds_config: str
    model: str
    ranks: int
    budget: MemoryBudget | None
    states: tuple[Item, ...]  # on each GPU, after the first optimizer step
    phases: tuple[Phase, ...]  # of the peak stage
    stages: tuple[StagePlan, ...]
    host: tuple[Item, ...]  # of one rank
    notes: tuple[str, ...] = ()
    changes: tuple[MemoryOption, ...] = ()

    @property
    def states_bytes(self) -> int:
        return sum(item.size for item in self.states)

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.size)

    @property
    def gpu_bytes(self) -> int:
        return self.states_bytes + self.peak_phase.size

    @property
    def peak_stage(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.gpu_bytes)

    @property
    def host_bytes(self) -> int:
        """Of all ranks of this machine."""
        return self.ranks * sum(item.size for item in self.host)

    @property
    def available_bytes(self) -> int | None:
        """Bytes of GPU memory that tensors may use."""
        if self.budget is None:
            return None
        return (self.budget.gpu_memory_mib - self.budget.reserved_mib) * MIB

    @property
    def gpu_fits(self) -> bool:
        return self.available_bytes is None or self.gpu_bytes <= self.available_bytes

    @property
    def host_limit(self) -> int | None:
        """Bytes of host memory."""
        return None if self.budget is None else int(self.budget.host_memory_gib * GIB)

    @property
    def host_fits(self) -> bool:
        return self.host_limit is None or self.host_bytes <= self.host_limit

    @property
    def fits(self) -> bool:
        return self.gpu_fits and self.host_fits

    @property
    def items(self) -> list[Item]:
        """The states and the items of the peak phase; their sum is `gpu_bytes`."""
        return [*self.states, *self.peak_phase.items]

    def components(self) -> dict[str, int]:
        """Bytes of each component at its own peak."""
        states = by_component(self.states)
        highest = dict(states)
        for phase in self.phases:
            for component, size in (by_component(phase.items) | Counter(phase.own_peaks)).items():
                highest[component] = max(highest.get(component, 0), states[component] + size)
        return {name: highest.get(name, 0) for name in COMPONENTS}

    def over_share(self) -> dict[str, tuple[float, float]]:
        """Components over their share in `components_mib`: name -> (planned, share) in MiB."""
        if self.budget is None:
            return {}
        planned = self.components()
        return {
            name: (planned[name] / MIB, share)
            for name, share in self.budget.components_mib.items()
            if planned[name] > share * MIB
        }

    def verdict(self) -> str:
        """One line."""
        needed = f"{self.gpu_bytes / MIB:,.0f}"
        if self.budget is None or self.available_bytes is None:
            return f"GPU: needs {needed} MiB; {self.ds_config} has no memory_budget"
        usable = (
            f"{self.available_bytes / MIB:,.0f} MiB usable "
            f"({self.budget.gpu_memory_mib:,} less {self.budget.reserved_mib:,} reserved)"
        )
        over = f"{(self.gpu_bytes - self.available_bytes) / MIB:,.0f}"
        lines = [
            f"GPU: fits, {needed} of {usable}"
            if self.gpu_fits
            else f"GPU: does not fit, needs {needed} MiB, {over} MiB more than {usable}"
        ]
        lines.append(
            f"host: {'fits' if self.host_fits else 'does not fit'}, {self.host_bytes / GIB:.1f} GiB of "
            f"{self.budget.host_memory_gib:g} for {self.ranks} rank{'s' if self.ranks > 1 else ''}"
        )
        lines += [
            f"{name} needs {planned:,.0f} MiB, more than its share of {share:,.0f} MiB (components_mib)"
            for name, (planned, share) in self.over_share().items()
        ]
        return "; ".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data; sizes in MiB."""

        def mib(size: int) -> float:
            return round(size / MIB, 2)

        def items(values: Iterable[Item]) -> list[dict[str, Any]]:
            return [
                {"component": v.component, "name": v.name, "mib": mib(v.size), "formula": v.formula}
                for v in values
            ]

        return {
            **{name: getattr(self, name) for name in ("experiment", "ds_config", "model", "ranks")},
            "budget": None
            if self.budget is None
            else {**vars(self.budget), "components_mib": dict(self.budget.components_mib)},
            "verdict": self.verdict(),
            "fits": self.fits,
            "gpu_mib": mib(self.gpu_bytes),
            "states_mib": mib(self.states_bytes),
            "peak_phase": self.peak_phase.name,
            "host_gib": round(self.host_bytes / GIB, 3),
            "components_mib": {name: mib(size) for name, size in self.components().items()},
            "states": items(self.states),
            "phases": [{"name": p.name, "mib": mib(p.size), "items": items(p.items)} for p in self.phases],
            "stages": [
                {
                    "first_epoch": stage.epoch,
                    "stage": stage.name,
                    **vars(stage.shape),
                    "gpu_mib": mib(stage.gpu_bytes),
                }
                for stage in self.stages
            ],
            "host_per_rank": items(self.host),
            "notes": list(self.notes),
            "changes": [
                {
                    "for": c.target,
                    "change": c.text,
                    "setting": c.setting,
                    "gpu_mib": mib(c.gpu_bytes),
                    "host_gib": round(c.host_bytes / GIB, 3),
                    "fits": c.fits,
                }
                for c in self.changes
            ],
        }


def rounding_limit() -> int | None:
    """Bytes up to which torch rounds pinned blocks in this environment; None: all blocks."""
    given = re.search(PINNED_ROUNDING + r":(\d+)", os.environ.get("PYTORCH_ALLOC_CONF", ""))
    return int(given[1]) * MIB if given else None


def by_component(items: Iterable[Item]) -> Counter[str]:
    """Bytes by component."""
    sizes: Counter[str] = Counter()
    for item in items:
        sizes[item.component] += item.size
    return sizes


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
        vocabulary = load_vocabulary(experiment.model_id, experiment.chat_template)
    except ConfigError as error:
        raise ConfigError(f"{error}\n  {SHAPE_HINT}") from error
    files = []
    for path, key in ((experiment.train_path, "train_path"), (experiment.val_path, "val_path")):
        if path and not local_file(path).exists():
            raise ConfigError(
                f"{key}: {path} does not exist, so the longest problem is unknown.\n  {SHAPE_HINT}"
            )
        limit = DEBUG_TRAIN_ITEMS if experiment.debug else None
        problems = read_problems(path, limit, experiment.fields, {}) if path else []
        if problems and experiment.too_long != "error":
            tokens = tokenize(problems, vocabulary)
            positions = limit_of(load_config(experiment.model_id), experiment.max_tokens)
            use = Use(path, tokens, trained_stages(experiment), trains=True)
            changes, _ = LengthCheck(experiment, vocabulary, positions).changes(use)
            files.append(longest(shortened(tokens, changes)))
        else:
            files.append(tokenize(longest(problems), vocabulary))
    train, valid = files
    return train or valid, valid, vocabulary


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
    exact: bool = False  # run the model in full, not shallow copies of it
    # Pinned blocks of at most so many bytes are rounded up to a power of two; None: all.
    rounds_up_to: int | None = field(default_factory=lambda: rounding_limit())
    fake_models: dict[Any, FakeModel] = field(default_factory=dict, repr=False)
    traces: dict[Any, Trace] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        shape: TextShape | None = None,
        device: str = "cuda",
        config: PretrainedConfig | None = None,
    ) -> "Planner":
        """Read the model's configuration, unless given, and the lengths of the data.

        Raises ConfigError, DataError.
        """
        config = load_config(experiment.model_id) if config is None else config
        if shape is not None:
            problems = [shape.problem()]
            return cls.from_run_data(experiment, problems, problems, None, device, config)
        return cls.from_run_data(experiment, *read_lengths(experiment), device, config)

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
            notes = ("data and tokenizer were not read; the longest problem has the given token counts",)
            no_tokenizer: Any = None
            vocabulary = Vocabulary(no_tokenizer, size, size + 1, size + 2, eos_id=0, pad_id=0)
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
        only_epoch: int | None = None,
    ) -> Plan:
        """The plan of one experiment under one ds_config.

        ranks: GPUs of the run; default: those of the memory_budget, else 1.
        only_epoch: plan only the stage of this epoch.
        Raises ConfigError if the two files conflict or the model does not support a technique.
        """
        budget = ds_config.memory_budget
        ranks = ranks or (budget.gpus if budget is not None else 1)
        ds_config.resolve(experiment, ranks)
        run = PlannedRun(self, experiment, ds_config, ranks)
        sizes, zero = run.sizes, run.zero
        states = [*gpu_states(sizes, zero), *run.workspaces()]
        stages, peak_phase = run.stages(sum(item.size for item in states), only_epoch)
        phases = [peak_phase, Phase(STEP, tuple(step_items(sizes, zero)))]
        if self.valid:
            phases.append(run.evaluation())
        return Plan(
            experiment=experiment.name,
            ds_config=ds_config.path,
            model=f"{experiment.model_id}, {sizes.elements / 1e6:,.1f} M parameters, "
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
    def depths(self) -> tuple[int, ...]:
        """Layers of the copies that run: two shallow ones, or the model itself if it is small or uneven."""
        types = getattr(self.config.get_text_config(), "layer_types", None) or ["one"]
        is_shallow = not self.exact and self.num_layers > max(SHALLOW) and len(set(types)) == 1
        return SHALLOW if is_shallow else (self.num_layers,)

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
        return tuple(notes)
