"""A learned weighted mean of the last hidden states: softmax over one logit per state, newest first.

Knows: a window that reaches across passes, or only into the newest pass (`latent_window_scope: pass`, the
behaviour of the published code, where the window is full for the first latent and one wide afterwards).
"""

import math

import torch
from torch import Tensor, nn

from coconut_ds.thoughts import History, Thought, ThoughtSettings, weighted_sum

# Share of all older states together at the start of `recent`.  For states of equal norm the thought is then
# at most 2 * 4e-4 of that norm away from plain Coconut, and every logit still has a gradient.
OLDER_SHARE = 4e-4


class LearnableWindow(Thought):
    """`logits_W[0]` belongs to the newest state; the softmax runs over the states that a row has."""

    def __init__(self, hidden_size: int, settings: ThoughtSettings) -> None:
        super().__init__(hidden_size, settings)
        self.width = settings.window_size
        self.within_pass = settings.window_scope == "pass"
        logits = torch.zeros(self.width)
        if settings.window_init == "recent" and self.width > 1:
            logits[1:] = math.log(OLDER_SHARE / (1 - OLDER_SHARE) / (self.width - 1))
        self.logits_W = nn.Parameter(logits)
        self._seen_logits_W = logits

    def forward(self, history: History) -> Tensor:
        hidden_BWD, mask_BW = history.newest(self.width, self.within_pass)
        logits_W = self.logits_W.float()
        masked_BW = logits_W.expand(mask_BW.shape).masked_fill(~mask_BW, torch.finfo(torch.float32).min)
        # The product keeps a row without any state (padding only) at zero.
        weights_BW = torch.softmax(masked_BW, dim=1) * mask_BW
        self._seen_logits_W = logits_W.detach()
        return weighted_sum(hidden_BWD, weights_BW)

    def window_weights(self) -> list[float]:
        # ZeRO-3 takes the logits away between forwards; the last forward's are then the newest known.
        here = self.logits_W.numel() == self.width
        return torch.softmax(self.logits_W.detach().float() if here else self._seen_logits_W, dim=0).tolist()
