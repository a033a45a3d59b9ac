"""Means under heavy tails: the bounds of theorem 8 hold at their delta, where the plain mean breaks them.

pass@k has its tests in test_core_small.py.
"""

from __future__ import annotations

from math import e, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import gamma
from scipy.stats import binom

from gdro_core.theory.estimators import (
    catoni_mean,
    deviation_bound,
    mean_at_k,
    median_of_means,
    pass_at_k,
    truncated_mean,
)

SEEDS = st.integers(0, 2**32 - 1)


class Pareto:
    """P(X > x) = x^-tail on [1, inf): skewed; infinite variance for tail <= 2."""

    def __init__(self, tail):
        self.tail, self.mean = tail, tail / (tail - 1)

    def sample(self, rng, shape):
        return rng.random(shape) ** (-1 / self.tail)

    def moment(self, order):
        return self.tail / (self.tail - order)

    def central_moment(self, order):
        below = quad(lambda x: (self.mean - x) ** order * self.tail * x ** (-self.tail - 1), 1, self.mean)[0]
        # beyond the mean, x = mean / s
        above = quad(lambda s: (1 - s) ** order * s ** (self.tail - order - 1), 0, 1)[0]
        return below + above * self.tail * self.mean ** (order - self.tail)


class StudentT:
    """Symmetric; infinite variance for tail <= 2."""

    def __init__(self, tail):
        self.tail, self.mean = tail, 0.0

    def sample(self, rng, shape):
        return rng.standard_t(self.tail, shape)

    def moment(self, order):
        nu = self.tail
        return nu ** (order / 2) * gamma((order + 1) / 2) * gamma((nu - order) / 2) / (sqrt(np.pi) * gamma(nu / 2))

    central_moment = moment


