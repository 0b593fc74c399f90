"""Work that one node of a backward leaves for another.

Knows: autograd's end of a backward.  Does not know: what the work is.
"""

import torch


class BackwardQueue:
    """Work that one node of a backward leaves for another, which runs later in the same backward.

    It never holds a graph, and a second backward through the same graph finds it empty.
    """

    setting: str  # of latent_memory

    def __init__(self) -> None:
        self._is_watched = False

    @property
    def is_empty(self) -> bool:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def watch(self) -> None:
        """Have autograd check at the end of this backward that nothing was left behind."""
        if not self._is_watched:
            self._is_watched = True
            torch.autograd.Variable._execution_engine.queue_callback(self._assert_collected)

    def _assert_collected(self) -> None:
        self._is_watched = False
        left_behind = not self.is_empty
        self.clear()
        if left_behind:
            raise RuntimeError(
                "this backward ran the later passes of a layer and not its first, so the layer's gradient is "
                "incomplete. Run backward() on the whole loss; for torch.autograd.grad() of some inputs set "
                f"latent_memory.{self.setting} to false."
            )
