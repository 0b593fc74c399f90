"""Find the largest micro-batch within a budget at the same global batch size.

    fit(planner, experiment, ds_config)  ->  Fit(memory_options=("offload_optimizer: cpu",), max_rows=4, ...)

If not even one row fits, memory options are tried one after another.  The search is binary on plans of
shallow copies; the result and its neighbor are planned in full.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from coconut_ds.config.deepspeed import DeepSpeedConfig
from coconut_ds.config.experiment import Experiment
from coconut_ds.errors import BudgetError, ConfigError
from coconut_ds.memory.budget import memory_options, with_rows
from coconut_ds.memory.planner import Plan, Planner

# In the order in which `fit` adds them; the precision comes last.
OPTIONS = ("activation_checkpointing", "overlap_comm", "reduce_bucket_size", "offload_optimizer")


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
    precision: str | None = None,
) -> Fit:
    """The largest micro-batch that fits, with as few memory options as possible.

    `precision`: a 16-bit format that the GPU supports ("bf16", "fp16"), tried last.
    Raises ConfigError without a memory_budget and BudgetError if nothing fits.
    """
    if ds_config.memory_budget is None:
        raise ConfigError(f'{ds_config.path} has no memory_budget to fit into; add a "memory_budget" block')
    total = experiment.batch_size_training * experiment.gradient_accumulation_steps
    for used, changed in _changed_configs(experiment, ds_config, precision):
        max_rows = _max_rows(planner, experiment, changed, ranks, total)
        if max_rows:
            rows = max(count for count in range(1, max_rows + 1) if total % count == 0)
            chosen = with_rows(experiment, rows)
            return Fit(chosen, changed, used, max_rows, planner.plan(chosen, changed, ranks))
    smallest = planner.plan(with_rows(experiment, 1), changed, ranks)
    raise BudgetError(
        f"not even one row fits {ds_config.path}'s budget, with {', '.join(used) or 'no option left'}: "
        f"{smallest.verdict()}. Use a smaller model, tuning: lora, or zero3_offload.json"
    )


def _changed_configs(
    experiment: Experiment, ds_config: DeepSpeedConfig, precision: str | None
) -> Iterator[tuple[tuple[str, ...], DeepSpeedConfig]]:
    """The DeepSpeed config as it is, then with one memory option after another, cumulatively."""
    used: tuple[str, ...] = ()
    yield used, ds_config
    for key in (*OPTIONS, *([precision] if precision else [])):
        for option in memory_options(experiment, ds_config, precision=precision or "bf16"):
            if option.name.partition(":")[0] == key:
                used, ds_config = (*used, option.name), option.ds_config
                yield used, ds_config


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
