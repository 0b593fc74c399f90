"""Which stage of the curriculum a checkpoint was trained at, and which checkpoint of a stage is the best.

    best             the most accurate checkpoint of the newest stage that the run has reached
    best_stage_2     the most accurate one of stage 2

Accuracies of two stages do not compare: stage 0 shows every reasoning step and is the easiest.
Knows: manifests, stages.  Does not know: folders, retention.
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
    """A checkpoint's place in the curriculum; a later stage is greater."""

    number: int
    hidden_tokens: int  # token-wise iCoT, at most the longest reasoning: from there on nothing changes

    @classmethod
    def of(cls, manifest: Manifest) -> "TrainedStage":
        """Manifests of older versions all say stage 0, so it comes from the settings where they are known."""
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
    """The curriculum's settings of a manifest, other settings at their defaults; None where it has none."""
    saved = manifest.settings.get("experiment", {})
    try:
        values = {key: saved[key] for key in CURRICULUM}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return validate_experiment(UNUSED | plain, "")
    except (ConfigError, KeyError):
        return None


def stage_of(manifest: Manifest, experiment: Experiment | None = None) -> Stage | None:
    """The stage of a checkpoint's newest steps, by its own settings or by the curriculum of `experiment`."""
    experiment = experiment or experiment_of(manifest)
    return None if experiment is None else stage_at(epoch_of(manifest), experiment)


def described(manifest: Manifest) -> str:
    """'epoch 12, stage 3 (3 steps hidden, 6 latents)'."""
    number, stage = TrainedStage.of(manifest).number, stage_of(manifest)
    return f"epoch {epoch_of(manifest) + 1}, stage {number}" + (f" ({stage})" if stage else "")


def best_of(manifests: Mapping[str, Manifest], number: int | None = None) -> str | None:
    """The name of the most accurate checkpoint of stage `number`, of the newest one for None.

    `manifests`: end-of-epoch checkpoints.  Of equal ones the earliest is the best.
    """
    places = {name: TrainedStage.of(manifest) for name, manifest in manifests.items()}
    newest = max((at for at in places.values() if number in (None, at.number)), default=None)

    def merit(name: str) -> tuple[float, int]:
        state = manifests[name].state
        return (-1.0 if state.accuracy is None else state.accuracy, -state.epoch)

    return max((name for name, at in places.items() if at == newest), key=merit, default=None)


def best_per_stage(manifests: Mapping[str, Manifest]) -> dict[int, str]:
    """The best checkpoint of every stage, by the stage's number."""
    numbers = sorted({TrainedStage.of(manifest).number for manifest in manifests.values()})
    return {number: name for number in numbers if (name := best_of(manifests, number)) is not None}
