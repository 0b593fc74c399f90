"""Keep a run within its memory budget: read it, check the plan, limit the GPU, report when memory runs out.

    read_settings(args)                 both settings files; a ds_config without a budget gets this machine's
    with enforce_memory_budget(...):    BudgetError before a model is loaded, if the plan does not fit
        train()                         out of memory on any rank: each rank writes a report and ends, code 78

Files: RUN/memory/plan.json, RUN/memory/out_of_memory_rank_N.json, and on a GPU a snapshot of the allocator
for https://pytorch.org/memory_viz.
"""

import argparse
import gc
import os
import resource
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
import torch.distributed as dist

from coconut_ds.config.deepspeed import DeepSpeedConfig, MemoryBudget, default_ds_config, load_ds_config
from coconut_ds.config.experiment import Experiment, read_experiment
from coconut_ds.data.run_data import RunData
from coconut_ds.distributed import Ranks, is_out_of_memory, phase_of
from coconut_ds.errors import BudgetError, ConfigError, OutOfMemory, UserError, first_line
from coconut_ds.files import json_text, make_folder, print_notes, replace_text
from coconut_ds.memory.fit import cheapest_changes
from coconut_ds.memory.phases import longest
from coconut_ds.memory.planner import GIB, MIB, Plan, Planner
from coconut_ds.model.loading import load_config
from coconut_ds.runs.checkpoint_folders import CheckpointFolders

RESERVED_MIB = 800  # CUDA context and NCCL buffers, as in ds_configs/
# The GPUs that the shipped files are made for; used on machines without a GPU.
NAMED_DEVICE, NAMED_GPUS, NAMED_MIB = "GTX 1080 Ti", 2, 11_178
# A plan below this share of the GPU needs no suggestions for saving memory.
AMPLE = 0.5
NUM_TENSORS = 15
POLL_SECONDS = 0.5
# How long the rank that ran out of memory waits for the reports of the others.
REPORT_SECONDS = 8.0
# How long the others then stay alive: the launcher ends all ranks when one exits.
LINGER_SECONDS = 2.0


def read_settings(args: argparse.Namespace) -> tuple[Experiment, DeepSpeedConfig]:
    """Read both files of a command line. Raises ConfigError."""
    experiment = read_experiment(args)
    return experiment, read_ds_config(args.deepspeed_config, experiment, args.ds_overrides)


def read_ds_config(
    path: str | None, experiment: Experiment, overrides: Sequence[str] = (), printed: set[str] | None = None
) -> DeepSpeedConfig:
    """Read the DeepSpeed JSON for `experiment`; the main process prints its notes. Raises ConfigError.

    Without a path: ds_configs/zero2_offload.json.  `overrides`: of --ds.
    `printed`: notes that are not repeated; this call's are added.
    """
    notes = [] if path else [f"no --deepspeed_config, so {default_ds_config()} is used"]
    path = path or default_ds_config()
    ds_config = load_ds_config(path, overrides)
    notes += ds_config.notes
    hidden_size = None
    if ds_config.needs_hidden_size:
        hidden_size = load_config(experiment.model_id).get_text_config().hidden_size
    budget = ds_config.memory_budget
    if budget is None:
        budget = default_budget()
        no_gpu = "" if torch.cuda.is_available() else "no GPU here, so "
        notes.append(
            f"{path}: memory_budget: missing; {no_gpu}using {budget.device}: "
            f"{budget.gpu_memory_mib:,} MiB per GPU, {budget.reserved_mib} reserved"
        )
    result = ds_config.for_run(experiment, budget, hidden_size)
    ways = {"fp16": "--ds fp16.enabled=true", "bf16": "--set bf16=true"}
    auto = [kind for kind in ways if ds_config.stock.get(kind, {}).get("enabled") == "auto"]
    if auto and result.precision == "fp32":
        keys = " and ".join(f"{kind}.enabled" for kind in auto)
        remedies = " or ".join(ways[kind] for kind in auto)
        notes.append(f'{path}: {keys}: "auto" is fp32 here; for 16 bit: {remedies}')
    print_notes(note for note in notes if note not in (printed or ()))
    if printed is not None:
        printed.update(notes)
    return result


