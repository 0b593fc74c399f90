"""The accuracy of guessing."""

import pytest

from coconut_ds.data.problems import Problem, chance_of


def problems(*pairs):
    return [Problem(question, (), answer) for question, answer in pairs]


@pytest.mark.parametrize(
    "items, chance",
    [
        ([], 0.0),
        ([("q", "1"), ("q", "1"), ("q", "2"), ("q", "3")], 0.5),
        ([("True or false: ...", "True")] * 3 + [("True or false: ...", "False")], 0.75),
        ([("Is Tom a terpus or brimpus?", f"Tom is a {a}.") for a in ("terpus", "brimpus")], 0.5),
        ([(f"Is T{i} a terpus or brimpus?", f"T{i} is a terpus.") for i in range(5)], 0.5),
        ([(f"How many of {i} or more?", str(i + 7)) for i in range(5)], 0.2),
    ],
)
def test_the_better_of_two_guesses(items, chance):
    assert chance_of(problems(*items)) == chance
