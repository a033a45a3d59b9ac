r"""Which weights and counts make most progress: signal against noise, group by group (theorems 15 to 18).

The square-root law (Theorem 4.2) answers another question: given the weights, which counts make the variance of the
gradient least? Here weights and counts are chosen together, for the gain of a step of given length.

The model. Prompt i has pass rate p, v = p (1 - p), and n rollouts, K of them right; X = n k (1 - k), k = K / n. With
advantages r_j - k its summed gradient G_i, given the rewards, has

- mean a_i X, where E X = v (n - 1): one rollout pays for the baseline, each further one is worth v (theorem 15). a_i is
  the mean score of right minus that of wrong responses. One part of it is common to the prompts, along which a_i X
  gains lambda_i X; the other, of mean square tau^2, is the prompt's own and helps no other prompt;
- noise sigma^2 X, sigma^2 the variance of the score given the reward.

The step is sum_i w_i G_i over its root mean square length; kappa = tau^2 / sigma^2; p, lambda and kappa are known.
`gdro_core.allocation.frontier_allocation` spends a budget by these utilities.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._counts import spread_ratio
from gdro_core._validate import Floats, check_entries, floats, number
from gdro_core.grpo import gradient_variance, gradient_weight


def group_efficiency(n: ArrayLike, p: ArrayLike, estimator: str = "grpo") -> Floats:
    r"""Signal^2 / noise of a group's gradient over the most that any scale of the advantages reaches (theorem 15).

    With advantages A_j = f(K) (r_j - K / n) the summed gradient has signal a E[f n k (1 - k)], k = K / n, and noise
    sigma^2 E[f^2 n k (1 - k)], so signal^2 / noise <= (a^2 / sigma^2) (n - 1) p (1 - p), with equality where f is
    constant on mixed groups: 1 for `"dr_grpo"` and `"rloo"`. For `"grpo"` the ratio is

        E[x]^2 / E[x^2],     x = 1 / sqrt((J + 1) (n - 1 - J)),   J ~ Binomial(n - 2, p).

    It is 1 for n = 2 and 3, at least .962 for n <= 12 and .937 for n <= 64, for every p; as n grows the least value
    falls to .9305 (at n p = 2.26).

    Args:
        n: rollouts, integers >= 2; broadcast against p.
        p: pass rates in [0, 1]; 1 at the ends, by continuity.
        estimator: `"grpo"`, `"dr_grpo"` or `"rloo"`.

    Returns:
        float64 array of the common shape, in (0, 1].

    Raises:
        ValueError: a bad argument.

    >>> group_efficiency([2, 4, 12], [0.5, 0.5, 0.135]).round(3)
    array([1.   , 0.995, 0.963])
    >>> group_efficiency(12, 0.2, "rloo").round(12)
    np.float64(1.0)
    """
    weight, noise = gradient_weight(n, p, estimator), gradient_variance(n, p, estimator)
    size, rate = np.asarray(n, dtype=np.float64), np.asarray(p, dtype=np.float64)
    check_entries("n", size, 2.0)
    silent = noise == 0.0  # p = 0 or 1
    ratio = weight**2 * rate * (1.0 - rate) / ((size - 1.0) * np.where(silent, 1.0, noise))
    return np.asarray(np.where(silent, 1.0, ratio))[()]


def frontier_utility(n: ArrayLike, value: ArrayLike, variance: ArrayLike, kappa: ArrayLike) -> Floats:
    r"""What n rollouts of a prompt add to signal^2 / noise of a step under the best weights (theorem 16).

        U(n) = lambda^2 E[X]^2 / (E[X] + kappa E[X^2])                                       at n >= 2, else 0
             = lambda^2 v / ((1 + 2 kappa v) / (n - 1) + kappa (1 - 6 v) / n + kappa v)

    Under the weights of `frontier_weight` the squared signal of the step over its noise is sum_i U_i(n_i), and no other
    weights reach more. U is non-decreasing and concave from n = 1 on, and not from 0 on. If p has a posterior, weights
    fixed before the rollouts reach U at v = E[v^2] / E[v] and lambda = E[lambda v] / sqrt(E[v^2]), not E U, which is
    larger.

    Args:
        n: rollouts, >= 0; all broadcast against each other.
        value: lambda, what a push on the prompt's logit is worth. Without transfer between prompts it is 1 - p for the
            objective sum log p, p (1 - p) for the mean of p, k p (1 - p)^k for pass@k.
        variance: v = p (1 - p) in [0, 1/4].
        kappa: >= 0, tau^2 / sigma^2: mean square of the own part of a over the noise of a rollout.

    Returns:
        float64 array of the common shape.

    Raises:
        ValueError: a bad argument.

    >>> frontier_utility(np.arange(5), [[1.0], [0.5]], 0.25, kappa=0.5).round(3)
    array([[0.   , 0.   , 0.2  , 0.375, 0.522],
           [0.   , 0.   , 0.05 , 0.094, 0.13 ]])
    """
    pushed, signal, own = _prompts(n, value, variance, kappa)
    return np.asarray(pushed**2 * signal / (1.0 + own))[()]


def frontier_weight(n: ArrayLike, value: ArrayLike, variance: ArrayLike, kappa: ArrayLike) -> Floats:
    r"""Best weight of a prompt's summed gradient (advantages r_j - k), up to a scale (theorem 16).

        w = lambda / (1 + kappa E[X^2] / E[X]),      E[X^2] / E[X] = v (n - 1) + ((n - 1) (1 - 4 v) + 2 v) / n

    A Wiener filter: the more of a group's gradient is the prompt's own, the less weight it gets. If p has a
    posterior, v = E[v^2] / E[v] and lambda = E[lambda v] / E[v]. Arguments, shape and errors as in `frontier_utility`;
    at n < 2, where there is no gradient, the formula's value at n = 1.

    >>> frontier_weight([2, 4, 12], 1.0, 0.25, kappa=0.5).round(3)
    array([0.8  , 0.696, 0.417])
    """
    pushed, _, own = _prompts(n, value, variance, kappa)
    return np.asarray(pushed / (1.0 + own))[()]


def step_cosine(utility: ArrayLike, common: float) -> Floats:
    r"""Gain of a step over that of a step of the same length without noise (theorem 16).

        sqrt(c t / (1 + c t)),    t = sum_i U_i(n_i), the sum of `frontier_utility`

    It grows with t, so the best t is the best plan, and it is flat where c t is large: a batch whose noise is averaged
    out gains nothing by a better plan. For lambda = 1 it is the cosine between the step and the common direction.

    Args:
        utility: t >= 0, any shape.
        common: c >= 0, square of the common part of a over sigma^2.

    Returns:
        Values in [0, 1), of the shape of `utility`.

    Raises:
        ValueError: a bad argument.

    >>> step_cosine([1.0, 10.0, 20.0], common=0.5).round(3)
    array([0.577, 0.913, 0.953])
    """
    total = np.asarray(utility, dtype=np.float64)
    check_entries("utility", total, 0.0)
    ratio = number("common", common, 0.0) * total
    return np.asarray(np.sqrt(ratio / (1.0 + ratio)))[()]


def best_group_size(kappa: ArrayLike, variance: ArrayLike) -> Floats:
    r"""Real n that makes U(n) / n, progress per rollout, greatest (theorem 17).

        n* = 1 + sqrt(2 + 1 / (kappa v))

    The best integer is the n with 1 / (n (n - 1)) <= kappa v / (1 + 2 kappa v) <= 1 / ((n - 1) (n - 2)): it is never 2.
    If all prompts have one n and equal weights, the law holds with v = E[v^2] / E[v] over prompts.

    Args:
        kappa: >= 0, as in `frontier_utility`; broadcast against variance.
        variance: v = p (1 - p) in [0, 1/4].

    Returns:
        float64 array of the common shape; infinite at kappa v = 0.

    Raises:
        ValueError: a bad argument.

    >>> best_group_size([2.5, 0.05, 0.0], 0.15).round(2)
    array([ 3.16, 12.63,   inf])
    """
    ratio, v = np.asarray(kappa, dtype=np.float64), np.asarray(variance, dtype=np.float64)
    check_entries("kappa", ratio, 0.0)
    check_entries("variance", v, 0.0, 0.25)
    with np.errstate(divide="ignore"):
        return np.asarray(1.0 + np.sqrt(2.0 + 1.0 / (ratio * v)))[()]


def group_size_gain(n: ArrayLike, kappa: float, variance: ArrayLike) -> Floats:
    r"""Progress per rollout if all prompts, with the pass rates of a pool, get n rollouts (theorem 17).

        mean_i U_i(n) / n      at lambda = 1, with the weights of `frontier_weight`

    A budget of B rollouts on B / n prompts of the pool has t = B times this (`step_cosine`). Its best n lies between
    the least and the greatest `best_group_size` of the pool.

    Args:
        n: (A,) group sizes >= 1, or one.
        kappa: >= 0, as in `frontier_utility`.
        variance: (M,) v_i = p_i (1 - p_i) in [0, 1/4].

    Returns:
        (A,) gains, or one.

    Raises:
        ValueError: a bad argument.

    >>> group_size_gain([2, 3, 4, 12], 2.5, [0.09, 0.21]).round(4)
    array([0.0333, 0.0375, 0.0364, 0.0216])
    """
    size = np.asarray(n, dtype=np.float64)
    check_entries("n", size, 1.0)
    v = floats("variance", variance, (-1,), 0.0, 0.25)
    if v.size == 0:
        raise ValueError("variance must have at least one entry, got none")
    return np.asarray((frontier_utility(size[..., None], 1.0, v, kappa) / size[..., None]).mean(axis=-1))[()]


def purity(rate: ArrayLike, phi: float) -> Floats:
    r"""Separation of the scores by graded rewards over that by true ones, if a grade is turned round with chance phi.

    Graded right with rate r = phi + (1 - 2 phi) p, a prompt has (corollary of theorem 16)

        u = (1 - 2 phi) p (1 - p) / (r (1 - r)) = (1 - phi (1 - phi) / (r (1 - r))) / (1 - 2 phi),

    and 0 for r outside (phi, 1 - phi): graded right no more often than by mistake, it is worth nothing. Theorem 16
    holds with lambda u for lambda, r (1 - r) for v and kappa u^2 for kappa, in the utility and in the weight.

    Args:
        rate: r in [0, 1], any shape.
        phi: in [0, 1/2).

    Returns:
        float64 array of u in [0, 1 - 2 phi]; 1 at phi = 0.

    Raises:
        ValueError: a bad argument.

    >>> purity([0.05, 0.1, 0.5, 0.95], 0.05).round(3)
    array([0.   , 0.525, 0.9  , 0.   ])
    """
    graded = np.asarray(rate, dtype=np.float64)
    check_entries("rate", graded, 0.0, 1.0)
    error = number("phi", phi, 0.0)
    if error >= 0.5:
        raise ValueError(f"phi must lie in [0, 0.5), got {phi!r}")
    spread = graded * (1.0 - graded)
    noise = error * (1.0 - error)
    clean = np.where(spread > noise, 1.0 - noise / np.where(spread > 0.0, spread, 1.0), float(error == 0.0))
    return np.asarray(clean / (1.0 - 2.0 * error))[()]


def _prompts(n: ArrayLike, value: ArrayLike, variance: ArrayLike, kappa: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """lambda, E[X] and kappa E[X^2] / E[X], of checked arguments."""
    size, pushed, v, ratio = (np.asarray(x, dtype=np.float64) for x in (n, value, variance, kappa))
    check_entries("n", size, 0.0)
    check_entries("value", pushed)
    check_entries("variance", v, 0.0, 0.25)
    check_entries("kappa", ratio, 0.0)
    size = np.maximum(size, 1.0)
    return pushed, np.asarray(v * (size - 1.0)), np.asarray(ratio * spread_ratio(size, v))
