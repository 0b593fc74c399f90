"""A weighted mean of the last hidden states with fixed weights, newest first; no parameters."""

import torch
from torch import Tensor

from coconut_ds.errors import ConfigError
from coconut_ds.thoughts import History, Thought, ThoughtSettings, weighted_sum


class FixedWindow(Thought):
    """Uses the first `window_size` weights, renormalized over the states that a row has."""

    weights_W: Tensor

    def __init__(self, hidden_size: int, settings: ThoughtSettings) -> None:
        super().__init__(hidden_size, settings)
        weights = settings.window_weights[: settings.window_size]
        if len(weights) < settings.window_size:
            raise ConfigError(
                f"latent_window_size {settings.window_size} needs as many latent_window_weights, "
                f"got {list(settings.window_weights)}"
            )
        if min(weights) < 0 or weights[0] <= 0:
            # The newest state always exists, so a positive first weight keeps every sum positive.
            raise ConfigError(f"latent_window_weights {list(weights)}: the first must be > 0, the rest >= 0")
        self.within_pass = settings.window_scope == "pass"
        self.register_buffer("weights_W", torch.tensor(weights, dtype=torch.float32), persistent=False)

    def forward(self, history: History) -> Tensor:
        hidden_BWD, mask_BW = history.newest(self.weights_W.numel(), self.within_pass)
        # thought = sum over k of w_k h_k / sum over k of w_k, padding left out
        weights_BW = self.weights_W.float() * mask_BW
        total_B1 = weights_BW.sum(dim=1, keepdim=True)
        # A row with only padding gets zeros, not NaN.
        return weighted_sum(hidden_BWD, weights_BW / torch.where(total_B1 > 0, total_B1, 1.0))

    def window_weights(self) -> list[float]:
        return (self.weights_W / self.weights_W.sum()).tolist()
