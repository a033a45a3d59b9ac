r"""What a policy gradient is made of: a part common to all prompts, a prompt's own part, and noise (theory section 5).

Prompt i has pass rate p_i. The scores z_j = grad log pi(y_j) of right and of wrong rollouts differ in mean by

    a_i = c + u_i,     grad p_i = p_i (1 - p_i) a_i,     |c|^2 = common,   E|u_i|^2 = own,   E u_i = 0,

the u_i independent of each other; around these means a score has variance `noise`, over all directions together. Then
kappa = own / noise decides how large a group is worth its rollouts (theorem 17, `best_group_size`).

The estimator splits each group into two halves, f and s, each with its own leave-one-out baseline. Let V = k (h - k) /
(h (h - 1)) for a half with k of h right, its unbiased estimate of p (1 - p). *Given the rewards* (theorem 10),

    E f = V_f a,     E|f - V_f a|^2 = noise V_f / (h_f - 1),     f and s independent;   hence

    E <f, s>                                    = V_f V_s |a|^2
    E (h_f - 1) (V_s |f|^2 - V_f <f, s>)        = V_f V_s noise
    E <m_i, m_k>,  m = (f + s) / 2,  i != k     = V_i V_k <a_i, a_k>,   V = (V_f + V_s) / 2

exactly, at any group size. A group whose rewards are all equal adds 0 to both sides, so that selection by reward does
no harm. Each component is a ratio of two such sums, unbiased because the denominator is a constant given the rewards.

Departs: the difference |f|^2 - <f, s> alone, without the V, also holds the variance that the signal itself has because
k varies, (h - 1) |a|^2 Var V = |a|^2 v ((h - 1)/h - v (4 h - 6)/h), v = p (1 - p): at |a|^2 = 3 noise it makes the
noise of a prompt with small p look almost four times as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import comb, inf, nan, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, check_state, floats, integer, integers, number

_BLOCKS = 8  # independent parts of the sums, for intervals: enough for a sign test at 99 %, few enough to be large
_LEAST, _ENOUGH = 8, 64  # prompts of a call per block: while some block is empty, for an interval early, and later
_SMALL = 0.1  # kappa below which groups of 12 have at least 96 % of the progress per rollout of n*, at any p
_NARROW = 8.0  # upper / lower
_TOTALS = ("own", "noise", "weight", "cross_weight")  # (K,) each
_BY_BIN = ("cross", "pairs")  # (K, B + 1) each, the last for unseen prompts


class Estimate(NamedTuple):
    """A value between the ends of its interval; nan between infinite ends while nothing is known.

    >>> Estimate(2.0, 1.0, 4.0).high
    4.0
    """

    value: Any  # float, or (B,) array
    low: Any
    high: Any


def ratio_interval(top: ArrayLike, bottom: ArrayLike, confidence: float = 0.9) -> tuple[float, float]:
    r"""Interval for theta = E top_k / E bottom_k from K independent blocks.

    A theta is left out only if two tests both reject that D_k = top_k - theta bottom_k is centred at 0, so the interval
    covers with `confidence` if *either* test keeps its level:

    - Fieller's: |sum_k D_k| is beyond the t quantile with K - 1 degrees of freedom times its standard error. Holds if
      block sums are nearly Gaussian (many prompts in a block, finite variance), however skewed one prompt is.
    - The sign test: too few of the D_k lie on one side of 0. Holds if each D_k is as often above 0 as below, whatever
      its tails, an infinite variance included: the idea of `median_of_means`.

    Both are unbounded where they should be: Fieller's when the sum of `bottom` is not clearly above 0, the sign test's
    with fewer than 1 + log2(1 / (1 - confidence)) blocks or when some block has bottom <= 0.

    Args:
        top, bottom: (K,) sums of a block each.
        confidence: in (0, 1).

    Returns:
        Both ends; -inf and inf while unknown.

    Raises:
        ValueError: a bad argument.

    >>> low, high = ratio_interval([2.1, 1.8, 2.2, 1.9, 2.0, 2.0], [1.0, 1.1, 0.9, 1.0, 1.0, 1.0])
    >>> round(low, 2), round(high, 2)
    (1.64, 2.44)
    """
    over = floats("top", top, (-1,))
    under = floats("bottom", bottom, over.shape)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence!r}")
    blocks, miss = over.size, 1.0 - confidence
    if blocks < 2 or 2.0 * 0.5**blocks > miss or (under <= 0.0).any():
        return -inf, inf
    from scipy.special import stdtrit  # not at import: `import gdro_core` loads numpy only

    covariance = np.cov(over, under) * (float(stdtrit(blocks - 1, 1.0 - miss / 2.0)) ** 2 / blocks)
    square = under.mean() ** 2 - covariance[1, 1]  # square theta^2 - 2 middle theta + rest <= 0
    if square <= 0.0:
        return -inf, inf
    middle = over.mean() * under.mean() - covariance[0, 1]
    rest = over.mean() ** 2 - covariance[0, 0]
    spread = sqrt(max(middle**2 - square * rest, 0.0))
    ratios = np.sort(over / under)
    skip, tail = 0, 0.5**blocks  # tail = P(Bin(blocks, 1/2) <= skip)
    while 2.0 * (tail + comb(blocks, skip + 1) * 0.5**blocks) <= miss:
        skip += 1
        tail += comb(blocks, skip) * 0.5**blocks
    low = min((middle - spread) / square, ratios[skip])
    return float(low), float(max((middle + spread) / square, ratios[blocks - 1 - skip]))


class VarianceComponents:
    r"""Common, own and noise parts of the policy gradient, and kappa = own / noise, from split groups.

    The sums (head of this file) are kept in 8 independent blocks: a call to `observe` goes to the next block in turn,
    or to several at random if it is large, to as many as it has eights of prompts until each block has been filled
    once, for an interval early, and to as many as it has 64s later. Products of two prompts are taken within a block of
    a call. Values are ratios of sums over all blocks, intervals are `ratio_interval` between blocks.

    Everything is additive. Workers that measure prompts of their own keep an object each, call `observe` equally often
    and `merge` copies into a fresh one to plan with; only products between workers are then left out.

    What it rests on, beyond the model: the noise of a score is the same for right and wrong answers (else `noise` is
    its average (1 - k/h) right + (k/h) wrong), and each component does not depend on p (else it is the average with
    weights near (p (1 - p))^2). A sketch that keeps inner products in expectation keeps all of this. Rewards times x
    multiply common, own and noise by x^2 and leave kappa and cosine.

    Measured on simulated groups of 8 (50 to 1000 prompts, kappa .05 to 10, cosine .15 and .8, 200 to 400 runs a cell):
    90 % intervals of kappa cover in .90-.98 of runs, for Gaussian scores and for scores and own parts of lognormal or
    Student norms whose squares have infinite variance (2.5 degrees of freedom). With the latter, intervals of own,
    noise and cosine alone cover in .54-.99 only: they lie too low together, and the ratio does not.

    Args:
        num_bins: B, for `agreement`.
        discount: in (0, 1], what the old sums keep at each call to `observe`.

    >>> components = VarianceComponents(num_bins=1)
    >>> first, second = [[1.0, 0.0], [1.0, 1.0]], [[2.0, 0.0], [1.0, -1.0]]
    >>> components.observe([0, 0], first, second, correct=[[1, 1], [1, 1]], trials=[[2, 2], [2, 2]])
    >>> components.common, components.own
    (6.0, -2.0)
    >>> components.kappa, components.useful, components.interval()
    (0.0, False, (0.0, inf))
    """

    def __init__(self, num_bins: int, *, discount: float = 1.0) -> None:
        self.num_bins = integer("num_bins", num_bins, 1)
        self.discount = number("discount", discount, 0.0, 1.0, open_low=True)
        self._turn = 0  # the next block
        self._sums = {name: np.zeros(self._shape(name)) for name in (*_TOTALS, *_BY_BIN)}

    def observe(
        self, bins: ArrayLike, first: ArrayLike, second: ArrayLike, correct: ArrayLike, trials: ArrayLike
    ) -> None:
        """Add the groups of M prompts, each split into two halves before its rewards are looked at.

        Groups without a gradient are given as rows of zeros. They matter to `agreement` alone, a mean over prompts;
        every other estimate is the same without them.

        Args:
            bins: (M,) difficulty bins; -1 for unseen prompts, which are part of the mean but of no bin.
            first, second: (M, d) gradients of the halves, sum_j (r_j - mean of the others) z_j / h, rewards 0 or 1.
            correct, trials: (M, 2) right answers and rollouts of each half, at least 2 rollouts.

        Raises:
            ValueError: a bad argument, or a gradient where all rewards of the half are equal; nothing has changed.
        """
        b = integers("bins", bins, (-1,), -1, self.num_bins - 1)
        f = floats("first", first, (b.size, -1))
        s = floats("second", second, f.shape)
        h = integers("trials", trials, (b.size, 2), 2, 2**20).astype(np.float64)
        k = integers("correct", correct, h.shape, 0, 2**20).astype(np.float64)
        if (k > h).any():
            raise ValueError(f"correct must be at most trials, got {k[k > h][0]:g} of {h[k > h][0]:g}")
        spread = k * (h - k) / (h * (h - 1.0))
        for column, (name, half) in enumerate((("first", f), ("second", s))):
            stray = (spread[:, column] == 0.0) & half.any(axis=1)
            if stray.any():
                raise ValueError(f"{name} must be 0 where all rewards of the half are equal, got row {stray.argmax()}")
        for total in self._sums.values():
            total *= self.discount
        least = _LEAST if self._turn < _BLOCKS else _ENOUGH  # not by rewards: that would bias `agreement`
        parts = int(np.clip(b.size // least, 1, _BLOCKS))
        order = np.random.default_rng(self._turn).permutation(b.size)
        for rows in (order[part::parts] for part in range(parts)):
            self._add(self._turn % _BLOCKS, b[rows], f[rows], s[rows], h[rows], spread[rows])
            self._turn += 1

    def merge(self, other: VarianceComponents) -> None:
        """Add the sums of another one with the same settings, over other prompts; nothing is discounted.

        Raises:
            ValueError: other settings.
        """
        check_state("VarianceComponents", other.state_dict(), self._settings(), ())
        for name, total in self._sums.items():
            total += other._sums[name]
        self._turn += other._turn

    @property
    def common(self) -> float | None:
        """|c|^2, the squared length of the direction that all prompts share; unbiased, so it can fall below 0."""
        return _value(*self._parts()["common"])

    @property
    def own(self) -> float | None:
        """E|u|^2, the squared length of a prompt's own direction; unbiased, so it can fall below 0."""
        return _value(*self._parts()["own"])

    @property
    def noise(self) -> float | None:
        """sigma^2, the variance of a score given its reward, over all directions; can fall below 0."""
        return _value(*self._parts()["noise"])

    @property
    def cosine(self) -> float | None:
        """common / (common + own), about the cosine between the true gradients of two prompts."""
        return _value(*self._parts()["cosine"])

    @property
    def kappa(self) -> float | None:
        """own / noise, at least 0; None while the noise is unknown."""
        value = _value(*self._parts()["kappa"])
        return None if value is None else max(value, 0.0)

    def interval(self, confidence: float = 0.9) -> tuple[float, float]:
        """Ends of an interval for kappa; the lower is at least 0, the upper inf while nothing bounds it."""
        low, high = ratio_interval(*self._parts()["kappa"], confidence)
        return max(low, 0.0), max(high, 0.0)

    @property
    def useful(self) -> bool:
        """Kappa is known well enough to plan by: 90 % interval within a factor 8, or wholly below .1.

        A group size from a kappa that is wrong by a factor r keeps at least 4 / (2 + r^.5 + r^-.5) of the progress per
        rollout at n*: .94 for r = sqrt(8), .77 for r = 8. Below .1 groups of 12 keep .96 of that of any smaller ones.
        """
        low, high = self.interval()
        return high <= _SMALL or 0.0 < high <= _NARROW * low

    def estimates(self, confidence: float = 0.9) -> dict[str, Estimate]:
        """`common`, `own`, `noise`, `cosine`, `kappa`: each with its interval, none cut off at 0."""
        found = {}
        for name, (top, bottom) in self._parts().items():
            value = _value(top, bottom)
            found[name] = Estimate(nan if value is None else value, *ratio_interval(top, bottom, confidence))
        return found

    def agreement(self, confidence: float = 0.9) -> Estimate:
        """(B,) <g_b, g>: mean gradient of the prompts of bin b with that of all measured prompts, g = sum_b p_b g_b.

        By how much mean reward rises, to first order, with a step along the gradient of bin b alone: the mean of
        <m_i, m_k> over prompts i of the bin and all other prompts k. Unlike the components it is a mean over *prompts*,
        those without a gradient included. nan and infinite ends for a bin of which no pair was measured.
        """
        columns = []
        for cross, pairs in zip(self._sums["cross"].T[:-1], self._sums["pairs"].T[:-1], strict=True):
            known = pairs > 0.0
            value = _value(cross[known], pairs[known])
            ends = ratio_interval(cross[known], pairs[known], confidence)
            columns.append((nan if value is None else value, *ends))
        return Estimate(*np.array(columns).T)

    def state_dict(self) -> dict[str, Any]:
        """Settings and sums as plain lists and numbers."""
        return {**self._settings(), "turn": self._turn, **{name: s.tolist() for name, s in self._sums.items()}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of one with the same settings; on ValueError nothing has changed."""
        check_state("VarianceComponents", saved, self._settings(), ("turn", *self._sums))
        turn = integer("turn", saved["turn"], 0)
        sums = {name: floats(name, saved[name], self._shape(name)).copy() for name in self._sums}
        self._turn, self._sums = turn, sums

    def _add(self, block: int, b: Any, f: Floats, s: Floats, h: Floats, spread: Floats) -> None:
        """Add the rows of a block: bins (m,), halves (m, d), rollouts and spreads V of the halves (m, 2)."""
        product = np.einsum("md,md->m", f, s)
        squares = np.stack([np.einsum("md,md->m", half, half) for half in (f, s)], axis=1)
        noise = (h - 1.0) * (spread[:, ::-1] * squares - spread * product[:, None])
        mean, v = 0.5 * (f + s), spread.mean(axis=1)
        with_others = mean @ mean.sum(axis=0) - np.einsum("md,md->m", mean, mean)
        seen = np.where(b >= 0, b, self.num_bins)
        self._sums["own"][block] += product.sum()
        self._sums["noise"][block] += 0.5 * noise.sum()
        self._sums["weight"][block] += spread.prod(axis=1).sum()
        self._sums["cross_weight"][block] += v.sum() ** 2 - v @ v
        self._sums["cross"][block] += np.bincount(seen, with_others, self.num_bins + 1)
        self._sums["pairs"][block] += np.bincount(seen, minlength=self.num_bins + 1) * (b.size - 1.0)

    def _parts(self) -> dict[str, tuple[Floats, Floats]]:
        """Numerator and denominator of each component by block, over the blocks that have both weights."""
        known = (self._sums["weight"] > 0.0) & (self._sums["cross_weight"] > 0.0)
        square, noise, weight = (self._sums[name][known] for name in ("own", "noise", "weight"))
        common = self._sums["cross"].sum(axis=1)[known] / self._sums["cross_weight"][known] * weight
        own = square - common
        return {
            "common": (common, weight),
            "own": (own, weight),
            "noise": (noise, weight),
            "cosine": (common, square),
            "kappa": (own, noise),
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        return (_BLOCKS, self.num_bins + 1) if name in _BY_BIN else (_BLOCKS,)

    def _settings(self) -> dict[str, Any]:
        return {"version": 1, "num_bins": self.num_bins, "discount": self.discount}


def _value(top: Floats, bottom: Floats) -> float | None:
    """Ratio of the sums; None unless the denominator is above 0."""
    return float(top.sum() / bottom.sum()) if bottom.sum() > 0.0 else None
