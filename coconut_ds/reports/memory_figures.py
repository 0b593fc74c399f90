"""Figures of memory with the budget: by phase, plan against measured, by rank, by stage."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from coconut_ds.reports.figures import MARKS, color_of, new_figure, shade_stages, styled
from coconut_ds.reports.memory_tables import Row, against_plan, is_on_gpu
from coconut_ds.reports.run_records import RunRecord

Json = Mapping[str, Any]
BUDGET_COLOR = "#B00020"
# If the budget is more than this many times the peak, a note replaces the budget line.
VISIBLE = 4.0
TENSORS = "tensors, peak"
KINDS = {  # kind of a phase -> (legend, color)
    "initialise": ("initialise", "#BBBBBB"),
    "pass": ("passes and loss", "#0072B2"),
    "backward": ("backward", "#D55E00"),
    "reduce": ("backward, gradients reduced", "#E69F00"),
    "optimizer": ("optimizer step", "#009E73"),
    "evaluation": ("evaluation", "#56B4E9"),
    "checkpoint": ("checkpoint", "#CC79A7"),
}
SAME_KIND = {"embed": "pass", "loss": "pass"}


def kind_of(phase: str) -> str:
    """The kind of a phase: 'step 2: pass 3 (2)' -> 'pass'."""
    word = phase.rpartition(": ")[2].split()[0]
    return SAME_KIND.get(word, word)


def gpu_budget_mib(profile: Json) -> float | None:
    budget = profile.get("budget")
    return budget["gpu_memory_mib"] - budget["reserved_mib"] if budget else None


def _profiled(runs: Sequence[RunRecord]) -> list[tuple[RunRecord, Json]]:
    return [(run, run.profile) for run in runs if run.profile]


def mark_budget(
    axes: Axes,
    budget: float | None,
    highest: float,
    *,
    across: bool = False,
    at: tuple[float, float] = (1.0, 1.01),
) -> None:
    """Draw a line at the budget, or a note at position `at` if it is far above the peak."""
    if budget is None or highest <= 0:
        return
    if budget > VISIBLE * highest:
        note = f"budget {budget:,.0f} MiB: {100 * highest / budget:.1f} % used"
        style: dict[str, Any] = {"ha": "right", "va": "bottom", "transform": axes.transAxes}
        axes.text(*at, note, color=BUDGET_COLOR, fontsize=9, **style)
        return
    line: dict[str, Any] = {"color": BUDGET_COLOR, "linestyle": "--", "linewidth": 1.5}
    label = f"budget {budget:,.0f} MiB"
    if across:
        axes.axvline(budget, **line)
        style = {"ha": "center", "va": "bottom", "transform": axes.get_xaxis_transform()}
        axes.text(budget, 1.01, label, color=BUDGET_COLOR, fontsize=9, **style)
    else:
        axes.axhline(budget, label=label, **line)


@styled
def timeline_picture(runs: Sequence[RunRecord]) -> Figure | None:
    """Bytes of live tensors through the phases, one panel per run; all phases have equal width."""
    profiled = _profiled(runs)
    if not profiled:
        return None
    figure = new_figure(11, 0.6 + 3.8 * len(profiled))
    panels = figure.subplots(len(profiled), 1, squeeze=False, sharey=True)[:, 0]
    for axes, (run, profile) in zip(panels, profiled, strict=True):
        _timeline(axes, profile)
        where = "GPU memory" if is_on_gpu(profile) else "tensors of a CPU rank, including host states"
        axes.set_title(f"{run.experiment.name}, {run.memory_split}: {where} by phase", loc="left")
    present = {kind_of(phase["name"]) for _, profile in profiled for phase in profile["ranks"][0]["phases"]}
    handles = [
        Patch(color=shade, alpha=0.35, label=name) for kind, (name, shade) in KINDS.items() if kind in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def _timeline(axes: Axes, profile: Json) -> None:
    ranks = profile["ranks"]
    phases = ranks[0]["phases"]
    highest = max(rank["peak_mib"] for rank in ranks)
    for index, phase in enumerate(phases):
        axes.axvspan(index, index + 1, color=KINDS[kind_of(phase["name"])][1], alpha=0.13, linewidth=0)
        peak = max(rank["phases"][index]["peak_mib"] for rank in ranks)
        axes.text(index + 0.5, peak + highest * 0.02, f"{peak:,.0f}", ha="center", va="bottom", fontsize=7)
    for number, rank in enumerate(ranks):
        positions, sizes = _by_phase(rank)
        label = f"rank {number}" if len(ranks) > 1 else "alive"
        axes.plot(positions, sizes, color=color_of(number), linewidth=1.4, label=label,
                  linestyle=("-", "--", ":", "-.")[number % 4], drawstyle="steps-post")  # fmt: skip
        axes.fill_between(positions, sizes, color=color_of(number), alpha=0.10, linewidth=0, step="post")
    mark_budget(axes, gpu_budget_mib(profile), highest, at=(0.995, 0.92))
    names = [phase["name"].replace("step ", "") for phase in phases]
    axes.set_xticks([index + 0.5 for index in range(len(names))], names, rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="MiB", xlim=(0, len(phases)), ylim=(0, None))
    axes.margins(y=0.15)
    axes.set_ylim(0, max(axes.get_ylim()[1], highest * 1.18))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5, fontsize=8)


def _by_phase(rank: Json) -> tuple[list[float], list[float]]:
    """The timeline with every phase scaled to width 1, always including its peak and its end."""
    positions: list[float] = []
    sizes: list[float] = []
    points, seen, level = rank["timeline"], 0, 0.0
    for index, phase in enumerate(rank["phases"]):
        start, seconds = phase["start_seconds"], max(phase["seconds"], 1e-9)
        while seen < len(points) and points[seen][0] < start:
            level, seen = points[seen][1], seen + 1
        inside = []
        while seen < len(points) and points[seen][0] < start + seconds:
            inside.append((index + (points[seen][0] - start) / seconds, points[seen][1]))
            seen += 1
        if not any(size >= 0.995 * phase["peak_mib"] for _, size in inside):
            inside.append((index + 0.5, phase["peak_mib"]))
        path = [(index, min(level, phase["peak_mib"])), *sorted(inside), (index + 1, phase["end_mib"])]
        level = phase["end_mib"]
        positions += [x for x, _ in path]
        sizes += [y for _, y in path]
    return positions, sizes


@styled
def components_picture(runs: Sequence[RunRecord]) -> Figure | None:
    """Persistent states and the largest phase, stacked: plan above measured, for every run."""
    profiled = _profiled(runs)
    if not profiled:
        return None
    figure = new_figure(9, 1.2 + 1.3 * len(profiled))
    axes = figure.subplots()
    highest, budget = 0.0, None
    titles: list[str] = []
    labels: dict[str, int] = {}
    for run, profile in profiled:
        rows = against_plan(profile, run.plan)
        budget = gpu_budget_mib(profile)
        for planned in (True, False) if run.plan else (False,):
            highest = max(highest, _stack(axes, len(titles), rows, planned, labels))
            titles.append(f"{run.experiment.name}\n{'plan' if planned else 'measured'}")
    axes.set_yticks(range(len(titles)), titles)
    axes.invert_yaxis()
    mark_budget(axes, budget, highest, across=True)
    axes.set(xlabel="MiB")
    axes.set_xlim(0, max(axes.get_xlim()[1], highest * 1.12))
    axes.set_title("Plan against measured, rank with the highest peak", loc="left")
    axes.grid(axis="y", visible=False)
    handles = [Patch(color=color_of(index), label=name) for name, index in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9)
    return figure


def _stack(axes: Axes, index: int, rows: Sequence[Row], planned: bool, labels: dict[str, int]) -> float:
    """Draw one bar; returns its length."""
    sizes = [(row, (row.planned or 0.0) if planned else row.measured) for row in rows]
    phase = max((pair for pair in sizes if not pair[0].lasts), key=lambda pair: pair[1])
    left = 0.0
    for row, size in [*(pair for pair in sizes if pair[0].lasts), phase]:
        name = row.name if row.lasts else f"during {row.name}"
        number = labels.setdefault(name, len(labels))
        axes.barh(index, size, left=left, color=color_of(number), height=0.7, hatch="//" if planned else None,
                  edgecolor="white", linewidth=0.5)  # fmt: skip
        left += size
    axes.text(left, index, f" {left:,.1f}", va="center", fontsize=9)
    return left


@styled
def ranks_picture(runs: Sequence[RunRecord]) -> Figure | None:
    """Peaks of all ranks side by side."""
    profiled = _profiled(runs)
    if not profiled:
        return None
    figure = new_figure(4.5 * len(profiled) + 1, 3.2)
    panels = figure.subplots(1, len(profiled), squeeze=False, sharey=True)[0]
    for axes, (run, profile) in zip(panels, profiled, strict=True):
        bars = _rank_bars(profile)
        width = 0.8 / len(bars)
        for number, (name, values) in enumerate(bars.items()):
            positions = [rank + (number - (len(bars) - 1) / 2) * width for rank in range(len(values))]
            drawn = axes.bar(positions, values, width * 0.95, color=color_of(number), label=name)
            axes.bar_label(drawn, fmt="{:,.0f}", fontsize=8)
        mark_budget(axes, gpu_budget_mib(profile), max(bars[TENSORS]))
        count = len(profile["ranks"])
        axes.set_xticks(range(count), [f"rank {rank}" for rank in range(count)])
        axes.set_title(f"{run.experiment.name}: ranks", loc="left")
        axes.set(ylabel="MiB" if axes is panels[0] else None)
        axes.margins(y=0.35)
        axes.grid(axis="x", visible=False)
        axes.legend(fontsize=8, loc="upper left", ncols=2)
    return figure


def _rank_bars(profile: Json) -> dict[str, list[float]]:
    ranks = profile["ranks"]
    readings = [[phase["reading"] for phase in rank["phases"]] for rank in ranks]

    def highest(name: str) -> list[float]:
        return [max(reading[name] for reading in rank) for rank in readings]

    names = {"reserved": "reserved_peak", "device used": "device_used", "pinned host": "pinned"}
    bars = {TENSORS: [rank["peak_mib"] for rank in ranks]}
    bars |= {label: highest(name) for label, name in names.items() if is_on_gpu(profile)}
    bars["resident host (RSS)"] = highest("rss")
    return {name: values for name, values in bars.items() if any(values)}


@styled
def stages_picture(runs: Sequence[RunRecord]) -> Figure | None:
    """Peak of every training epoch with stages, and on a GPU with the plan of every stage."""
    runs = [run for run in runs if run.of("memory")]
    if not runs:
        return None
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
    on_gpu = all(run.uses_gpu for run in runs)
    name = "gpu_allocated_peak_mib" if on_gpu else "host_rss_peak_mib"
    highest = 0.0
    for index, run in enumerate(runs):
        peaks = {int(line["epoch"]) + 1: line[name] for line in run.of("memory") if name in line}
        highest = max(highest, *peaks.values())
        axes.plot(list(peaks), list(peaks.values()), color=color_of(index), marker=MARKS[index % len(MARKS)],
                  markersize=4, label=f"{run.experiment.name}, measured")  # fmt: skip
        if on_gpu and run.plan:
            starts = [stage["first_epoch"] + 1 for stage in run.plan["stages"]]
            sizes = [stage["gpu_mib"] for stage in run.plan["stages"]]
            axes.step([*starts, max(peaks)], [*sizes, sizes[-1]], where="post", color=color_of(index),
                      linestyle=":", label=f"{run.experiment.name}, plan")  # fmt: skip
    shade_stages(axes, runs[0])
    mark_budget(axes, runs[0].budget_mib, highest, at=(1.0, 0.9))
    axes.set(xlabel="epoch", ylabel="MiB", ylim=(0, max(axes.get_ylim()[1], 1.2 * highest)))
    what = "GPU tensors" if on_gpu else "resident memory of the main rank"
    axes.set_title(f"Peak of every epoch: {what}", pad=18)
    axes.legend(loc="lower right", fontsize=8)
    return figure
