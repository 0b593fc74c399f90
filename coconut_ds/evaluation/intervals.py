"""Error bars for accuracies, and whether two models differ on the same items.

Knows: counts.  Does not know: models, files.
"""

from math import comb, sqrt
from statistics import NormalDist


def wilson_interval(num_correct: int, num_items: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of an accuracy, as fractions of 1: (low, high); (0, 1) where nothing was measured.

    Source: Wilson 1927, the score interval; it stays inside [0, 1] and is not empty at 0 % and 100 %.
    """
    if not 0 <= num_correct <= num_items:
        raise ValueError(f"{num_correct} of {num_items} is not a proportion")
    if num_items == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = num_correct / num_items, z * z / num_items
    centre = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / num_items + spread / num_items / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value of two models on the same items; items that both or neither solve say nothing.

    only_first, only_second: items that one of them solves and the other does not.
    Source: McNemar 1947 in its exact form: a sign test, each such item a toss of a fair coin.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"counts of items cannot be negative: {only_first}, {only_second}")
    tosses, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(comb(tosses, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**tosses)  # whole numbers until the division: no underflow


def percent_with_interval(num_correct: int, num_items: int) -> str:
    """'34.1 % [31.6, 36.7]': an accuracy and its 95 % interval, for people."""
    low, high = wilson_interval(num_correct, num_items)
    return f"{100 * num_correct / max(num_items, 1):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
