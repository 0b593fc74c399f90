"""Find the largest micro-batch within a budget at the same global batch size.

    fit(planner, experiment, ds_config)  ->  Fit(memory_options=("offload_optimizer: cpu",), max_rows=4, ...)

If not even one row fits, memory options are tried one after another.  The search is binary on plans of
shallow copies; the result and its neighbor are planned in full.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from coconut_ds.config.deepspeed import DeepSpeedConfig
from coconut_ds.config.experiment import Experiment
from coconut_ds.errors import BudgetError, ConfigError
from coconut_ds.memory.options import SMALLEST_BUCKET
from coconut_ds.memory.plan import Plan
from coconut_ds.memory.planner import Planner, with_rows


@dataclass(frozen=True)
class MemoryOption:
    """A change of the DeepSpeed config that saves memory."""

    name: str
    ds_config: DeepSpeedConfig


@dataclass(frozen=True)
class Fit:
    """The settings that fit."""

    experiment: Experiment
    ds_config: DeepSpeedConfig
    memory_options: tuple[str, ...]  # changes of the DeepSpeed config, in order
    max_rows: int  # the largest micro-batch that fits; the experiment has the largest divisor of the batch
    plan: Plan

    @property
    def settings(self) -> str:
        """The settings as command-line options."""
        return (
            f"--set batch_size_training={self.experiment.batch_size_training} "
            f"--set gradient_accumulation_steps={self.experiment.gradient_accumulation_steps}"
        )


def fit(
    planner: Planner,
    experiment: Experiment,
    ds_config: DeepSpeedConfig,
    ranks: int | None = None,
    precisions: tuple[str, ...] = (),
) -> Fit:
    """The largest micro-batch that fits, with as few memory options as possible.

    `precisions`: 16-bit formats that the GPU supports ("bf16", "fp16"), tried last.
    Raises ConfigError without a memory_budget and BudgetError if nothing fits.
    """
    if ds_config.memory_budget is None:
        raise ConfigError(f'{ds_config.path} has no memory_budget to fit into; add a "memory_budget" block')
    total = experiment.batch_size_training * experiment.gradient_accumulation_steps
    used: tuple[str, ...] = ()
    smallest: Plan | None = None
    for memory_option in memory_options(ds_config, precisions):
        used += (memory_option.name,) if memory_option.name else ()
        max_rows = _max_rows(planner, experiment, memory_option.ds_config, ranks, total)
        if max_rows == 0:
            smallest = planner.plan(with_rows(experiment, 1), memory_option.ds_config, ranks)
            continue
        rows = max(count for count in range(1, max_rows + 1) if total % count == 0)
        chosen = with_rows(experiment, rows)
        plan = planner.plan(chosen, memory_option.ds_config, ranks)
        return Fit(chosen, memory_option.ds_config, used, max_rows, plan)
    assert smallest is not None
    raise BudgetError(
        f"not even one row fits {ds_config.path}'s budget, with {', '.join(used) or 'no option left'}: "
        f"{smallest.verdict()}. Use a smaller model, tuning: lora, or zero3_offload.json"
    )


def memory_options(ds_config: DeepSpeedConfig, precisions: tuple[str, ...]) -> Iterator[MemoryOption]:
    """The DeepSpeed config as it is, then with one memory option after another, cumulatively."""
    yield MemoryOption("", ds_config)
    zero = dict(ds_config.stock["zero_optimization"])
    if ds_config.latent_memory.activation_checkpointing == "none":
        ds_config = replace(
            ds_config, latent_memory=replace(ds_config.latent_memory, activation_checkpointing="layers")
        )
        yield MemoryOption("activation_checkpointing: layers", ds_config)
    if zero.get("reduce_bucket_size", 5e8) > SMALLEST_BUCKET or zero.get("overlap_comm"):
        ds_config = _with_zero(ds_config, reduce_bucket_size=SMALLEST_BUCKET, overlap_comm=False)
        yield MemoryOption(f"reduce_bucket_size: {SMALLEST_BUCKET}", ds_config)
    if not ds_config.offload_optimizer:
        offload = {"device": "cpu", "pin_memory": True}
        ds_config = _with_zero(ds_config, stage=max(2, ds_config.zero_stage), offload_optimizer=offload)
        params = {
            k: v for k, v in ds_config.stock["optimizer"].get("params", {}).items() if k != "torch_adam"
        }
        optimizer = {**ds_config.stock["optimizer"], "params": params}
        ds_config = replace(ds_config, stock={**ds_config.stock, "optimizer": optimizer})
        yield MemoryOption("offload_optimizer: cpu", ds_config)
    if ds_config.precision == "fp32" and precisions:
        ds_config = replace(ds_config, stock={**ds_config.stock, precisions[0]: {"enabled": True}})
        yield MemoryOption(precisions[0], ds_config)


def _max_rows(
    planner: Planner, experiment: Experiment, ds_config: DeepSpeedConfig, ranks: int | None, total: int
) -> int:
    """The largest number of rows, at most `total`, whose plan fits; 0 if none does."""

    def fits(rows: int) -> bool:
        return planner.plan(with_rows(experiment, rows), ds_config, ranks).fits

    def nearly_fits(rows: int) -> bool:
        return planner.plan(with_rows(experiment, rows), ds_config, ranks, quick_at=epoch).fits

    epoch = planner.plan(with_rows(experiment, 1), ds_config, ranks).peak_stage.epoch
    low, high = 0, total
    while low < high:
        middle = (low + high + 1) // 2
        if nearly_fits(middle):
            low = middle
        else:
            high = middle - 1
    while low > 0 and not fits(low):
        low -= 1
    while low < total and fits(low + 1):
        low += 1
    return low


def _with_zero(ds_config: DeepSpeedConfig, **changes: Any) -> DeepSpeedConfig:
    stock = deepcopy(dict(ds_config.stock))
    stock["zero_optimization"] = {**stock["zero_optimization"], **changes}
    return replace(ds_config, stock=stock)
