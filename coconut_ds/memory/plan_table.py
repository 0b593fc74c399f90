"""Plans as text: one in full, several side by side, many as a Markdown table."""

from collections.abc import Sequence

from coconut_ds.memory.plan import COMPONENTS, GIB, MIB, Plan
from coconut_ds.memory.zero import Item

WIDTH = 110
NAME = 46


def full_text(plan: Plan) -> str:
    """Every item with its formula and share of the budget, all stages and suggested changes."""
    lines = [
        f"{plan.experiment} with {plan.ds_config}",
        f"{plan.model}; {plan.ranks} GPU{'s' if plan.ranks > 1 else ''}",
        "",
        f"{'PER GPU':<{NAME + 2}}{'MiB':>8}{_share_title(plan):>9}  formula or source",
    ]
    available = plan.available_bytes
    lines += [_item(item, available) for item in plan.states]
    lines += [f"  {plan.peak_phase.name}, stage from epoch {plan.peak_stage.epoch + 1}:"]
    lines += [_item(item, available) for item in plan.peak_phase.items]
    lines += [_row("total", plan.gpu_bytes, available)]
    if plan.budget is not None:
        lines += [f"  {'outside the allocator (reserved_mib)':<{NAME}}{plan.budget.reserved_mib:>8,.0f}"]
    lines += ["", *_phases(plan), "", *_stages(plan), "", *_components(plan), "", *_host(plan), ""]
    lines += [f"note: {note}" for note in plan.notes]
    lines += [f"VERDICT  {plan.verdict()}"]
    if plan.changes:
        lines += ["", "CHANGES THAT HELP, cheapest first"]
        for change in plan.changes:
            less = (plan.gpu_bytes - change.gpu_bytes) / MIB
            fits = "" if plan.budget is None else (", fits" if change.fits else ", does not fit")
            lines += [
                f"  {change.text}: about {-less:+,.0f} MiB, {change.gpu_bytes / MIB:,.0f} MiB per GPU{fits}",
                f"      {change.setting}",
            ]
    return "\n".join(lines)


def side_by_side(plans: Sequence[Plan]) -> str:
    """Components of several plans of one experiment, one column each."""
    names = [_short(plan) for plan in plans]
    width = max(14, *(len(name) + 2 for name in names))
    head = f"{'MiB per GPU':<26}" + "".join(f"{name:>{width}}" for name in names)
    lines = [f"{plans[0].experiment}: {plans[0].model}; {plans[0].ranks} GPUs", "", head, "-" * len(head)]

    def row(title: str, cells: Sequence[str]) -> None:
        lines.append(f"{title:<26}" + "".join(f"{cell:>{width}}" for cell in cells))

    for component in COMPONENTS:
        row(component, [_of_component(plan.items, component) for plan in plans])
    row("total", [f"{plan.gpu_bytes / MIB:,.0f}" for plan in plans])
    row("peak phase", [plan.peak_phase.name.replace("forward and backward", "backward") for plan in plans])
    row("budget", ["-" if p.available_bytes is None else f"{p.available_bytes / MIB:,.0f}" for p in plans])
    row("host GiB, all ranks", [f"{plan.host_bytes / GIB:.1f}" for plan in plans])
    row("verdict", ["-" if p.budget is None else "fits" if p.fits else "DOES NOT FIT" for p in plans])
    return "\n".join(lines)


def markdown(rows: Sequence[tuple[str, Plan]]) -> str:
    """A table with one line per plan; `rows` pairs titles with plans."""
    head = "| model | ds_config | weights | gradients | optimizer | activations | loss | buckets | total MiB "
    head += "| host GiB | budget |"
    lines = [head, "|---|---|" + "---:|" * 8 + "---|"]
    for title, plan in rows:
        cells = [_of_component(plan.items, name) for name in COMPONENTS[:6]]
        cells += [
            f"{plan.gpu_bytes / MIB:,.0f}",
            f"{plan.host_bytes / GIB:.1f}",
            "fits" if plan.fits else "no",
        ]
        lines.append(f"| {title} | `{_short(plan)}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(plan: Plan) -> str:
    return plan.ds_config.rpartition("/")[2].removesuffix(".json")


def _of_component(items: Sequence[Item], component: str) -> str:
    size = sum(item.size for item in items if item.component == component)
    return f"{size / MIB:,.0f}" if size else "-"


def _share_title(plan: Plan) -> str:
    return "" if plan.budget is None else "budget"


def _item(item: Item, available: int | None) -> str:
    return _row(f"{item.component:<14} {item.name}", item.size, available) + f"  {item.formula}"


def _row(title: str, size: int, available: int | None) -> str:
    share = "" if not available else f"{100 * size / available:.1f} %"
    return f"  {title:<{NAME}}{size / MIB:>8,.0f}{share:>9}"


def _phases(plan: Plan) -> list[str]:
    lines = ["PHASES, including states"]
    for phase in plan.phases:
        mark = "  <- peak" if phase is plan.peak_phase else ""
        lines.append(f"  {phase.name:<{NAME}}{(plan.states_bytes + phase.size) / MIB:>8,.0f}{mark}")
    return lines


def _stages(plan: Plan) -> list[str]:
    lines = ["STAGES, largest micro-batch of each, forward and backward"]
    for stage in plan.stages:
        mark = "" if stage.is_exact else "about"
        title = f"epoch {stage.epoch + 1}: {stage.name}"
        lines.append(f"  {title:<{NAME - 6}}{mark:>6}{stage.gpu_bytes / MIB:>8,.0f}  {stage.shape}")
    return lines


def _components(plan: Plan) -> list[str]:
    if plan.budget is None:
        return ["COMPONENTS: no memory_budget"]
    lines = ["COMPONENTS, each at its own peak, against components_mib"]
    for name, size in plan.components().items():
        share = plan.budget.components_mib.get(name)
        if share is None and not size:
            continue
        over = " OVER" if share is not None and size > share * MIB else ""
        limit = "no share set" if share is None else f"of {share:,.0f}{over}"
        lines.append(f"  {name:<{NAME}}{size / MIB:>8,.0f}  {limit}")
    return lines


def _host(plan: Plan) -> list[str]:
    lines = [f"HOST, one rank of {plan.ranks}"]
    for item in plan.host:
        lines.append(
            f"  {item.component:<14} {item.name:<{NAME - 15}}{item.size / MIB:>8,.0f}  {item.formula}"
        )
    total = f"{plan.host_bytes / GIB:.1f} GiB for {plan.ranks} ranks"
    limit = "" if plan.budget is None else f" of {plan.budget.host_memory_gib:g} GiB"
    return [*lines, f"  {total}{limit}"]
