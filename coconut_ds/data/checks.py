"""Look through data files before training: are they sound, do splits leak, what does not fit the model.

Knows: problems, cards and, given a vocabulary, lengths in tokens.  Does not know: stages, batches.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from coconut_ds.data.problems import Problem, card_for, read_problems
from coconut_ds.data.tokenizer import END, LATENT, START, Vocabulary, tokenize
from coconut_ds.errors import DataError

_CHUNK = 2_000
_MAX_NAMED = 10  # items that a finding lists by number
_UNKNOWN_LENGTH = 1_000_000  # tokenizers without a limit state a huge one


@dataclass(frozen=True)
class Lengths:
    """One length per problem, in tokens, or in words when there is no vocabulary."""

    unit: str
    question: Sequence[int]
    reasoning: Sequence[int]
    answer: Sequence[int]

    @property
    def total(self) -> list[int]:
        return [sum(parts) for parts in zip(self.question, self.reasoning, self.answer, strict=True)]


@dataclass(frozen=True)
class FileReport:
    """What one file holds.  `findings` are worth a look; they do not make the file unusable."""

    path: Path
    problems: int
    steps: Sequence[int]  # per problem
    lengths: Lengths
    findings: Sequence[str]


@dataclass(frozen=True)
class DataReport:
    """All files, what concerns several of them, and the files that cannot be used at all."""

    files: Sequence[FileReport]
    leaks: Sequence[str]  # questions in more than one file
    errors: Sequence[str]

    @property
    def is_valid(self) -> bool:
        return not self.leaks and not self.errors and not any(file.findings for file in self.files)

    def table(self) -> str:
        """A summary for a terminal: a row a file, then everything found."""
        unit = self.files[0].lengths.unit if self.files else "tokens"
        head = ("file", "problems", "steps mean (most)", "without steps", f"{unit} median", "95 %", "most")
        rows = [head, *(_row(file) for file in self.files)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        widths[0] = -widths[0]  # only the names stand left
        lines = ["  ".join(_padded(*cell) for cell in zip(row, widths, strict=True)) for row in rows]
        found = [f"{file.path}: {finding}" for file in self.files for finding in file.findings]
        lines += [f"error: {text}" for text in self.errors]
        lines += [f"leak: {text}" for text in self.leaks] + [f"note: {text}" for text in found]
        return "\n".join(lines)

    def save_picture(self, path: str | Path) -> None:
        """Histograms of total lengths and of steps, a colour a file, as PNG; DataError without files."""
        if not self.files:
            raise DataError("no file could be read, so there is nothing to draw")
        import matplotlib
        from matplotlib.figure import Figure

        matplotlib.rcParams["text.parse_math"] = False  # file names are no formulas
        figure = Figure(figsize=(11, 4), layout="constrained")
        unit = self.files[0].lengths.unit
        axes = figure.subplots(1, 2)
        for axis, label, values in (
            (axes[0], f"{unit} of question, steps and answer", [file.lengths.total for file in self.files]),
            (axes[1], "steps", [file.steps for file in self.files]),
        ):
            most = max(map(max, values))
            edges = [most * i / 50 for i in range(51)] if most > 50 else [i - 0.5 for i in range(most + 2)]
            for file, lengths in zip(self.files, values, strict=True):
                weights = [1 / len(lengths)] * len(lengths)
                name = file.path.name.replace("$", r"\$")  # no formula
                axis.hist(lengths, bins=edges, weights=weights, histtype="step", label=name)
            axis.set(xlabel=label, ylabel="share of problems")
        axes[0].legend()
        figure.savefig(path, dpi=120, format="png")


def check_data_files(
    paths: Iterable[str | Path], vocabulary: Vocabulary | None = None, model_length: int | None = None
) -> DataReport:
    """Read and look through data files; lengths are tokens with a vocabulary, words without.

    `model_length` is the number of positions the model has; without it, what the tokenizer states.
    A file that cannot be used becomes an entry of `errors`; nothing is raised for it.
    """
    files, errors = [], []
    holders: dict[bytes, dict[str, int]] = {}  # question -> first index in each file that has it
    most = model_length or _stated_length(vocabulary)
    for path in map(Path, paths):
        try:
            problems = read_problems(path)
            files.append(_look_through(path, problems, vocabulary, most))
        except DataError as error:
            errors.append(str(error))
            continue
        for index, problem in enumerate(problems):
            holders.setdefault(_fingerprint(problem.question), {}).setdefault(str(path), index)
    return DataReport(files, _leaks(holders), errors)


def _look_through(
    path: Path, problems: Sequence[Problem], vocabulary: Vocabulary | None, most: int | None
) -> FileReport:
    lengths = _lengths(problems, vocabulary)
    findings = []
    first_with = {_fingerprint(p.question): i for i, p in reversed(list(enumerate(problems)))}
    again = [i for i, p in enumerate(problems) if first_with[_fingerprint(p.question)] < i]
    without = [i for i, p in enumerate(problems) if not p.steps]
    texts = [(p.question, *p.steps, p.answer) for p in problems]
    marked = [i for i, parts in enumerate(texts) if any(m in "\n".join(parts) for m in (START, LATENT, END))]
    hashed = [i for i, p in enumerate(problems) if "#" in p.answer]
    too_long = [i for i, total in enumerate(lengths.total) if most is not None and total > most]
    for items, text in (
        (again, "ask a question that an earlier problem of the file asks"),
        (without, "have no steps; a stage that hides steps hides nothing there"),
        (marked, "contain a marker such as <|latent|>, which would be taken for a latent slot"),
        (hashed, "have '#' in the answer, where grading splits, so that no prediction is right"),
        (
            too_long,
            f"are longer than the model's {most} positions, special tokens and latents not counted "
            f"(the longest has {max(lengths.total):,} tokens)",
        ),
    ):
        if items:
            findings.append(f"{len(items)} of {len(problems)} {text}: {_named(items)}")
    findings += _against_card(path, len(problems))
    return FileReport(path, len(problems), [len(p.steps) for p in problems], lengths, findings)


def _against_card(path: Path, count: int) -> list[str]:
    """Whether the file is still the one that its card describes."""
    card = card_for(path)
    if path.name in card.counts and card.counts[path.name] != count:
        return [f"holds {count} problems, its card says {card.counts[path.name]}"]
    if path.name in card.sha256:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != card.sha256[path.name]:
            return ["was changed after its card was written (another sha256)"]
    return []


def _lengths(problems: Sequence[Problem], vocabulary: Vocabulary | None) -> Lengths:
    if vocabulary is None:
        return Lengths(
            "words",
            [len(problem.question.split()) for problem in problems],
            [sum(len(step.split()) for step in problem.steps) for problem in problems],
            [len(problem.answer.split()) for problem in problems],
        )
    question, reasoning, answer = [], [], []
    for first in range(0, len(problems), _CHUNK):
        for tokens in tokenize(problems[first : first + _CHUNK], vocabulary):
            question.append(len(tokens.question))
            reasoning.append(sum(map(len, tokens.steps)))
            answer.append(len(tokens.answer))
    return Lengths("tokens", question, reasoning, answer)


def _stated_length(vocabulary: Vocabulary | None) -> int | None:
    stated = vocabulary.tokenizer.model_max_length if vocabulary is not None else _UNKNOWN_LENGTH
    return stated if stated < _UNKNOWN_LENGTH else None


def _fingerprint(question: str) -> bytes:
    """Equal for questions that differ in case, blanks or the encoding of accents alone."""
    plain = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()


def _leaks(holders: Mapping[bytes, Mapping[str, int]]) -> list[str]:
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for places in holders.values():
        named = list(places.items())
        for position, (first, index) in enumerate(named):
            for second, other in named[position + 1 :]:
                pairs.setdefault((first, second), []).append((index, other))
    return [
        f"{len(shared)} questions are in {first} and in {second}: items "
        + ", ".join(f"{a} = {b}" for a, b in shared[:_MAX_NAMED])
        + (", ..." if len(shared) > _MAX_NAMED else "")
        for (first, second), shared in pairs.items()
    ]


def _named(items: Sequence[int]) -> str:
    return "items " + ", ".join(map(str, items[:_MAX_NAMED])) + (", ..." if len(items) > _MAX_NAMED else "")


def _padded(text: str, width: int) -> str:
    return text.rjust(width) if width > 0 else text.ljust(-width)


def _row(file: FileReport) -> tuple[str, ...]:
    total = sorted(file.lengths.total)
    return (
        str(file.path),
        f"{file.problems:,}",
        f"{mean(file.steps):.1f} ({max(file.steps)})",
        f"{sum(count == 0 for count in file.steps):,}",
        f"{median(total):,.0f}",
        f"{total[int(0.95 * (len(total) - 1))]:,}",
        f"{total[-1]:,}",
    )
