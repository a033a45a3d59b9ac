"""One count per bin under an exact budget: the best configuration, and exact play at random (§3.3, theorem 6).

Configurations that meet the budget are paths through (bin, budget left); one sweep over them finds the best path or the
law of all paths.
"""

from __future__ import annotations

from functools import reduce
from math import gcd, log, sqrt
from operator import or_
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import (
    Floats,
    Ints,
    check_choice,
    check_entries,
    check_shape,
    floats,
    integer,
    integers,
    number,
)


def exact_budget_allocation(
    utility: ArrayLike, size: ArrayLike, budget: int, *, min_rollouts: int, rng: np.random.Generator | None = None
) -> Ints:
    r"""One count per bin, meeting a budget exactly: the multiple-choice knapsack of §3.3, by dynamic program.

        max_n  sum_b U_b(n_b)    s.t.   sum_b c_b n_b = budget,   n_b in {n_min, ..., n_min + A - 1}

    V_b(s) = max_n U_b(n) + V_{b+1}(s - c_b n), V_B(0) = 0; O(B A budget). U_b counts the whole bin: multiply a utility
    per prompt by c_b before. No concavity is needed. With `rng` the answer is uniform over all optimal allocations
    (values within rounding, 1e-12 of sum_b max |U_b|, count as equal), otherwise it takes the smallest counts first.

    Args:
        utility: (B, A) U_b at n_min, n_min + 1, ...
        size: (B,) prompts c_b >= 0 of each bin in the batch.
        budget: total rollouts.
        min_rollouts: n_min, the count of column 0.
        rng: breaks ties; see above.

    Returns:
        (B,) integer counts with size @ counts = budget.

    Raises:
        ValueError: a bad argument, or a budget that no choice of counts meets; the message names the nearest that one
            does.

    >>> exact_budget_allocation([[0.0, 1.0, 1.5], [0.0, 3.0, 4.0]], [2, 1], 6, min_rollouts=1)
    array([2, 2])
    """
    table = floats("utility", utility, (-1, -1))
    problem = _budget_problem("utility", table, size, budget, min_rollouts)
    rounding = 1e-12 * float(np.abs(table).max(axis=1).sum())
    values = [_nothing_left(problem)]  # V_B, then V_{B-1}, ...
    for row, cost in zip(table[::-1], problem.cost[::-1], strict=True):
        values.append(_through(values[-1], cost, row).max(axis=0))
    if values[-1][-1] == -np.inf:
        raise _infeasible(problem)
    arms, left, tied = [], problem.extra, False
    for row, cost, after in zip(table, problem.cost, values[-2::-1], strict=True):
        column = _through(after[: left + 1], cost, row, only_last=True)[:, 0]
        best = np.flatnonzero(column >= column.max() - rounding)
        tied |= best.size > 1
        arms.append(int(best[0]))
        left -= cost * arms[-1]
    if not tied or rng is None:  # no tie on this path: it is the only optimal one
        return np.array(arms, dtype=np.int64) + problem.low
    log_ways = _nothing_left(problem)  # of optimal completions; their number overflows from about 300 bins on
    laws = []
    for row, cost, after, value in zip(table[::-1], problem.cost[::-1], values[:-1], values[1:], strict=True):
        optimal = _through(after, cost, row) >= value - rounding
        log_ways, law = _log_sum(np.where(optimal, _through(log_ways, cost, np.zeros(row.size)), -np.inf))
        laws.append(law)
    return _walk(laws[::-1], problem, rng, 1).ravel()


