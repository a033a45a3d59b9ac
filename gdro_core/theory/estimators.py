r"""Estimates from samples: pass@k and mean@k, and means that survive heavy tails.

If only a moment of order r in (1, 2] is finite, the plain mean of n i.i.d. values can be off by the order of
(1/delta)^{1/r} with probability delta: one huge value is enough. `truncated_mean`, `median_of_means` and `catoni_mean`
are off by the order of log(1/delta)^{1 - 1/r} at most (Bubeck, Cesa-Bianchi & Lugosi 2013, Bandits with heavy tail,
arXiv 1209.1727, Lemmas 1-3; r = 1 + epsilon there). `deviation_bound` has the radii; each docstring proves its own, for
both sides at once, so that no constant is quoted from elsewhere.
"""

from __future__ import annotations

from math import ceil, log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, check_choice, check_entries, check_whole, integer, number


def pass_at_k(correct: ArrayLike, trials: ArrayLike, k: int) -> Floats:
    r"""Unbiased estimate of 1 - (1 - p)^k from c successes in n trials (theory test 14; Chen et al. 2021).

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{j<k} (n - c - j)_+ / (n - j)

    Args:
        correct: c, integers in [0, n]; any shape.
        trials: n, integers, broadcast against `correct`.
        k: samples a solver may draw, 1 <= k <= every n (there is no unbiased estimate from fewer trials).

    Returns:
        float64 array of the common shape.

    Raises:
        ValueError: k < 1, k > some n, or c outside [0, n].

    >>> pass_at_k([0, 1, 2, 8], 8, 2).round(4)
    array([0.    , 0.25  , 0.4643, 1.    ])
    """
    k = integer("k", k, 1)
    c, n = _tallies(correct, trials)
    if (n < k).any():
        raise ValueError(f"trials must be at least k = {k}, got {n.min():g}")
    j = np.arange(k, dtype=np.float64)
    failed = np.maximum(n[..., None] - c[..., None] - j, 0.0) / (n[..., None] - j)
    return np.asarray(1.0 - failed.prod(axis=-1))


class MeanAtK(NamedTuple):
    """Mean of k samples, and the unbiased estimate of its variance.

    >>> mean_at_k(2, 4)
    MeanAtK(mean=array(0.5), variance=array(0.08333333))
    """

    mean: Floats
    variance: Floats


def mean_at_k(correct: ArrayLike, trials: ArrayLike) -> MeanAtK:
    r"""Mean correctness of a problem over its k samples, with the sampling variance that goes with it.

        mean = c / k,  unbiased for p;      variance = c (k - c) / (k^2 (k - 1)),  unbiased for p (1 - p) / k

    The score of a benchmark is the average of the means; the square root of the summed variances, divided by the number
    of problems, is its standard error over repeated sampling from the same problems.

    Args:
        correct: c, integers in [0, k]; any shape.
        trials: k, integers >= 2 (one sample says nothing about its variance), broadcast against `correct`.

    Returns:
        mean, variance: float64 arrays of the common shape.

    Raises:
        ValueError: k < 2, or c outside [0, k].

    >>> mean, variance = mean_at_k([0, 4, 8], 8)
    >>> mean, variance.round(4)
    (array([0. , 0.5, 1. ]), array([0.    , 0.0357, 0.    ]))
    """
    c, k = _tallies(correct, trials)
    if (k < 2).any():
        raise ValueError(f"trials must be at least 2, got {k.min():g}")
    mean = np.asarray(c / k)
    return MeanAtK(mean, np.asarray(mean * (1.0 - mean) / (k - 1.0)))


def truncated_mean(x: ArrayLike, moment: float, order: float, delta: float, *, axis: int = -1) -> Floats:
    r"""Mean with every value beyond a threshold set to 0.

        (1/n) sum_i x_i 1{|x_i| <= M},      M = (u n / log(2/delta))^{1/r},      E|X|^r <= u

    With probability at least 1 - delta it is within  e u^{1/r} (log(2/delta) / n)^{1 - 1/r}  of E X, for every n.

    Proof. Let L = log(2/delta), Y = X 1{|X| <= M}. Bias: |E X - E Y| <= E|X|^r / M^{r-1} <= M L/n. Deviation:
    E Y^2 <= u M^{2-r}, and e^y <= 1 + y + (e - 2) y^2 for y <= 1, so E e^{(Y - E Y)/M} <= exp((e - 2) u / M^r) =
    exp((e - 2) L/n); by Chernoff P(mean - E Y > t) <= exp(-n t/M + (e - 2) L), which is delta/2 at t = (e - 1) M L/n,
    and the same below. In all e M L/n, the bound. (Bernstein's inequality gives 1 + sqrt(2) + 1/3 for e.)

    Departs: Bubeck et al. let the threshold of x_i grow with i, so that a running mean can be updated; the sample is
    complete here, one threshold is better and does not depend on the order of the values.

    Multiplying x by a and u by |a|^r multiplies the result by a. It is not shift-equivariant: truncation is towards 0,
    so centre x first if its mean is far from 0 on the scale of its spread.

    Args:
        x: values; `axis` holds the n of a sample, the others are replicates.
        moment: u > 0, bound on E|X|^r (about 0, not about the mean).
        order: r in (1, 2].
        delta: in (0, 1).

    Returns:
        x's shape without `axis`.

    Raises:
        ValueError: a bad argument.

    >>> truncated_mean([1.0, 2.0, 3.0, 1e9], moment=10.0, order=2.0, delta=0.1)
    array(1.5)
    """
    values = _samples(x, axis)
    threshold = (_moment("moment", moment) * values.shape[-1] / log(2.0 / _delta(delta))) ** (1.0 / _order(order))
    return np.asarray(np.where(np.abs(values) <= threshold, values, 0.0).mean(axis=-1))


