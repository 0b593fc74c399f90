"""Stop when training diverges, and save the batch that caused it.

The loss is summed over ranks, so all ranks see a non-finite loss at the same step.  DeepSpeed skips a step
with non-finite gradients, in fp32 too, and never stops skipping.
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
    """Checks every step for divergence; `folder` is the run folder."""

    folder: Path
    rank: int
    max_skipped: int = MAX_SKIPPED
    _skipped: int = field(default=0, init=False)

    def check(
        self, step: int, loss: float, applied: bool, batches: Sequence[Batch], losses: Sequence[float]
    ) -> None:
        """Raise Diverged on every rank if training cannot continue.

        `loss`: summed over ranks.  `applied`: false if gradients overflowed and the step was skipped.
        `batches`, `losses`: this rank's micro-batches, which are then written to a file.
        """
        self._skipped = 0 if applied else self._skipped + 1
        if not math.isfinite(loss):
            reason = f"the loss of step {step} is {loss}"
        elif self._skipped >= self.max_skipped:
            reason = f"{self._skipped} steps in a row overflowed and were skipped, up to step {step}"
        else:
            return
        file = self.folder / FOLDER / f"step_{step}_rank_{self.rank}.json"
        try:
            write_batches(file, batches, losses)
            where = f"The batch of each rank is in {file.parent}."
        except OSError as error:
            where = f"The batch of this rank could not be written ({error})."
        raise Diverged(
            f"{reason}. {where} The newest checkpoint is from before that step. "
            "Before you resume, lower 'lr' or 'gradient_clipping', or fix the data"
        )


def write_batches(file: Path, batches: Sequence[Batch], losses: Sequence[float]) -> None:
    """Write one JSON file with the loss, problem numbers and token ids of every micro-batch."""
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
