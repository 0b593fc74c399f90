"""Pair the runs of two methods example by example: McNemar's exact test on what both answered.

Two results are paired only if they are of the same examples under the same grading rule.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coconut_ds.evaluation.intervals import mcnemar_exact, p_value_text
from coconut_ds.files import counted
from coconut_ds.reports.comparison import Group
from coconut_ds.reports.run_records import Answers, RunRecord

MAX_PAIRS = 15


@dataclass(frozen=True)
class PairedTest:
    """McNemar's exact test of two groups on the same items; runs are paired by seed."""

    first: str
    second: str
    split: str
    num_items: int
    only_first: int
    only_second: int
    p_value: float
    checkpoints: tuple[str, ...]  # of both, without repeats
    note: str = ""

    def __str__(self) -> str:
        return (
            f"{self.first} against {self.second} on {self.split}, {counted(self.num_items, 'item')}: "
            f"{self.only_first} solved only by the first, {self.only_second} only by the second, "
            f"{p_value_text(self.p_value)} ({', '.join(self.checkpoints)}{self.note})"
        )


@dataclass(frozen=True)
class Pairing:
    """The tests of all pairs of groups, and a line for each pair of runs that was left out."""

    tests: tuple[PairedTest, ...]
    left_out: tuple[str, ...]

    def lines(self) -> list[str]:
        return [*map(str, self.tests), *(f"not paired: {line}" for line in self.left_out)]


def pair(groups: Sequence[Group]) -> Pairing:
    """Pair all groups whose runs have predictions (from `eval`)."""
    tests, left_out = [], []
    for first, second in itertools.islice(itertools.combinations(groups, 2), MAX_PAIRS):
        test, lines = _pair(first, second)
        tests += [] if test is None else [test]
        left_out += lines
    return Pairing(tuple(tests), tuple(left_out))


def _pair(first: Group, second: Group) -> tuple[PairedTest | None, list[str]]:
    matches: list[tuple[Answers, Answers]] = []
    left_out = []
    for one, other in _runs(first, second):
        ours, theirs = one.answers(), other.answers()
        if not (ours and theirs):
            continue
        match = _match(ours, theirs)
        if match is None:
            left_out.append(
                f"{one.experiment.name} ({ours[0]}) and {other.experiment.name} ({theirs[0]}): "
                + _why_not(ours[0], theirs[0])
            )
        elif matches and match[0].examples != matches[0][0].examples:
            left_out.append(
                f"{one.experiment.name} and {other.experiment.name} ({match[0]}): other seeds answered "
                f"other examples ({matches[0][0]})"
            )
        else:
            matches.append(match)
    return _test(first.label, second.label, matches) if matches else None, left_out


def _runs(first: Group, second: Group) -> Iterator[tuple[RunRecord, RunRecord]]:
    """The runs of equal seeds; two single runs are paired whatever their seeds are."""
    if len(first.runs) == len(second.runs) == 1:
        yield first.first, second.first
        return
    by_seed = {run.experiment.seed: run for run in second.runs}
    for run in first.runs:
        if run.experiment.seed in by_seed:
            yield run, by_seed[run.experiment.seed]


def _match(ours: Sequence[Answers], theirs: Sequence[Answers]) -> tuple[Answers, Answers] | None:
    """The preferred answers of both to the same examples; `answers()` lists the preferred ones first."""
    fitting = (pair for pair in itertools.product(ours, theirs) if not _why_not(*pair))
    return next(fitting, None)


def _why_not(ours: Answers, theirs: Answers) -> str:
    """Why two results do not compare example by example; "" if they do."""
    if texts := (*ours.differences, *theirs.differences):
        words = ", ".join(dict.fromkeys(texts))
        return f"not measured by the run's own settings ({words}); run `eval` without these changes"
    if ours.grading != theirs.grading:
        return f"graded by different rules ({ours.grading}, {theirs.grading})"
    if ours.examples and theirs.examples:
        return "" if ours.examples == theirs.examples else "they answered different examples"
    if ours.expected and ours.expected == theirs.expected:
        return ""
    return (
        "an older version did not record which examples it used, and their number or the expected answers "
        "differ; run `eval` again for both"
    )


def _test(first: str, second: str, matches: Sequence[tuple[Answers, Answers]]) -> PairedTest:
    only_first = only_second = num_items = 0
    for ours, theirs in matches:
        for item in ours.correct.keys() & theirs.correct.keys():
            num_items += 1
            only_first += ours.correct[item] and not theirs.correct[item]
            only_second += theirs.correct[item] and not ours.correct[item]
    used = [answers for match in matches for answers in match]
    recorded = all(answers.examples for answers in used)
    return PairedTest(
        first,
        second,
        matches[0][0].split,
        num_items,
        only_first,
        only_second,
        mcnemar_exact(only_first, only_second),
        tuple(dict.fromkeys(answers.checkpoint for answers in used)),
        "" if recorded else "; an older version recorded only the expected answers, which are equal",
    )
