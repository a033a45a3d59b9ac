"""Whole counts under an exact budget, for checked tables; `gdro_core.allocation` says what they solve."""

from __future__ import annotations

import numpy as np

from gdro_core._validate import Floats, Ints


def spread_ratio(n: Floats | Ints, v: Floats) -> Floats:
    """E[X^2] / E[X] of X = n k (1 - k), k the mean of n >= 1 coins of variance v (theorem 16)."""
    ratio = np.asarray((n - 1.0) * (1.0 - 4.0 * v))
    ratio += 2.0 * v
    ratio /= n
    ratio += v * (n - 1.0)
    return ratio


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


def frontier_counts(table: Floats, total: int, rng: np.random.Generator | None = None) -> tuple[Ints, float]:
    """`frontier_allocation` of a (N, n_max + 1) table: the better of the plan on envelopes and that with all n >= 2.

    Also the largest gain per rollout still for sale, 0 if there is none.
    """
    prompts, most = table.shape[0], table.shape[1] - 1
    columns = np.ascontiguousarray(table.T)  # reductions along the first axis are quicker
    order = np.arange(prompts) if rng is None else rng.permutation(prompts)  # the first of equal prompts wins
    rate, size = _lines(columns)
    rate, size = rate[order], size[order]
    plan, left, price = np.zeros(prompts, dtype=np.int64), 0, 0.0
    if total:
        plan, left, price = _fill_envelopes(columns, order, rate, size, total)
    worth = columns[plan, order]
    bound = float(worth.sum()) + left * price - 2.0 * float(np.maximum(price - rate, 0.0).sum())
    if left > 0:
        plan = _settle(columns, order, plan, left)
        worth = columns[plan, order]
    value = float(worth.sum())
    if 2 * prompts <= total and bound > value * (1.0 - 1e-9):  # else none with all n >= 2 has more (theorem 16)
        other = greedy_counts((columns[3:] - columns[2:-1]).T[order], total, 2)
        if float(columns[other, order].sum()) > value:
            plan, worth = other, columns[other, order]
    gain = np.where(plan == 0, rate, columns[np.minimum(plan + 1, most), order] - worth)
    counts = np.empty(prompts, dtype=np.int64)
    counts[order] = plan
    return counts, float(gain.max(initial=0.0))


def _lines(columns: Floats) -> tuple[Floats, Ints]:
    """Envelopes of (n_max + 1, N) columns are linear from 0 on: (N,) slopes, and (N,) n >= 2 where the lines end."""
    rates = columns[2:] / np.arange(2, columns.shape[0])[:, None]
    rate = rates.max(axis=0)
    return rate, (rates == rate).argmax(axis=0) + 2


def _fill_envelopes(columns: Floats, order: Ints, rate: Floats, size: Ints, budget: int) -> tuple[Ints, int, float]:
    """Greedy on the concave envelopes of (n_max + 1, N) columns, but for the line that the budget ends inside of.

    Row i of all (N,) arrays is of column order_i.

    Returns:
        (N,) counts, each 0 or at least `size`; the rollouts left over; the least gain bought.
    """
    most = columns.shape[0] - 1
    best = rate.argsort()[::-1]
    enough = min(int(size[best].cumsum().searchsorted(budget)), rate.size - 1)
    rows = np.flatnonzero(rate >= rate[best[enough]])  # lines of these spend the budget: the others get nothing
    line, end, some = rate[rows], size[rows], columns.take(order[rows], axis=1)
    gains = some[1:] - some[:-1]
    np.copyto(gains, line, where=np.arange(1, most + 1)[:, None] <= end)
    for k in range(1, most):
        np.minimum(gains[k - 1], gains[k], out=gains[k])
    price = np.partition(gains.ravel(), -budget)[-budget]  # the smallest gain that is still bought
    held = np.add.reduce(gains > price, axis=0, dtype=np.int64)
    left = budget - int(held.sum())
    tied = np.flatnonzero(line == price)
    whole = tied[end[tied].cumsum() <= left]
    held[whole] = end[whole]
    left -= int(end[whole].sum())
    if left > 0:  # further rollouts of the same gain, for prompts beyond their lines
        single = np.add.reduce(gains == price, axis=0, dtype=np.int64)
        single[tied] -= end[tied]
        more = np.repeat(np.arange(rows.size), np.where(held > 0, single, 0))[:left]
        np.add.at(held, more, 1)
        left -= more.size
    counts = np.zeros(rate.size, dtype=np.int64)
    counts[rows] = held
    return counts, left, float(price)


