"""How the weights of a latent window moved over training, as a picture in the run folder.

Knows: the lines of metrics.jsonl.  Does not know: thoughts, models, the loop.
"""

import io
from pathlib import Path

from coconut_ds.files import replace_bytes
from coconut_ds.runs.record_shapes import metric_lines
from coconut_ds.runs.run_folder import METRICS

PICTURE = "window_weights.png"


def draw_window_weights(folder: str | Path) -> Path | None:
    """Draw every validation's window weights; gives the picture's path, or None where no line has any.

    A later line of the same epoch replaces an earlier one (a resumed run).  Stage switches are dotted.
    """
    from matplotlib.figure import Figure  # half a second that most runs need not wait for

    folder = Path(folder)
    lines = metric_lines(folder / METRICS)
    found = {line["epoch"]: line for line in lines if line["kind"] == "valid" and "window_weights" in line}
    if not found:
        return None
    epochs = sorted(found)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for back in range(len(found[epochs[-1]]["window_weights"])):
        weights = [found[epoch]["window_weights"][back] for epoch in epochs]
        axes.plot(
            epochs, weights, marker="o", markersize=3, label="newest state" if not back else f"{back} before"
        )
    for before, epoch in zip(epochs, epochs[1:], strict=False):
        if found[before].get("stage") != found[epoch].get("stage"):
            axes.axvline((before + epoch) / 2, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="epoch", ylabel="weight", ylim=(-0.02, 1.02), title="Latent window")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    replace_bytes(folder / PICTURE, picture.getvalue())
    return folder / PICTURE
