"""Plain Coconut: the last hidden state is the next input (paper section 3).

Knows: one state.  Has no parameters.
"""

from torch import Tensor

from coconut_ds.thoughts import History, Thought


class LastHidden(Thought):
    def forward(self, history: History) -> Tensor:
        hidden_BWD, _ = history.newest(1)
        return hidden_BWD[:, 0]