def sample_budget_allocation(
    log_weights: ArrayLike,
    size: ArrayLike,
    budget: int,
    *,
    min_rollouts: int,
    rng: np.random.Generator,
    samples: int | None = None,
) -> tuple[Ints, Floats]:
    r"""Allocations drawn from their exact Gibbs distribution under an exact budget, with its marginals (theorem 6).

        P(n) ∝ exp(sum_b log_weights[b, n_b])    over    sum_b c_b n_b = budget,   n_b in {n_min, ..., n_min + A - 1}

    Backward: W_b(s) = sum_n e^{log_weights[b, n]} W_{b+1}(s - c_b n), the total weight of all ways for the bins b, b+1,
    ... to spend s, in the log domain; it gives P(n_b | s left) = e^{log_weights[b, n_b]} W_{b+1}(s - c_b n_b) / W_b(s).
    Forward along these: samples, and the law of what is left, hence the marginals. O(B A budget) in all.

    Args:
        log_weights: (B, A) at n_min, n_min + 1, ...; -inf forbids, finite entries within ±1e300 (their sums are exact
            up to the rounding of the largest).
        size: (B,) prompts c_b >= 0 of each bin in the batch.
        budget: total rollouts.
        min_rollouts: n_min, the count of column 0.
        rng: draws.
        samples: number of independent draws; one if None.

    Returns:
        counts: (B,) integers with size @ counts = budget, or (samples, B).
        marginals: (B, A) P(n_b = n); rows sum to 1. Arms that are e^-700 less likely than another have 0.

    Raises:
        ValueError: a bad argument, or a budget that no choice of counts meets (the message names the nearest that one
            does), or that only forbidden ones meet.

    >>> counts, marginals = sample_budget_allocation(
    ...     np.zeros((2, 3)), [1, 1], 4, min_rollouts=1, rng=np.random.default_rng(0)
    ... )
    >>> counts.sum(), marginals.round(3).tolist()  # (1, 3), (2, 2), (3, 1)
    (np.int64(4), [[0.333, 0.333, 0.333], [0.333, 0.333, 0.333]])
    """
    problem, laws = _gibbs(log_weights, size, budget, min_rollouts)
    draws = _walk(laws, problem, rng, 1 if samples is None else integer("samples", samples, 1))
    return draws[0] if samples is None else draws, _marginals(laws, problem)


def allocation_marginals(log_weights: ArrayLike, size: ArrayLike, budget: int, *, min_rollouts: int) -> Floats:
    """(B, A) marginals P(n_b = n) of `sample_budget_allocation`, without a draw.

    >>> allocation_marginals(np.zeros((2, 2)), [1, 2], 5, min_rollouts=1)  # (1, 2) alone spends 5
    array([[1., 0.],
           [0., 1.]])
    """
    problem, laws = _gibbs(log_weights, size, budget, min_rollouts)
    return _marginals(laws, problem)


def path_learning_rate(horizon: int, bins: int, arms: int, *, feedback: str, loss_range: float = 1.0) -> float:
    r"""The step size of `path_regret_bound`: weights e^{-eta (summed losses)} over paths, in 1 / (unit of loss).

    With `"full"` feedback eta = sqrt(8 ln N / T) / (B range), with `"bandit"` eta = sqrt(2 ln N / (A T)) / (B range),
    ln N = (B - 1) ln A.

    >>> round(path_learning_rate(1000, 10, 11, feedback="bandit"), 5)
    0.00626
    """
    steps, log_paths, loss = _path_game(horizon, bins, arms, feedback, loss_range)
    return sqrt((8.0 if feedback == "full" else 2.0 / arms) * log_paths / steps) / (bins * loss)


