"""Confidence intervals of accuracies, and a paired test of two models on the same items.

Importing scipy.stats takes half a second, so only the functions that need it do.
"""

from collections.abc import Sequence
from statistics import NormalDist, mean, stdev

Z = NormalDist().inv_cdf(0.975)


def wilson_interval(num_correct: float, num_items: int) -> tuple[float, float]:
    """95 % interval of an accuracy as fractions (low, high), Wilson's score interval; (0, 1) without items.

    num_correct may have a fraction: the sum of shares.  Raises ValueError if it is not in 0..num_items.
    """
    if not 0 <= num_correct <= num_items:
        raise ValueError(f"{num_correct} of {num_items} items correct")
    if num_items == 0:
        return 0.0, 1.0
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    share, spread = num_correct / num_items, Z * Z / num_items
    half = (spread * (share * (1 - share) + spread / 4)) ** 0.5
    low, high = ((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def interval_over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least two accuracies (Student's t), inside [0, 1]."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return max(0.0, mean(values) - half), min(1.0, mean(values) + half)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value of two models on the same items; items that both or neither solve do not count.

    only_first, only_second: items solved by only one of them.  McNemar's test in its exact form, a sign test.
    """
    from scipy.stats import binomtest

    different = only_first + only_second
    return float(binomtest(only_first, different).pvalue) if different else 1.0


def p_value_text(p_value: float) -> str:
    """'p = 0.021', or 'p < 1e-12'."""
    return "p < 1e-12" if p_value < 1e-12 else f"p = {p_value:.2g}"


def percent_with_interval(num_correct: float, num_items: int) -> str:
    """'34.1 % [31.6, 36.7]': an accuracy and its 95 % interval as text."""
    low, high = wilson_interval(num_correct, num_items)
    return f"{100 * num_correct / max(num_items, 1):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
