"""Continuous thoughts: modules that compute the next input embedding from the hidden states so far.

A continuous thought (Coconut, arXiv 2412.06769) fills a latent slot in place of a token's embedding:

    question . . . <start>   [L0]     [L1]
    h h h h h h h h h   --->  x0 -h-->  x1          x_k = thought(every hidden state so far)

This folder is the registry: a module `NAME.py` with one `Thought` subclass defines the thought `NAME`.
A thought always receives the complete history, independently of the model's cache.

Shapes: B rows, T columns of a pass, W window columns (newest first), D hidden size.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coconut_ds.config.experiment import Experiment
from coconut_ds.config.schema import did_you_mean
from coconut_ds.errors import ConfigError


@dataclass(frozen=True)
class ThoughtSettings:
    """The settings of an experiment that thoughts use; defaults as in the experiment's schema."""

    window_size: int = 3
    window_init: str = "recent"  # "recent": starts as plain Coconut; "uniform": starts as the plain mean
    window_scope: str = "sequence"  # "sequence": every pass; "pass": the newest pass only (as published)
    window_weights: tuple[float, ...] = (0.6, 0.3, 0.1)  # newest first

    @classmethod
    def of(cls, experiment: Experiment) -> "ThoughtSettings":
        return cls(
            window_size=experiment.latent_window_size,
            window_init=experiment.latent_window_init,
            window_scope=experiment.latent_window_scope,
            window_weights=tuple(experiment.latent_window_weights),
        )


class History:
    """The hidden states (after the final norm) of all columns so far, pass by pass.

    Holds references to the model's tensors, so gradients flow through them. Only the few columns that
    `newest` returns are concatenated.
    """

    def __init__(self) -> None:
        self._passes: list[tuple[Tensor, Tensor]] = []

    def append(self, hidden_BTD: Tensor, mask_BT: Tensor) -> None:
        """Add one pass; `mask_BT` is false (or 0) for padding."""
        if hidden_BTD.shape[:2] != mask_BT.shape:
            raise ValueError(
                f"hidden states of shape {tuple(hidden_BTD.shape)} need a mask of shape "
                f"{tuple(hidden_BTD.shape[:2])}, got {tuple(mask_BT.shape)}"
            )
        self._passes.append((hidden_BTD, mask_BT.bool()))

    def last(self) -> Tensor:
        """The newest column, hidden_BD; of a row that has ended, the hidden state of its padding."""
        hidden_BTD, _ = self._passes[-1]
        return hidden_BTD[:, -1] if hidden_BTD.shape[1] > 1 else hidden_BTD.squeeze(1)

    def newest(self, width: int, within_pass: bool = False) -> tuple[Tensor, Tensor]:
        """The newest `width` columns, newest first: hidden_BWD and mask_BW, W = `width` always.

        The mask is false, and the hidden state zero, where a row's column is padding or does not exist.
        `within_pass` limits the window to the newest pass.
        """
        if not self._passes:
            raise ValueError("the history is empty: append the question's hidden states first")
        columns: list[Tensor] = []
        masks: list[Tensor] = []
        missing = width
        for hidden_BTD, mask_BT in reversed(self._passes):
            columns.append(_newest_first(hidden_BTD, missing))
            masks.append(_newest_first(mask_BT, missing))
            missing -= columns[-1].shape[1]
            if missing == 0 or within_pass:
                break
        hidden_BWD, mask_BW = columns[0], masks[0]
        if len(columns) > 1:
            hidden_BWD, mask_BW = torch.cat(columns, dim=1), torch.cat(masks, dim=1)
        if missing:
            hidden_BWD = nn.functional.pad(hidden_BWD, (0, 0, 0, missing))
            mask_BW = nn.functional.pad(mask_BW, (0, missing), value=False)
        return hidden_BWD.masked_fill(~mask_BW[..., None], 0), mask_BW


def _newest_first(x_BT: Tensor, width: int) -> Tensor:
    """The last `width` columns, or all, in reverse order; a single column is not copied."""
    newest_BW = x_BT[:, -width:] if x_BT.shape[1] > width else x_BT
    return newest_BW.flip(1) if newest_BW.shape[1] > 1 else newest_BW


class Thought(nn.Module, ABC):
    """A module that fills latent slots.

    A subclass reads its parameters only in `forward`, where ZeRO-3 gathers them, and must work when cast to
    half precision.
    """

    def __init__(self, hidden_size: int, settings: ThoughtSettings) -> None:
        super().__init__()

    def start(self, embedding_VD: Tensor) -> None:
        """Called once, with the token embeddings before training; trained weights are loaded after it."""
        return None

    @abstractmethod
    def forward(self, history: History) -> Tensor:
        """The next input embedding of every row, thought_BD, in the hidden states' dtype."""

    def window_weights(self) -> list[float] | None:
        """Weight of each state in the window, newest first, for the log; None without a window."""
        return None


def weighted_sum(hidden_BWD: Tensor, weights_BW: Tensor) -> Tensor:
    """Sum over the window in fp32, returned in the hidden states' dtype: thought_BD.

    A weight of one on a single state returns that state bit for bit.
    """
    # thought = sum over k of w_k h_k
    return (weights_BW.float()[..., None] * hidden_BWD.float()).sum(dim=1).to(hidden_BWD.dtype)


def available_thoughts() -> tuple[str, ...]:
    """Names of all thoughts: the modules of this folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def build_thought(name: str, hidden_size: int, settings: ThoughtSettings) -> Thought:
    """The thought `name` for states of `hidden_size`.  Raises ConfigError for an unknown name."""
    names = available_thoughts()
    if name not in names:
        hint = did_you_mean(name, names) or f"; available: {', '.join(names)}"
        raise ConfigError(f"thought '{name}' does not exist{hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Thought) and value.__module__ == module.__name__
    ]
    assert len(classes) == 1, f"{module.__name__} must define exactly one Thought, got {len(classes)}"
    return classes[0](hidden_size, settings)
