"""Checkpoint folders that survive a crash at any moment, and weights from other programs.

    checkpoint_3/                  after epoch 3 (counted from 1, as in the published code)
    checkpoint_3_step_0000420/     420 optimizer steps into the fourth epoch
        manifest.json              settings, position, size and sha256 of every file; written last
        model/                     Hugging Face form, or PEFT form for adapters; for other programs
        engine/                    the ZeRO shards of every rank
        random/                    the random number generators of every rank
    latest  best                   files with the name of a folder; best: of the newest stage (stages.py)

A folder with such a name is complete: it was written under another name, hashed, and renamed.
"""

from coconut_ds.runs.checkpoint.changes import Severity, classify_changes, settings_to_compare
from coconut_ds.runs.checkpoint.folders import CheckpointFolders, misleading_best, resolve_pointer
from coconut_ds.runs.checkpoint.foreign import (
    WINDOW_NAME,
    find_adapter,
    is_published_file,
    load_foreign_weights,
    load_thought_weights,
)
from coconut_ds.runs.checkpoint.manifest import Manifest, TrainState
from coconut_ds.runs.checkpoint.protocol import Checkpoints
from coconut_ds.runs.checkpoint.stages import LONGEST_REASONING, TrainedStage, best_per_stage, stage_of

__all__ = [
    "CheckpointFolders",
    "Checkpoints",
    "LONGEST_REASONING",
    "Manifest",
    "Severity",
    "TrainState",
    "TrainedStage",
    "WINDOW_NAME",
    "best_per_stage",
    "classify_changes",
    "find_adapter",
    "is_published_file",
    "load_foreign_weights",
    "load_thought_weights",
    "misleading_best",
    "resolve_pointer",
    "settings_to_compare",
    "stage_of",
]
