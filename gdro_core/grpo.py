r"""How the number of rollouts enters the gradient of a prompt: as a weight, and as a variance (F6, theorem 10).

The model. A prompt has pass rate p(theta); n rollouts get rewards r_j in {0, 1}, K of them 1, and advantages

    A_j = c_K (r_j - K/n),     c_K = 1 / s_K (`"grpo"`, Eq. 3),   1 (`"dr_grpo"`),   n / (n - 1) (`"rloo"`),

with s_K^2 = (K/n)(1 - K/n), the population variance of the group; groups with s_K = 0 give no gradient. The estimate is
g = (1/n) sum_j A_j z_j with z_j = grad log pi(y_j), seen along one direction. Because E z = 0 and E[r z] = grad p,

    E[z | r = 1] = grad p / p,   E[z | r = 0] = -grad p / (1 - p),   a = their difference = grad p / (p (1 - p)).

Given K, sum_j A_j E[z_j | r_j] / n and, if z has variance sigma^2 around either mean, sum_j A_j^2 sigma^2 / n^2 are

    E[g | K] = a c_K s_K^2,      Var[g | K] = sigma^2 c_K^2 s_K^2 / n;    hence, by finite sums over K ~ Binomial(n, p),
    E g = a E[c_K s_K^2] = w_n(p) grad p,      Var g = sigma^2 E[c_K^2 s_K^2] / n + a^2 Var(c_K s_K^2).

Rewards scaled by x (x = 2 for rewards of +-1) leave `"grpo"` as it is and multiply g by x otherwise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, Ints, check_choice, floats, integers, number

ESTIMATORS = ("grpo", "dr_grpo", "rloo")


def gradient_weight(n: ArrayLike, p: ArrayLike, estimator: str = "grpo") -> Floats:
    r"""w_n(p): the expected gradient of a prompt with n rollouts is w_n(p) grad p (F6).

    - `"grpo"`: E sqrt((K/n)(1 - K/n)) / (p (1 - p)) = (n - 1) E[1 / sqrt((J + 1)(n - 1 - J))], J ~ Binomial(n - 2, p).
      The second form, from C(n, k) = n (n - 1) / (k (n - k)) C(n - 2, k - 1), is exact at p = 0 and 1 too, where
      w_n = sqrt(n - 1). w_2 = 1 for all p; w_n(p) = w_n(1 - p); w_n grows with n (sqrt(m (1 - m)) is concave in the
      mean m of a group, which is the average of its leave-one-out means) towards 1 / sqrt(p (1 - p)). For n >= 2, from
      n - 1 <= (J + 1)(n - 1 - J) <= (n/2)^2 and E s <= sqrt(E s^2):
      2 (n - 1) / n <= w_n(p) <= min(sqrt(n - 1), sqrt((n - 1) / (n p (1 - p)))).
    - `"dr_grpo"`: (n - 1) / n.
    - `"rloo"`: 1.

    At n = 1 the weight is 0 (no baseline, no gradient), and `"rloo"` is not defined. An implementation that divides by
    the sample standard deviation (n - 1 in its denominator) has sqrt(1 - 1/n) times the weight of `"grpo"`.

    Args:
        n: rollouts, integers >= 1; broadcast against p.
        p: pass rates in [0, 1].
        estimator: see above.

    Returns:
        float64 array of the common shape.

    Raises:
        ValueError: a bad argument.

    >>> gradient_weight([2, 4, 12], 0.05).round(2)
    array([1.  , 1.71, 2.94])
    >>> gradient_weight(12, [0.0, 0.5]).round(2)
    array([3.32, 1.91])
    """
    rollouts, rate = _group(n, p, estimator)
    if estimator == "rloo":
        return np.ones(rollouts.shape)
    if estimator == "dr_grpo":
        return np.asarray((rollouts - 1.0) / rollouts)
    j, pmf = _binomial(np.maximum(rollouts - 2, 0), rate)
    spread = (j + 1.0) * np.maximum(rollouts[..., None] - 1.0 - j, 1.0)  # at least 1 where the pmf is not 0
    return np.asarray((rollouts - 1.0) * (pmf / np.sqrt(spread)).sum(axis=-1))


def gradient_variance(
    n: ArrayLike, p: ArrayLike, estimator: str = "grpo", *, score_variance: float = 1.0, separation: float = 0.0
) -> Floats:
    r"""Variance of the gradient estimate of a prompt with n rollouts, rewards in {0, 1} (theorem 10).

        Var g = sigma^2 E[c_K^2 s_K^2] / n + a^2 Var(c_K s_K^2)           (model and proof: the head of this file)

    The first term is noise of the score within right and within wrong responses:

    - `"grpo"`: sigma^2 (1 - p^n - (1 - p)^n) / n
    - `"dr_grpo"`: sigma^2 p (1 - p) (n - 1) / n^2
    - `"rloo"`: sigma^2 p (1 - p) / (n - 1)

    The last two times 4 are theorem 10's formulas, for rewards of +-1 (VIP, arXiv 2602.01601). They are the whole
    variance only if scores do not depend on rewards (a = 0), and then the expected gradient is 0. The second term is
    the noise of the signal itself: K varies, and with it c_K s_K^2. A score's own variance is sigma^2 + a^2 p (1 - p).

    Args:
        n: rollouts, integers >= 1 (>= 2 for `"rloo"`); broadcast against p.
        p: pass rates in [0, 1].
        estimator: `"grpo"`, `"dr_grpo"` or `"rloo"`.
        score_variance: sigma^2 >= 0, variance of the score given the reward.
        separation: a, mean score of right minus that of wrong responses; grad p / (p (1 - p)).

    Returns:
        float64 array of the common shape.

    Raises:
        ValueError: a bad argument.

    >>> gradient_variance([2, 4, 8], 0.5, "rloo")
    array([0.25      , 0.08333333, 0.03571429])
    >>> gradient_variance(4, [0.05, 0.5]).round(3)
    array([0.046, 0.219])
    """
    rollouts, rate = _group(n, p, estimator)
    noise = number("score_variance", score_variance, 0.0)
    signal = number("separation", separation, -np.inf)
    successes, pmf = _binomial(rollouts, rate)
    size = rollouts[..., None]
    mean = np.minimum(successes / size, 1.0)  # beyond K = n the pmf is 0
    variance = mean * (1.0 - mean)
    if estimator == "grpo":
        square, pull = (variance > 0).astype(np.float64), np.sqrt(variance)
    else:
        factor = size / (size - 1.0) if estimator == "rloo" else np.ones(size.shape)
        square, pull = factor**2 * variance, factor * variance
    expected = (pmf * pull).sum(axis=-1, keepdims=True)
    spread = (pmf * (pull - expected) ** 2).sum(axis=-1)
    return np.asarray(noise * (pmf * square).sum(axis=-1) / rollouts + signal**2 * spread)


def mixed_group_probability(n: ArrayLike, p: ArrayLike) -> Floats:
    r"""1 - p^n - (1 - p)^n: probability that n rollouts are neither all right nor all wrong, hence give a gradient.

    Computed without cancellation at either end: n p to first order as p falls to 0, n >= 2. Its expectation under a
    Beta posterior of p is `rollout_utility("mixed", ...)`.

    Args:
        n: rollouts, integers >= 1; broadcast against p.
        p: pass rates in [0, 1].

    Returns:
        float64 array of the common shape.

    Raises:
        ValueError: a bad argument.

    >>> mixed_group_probability([1, 2, 8], 0.5)
    array([0.       , 0.5      , 0.9921875])
    >>> mixed_group_probability(8, 1e-20)
    array(8.e-20)
    """
    rollouts, rate = _group(n, p, "grpo")
    rare = np.minimum(rate, 1.0 - rate)
    mixed = -np.expm1(rollouts * np.log1p(-rare)) - rare**rollouts
    return np.asarray(np.where(rollouts > 1, mixed, 0.0))


def decoupling_price(weights: ArrayLike, variance: ArrayLike, share: ArrayLike | None = None) -> float:
    r"""What it costs to allocate rollouts without looking at the prompt weights (F7): a factor >= 1 on the variance.

    The weighted gradient has variance sum_b q_b w_b^2 v_b / n_b, least under sum_b q_b n_b = n_bar at n_b proportional
    to w_b sqrt(v_b) (Theorem 4.2 with w_b^2 v_b for v_b), where it is (sum_b q_b w_b sqrt(v_b))^2 / n_bar. With n_b
    proportional to sqrt(v_b) it is (sum_b q_b w_b^2 sqrt(v_b)) (sum_b q_b sqrt(v_b)) / n_bar. Their ratio is

        E[w^2] / E[w]^2 = 1 + CV^2(w)      under the probability proportional to q_b sqrt(v_b), whatever n_bar.

    Args:
        weights: (B,) w_b >= 0.
        variance: (B,) v_b >= 0, gradient variance of one rollout.
        share: (B,) q_b >= 0 with sum 1; uniform if None.

    Raises:
        ValueError: a bad argument, or no bin with weight, variance and share above 0.

    >>> decoupling_price([2.0, 0.5], [0.25, 0.25], share=[1 / 3, 2 / 3])
    1.5
    """
    v = floats("variance", variance, (-1,), 0.0)
    w = floats("weights", weights, v.shape, 0.0)
    q = np.full(v.shape, 1.0 / max(v.size, 1)) if share is None else floats("share", share, v.shape, 0.0)
    if v.size == 0 or abs(q.sum() - 1.0) > 1e-9:
        raise ValueError(f"share must have at least one entry and sum to 1, got {q.size} with sum {q.sum()}")
    measure = q * np.sqrt(v)
    if not (measure * w).any():
        raise ValueError("weights, variance and share must all be above 0 in at least one bin")
    measure, w = measure / measure.max(), w / w.max()
    measure /= measure.sum()
    mean = float(measure @ w)
    return 1.0 + float(measure @ (w / mean - 1.0) ** 2)


def _group(n: ArrayLike, p: ArrayLike, estimator: str) -> tuple[Ints, Floats]:
    """n and p, checked and broadcast against each other."""
    check_choice("estimator", estimator, ESTIMATORS)
    sizes, rates = np.broadcast_arrays(np.asarray(n, dtype=np.float64), np.asarray(p, dtype=np.float64))
    low = 2 if estimator == "rloo" else 1
    rollouts = integers("n", sizes.ravel(), (-1,), low, 2**20).reshape(sizes.shape)
    return rollouts, floats("p", rates.ravel(), (-1,), 0.0, 1.0).reshape(rates.shape)


def _binomial(trials: Ints, p: Floats) -> tuple[Floats, Floats]:
    """j = 0..max(trials), and (..., max + 1) P(J = j) of Binomial(trials, p); 0 beyond the trials of an entry."""
    most = int(trials.max(initial=0))
    j = np.arange(most + 1.0)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, most + 1.0)))])
    missed = trials[..., None] - j  # wrong answers; negative: out of the support
    log_ways = log_factorial[trials][..., None] - log_factorial - log_factorial[np.maximum(missed, 0).astype(np.int64)]
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 log 0 = 0 below
        hits = np.where(j > 0, j * np.log(p)[..., None], 0.0)
        misses = np.where(missed > 0, missed * np.log1p(-p)[..., None], 0.0)
    return j, np.where(missed >= 0, np.exp(log_ways + hits + misses), 0.0)