def default_budget() -> MemoryBudget:
    """The budget of this machine's GPUs; without a GPU, that of ds_configs/, which only warns."""
    host_memory_gib = round(psutil.virtual_memory().total / GIB, 1)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device, gpus = properties.name, torch.cuda.device_count()
        return MemoryBudget(device, gpus, properties.total_memory // MIB, RESERVED_MIB, host_memory_gib, {})
    return MemoryBudget(NAMED_DEVICE, NAMED_GPUS, NAMED_MIB, RESERVED_MIB, host_memory_gib, {}, "warn")


def judged_plan(
    experiment: Experiment, ds_config: DeepSpeedConfig, run_data: RunData, ranks: Ranks
) -> tuple[dict[str, Any] | None, UserError | None]:
    """The plan of a run, None if its model cannot be planned, and why it is refused, None if it is not."""
    plan = None
    try:
        made = check_plan(experiment, ds_config, run_data, ranks)
        plan = made.to_json()
        refuse_or_warn(made)
    except UserError as error:
        return plan, error
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
) -> "MemoryGuard":
    """Check the plan, limit the GPU and return the guard for training.  Collective.

    Rank 0 plans and broadcasts.  Raises BudgetError, or ConfigError of the model, on all ranks.
    """
    plan: dict[str, Any] | None = None
    refusal: UserError | None = None
    folder = None if experiment.debug else Path(experiment.save_path) / experiment.name / "memory"
    if ranks.is_main and not skip_plan and ds_config.memory_budget is not None:
        plan, refusal = judged_plan(experiment, ds_config, run_data, ranks)
        is_trained = (  # the start of a finished run leaves its records as they are
            folder is not None and CheckpointFolders(folder.parent).finished_epochs() >= experiment.num_epochs
        )
        if folder is not None and plan is not None and not is_trained:
            try:
                replace_text(make_folder(folder) / "plan.json", json_text(plan, indent=2))
            except (ConfigError, OSError) as error:
                warnings.warn(f"the plan was not saved: {error}", stacklevel=2)
    shared: list[Any] = [plan, refusal]
    if ranks.world_size > 1:
        dist.broadcast_object_list(shared, src=0, device=ranks.device)
    plan, refusal = shared
    if refusal is not None:
        raise refusal
    if ranks.device.type == "cuda" and ds_config.memory_budget is not None:
        limit_gpu(ds_config.memory_budget, ranks.device)
    return MemoryGuard(folder, ranks.rank, ranks.world_size, ranks.device, plan)


