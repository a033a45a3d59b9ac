r"""Pilot and commit: rollouts whose number depends on what earlier ones of the same step have shown (theorem 21).

A prompt gets n_1 rollouts, K_1 of them right, then n_2(K_1) more, n = n_1 + n_2. If all of them are compared with the
mean of the whole group, as GRPO does, the baseline of a first-stage rollout depends on its own reward through n: the
prompt's weight in the update is distorted. Compared stage by stage (`staged_advantages`) it is not. The model is that
of theorems 10 and 16: E z = 0, E[r z] = grad p, scores of variance sigma^2 given the reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, Ints, check_entries, floats, integer, integers, number
from gdro_core.theory.frontier import frontier_utility


def staged_weight(second: ArrayLike, p: ArrayLike, *, pooled: bool = False, scale: bool = False) -> Floats:
    r"""c: the summed gradient of a group of two stages is c grad p in expectation (theorem 21).

    Stage by stage it is n_1 - 1 + E[n_2 (1 - 1 / n)]: the first stage pays one rollout for its baseline, the second
    n_2 / n of one. With a pooled baseline it is E n - 1 + `pooled_bias`. Scaled advantages have no such form; all four
    are finite sums over K_1 and K_2 here.

    Args:
        second: (n_1 + 1,) rollouts n_2 >= 0 of the second stage after K_1 = 0, 1, ..., n_1 right ones, n_1 >= 1.
        p: (M,) pass rates in (0, 1).
        pooled: all rewards minus the mean of the whole group, instead of `staged_advantages`.
        scale: advantages divided by the population std of the whole group.

    Returns:
        (M,).

    Raises:
        ValueError: a bad argument.

    >>> staged_weight([0, 6, 0], [0.1, 0.5]), staged_weight([0, 6, 0], [0.1, 0.5], pooled=True)
    (array([1.945, 3.625]), array([2.425, 3.625]))
    """
    return _moments(second, p, pooled, scale)[0]


def staged_efficiency(second: ArrayLike, p: ArrayLike, *, pooled: bool = False, scale: bool = False) -> Floats:
    r"""Signal^2 over noise of a group of two stages, in rollouts beyond the baseline: c^2 p (1 - p) / E sum_j A_j^2.

    A group of n rollouts in one stage has n - 1 (theorem 15). Arguments, shape and errors as in `staged_weight`.

    >>> staged_efficiency([6, 6, 6], [0.2]).round(3), staged_efficiency([6, 6, 6], [0.2], pooled=True).round(3)
    (array([6.25]), array([7.]))
    """
    weight, noise = _moments(second, p, pooled, scale)
    rate = np.asarray(p, dtype=np.float64)
    return np.asarray(weight**2 * rate * (1.0 - rate) / noise)


def pooled_bias(second: ArrayLike, p: ArrayLike) -> Floats:
    r"""What a pooled baseline adds to c, which would be E n - 1 if n did not depend on the rewards (theorem 21).

        -Cov(1 / n, (K_1 - n_1 p)^2) / (p (1 - p))

    Below 0 where surprising first stages get fewer rollouts. Arguments, shape and errors as in `staged_weight`.

    >>> pooled_bias([0, 6, 0], [0.1, 0.5])
    array([ 0.345, -0.375])
    """
    more, rate = _plan(second, p)
    first = more.size - 1
    law, k = _binomial(first, rate), np.arange(first + 1)
    inverse = 1.0 / (first + more)
    square = (k - first * rate[:, None]) ** 2
    covariance = (law * square * inverse).sum(axis=1) - (law @ inverse) * first * rate * (1.0 - rate)
    return np.asarray(-covariance / (rate * (1.0 - rate)))


@dataclass(frozen=True, eq=False)
class TwoStage:
    """The best plan of two stages for many prompts of one law (`best_two_stage`).

    >>> TwoStage(1.0, np.array([2.0, 6.0, 2.0])).value
    1.0
    """

    value: float  # t per prompt, as `frontier_utility`
    second: Floats  # (n_1 + 1,) mean n_2 after each K_1; whole but for one K_1, which uses up the budget


def best_two_stage(
    first: int, mean: float, most: int, rates: ArrayLike, mass: ArrayLike, value: ArrayLike, kappa: float
) -> TwoStage:
    r"""The best n_2(K_1) and stage weights at one visit: what a pilot is worth (theorem 21).

    Prompts have pass rates of one law; all get n_1 rollouts in the first stage and mean - n_1 on average in the second.
    The first stage has one weight, the second a weight w_2(K_1); both are the best. In the model of theorem 16 the
    squared signal of a step over its noise is the returned value times the number of prompts. Alternates between
    weights, which are linear equations, and counts, which fill the concave envelopes of

        U_k(n_2) = (E[lambda Y | k] - kappa w_1 X_1 E[Y | k])^2 / (E[sum_2 A_j^2 | k] + kappa E[Y^2 | k])

    (Y the second stage's sum_j A_j (r_j - p), X_1 the first's): exact for kappa 0, where they do not interact.

    Args:
        first: n_1, rollouts of the first stage; 0 for none: the best plan of one stage.
        mean: n_bar >= n_1 [rollouts / prompt].
        most: n_max >= n_bar, rollouts of a prompt in both stages.
        rates: (M,) pass rates in [0, 1] that prompts may have.
        mass: (M,) their probabilities.
        value: (M,) lambda at each rate, as in `frontier_utility`.
        kappa: >= 0, as there.

    Raises:
        ValueError: a bad argument.

    >>> law = {"rates": [0.0, 0.5, 1.0], "mass": [0.4, 0.2, 0.4], "value": [1.0, 1.0, 1.0], "kappa": 0.0}
    >>> best_two_stage(2, 3.0, 12, **law).second
    array([ 0., 10.,  0.])
    """
    pilot = integer("first", first, 0)
    rate = floats("rates", rates, (-1,), 0.0, 1.0)
    weight = floats("mass", mass, rate.shape, 0.0, 1.0)
    gain = floats("value", value, rate.shape)
    number("kappa", kappa, 0.0)
    budget = number("mean", mean, pilot, integer("most", most, 1)) - pilot
    if abs(weight.sum() - 1.0) > 1e-9:
        raise ValueError(f"mass must sum to 1, got {weight.sum()}")
    joint = _binomial(pilot, rate) * weight[:, None]  # (M, K) of the rate and K_1
    share = joint.sum(axis=0)
    k = np.arange(pilot + 1)
    spread = k * (pilot - k) / max(pilot, 1)  # X_1
    one, one_square = gain @ joint @ spread, share @ (spread + kappa * spread**2)
    signal, own, noise = (np.zeros((pilot + 1, most - pilot + 1)) for _ in range(3))
    for n in range(1, most - pilot + 1):
        law = _binomial(n, rate)  # (M, n + 1)
        for row in range(pilot + 1):
            pull, square = _second(row + np.arange(n + 1), np.arange(n + 1), n, pilot + n, rate[:, None])
            given = joint[:, row, None] * law / max(share[row], 1e-300)
            signal[row, n] = gain @ (given * pull).sum(axis=1)
            own[row, n] = (given * pull).sum()
            noise[row, n] = (given * (square + kappa * pull**2)).sum()
    safe = np.where(noise > 0.0, noise, 1.0)
    weight_1 = one / one_square if one_square > 0.0 else 0.0
    plan = [(np.zeros(1, dtype=np.int64), np.ones(1))] * k.size
    for _ in range(50):
        before = weight_1
        crossed = kappa * spread[:, None] * own
        tables = np.where(noise > 0.0, np.maximum(signal - weight_1 * crossed, 0.0) ** 2 / safe, 0.0)
        plan = _fill(tables, share, budget)
        chance = np.zeros(tables.shape)
        for row, (places, parts) in enumerate(plan):
            chance[row, places] = share[row] * parts
        bent = one_square - (chance * crossed**2 / safe).sum()
        weight_1 = (one - (chance * crossed * signal / safe).sum()) / bent if bent > 0.0 else 0.0
        if abs(weight_1 - before) <= 1e-12 * abs(before):
            break
    reached = 2.0 * weight_1 * one - weight_1**2 * one_square
    reached += (chance * (signal - weight_1 * crossed) ** 2 / safe).sum()
    return TwoStage(float(reached), np.array([places @ parts for places, parts in plan]))


def pilot_gain(first: int, mean: float, most: int, a: float, b: float, kappa: float) -> float:
    r"""By how much a first stage raises t at one visit over n_bar rollouts each, if p ~ Beta(a, b) (theorem 21).

    `best_two_stage` over `frontier_utility` of n_bar, minus 1, both at lambda = 1. It falls with kappa, as the groups
    of the second stage are filled by their own gradients, and grows with the share of prompts of p near 0 or 1.

    Args:
        first, mean, most, kappa: as in `best_two_stage`.
        a, b: > 0.

    >>> [round(pilot_gain(4, 8, 24, 0.5, 0.5, kappa), 2) for kappa in (0.0, 0.05, 0.5)]
    [0.3, 0.17, -0.03]
    """
    from scipy.special import roots_jacobi  # not at import: `import gdro_core` loads numpy only

    nodes, mass = roots_jacobi(24, b - 1.0, a - 1.0)
    rates = 0.5 * (nodes + 1.0)
    mass /= mass.sum()
    v = rates * (1.0 - rates)
    utility = frontier_utility(mean, mass @ v / np.sqrt(mass @ v**2), mass @ v**2 / (mass @ v), kappa)
    return best_two_stage(first, mean, most, rates, mass, np.ones(rates.size), kappa).value / float(utility) - 1.0


def _fill(tables: Floats, share: Floats, budget: float) -> list[tuple[Ints, Floats]]:
    """Places of each row's table and their chances: the concave envelopes filled by slope, at a cost of `share`."""
    hulls, pieces = [], []
    for row, table in enumerate(tables):
        hull = [0]
        while hull[-1] < table.size - 1:
            ahead = np.arange(hull[-1] + 1, table.size)
            slopes = (table[ahead] - table[hull[-1]]) / (ahead - hull[-1])
            best = int(ahead[len(ahead) - 1 - slopes[::-1].argmax()])
            pieces.append((-float(slopes.max()), row, hull[-1], best))
            hull.append(best)
        hulls.append(hull)
    plan: list[tuple[Ints, Floats]] = [(np.zeros(1, dtype=np.int64), np.ones(1)) for _ in tables]
    left = budget
    for slope, row, low, high in sorted(pieces):
        if left <= 1e-12 * budget or slope >= 0.0:
            break
        part = min(1.0, left / max(share[row] * (high - low), 1e-300))
        plan[row] = (np.array([low, high]), np.array([1.0 - part, part]))
        left -= part * share[row] * (high - low)
    return plan


