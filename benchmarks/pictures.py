"""The pictures of docs/benchmarks.md.

Knows: records, matplotlib.  Does not know: text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.sections import MB, STEP_NAMES

AXES = {"latents": "latents", "rows": "rows", "question": "question tokens"}


def draw_all(results: Mapping[str, Any], folder: Path) -> None:
    """Draw what there are results for."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("scaling", scaling), ("quickstart", quickstart)):
        if name in results:
            # Without the program's version in the file, the same numbers give the same bytes.
            draw(results[name]["records"]).savefig(
                folder / f"{name}.png", dpi=110, metadata={"Software": None}
            )


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


def quickstart(records: list[dict[str, Any]]) -> Figure:
    """Validation accuracy by stage, a line for every seed; the baseline's test accuracy dashed."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    plot = figure.subplots()
    for record in records:
        if record["method"] == "coconut":
            stages = sorted(record["stages"], key=int)
            accuracy = [100 * record["stages"][stage] for stage in stages]
            plot.plot([int(s) for s in stages], accuracy, marker="o", label=f"Coconut, seed {record['seed']}")
        elif record["test"] is not None:
            plot.axhline(100 * record["test"], color="grey", linestyle="--", linewidth=1)
    plot.set(xlabel="stage: steps of three in latents", ylabel="accuracy, %", ylim=(0, 102), xticks=range(4))
    plot.set_title("dashed: no CoT", fontsize=9)
    plot.legend(fontsize=8)
    return figure
