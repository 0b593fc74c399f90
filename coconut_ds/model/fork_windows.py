"""Check an experiment's window settings against those of the published forks.

    a fork's window                                     here
    width in the code, weights oldest state first       latent_window_size, weights newest state first
    full for the first latent, one state wide after it  latent_window_scope: pass
    fixed weights .6 .3 .1, oldest state first          latent_window_weights: [0.1, 0.3, 0.6]

Settings are never changed silently: an error lists the lines to write.
"""

import warnings
from pathlib import Path

from torch import Tensor

from coconut_ds.config.experiment import Experiment
from coconut_ds.errors import CheckpointError

DEFAULT_WEIGHTS, FORK_WEIGHTS = (0.6, 0.3, 0.1), (0.1, 0.3, 0.6)  # newest state first


def require_learned_window(experiment: Experiment, latent_weights_W: Tensor, source: str | Path) -> None:
    """Raise CheckpointError if the experiment's window is not the fork's learned window.

    `latent_weights_W`: oldest state first, as in the file.
    """
    if latent_weights_W.dim() != 1 or not len(latent_weights_W):
        shape = tuple(latent_weights_W.shape)
        raise CheckpointError(
            f"{source}: `latent_weights` has shape {shape}; it must be one number per state"
        )
    width = len(latent_weights_W)
    lines = []
    if experiment.thought != "learnable_window":
        lines.append("thought: learnable_window")
    if experiment.latent_window_scope != "pass":
        lines.append("latent_window_scope: pass")
    if experiment.latent_window_size != width:
        lines.append(f"latent_window_size: {width}")
    if lines:
        uses = (
            f"uses thought `{experiment.thought}`"
            if experiment.thought != "learnable_window"
            else "has other window settings than the fork's training"
        )
        raise CheckpointError(
            f"{source}: this checkpoint has window weights (`latent_weights`), but the experiment {uses}; "
            f"set {_listed(lines)}"
        )
    newest_first = ", ".join(f"{value:.3g}" for value in latent_weights_W.flip(0).tolist())
    warnings.warn(
        f"{source}: window weights of the learnable-window fork, newest state first here: {newest_first}. "
        f"As in the fork, the first latent sees {width} states and every later one sees 1",
        stacklevel=2,
    )


def require_fixed_window(experiment: Experiment, source: str | Path) -> None:
    """The same for the contextual fork's fixed window, which a state dict does not show.

    Raises CheckpointError for evaluation; warns when training starts from such a file.
    """
    lines = []
    if experiment.latent_window_scope != "pass":
        lines.append("latent_window_scope: pass")
    if tuple(experiment.latent_window_weights) == DEFAULT_WEIGHTS:
        lines.append(f"latent_window_weights: {list(FORK_WEIGHTS)}")
    if not lines:
        return
    text = (
        f"{source}: a state dict of the published code, and the experiment uses thought `fixed_window`. "
        "The fork's window reaches into the newest pass only, and its weights .6 .3 .1 run from the oldest "
        f"state to the newest. To use the window of its training, set {_listed(lines)}"
    )
    if experiment.only_eval:
        raise CheckpointError(text)
    warnings.warn(text, stacklevel=2)


def _listed(lines: list[str]) -> str:
    quoted = [f"`{line}`" for line in lines]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
