"""The data of a run: training examples and evaluation sets, read before any model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from coconut_ds.data.problems import Card, Problem, card_for, examples_digest, read_problems
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary, tokenize


@dataclass(frozen=True)
class TestSet:
    """Problems with their token ids and their data card."""

    problems: Sequence[Problem]
    tokenized: Sequence[TokenizedProblem]
    card: Card
    __test__ = False  # not a test class for pytest

    def __len__(self) -> int:
        return len(self.problems)

    @cached_property
    def examples(self) -> str:
        """A hash of its questions and answers: equal for results that compare example by example."""
        return examples_digest(self.problems)


@dataclass(frozen=True)
class RunData:
    """What a run reads from disk before any model."""

    vocabulary: Vocabulary
    train: Sequence[TokenizedProblem]
    valid: TestSet
    test: TestSet | None


def load_test_set(path: str, vocabulary: Vocabulary, limit: int | None = None) -> TestSet:
    """Read problems to grade, with their card.  Raises DataError."""
    problems = read_problems(path, limit)
    return TestSet(problems, tokenize(problems, vocabulary), card_for(path))
