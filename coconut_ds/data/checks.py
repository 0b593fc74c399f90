"""Check data files before training: invalid files, leaks between splits, items too long for the model."""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from coconut_ds.data.problems import Problem, card_for, read_problems
from coconut_ds.data.run_data import LengthCheck, Use, num_tokens, trained_stages
from coconut_ds.data.tokenizer import HASHED, SPECIAL, Vocabulary, mark_of, tokenize
from coconut_ds.errors import DataError
from coconut_ds.files import counted, hash_file
from coconut_ds.tables import Table

_CHUNK = 2_000
_MAX_NAMED = 10  # items that a finding lists
_UNKNOWN_LENGTH = 1_000_000  # tokenizers without a limit report a huge one


@dataclass(frozen=True)
class FileReport:
    """Statistics of one file.  `findings` are warnings; the file is usable."""

    path: Path
    steps: Sequence[int]  # of every problem
    lengths: Sequence[int]  # of every problem: question, steps and answer, in the unit of the report
    findings: Sequence[str]


@dataclass(frozen=True)
class DataReport:
    """The reports of all usable files, the leaks between them, and the errors of the others."""

    files: Sequence[FileReport]
    leaks: Sequence[str]  # questions in more than one file
    errors: Sequence[str]
    unit: str  # of lengths: "tokens", or "words" without a vocabulary

    @property
    def is_valid(self) -> bool:
        return not self.leaks and not self.errors and not any(file.findings for file in self.files)

    def table(self) -> str:
        """A table for the terminal with one row per file, then all errors, leaks and findings."""
        head = ("file", "problems", "steps mean (max)", "without steps", f"{self.unit} median", "95 %", "max")
        lines = [Table(head, [_row(file) for file in self.files]).text()] if self.files else []
        lines += [f"error: {text}" for text in self.errors]
        lines += [f"leak: {text}" for text in self.leaks]
        lines += [f"note: {file.path}: {finding}" for file in self.files for finding in file.findings]
        return "\n".join(lines)

    def save_picture(self, path: str | Path) -> None:
        """Save histograms of lengths and steps as PNG. Raises DataError without files."""
        if not self.files:
            raise DataError("no file could be read, so there is nothing to draw")
        from matplotlib.figure import Figure  # takes half a second to import

        figure = Figure(figsize=(11, 4), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, label, values in (
            (axes[0], f"{self.unit} of question, steps and answer", [file.lengths for file in self.files]),
            (axes[1], "steps", [file.steps for file in self.files]),
        ):
            top = max(map(max, values))
            edges = [top * i / 50 for i in range(51)] if top > 50 else [i - 0.5 for i in range(top + 2)]
            for file, lengths in zip(self.files, values, strict=True):
                weights = [1 / len(lengths)] * len(lengths)
                name = file.path.name.replace("$", r"\$")  # not a formula
                axis.hist(lengths, bins=edges, weights=weights, histtype="step", label=name)
            axis.set(xlabel=label, ylabel="share of problems")
        axes[0].legend()
        figure.savefig(path, dpi=120, format="png")


def check_data_files(
    paths: Iterable[str | Path],
    vocabulary: Vocabulary | None = None,
    check: LengthCheck | None = None,
    fields: Mapping[str, Any] | None = None,
) -> DataReport:
    """Read and check data files; lengths are in tokens with a vocabulary, in words without.

    `check`: refuses examples that are too long, as training does; default: the tokenizer's length, in a note.
    A file that cannot be used adds an entry to `errors`; nothing is raised for it.
    """
    files, errors = [], []
    holders: dict[bytes, dict[str, int]] = {}  # question -> first index in each file that has it
    limit = check.limit.positions if check and check.limit else _stated_length(vocabulary)
    for path in map(Path, paths):
        try:
            no_steps: dict[int, str] = {}
            problems = read_problems(path, None, fields, no_steps)
            file = _check_file(path, problems, no_steps, vocabulary, limit)
            if check and check.limit and max(file.lengths) > check.limit.positions:
                tokens = tokenize(problems, check.vocabulary)
                check.refuse([Use(str(path), tokens, trained_stages(check.experiment), trains=True)])
            files.append(file)
        except DataError as error:
            errors.append(str(error))
            continue
        for index, problem in enumerate(problems):
            holders.setdefault(_fingerprint(problem.question), {}).setdefault(str(path), index)
    return DataReport(files, _leaks(holders), errors, "tokens" if vocabulary else "words")


def _check_file(
    path: Path,
    problems: Sequence[Problem],
    no_steps: Mapping[int, str],
    vocabulary: Vocabulary | None,
    limit: int | None,
) -> FileReport:
    lengths = _lengths(problems, vocabulary)
    findings = []
    prints = [_fingerprint(p.question) for p in problems]
    first = dict(zip(reversed(prints), reversed(problems), strict=True))
    pairs = [(i, p, first[question]) for i, (p, question) in enumerate(zip(problems, prints, strict=True))]
    repeated = [i for i, p, earlier in pairs if earlier is not p and earlier.answer == p.answer]
    disagreeing = [i for i, p, earlier in pairs if earlier.answer != p.answer]
    without = [i for i, p in enumerate(problems) if not p.steps and not no_steps]
    marks = [mark_of(p, vocabulary) for p in problems]
    marked = [i for i, mark in enumerate(marks) if mark & SPECIAL]
    hashed = [i for i, mark in enumerate(marks) if mark & HASHED]
    too_long = [i for i, total in enumerate(lengths) if limit is not None and total > limit]
    hint = next(iter(no_steps.values()), "")
    for items, text in (
        (repeated, "repeat the question of an earlier problem in the file"),
        (disagreeing, "repeat the question of an earlier problem with another answer"),
        ([*no_steps], f"have no 'steps' field{hint}: good for evaluation only, training needs it"),
        (without, "have no steps; stages that hide steps hide nothing there"),
        (marked, "contain a special token such as <|latent|> as text"),
        (hashed, "have '#' in the answer, where grading splits: no prediction can be correct"),
        (
            too_long,
            f"are longer than the model's {limit} positions, special tokens and latents not counted "
            f"(the longest has {max(lengths):,} tokens)",
        ),
    ):
        if items:
            findings.append(f"{len(items)} of {len(problems)} {text}: {_named(items)}")
    findings += _against_card(path, len(problems))
    return FileReport(path, [len(p.steps) for p in problems], lengths, findings)


def _against_card(path: Path, count: int) -> list[str]:
    """Findings if the file is not the one that its card describes."""
    card = card_for(path)
    if path.name in card.counts and card.counts[path.name] != count:
        return [f"has {count} problems, but its card says {card.counts[path.name]}"]
    if path.name in card.sha256 and hash_file(path) != card.sha256[path.name]:
        return ["was changed after its card was written (its sha256 does not match)"]
    return []


def _lengths(problems: Sequence[Problem], vocabulary: Vocabulary | None) -> list[int]:
    if vocabulary is None:
        return [len(" ".join((p.question, *p.steps, p.answer)).split()) for p in problems]
    chunks = (problems[first : first + _CHUNK] for first in range(0, len(problems), _CHUNK))
    return [length for chunk in chunks for length in num_tokens(tokenize(chunk, vocabulary)).tolist()]


def _stated_length(vocabulary: Vocabulary | None) -> int | None:
    stated = vocabulary.tokenizer.model_max_length if vocabulary is not None else _UNKNOWN_LENGTH
    return stated if stated < _UNKNOWN_LENGTH else None


def _fingerprint(question: str) -> bytes:
    """A hash that ignores case, whitespace and the encoding of accents."""
    plain = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()


def _leaks(holders: Mapping[bytes, Mapping[str, int]]) -> list[str]:
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for indices in holders.values():
        named = list(indices.items())
        for position, (first, index) in enumerate(named):
            for second, other in named[position + 1 :]:
                pairs.setdefault((first, second), []).append((index, other))
    return [
        f"{counted(len(shared), 'question')} in {first} and in {second}: items "
        + ", ".join(f"{a} = {b}" for a, b in shared[:_MAX_NAMED])
        + (", ..." if len(shared) > _MAX_NAMED else "")
        for (first, second), shared in pairs.items()
    ]


def _named(items: Sequence[int]) -> str:
    return "items " + ", ".join(map(str, items[:_MAX_NAMED])) + (", ..." if len(items) > _MAX_NAMED else "")


def _row(file: FileReport) -> tuple[str, ...]:
    lengths = sorted(file.lengths)
    return (
        str(file.path),
        f"{len(lengths):,}",
        f"{mean(file.steps):.1f} ({max(file.steps)})",
        f"{sum(count == 0 for count in file.steps):,}",
        f"{median(lengths):,.0f}",
        f"{lengths[int(0.95 * (len(lengths) - 1))]:,}",
        f"{lengths[-1]:,}",
    )
