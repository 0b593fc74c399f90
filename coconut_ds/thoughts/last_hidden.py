"""Plain Coconut: the last hidden state is the continuous thought (paper section 3); no parameters."""

from torch import Tensor

from coconut_ds.thoughts import History, Thought


class LastHidden(Thought):
    def forward(self, history: History) -> Tensor:
        return history.last()
