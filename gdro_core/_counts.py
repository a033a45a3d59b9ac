"""Whole counts under an exact budget, for checked tables; `gdro_core.allocation` says what they solve."""

from __future__ import annotations

import numpy as np

from gdro_core._validate import Floats, Ints


def spread_ratio(n: Floats | Ints, v: Floats) -> Floats:
    """E[X^2] / E[X] of X = n k (1 - k), k the mean of n >= 1 coins of variance v (theorem 16)."""
    return np.asarray(v * (n - 1.0) + ((n - 1.0) * (1.0 - 4.0 * v) + 2.0 * v) / n)


def greedy_counts(gains: Floats, total: int, low: int, rng: np.random.Generator | None = None) -> Ints:
    """Greedy by (N, A - 1) marginal gains, non-increasing along rows but for rounding; counts are at least `low`."""
    prompts, steps = gains.shape
    gains = np.minimum.accumulate(gains, axis=1)
    extra = total - prompts * low
    counts = np.full(prompts, low, dtype=np.int64)
    if extra == 0:
        return counts
    flat = gains.ravel()
    threshold = np.partition(flat, flat.size - extra)[flat.size - extra]  # the smallest gain that is still bought
    counts += (gains > threshold).sum(axis=1)
    ties = np.flatnonzero(flat == threshold)
    if rng is not None:
        rng.shuffle(ties)
    np.add.at(counts, ties[: total - int(counts.sum())] // steps, 1)
    return counts


def frontier_counts(table: Floats, total: int, rng: np.random.Generator | None = None) -> Ints:
    """`frontier_allocation` of a (N, n_max + 1) table: the better of the plan on envelopes and that with all n >= 2."""
    prompts = table.shape[0]
    order = np.arange(prompts) if rng is None else rng.permutation(prompts)
    rows = table[order]
    plans = [_frontier_plan(rows, total)]
    if 2 * prompts <= total:
        plans.append(greedy_counts(np.diff(rows[:, 2:], axis=1), total, 2))
    each = np.arange(prompts)
    counts = np.empty(prompts, dtype=np.int64)
    counts[order] = max(plans, key=lambda plan: float(rows[each, plan].sum()))
    return counts


def _frontier_plan(table: Floats, budget: int) -> Ints:
    """Greedy on the concave envelopes of (N, n_max + 1) rows, and the repair of the prompt left inside its line."""
    prompts, most = table.shape[0], table.shape[1] - 1
    counts = np.zeros(prompts, dtype=np.int64)
    if budget == 0:
        return counts
    columns = np.ascontiguousarray(table.T)  # reductions along the first axis are quicker
    n = np.arange(1, most + 1)[:, None]
    rates = columns[2:] / n[1:]
    rate = rates.max(axis=0)
    size = (rates == rate).argmax(axis=0) + 2  # the envelope is linear from 0 to here
    gains = np.minimum.accumulate(np.where(n <= size, rate, np.diff(columns, axis=0)), axis=0)
    threshold = np.partition(gains.ravel(), -budget)[-budget]  # the smallest gain that is still bought
    counts += np.count_nonzero(gains > threshold, axis=0)
    tied = np.flatnonzero(rate == threshold)
    whole = tied[np.cumsum(size[tied]) <= budget - counts.sum()]
    counts[whole] = size[whole]
    left = budget - int(counts.sum())
    if left > 0:  # further rollouts of the same gain, for prompts beyond their lines
        single = np.count_nonzero(gains == threshold, axis=0) - np.where(rate == threshold, size, 0)
        more = np.repeat(np.arange(prompts), np.where(counts > 0, single, 0))[:left]
        np.add.at(counts, more, 1)
        left -= more.size
    return counts if left == 0 else _settle(table, counts, left)


def _least(values: Floats, k: int) -> Ints:
    """Places of the k least values, in ascending order."""
    some = np.argpartition(values, k - 1)[:k] if k < values.size else np.arange(values.size)
    return np.asarray(some[np.argsort(values[some], kind="stable")])


def _settle(table: Floats, counts: Ints, left: int) -> Ints:
    """Give `left` rollouts, too few for the line of the next prompt, to the best use; counts are 0 or at least 2."""
    most = table.shape[1] - 1
    n = np.arange(1, most + 1)
    funded, free = np.flatnonzero(counts > 0), np.flatnonzero(counts == 0)
    held = counts[funded]
    # The `most` best gains of concave rows lie in the `most` rows whose next gain is best; losses likewise.
    gain = np.where(held < most, table[funded, np.minimum(held + 1, most)] - table[funded, held], -np.inf)
    loss = np.where(held > 2, table[funded, held] - table[funded, held - 1], np.inf)
    takers, givers = (funded[np.argsort(key, kind="stable")[:most], None] for key in (-gain, loss))
    up = np.where(n > counts[takers], np.diff(table[takers[:, 0]], axis=1), -np.inf).ravel()
    down = np.where((n <= counts[givers]) & (n > 2), np.diff(table[givers[:, 0]], axis=1), np.inf).ravel()
    rising, falling = _least(-up, most), _least(down, most)
    # What the funded prompts gain by `left` - t rollouts more, at t = 0, 1, ... of an unfunded one
    others = np.concatenate([np.cumsum(up[rising])[::-1], [0.0], -np.cumsum(down[falling])])
    taken = np.arange(most + 1) - left
    reach = (taken >= -rising.size) & (taken <= falling.size)
    value = table[free].max(axis=0) + np.where(reach, np.take(others, rising.size + taken, mode="clip"), -np.inf)
    value[1] = -np.inf  # a baseline and nothing to compare with it
    best = int(value.argmax())
    counts = counts.copy()
    if value[best] == -np.inf:
        counts[free[0]] = left
        return counts
    if taken[best] < 0:
        np.add.at(counts, takers[rising[: -taken[best]] // most, 0], 1)
    else:
        np.subtract.at(counts, givers[falling[: taken[best]] // most, 0], 1)
    if best:
        counts[free[table[free, best].argmax()]] = best
    return counts
