"""Confidence intervals of accuracies, and a paired test of two models on the same items."""

from math import comb, sqrt
from statistics import NormalDist


def wilson_interval(num_correct: int, num_items: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of an accuracy as fractions (low, high); (0, 1) without items.

    Source: Wilson 1927, the score interval.  It stays inside [0, 1] and is not empty at 0 % and 100 %.
    """
    if not 0 <= num_correct <= num_items:
        raise ValueError(f"{num_correct} of {num_items} is not a proportion")
    if num_items == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = num_correct / num_items, z * z / num_items
    center = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / num_items + spread / num_items / 4) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value of two models on the same items; items that both or neither solve do not count.

    only_first, only_second: items solved by only one of them.
    Source: McNemar 1947 in its exact form, a sign test.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"counts of items cannot be negative: {only_first}, {only_second}")
    tosses, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(comb(tosses, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**tosses)  # integers until the division avoid underflow


def percent_with_interval(num_correct: int, num_items: int) -> str:
    """'34.1 % [31.6, 36.7]': an accuracy and its 95 % interval as text."""
    low, high = wilson_interval(num_correct, num_items)
    return f"{100 * num_correct / max(num_items, 1):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
