"""Stop when the numbers go bad, and keep the batch that did it.

Knows: losses, skipped steps.  Does not know: the loop, checkpoints.
A loss that is not finite is the same on every rank once it is summed over them, so all stop at the same step.
DeepSpeed skips a step whose gradients are not finite and goes on, in fp32 too; alone it would skip for ever.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coconut_ds.data.batching import Batch
from coconut_ds.errors import Diverged
from coconut_ds.files import json_text, make_folder, replace_text

FOLDER = "diverged"
# fp16 starts at a loss scale of 2^16 and halves it after two overflows: 2 x 16 skips reach scale 1.
MAX_SKIPPED = 40


@dataclass
class LossGuard:
    """Looks at every step's numbers; `folder` is the run's."""

    folder: Path
    rank: int
    max_skipped: int = MAX_SKIPPED
    _skipped: int = field(default=0, init=False)

    def check(
        self, step: int, loss: float, applied: bool, batches: Sequence[Batch], losses: Sequence[float]
    ) -> None:
        """Raise Diverged, on every rank alike, when there is no point in going on.

        `loss`: summed over ranks.  `applied`: false where gradients overflowed and the step was skipped.
        `batches`, `losses`: this rank's micro-batches; they are written to a file.
        """
        self._skipped = 0 if applied else self._skipped + 1
        if not math.isfinite(loss):
            problem = f"the loss of step {step} is {loss}"
        elif self._skipped >= self.max_skipped:
            problem = f"{self._skipped} steps in a row overflowed and were skipped, up to step {step}"
        else:
            return
        file = self.folder / FOLDER / f"step_{step}_rank_{self.rank}.json"
        try:
            write_batches(file, batches, losses)
            where = f"The batch of each rank: {file.parent}."
        except OSError as error:
            where = f"The batch of this rank could not be written ({error})."
        raise Diverged(
            f"{problem}. {where} The newest checkpoint is from before it; "
            "before you go on from it, change something: a lower 'lr', a lower 'gradient_clipping', the data"
        )


def write_batches(file: Path, batches: Sequence[Batch], losses: Sequence[float]) -> None:
    """One JSON file: loss, problem numbers and token ids of every micro-batch."""
    make_folder(file.parent)
    records = [
        {
            "loss": loss,
            "problems": batch.indices,
            "input_ids": batch.input_ids_BT.tolist(),
            "labels": batch.labels_BT.tolist(),
            "num_latents": batch.num_latents,
        }
        for batch, loss in zip(batches, losses, strict=True)
    ]
    replace_text(file, json_text(records, indent=1))
