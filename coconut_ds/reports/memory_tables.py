"""A profile as text, compared with its plan.

    profile_text(profile, plan)      phases, ranks, states, plan against measured
    against_plan(profile, plan)      only the comparison, for figures

Input is the plain data of profile.json and plan.json; sizes are MiB.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coconut_ds.files import counted
from coconut_ds.runs.record_shapes import EVALUATION, FORWARD_BACKWARD, STEP
from coconut_ds.tables import Table

Json = Mapping[str, Any]
LASTING = {  # row -> (kinds of a census, components of a plan)
    "parameters": (("parameters",), ("parameters",)),
    "optimizer": (("optimizer",), ("optimizer",)),
    "gradients, staging": (("gradients", "other"), ("gradients", "communication")),
}
NOT_TENSORS = ("process", "start", "pinned")  # host items of a plan
PASS = re.compile(r"(step \d+: )pass (\d+)(.*)")


@dataclass(frozen=True)
class Row:
    """MiB of one part, planned and measured; `lasts`: a state after the first optimizer step."""

    name: str
    planned: float | None
    measured: float
    lasts: bool


def is_on_gpu(profile: Json) -> bool:
    return str(profile["ranks"][0]["device"]).startswith("cuda")


def heaviest(profile: Json) -> Json:
    """The rank with the highest peak."""
    return max(profile["ranks"], key=lambda rank: rank["peak_mib"])


def states(rank: Json) -> Json:
    """MiB of states by kind on a rank's device: its tensors after the second step."""
    return rank["states_mib"]["step 2"].get(str(rank["device"]).split(":")[0], {})


def against_plan(profile: Json, plan: Json | None) -> list[Row]:
    """States, and the peak of each phase beyond them, on the rank with the highest peak.

    Without a GPU everything is in host memory, so the plan's host items count too.
    """
    rank = heaviest(profile)
    kinds = states(rank)
    planned = list(plan["states"]) if plan else []
    if plan and not is_on_gpu(profile):
        planned += [item for item in plan["host_per_rank"] if item["component"] not in NOT_TENSORS]
    rows = []
    for name, (measured_kinds, components) in LASTING.items():
        sizes = [item["mib"] for item in planned if item["component"] in components]
        measured = sum(kinds.get(kind, 0) for kind in measured_kinds)
        rows.append(Row(name, sum(sizes) if plan else None, measured, True))
    lasting = sum(kinds.values())
    phases = {phase["name"]: phase["mib"] for phase in plan["phases"]} if plan else {}
    for name, belongs in (
        (FORWARD_BACKWARD, lambda phase: phase.startswith("step 2") and "optimizer" not in phase),
        (STEP, lambda phase: phase == "step 2: optimizer step"),
        (EVALUATION, lambda phase: phase == "evaluation"),
    ):
        peak = max(phase["peak_mib"] for phase in rank["phases"] if belongs(phase["name"]))
        rows.append(Row(name, phases.get(name), peak - lasting, False))
    return rows


def totals(rows: Sequence[Row]) -> Row:
    """States plus the largest phase."""

    def total(sizes: Sequence[tuple[float, bool]]) -> float:
        return sum(size for size, lasts in sizes if lasts) + max(size for size, lasts in sizes if not lasts)

    planned = None
    if all(row.planned is not None for row in rows):
        planned = total([(row.planned or 0.0, row.lasts) for row in rows])
    return Row("total", planned, total([(row.measured, row.lasts) for row in rows]), True)


def profiles_side_by_side(profiles: Mapping[str, tuple[Json, Json]]) -> Table:
    """Planned and measured MiB of several DeepSpeed configs: {name: (profile, plan)}, one column each."""
    columns = []
    for profile, plan in profiles.values():
        rows = against_plan(profile, plan)
        total = totals(rows)
        cells = [f"{row.planned or 0:,.1f} / {row.measured:,.1f}" for row in [*rows, total]]
        steps = [phase for phase in heaviest(profile)["phases"] if phase["name"].startswith("step 2")]
        error = 100 * ((total.planned or 0) / total.measured - 1)
        cells += [f"{error:+.1f} %", f"{sum(phase['seconds'] for phase in steps):.2f}", _free(profile)]
        columns.append(cells)
    names = [row.name if row.lasts else f"  + {row.name}" for row in [*rows, total]]
    names += ["error of the plan", "seconds per step", "budget"]
    first = next(iter(profiles.values()))[0]
    where = "GPU" if is_on_gpu(first) else "CPU, GPU and host states together"
    title = f"{counted(len(first['ranks']), 'rank')}, {where}; rank with the highest peak; {first['batch']}"
    return Table(["MiB, planned / measured", *profiles], list(zip(names, *columns, strict=True)), title=title)


