"""The random number generators of one process, in a form that loads without unpickling code.

Knows: python, numpy, torch and its devices.  Does not know: ranks, folders.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coconut_ds.errors import CheckpointError, first_line


def save_random_state(path: Path) -> None:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert isinstance(keys, np.ndarray)
    torch.save(
        {
            "python": (version, list(words), gauss),
            "numpy": (
                str(name),
                torch.from_numpy(keys.astype(np.int64)),
                int(position),
                int(has_gauss),
                float(cached),
            ),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        path,
    )


def restore_random_state(path: Path) -> None:
    """Raises CheckpointError when `path` does not hold a state that save_random_state wrote."""
    try:
        _restore(torch.load(path, weights_only=True))
    except Exception as error:  # of torch on a damaged file, of every generator on an odd state
        raise CheckpointError(f"{path} is not a saved random state ({first_line(error)})") from error


def _restore(state: Any) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
