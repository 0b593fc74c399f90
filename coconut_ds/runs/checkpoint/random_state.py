"""Save and restore the random number generators of one process, in a form that loads without pickle."""

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
    """Restore the state. Raises CheckpointError if save_random_state did not write `path`."""
    try:
        _restore(torch.load(path, weights_only=True))
    except Exception as error:  # torch and every generator raise their own on damaged files
        raise CheckpointError(f"{path} is not a saved random state ({first_line(error)})") from error


def _restore(state: Any) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
