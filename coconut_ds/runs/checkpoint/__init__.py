"""Checkpoint folders that survive a crash at any moment, and weights that come from elsewhere.

    checkpoint_3/                  after epoch 3 (counted from 1, as in the published code)
    checkpoint_3_step_0000420/     420 optimizer steps into the fourth epoch
        manifest.json              settings, position, size and sha256 of every file; written last
        model/                     for other programs: Hugging Face form, or PEFT form for adapters
        engine/                    the ZeRO shards of every rank
        random/                    the random number generators of every rank
    latest  best                   each the name of a folder; best: of the newest stage (stages.py)

A folder that has the right name is complete: it was written under another name, hashed, and renamed.
Knows: files, manifests, what may change between two runs.
Does not know: DeepSpeed, models, the training loop.
"""

from coconut_ds.runs.checkpoint.changes import Change, Severity, classify_changes, settings_to_compare
from coconut_ds.runs.checkpoint.folders import CheckpointFolders, checkpoint_name, followed, misleading_best
from coconut_ds.runs.checkpoint.foreign import (
    WINDOW_NAME,
    find_adapter,
    is_published_file,
    load_foreign_weights,
    load_thought_weights,
)
from coconut_ds.runs.checkpoint.manifest import Manifest, TrainState
from coconut_ds.runs.checkpoint.protocol import Checkpoints, Shards
from coconut_ds.runs.checkpoint.stages import LONGEST_REASONING, TrainedStage, described, stage_of

__all__ = [
    "LONGEST_REASONING",
    "Change",
    "CheckpointFolders",
    "Checkpoints",
    "Manifest",
    "Severity",
    "Shards",
    "TrainState",
    "TrainedStage",
    "checkpoint_name",
    "classify_changes",
    "described",
    "WINDOW_NAME",
    "find_adapter",
    "is_published_file",
    "followed",
    "load_foreign_weights",
    "load_thought_weights",
    "misleading_best",
    "settings_to_compare",
    "stage_of",
]