def path_regret_bound(horizon: int, bins: int, arms: int, *, feedback: str, loss_range: float = 1.0) -> float:
    r"""Regret of Hedge over all allocations that meet the budget, against the best fixed one (theorem 6).

        "full":    sum_t E <l_t, n_t> - min_n sum_t <l_t, n>  <=  B range sqrt(T (B - 1) ln A / 2)
        "bandit":                                             <=  B range sqrt(2 A T (B - 1) ln A)

    for adversarial losses l_t(b, n) in an interval of length `range`, <l, n> = sum_b l(b, n_b), bin sizes and budget
    fixed over time. There are N <= A^(B - 1) paths, as the counts of B - 1 bins leave at most one for the last. Full
    information is Hedge on N experts with losses in an interval of length B range. Semi-bandit feedback (only
    l_t(b, n_b) of the played path is seen) feeds estimates l(b, n) 1[n_b = n] / P(n_b = n) >= 0, with range 1 and l in
    [0, 1], to the same weights: e^{-x} <= 1 - x + x^2/2 on x >= 0 gives

        R <= ln N / eta + (eta / 2) sum_t E sum_paths P(path) <l^_t, path>^2,

    and by Cauchy-Schwarz the square is at most B sum_b l^_t(b, n_b)^2, whose mean under P and under play is at most A a
    bin: R <= ln N / eta + eta T B^2 A / 2. The decreasing eta_t = path_learning_rate(t) / sqrt(2) needs no horizon; its
    bandit bound is sqrt(2) times this one.

    Args:
        horizon: T.
        bins: B, all with at least one prompt.
        arms: A.
        feedback: `"full"` or `"bandit"`.
        loss_range: length of the interval of a bin's loss.

    >>> [round(path_regret_bound(1000, 10, 11, feedback=feedback)) for feedback in ("full", "bandit")]
    [1039, 6890]
    """
    steps, log_paths, loss = _path_game(horizon, bins, arms, feedback, loss_range)
    return bins * loss * sqrt((0.5 if feedback == "full" else 2.0 * arms) * log_paths * steps)


def _path_game(horizon: int, bins: int, arms: int, feedback: str, loss_range: float) -> tuple[int, float, float]:
    check_choice("feedback", feedback, ("full", "bandit"))
    log_paths = (integer("bins", bins, 1) - 1) * log(integer("arms", arms, 1))
    return integer("horizon", horizon, 1), log_paths, number("loss_range", loss_range, 0.0, open_low=True)


class _Budget(NamedTuple):
    """sum_b cost_b k_b = extra over arms k_b = n_b - low, in units of the greatest common divisor of the sizes."""

    size: Ints  # (B,)
    options: Ints  # (A,) counts
    budget: int
    low: int
    cost: list[int]  # (B,) at most extra + 1, which is as good as never
    extra: int


