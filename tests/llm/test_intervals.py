"""Intervals: the same values always have the same one, to the bit, and each agrees with its literal definition."""

import math

import numpy as np
import pytest

from gdro_llm.intervals import (
    bca_intervals,
    mean_interval,
    median_interval,
    paired_difference,
    percentile_interval,
    resampled_rows,
    slope_interval,
)

DIFFERENCES = [0.5, -0.25, 1.5, 2.0, 0.75, 1.0, -0.125, 3.0]
WARM_STARTS = [0, 1, 2, 3] * 2


def test_numbers_of_results_that_are_published_do_not_move():
    """Seed of the resampling, order of the draws and kind of quantile are part of every number in paper/results."""
    assert mean_interval(DIFFERENCES) == (1.046875, 0.359375, 1.75)
    assert mean_interval(DIFFERENCES, resamples=400) == (1.046875, 0.453125, 1.813671874999999)
    regret = np.array([[1.0, 3, 10], [2, 5, 30], [1, 4, 9], [3, 8, 20]])
    assert slope_interval(np.array([1.0, 10, 100]), regret) == pytest.approx(
        (0.4968755253614992, 0.4301690032854969, 0.5752685772916465), rel=1e-12
    )
    expected = {"difference": 1.046875, "low": 0.25, "high": 2.03125, "least": -0.25, "most": 3.0}
    expected |= {"wins": 6, "losses": 2, "p": 0.2890625, "evidence": False}
    assert paired_difference(np.array(DIFFERENCES), WARM_STARTS, resamples=10_000) == expected
    ratios = [0.5, 1.0, math.inf, 0.75, 2.0, math.inf, 1.25, 0.25]
    assert median_interval(ratios, WARM_STARTS, resamples=10_000) == (1.125, 0.5, math.inf)
    tally, values = np.array([5, 3, 0, 2, 1]), np.array([[0, 0.25, 0.5, 0.75, 1], [0, 1, 1, 1, 1.0]])
    assert bca_intervals(tally, values, resamples=9999) == [
        (0.13636363636363635, 0.5454545454545454),
        (0.2727272727272727, 0.8181818181818181),
    ]


def test_a_percentile_interval_by_hand():
    """Of a ratio of means: the rows are drawn together, and the ends are linear between order statistics."""
    rng = np.random.default_rng(1)
    top, bottom = rng.random(7), 1.0 + rng.random(7)
    interval = percentile_interval(lambda rows: top[rows].mean(-1) / bottom[rows].mean(-1), 7, resamples=101)
    ratios = sorted(sum(top[i] for i in rows) / sum(bottom[i] for i in rows) for rows in resampled_rows(7, 101))
    by_hand = [ratios[2] + (ratios[3] - ratios[2]) * 0.5, ratios[97] + (ratios[98] - ratios[97]) * 0.5]
    assert interval == pytest.approx(by_hand)


def test_resampled_rows_are_drawn_with_replacement_and_always_the_same():
    """Every row equally often, up to chance: 40 standard errors would be a mistake, 5 are none."""
    rows = resampled_rows(5, 4000)
    assert rows.shape == (4000, 5)
    assert np.array_equal(rows, resampled_rows(5, 4000))
    counts = np.bincount(rows.ravel(), minlength=5)
    assert abs(counts - 4000).max() < 5 * np.sqrt(20_000 * 0.2 * 0.8)
    assert any(len(set(row.tolist())) < 5 for row in rows)


def test_the_slope_of_a_power_law_has_no_width():
    """y = x^2 for every seed."""
    x = np.array([1.0, 3, 9])
    assert slope_interval(x, np.tile(x**2, (4, 1))) == pytest.approx((2.0, 2.0, 2.0))
