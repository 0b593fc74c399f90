"""A learned weighted mean of the last hidden states: softmax over one logit per state, newest first.

The window reaches across passes, or with `latent_window_scope: pass` into the newest pass only.  The
published code does the latter: its window is full for the first latent and one state wide afterward.
"""

import math

import torch
from torch import Tensor, nn

from coconut_ds.thoughts import History, Thought, ThoughtSettings, weighted_sum

# Total weight of all older states when `recent` starts.  For states of equal norm the thought then differs
# from plain Coconut by at most 2 * 4e-4 of that norm, and every logit still has a gradient.
OLDER_SHARE = 4e-4


class LearnableWindow(Thought):
    """`logits_W[0]` belongs to the newest state; the softmax runs over the states that a row has."""

    def __init__(self, hidden_size: int, settings: ThoughtSettings) -> None:
        super().__init__(hidden_size, settings)
        self.width = settings.window_size
        self.within_pass = settings.window_scope == "pass"
        logits = torch.zeros(self.width)
        if settings.window_init == "recent" and self.width > 1:
            # softmax(logits) = [1 - share, share / (W - 1), ...]
            logits[1:] = math.log(OLDER_SHARE / (1 - OLDER_SHARE) / (self.width - 1))
        self.logits_W = nn.Parameter(logits)
        self._seen_logits_W = logits

    def forward(self, history: History) -> Tensor:
        hidden_BWD, mask_BW = history.newest(self.width, self.within_pass)
        logits_W = self.logits_W.float()
        masked_BW = logits_W.expand(mask_BW.shape).masked_fill(~mask_BW, torch.finfo(torch.float32).min)
        # w = softmax(logits) over the states that a row has; the mask sets a row with only padding to zero.
        weights_BW = torch.softmax(masked_BW, dim=1) * mask_BW
        self._seen_logits_W = logits_W.detach()
        return weighted_sum(hidden_BWD, weights_BW)

    def window_weights(self) -> list[float]:
        # ZeRO-3 partitions the logits between forwards; use those of the last forward then.
        is_gathered = self.logits_W.numel() == self.width
        logits_W = self.logits_W.detach().float() if is_gathered else self._seen_logits_W
        return torch.softmax(logits_W, dim=0).tolist()