def check_plan(experiment: Experiment, ds_config: DeepSpeedConfig, run_data: RunData, ranks: Ranks) -> Plan:
    """Plan a run that is about to start; if memory may be short, suggest changes."""
    valid = list(run_data.valid.tokenized)
    planner = Planner.from_run_data(
        experiment, longest(run_data.train) or valid, valid, run_data.vocabulary, ranks.device.type
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
    text = "\n".join([f"{plan.ds_config}: {plan.verdict()}", *described_changes(plan.to_json()["changes"])])
    if plan.budget.on_exceed == "warn":
        warnings.warn(text, stacklevel=2)
        return
    raise BudgetError(f'{text}\n  To train anyway: --skip-plan, or "on_exceed": "warn" in memory_budget.')


def described_changes(changes: Sequence[dict[str, Any]]) -> list[str]:
    """Lines with the suggested changes of a plan.json and their settings."""
    lines = ["  Changes that help:"] if changes else []
    for change in changes:
        fits = "fits" if change["fits"] else "does not fit"
        size = f"{change['gpu_mib']:,.0f} MiB"
        if (target := change.get("for", "GPU")) != "GPU":
            host = f"{change['host_gib']:,.1f} GiB of host memory"
            size = host if target == "host" else f"{size} and {host}"
        lines.append(f"    {change['change']}: about {size}, {fits}")
        lines.append(f"      {change['setting']}")
    return lines


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


class PeakMeter:
    """Peak memory of this process.  GPU: of allocated tensors since `start`.  Host: resident size."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def numbers(self) -> dict[str, float]:
        """MiB by name, and the allocator's retries, a sign of fragmentation."""
        host = {"host_rss_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        if self._device.type != "cuda":
            return host
        statistics = torch.cuda.memory_stats(self._device)
        return {
            "gpu_allocated_peak_mib": torch.cuda.max_memory_allocated(self._device) / MIB,
            "gpu_reserved_peak_mib": torch.cuda.max_memory_reserved(self._device) / MIB,
            "gpu_alloc_retries": statistics.get("num_alloc_retries", 0),
            **host,
        }

    def summary(self) -> str:
        """The peak as text for one log line."""
        numbers = self.numbers()
        if self._device.type == "cuda":
            return f"peak {numbers['gpu_allocated_peak_mib']:.0f} MiB GPU"
        return f"peak {numbers['host_rss_peak_mib']:.0f} MiB RSS"


class MemoryGuard:
    """Ends all ranks together when one runs out of memory; use it as a context manager."""

    def __init__(
        self,
        folder: Path | None,
        rank: int,
        world_size: int,
        device: torch.device,
        plan: dict[str, Any] | None = None,
        *,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """`folder`: RUN/memory, the same for all ranks; None writes nothing.  `plan`: from `Plan.to_json`."""
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.device, self.plan = device, plan
        self._end = end
        self._old = self._written()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory guard", daemon=True)

    def __enter__(self) -> Self:
        if self.folder is not None and self.world_size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if error is not None and is_out_of_memory(error):
            text = self._report(phase_of(error), first_line(error))
            self._wait_for_others()
            raise OutOfMemory(text) from error

    def _path(self, rank: int) -> Path:
        assert self.folder is not None
        return self.folder / f"out_of_memory_rank_{rank}.json"

    def _written(self) -> dict[int, float]:
        """When each rank's report was written.  Reports of earlier runs are ignored by this time."""
        written = {}
        for rank in range(self.world_size if self.folder is not None else 0):
            with suppress(OSError):
                written[rank] = self._path(rank).stat().st_mtime
        return written

    def _new_reports(self) -> list[int]:
        return [rank for rank, at in self._written().items() if self._old.get(rank) != at]

    def _watch(self) -> None:
        """End this rank when another one ran out of memory: it may be blocked in a collective."""
        while not self._stop.wait(POLL_SECONDS):
            others = [rank for rank in self._new_reports() if rank != self.rank]
            if others:
                text = self._report("waiting", f"rank {others[0]} ran out of memory")
                print(f"rank {self.rank}: {text.splitlines()[0]}", file=sys.stderr, flush=True)
                time.sleep(LINGER_SECONDS)
                self._end(OutOfMemory.exit_code)
                return

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + REPORT_SECONDS
        while self.folder is not None and time.monotonic() < deadline:
            if len(self._new_reports()) == self.world_size:
                return
            time.sleep(POLL_SECONDS / 2)

    def _report(self, phase: str, reason: str) -> str:
        """Write the report; returns the message."""
        numbers = PeakMeter(self.device).numbers()
        reached = {key.removesuffix("_mib"): mib for key, mib in numbers.items() if key.endswith("_mib")}
        largest = largest_tensors()
        report = {
            "rank": self.rank,
            "phase": phase,
            "reason": reason,
            "reached_mib": reached,
            "largest_tensors": largest,
            "plan": self.plan,
            "snapshot": self._snapshot(),
        }
        lines = [f"out of memory in phase '{phase}': {reason}"]
        lines.append("  reached: " + ", ".join(f"{name} {value:,.0f} MiB" for name, value in reached.items()))
        if self.plan is not None:
            lines.append(f"  planned: {self.plan['gpu_mib']:,.0f} MiB, peak phase {self.plan['peak_phase']}")
        lines += [f"  {item['mib']:>9,.1f} MiB  {item['count']} x {item['what']}" for item in largest[:5]]
        lines += described_changes((self.plan or {}).get("changes", []))
        if self.folder is not None:
            lines.append(self._write(report))
        return "\n".join(lines)

    def _write(self, report: dict[str, Any]) -> str:
        """Write the report; returns a line with its path or the reason why it was not written."""
        path = self._path(self.rank)
        try:
            make_folder(path.parent)
            replace_text(path, json_text(report, indent=2))
        except (OSError, ConfigError) as error:
            return f"  report not written: {path}: {error}"
        return f"  report: {path}"

    def _snapshot(self) -> str | None:
        if self.folder is None or self.device.type != "cuda":
            return None
        path = self._path(self.rank).with_suffix(".pickle")
        with suppress(RuntimeError, OSError, ConfigError):
            make_folder(self.folder)
            path.unlink(missing_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            return str(path)
        return None


def largest_tensors(limit: int = NUM_TENSORS) -> list[dict[str, Any]]:
    """Tensors of this process, grouped by shape, dtype and device, largest sum first; storages count once."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    seen = set()
    gc.unfreeze()  # a trainer freezes weights and optimizer; frozen objects are not listed
    for value in gc.get_objects():
        with suppress(Exception):  # unfinished objects, proxies, tensors without storage
            if not issubclass(type(value), torch.Tensor) or value.untyped_storage().data_ptr() in seen:
                continue
            seen.add(value.untyped_storage().data_ptr())
            what = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
            sizes[what] += value.untyped_storage().nbytes()
            counts[what] += 1
    return [
        {"what": what, "count": counts[what], "mib": round(size / MIB, 2)}
        for what, size in sizes.most_common(limit)
    ]
