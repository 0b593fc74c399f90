"""The README.md of an exported model (templates/model_card.md)."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from coconut_ds.config.experiment import Experiment
from coconut_ds.data.curriculum import Stage
from coconut_ds.data.problems import card_for, each_problem
from coconut_ds.errors import DataError
from coconut_ds.evaluation.data_files import OTHER, OWN, TRAINING
from coconut_ds.evaluation.intervals import percent_with_interval
from coconut_ds.evaluation.saved_models import Trained
from coconut_ds.files import counted
from coconut_ds.runs.record_shapes import metric_lines, newest_evaluations
from coconut_ds.templates import one_line, render

MAX_QUESTION = 300  # characters of the example
ROLES = {
    OWN: "the run's own file",
    TRAINING: "**training data**",
    OTHER: "not a file of this run's settings",
}


def model_card(trained: Trained, base: str, is_adapter: bool, weights: Path | None = None) -> str:
    """Markdown with front matter for the hub.

    `base`: the model that training started from.
    `weights`: an adapter's frozen weights, if not those of `base`.
    """
    newest = newest_evaluations(trained.folder / "evaluations.jsonl")
    own = [line for line in newest if line["checkpoint"] == trained.name]
    peaks: dict[str, float] = {}
    for line in metric_lines(trained.folder / "metrics.jsonl"):
        for name in line if line["kind"] == "memory" else ():
            if name.endswith("_mib"):
                peaks[name] = max(line[name], peaks.get(name, line[name]))
    experiment = trained.experiment
    return render(
        "model_card.md",
        trained=trained,
        base=base,
        is_adapter=is_adapter,
        weights=weights,
        results=[_cells(line, trained) for line in sorted(own, key=lambda line: bool(line["differences"]))],
        card=card_for(experiment.train_path or experiment.val_path),
        peaks=peaks,
        question=_question(experiment),
        quoted=lambda text: json.dumps(str(text)),
    )


def _question(experiment: Experiment) -> str:
    """A question of the run's own data as a Python literal; a placeholder if there is no short one here."""
    for path in (experiment.val_path, experiment.train_path):
        if path and Path(path).is_file():
            with suppress(DataError):
                question = next(each_problem(path, 1, experiment.fields)).question
                if len(question) <= MAX_QUESTION and "`" not in question:
                    return repr(question)
    return "'YOUR QUESTION'"


def _cells(line: Mapping[str, Any], trained: Trained) -> list[str]:
    """One row of the results."""
    file = Path(line["file"]).name if line.get("file") else "file not recorded"
    role = f" ({ROLES[line['role']]})" if line.get("role") in ROLES else ""
    otherwise = f"; **{one_line(', '.join(line['differences']))}**" if line["differences"] else ""
    stage = line.get("stage", "not recorded")
    if "stage" in line and trained.trained_at not in (None, Stage.parse(stage)):
        stage = f"{stage} (trained at: {trained.trained_at})"
    return [
        f"{one_line(line['split'])}, {one_line(file)}{role}, {counted(line['num_items'], 'item')}"
        + otherwise,
        one_line(stage),
        str(line["latents"]) + ("" if line["ablation"] == "intact" else f", {one_line(line['ablation'])}"),
        line.get("grading", "not recorded"),
        percent_with_interval(line["num_correct"], line["num_items"]),
        f"{line['mean_tokens']:.1f}",
        f"McNemar p = {line['p_value']:.2g}" if "p_value" in line else "",
    ]
