"""The last hidden state plus a small learned correction; starts as plain Coconut, bit for bit.

The hidden state is an output of the model's final norm and the thought an input embedding; the correction
learns the map between the two spaces.
"""

from torch import Tensor, nn

from coconut_ds.thoughts import History, Thought, ThoughtSettings


class MlpProjection(Thought):
    """2 D^2 + 4 D parameters for hidden size D."""

    def __init__(self, hidden_size: int, settings: ThoughtSettings) -> None:
        super().__init__(hidden_size, settings)
        self.norm = nn.LayerNorm(hidden_size)
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.outer = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, history: History) -> Tensor:
        hidden_BD = history.newest(1)[0][:, 0]
        # thought = h + outer(gelu(inner(norm(h)))), outer starts at zero
        inner_BD = self.inner(self.norm(hidden_BD.to(self.norm.weight.dtype)))
        return hidden_BD + self.outer(nn.functional.gelu(inner_BD)).to(hidden_BD.dtype)
