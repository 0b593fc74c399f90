"""Intervals and tests against statsmodels and scipy, which are not needed at run time."""

import pytest
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from coconut_ds.evaluation.intervals import mcnemar_exact, percent_with_interval, wilson_interval


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("correct, items", [(0, 500), (485, 500), (500, 500), (450, 1319), (1, 1), (7, 16)])
def test_wilson_is_statsmodels(correct, items, confidence):
    expected = proportion_confint(correct, items, alpha=1 - confidence, method="wilson")
    assert wilson_interval(correct, items, confidence) == pytest.approx(expected, abs=1e-12)


def test_wilson_is_scipy():
    expected = binomtest(485, 500).proportion_ci(0.95, method="wilson")
    assert wilson_interval(485, 500) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_nothing_measured_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 of 4"):
        wilson_interval(5, 4)


@pytest.mark.parametrize("first, second", [(0, 0), (1, 0), (5, 5), (12, 3), (3, 12), (40, 61), (0, 430)])
def test_mcnemar_is_statsmodels(first, second):
    expected = mcnemar([[17, first], [second, 9]], exact=True).pvalue
    assert mcnemar_exact(first, second) == pytest.approx(min(1.0, expected), rel=1e-9)


def test_mcnemar_of_many_items_is_scipy():
    assert mcnemar_exact(900, 1100) == pytest.approx(binomtest(900, 2000).pvalue, rel=1e-9)
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)


def test_text():
    assert percent_with_interval(485, 500) == "97.0 % [95.1, 98.2]"
