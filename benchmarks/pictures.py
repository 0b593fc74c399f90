"""The pictures of docs/benchmarks.md.

Knows: records, matplotlib.  Does not know: text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.sections import MB, RUN_NAMES, STEP_NAMES

AXES = {"latents": "latents", "rows": "rows", "question": "question tokens"}


def draw_all(results: Mapping[str, Any], folder: Path) -> None:
    """Draw what there are results for."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, result, draw in PICTURES:
        if result in results:
            # Without the program's version in the file, the same numbers give the same bytes.
            draw(results[result]["records"]).savefig(
                folder / f"{name}.png", dpi=110, metadata={"Software": None}
            )


def overview(records: list[dict[str, Any]]) -> Figure:
    """README's figure: the latent loop, and the peak memory of a training step."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    loop, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_loop(loop)
    own = {record["variant"]: record["peak_bytes"] / MB for record in records}
    shown = [(title, own[name]) for name, title in STEP_NAMES.items() if name in own][::-1]
    colors = ["#2a7f62" if title.startswith("coconut_ds") else "#9aa5ad" for title, _ in shown]
    drawn = bars.barh([title for title, _ in shown], [peak for _, peak in shown], color=colors)
    bars.bar_label(drawn, fmt="{:,.0f} MB", padding=4, fontsize=9)
    bars.set(xlim=(0, 1.25 * max(own.values())), xticks=[])
    bars.set_title("Peak memory of a training step, 6 latents\n(GPT-2 124M, fp32, CPU)", fontsize=10)
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def _draw_loop(axes: Any) -> None:
    """Columns of one row: question, latents, answer; arrows from a hidden state to the next input."""
    columns = ["question", "<start>", "latent 1", "latent 2", "latent 3", "<end>", "answer"]
    for x, name in enumerate(columns):
        is_latent = name.startswith("latent")
        color = "#2a7f62" if is_latent else "#d9dee2"
        axes.text(x, 0, name, ha="center", va="center", fontsize=9, color="white" if is_latent else "black",
                  bbox={"boxstyle": "round,pad=0.4", "facecolor": color, "edgecolor": "none"})  # fmt: skip
        axes.plot([x, x], [0.22, 0.5], color="#9aa5ad", linewidth=1)
        if columns[x + 1 : x + 2] and columns[x + 1].startswith("latent"):
            axes.plot([x, x, x + 0.5, x + 0.5], [1, 1.15, 1.15, 0.36], color="#2a7f62", linewidth=1.5)
            arrow = {"arrowstyle": "->", "color": "#2a7f62", "linewidth": 1.5}
            axes.annotate("", xy=(x + 0.97, 0.2), xytext=(x + 0.49, 0.37), arrowprops=arrow)
    box = Rectangle((-0.5, 0.5), len(columns), 0.5, facecolor="#eef1f3", edgecolor="#9aa5ad", zorder=0)
    axes.add_patch(box)
    axes.text(5, 0.75, "language model", ha="center", va="center", fontsize=10)
    axes.set_title(
        "The last hidden state is the next input: a continuous thought.\n"
        "One pass per thought, and one backward through all of them",
        fontsize=10,
    )
    axes.set(xlim=(-0.7, len(columns) - 0.3), ylim=(-0.4, 1.4))
    axes.axis("off")


def scaling(records: list[dict[str, Any]]) -> Figure:
    """Peak above, seconds below, a column for every axis."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    plots = figure.subplots(2, len(AXES), sharey="row")
    for column, (axis, label) in enumerate(AXES.items()):
        for variant, title in STEP_NAMES.items():
            own = [r for r in records if r["axis"] == axis and r["variant"] == variant]
            x = [record[axis] for record in own]
            plots[0][column].plot(x, [r["peak_bytes"] / MB for r in own], marker="o", label=title)
            plots[1][column].plot(x, [r["seconds"] for r in own], marker="o", label=title)
        plots[1][column].set_xlabel(label)
        for row in (0, 1):
            plots[row][column].set_ylim(0, None)
            plots[row][column].grid(alpha=0.3)
    plots[0][0].set_ylabel("peak above weights and gradients, MB")
    plots[1][0].set_ylabel("seconds, forward and backward")
    plots[0][0].legend(fontsize=8)
    return figure


def seeds(records: list[dict[str, Any]]) -> Figure:
    """Validation accuracy by stage: a thin line for every run, a thick one for the mean of a kind."""
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    plot = figure.subplots()
    for number, (run, name) in enumerate(RUN_NAMES.items()):
        own = [[100 * accuracy for accuracy in r["stages"].values()] for r in records if r["run"] == run]
        if len(own[0] if own else ()) < 2:  # without stages
            continue
        for accuracies in own:
            plot.plot(accuracies, color=f"C{number}", alpha=0.25, linewidth=1)
        means = [sum(column) / len(own) for column in zip(*own, strict=True)]
        plot.plot(means, color=f"C{number}", marker="o", label=f"{name} (mean of {len(own)})")
    plot.set(
        xlabel="stage: steps of three that are hidden",
        ylabel="validation accuracy, %",
        ylim=(0, 102),
        xticks=range(4),
    )
    plot.grid(alpha=0.3)
    plot.legend(fontsize=8)
    return figure


# Name of the picture, of the result, and the function.
PICTURES = (
    ("overview", "train_step_prosqa", overview),
    ("scaling", "scaling", scaling),
    ("seeds", "seeds", seeds),
)
