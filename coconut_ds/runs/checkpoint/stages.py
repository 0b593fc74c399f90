"""The curriculum stage that a checkpoint was trained at, and the best checkpoint of every stage.

    best             the most accurate checkpoint of the newest stage that the run has reached
    best_stage_2     the most accurate checkpoint of stage 2

Accuracies of different stages do not compare: stage 0 shows every reasoning step and is the easiest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from coconut_ds.config.experiment import Experiment, validate_experiment
from coconut_ds.data.curriculum import Stage, stage_at, stage_number
from coconut_ds.errors import ConfigError
from coconut_ds.runs.checkpoint.manifest import Manifest

BEST_OF_STAGE = re.compile(r"best_stage_(\d{1,6})")
LONGEST_REASONING = "longest_reasoning"  # a setting of a token-wise iCoT run: tokens, validation set
CURRICULUM = (
    "method", "c_thought", "epochs_per_stage", "max_latent_stage", "num_epochs", "icot_tokens_per_epoch",
)  # fmt: skip
UNUSED = {"name": "checkpoint", "model_id": "-", "train_path": "-", "val_path": "-"}


@dataclass(frozen=True, order=True)
class TrainedStage:
    """A checkpoint's position in the curriculum; a later stage is greater."""

    number: int
    hidden_tokens: int  # token-wise iCoT; limited to the longest reasoning, after which nothing changes

    @classmethod
    def of(cls, manifest: Manifest) -> "TrainedStage":
        """Older versions always wrote stage 0, so the stage is computed from the settings if possible."""
        experiment = experiment_of(manifest)
        if experiment is None:
            return cls(manifest.state.stage, 0)
        stage = stage_at(epoch_of(manifest), experiment)
        longest = manifest.settings.get(LONGEST_REASONING, stage.hidden_tokens)
        return cls(stage_number(epoch_of(manifest), experiment), min(stage.hidden_tokens, longest))


def epoch_of(manifest: Manifest) -> int:
    """The epoch (from 0) that a checkpoint's newest steps belong to."""
    epoch, steps = manifest.state.epoch, manifest.state.step_in_epoch
    return epoch if steps else max(epoch - 1, 0)


def experiment_of(manifest: Manifest) -> Experiment | None:
    """The curriculum settings of a manifest, with defaults for all others; None if it has none."""
    saved = manifest.settings.get("experiment", {})
    try:
        values = {key: saved[key] for key in CURRICULUM}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return validate_experiment(UNUSED | plain, "")
    except (ConfigError, KeyError):
        return None


def stage_of(manifest: Manifest, experiment: Experiment | None = None) -> Stage | None:
    """The stage of a checkpoint's newest steps, by its own settings or those of `experiment`."""
    experiment = experiment or experiment_of(manifest)
    return None if experiment is None else stage_at(epoch_of(manifest), experiment)


def describe_position(manifest: Manifest) -> str:
    """'epoch 12, stage 3 (3 steps hidden, 6 latents)'."""
    number, stage = TrainedStage.of(manifest).number, stage_of(manifest)
    return f"epoch {epoch_of(manifest) + 1}, stage {number}" + (f" ({stage})" if stage else "")


def best_of(manifests: Mapping[str, Manifest], number: int | None = None) -> str | None:
    """The name of the most accurate checkpoint of stage `number` (None: of the newest stage).

    `manifests`: end-of-epoch checkpoints.  Of equal ones, the earliest is the best.
    """
    stages = {name: TrainedStage.of(manifest) for name, manifest in manifests.items()}
    newest = max((at for at in stages.values() if number in (None, at.number)), default=None)

    def quality(name: str) -> tuple[float, int]:
        state = manifests[name].state
        return (-1.0 if state.accuracy is None else state.accuracy, -state.epoch)

    return max((name for name, at in stages.items() if at == newest), key=quality, default=None)


def best_per_stage(manifests: Mapping[str, Manifest]) -> dict[int, str]:
    """The best checkpoint of every stage, by the stage's number."""
    numbers = sorted({TrainedStage.of(manifest).number for manifest in manifests.values()})
    return {number: name for number in numbers if (name := best_of(manifests, number)) is not None}
