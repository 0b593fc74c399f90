"""A plan: predicted memory of a run on each GPU and on the host, item by item, and its budget.

plan.gpu_bytes   peak of one GPU: the states plus the peak phase of the peak stage
plan.fits        whether the GPU stays within its budget less the reserve, and the host within its memory
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coconut_ds.config.deepspeed import MemoryBudget
from coconut_ds.memory.zero import Item

MIB, GIB = 2**20, 2**30
FORWARD_BACKWARD, STEP, EVALUATION = "forward and backward", "optimizer step", "evaluation"
# Display order of components; those of `components_mib` first.
COMPONENTS = ("parameters", "gradients", "optimizer", "activations", "loss", "communication", "fragmentation")


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
class BatchShape:
    """The largest micro-batch of a stage, in rows and tokens."""

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


@dataclass(frozen=True)
class StagePlan:
    """Forward and backward of one stage."""

    epoch: int  # the first, from 0
    name: str
    shape: BatchShape
    gpu_bytes: int
    is_exact: bool  # false: scaled from shallow runs


@dataclass(frozen=True)
class Change:
    """A suggested change and its effect."""

    text: str
    setting: str  # the text to write or type
    gpu_bytes: int
    fits: bool


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
    changes: tuple[Change, ...] = ()

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
    def host_fits(self) -> bool:
        return self.budget is None or self.host_bytes <= self.budget.host_memory_gib * GIB

    @property
    def fits(self) -> bool:
        return self.gpu_fits and self.host_fits

    @property
    def items(self) -> list[Item]:
        """The states and the items of the peak phase; their sum is `gpu_bytes`."""
        return [*self.states, *self.peak_phase.items]

    def components(self) -> dict[str, int]:
        """Bytes of each component at its own peak."""
        states = _by_component(self.states)
        highest = dict(states)
        for phase in self.phases:
            at_peak = _by_component(phase.items)
            for component in {*at_peak, *phase.own_peaks}:
                size = max(at_peak.get(component, 0), phase.own_peaks.get(component, 0))
                highest[component] = max(highest.get(component, 0), states.get(component, 0) + size)
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
        if self.budget is None:
            return f"GPU: needs {_mib(self.gpu_bytes)} MiB; {self.ds_config} has no memory_budget"
        assert self.available_bytes is not None
        usable = (
            f"{_mib(self.available_bytes)} MiB usable "
            f"({self.budget.gpu_memory_mib:,} less {self.budget.reserved_mib:,} reserved)"
        )
        if self.gpu_fits:
            lines = [f"GPU: fits, {_mib(self.gpu_bytes)} of {usable}"]
        else:
            over = _mib(self.gpu_bytes - self.available_bytes)
            lines = [f"GPU: does not fit, needs {_mib(self.gpu_bytes)} MiB, {over} MiB more than {usable}"]
        if not self.host_fits:
            lines.append(
                f"host: does not fit, needs {self.host_bytes / GIB:.1f} GiB for {self.ranks} ranks, "
                f"more than {self.budget.host_memory_gib:g} GiB"
            )
        lines += [
            f"{name} needs {planned:,.0f} MiB, more than its share of {share:,.0f} MiB (components_mib)"
            for name, (planned, share) in self.over_share().items()
        ]
        return "; ".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data; sizes in MiB."""

        def item(value: Item) -> dict[str, Any]:
            return {
                "component": value.component,
                "name": value.name,
                "mib": round(value.size / MIB, 2),
                "formula": value.formula,
            }

        return {
            "experiment": self.experiment,
            "ds_config": self.ds_config,
            "model": self.model,
            "ranks": self.ranks,
            "budget": None if self.budget is None else _budget_json(self.budget),
            "verdict": self.verdict(),
            "fits": self.fits,
            "gpu_mib": round(self.gpu_bytes / MIB, 2),
            "states_mib": round(self.states_bytes / MIB, 2),
            "governing_phase": self.peak_phase.name,
            "host_gib": round(self.host_bytes / GIB, 3),
            "components_mib": {name: round(size / MIB, 2) for name, size in self.components().items()},
            "states": [item(value) for value in self.states],
            "phases": [
                {"name": p.name, "mib": round(p.size / MIB, 2), "items": [item(v) for v in p.items]}
                for p in self.phases
            ],
            "stages": [
                {
                    "first_epoch": stage.epoch,
                    "stage": stage.name,
                    "rows": stage.shape.rows,
                    "columns": stage.shape.columns,
                    "prompt": stage.shape.prompt,
                    "num_latents": stage.shape.num_latents,
                    "labels": stage.shape.labels,
                    "gpu_mib": round(stage.gpu_bytes / MIB, 2),
                    "exact": stage.is_exact,
                }
                for stage in self.stages
            ],
            "host_per_rank": [item(value) for value in self.host],
            "notes": list(self.notes),
            "changes": [
                {
                    "change": change.text,
                    "setting": change.setting,
                    "gpu_mib": round(change.gpu_bytes / MIB, 2),
                    "fits": change.fits,
                }
                for change in self.changes
            ],
        }


def _by_component(items: tuple[Item, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in items:
        sizes[item.component] = sizes.get(item.component, 0) + item.size
    return sizes


def _budget_json(budget: MemoryBudget) -> dict[str, Any]:
    values: Mapping[str, Any] = vars(budget)
    return {**values, "components_mib": dict(budget.components_mib)}


def _mib(size: float) -> str:
    return f"{size / MIB:,.0f}"
