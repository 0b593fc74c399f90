"""Group runs of the same experiment with different seeds.

Their settings may differ only in the seed, in names and paths, and in the starting weights.  They must start
from the same checkpoint, or each from the checkpoint of its own seed:

    seed: 3   load_model_path: runs/cot-seed-3/best
    seed: 4   load_model_path: runs/cot-seed-4/best

The seed of a starting run comes from its folder, or from its path if the folder is gone.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coconut_ds.config.experiment import Experiment, load_experiment
from coconut_ds.config.schema import settings_with
from coconut_ds.errors import ConfigError
from coconut_ds.reports.run_records import RunRecord


def identity(run: RunRecord) -> dict[str, Any]:
    """The settings that distinguish experiments, including the starting weights."""
    return {**_but_seed(run.experiment), "memory": run.memory_split}


def by_experiment(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Groups of runs of the same experiment, each sorted by seed."""
    groups: list[list[RunRecord]] = []
    for run in runs:
        for members in groups:
            if _same_but_starts(run, members[0]) and any(_same_starts(run, other) for other in members):
                members.append(run)
                break
        else:
            groups.append([run])
    return [sorted(members, key=lambda run: run.experiment.seed) for members in groups]


def _but_seed(experiment: Experiment) -> dict[str, Any]:
    return {key: value for key, value in experiment.identity.items() if key != "seed"}


def _starts() -> tuple[str, ...]:
    return settings_with("path_to", "weights")


def _same_but_starts(first: RunRecord, second: RunRecord) -> bool:
    ours, theirs = identity(first), identity(second)
    return all(ours[key] == theirs[key] for key in ours if key not in _starts())


def _same_starts(first: RunRecord, second: RunRecord) -> bool:
    return all(_same_start(key, first.experiment, second.experiment) for key in _starts())


def _same_start(key: str, first: Experiment, second: Experiment) -> bool:
    paths = getattr(first, key), getattr(second, key)
    if paths[0] == paths[1]:
        return True
    if None in paths or first.seed == second.seed:
        return False
    origins = [_origin(path) for path in paths]
    if None not in origins:
        known = [origin for origin in origins if origin is not None]
        own = [origin.seed for origin in known] == [first.seed, second.seed]
        ours, theirs = map(_but_seed, known)
        alike = all(ours[k] == theirs[k] for k in ours if k not in _starts())
        return own and alike and Path(paths[0]).name == Path(paths[1]).name
    texts = [_without_seed(path, seed) for path, seed in zip(paths, (first.seed, second.seed), strict=True)]
    return None not in texts and texts[0] == texts[1]


def _origin(path: str) -> Experiment | None:
    """The settings of the run that a checkpoint or a name such as `best` belongs to."""
    try:
        return load_experiment(Path(path).parent / "experiment.yaml")
    except ConfigError:
        return None


def _without_seed(path: str, seed: int) -> str | None:
    """'runs/cot-seed-{}/best' from 'runs/cot-seed-3/best' and 3; None if the seed is not in it."""
    text, count = re.subn(rf"(?<![A-Za-z])(seed|s)([-_=]?){seed}(?!\d)", r"\1\2{}", path)
    return text if count else None
