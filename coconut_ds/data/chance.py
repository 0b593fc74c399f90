"""The accuracy that guessing reaches on an evaluation set.

Knows: problems.  Does not know: models, grading.
"""

import re
from collections import Counter
from collections.abc import Sequence

from coconut_ds.data.problems import Problem

OFFER = re.compile(r"(\w+) or (?:an? )?(\w+)\s*\?\s*$")  # ProsQA: "Is Tom a terpus or brimpus?"


def chance_of(problems: Sequence[Problem]) -> float:
    """The larger of two guesses' accuracies, a fraction of 1.

    One always gives the set's most frequent answer, which is at least as good as drawing any of its answers.
    The other picks one of the two that a question offers at its end ("... a terpus or brimpus?").
    """
    if not problems:
        return 0.0
    answers = Counter(problem.answer for problem in problems)
    offered = sum(1 / 2 for problem in problems if _offers_its_answer(problem))
    return max(answers.most_common(1)[0][1], offered) / len(problems)


def _offers_its_answer(problem: Problem) -> bool:
    offer = OFFER.search(problem.question)
    words = set(re.findall(r"\w+", problem.answer))
    return offer is not None and len(words & set(offer.groups())) == 1
