r"""What n rollouts of a prompt are worth, expected under the Beta posterior of its pass rate (§3.3).

`RolloutGDRO` maximises the sum of one of these under the exact budget. A utility is a record: to use another one, make
another record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, Ints, choice, floats, integers


@dataclass(frozen=True)
class Utility:
    """Expected utility of n rollouts on a prompt whose pass rate is p ~ Beta(a, b).

    >>> HIT.of([1.0], [1.0], [1, 2, 3]).round(3)
    array([[0.5  , 0.667, 0.75 ]])
    """

    name: str  # in saved states and messages
    fewest: int  # fewest rollouts at which it is finite
    concave_from: int  # fewest rollouts from which on it is concave in n, so that greedy allocation is exact
    weight_power: int  # a prompt weight ω multiplies it by ω to this power (F7)
    table: Callable[[Floats, Floats, Ints], Floats]  # (N, 1) a, (N, 1) b, (A,) n -> (N, A)

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
    total = a + b
    return np.asarray(-(a * b / (total * (total + 1.0))) / n)


def _product(a: Floats, total: Floats, n: Ints) -> Floats:
    """E[p^n] = prod_{j<n} (a + j)/(a + b + j), at n >= 1."""
    steps = np.arange(max(int(n.max(initial=0)), 1))
    return np.asarray(np.cumprod((a + steps) / (total + steps), axis=1)[:, n - 1])


def _hit(a: Floats, b: Floats, n: Ints) -> Floats:
    return np.where(n == 0, 0.0, 1.0 - _product(b, a + b, n))


def _mixed(a: Floats, b: Floats, n: Ints) -> Floats:
    return np.where(n == 0, 0.0, 1.0 - _product(b, a + b, n) - _product(a, a + b, n))


# -E[p(1 - p)] / n: minus the variance of a mean of n rewards (Eq. 28, Theorem 4.2). The weighted gradient has ω² times
# it, so that the optimum is n ∝ ω√v (F7).
VARIANCE = Utility("variance", fewest=1, concave_from=1, weight_power=2, table=_minus_variance)
# 1 - E[p^n] - E[(1 - p)^n]: the probability that a group has both outcomes, hence a gradient. 0 for n = 0 and n = 1.
MIXED = Utility("mixed", fewest=0, concave_from=1, weight_power=1, table=_mixed)
# 1 - E[(1 - p)^n]: the probability of any correct rollout.
HIT = Utility("hit", fewest=0, concave_from=0, weight_power=1, table=_hit)
UTILITIES = {utility.name: utility for utility in (VARIANCE, MIXED, HIT)}


def rollout_utility(name: str, a: ArrayLike, b: ArrayLike, arms: ArrayLike) -> Floats:
    """`Utility.of` by name: "variance", "mixed" or "hit".

    >>> rollout_utility("mixed", [1.0], [1.0], [1, 2, 3]).round(3)
    array([[0.   , 0.333, 0.5  ]])
    """
    return UTILITIES[choice("utility", name, list(UTILITIES))].of(a, b, arms)