def _second(right: Ints, later: Ints, n2: Ints | int, n: Ints | int, p: Floats) -> tuple[Floats, Floats]:
    """sum_j A_j (r_j - p) and sum_j A_j^2 over the second stage: `later` of n2 right, `right` of all n."""
    mean = right / np.maximum(n, 1)
    pull = later * (1.0 - mean) * (1.0 - p) + (n2 - later) * mean * p
    return np.asarray(pull), np.asarray(later * (1.0 - mean) ** 2 + (n2 - later) * mean**2)


def _moments(second: ArrayLike, p: ArrayLike, pooled: bool, scale: bool) -> tuple[Floats, Floats]:
    """(M,) c and E sum_j A_j^2."""
    more, rate = _plan(second, p)
    first = more.size - 1
    law = _binomial(first, rate)
    weight, noise = np.zeros(rate.size), np.zeros(rate.size)
    for k, n2 in enumerate(more.tolist()):
        later, n = np.arange(n2 + 1), first + n2
        chance = law[:, k, None] * _binomial(n2, rate)
        right = k + later
        spread = right * (n - right) / n
        if pooled:
            pull, square = spread, spread
        else:
            own = k * (first - k) / first
            pull, square = (own + part for part in _second(right, later, n2, n, rate[:, None]))
        if scale:
            deviation = np.sqrt(np.where(spread > 0.0, spread / n, np.inf))
            pull, square = pull / deviation, square / deviation**2
        weight += (chance * pull).sum(axis=1)
        noise += (chance * square).sum(axis=1)
    return weight / (rate * (1.0 - rate)), noise


def _plan(second: ArrayLike, p: ArrayLike) -> tuple[Ints, Floats]:
    more = integers("second", second, (-1,), 0, 2**12)
    if more.size < 2:
        raise ValueError(f"second must have n_1 + 1 >= 2 entries, got {more.size}")
    rate = floats("p", p, (-1,), 0.0, 1.0)
    check_entries("p", rate, 1e-300, 1.0 - 1e-16)
    return more, rate


def _binomial(size: int, p: Floats) -> Floats:
    """(M, n + 1) probabilities of 0..n successes at each of (M,) rates."""
    from scipy.special import gammaln, xlog1py, xlogy  # not at import: `import gdro_core` loads numpy only

    k = np.arange(size + 1)
    choices = gammaln(size + 1) - gammaln(k + 1) - gammaln(size - k + 1)
    return np.asarray(np.exp(choices + xlogy(k, p[:, None]) + xlog1py(size - k, -p[:, None])))
