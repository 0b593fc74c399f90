"""A figure of the latent window's weights over training, in the run folder."""

import io
from pathlib import Path

from coconut_ds.files import replace_bytes
from coconut_ds.runs.record_shapes import metric_lines
from coconut_ds.runs.run_folder import METRICS

PICTURE = "window_weights.png"


def draw_window_weights(folder: str | Path) -> Path | None:
    """Draw the window weights of every validation; returns the figure's path, or None without weights.

    A later line of the same epoch replaces an earlier one (a resumed run).  Dotted lines mark stage switches.
    """
    from matplotlib.figure import Figure  # takes half a second to import

    folder = Path(folder)
    lines = metric_lines(folder / METRICS)
    by_epoch = {line["epoch"]: line for line in lines if line["kind"] == "valid" and "window_weights" in line}
    if not by_epoch:
        return None
    epochs = sorted(by_epoch)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for back in range(len(by_epoch[epochs[-1]]["window_weights"])):
        weights = [by_epoch[epoch]["window_weights"][back] for epoch in epochs]
        axes.plot(
            epochs, weights, marker="o", markersize=3, label="newest state" if not back else f"{back} before"
        )
    for before, epoch in zip(epochs, epochs[1:], strict=False):
        if by_epoch[before].get("stage") != by_epoch[epoch].get("stage"):
            axes.axvline((before + epoch) / 2, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="epoch", ylabel="weight", ylim=(-0.02, 1.02), title="Latent window")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    replace_bytes(folder / PICTURE, picture.getvalue())
    return folder / PICTURE
