"""Figures of learning: loss, accuracy, weights of the latent window, numbers of the steps over training.

    figure = accuracy_picture(groups); save(figure, folder, "accuracy")

The colors are those of Okabe and Ito for color-blind readers; lines also differ in their marks.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from coconut_ds.files import replace_bytes
from coconut_ds.reports.comparison import Accuracy, Group
from coconut_ds.reports.run_records import Line, RunRecord, describe_stage, read_run

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKS = "osD^vP*X"
STAGE_SHADES = ("#FFFFFF", "#F1F1F1")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.parse_math": False,  # a `$` in a run's name does not start a formula
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "svg.hashsalt": "coconut_ds",
}
MAX_POINTS = 400
STEP_NUMBERS = {"gradient_norm": "gradient norm", "step_seconds": "s/step", "tokens_per_s": "tokens/s"}
styled = rc_context(STYLE)  # decorates functions that draw or save: ticks are made while a figure is saved


def color_of(index: int) -> str:
    return COLORS[index % len(COLORS)]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height), layout="constrained")


@styled
def save(figure: Figure, folder: Path, name: str) -> tuple[Path, str]:
    """Write NAME.png for papers; returns its path and the figure as an SVG data URL for a page."""
    path = folder / f"{name}.png"
    raster = io.BytesIO()
    figure.savefig(raster, format="png", dpi=200)
    replace_bytes(path, raster.getvalue())
    return path, svg_url(figure)


@styled
def svg_url(figure: Figure) -> str:
    """The figure as an SVG data URL for a page."""
    vector = io.BytesIO()
    figure.savefig(vector, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(vector.getvalue()).decode()


def shade_stages(axes: Axes, run: RunRecord) -> None:
    """Draw numbered stages as stripes behind the epochs (from 1)."""
    stages = run.stages
    if len(stages) < 2:
        return
    ends = [stage.first_epoch for stage in stages[1:]] + [int(stages[-1].line["epoch"]) + 1]
    for index, (stage, end) in enumerate(zip(stages, ends, strict=True)):
        left, right = stage.first_epoch + 0.5, end + 0.5
        axes.axvspan(left, right, color=STAGE_SHADES[index % 2], zorder=0, linewidth=0)
        axes.text(
            (left + right) / 2, 1.0, f"stage {stage.number}" if right - left > 1.5 else str(stage.number),
            transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8, color="#555555",
        )  # fmt: skip


@styled
def accuracy_picture(groups: Sequence[Group]) -> Figure | None:
    """Validation accuracy by epoch; mean and range for several seeds."""
    if not any(run.of("valid") for group in groups for run in group.runs):
        return None
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    for index, group in enumerate(groups):
        epochs, low, middle, high = _over_seeds(group, "accuracy")
        percent = [[100 * value for value in values] for values in (low, middle, high)]
        axes.plot(
            epochs, percent[1], color=color_of(index), marker=MARKS[index % len(MARKS)], markersize=4,
            label=group.label + (f", {len(group.runs)} seeds (mean, range)" if len(group.runs) > 1 else ""),
        )  # fmt: skip
        if len(group.runs) > 1:
            axes.fill_between(epochs, percent[0], percent[2], color=color_of(index), alpha=0.2, linewidth=0)
    if len(groups) == 1 and any(line["cot_match"] for line in groups[0].first.of("valid")):
        epochs, _, middle, _ = _over_seeds(groups[0], "cot_match")
        axes.plot(epochs, [100 * v for v in middle], color=color_of(1), linestyle="--", label="CoT match")
    shade_stages(axes, groups[0].first)
    axes.set(xlabel="epoch", ylabel="%", ylim=(-2, 102))
    axes.set_title("Accuracy on the validation set", pad=18)
    axes.legend(loc="best")
    return figure


@styled
def loss_picture(groups: Sequence[Group]) -> Figure | None:
    """Training loss by step, thinned, and validation loss by epoch."""
    runs = [(index, group, run) for index, group in enumerate(groups) for run in group.runs]
    if not any(run.of("train") for _, _, run in runs):
        return None
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    for index, group, run in runs:
        epochs, losses = smoothed(run, "loss")
        label = f"{group.label}, training" if run is group.first else None
        axes.plot(epochs, losses, color=color_of(index), linewidth=1, alpha=0.7, label=label)
        valid = run.of("valid")
        axes.plot(
            [line["epoch"] + 1 for line in valid], [line["loss"] for line in valid], color=color_of(index),
            linestyle="none", marker=MARKS[index % len(MARKS)], markersize=4,
            label=f"{group.label}, validation" if run is group.first else None,
        )  # fmt: skip
    shade_stages(axes, groups[0].first)
    axes.set(xlabel="epoch", ylabel="token loss (nats)", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")  # that of log axes writes formulas
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    axes.set_title("Loss", pad=18)
    axes.legend(loc="best")
    return figure


@styled
def steps_picture(groups: Sequence[Group]) -> Figure | None:
    """Gradient norm, seconds of a step and tokens per second by step, thinned, of each group's first run."""
    curves = {title: [smoothed(g.first, name) for g in groups] for name, title in STEP_NUMBERS.items()}
    drawn = [(title, lines) for title, lines in curves.items() if any(len(epochs) > 1 for epochs, _ in lines)]
    if not drawn:
        return None
    figure = new_figure(8, 1.9 * len(drawn))
    panels = figure.subplots(len(drawn), sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(panels, drawn, strict=True):
        for index, (group, (epochs, values)) in enumerate(zip(groups, lines, strict=True)):
            axes.plot(epochs, values, color=color_of(index), linewidth=1, label=group.label)
        shade_stages(axes, groups[0].first)
        axes.set(ylabel=title)
        axes.set_ylim(bottom=0)
    panels[-1].set(xlabel="epoch")
    if len(groups) > 1:
        panels[0].legend(loc="best")
    return figure


@styled
def window_picture(run: RunRecord) -> Figure | None:
    """Weight of each hidden state in the thought over training; None for thoughts without weights.

    A later line of the same epoch replaces an earlier one (a resumed run).
    """
    by_epoch = {line["epoch"] + 1: line.get("window_weights") for line in run.of("valid")}
    drawn = {epoch: weights for epoch, weights in by_epoch.items() if weights}
    if not drawn:
        return None
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
    for index, weights in enumerate(zip(*drawn.values(), strict=True)):
        axes.plot(
            list(drawn), weights, color=color_of(index), marker=MARKS[index % len(MARKS)], markersize=4,
            label="newest state" if index == 0 else f"{index} before",
        )  # fmt: skip
    shade_stages(axes, run)
    axes.set(xlabel="epoch", ylabel="weight")
    axes.set_title("Weights of the latent window", pad=18)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_window_weights(folder: Path) -> Path | None:
    """Draw window_weights.png in a run folder; returns its path, or None without weights."""
    figure = window_picture(read_run(folder))
    return None if figure is None else save(figure, folder, "window_weights")[0]


@styled
def stage_picture(groups: Sequence[Group]) -> Figure | None:
    """Accuracy at the end of every stage with 95 % intervals."""
    shown = [group for group in groups if len(group.first.stages) > 1]
    if not shown:
        return None
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
    titles: dict[int, str] = {}
    for index, group in enumerate(shown):
        for result in group.first.stages:
            lines = [s.line for run in group.runs for s in run.stages if s.number == result.number]
            accuracy = Accuracy.of(lines)
            errors = [[100 * (accuracy.value - accuracy.low)], [100 * (accuracy.high - accuracy.value)]]
            axes.errorbar(
                result.number + 0.12 * (index - (len(shown) - 1) / 2), 100 * accuracy.value, yerr=errors,
                color=color_of(index), marker=MARKS[index % len(MARKS)], capsize=3, linestyle="none",
                label=group.label if result is group.first.stages[0] else None,
            )  # fmt: skip
            titles.setdefault(result.number, describe_stage(result.stage))
    axes.set_xticks(sorted(titles), [f"stage {number}\n{titles[number]}" for number in sorted(titles)])
    axes.set(ylabel="%", ylim=(-2, 104))
    axes.set_title("Accuracy at the end of every stage, 95 % intervals")
    if len(shown) > 1:
        axes.legend(loc="best")
    return figure


def smoothed(run: RunRecord, name: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of a number of the train lines: at most MAX_POINTS means over equal numbers of steps.

    Older versions logged supervised tokens as tokens_per_s, which are left out.
    """
    by_epoch: dict[int, list[Line]] = {}
    for line in run.of("train"):
        by_epoch.setdefault(int(line["epoch"]), []).append(line)
    num_steps = max(map(len, by_epoch.values()), default=0)
    points = [
        (epoch + (index + 1) / num_steps + 0.5, line[name])
        for epoch, lines in by_epoch.items()
        for index, line in enumerate(lines)
        if math.isfinite(line.get(name, math.nan))
        and (name != "tokens_per_s" or "supervised_tokens_per_s" in line)
    ]
    width = -(-len(points) // MAX_POINTS) or 1
    chunks = [points[start : start + width] for start in range(0, len(points), width)]
    return [mean(x for x, _ in chunk) for chunk in chunks], [mean(y for _, y in chunk) for chunk in chunks]


def _over_seeds(group: Group, name: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """(epochs from 1, lowest, mean, highest) of the field `name` in validation lines."""
    values: dict[int, list[Any]] = {}
    for run in group.runs:
        for epoch, line in {int(line["epoch"]): line for line in run.of("valid")}.items():
            values.setdefault(epoch, []).append(line[name])
    epochs, columns = sorted(values), [values[epoch] for epoch in sorted(values)]
    return [epoch + 1 for epoch in epochs], [*map(min, columns)], [*map(mean, columns)], [*map(max, columns)]