def _budget_problem(name: str, table: Floats, size: ArrayLike, budget: int, min_rollouts: int) -> _Budget:
    bins, arms = table.shape
    low = integer("min_rollouts", min_rollouts, 0)
    total = integer("budget", budget, 0)
    if bins == 0 or arms == 0:
        raise ValueError(f"{name} must have at least one row and one column, got shape {table.shape}")
    sizes = integers("size", size, (bins,), 0, 2**31)
    unit = gcd(*sizes.tolist()) or 1
    rest = total - low * int(sizes.sum())
    problem = _Budget(sizes, low + np.arange(arms), total, low, [], rest // unit)
    if rest % unit or not 0 <= rest <= int(sizes.sum()) * (arms - 1):
        raise _infeasible(problem)
    return problem._replace(cost=np.minimum(sizes // unit, problem.extra + 1).tolist())


def _nothing_left(problem: _Budget) -> Floats:
    """(S,) the last bin has been served: 0 if nothing is left, -inf otherwise."""
    after = np.full(problem.extra + 1, -np.inf)
    after[0] = 0.0
    return after


def _through(after: Floats, cost: int, row: Floats, *, only_last: bool = False) -> Floats:
    """(A, S) row_k + after(s - cost k), -inf where that is overspent; the column of the largest s alone if asked."""
    pad = cost * (row.size - 1)
    padded = np.full(pad + after.size, -np.inf)
    padded[pad:] = after
    start, columns = (padded.size - 1, 1) if only_last else (pad, after.size)
    stride = padded.itemsize
    shifted = np.ndarray((row.size, columns), np.float64, padded, start * stride, (-cost * stride, stride))  # a view
    return np.asarray(shifted + row[:, None])


def _log_sum(through: Floats) -> tuple[Floats, Floats]:
    """(S,) log of the summed weights of all arms, -inf if none can, and (A, S) each arm's share of it."""
    peak = through.max(axis=0)
    weight = through - np.where(peak > -np.inf, peak, 0.0)
    matters = weight > -700.0  # e^-700 = 1e-304; an exponential that underflows takes ten times as long
    np.maximum(weight, -700.0, out=weight)
    np.exp(weight, out=weight)
    weight *= matters
    total = np.maximum(weight.sum(axis=0), 1.0)  # the peak alone is 1; without any arm the sum is 0
    weight /= total
    return peak + np.log(total), weight


def _gibbs(log_weights: ArrayLike, size: ArrayLike, budget: int, min_rollouts: int) -> tuple[_Budget, list[Floats]]:
    """The budget and per bin (A, S) P(arm | s left)."""
    table = np.asarray(log_weights, dtype=np.float64)
    allowed = table > -np.inf
    check_shape("log_weights", table, (-1, -1))
    check_entries("log_weights", table[table != -np.inf], -1e300, 1e300)
    problem = _budget_problem("log_weights", table, size, budget, min_rollouts)
    peak = np.where(allowed.any(axis=1), table.max(axis=1), 0.0)
    log_total, laws = _nothing_left(problem), []
    for row, cost in zip((table - peak[:, None])[::-1], problem.cost[::-1], strict=True):
        log_total, law = _log_sum(_through(log_total, cost, row))
        laws.append(law)
    if log_total[-1] == -np.inf:
        raise _infeasible(problem)
    return problem, laws[::-1]


def _walk(laws: list[Floats], problem: _Budget, rng: np.random.Generator, samples: int) -> Ints:
    """(samples, B) counts drawn bin by bin."""
    arms = np.empty((samples, len(laws)), dtype=np.int64)
    left = np.full(samples, problem.extra)
    for b, (law, cost) in enumerate(zip(laws, problem.cost, strict=True)):
        cumulated = np.cumsum(law[:, left], axis=0)  # (A, samples)
        arms[:, b] = (cumulated <= rng.random(samples) * cumulated[-1]).sum(axis=0)
        left -= cost * arms[:, b]
    return arms + problem.low


def _marginals(laws: list[Floats], problem: _Budget) -> Floats:
    """(B, A) P(arm)."""
    marginals = np.empty((len(laws), problem.options.size))
    present = np.zeros(problem.extra + 1)  # law of what is left
    present[-1] = 1.0
    for b, (law, cost) in enumerate(zip(laws, problem.cost, strict=True)):
        arms, budgets = law.shape
        joint = np.zeros((arms, budgets + cost * (arms - 1)))
        np.multiply(law, present, out=joint[:, :budgets])
        marginals[b] = joint.sum(axis=1)
        row, stride = joint.strides
        moved = np.ndarray(law.shape, np.float64, joint, 0, (row + cost * stride, stride))  # a view: arm k takes cost k
        present = moved.sum(axis=0)
    return marginals


def _infeasible(problem: _Budget) -> ValueError:
    """The error for a budget that no path meets; it names the nearest feasible budgets below and above."""
    sizes, low, budget = problem.size.tolist(), problem.low, problem.budget
    reach = 1  # bit s is set: the budget s can be met
    for size in sizes:
        reach = reduce(or_, (reach << (size * option) for option in problem.options.tolist()))
    if reach >> budget & 1:
        return ValueError(f"log_weights must allow an allocation that meets the budget {budget}, got -inf for all")
    below = (reach & ((1 << budget) - 1)).bit_length() - 1
    above = reach >> (budget + 1)
    nearest = [below] if below >= 0 else []
    if above:
        nearest.append(budget + (above & -above).bit_length())
    return ValueError(
        f"budget {budget} cannot be met by {low}..{problem.options[-1]} rollouts for bins of sizes {sizes}; "
        f"nearest feasible: {' and '.join(map(str, nearest))}"
    )
