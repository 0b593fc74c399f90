"""What a report says was learned: accuracy by stage, accuracy with other latents, controls as accurate.

coconut: stage 0 100.0 %, stage 1 100.0 %, stage 2 100.0 %, stage 3 100.0 %, test 100.0 %
coconut: with the latents of another example 11.0 % [8.5, 14.0]: the answers depend on the latents
no_thoughts is as accurate (100.0 % [99.2, 100.0]): this task does not need latents
no_cot did not learn it (10.4 % [8.0, 13.4])
"""

from collections.abc import Iterator, Sequence

from coconut_ds.config.methods import Method
from coconut_ds.evaluation.intervals import percent_with_interval
from coconut_ds.reports.comparison import Accuracy, Group, percent, stages_of_group
from coconut_ds.reports.run_records import has_learned

SWAP = "swap"


def conclusions(groups: Sequence[Group]) -> list[str]:
    """The last lines of a report; empty if no run has stages with latents."""
    lines = [line for group in groups for line in (*_share(group), *_learned(group))]
    trained = [group for group in groups if _has_latent_stages(group)]
    for control in groups:
        # A CoT run writes the steps, so it shows nothing about latents.
        if not control.first.experiment.method.has_latents and control.first.experiment.method != Method.COT:
            lines += _control(control, trained)
    return lines


def _share(group: Group) -> Iterator[str]:
    """How many seeds learned their last stage, by the warnings of each run."""
    if len(group.runs) > 1:
        failed = [str(run.experiment.seed) for run in group.runs if not has_learned(run)]
        learned = len(group.runs) - len(failed)
        which = f"; not seed {', '.join(failed)}" if failed else ""
        share = percent_with_interval(learned, len(group.runs))
        yield f"{group.label}: {learned} of {len(group.runs)} seeds learned it ({share}){which}"


def _has_latent_stages(group: Group) -> bool:
    experiment = group.first.experiment
    return experiment.method.has_stages and experiment.method.has_latents and bool(group.first.stages)


def _learned(group: Group) -> Iterator[str]:
    if not _has_latent_stages(group):
        return
    cells = [f"stage {number} {percent(lines)}" for number, _, lines in stages_of_group(group)]
    split, results = group.results()
    if split == "test":
        cells.append(f"test {percent(results)}")
    yield f"{group.label}: {', '.join(cells)}"
    swapped = group.ablated(SWAP)
    if not swapped:
        return
    intact, other = Accuracy.of([run.stages[-1].line for run in group.runs]), Accuracy.of(swapped)
    depends = "the answers depend on the latents"
    if other.high >= intact.low:
        depends = "the answers do not depend on what the latents hold"
    elif other.value > intact.value / 2:
        depends = "only a part of the answers depends on the latents"
    yield f"{group.label}: with the latents of another example {other}: {depends}"


def _control(control: Group, trained: Sequence[Group]) -> Iterator[str]:
    split, lines = control.results()
    same_data = [
        group
        for group in trained
        if (group.results()[0], group.first.dataset) == (split, control.first.dataset) and split
        # Else nothing was learned that a control could learn too.
        if all(has_learned(run) for run in group.runs)
    ]
    if not same_data:
        return
    best = max((Accuracy.of(group.results()[1]) for group in same_data), key=lambda accuracy: accuracy.value)
    own = Accuracy.of(lines)
    if own.high >= best.low:
        yield f"{control.label} is as accurate ({own}): this task does not need latents"
    else:
        yield f"{control.label} did not learn it ({own})"
