"""Intervals and paired tests against statsmodels and against values computed by hand."""

import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from coconut_ds.evaluation.intervals import (
    interval_over_seeds,
    mcnemar_exact,
    percent_with_interval,
    wilson_interval,
)


@pytest.mark.parametrize("correct, items", [(0, 500), (485, 500), (500, 500), (450, 1319), (1, 1), (7, 16)])
def test_wilson_is_statsmodels(correct, items):
    expected = proportion_confint(correct, items, method="wilson")
    assert wilson_interval(correct, items) == pytest.approx(expected, abs=1e-12)


def test_nothing_measured_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5"):
        wilson_interval(5, 4)


@pytest.mark.parametrize("first, second", [(0, 0), (1, 0), (5, 5), (12, 3), (3, 12), (40, 61), (0, 430)])
def test_mcnemar_is_statsmodels(first, second):
    expected = mcnemar([[17, first], [second, 9]], exact=True).pvalue
    assert mcnemar_exact(first, second) == pytest.approx(min(1.0, expected), rel=1e-9)


def test_mcnemar_of_counts_that_are_no_counts():
    with pytest.raises(ValueError, match="k"):
        mcnemar_exact(-1, 2)


def test_interval_over_seeds_by_hand():
    """t(0.975, 2) = 4.302653; a standard deviation of 0.03."""
    half = 4.302653 * 0.03 / 3**0.5
    assert interval_over_seeds([0.30, 0.36, 0.33]) == pytest.approx((0.33 - half, 0.33 + half), abs=1e-7)
    assert interval_over_seeds([0.5, 0.5]) == (0.5, 0.5)
    assert interval_over_seeds([0.0, 1.0]) == (0.0, 1.0)


def test_text():
    assert percent_with_interval(485, 500) == "97.0 % [95.1, 98.2]"
