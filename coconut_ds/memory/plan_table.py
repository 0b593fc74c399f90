"""Plans as text: one in full, several side by side, many as a Markdown table."""

from collections.abc import Iterator, Sequence

from coconut_ds.memory.planner import BOTH, COMPONENTS, GIB, MIB, MemoryOption, Plan, by_component
from coconut_ds.tables import Table


def full_text(plan: Plan) -> str:
    """Every item with its formula and share of the budget, all stages and suggested changes."""
    lines = [
        f"{plan.experiment} with {plan.ds_config}",
        f"{plan.model}; {plan.ranks} GPU{'s' if plan.ranks > 1 else ''}",
    ]
    for table in _tables(plan):
        lines += ["", table.text()]
    lines += ["", *(f"note: {note}" for note in plan.notes), f"VERDICT  {plan.verdict()}"]
    if plan.changes and not (plan.gpu_fits or plan.host_fits or plan.changes[0].target == BOTH):
        lines += ["", "No combination of the changes below fits both GPU and host."]
    for target in dict.fromkeys(change.target for change in plan.changes):
        lines += ["", f"CHANGES FOR THE {target.upper()}, cheapest first"]
        lines += [_change(plan, change) for change in plan.changes if change.target == target]
    return "\n".join(lines)


def _change(plan: Plan, change: MemoryOption) -> str:
    gpu = f"{(change.gpu_bytes - plan.gpu_bytes) / MIB:+,.0f} MiB, {change.gpu_bytes / MIB:,.0f} MiB"
    host = f"{(change.host_bytes - plan.host_bytes) / GIB:+,.1f} GiB, {change.host_bytes / GIB:,.1f} GiB"
    size = {"GPU": gpu, "host": host}.get(change.target, f"GPU {gpu}; host {host}")
    fits = "" if plan.budget is None else (", fits" if change.fits else ", does not fit")
    return f"  {change.text}: {size}{fits}\n      {change.setting}"


def _tables(plan: Plan) -> Iterator[Table]:
    available, ranks = plan.available_bytes, plan.ranks

    def share(size: int) -> str:
        return f"{100 * size / available:.1f} %" if available else ""

    rows = [(i.component, i.name, _mib(i.size), share(i.size), i.formula) for i in plan.items]
    rows.append(("total", "", _mib(plan.gpu_bytes), share(plan.gpu_bytes), ""))
    if plan.budget is not None:
        reserved = f"{plan.budget.reserved_mib:,.0f}"
        rows.append(("reserved", "outside the allocator (reserved_mib)", reserved, "", ""))
    head = ("PER GPU", "", "MiB", "budget" if available else "", "formula or source")
    title = f"States and {plan.peak_phase.name}, stage from epoch {plan.peak_stage.epoch + 1}"
    yield Table(head, rows, align="llrrl", title=title)

    phases = [
        (p.name, _mib(plan.states_bytes + p.size), "<- peak" if p is plan.peak_phase else "")
        for p in plan.phases
    ]
    yield Table(("PHASES, including states", "MiB", ""), phases, align="lrl")

    stages = [(f"epoch {s.epoch + 1}: {s.name}", _mib(s.gpu_bytes), str(s.shape)) for s in plan.stages]
    yield Table(("STAGES, forward and backward", "MiB", "largest micro-batch"), stages, align="lrl")

    if plan.budget is not None:
        shares, over = plan.budget.components_mib, plan.over_share()
        components = [
            (
                name,
                _mib(size),
                f"of {shares[name]:,.0f}" if name in shares else "no share set",
                "OVER" if name in over else "",
            )
            for name, size in plan.components().items()
            if name in shares or size
        ]
        columns = ("COMPONENTS, each at its own peak", "MiB", "components_mib", "")
        yield Table(columns, components, align="lrl")

    host = [(i.component, i.name, _mib(i.size), i.formula) for i in plan.host]
    limit = "" if plan.budget is None else f" of {plan.budget.host_memory_gib:g} GiB"
    host.append(("total", "", "", f"{plan.host_bytes / GIB:.1f} GiB for {ranks} ranks{limit}"))
    yield Table((f"HOST, one rank of {ranks}", "", "MiB", "formula or source"), host, align="llrl")


def side_by_side(plans: Sequence[Plan]) -> str:
    """Components of several plans of one experiment, one column each."""
    sizes = [by_component(plan.items) for plan in plans]
    rows = [(name, *(_cell(of_plan[name]) for of_plan in sizes)) for name in COMPONENTS]
    rows += [
        ("total", *(_mib(plan.gpu_bytes) for plan in plans)),
        ("peak phase", *(p.peak_phase.name.replace("forward and backward", "backward") for p in plans)),
        ("budget", *("-" if p.available_bytes is None else _mib(p.available_bytes) for p in plans)),
        ("host GiB, all ranks", *(f"{plan.host_bytes / GIB:.1f}" for plan in plans)),
        ("verdict", *("-" if p.budget is None else "fits" if p.fits else "DOES NOT FIT" for p in plans)),
    ]
    title = f"{plans[0].experiment}: {plans[0].model}; {plans[0].ranks} GPUs\n"
    return Table(("MiB per GPU", *map(_short, plans)), rows, title=title).text()


def matrix(plans: Sequence[Plan], max_rows: Sequence[int]) -> str:
    """One line per plan; `max_rows`: the largest micro-batch that fits under each."""
    cells = [
        (
            plan.experiment,
            _short(plan),
            _verdict(plan.gpu_bytes, plan.available_bytes, MIB, "MiB"),
            _verdict(plan.host_bytes, plan.host_limit, GIB, "GiB"),
            str(rows) if rows else "none",
            f"{plan.peak_phase.name}: {by_component(plan.items).most_common(1)[0][0]}",
        )
        for plan, rows in zip(plans, max_rows, strict=True)
    ]
    first = plans[0]
    where = "" if first.budget is None else f" on {first.ranks} x {first.budget.device}"
    head = ("model", "ds_config", "GPU", "host, all ranks", "largest rows", "peak")
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    table = Table(head, cells, align="llllrl", title=f"What fits{where}; {first.peak_stage.shape}\n")
    return "\n".join([table.text(), "", *(f"note: {note}" for note in notes)])


def _verdict(needed: int, limit: int | None, unit: int, name: str) -> str:
    digits = 0 if unit == MIB else 1
    text = f"{needed / unit:,.{digits}f}"
    if limit is None:
        return f"{text} {name}"
    return f"{'fits' if needed <= limit else 'NO'}, {text} of {limit / unit:,.{digits}f} {name}"


def markdown(rows: Sequence[tuple[str, Plan]]) -> str:
    """A table with one line per plan; `rows` pairs titles with plans."""
    head = ("model", "ds_config", "weights", "gradients", "optimizer", "activations", "loss", "buckets")
    cells = [
        (
            title,
            f"`{_short(plan)}`",
            *(_cell(by_component(plan.items)[name]) for name in COMPONENTS[:6]),
            _mib(plan.gpu_bytes),
            f"{plan.host_bytes / GIB:.1f}",
            "fits" if plan.fits else "no",
        )
        for title, plan in rows
    ]
    return Table((*head, "total MiB", "host GiB", "budget"), cells, align="llrrrrrrrrl").markdown()


def _short(plan: Plan) -> str:
    return plan.ds_config.rpartition("/")[2].removesuffix(".json")


def _mib(size: float) -> str:
    return f"{size / MIB:,.0f}"


def _cell(size: int) -> str:
    return _mib(size) if size else "-"
