"""One learned vector in every latent slot, whatever the hidden states (pause controls of paper table 1)."""

import torch
from torch import Tensor, nn

from coconut_ds.thoughts import History, Thought, ThoughtSettings


class Pause(Thought):
    """D parameters, initialized like a token embedding."""

    def __init__(self, hidden_size: int, settings: ThoughtSettings) -> None:
        super().__init__(hidden_size, settings)
        self.vector_D = nn.Parameter(torch.empty(hidden_size).normal_(std=0.02))

    def forward(self, history: History) -> Tensor:
        newest_BWD, _ = history.newest(1)
        return self.vector_D.to(newest_BWD.dtype).expand(newest_BWD.shape[0], -1)