def median_of_means(x: ArrayLike, delta: float, *, axis: int = -1) -> Floats:
    r"""Median of the means of k = ceil(2 log(1/delta) / log(4/3)) consecutive blocks of equal size, give or take one.

    If E|X - E X|^r <= v with r in (1, 2], then with probability at least 1 - delta it is within

        (2^{4-r} v / N^{r-1})^{1/r}  of E X,     N = floor(n/k) the smallest block         (2 sqrt(v / N) at r = 2).

    The estimate needs neither v nor r. Proof. (i) For 1 < r <= 2, |a + b|^r <= |a|^r + r sgn(a) |a|^{r-1} b +
    2^{2-r} |b|^r, as the derivative f' of |a|^r is Hoelder: |f'(x) - f'(y)| <= r 2^{2-r} |x - y|^{r-1}. Summed over a
    block of N centred values, the middle terms vanish in expectation: E|S_N|^r <= 2^{2-r} N v (von Bahr & Esseen 1965
    have 2 for 2^{2-r}). (ii) By Markov a block mean is off by more than eta with probability at most
    2^{2-r} v N^{1-r} / eta^r, which is 1/4 at the stated eta. (iii) The median is off only if half of the blocks are:
    probability at most P(Bin(k, 1/4) >= k/2) <= (4 (1/4)(3/4))^{k/2} = (3/4)^{k/2} <= delta by Chernoff, for both sides
    together.

    Departs: Bubeck et al. take about 8 log(1/delta) blocks (Hoeffding in (iii)) and drop the remainder of n/k. A sample
    too small for its delta raises an error here, because no such bound holds then.

    Shifting or scaling x (by any sign) does the same to the result.

    Args:
        x: i.i.d. values; `axis` holds the n of a sample, the others are replicates.
        delta: in (0, 1).

    Returns:
        x's shape without `axis`.

    Raises:
        ValueError: a bad argument, or n < k.

    >>> median_of_means([1.0, 2.0, 3.0, 2.0, 1.0, 1e9], delta=0.6)
    array(2.25)
    """
    values = _samples(x, axis)
    n = values.shape[-1]
    blocks = _blocks(n, delta)
    edges = np.arange(blocks + 1) * n // blocks
    return np.asarray(np.median(np.add.reduceat(values, edges[:-1], axis=-1) / np.diff(edges), axis=-1))


def catoni_mean(x: ArrayLike, variance: float, delta: float, *, axis: int = -1) -> Floats:
    r"""Catoni's M-estimator: the t at which influences that grow like a logarithm cancel.

        sum_i psi(alpha (x_i - t)) = 0,      psi(y) = sgn(y) log(1 + |y| + y^2/2),
        alpha = sqrt(2 L (n - 2 L) / v) / n,      L = log(2/delta),      Var X <= v

    For n > 2 L, with probability at least 1 - delta it is within  sqrt(2 v L / (n - 2 L))  of E X (Catoni 2012,
    Proposition 2.4; at most 2 sqrt(v L / n) if n >= 4 L): to first order the radius of the mean of Gaussian values. It
    needs a finite variance; the other two do not.

    Proof. psi(y) <= log(1 + y + y^2/2), so for d = t - E X, E exp(sum_i psi(alpha (X_i - t))) is at most
    exp(n (-alpha d + alpha^2 (v + d^2)/2)). By Markov, with probability 1 - delta/2 the sum is at most
    n (-alpha d + alpha^2 (v + d^2)/2) + L, which is 0 at d = (1 - sqrt(1 - alpha^2 v - 2 L/n)) / alpha =
    sqrt(2 v L / (n - 2 L)) for this alpha; the sum falls as t grows, so its root is not above E X + d. The same below,
    since psi is odd.

    Shifting x shifts the result; multiplying x by a and v by a^2 multiplies it by a. Solved by bisection to
    max(1e-15 / alpha, rounding).

    Args:
        x: values; `axis` holds the n of a sample, the others are replicates.
        variance: v > 0, bound on Var X.
        delta: in (0, 1); n > 2 log(2/delta).

    Returns:
        x's shape without `axis`.

    Raises:
        ValueError: a bad argument, or n <= 2 log(2/delta).

    >>> catoni_mean([1.0, 3.0] * 50 + [1e9], variance=1.0, delta=0.1).round(2)
    np.float64(3.66)
    """
    values = _samples(x, axis)
    n = values.shape[-1]
    level = _catoni_level(n, delta)
    alpha = sqrt(2.0 * level * (n - 2.0 * level)) / (n * sqrt(_moment("variance", variance)))
    low, high = values.min(axis=-1), values.max(axis=-1)
    while True:
        with np.errstate(over="ignore"):
            middle = 0.5 * low + 0.5 * high
            wide = high - low > np.maximum(1e-15 / alpha, 2.0 * np.spacing(np.maximum(np.abs(low), np.abs(high))))
            if not wide.any():
                return np.asarray(np.clip(middle, low, high))
            y = alpha * (values - middle[..., None])
        size = np.minimum(np.abs(y), 1e150)  # its square is finite; psi is past 690 there
        above = np.copysign(np.log1p(size * (1.0 + 0.5 * size)), y).sum(axis=-1) > 0
        low, high = np.where(wide & above, middle, low), np.where(wide & ~above, middle, high)


