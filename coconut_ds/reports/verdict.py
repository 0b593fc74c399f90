"""Report in plain words when a run did not learn its task.

Stage 3 was not learned: 20.4 % (95 % interval 17.1 to 24.2) after 18 epochs, 100.0 % at stage 2. ...
"""

from collections.abc import Sequence

from coconut_ds.config.methods import Method
from coconut_ds.evaluation.intervals import wilson_interval
from coconut_ds.reports.comparison import Accuracy, Group
from coconut_ds.reports.run_records import Line, RunRecord, counted

CHANGE_STAGE = (
    "Try more epochs of this stage (epochs_per_stage), another seed, "
    "or earlier stages mixed in (uniform_prob)."
)
CHANGE_RUN = "Try more epochs (num_epochs), another lr or seed; `show` prints the model's input."
BASELINE = "As the baseline without steps and latents, it may be unable to learn more."


def verdicts(run: RunRecord) -> list[str]:
    """Lines about one run; empty if it learned its last stage."""
    lines = [f"{run.experiment.name}: {line}" for line in (_chance(run), _decline(run)) if line][:1]
    if run.untrained_tests:
        lines.append(
            f"{run.experiment.name}: its test by an older version used a stage that was not trained "
            f"and is left out; run it again: python -m coconut_ds eval {run.folder} --split test"
        )
    return lines


def verdicts_against_no_cot(groups: Sequence[Group]) -> list[str]:
    """A line for every group that is not above the no-CoT runs of the same data set."""
    warnings = []
    for base in groups:
        split, base_lines = base.results()
        if base.first.experiment.method is not Method.NO_COT or not base_lines:
            continue
        for group in groups:
            own_split, lines = group.results()
            if group is base or (own_split, group.first.dataset) != (split, base.first.dataset):
                continue
            ours, theirs = Accuracy.of(lines), Accuracy.of(base_lines)
            if ours.low <= theirs.value and group.first.experiment.method is not Method.NO_COT:
                warnings.append(
                    f"{group.label} is not above {base.label}: {ours} against {theirs}; "
                    "its steps or latents have no benefit here"
                )
    return warnings


def all_verdicts(runs: Sequence[RunRecord], groups: Sequence[Group]) -> list[str]:
    """All warnings of a report."""
    return [*(line for run in runs for line in verdicts(run)), *verdicts_against_no_cot(groups)]


def _chance(run: RunRecord) -> str | None:
    line = run.stages[-1].line if run.stages else None
    if line is None or "chance" not in line or not line["num_items"]:
        return None
    low, _ = wilson_interval(line["num_correct"], line["num_items"])
    if low > line["chance"] or line["accuracy"] == 1:  # all right: nothing is left to learn
        return None
    if run.experiment.method is Method.NO_COT:
        return f"not above chance: {_interval(line)}, chance is {_percent(line['chance'])}. {BASELINE}"
    outcome = f"was not learned: {_interval(line)} is not above chance ({_percent(line['chance'])})"
    if _has_numbered_stages(run) and len(run.stages) > 1:
        before = run.stages[-2]
        outcome += f"; {_percent(_accuracy(before.line))} at stage {before.number}"
        return f"Stage {run.stages[-1].number} {outcome}{_so_far(run)}. {CHANGE_STAGE}"
    return f"{run.experiment.method} {outcome}{_so_far(run)}. {CHANGE_RUN}"


def _decline(run: RunRecord) -> str | None:
    """A line if the last stage is below the one before by more than its interval."""
    if not _has_numbered_stages(run) or len(run.stages) < 2:
        return None
    before, last = run.stages[-2:]
    _, high = wilson_interval(last.line["num_correct"], last.line["num_items"])
    if _accuracy(before.line) <= high:
        return None
    chance = last.line.get("chance", 0.0)
    kept = (_accuracy(last.line) - chance) / max(_accuracy(before.line) - chance, 1e-9)
    what = "was not learned" if kept < 0.5 else "is less accurate than the stage before"
    epochs = sum(run.stage_of(line) == last.stage for line in run.of("valid"))
    return (
        f"Stage {last.number} {what}: {_interval(last.line)} after {counted(epochs, 'epoch')}{_so_far(run)}, "
        f"{_percent(_accuracy(before.line))} at stage {before.number}. {CHANGE_STAGE}"
    )


def _has_numbered_stages(run: RunRecord) -> bool:
    return run.experiment.method.has_stages and run.experiment.icot_tokens_per_epoch is None


def _so_far(run: RunRecord) -> str:
    """Text for a run with epochs left."""
    epochs = int(run.stages[-1].line["epoch"]) + 1
    return (
        f", so far ({epochs} of {run.experiment.num_epochs} epochs)"
        if epochs < run.experiment.num_epochs
        else ""
    )


def _accuracy(line: Line) -> float:
    return float(line["num_correct"] / max(line["num_items"], 1))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(line: Line) -> str:
    low, high = wilson_interval(line["num_correct"], line["num_items"])
    return f"{_percent(_accuracy(line))} (95 % interval {100 * low:.1f} to {100 * high:.1f})"