def _least(values: Floats, k: int) -> Ints:
    """Places of the k least values, in ascending order."""
    some = np.argpartition(values, k - 1)[:k] if k < values.size else np.arange(values.size)
    return np.asarray(some[np.argsort(values[some], kind="stable")])


def _first(values: Floats, k: int) -> Ints:
    """Places of the k least values, the earlier first where two are equal."""
    few = np.arange(values.size)
    if k < values.size:
        few = np.flatnonzero(values <= np.partition(values, k - 1)[k - 1])
    return np.asarray(few[values[few].argsort(kind="stable")][:k])


def _settle(columns: Floats, order: Ints, counts: Ints, left: int) -> Ints:
    """Give `left` rollouts, too few for the line of the next prompt, to the best use; counts are 0 or at least 2."""
    most = columns.shape[0] - 1
    n = np.arange(1, most + 1)
    funded, free = np.flatnonzero(counts > 0), np.flatnonzero(counts == 0)
    held, place = counts[funded], order[funded]
    # The `most` best gains of concave rows lie in the `most` rows whose next gain is best; losses likewise.
    now = columns[held, place]
    gain = np.where(held < most, columns[np.minimum(held + 1, most), place] - now, -np.inf)
    loss = np.where(held > 2, now - columns[held - 1, place], np.inf)
    takers, givers = _first(-gain, most), _first(loss, most)
    up, down = (np.diff(columns.take(place[rows], axis=1), axis=0).T for rows in (takers, givers))
    up = np.where(n > held[takers, None], up, -np.inf).ravel()
    down = np.where((n <= held[givers, None]) & (n > 2), down, np.inf).ravel()
    rising, falling = _least(-up, most), _least(down, most)
    # What the funded prompts gain by `left` - t rollouts more, at t = 0, 1, ... of an unfunded one
    others = np.concatenate([np.cumsum(up[rising])[::-1], [0.0], -np.cumsum(down[falling])])
    taken = np.arange(most + 1) - left
    reach = (taken >= -rising.size) & (taken <= falling.size)
    unfunded = columns.take(order[free], axis=1)
    value = unfunded.max(axis=1) + np.where(reach, np.take(others, rising.size + taken, mode="clip"), -np.inf)
    value[1] = -np.inf  # a baseline and nothing to compare with it
    best = int(value.argmax())
    counts = counts.copy()
    if value[best] == -np.inf:
        counts[free[0]] = left
        return counts
    if taken[best] < 0:
        np.add.at(counts, funded[takers[rising[: -taken[best]] // most]], 1)
    else:
        np.subtract.at(counts, funded[givers[falling[: taken[best]] // most]], 1)
    if best:
        counts[free[unfunded[best].argmax()]] = best
    return counts


def token_counts(
    table: Floats,
    cost: Floats,
    budget: float,
    room: int,
    low: int,
    *,
    baseline: bool,
    evenness: float = 0.0,
    rng: np.random.Generator | None = None,
) -> tuple[Ints, float]:
    """`token_allocation` of a (N, A) table of n = low, low + 1, ...: counts, and the best gain a token still for sale.

    With `baseline`, `low` is 0 and rows, 0 at n = 1, are concave from there on; else they are concave. With `evenness`
    1 pieces are bought by gain per rollout, as far as the tokens go.
    """
    order = np.arange(cost.size) if rng is None else rng.permutation(cost.size)  # the first of equal prompts wins
    shop = _Shop(table[order], cost[order], low, baseline=baseline)
    plans = [shop.plan(budget, room, evenness)]
    equal = min(int(budget * (1.0 + 1e-12) / cost.sum()), room // cost.size, low + table.shape[1] - 1)
    if equal > low + 1:  # no plan is below that of equal counts
        plans.append(
            _Shop(table[order, equal - low :], cost[order], equal, baseline=False).plan(budget, room, evenness)
        )
    best = max(plans, key=lambda plan: float(shop.value(plan)))
    counts = np.empty(cost.size, dtype=np.int64)
    counts[order] = best
    return counts, shop.price(best)


class _Shop:
    """What is for sale: rollouts one by one, but for the line of a row that pays for a baseline first.

    Args:
        table: (N, A) utilities of n = low, low + 1, ...
        cost: (N,) tokens of a rollout.
        low: rollouts that every row has.
        baseline: whether the first rollout is worth nothing.
    """

    def __init__(self, table: Floats, cost: Floats, low: int, *, baseline: bool) -> None:
        self.table, self.cost, self.low = table, cost, low
        self.gains = np.diff(table, axis=1)  # (N, A - 1)
        self.size = np.ones(self.gains.shape, dtype=np.int64)  # rollouts of each piece; 0: part of the line before it
        self.line = np.ones(cost.size, dtype=np.int64)
        if baseline:
            rate, self.line = _lines(np.ascontiguousarray(table.T))
            inside = np.arange(self.gains.shape[1]) < self.line[:, None]
            self.gains = np.where(inside, rate[:, None], self.gains)
            self.size[inside] = 0
            self.size[:, 0] = self.line
        self.gains = np.minimum.accumulate(self.gains, axis=1)

    def plan(self, budget: float, room: int, evenness: float) -> Ints:
        """(N,) counts by gain over tokens and rollouts mixed; where that is cut off by `room`, at the best mixture."""
        tokens, rollouts = budget - self.low * float(self.cost.sum()), room - self.low * self.cost.size
        counts, crowded = self._fill(evenness, tokens, rollouts)
        if not crowded or evenness == 1.0:
            return counts
        few, many = evenness, 1.0
        plans = [counts, self._fill(1.0, tokens, rollouts)[0]]
        for _ in range(8):
            middle = 0.5 * (few + many)
            counts, crowded = self._fill(middle, tokens, rollouts)
            plans.append(counts)
            few, many = (middle, many) if crowded else (few, middle)
        return max(plans, key=lambda plan: float(self.value(plan)))

    def value(self, counts: Ints) -> Floats:
        """Sum of utilities."""
        return np.asarray(self.table[np.arange(counts.size), counts - self.low].sum())

    def price(self, counts: Ints) -> float:
        """Largest gain per token of a piece still for sale."""
        step = np.minimum(counts - self.low, self.gains.shape[1] - 1)
        gain = self.gains[np.arange(counts.size), step] / self.cost
        return float(gain[counts - self.low < self.gains.shape[1]].max(initial=0.0))

    def _fill(self, mix: float, tokens: float, rollouts: int) -> tuple[Ints, bool]:
        """Greedy by gain over (1 - mix) tokens + mix rollouts of mean cost, and whether rollouts ran out first."""
        charge = (1.0 - mix) * self.cost + mix * self.cost.mean()
        kept = np.flatnonzero(self.size)
        rows, size = kept // max(self.gains[0].size, 1), self.size.ravel()[kept]
        best = np.argsort(-self.gains.ravel()[kept] / charge[rows], kind="stable")
        rows, size = rows[best], size[best]
        spent, used = np.cumsum(size * self.cost[rows]), np.cumsum(size)
        budget = tokens * (1.0 + 1e-12)
        whole = int(min(np.searchsorted(spent, budget, "right"), np.searchsorted(used, rollouts, "right")))
        crowded = whole < size.size and bool(used[whole] > rollouts) and bool(spent[whole] <= budget)
        extra = np.bincount(rows[:whole], size[:whole], self.cost.size).astype(np.int64)
        left = budget - (float(spent[whole - 1]) if whole else 0.0)
        room = rollouts - (int(used[whole - 1]) if whole else 0)
        everyone, most = np.arange(self.cost.size), self.gains[0].size
        while True:  # what is left over: the best gain a charge that still fits, of a line also a part
            fits = np.minimum(left / self.cost, room).astype(np.int64)
            more = np.minimum(np.minimum(np.where(extra == 0, self.line, 1), fits), most - extra)
            gain = self.table[everyone, extra + more] - self.table[everyone, extra]
            sold = more >= np.where((extra == 0) & (self.line > 1), 2, 1)
            rate = np.where(sold, np.maximum(gain, 0.0) / (np.maximum(more, 1) * charge), -1.0)
            row = int(rate.argmax())
            if not sold[row]:
                return extra + self.low, crowded
            extra[row] += more[row]
            left -= float(more[row] * self.cost[row])
            room -= int(more[row])