def deviation_bound(estimator: str, n: int, moment: float, delta: float, *, order: float = 2.0) -> float:
    r"""Error that a mean of n i.i.d. values exceeds with probability at most delta (theorem 8).

    - `"truncated_mean"`: e u^{1/r} (log(2/delta) / n)^{1 - 1/r}, with E|X|^r <= u
    - `"median_of_means"`: (2^{4-r} v / N^{r-1})^{1/r}, E|X - E X|^r <= v, N = floor(n/k), k as there
    - `"catoni_mean"`: sqrt(2 v L / (n - 2 L)), L = log(2/delta), Var X <= v; order 2 only
    - `"mean"`: (2^{2-r} v / (delta n^{r-1}))^{1/r}, E|X - E X|^r <= v: the plain average, by (i) of `median_of_means`
      and Markov. Its polynomial growth in 1/delta is real, not slack.

    Args:
        estimator: see above.
        n: values in the sample.
        moment: u or v > 0, as listed.
        delta: in (0, 1).
        order: r in (1, 2].

    Raises:
        ValueError: a bad argument, or n too small for delta (`median_of_means`, `catoni_mean`).

    >>> [round(deviation_bound(name, 400, 1.0, 1e-6), 3) for name in ("truncated_mean", "median_of_means", "mean")]
    [0.518, 1.0, 50.0]
    """
    check_choice("estimator", estimator, ("truncated_mean", "median_of_means", "catoni_mean", "mean"))
    size, u, r = integer("n", n, 1), _moment("moment", moment), _order(order)
    if estimator == "truncated_mean":
        return float(np.e * u ** (1.0 / r) * (log(2.0 / _delta(delta)) / size) ** (1.0 - 1.0 / r))
    if estimator == "median_of_means":
        return float((2.0 ** (4.0 - r) * u / (size // _blocks(size, delta)) ** (r - 1.0)) ** (1.0 / r))
    if estimator == "mean":
        return float((2.0 ** (2.0 - r) * u / (_delta(delta) * size ** (r - 1.0))) ** (1.0 / r))
    if r != 2.0:
        raise ValueError(f"order must be 2 for catoni_mean, got {order!r}")
    level = _catoni_level(size, delta)
    return sqrt(2.0 * u * level / (size - 2.0 * level))


def _tallies(correct: ArrayLike, trials: ArrayLike) -> tuple[Floats, Floats]:
    """Successes and trials, checked and broadcast against each other."""
    c, n = np.broadcast_arrays(np.asarray(correct, dtype=np.float64), np.asarray(trials, dtype=np.float64))
    for name, count in (("trials", n), ("correct", c)):
        check_entries(name, count, 0.0, 2**53)
        check_whole(name, count)
    if (c > n).any():
        raise ValueError(f"correct must be at most trials, got {c[c > n].flat[0]:g} of {n[c > n].flat[0]:g}")
    return c, n


def _samples(x: ArrayLike, axis: int) -> Floats:
    """`x` with its samples along the last axis, which is not empty; all finite."""
    values = np.asarray(x, dtype=np.float64)
    if not -values.ndim <= axis < values.ndim or values.shape[axis] == 0:
        raise ValueError(f"x must have at least one value along axis {axis}, got shape {values.shape}")
    check_entries("x", values)
    return np.moveaxis(values, axis, -1)


def _moment(name: str, value: float) -> float:
    return number(name, value, 0.0, open_low=True)


def _order(order: float) -> float:
    return number("order", order, 1.0, 2.0, open_low=True)


def _delta(delta: float) -> float:
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must lie in (0, 1), got {delta!r}")
    return float(delta)


def _blocks(n: int, delta: float) -> int:
    """Blocks of `median_of_means`."""
    blocks = ceil(2.0 * log(1.0 / _delta(delta)) / log(4.0 / 3.0))
    if n < blocks:
        raise ValueError(f"x must hold at least {blocks} values at delta = {delta:g}, got {n}")
    return blocks


def _catoni_level(n: int, delta: float) -> float:
    """log(2/delta), if `n` is large enough for `catoni_mean`."""
    level = log(2.0 / _delta(delta))
    if n <= 2.0 * level:
        raise ValueError(f"x must hold more than {2.0 * level:.4g} values at delta = {delta:g}, got {n}")
    return level
