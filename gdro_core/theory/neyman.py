r"""Adaptive Neyman allocation: learn while sampling where samples are worth most (theorem 9).

One problem: unit t has outcomes y_t(b), of which the sampled bin's is seen; choose the probabilities p_t in the simplex

    min  sum_t sum_b y_t(b)^2 / p_t(b),

the variance of the inverse-probability estimate of a sum over bins (up to a term that no p changes). In hindsight the
best fixed p is Neyman's, p_b ∝ sqrt(sum_t y_t(b)^2): the square-root law of Theorem 4.2. Feed deviations from the mean
where the estimator is stratified.
"""

from __future__ import annotations

from math import log, sqrt

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, floats, integer, integers


def neyman_regret(probabilities: ArrayLike, outcomes: ArrayLike) -> Floats:
    r"""Variance paid above the best fixed allocation in hindsight (Dai, Gradu and Harshaw 2023).

        R = sum_t sum_b y_t(b)^2 / p_t(b) - min_p sum_t sum_b y_t(b)^2 / p_b

    The minimum is (sum_b sqrt(sum_t y_t(b)^2))^2.

    Args:
        probabilities: (..., T, B) > 0, rows sum to 1.
        outcomes: (..., T, B).

    Returns:
        (...) regrets.

    >>> neyman_regret([[0.5, 0.5], [0.75, 0.25]], [[3.0, 1.0], [3.0, 1.0]]).round(9)  # 20 + 16 - 2 x 16
    np.float64(4.0)
    """
    p = np.asarray(probabilities, dtype=np.float64)
    y = np.asarray(outcomes, dtype=np.float64)
    if p.ndim < 2 or p.shape != y.shape:
        raise ValueError(f"outcomes must have the shape (..., T, B) of probabilities, got {y.shape} and {p.shape}")
    if not (p > 0).all() or not np.isfinite(y).all() or np.abs(p.sum(axis=-1) - 1.0).max(initial=0.0) > 1e-9:
        raise ValueError("probabilities must be positive with rows that sum to 1, and outcomes finite")
    best = np.sqrt((y**2).sum(axis=-2)).sum(axis=-1) ** 2
    return np.asarray((y**2 / p).sum(axis=(-2, -1)) - best)[()]


class ClipOGD:
    r"""Clip-OGD for two arms: online gradient descent on the treatment probability, inside a slowly widening interval.

        p_t = clip(p_{t-1} - eta g_{t-1}, delta_t, 1 - delta_t),   delta_t = t^(-1/alpha) / 2,   p_0 = 1/2, g_0 = 0
        g_t = y_t^2 (-z_t / p_t^3 + (1 - z_t) / (1 - p_t)^3),      eta = 1 / sqrt(T),   alpha = sqrt(5 ln T)

    (Dai, Gradu and Harshaw 2023, Algorithm 1.) g_t is unbiased for the slope of y(1)^2 / p + y(0)^2 / (1 - p), and
    delta_t keeps E g_t^2 <= 64 max y^4 t^(5/alpha). Descent therefore has expected Neyman regret
    O(sqrt(T) e^{sqrt(5 ln T)}) = Õ(sqrt(T)) on every bounded sequence whose best p stays away from 0 and 1: such a p is
    inside the interval from t = (2 min(p, 1 - p))^-alpha on, a number of steps below any power of T.

    Args:
        horizon: T >= 2.
        replicates: shape of independent copies.

    >>> design = ClipOGD(horizon=100)
    >>> design.probability
    np.float64(0.5)
    >>> design.update(treated=1, outcome=0.5)  # treated units vary: treat more; 1/2 + 2/10 is beyond 1 - delta_2
    >>> design.probability.round(4)
    np.float64(0.5673)
    """

    def __init__(self, horizon: int, *, replicates: tuple[int, ...] = ()) -> None:
        self.horizon = integer("horizon", horizon, 2)
        self.replicates = replicates
        self._steps = 0
        self._probability = np.full(replicates, 0.5)

    @property
    def probability(self) -> Floats:
        """Probability of treatment of the coming unit, per replicate."""
        return self._probability[()]

    def update(self, treated: ArrayLike, outcome: ArrayLike) -> None:
        """Learn from one unit: whether it was treated (0 or 1) and the outcome seen, both of shape `replicates`."""
        z = integers("treated", treated, self.replicates, 0, 1)
        y = floats("outcome", outcome, self.replicates)
        p = self._probability
        slope = y**2 * np.where(z == 1, -1.0 / p**3, 1.0 / (1.0 - p) ** 3)
        self._steps += 1
        delta = 0.5 * (self._steps + 1) ** (-1.0 / sqrt(5.0 * log(self.horizon)))
        self._probability = np.clip(p - slope / sqrt(self.horizon), delta, 1.0 - delta)


class PlugInNeyman:
    r"""Neyman allocation by running second moments, mixed with a vanishing floor, for any number of bins.

        p_t(b) = (1 - gamma_t) sqrt(m_b) / sum_j sqrt(m_j) + gamma_t / B,     gamma_t = 1 / sqrt(t)

    m_b is the mean square of the outcomes seen in bin b; a bin without any counts as the largest. For i.i.d. outcomes
    the error of sqrt(m_b) is O(1 / sqrt(t)), gamma_t is no larger, and the objective is flat to first order at its
    minimum, so a step costs O(1/t): expected Neyman regret Õ(log T). On adversarial sequences it has no guarantee; use
    `ClipOGD`.

    Args:
        num_bins: B.
        replicates: shape of independent copies.

    >>> design = PlugInNeyman(num_bins=2)
    >>> for bin_, outcome in [(0, 3.0), (1, 1.0), (0, 3.0)]:
    ...     design.update(bin_, outcome)
    >>> design.probabilities  # half of (3/4, 1/4), half of the floor
    array([0.625, 0.375])
    """

    def __init__(self, num_bins: int, *, replicates: tuple[int, ...] = ()) -> None:
        self.num_bins = integer("num_bins", num_bins, 1)
        self.replicates = replicates
        self._steps = 0
        self._squares = np.zeros((*replicates, self.num_bins))
        self._trials = np.zeros((*replicates, self.num_bins))

    @property
    def probabilities(self) -> Floats:
        """(..., B) p_t(b) of the coming unit."""
        root = np.sqrt(self._squares / np.maximum(self._trials, 1.0))
        root = np.where(self._trials > 0, root, root.max(axis=-1, keepdims=True))
        total = root.sum(axis=-1, keepdims=True)
        share = np.where(total > 0, root / np.where(total > 0, total, 1.0), 1.0 / self.num_bins)
        floor = 1.0 / sqrt(self._steps + 1)
        return np.asarray((1.0 - floor) * share + floor / self.num_bins)

    def update(self, sampled: ArrayLike, outcome: ArrayLike) -> None:
        """Learn from one unit: the bin it was sampled from and the outcome seen, both of shape `replicates`."""
        b = integers("sampled", sampled, self.replicates, 0, self.num_bins - 1)[..., None]
        y = floats("outcome", outcome, self.replicates)
        sampled_bin = np.arange(self.num_bins) == b
        self._squares += sampled_bin * y[..., None] ** 2
        self._trials += sampled_bin
        self._steps += 1
