"""The last hidden state, scaled to the norm of a token embedding; no parameters.

A hidden state after the final norm is several times as long as a token embedding, so what the layers add in a
latent's column is small beside it.
"""

import torch
from torch import Tensor

from coconut_ds.thoughts import History, Thought, ThoughtSettings


class NormalizedHidden(Thought):
    """`embedding_norm` is the mean norm of the token embeddings before training."""

    embedding_norm: Tensor

    def __init__(self, hidden_size: int, settings: ThoughtSettings) -> None:
        super().__init__(hidden_size, settings)
        self.register_buffer("embedding_norm", torch.ones(()))

    def start(self, embedding_VD: Tensor) -> None:
        self.embedding_norm.copy_(embedding_VD.detach().float().norm(dim=1).mean())

    def forward(self, history: History) -> Tensor:
        hidden_BD = history.newest(1)[0][:, 0]
        # thought = n h / |h|,  n = mean over tokens v of |E_v|
        norm_B1 = hidden_BD.float().norm(dim=1, keepdim=True).clamp(min=1e-12)
        return (hidden_BD.float() * (self.embedding_norm.float() / norm_B1)).to(hidden_BD.dtype)