def errors(estimate, law, n, replicates, seed, chunk=5_000):
    """|estimate - mean| and |plain mean - mean| of many samples, a part at a time to bound memory."""
    rng = np.random.default_rng(seed)
    both = []
    for _ in range(replicates // chunk):
        x = law.sample(rng, (chunk, n))
        both.append(np.abs(np.stack([estimate(x), x.mean(axis=1)]) - law.mean))
    return np.concatenate(both, axis=1)


def assert_covered_where_the_mean_is_not(errors_seen, bound, delta):
    """At most delta of the estimates are outside the bound, but far more than delta of the plain means are.

    False alarm at most 1e-3 if the seed were new and the bound tight, which it is far from.
    """
    outside = (errors_seen > bound).sum(axis=1)
    replicates = errors_seen.shape[1]
    assert outside[0] <= binom.isf(1e-3, replicates, delta)
    assert outside[1] > binom.isf(1e-9, replicates, delta)
    assert outside[1] > 2 * delta * replicates


# tail index, order of the moment that is assumed, values, delta
HEAVY = [
    (Pareto(1.8), 1.5, 100, 1e-6),
    (Pareto(1.6), 1.3, 100, 1e-6),
    (StudentT(1.8), 1.5, 100, 1e-6),
    (StudentT(1.4), 1.2, 100, 1e-6),
]
NAMES = ["pareto1.8", "pareto1.6", "t1.8", "t1.4"]


@pytest.mark.parametrize(("law", "order", "n", "delta"), HEAVY, ids=NAMES)
def test_theorem_8_truncated_mean_is_covered_where_the_plain_mean_fails(law, order, n, delta):
    """Theorem 8, infinite variance: e u^(1/r) (log(2/delta)/n)^(1 - 1/r) holds; the mean exceeds it far more often."""
    moment = law.moment(order)
    bound = deviation_bound("truncated_mean", n, moment, delta, order=order)
    assert bound == pytest.approx(e * moment ** (1 / order) * (log(2 / delta) / n) ** (1 - 1 / order), rel=1e-12)
    errors_seen = errors(lambda x: truncated_mean(x, moment, order, delta), law, n, 100_000, 1)
    assert_covered_where_the_mean_is_not(errors_seen, bound, delta)


@pytest.mark.parametrize(("law", "order", "n", "delta"), HEAVY, ids=NAMES)
def test_theorem_8_median_of_means_is_covered_where_the_plain_mean_fails(law, order, n, delta):
    """Theorem 8, infinite variance: (2^(4-r) v / N^(r-1))^(1/r), blocks of N; the mean exceeds it far more often."""
    n, v = 4 * n, law.central_moment(order)
    blocks = int(np.ceil(2 * log(1 / delta) / log(4 / 3)))
    bound = deviation_bound("median_of_means", n, v, delta, order=order)
    assert bound == pytest.approx((2 ** (4 - order) * v / (n // blocks) ** (order - 1)) ** (1 / order), rel=1e-12)
    errors_seen = errors(lambda x: median_of_means(x, delta), law, n, 30_000, 2)
    assert_covered_where_the_mean_is_not(errors_seen, bound, delta)


@pytest.mark.parametrize("law", [Pareto(2.3), StudentT(2.3)], ids=["pareto2.3", "t2.3"])
def test_theorem_8_catoni_mean_is_covered_where_the_plain_mean_fails(law):
    """Theorem 8, barely finite variance: sqrt(2 v L / (n - 2 L)) holds at delta; the mean exceeds it more often."""
    n, delta = 60, 1e-5
    variance, level = law.moment(2.0) - law.mean**2, log(2 / delta)
    bound = deviation_bound("catoni_mean", n, variance, delta)
    assert bound == pytest.approx(sqrt(2 * variance * level / (n - 2 * level)), rel=1e-12)
    errors_seen = errors(lambda x: catoni_mean(x, variance, delta), law, n, 20_000, 3)
    assert_covered_where_the_mean_is_not(errors_seen, bound, delta)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.3, 0.1, 0.03, 0.01, 1e-3])
@pytest.mark.parametrize(("law", "order"), [(law, order) for law, order, _, _ in HEAVY], ids=NAMES)
def test_coverage_at_every_delta(law, order, delta):
    """All three bounds over 50 000 samples of 200, Catoni's at order 2 on a tail of 0.9 more."""
    n = 200
    lighter = type(law)(law.tail + 0.9)
    variance = lighter.moment(2.0) - lighter.mean**2
    for name, estimate, where, moment, r in (
        ("truncated_mean", lambda x: truncated_mean(x, law.moment(order), order, delta), law, law.moment(order), order),
        ("median_of_means", lambda x: median_of_means(x, delta), law, law.central_moment(order), order),
        ("catoni_mean", lambda x: catoni_mean(x, variance, delta), lighter, variance, 2.0),
    ):
        errors_seen = errors(estimate, where, n, 50_000, 4)[0]
        bound = deviation_bound(name, n, moment, delta, order=r)
        misses = (errors_seen > bound).sum()
        assert misses <= binom.isf(1e-4, errors_seen.size, delta)  # false alarm at most 1e-4 if new


def test_bounds_are_not_vacuous():
    """A two-point law comes within 3 of the truncated bound and within 2 of Catoni's at their own delta."""
    # Just beyond the threshold all of the moment is truncated: bias u / M^(r-1), 1/e of the bound, in every sample.
    n, order, delta, u = 200, 1.5, 0.05, 1.0
    threshold = (u * n / log(2 / delta)) ** (1 / order)
    value = threshold * 1.001
    assert truncated_mean(np.full(n, value), u, order, delta) == 0
    assert truncated_mean(np.full(n, 0.999 * threshold), u, order, delta) == pytest.approx(0.999 * threshold)
    bias = value * (u / value**order)  # E X for X = value with probability u / value^order
    assert bias > 0.99 / e * deviation_bound("truncated_mean", n, u, delta, order=order)
    # Catoni's bound against Gaussian values, whose mean is off by 1.96 / sqrt(n) at delta = 0.05.
    errors_seen = np.abs(catoni_mean(np.random.default_rng(0).normal(size=(4_000, n)), 1.0, 0.05))
    # the quantile, 1.96 / sqrt(n), is known to 2 %, half the bound is 1.4 / sqrt(n): no false alarm to fear
    assert np.quantile(errors_seen, 0.95) > deviation_bound("catoni_mean", n, 1.0, 0.05) / 2


@pytest.mark.parametrize("order", [1.2, 1.5, 2.0])
def test_moment_of_a_sum_grows_at_most_like_its_length(order):
    """Step (i) of median of means: |a+b|^r <= |a|^r + r sgn(a) |a|^(r-1) b + 2^(2-r) |b|^r."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_t(1.5, size=(2, 100_000))
    b[::2] = -2 * a[::2]  # equality at r = 2
    tangent = np.abs(a) ** order + order * np.sign(a) * np.abs(a) ** (order - 1) * b
    right = tangent + 2 ** (2 - order) * np.abs(b) ** order
    assert (np.abs(a + b) ** order <= right + 1e-9 * (1 + np.abs(right))).all()
    law = Pareto(3.5)
    centred = law.sample(rng, (50_000, 16)) - law.mean
    assert np.mean(np.abs(centred.sum(axis=1)) ** order) <= 2 ** (2 - order) * 16 * law.central_moment(order) * 1.05


@given(st.integers(1, 300), st.floats(0.001, 0.25))
def test_the_median_fails_only_as_often_as_half_the_blocks(blocks, q):
    """Step (iii) of median of means: P(Bin(k, q) >= k/2) <= (4 q (1 - q))^(k/2), at most (3/4)^(k/2) at q <= 1/4."""
    fails = binom.sf(np.ceil(blocks / 2) - 1, blocks, q)
    assert fails <= (4 * q * (1 - q)) ** (blocks / 2) * (1 + 1e-9)
    assert fails <= 0.75 ** (blocks / 2) * (1 + 1e-9)


@given(SEEDS)
def test_catoni_mean_solves_its_equation(seed):
    """The influences at the estimate sum to zero, for any sample and any guess of the variance."""
    rng = np.random.default_rng(seed)
    n, delta, variance = int(rng.integers(10, 60)), rng.uniform(0.05, 0.9), 10.0 ** rng.uniform(-3, 3)
    x = rng.standard_t(1.5, size=(4, n)) * 10.0 ** rng.uniform(-2, 2)
    level = log(2 / delta)
    alpha = sqrt(2 * level / (n * variance * (1 + 2 * level / (n - 2 * level))))  # as Catoni writes it
    y = alpha * (x - catoni_mean(x, variance, delta)[:, None])
    pull = np.sign(y) * np.log(1 + np.abs(y) + y * y / 2)
    assert (np.abs(pull.sum(axis=1)) <= 1e-11 * (1 + np.abs(pull).sum(axis=1) + np.abs(alpha * x).max())).all()


@given(SEEDS)
def test_median_of_means_is_the_median_of_the_block_means(seed):
    """Written out; blocks differ by at most one value, and at k = 1 it is the mean."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(20, 80))
    x = rng.standard_t(1.5, size=n)
    for delta in (0.9, 0.5, 0.1):
        k = int(np.ceil(2 * log(1 / delta) / log(4 / 3)))
        blocks = [x[i * n // k : (i + 1) * n // k] for i in range(k)]
        assert {block.size for block in blocks} <= {n // k, n // k + 1}
        assert median_of_means(x, delta) == pytest.approx(np.median([b.mean() for b in blocks]), rel=1e-12, abs=1e-12)
    assert median_of_means(x, 0.9) == pytest.approx(x.mean(), rel=1e-12)


@given(SEEDS, st.floats(-50, 50), st.floats(-3, 3).filter(lambda s: abs(s) > 1e-3))
def test_equivariance(seed, shift, scale):
    """Shift: median of means and Catoni. Scale, of either sign: all three, moments scaled along."""
    x = np.random.default_rng(seed).standard_t(1.5, size=(3, 60))
    moved, size = scale * x + shift, np.abs(x).max() + abs(shift)
    np.testing.assert_allclose(median_of_means(moved, 0.1), scale * median_of_means(x, 0.1) + shift, atol=1e-12 * size)
    expected = scale * catoni_mean(x, 2.0, 0.1) + shift
    np.testing.assert_allclose(catoni_mean(moved, 2.0 * scale**2, 0.1), expected, atol=1e-11 * size)
    truncated = truncated_mean(scale * x, 3.0 * abs(scale) ** 1.5, 1.5, 0.1)
    np.testing.assert_allclose(truncated, scale * truncated_mean(x, 3.0, 1.5, 0.1), atol=1e-12 * size)


@given(SEEDS, st.permutations(range(12)))
def test_order_of_the_values(seed, order):
    """Truncated and Catoni's means do not depend on it (median of means does, by its blocks)."""
    x = np.random.default_rng(seed).standard_t(1.5, size=12)
    np.testing.assert_allclose(truncated_mean(x[order], 2.0, 1.5, 0.1), truncated_mean(x, 2.0, 1.5, 0.1), atol=1e-13)
    np.testing.assert_allclose(catoni_mean(x[order], 2.0, 0.1), catoni_mean(x, 2.0, 0.1), rtol=1e-9, atol=1e-13)


def test_one_huge_value_moves_no_robust_mean_far():
    """1e300 among 200 values: truncated 0, its block lost, a logarithm; two of opposite signs cancel in Catoni's."""
    x = np.ones(200)
    x[17] = 1e300
    assert truncated_mean(x, 4.0, 1.5, 0.01) == pytest.approx(199 / 200)
    assert median_of_means(x, 0.01) == 1.0
    assert 1.0 < catoni_mean(x, 1.0, 0.01) < 100.0
    x[18] = -1e300
    assert catoni_mean(x, 1.0, 0.01) == pytest.approx(1.0, abs=1e-9)
    assert np.isfinite(catoni_mean(np.array([1.7e308, -1.7e308] * 10), 1e-300, 0.1))
    assert catoni_mean(np.full(20, 3.0), 1e-300, 0.1) == 3.0


def test_axis_and_shape():
    """Samples along any axis, replicates along the others."""
    x = np.random.default_rng(0).standard_t(2.5, size=(2, 40, 3))
    for estimate in (
        lambda x, **k: truncated_mean(x, 2.0, 1.5, 0.1, **k),
        lambda x, **k: median_of_means(x, 0.1, **k),
        lambda x, **k: catoni_mean(x, 2.0, 0.1, **k),
    ):
        estimates = estimate(x, axis=1)
        assert estimates.shape == (2, 3)
        np.testing.assert_allclose(estimates, estimate(np.moveaxis(x, 1, -1)), rtol=1e-12)
        np.testing.assert_allclose(estimates[1, 2], estimate(x[1, :, 2]), rtol=1e-9)
        assert np.shape(estimate(x[0, :, 0])) == ()


def test_bounds_shrink_with_the_sample_and_grow_with_confidence():
    """Log-log slope 1/r - 1 in n; robust bounds grow with a power of log(1/delta), the mean's with one of 1/delta."""
    for order in (1.2, 1.5, 2.0):
        for name in ("truncated_mean", "mean"):
            far, near = (deviation_bound(name, n, 2.0, 0.01, order=order) for n in (10**6, 10**4))
            assert log(far / near) / log(100) == pytest.approx(1 / order - 1, abs=1e-9)
        far, near = (deviation_bound("median_of_means", n, 2.0, 0.01, order=order) for n in (10**7, 10**5))
        assert log(far / near) / log(100) == pytest.approx(1 / order - 1, abs=1e-3)
    assert deviation_bound("mean", 10**4, 2.0, 0.01, order=1.5) == pytest.approx(
        (sqrt(2) * 2.0 / (0.01 * 100)) ** (2 / 3)
    )
    assert deviation_bound("mean", 10**4, 2.0, 0.01) == pytest.approx(sqrt(2.0 / (0.01 * 10**4)))  # Chebyshev
    assert deviation_bound("catoni_mean", 10**6, 2.0, 0.01) == pytest.approx(sqrt(4 * log(200) / 10**6), rel=1e-4)
    for name in ("truncated_mean", "median_of_means", "catoni_mean"):
        ratio = deviation_bound(name, 10**4, 1.0, 1e-12) / deviation_bound(name, 10**4, 1.0, 1e-6)
        assert 1.3 < ratio < 1.5
    assert deviation_bound("mean", 10**4, 1.0, 1e-12) / deviation_bound("mean", 10**4, 1.0, 1e-6) == pytest.approx(1e3)


@given(st.integers(2, 30), st.floats(1e-9, 1 - 1e-9))
def test_mean_at_k_and_its_variance_are_unbiased(k, p):
    """Over c ~ Bin(k, p): E mean = p, E variance = p (1 - p)/k, by exact enumeration; the mean is pass@1."""
    c = np.arange(k + 1)
    mean, variance = mean_at_k(c, k)
    assert binom.pmf(c, k, p) @ mean == pytest.approx(p, abs=1e-12)
    assert binom.pmf(c, k, p) @ variance == pytest.approx(p * (1 - p) / k, abs=1e-12)
    np.testing.assert_allclose(mean, pass_at_k(c, k, 1), atol=1e-15)
    samples = np.repeat([1.0, 0.0], [1, k - 1])
    assert mean_at_k(1, k).variance == pytest.approx(samples.var(ddof=1) / k, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_at_k([1], 1), "trials must be at least 2, got 1"),
        (lambda: mean_at_k([5], 4), "correct must be at most trials, got 5 of 4"),
        (lambda: mean_at_k([0.5], 4), "correct must hold integers, got 0.5"),
        (lambda: truncated_mean([], 1.0, 1.5, 0.1), r"x must have at least one value along axis -1, got shape \(0,\)"),
        (lambda: truncated_mean(1.0, 1.0, 1.5, 0.1), r"x must have .* got shape \(\)"),
        (lambda: truncated_mean([1.0], 1.0, 1.5, 0.1, axis=1), "x must have at least one value along axis 1"),
        (lambda: truncated_mean([1.0, np.nan], 1.0, 1.5, 0.1), "x must hold finite numbers, got nan"),
        (lambda: truncated_mean([1.0], 0.0, 1.5, 0.1), r"moment must lie in \(0, inf\], got 0.0"),
        (lambda: truncated_mean([1.0], 1.0, 1.0, 0.1), r"order must lie in \(1, 2\], got 1.0"),
        (lambda: truncated_mean([1.0], 1.0, 2.5, 0.1), "order must lie in .*2.5"),
        (lambda: truncated_mean([1.0], 1.0, 1.5, 0.0), r"delta must lie in \(0, 1\), got 0.0"),
        (lambda: median_of_means([1.0], 1.0), r"delta must lie in \(0, 1\), got 1.0"),
        (lambda: median_of_means([1.0], np.nan), r"delta must lie in \(0, 1\), got nan"),
        (lambda: median_of_means(np.ones(16), 0.1), "x must hold at least 17 values at delta = 0.1, got 16"),
        (lambda: median_of_means([np.inf], 0.9), "x must hold finite numbers, got inf"),
        (lambda: catoni_mean(np.ones(5), 1.0, 0.1), r"x must hold more than 5\.991 values at delta = 0.1, got 5"),
        (lambda: catoni_mean(np.ones(9), 0.0, 0.1), r"variance must lie in \(0, inf\], got 0.0"),
        (lambda: catoni_mean([[]], 1.0, 0.1), "x must have at least one value"),
        (lambda: deviation_bound("median", 10, 1.0, 0.1), "estimator must be one of .* got 'median'"),
        (lambda: deviation_bound("mean", 0, 1.0, 0.1), "n must be an integer >= 1, got 0"),
        (lambda: deviation_bound("mean", 10, -1.0, 0.1), "moment must lie in .*-1.0"),
        (lambda: deviation_bound("mean", 10, 1.0, 1.5), "delta must lie in .*1.5"),
        (lambda: deviation_bound("catoni_mean", 10, 1.0, 0.1, order=1.5), "order must be 2 for catoni_mean, got 1.5"),
        (lambda: deviation_bound("catoni_mean", 5, 1.0, 0.1), "x must hold more than .* got 5"),
        (lambda: deviation_bound("median_of_means", 16, 1.0, 0.1), "x must hold at least 17 values"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
