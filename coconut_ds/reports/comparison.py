"""Compare runs: seeds grouped, one line per method; accuracy by stage.

group_runs(runs)         runs of one experiment with different seeds
summary_table(groups)    method, thought, tuning, dataset, seeds, accuracy and interval, tokens, peak, ...
stage_table(groups)      accuracy at every stage, one column per group

The settings of a group may differ only in the seed, in names and paths, and in the starting weights.
Its runs must start from the same checkpoint, or each from the checkpoint of its own seed:

    seed: 3   load_model_path: runs/cot-seed-3/best
    seed: 4   load_model_path: runs/cot-seed-4/best

The seed of a starting run comes from its folder, or from its path if the folder is gone.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from coconut_ds.config.experiment import Experiment, load_experiment
from coconut_ds.config.methods import Method
from coconut_ds.config.schema import settings_with
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.intervals import interval_over_seeds, percent_with_interval, wilson_interval
from coconut_ds.reports.run_records import SPLITS, Line, RunRecord, StageResult, describe_stage, verdicts
from coconut_ds.runs.changes import learned_ds_settings
from coconut_ds.runs.record_shapes import newest_evaluations
from coconut_ds.tables import Table

IN_COLUMNS = ("method", "thought", "tuning")
MAX_WORDS, MAX_LETTERS = 2, 120


@dataclass(frozen=True)
class Accuracy:
    """An accuracy with its 95 % interval, as fractions.

    One run: interval over its items (Wilson).  Several seeds: interval over the seeds (Student's t).
    """

    value: float
    low: float
    high: float
    num_seeds: int

    @classmethod
    def of(cls, lines: Sequence[Any]) -> "Accuracy":
        """From one log line per seed."""
        values = [line["num_correct"] / max(line["num_items"], 1) for line in lines]
        if len(lines) == 1:
            return cls(values[0], *wilson_interval(lines[0]["num_correct"], lines[0]["num_items"]), 1)
        return cls(mean(values), *interval_over_seeds(values), len(values))

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Group:
    """Runs of one experiment with different seeds."""

    runs: tuple[RunRecord, ...]
    label: str

    @property
    def first(self) -> RunRecord:
        return self.runs[0]

    @property
    def seeds(self) -> list[int]:
        return [run.experiment.seed for run in self.runs]

    @property
    def thought(self) -> str:
        """The thought, or "" for methods without continuous thoughts."""
        method = self.first.experiment.method
        return self.first.experiment.thought if method.has_latents and not method.is_pause else ""

    def ablated(self, name: str) -> list[Any]:
        """One line per run of an ablation after the last stage; empty if a run has none."""
        lines = [run.ablated.get(name) for run in self.runs]
        return lines if all(lines) else []

    def results(self) -> tuple[str | None, list[Any]]:
        """(split, one line per run): the test set if every run has it."""
        for split in SPLITS:
            if all(run.measured(split) for run in self.runs):
                return split, [run.measured(split)[-1] for run in self.runs]
        return None, []


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Group runs that differ only in their seed; labels list the settings that differ between groups.

    If more than MAX_WORDS other settings differ, the label is the first run's name.
    """
    groups = _by_experiment(runs)
    identities = [_identity(members[0]) for members in groups]
    different = [key for key in identities[0] if any(i[key] != identities[0][key] for i in identities)]
    shown = [key for key in different if key not in ("thought", "tuning")]
    labeled: list[Group] = []
    for members, identity in zip(groups, identities, strict=True):
        method = members[0].experiment.method
        words = [str(method)]
        if "thought" in different and method.has_latents and not method.is_pause:
            words.append(str(identity["thought"]))
        if "tuning" in different:
            words.append(str(identity["tuning"]))
        same_method = [i for i in identities if all(i[key] == identity[key] for key in IN_COLUMNS)]
        more = [key for key in shown if key != "method" and any(i[key] != identity[key] for i in same_method)]
        if len(more) > MAX_WORDS:
            words = [members[0].experiment.name]
        else:
            words += [str(identity[key]) if key == "memory" else f"{key} {identity[key]}" for key in more]
        label = ", ".join(word[:MAX_LETTERS] for word in words)
        if any(label == other.label for other in labeled):
            label = f"{label} ({members[0].folder.name})"
        labeled.append(Group(tuple(members), label))
    return labeled


def _by_experiment(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Groups of runs of the same experiment, each sorted by seed."""
    groups: list[list[RunRecord]] = []
    for run in runs:
        for members in groups:
            alike = _differ_in_starts_only(_identity(run), _identity(members[0]))
            if run.experiment.seed in [other.experiment.seed for other in members]:
                continue  # a copy or a repetition is not another seed
            if alike and any(_same_starts(run.experiment, other.experiment) for other in members):
                members.append(run)
                break
        else:
            groups.append([run])
    return [sorted(members, key=lambda run: run.experiment.seed) for members in groups]


def _identity(run: RunRecord) -> dict[str, Any]:
    """The settings that distinguish experiments, including the starting weights."""
    learned = learned_ds_settings(run.ds_config)
    return {
        **_but_seed(run.experiment),
        "memory": run.memory_split,
        "rows per step": run.ds_config.get("train_batch_size"),
        "DeepSpeed settings": ", ".join(f"{key} {value}" for key, value in sorted(learned.items())),
    }


def _but_seed(experiment: Experiment) -> dict[str, Any]:
    return {key: value for key, value in experiment.identity.items() if key != "seed"}


def _differ_in_starts_only(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    starts = settings_with("path_to", "weights")
    return all(ours[key] == theirs[key] for key in ours if key not in starts)


def _same_starts(first: Experiment, second: Experiment) -> bool:
    return all(_same_start(key, first, second) for key in settings_with("path_to", "weights"))


def _same_start(key: str, first: Experiment, second: Experiment) -> bool:
    paths = getattr(first, key), getattr(second, key)
    if paths[0] == paths[1]:
        return True
    if None in paths or first.seed == second.seed:
        return False
    ours, theirs = map(_origin, paths)
    if ours and theirs:
        own_seeds = (ours.seed, theirs.seed) == (first.seed, second.seed)
        same_name = Path(paths[0]).name == Path(paths[1]).name
        return own_seeds and same_name and _differ_in_starts_only(_but_seed(ours), _but_seed(theirs))
    texts = _without_seed(paths[0], first.seed), _without_seed(paths[1], second.seed)
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


def all_tables(runs: Sequence[RunRecord], groups: Sequence[Group]) -> list[Table]:
    """Accuracy by stage, the summary, the best of every stage, and sampled answers."""
    return [stage_table(groups), summary_table(groups), best_table(runs), samples_table(runs)]


def summary_table(groups: Sequence[Group]) -> Table:
    """One line per group that has been trained or evaluated."""
    on_gpu = any(run.uses_gpu for group in groups for run in group.runs)
    head = ["run", "thought", "tuning", "dataset", "memory", "seed", "set", "accuracy, 95 % interval"]
    head += ["tokens", "s/epoch", "peak MiB" if on_gpu else "peak RSS MiB", "budget MiB"]
    rows = []
    for group in groups:
        numbers = group_numbers(group)
        if all(numbers[key] is None for key in ("accuracy", "seconds_per_epoch", "peak_mib")):
            continue  # a profile
        rows.append(
            [
                group.label,
                numbers["thought"] or "-",
                numbers["tuning"],
                numbers["dataset"],
                numbers["memory"],
                ", ".join(map(str, group.seeds)),
                numbers["split"] or "-",
                str(Accuracy(**numbers["accuracy"])) if numbers["accuracy"] else "-",
                _number(numbers["tokens"], 1),
                _number(numbers["seconds_per_epoch"], 1),
                _number(numbers["peak_mib"], 0),
                _number(numbers["budget_mib"], 0),
            ]
        )
    return Table(head, rows, align="llllllllr")


def group_numbers(group: Group) -> dict[str, Any]:
    """The numbers of a group as plain data.

    tokens: generated tokens plus latents per problem, as in table 1 of the Coconut paper.
    """
    split, lines = group.results()
    stage = group.first.result_stage
    seconds = [run.seconds_per_epoch for run in group.runs if run.seconds_per_epoch is not None]
    return {
        "label": group.label,
        "method": str(group.first.experiment.method),
        "thought": group.thought,
        "tuning": group.first.experiment.tuning,
        "dataset": group.first.dataset,
        "memory": group.first.memory_split,
        "seeds": group.seeds,
        "runs": [str(run.folder) for run in group.runs],
        "split": split,
        "accuracy": asdict(Accuracy.of(lines)) if lines else None,
        "accuracies": [line["accuracy"] for line in lines],
        "tokens": mean(line["mean_tokens"] for line in lines) + stage.num_latents if lines else None,
        "seconds_per_item": mean(line.get("seconds_per_item", 0.0) for line in lines) if lines else None,
        "seconds_per_epoch": mean(seconds) if seconds else None,
        "peak_mib": max((run.peak_mib for run in group.runs if run.peak_mib is not None), default=None),
        "peak_is": "GPU tensors" if group.first.uses_gpu else "resident memory of the main rank",
        "budget_mib": group.first.budget_mib,
        "stages": [
            {"stage": number, "what": what, "accuracy": asdict(Accuracy.of(results))}
            for number, what, results in stages_of_group(group)
        ],
    }


def stage_table(groups: Sequence[Group]) -> Table:
    """Accuracy at the end of every stage and in the test; one column per group, means over seeds."""
    titles: dict[int, str] = {}
    cells: dict[tuple[int, str], str] = {}
    for group in groups:
        if not group.first.experiment.method.has_stages:
            continue
        for number, what, lines in stages_of_group(group):
            if number not in titles or "latent" in what:
                titles[number] = what
            cells[number, group.label] = percent(lines)
    rows = [
        [f"validation, stage {number}: {titles[number]}", *(cells.get((number, g.label), "") for g in groups)]
        for number in sorted(titles)
    ]
    without = [group for group in groups if not group.first.experiment.method.has_stages]
    if without:
        last = [[run.stages[-1].line for run in group.runs if run.stages] for group in groups]
        rows.append(["validation, at the end", *map(percent, last)])
    names = dict.fromkeys(name for group in groups for name in group.first.ablated)
    rows += [
        [f"validation, latents replaced: {name}", *(percent(group.ablated(name)) for group in groups)]
        for name in names
    ]
    tests = [[run.measured("test")[-1] for run in group.runs if run.measured("test")] for group in groups]
    if any(tests):
        rows.append([f"test: {_tested_at(groups)}", *map(percent, tests)])
    return Table(["accuracy", *map(_column_title, groups)], rows)


def best_table(runs: Sequence[RunRecord]) -> Table:
    """The best validation accuracy of every stage and its checkpoint, for runs with stages."""
    rows = []
    for run in runs:
        if not run.experiment.method.has_stages:
            continue
        lines = run.of("valid")
        names = run.best_checkpoints()
        for number in sorted(names.keys() | {run.stage_number_of(line) for line in lines}):
            if number in names:
                name, accuracy = names[number]
                measured = "-" if accuracy is None else percent([{"accuracy": accuracy}])
            else:
                at = [line for line in lines if run.stage_number_of(line) == number]
                name, measured = "-", percent([max(at, key=lambda line: line["accuracy"])])
            rows.append([run.experiment.name, f"best_stage_{number}", name, measured])
    return Table(["best of every stage", "name", "checkpoint", "validation accuracy"], rows, align="lllr")


def samples_table(runs: Sequence[RunRecord]) -> Table:
    """What `eval --num_samples` measured: pass@1, pass@K and the majority vote."""
    rows = []
    for run in runs:
        for line in newest_evaluations(run.folder / "evaluations.jsonl"):
            if rates := line.get("pass_at_k"):
                name = f"{run.experiment.name}, {line['checkpoint']}"
                what = line["ablation"].removeprefix("majority of ")
                cells = [
                    f"pass@{rate['k']} {Accuracy(rate['value'], rate['low'], rate['high'], 1)}"
                    for rate in rates
                ]
                vote = percent_with_interval(line["num_correct"], line["num_items"])
                rows.append([name, line["split"], what, ", ".join(cells), vote])
    return Table(["sampled answers", "set", "how", "pass@k", "majority vote"], rows, align="llllr")


def _tested_at(groups: Sequence[Group]) -> str:
    """The common stage of the tests: that with latents, if all groups hide the same steps."""
    stages = [group.first.result_stage for group in groups if group.first.measured("test")]
    with_latents = {stage for stage in stages if stage.num_latents} or set(stages)
    if len(with_latents) == 1 and len({stage.hidden_steps for stage in stages}) == 1:
        return describe_stage(with_latents.pop())
    return "each run at its final stage"


def _column_title(group: Group) -> str:
    return group.label + (f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else "")


def stages_of_group(group: Group) -> Iterator[tuple[int, str, list[Any]]]:
    """(number, description, one line per run) of every stage that all runs trained."""
    columns: list[list[StageResult]] = [run.stages for run in group.runs]
    for results in zip(*columns, strict=False):
        if len({result.stage for result in results}) == 1:
            yield results[0].number, describe_stage(results[0].stage), [result.line for result in results]


def percent(lines: Sequence[Any]) -> str:
    """Mean accuracy of log lines, with its standard deviation for several."""
    if not lines:
        return ""
    values = [100 * line["accuracy"] for line in lines]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread} %"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def all_verdicts(runs: Sequence[RunRecord], groups: Sequence[Group]) -> list[str]:
    """All warnings of a report, also about groups that are not above the no-CoT runs of their data set."""
    warnings = [line for run in runs for line in verdicts(run)]
    warnings += [
        f"{group.label}: its seeds were measured on different examples ({split}); the mean does not compare"
        for group in groups
        for split, lines in [group.results()]
        if len(_examples(lines)) > 1
    ]
    warnings += [
        f"{first.label} and {second.label} were measured on different examples ({split}); do not compare them"
        for first, second in itertools.combinations(groups, 2)
        for (split, lines), (other_split, others) in [(first.results(), second.results())]
        if split == other_split
        and _examples(lines)
        and _examples(others)
        and _examples(lines).isdisjoint(_examples(others))
    ]
    for base, group in itertools.permutations(groups, 2):
        (base_split, base_lines), (split, lines) = base.results(), group.results()
        if base.first.experiment.method is not Method.NO_COT or not base_lines:
            continue
        same_data = (split, group.first.dataset) == (base_split, base.first.dataset)
        if not same_data or len(_examples([*lines, *base_lines])) > 1:
            continue
        if group.first.experiment.method is Method.NO_COT:
            continue
        ours, theirs = Accuracy.of(lines), Accuracy.of(base_lines)
        if ours.low <= theirs.value:
            warnings.append(
                f"{group.label} is not above {base.label}: {ours} against {theirs}; "
                "its steps or latents have no benefit here"
            )
    return warnings


def _examples(lines: Sequence[Line]) -> set[str]:
    """The sets of examples behind some results, where recorded."""
    return {line["examples"] for line in lines if isinstance(line.get("examples"), str)}