def peak_contents(profile: Json) -> list[tuple[str, float]]:
    """MiB alive at the peak by the phase that allocated them, largest first."""
    return sorted(heaviest(profile)["at_peak"]["made_in_mib"].items(), key=lambda item: -item[1])


def profile_text(profile: Json, plan: Json | None) -> str:
    """The complete text for a terminal."""
    ranks, where = profile["ranks"], "GPU" if is_on_gpu(profile) else "CPU"
    lines = [
        f"{profile['experiment']} with {profile['ds_config']}: {counted(len(ranks), 'rank')}, {where}, "
        "MiB of tensors",
        f"largest stage, {profile['stage']}: {profile['batch']}",
        "",
        _phases(profile).text(),
        "",
        _comparison(against_plan(profile, plan), profile).text(),
    ]
    made = ", ".join(f"{name} {size:,.1f}" for name, size in peak_contents(profile)[:4])
    phase = heaviest(profile)["at_peak"]["phase"]
    lines += ["", f"alive at the peak ('{phase}'), by phase of allocation: {made}"]
    lines += _verdict(profile)
    return "\n".join(lines)


def _phases(profile: Json) -> Table:
    on_gpu, ranks = is_on_gpu(profile), profile["ranks"]
    head = ["phase", "seconds", "peak", "peak by rank" if len(ranks) > 1 else "", "end"]
    head += ["reserved", "GPU used", "pinned", "retries", "RSS"] if on_gpu else ["RSS"]
    rows = []
    for group in _joined([phase["name"] for phase in ranks[0]["phases"]]):
        by_rank = [[rank["phases"][index] for index in group] for rank in ranks]
        peaks = [max(phase["peak_mib"] for phase in phases) for phases in by_rank]
        last = [phases[-1] for phases in by_rank]
        cells = [
            _group_name([phase["name"] for phase in by_rank[0]]),
            f"{sum(phase['seconds'] for phase in by_rank[0]):.2f}",
            f"{max(peaks):,.1f}",
            " ".join(f"{peak:,.1f}" for peak in peaks) if len(ranks) > 1 else "",
            f"{max(phase['end_mib'] for phase in last):,.1f}",
        ]
        names = ("reserved_peak", "device_used", "pinned", "retries", "rss") if on_gpu else ("rss",)
        cells += [f"{max(phase['reading'][name] for phase in last):,.0f}" for name in names]
        rows.append(cells)
    return Table(head, rows)


def _joined(names: Sequence[str]) -> list[list[int]]:
    """Indices of the phases in each line: the passes between the first and the last share one."""
    groups: list[list[int]] = []
    for index, name in enumerate(names):
        fit, before = PASS.fullmatch(name), PASS.fullmatch(names[index - 1]) if index else None
        is_inner = (
            fit is not None and fit[2] != "0" and index + 1 < len(names) and PASS.fullmatch(names[index + 1])
        )
        if is_inner and before is not None and before[2] != "0":
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _group_name(names: Sequence[str]) -> str:
    first, last = PASS.fullmatch(names[0]), PASS.fullmatch(names[-1])
    if len(names) == 1 or first is None or last is None:
        return names[0]
    return f"{first[1]}pass {first[2]} to {last[2]}{first[3]}"


def _comparison(rows: Sequence[Row], profile: Json) -> Table:
    where = "" if is_on_gpu(profile) else ", GPU and host states together"
    title = f"PLAN AGAINST MEASURED, rank with the highest peak{where}"
    printed = []
    for row in [*rows, totals(rows)]:
        name = row.name if row.lasts else f"  + {row.name}"
        planned = "-" if row.planned is None else f"{row.planned:,.1f}"
        error = f"{100 * (row.planned / row.measured - 1):+.1f} %" if row.planned and row.measured else "-"
        printed.append([name, planned, f"{row.measured:,.1f}", error])
    return Table(["MiB", "plan", "measured", "error"], printed, title=title)


def _verdict(profile: Json) -> list[str]:
    budget, rank = profile["budget"], heaviest(profile)
    if budget is None:
        return ["budget: the DeepSpeed config has no memory_budget"]
    allowed = budget["gpu_memory_mib"] - budget["reserved_mib"]
    if not is_on_gpu(profile):
        return [f"budget of one GPU: {allowed:,.0f} MiB; these ranks ran on the CPU, including host states"]
    return [f"budget: {rank['peak_mib']:,.0f} of {allowed:,.0f} MiB, {_free(profile)}"]


def _free(profile: Json) -> str:
    budget = profile["budget"]
    if budget is None or not is_on_gpu(profile):
        return "-"
    free = budget["gpu_memory_mib"] - budget["reserved_mib"] - heaviest(profile)["peak_mib"]
    return f"{free:,.0f} MiB free" if free >= 0 else f"{-free:,.0f} MiB OVER BUDGET"
