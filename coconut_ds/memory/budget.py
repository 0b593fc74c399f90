"""Enforce a run's memory budget before it starts: check its plan, limit its GPU.

    guard = enforce_memory_budget(...)      BudgetError before a model is loaded, if the plan does not fit

Writes RUN/memory/plan.json.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from coconut_ds.config.deepspeed import DeepSpeedConfig, MemoryBudget
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.run_data import RunData
from coconut_ds.engine.distributed import Ranks
from coconut_ds.errors import BudgetError, ConfigError, UserError
from coconut_ds.files import json_text, make_folder, replace_text
from coconut_ds.memory.guard import MemoryGuard
from coconut_ds.memory.largest_batches import longest_tokenized
from coconut_ds.memory.options import cheapest_changes
from coconut_ds.memory.plan import MIB, Plan
from coconut_ds.memory.planner import Planner

# A plan below this share of the GPU needs no suggestions for saving memory.
AMPLE = 0.5


def check_plan(experiment: Experiment, ds_config: DeepSpeedConfig, run_data: RunData, ranks: Ranks) -> Plan:
    """Plan a run that is about to start; if memory may be short, suggest changes."""
    valid = list(run_data.valid.tokenized)
    planner = Planner.from_run_data(
        experiment, longest_tokenized(run_data.train) or valid, valid, run_data.vocabulary, ranks.device.type
    )
    plan = planner.plan(experiment, ds_config, ranks.world_size)
    if plan.budget is not None and plan.fits and plan.gpu_bytes < AMPLE * plan.budget.gpu_memory_mib * MIB:
        return plan  # planning each change would delay the start
    return replace(plan, changes=cheapest_changes(planner, experiment, ds_config, plan))


def refuse_or_warn(plan: Plan) -> None:
    """Raise BudgetError for a plan over its budget, or warn, depending on `on_exceed`."""
    if plan.budget is None:
        return
    if plan.fits:
        if plan.over_share():
            warnings.warn(f"{plan.ds_config}: {plan.verdict()}", stacklevel=2)
        return
    text = f"{plan.ds_config}: {plan.verdict()}\n{described_changes(plan)}"
    if plan.budget.on_exceed == "warn":
        warnings.warn(text, stacklevel=2)
        return
    raise BudgetError(f'{text}\n  To train anyway: --skip-plan, or "on_exceed": "warn" in memory_budget.')


def described_changes(plan: Plan) -> str:
    """The suggested changes, one per line, with their settings."""
    lines = ["  Changes that help:"] if plan.changes else []
    for change in plan.changes:
        fits = "fits" if change.fits else "does not fit"
        lines.append(f"    {change.text}: about {change.gpu_bytes / MIB:,.0f} MiB, {fits}")
        lines.append(f"      {change.setting}")
    return "\n".join(lines)


def limit_gpu(budget: MemoryBudget, device: torch.device) -> None:
    """Limit this process to its budget.  Raises BudgetError if the GPU has less memory."""
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = (budget.gpu_memory_mib - budget.reserved_mib) * MIB
    if budget.gpu_memory_mib * MIB > total * 1.05:
        name = torch.cuda.get_device_name(device)
        raise BudgetError(
            f"memory_budget.gpu_memory_mib is {budget.gpu_memory_mib:,}, but {name} "
            f"has {total / MIB:,.0f} MiB; set it to {int(total / MIB)} or less"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def judged_plan(
    experiment: Experiment, ds_config: DeepSpeedConfig, run_data: RunData, ranks: Ranks
) -> tuple[dict[str, Any] | None, str | None]:
    """The plan of a run, None if its model cannot be planned, and why it is refused, None if it is not."""
    plan = None
    try:
        made = check_plan(experiment, ds_config, run_data, ranks)
        plan = made.to_json()
        refuse_or_warn(made)
    except UserError as error:
        return plan, str(error)
    except Exception as error:  # the other ranks wait, and a model that cannot be planned may train
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(f"this model cannot be planned ({type(error).__name__}: {reason})", stacklevel=2)
    return plan, None


def enforce_memory_budget(
    experiment: Experiment,
    ds_config: DeepSpeedConfig,
    run_data: RunData,
    ranks: Ranks,
    skip_plan: bool = False,
) -> MemoryGuard:
    """Check the plan, limit the GPU and return the guard for training.  Collective.

    Rank 0 plans and broadcasts.  Raises BudgetError on all ranks.
    """
    plan: dict[str, Any] | None = None
    message: str | None = None
    folder = None if experiment.debug else Path(experiment.save_path) / experiment.name / "memory"
    if ranks.is_main and not skip_plan and ds_config.memory_budget is not None:
        plan, message = judged_plan(experiment, ds_config, run_data, ranks)
        if folder is not None and plan is not None:
            try:
                replace_text(make_folder(folder) / "plan.json", json_text(plan, indent=2))
            except (ConfigError, OSError) as error:
                warnings.warn(f"the plan was not saved: {error}", stacklevel=2)
    shared: list[Any] = [plan, message]
    if ranks.world_size > 1:
        dist.broadcast_object_list(shared, src=0, device=ranks.device)
    plan, message = shared
    if message is not None:
        raise BudgetError(message)
    if ranks.device.type == "cuda" and ds_config.memory_budget is not None:
        limit_gpu(ds_config.memory_budget, ranks.device)
    return MemoryGuard(folder, ranks.rank, ranks.world_size, ranks.device, plan)
