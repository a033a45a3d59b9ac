r"""What n rollouts of a prompt are worth, expected under the Beta posterior of its pass rate (§3.3).

`RolloutGDRO` maximises the sum of one of these under the exact budget. A utility is a record: to use another one, make
another record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._counts import spread_ratio
from gdro_core._validate import Floats, Ints, choice, floats, integers, number
from gdro_core.theory.frontier import purity

Further = Callable[[Floats, Floats, Floats, Floats, Ints], Floats]  # with (N, 1) correct and trials before n more
Table = Callable[[Floats, Floats, Ints], Floats]  # (N, 1) a, (N, 1) b, n of (A,) or (N, 1) -> (N, A) or (N, 1)


def _ones(a: Floats, b: Floats, n: Ints) -> Floats:
    return np.ones(np.broadcast_shapes(a.shape, n.shape))


@dataclass(frozen=True)
class Utility:
    """Expected utility of n rollouts on a prompt whose pass rate is p ~ Beta(a, b), and the weights that go with it.

    >>> HIT.of([1.0], [1.0], [1, 2, 3]).round(3)
    array([[0.5  , 0.667, 0.75 ]])
    """

    name: str  # in saved states and messages
    fewest: int  # fewest rollouts at which it is finite
    concave_from: int  # fewest rollouts from which on it is concave in n, so that greedy allocation is exact
    weight_power: int  # a prompt weight ω multiplies it by ω to this power (F7)
    table: Table = field(compare=False)  # utility of n rollouts
    shrinkage: Table = field(default=_ones, compare=False)  # factor on the weight of a prompt with n rollouts
    information: Table = field(default=_ones, compare=False)  # share of n rollouts that counts in the mean weight
    at_kappa: Callable[[float], Utility] | None = field(default=None, compare=False)  # the same at another kappa
    further: Further | None = field(default=None, compare=False)  # of n rollouts after graded ones
    kappa: float | None = None  # of a signal

    def of(self, a: ArrayLike, b: ArrayLike, arms: ArrayLike) -> Floats:
        """Utility of every number of rollouts in `arms`, for every prompt.

        Args:
            a: (N,) > 0, posterior successes.
            b: (N,) > 0, posterior failures.
            arms: (A,) integers n >= `fewest`.

        Returns:
            (N, A).

        Raises:
            ValueError: a bad argument.
        """
        alpha = floats("a", a, (-1,), 0.0)[:, None]
        beta = floats("b", b, alpha.shape[:1], 0.0)[:, None]
        n = integers("arms", arms, (-1,), self.fewest, 2**20)
        for parameter, values in (("a", alpha), ("b", beta)):
            if not values.all():
                raise ValueError(f"{parameter} must be above 0, got 0.0")
        return self.table(alpha, beta, n)


def _minus_variance(a: Floats, b: Floats, n: Ints) -> Floats:
    return np.asarray(-_variance(a, b) / n)


def _product(a: Floats, total: Floats, n: Ints) -> Floats:
    """E[p^n] = prod_{j<n} (a + j)/(a + b + j), at n >= 1."""
    steps = np.arange(max(int(n.max(initial=0)), 1))
    return np.asarray(np.cumprod((a + steps) / (total + steps), axis=1)[:, n - 1])


def _hit(a: Floats, b: Floats, n: Ints) -> Floats:
    return np.where(n == 0, 0.0, 1.0 - _product(b, a + b, n))


def _mixed(a: Floats, b: Floats, n: Ints) -> Floats:
    return np.where(n < 2, 0.0, 1.0 - _product(b, a + b, n) - _product(a, a + b, n))


def _variance(a: Floats, b: Floats) -> Floats:
    """E[p (1 - p)]."""
    total = a + b
    return np.asarray(a * b / (total * (total + 1.0)))


@dataclass(frozen=True)
class _Signal:
    """The tables of `signal`: theorem 16 for weights fixed before the rollouts, with E v^2 / E v for v."""

    kappa: float
    error: float

    def value(self, a: Floats, b: Floats, n: Ints) -> Floats:
        """U(n), at omega = 1: `frontier_utility` without its checks. A row a number of rollouts in memory."""
        pure, mean, v = self._moments(a.T, b.T)
        size = np.maximum(n, 1)[:, None] if n.ndim == 1 else np.maximum(n, 1).T
        spread = spread_ratio(size, v)
        spread *= self.kappa * pure**2
        spread += 1.0
        table = pure**2 * mean * (size - 1)
        table /= spread
        return np.asarray(table.T)

    def weight(self, a: Floats, b: Floats, n: Ints) -> Floats:
        """The best weight, at omega = 1: `frontier_weight` without its checks."""
        pure, _, v = self._moments(a, b)
        return np.asarray(pure / (1.0 + self.kappa * pure**2 * spread_ratio(np.maximum(n, 1), v)))

    def mixed(self, a: Floats, b: Floats, n: Ints) -> Floats:
        """E P(mixed) for (N, 1) counts n; 0 for fewer than two rollouts."""
        last = np.maximum(n[:, 0], 2) - 1
        steps = np.arange(int(last.max(initial=1)) + 1.0)[:, None, None]
        posterior = np.concatenate([a, b], axis=1).T  # (2, N)
        alike = np.asarray(posterior + steps)
        alike /= posterior[0] + posterior[1] + steps
        for j in range(1, steps.size):
            np.multiply(alike[j - 1], alike[j], out=alike[j])
        right, wrong = alike[last, :, np.arange(last.size)].T
        mixed = 1.0 - right - wrong
        mixed[n[:, 0] < 2] = 0.0
        return np.asarray(mixed[:, None])

    def further(self, a: Floats, b: Floats, correct: Floats, trials: Floats, n: Ints) -> Floats:
        """Utility at omega = 1 of a group of some graded rollouts and n more: what it has shown is no longer random."""
        pure, mean, v = self._moments(a, b)
        shown, new = correct * (trials - correct) / np.maximum(trials, 1.0), mean * n
        square = shown * (shown + 2.0 * new) + new * spread_ratio(n + 1, v)
        size = shown + new
        spread = size + self.kappa * pure**2 * square
        return np.asarray(pure**2 * size**2 / np.where(spread > 0.0, spread, 1.0))

    def _moments(self, a: Floats, b: Floats) -> tuple[Floats, Floats, Floats]:
        """(N, 1) purity at the mean rate, E v, E v^2 / E v."""
        total = a + b
        second = (a + 1.0) * (b + 1.0) / ((total + 2.0) * (total + 3.0))
        pure = purity(a / total, self.error) if self.error else np.ones(a.shape)
        return pure, _variance(a, b), second


def signal(kappa: float, error: float = 0.0) -> Utility:
    r"""What n rollouts add to the squared signal of a step over its noise (theorem 16, `frontier_utility`).

    Every group pays one rollout for its baseline, and every further one is worth v = r (1 - r), r the rate of answers
    graded right, until the prompt's own part of the gradient, which no other prompt learns from, fills the step: kappa
    is its mean square over the variance of one rollout's score. As r is uncertain and weights are fixed before the
    rollouts, U is `frontier_utility` at E v^2 / E v for v and omega E v / sqrt(E v^2) for lambda: less than the mean of
    U over the posterior, which no such weight attains. With errors of the verifier omega is multiplied by the `purity`
    u of the mean rate, kappa by u^2: a prompt graded right no more often than by mistake is worth nothing.

    The weight that goes with n rollouts is that of `frontier_weight`, and the mean weight of a batch is taken over the
    rollouts of groups that are expected to be mixed, as others have no gradient. The utility is not concave from n = 0:
    nobody gets a single rollout, and a budget is spent by `frontier_allocation`.

    Args:
        kappa: >= 0; 0 for prompts that teach each other all they learn. `VarianceComponents` estimates it.
        error: in [0, 1/2), probability that a grade is turned round.

    >>> signal(0.0).of([5.0, 1.0], [5.0, 19.0], [0, 1, 2, 4]).round(3)
    array([[0.   , 0.   , 0.227, 0.682],
           [0.   , 0.   , 0.045, 0.136]])
    >>> signal(5.0).of([5.0], [5.0], [2, 4, 8, 100]).round(3)
    array([[0.065, 0.128, 0.164, 0.195]])
    """
    tables = _Signal(number("kappa", kappa, 0.0), number("error", error, 0.0, 0.49))
    return Utility(
        f"signal(kappa={tables.kappa:g}, error={tables.error:g})",
        fewest=0,
        concave_from=1,
        weight_power=2,
        table=tables.value,
        shrinkage=tables.weight,
        information=tables.mixed,
        at_kappa=partial(signal, error=tables.error),
        further=tables.further,
        kappa=tables.kappa,
    )


# -E[p(1 - p)] / n: minus the variance of a mean of n rewards (Eq. 28, Theorem 4.2). The weighted gradient has ω² times
# it, so that the optimum is n ∝ ω√v (F7).
VARIANCE = Utility("variance", fewest=1, concave_from=1, weight_power=2, table=_minus_variance)
# 1 - E[p^n] - E[(1 - p)^n]: the probability that a group has both outcomes, hence a gradient. 0 for n = 0 and n = 1.
MIXED = Utility("mixed", fewest=0, concave_from=1, weight_power=1, table=_mixed)
# 1 - E[(1 - p)^n]: the probability of any correct rollout.
HIT = Utility("hit", fewest=0, concave_from=0, weight_power=1, table=_hit)
# The signal utility of prompts that teach each other all they learn.
SIGNAL = signal(0.0)
UTILITIES = {"variance": VARIANCE, "mixed": MIXED, "hit": HIT, "signal": SIGNAL}


def rollout_utility(name: str, a: ArrayLike, b: ArrayLike, arms: ArrayLike) -> Floats:
    """`Utility.of` by name: "variance", "mixed", "hit" or "signal" (kappa 0).

    >>> rollout_utility("mixed", [1.0], [1.0], [1, 2, 3]).round(3)
    array([[0.   , 0.333, 0.5  ]])
    """
    return UTILITIES[choice("utility", name, list(UTILITIES))].of(a, b, arms)
