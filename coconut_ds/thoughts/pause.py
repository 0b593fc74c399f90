"""One learned vector in every slot: no hidden state comes back (the pause controls of paper table 1).

Knows: nothing of the history but its number of rows and its dtype.
"""

import torch
from torch import Tensor, nn

from coconut_ds.thoughts import History, Thought, ThoughtSettings


class Pause(Thought):
    """D parameters, initialised like a token embedding."""

    def __init__(self, hidden_size: int, settings: ThoughtSettings) -> None:
        super().__init__(hidden_size, settings)
        self.vector_D = nn.Parameter(torch.empty(hidden_size).normal_(std=0.02))

    def forward(self, history: History) -> Tensor:
        newest_BWD, _ = history.newest(1)
        return self.vector_D.to(newest_BWD.dtype).expand(newest_BWD.shape[0], -1)
