"""How to spend a budget of rollouts: the square-root law, the exact integer optimum at unit cost, the frontier.

One problem throughout: maximise a separable utility of the counts n_i under a budget that must be met exactly. Where
all prompts of a bin share a count, `gdro_core.theory.paths` solves it.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._counts import frontier_counts, greedy_counts
from gdro_core._validate import Floats, Ints, floats, integer, number


def sqrt_allocation(
    variance: ArrayLike,
    mean_budget: float,
    *,
    share: ArrayLike | None = None,
    lower: ArrayLike = 0.0,
    upper: ArrayLike = np.inf,
) -> Floats:
    r"""Rollouts per bin that minimise the summed gradient variance (Theorem 4.2, with box constraints).

        min_n  sum_b q_b v_b / n_b    s.t.   sum_b q_b n_b = n_bar,   lower <= n_b <= upper

    The KKT conditions give n_b(mu) = clip(sqrt(v_b / mu), lower_b, upper_b) (Eq. 31), and the budget fixes mu; without
    active bounds n_b = n_bar sqrt(v_b) / sum_j q_j sqrt(v_j) (Eq. 30). With t = 1/sqrt(mu) the budget is piecewise
    linear and non-decreasing in t, so it is solved exactly by sorting the 2B breakpoints. Bins of zero variance stay at
    `lower` unless every other bin is at `upper`; what is left is then levelled over them.

    Args:
        variance: (B,) v_b >= 0, gradient variance of one rollout.
        mean_budget: n_bar [rollouts / prompt].
        share: (B,) q_b >= 0 with sum 1; uniform if None.
        lower: scalar or (B,), >= 0 [rollouts / prompt].
        upper: scalar or (B,), >= lower, may be infinite.

    Returns:
        (B,) real counts n_b; sum_b q_b n_b = n_bar up to rounding.

    Raises:
        ValueError: a bad argument, or a budget outside [sum q lower, sum q upper].

    >>> sqrt_allocation([0.25, 0.04, 0.01], 4.0).round(3)
    array([7.5, 3. , 1.5])
    >>> sqrt_allocation([0.25, 0.04, 0.01], 4.0, lower=2.0, upper=6.0).round(3)
    array([6., 4., 2.])
    """
    v = floats("variance", variance, (-1,), 0.0)
    n_bar = number("mean_budget", mean_budget, 0.0)
    q = np.full(v.shape, 1.0 / max(v.size, 1)) if share is None else floats("share", share, v.shape, 0.0)
    if v.size == 0 or abs(q.sum() - 1.0) > 1e-9:
        raise ValueError(f"share must have at least one entry and sum to 1, got {q.size} with sum {q.sum()}")
    low = floats("lower", np.full(v.shape, lower) if np.ndim(lower) == 0 else lower, v.shape, 0.0)
    high = np.asarray(np.full(v.shape, upper) if np.ndim(upper) == 0 else upper, dtype=np.float64)
    if high.shape != v.shape:
        raise ValueError(f"upper must be a scalar or have shape {v.shape}, got {high.shape}")
    if not (low <= high).all():  # also catches NaN
        raise ValueError(f"upper must be at least lower, got lower {lower!r}, upper {upper!r}")
    used = q > 0
    least, most = float(q @ low), float(q[used] @ high[used])
    slack = 1e-12 * max(1.0, n_bar)
    if not least - slack <= n_bar <= most + slack:
        raise ValueError(f"mean_budget must lie in [{least:g}, {most:g}] for these bounds, got {n_bar!r}")

    deviation = np.sqrt(v)
    counts = low.copy()
    active = deviation > 0
    reach = float(q[used & active] @ high[used & active] + q[~active] @ low[~active])
    if active.any() and n_bar <= reach + slack:
        counts[active] = _water_fill(
            deviation[active], q[active], low[active], high[active], n_bar - float(q[~active] @ low[~active])
        )
    else:
        counts[active] = np.where(used[active] | np.isfinite(high[active]), high[active], low[active])
        rest = ~active
        counts[rest] = _water_fill(
            np.ones(int(rest.sum())),
            q[rest],
            low[rest],
            high[rest],
            n_bar - float(q[active & used] @ high[active & used]),
        )
    return counts


def _water_fill(slope: Floats, q: Floats, low: Floats, high: Floats, budget: float) -> Floats:
    """n = clip(t * slope, low, high) for the t >= 0 with q @ n = budget; slope > 0."""
    used = q > 0

    def counts(t: float) -> Floats:
        with np.errstate(over="ignore"):
            return np.asarray(np.clip(t * slope, low, high))

    with np.errstate(over="ignore"):
        start, stop = low / slope, high / slope  # the line of a bin rises between these two t
    times = np.unique(np.concatenate([start, stop]))
    times = times[np.isfinite(times)]
    # Spending is evaluated at each t that the search visits: summed up over t, rounding would drown small slopes.
    k = max(bisect_right(times, budget, key=lambda t: float(q[used] @ counts(t)[used])) - 1, 0)
    rising = (start <= times[k]) & (times[k] < stop) & used
    if not rising.any():
        return counts(times[k])
    fixed = np.where(times[k] >= stop, high, low)[used & ~rising]
    return counts((budget - float(q[used & ~rising] @ fixed)) / float(q[rising] @ slope[rising]))


def greedy_allocation(
    utility: ArrayLike, budget: int, *, min_rollouts: int, rng: np.random.Generator | None = None
) -> Ints:
    r"""Counts that maximise a separable concave utility at unit cost: greedy by marginal gain, which is exact.

        max_n  sum_i U_i(n_i)    s.t.   sum_i n_i = budget,   n_min <= n_i <= n_max = n_min + A - 1

    Exact because the `budget - N n_min` largest marginal gains U_i(n+1) - U_i(n) of concave rows are always prefixes of
    their rows (theory test 3: greedy = dynamic program = brute force). Rows may fail concavity by rounding, up to
    1e-9 max(1, max |U|); the value is then optimal up to that much a rollout.

    Args:
        utility: (N, A) U_i at n_min, n_min + 1, ...; rows concave.
        budget: total rollouts, in [N n_min, N n_max].
        min_rollouts: n_min, the count of column 0.
        rng: breaks ties at random; without it the first prompts win.

    Returns:
        (N,) integer counts with sum `budget`.

    Raises:
        ValueError: a bad argument, a row that is not concave, or a budget out of range.

    >>> greedy_allocation([[0.0, 0.5, 0.7], [0.0, 0.3, 0.5]], 4, min_rollouts=1)
    array([2, 2])
    """
    table = floats("utility", utility, (-1, -1))
    low = integer("min_rollouts", min_rollouts, 0)
    total = integer("budget", budget, 0)
    prompts, arms = table.shape
    if prompts == 0 or arms == 0:
        raise ValueError(f"utility must have at least one row and one column, got shape {table.shape}")
    least, most = prompts * low, prompts * (low + arms - 1)
    if not least <= total <= most:
        raise ValueError(f"budget must lie in [{least}, {most}] for {prompts} prompts, got {total}")
    gains = np.diff(table, axis=1)  # (N, A-1)
    rounding = 1e-9 * max(1.0, float(np.abs(table).max()))
    if arms > 2 and (np.diff(gains, axis=1) > rounding).any():
        raise ValueError("utility must be concave along axis 1; use exact_budget_allocation for other utilities")
    return greedy_counts(gains, total, low, rng)


def frontier_allocation(utility: ArrayLike, budget: int, *, rng: np.random.Generator | None = None) -> Ints:
    r"""Counts, 0 or at least 2, that maximise a sum of utilities of which the first rollout pays a fixed cost.

        max_n  sum_i U_i(n_i)    s.t.   sum_i n_i = budget,   n_i in {0, 2, 3, ..., n_max},    U_i(0) = U_i(1) = 0

    Rows are concave from n = 1 on and not from 0 on: the first rollout of a group is spent on its baseline. Greedy
    allocation is exact for their concave envelopes, which are linear up to the n that maximises U_i(n) / n, and at most
    one prompt ends inside its linear piece. That prompt's rollouts are then settled at the best count of any unfunded
    prompt, others gaining or giving the difference by their real marginal gains. The result is compared with the best
    plan that funds all prompts (theorem 16):

    - value >= (1 - 1 / budget) times the optimum of the envelopes, which no plan exceeds, unless one rollout is left
      over that no funded prompt has room for (the bound then falls by the least last gain of a funded prompt, which
      gives one back so that two prompts share what is left);
    - value >= that of every plan with all n_i >= 2, uniform counts among them (theorem 18).

    Args:
        utility: (N, n_max + 1) U_i at n = 0, ..., n_max >= 2; 0 at n = 0 and 1, then non-decreasing and concave.
        budget: total rollouts, in [0, N n_max].
        rng: breaks ties at random; without it the first prompts win.

    Returns:
        (N,) integer counts with sum `budget`. One count is 1 where nothing else meets the budget: at budget 1, and at
        n_max = 2 with an odd budget.

    Raises:
        ValueError: a bad argument, a row of another shape, or a budget out of range.

    >>> frontier_allocation([[0, 0, 3, 5, 6], [0, 0, 1, 2, 3], [0, 0, 3, 5, 6]], 8)
    array([4, 0, 4])
    """
    table = floats("utility", utility, (-1, -1))
    total = integer("budget", budget, 0)
    prompts, arms = table.shape
    if prompts == 0 or arms < 3:
        raise ValueError(f"utility must have at least one row and three columns (n = 0, 1, 2), got {table.shape}")
    if total > prompts * (arms - 1):
        raise ValueError(f"budget must lie in [0, {prompts * (arms - 1)}] for {prompts} prompts, got {total}")
    if table[:, :2].any():
        raise ValueError(f"utility must be 0 at n = 0 and n = 1, got {table[:, :2][table[:, :2] != 0][0]}")
    gains, rounding = np.diff(table[:, 1:], axis=1), 1e-9 * max(1.0, float(np.abs(table).max()))
    if (gains < -rounding).any() or (np.diff(gains, axis=1) > rounding).any():
        raise ValueError("utility must be non-decreasing and concave along axis 1 from n = 1 on")
    return frontier_counts(table, total, rng)[0]
