"""How sure a measured number is: 95 % bootstrap intervals and the sign test, for every part of the project.

Resampling has one fixed seed, so that the same values always have the same interval. Callers choose the number of
resamples. Only numpy and scipy are imported, so that simulations use this module without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVEL = 0.05
ENDS = (LEVEL / 2, 1 - LEVEL / 2)


# --------------------------------------------------------------------------------------------------- one set of values


def resampled_rows(size: int, resamples: int) -> Ints:
    """(resamples, size) row numbers drawn with replacement; the same ones in every call."""
    return np.random.default_rng(0).integers(size, size=(resamples, size))


def percentile_interval(
    statistic: Callable[[Ints], ArrayLike], size: int, *, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile interval of a statistic of `size` independent rows.

    Args:
        statistic: (resamples, size) row numbers -> (resamples,) values; it may draw on several columns of a row, for
            example `lambda rows: top[rows].mean(-1) / bottom[rows].mean(-1)`.
        size: number of rows.
        resamples: bootstrap samples.
    """
    low, high = np.quantile(np.asarray(statistic(resampled_rows(size, resamples))), ENDS)
    return float(low), float(high)


def mean_interval(values: ArrayLike, *, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean of values, for example of differences paired by seed, and its interval.

    >>> mean_interval([1.0, 1.0, 1.0])
    (1.0, 1.0, 1.0)
    """
    x = np.asarray(values, dtype=np.float64)
    return float(x.mean()), *percentile_interval(lambda rows: x[rows].mean(axis=1), x.size, resamples=resamples)


def slope(x: ArrayLike, y: ArrayLike) -> float:
    """Log-log slope of y over x by least squares.

    >>> round(slope([1, 10, 100], [3, 30, 300]), 9)
    1.0
    """
    return float(np.polyfit(np.log(np.asarray(x, dtype=np.float64)), np.log(np.asarray(y, dtype=np.float64)), 1)[0])


def slope_interval(x: Floats, values: Floats, *, resamples: int = 500) -> tuple[float, float, float]:
    """Log-log slope of the mean over seeds of (seeds, H) values at (H,) places, and its interval over seeds."""

    def of_mean(rows: Ints) -> float:
        return slope(x, np.maximum(values[rows].mean(axis=0), 1e-12))

    ends = percentile_interval(lambda draws: [of_mean(rows) for rows in draws], len(values), resamples=resamples)
    return of_mean(np.arange(len(values))), *ends


# ------------------------------------------------------------------------------------------------- groups of seeds


def paired_difference(differences: Floats, groups: Sequence[int], *, resamples: int) -> dict[str, Any]:
    """Mean of paired differences, its interval over groups and their members, and an exact sign test.

    Args:
        differences: (S,) one a seed.
        groups: (S,) which group (warm start) each seed belongs to.
        resamples: bootstrap samples.

    Returns:
        difference, low, high; least and most of a seed; wins, losses and p of the sign test; evidence: whether interval
        and sign test agree that there is a difference.

    >>> paired_difference(np.array([1.0, 2.0, 1.5, 1.2, 0.8, 2.2, 1.1, 1.4]), [0] * 8, resamples=100)["p"]
    0.0078125
    """
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    means = np.array([differences[rows].mean() for rows in nested_rows(tuple(groups), resamples)])
    low, high = np.quantile(means, ENDS)
    return {
        "difference": float(differences.mean()),
        "low": float(low),
        "high": float(high),
        "least": float(differences.min()),
        "most": float(differences.max()),
        "wins": wins,
        "losses": losses,
        "p": p,
        "evidence": bool(p <= LEVEL and (low > 0 or high < 0)),
    }


def median_interval(values: ArrayLike, groups: Sequence[int], *, resamples: int) -> tuple[float, float, float]:
    """Median of (S,) values, which may be infinite, and its interval over groups and their members."""
    x = np.asarray(values, dtype=np.float64)
    medians = np.sort([np.median(x[rows]) for rows in nested_rows(tuple(groups), resamples)])
    low, high = (medians[round(end * (len(medians) - 1))] for end in ENDS)  # no mean of a finite and an infinite one
    return float(np.median(x)), float(low), float(high)


@cache
def nested_rows(groups: tuple[int, ...], resamples: int) -> list[Ints]:
    """Rows of bootstrap samples in two stages: groups with replacement, then of each as many members as it has."""
    rng, samples = np.random.default_rng(0), []
    members = [np.flatnonzero(np.array(groups) == group) for group in sorted(set(groups))]
    for _ in range(resamples):
        drawn = [members[i] for i in rng.integers(len(members), size=len(members))]
        samples.append(np.concatenate([rows[rng.integers(len(rows), size=len(rows))] for rows in drawn]))
    return samples


# ------------------------------------------------------------------------------------------------- rates of problems


def bca_intervals(tally_V: Ints, values_C_V: Floats, *, resamples: int) -> list[tuple[float | None, float | None]]:
    """BCa intervals (Efron 1987) of means over problems, of which `tally_V[v]` have the value `values_C_V[:, v]`.

    BCa, since rates near 0 or 1 are skewed, where percentile intervals miss on one side. (With 30 problems of which few
    are ever solved both are too short: of a mean of .05, BCa covers 90 %, percentile 87 %.) A resample of problems is
    one multinomial draw of the tally: exact, and 40 times as fast as one by one.

    Returns:
        (low, high) of each of the C means; (None, None) where all problems have the same value.
    """
    seen = tally_V > 0
    tally, values = tally_V[seen], values_C_V[:, seen]
    size = tally.sum()
    drawn = np.random.default_rng(0).multinomial(size, tally / size, size=resamples)
    intervals: list[tuple[float | None, float | None]] = []
    for of_v in values:
        centre = tally @ of_v / size
        deviation = of_v - centre
        if np.ptp(of_v) == 0:
            intervals.append((None, None))
            continue
        gaps = drawn @ deviation / size
        gaps[abs(gaps) < 1e-12] = 0.0  # ties count half; rounding must not break them
        bias = norm.ppf((1.0 - np.sign(gaps).mean()) / 2.0)
        acceleration = (tally @ deviation**3) / (6.0 * (tally @ deviation**2) ** 1.5)
        z = bias + norm.ppf(ENDS)
        low, high = centre + np.quantile(gaps, norm.cdf(bias + z / (1.0 - acceleration * z)))
        intervals.append((float(low), float(high)))
    return intervals
