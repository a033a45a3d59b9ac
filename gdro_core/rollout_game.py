"""Rollout-GDRO: more rollouts for the prompts that need them, at exactly the same mean budget (§3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._budget import checked_bounds, split_budget
from gdro_core._counts import frontier_counts, greedy_counts, token_counts
from gdro_core._validate import Floats, Ints, floats, integer, integers, number
from gdro_core.theory.paths import exact_budget_allocation
from gdro_core.utilities import VARIANCE, Utility


@dataclass(frozen=True)
class RolloutGDRO:
    r"""Integer rollout counts that maximise a utility under the exact budget sum_i n_i = n_bar N (Eq. 19).

        max_n  sum_i ω_i^k U(n_i; a_i, b_i)    s.t.   sum_i n_i = n_bar N,   n_min <= n_i <= n_max

    It has no memory: posterior and weights decide. Every prompt gets its own count, by greedy where the utility is
    concave, and on its concave envelope where it is so from n = 1 on only (`frontier_allocation`: nobody gets one
    rollout); with `per_bin` all prompts of a bin share one count (as published), by the dynamic program. Prompt weights
    ω enter as the joint law demands (F7): `VARIANCE` and `signal` are multiplied by ω², `MIXED` and `HIT` by ω. Prompts
    never seen (bin −1) get n_bar. With n_min = 0 a prompt may get no rollout, and is then not observed.

    Departs: the paper learns these counts by a bandit on the update's losses (`PublishedRolloutGDRO`, F2); a posterior
    knows what every number of rollouts would be worth.

    Args:
        mean_rollouts: n_bar; n_bar N must be an integer.
        min_rollouts: n_min, at least `utility.fewest`.
        max_rollouts: n_max; n_min <= n_bar <= n_max.
        utility: `signal(kappa)`, `VARIANCE`, `MIXED`, `HIT` (`gdro_core.utilities`), or a record of your own.
        per_bin: one count for all prompts of a bin.
        permute: the zero-information null (F5): the counts of the seen prompts are permuted at random.

    >>> game = RolloutGDRO(mean_rollouts=4, min_rollouts=2, max_rollouts=12)
    >>> game.counts([0, 1, -1], a=[5.0, 0.5, 0.5], b=[5.0, 9.5, 0.5])  # p about .5, .05, unknown
    array([6, 2, 4])
    """

    mean_rollouts: float
    min_rollouts: int
    max_rollouts: int
    utility: Utility = VARIANCE
    per_bin: bool = False
    permute: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.utility, Utility):
            raise ValueError(f"utility must be a Utility such as gdro_core.VARIANCE, got {self.utility!r}")
        what = f' with utility "{self.utility.name}"'
        bounds = checked_bounds(
            what, self.mean_rollouts, self.min_rollouts, self.max_rollouts, fewest=self.utility.fewest
        )
        for name, value in zip(("mean_rollouts", "min_rollouts", "max_rollouts"), bounds, strict=True):
            object.__setattr__(self, name, value)

    @property
    def arms(self) -> Ints:
        """(A,) the counts n_min, ..., n_max."""
        return np.arange(self.min_rollouts, self.max_rollouts + 1)

    def counts(
        self,
        bins: ArrayLike,
        a: ArrayLike,
        b: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        rng: np.random.Generator | None = None,
    ) -> Ints:
        """Rollouts of each prompt of a batch: the first half of `allocate`."""
        return self.allocate(bins, a, b, weights, rng=rng)[0]

    def allocate(
        self,
        bins: ArrayLike,
        a: ArrayLike,
        b: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        budget: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> tuple[Ints, float]:
        """Rollouts of each prompt of a batch, and what one rollout more would be worth.

        Args:
            bins: (N,) bin of each prompt, −1 if never seen.
            a: (N,) posterior successes (`OnlineDifficultyClassifier.posterior`).
            b: (N,) posterior failures.
            weights: (N,) prompt weights ω >= 0 of the joint law; None for 1.
            budget: rollouts in all; None for n_bar N. With n_min = 0 it may be less: the first budget / n_bar prompts
                are then the batch, and the others candidates, which share in it if they were seen before.
            rng: breaks ties at random; draws for `permute`, which needs it.

        Returns:
            counts: (N,) integers in n_min..n_max with the sum of the budget.
            price: shadow price mu >= 0 [utility / rollout], the largest gain per rollout still for sale at this
                allocation (0 if everybody is at n_max or unseen).

        Raises:
            ValueError: n_bar N is no integer, a budget outside of the bounds, no choice per bin meets it, a utility
                that is not concave, or no rng to draw with.
        """
        if rng is None and self.permute:
            raise ValueError("rng must be given with permute, got None")
        group, counts, seen, rest = self._split(bins, budget)
        utility = self._utility(group, a, b, weights, seen)
        if seen.size == 0:
            return counts, 0.0
        low = self.min_rollouts
        if self.per_bin:
            present, member, size = np.unique(group[seen], return_inverse=True, return_counts=True)
            total_utility = np.zeros((present.size, self.arms.size))
            np.add.at(total_utility, member, utility)
            of_bin = exact_budget_allocation(total_utility, size, rest, min_rollouts=low, rng=rng)
            counts[seen], price = of_bin[member], _gain_for_sale(total_utility / size[:, None], of_bin - low)
        else:
            gains = self._concave(utility)
            if low < self.utility.concave_from:
                counts[seen], price = frontier_counts(utility, rest, rng)
            else:
                counts[seen] = greedy_counts(gains, rest, low, rng)
                arm = counts[seen] - low
                on = np.flatnonzero(arm < gains.shape[1])
                price = float(gains[on, arm[on]].max(initial=0.0))
        if self.permute and rng is not None:
            counts[seen] = rng.permutation(counts[seen])
        return counts, price

    def allocate_tokens(
        self,
        bins: ArrayLike,
        a: ArrayLike,
        b: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        costs: ArrayLike,
        tokens: float,
        most: int,
        evenness: float = 0.0,
        budget: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> tuple[Ints, float]:
        """As `allocate`, where the budget is the expected tokens of all rollouts (`token_allocation`, theorem 22).

        Args:
            bins, a, b, weights, rng: as in `allocate`.
            costs: (N,) > 0, expected tokens of a rollout of each prompt.
            tokens: in all; what prompts never seen leave of it is for the others, who get n_min in any case.
            evenness: in [0, 1], share of a rollout's price that is the same for all: 0 buys by gain per token, 1 by
                gain per rollout, as far as the tokens go.
            most: most rollouts in all, unless n_bar for each prompt never seen and n_min for the others are more.
            budget: as in `allocate`; here it says which prompts are the batch.

        Returns:
            counts: (N,) integers, never seen prompts n_bar, the others n_min..n_max.
            price: largest gain per token still for sale [utility / token].

        Raises:
            ValueError: a bad argument, `per_bin` or `permute`, or a utility that is not concave.
        """
        if self.per_bin or self.permute:
            raise ValueError(f"allocate_tokens needs one count a prompt, by what it is worth, got {self!r}")
        group, counts, seen, _ = self._split(bins, budget)
        cost = floats("costs", costs, group.shape, 0.0)
        if not cost.all():
            raise ValueError("costs must be above 0, got 0.0")
        utility = self._utility(group, a, b, weights, seen)
        if seen.size == 0:
            return counts, 0.0
        self._concave(utility)
        low = self.min_rollouts
        left = max(number("tokens", tokens, 0.0) - float(counts @ cost), low * float(cost[seen].sum()))
        room = max(integer("most", most, 0) - int(counts.sum()), low * seen.size)
        baseline, even = low < self.utility.concave_from, number("evenness", evenness, 0.0, 1.0)
        counts[seen], price = token_counts(
            utility, cost[seen], left, room, low, baseline=baseline, evenness=even, rng=rng
        )
        return counts, price

    def _split(self, bins: ArrayLike, budget: int | None) -> tuple[Ints, Ints, Ints, int]:
        """The bins, and `split_budget` of them."""
        group, low = integers("bins", bins, (-1,), -1, 2**31), self.min_rollouts
        if budget is not None and not low * group.size <= budget <= self.mean_rollouts * group.size:
            most = self.mean_rollouts * group.size
            raise ValueError(f"budget must lie in [{low * group.size}, {most:g}] for these prompts, got {budget}")
        return (group, *split_budget(group, self.mean_rollouts, budget))

    def _utility(self, group: Ints, a: ArrayLike, b: ArrayLike, weights: ArrayLike | None, seen: Ints) -> Floats:
        """(seen, A) utility of every number of rollouts."""
        alpha, beta = floats("a", a, group.shape, 0.0), floats("b", b, group.shape, 0.0)
        if not (alpha.all() and beta.all()):
            raise ValueError(f"{'b' if alpha.all() else 'a'} must be above 0, got 0.0")
        omega = np.ones(group.shape) if weights is None else floats("weights", weights, group.shape, 0.0)
        if seen.size == 0:
            return np.zeros((0, self.arms.size))
        scale = omega[seen] ** self.utility.weight_power
        return np.asarray(self.utility.table(alpha[seen, None], beta[seen, None], self.arms) * scale[:, None])

    def _concave(self, utility: Floats) -> Floats:
        """(seen, A - 1) marginal gains, if they fall from where greedy starts on."""
        gains, fixed_cost = np.diff(utility, axis=1), self.min_rollouts < self.utility.concave_from
        bend = float(np.diff(gains[:, 1:] if fixed_cost else gains, axis=1).max(initial=0.0))
        if bend > 1e-9 and bend > 1e-9 * float(np.abs(utility).max()):
            least = max(self.min_rollouts, 1)
            raise ValueError(f"utility must be concave from n = {least} on, got {self.utility.name!r}")
        return gains

    def extend(
        self,
        first: ArrayLike,
        correct: ArrayLike,
        rest: int,
        a: ArrayLike,
        b: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        rng: np.random.Generator | None = None,
    ) -> tuple[Ints, float]:
        """Hand out further rollouts after a first stage whose rewards are known: the commit of pilot and commit.

        What a group has shown is certain, what it will show is expected: U is `Utility.further`. Needs a `signal`.

        Args:
            first: (N,) rollouts of the first stage, at most n_max; prompts with none stay without.
            correct: (N,) summed rewards of it.
            rest: rollouts to hand out.
            a, b: (N,) posterior successes and failures > 0, the first stage included.
            weights: (N,) prompt weights ω >= 0 of the joint law; None for 1.
            rng: breaks ties at random.

        Returns:
            counts: (N,) of both stages.
            price: gain of the last rollout that was bought; 0 at `rest` 0.

        Raises:
            ValueError: a bad argument, or no room for `rest` under n_max.
        """
        counts, gains = self._further(first, correct, a, b, weights)
        room = int(np.isfinite(gains).sum())
        if not 0 <= rest <= room:
            raise ValueError(f"rest must lie in [0, {room}], the room under max_rollouts, got {rest}")
        added = greedy_counts(gains, rest, 0, rng)
        bought = gains[np.arange(1, self.max_rollouts + 1) <= added[:, None]]
        return counts + added, float(bought.min(initial=np.inf)) if rest else 0.0

    def extend_tokens(
        self,
        first: ArrayLike,
        correct: ArrayLike,
        a: ArrayLike,
        b: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        costs: ArrayLike,
        tokens: float,
        most: int,
        evenness: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> tuple[Ints, float]:
        """As `extend`, where what is left is a budget of tokens: greedy by gain per token (theorem 22).

        Args:
            first, correct, a, b, weights, rng: as in `extend`.
            costs: (N,) > 0, expected tokens of a rollout.
            tokens: of both stages; none are left if the first was expected to cost more.
            most: most rollouts of both stages.
            evenness: as in `allocate_tokens`.

        Returns:
            counts: (N,) of both stages.
            price: gain per token of the last rollout that was bought, at evenness 0; 0 if none was.

        Raises:
            ValueError: a bad argument.
        """
        counts, gains = self._further(first, correct, a, b, weights)
        cost = floats("costs", costs, counts.shape, 0.0)
        if not cost.all():
            raise ValueError("costs must be above 0, got 0.0")
        rows = np.arange(cost.size) if rng is None else rng.permutation(cost.size)  # the first of equal prompts wins
        share = number("evenness", evenness, 0.0, 1.0)
        charge = (1.0 - share) * cost + share * cost.mean()
        density = np.minimum.accumulate(gains[rows] / charge[rows, None], axis=1).ravel()
        order = np.argsort(-density, kind="stable")
        order = order[np.isfinite(density[order])]
        owner = rows[order // gains.shape[1]]
        left = number("tokens", tokens, 0.0) - float(counts @ cost)
        room = max(integer("most", most, 0) - int(counts.sum()), 0)
        whole = min(int(np.searchsorted(np.cumsum(cost[owner]), left * (1.0 + 1e-12), "right")), room)
        counts += np.bincount(owner[:whole], minlength=counts.size)
        return counts, float(density[order[whole - 1]]) if whole else 0.0

    def _further(
        self, first: ArrayLike, correct: ArrayLike, a: ArrayLike, b: ArrayLike, weights: ArrayLike | None
    ) -> tuple[Ints, Floats]:
        """(N,) first stage, and (N, n_max) gains of 1, 2, ... rollouts more, -inf where there is no room for them."""
        counts = integers("first", first, (-1,), 0, self.max_rollouts)
        right = floats("correct", correct, counts.shape, 0.0)
        alpha, beta = floats("a", a, counts.shape, 0.0)[:, None], floats("b", b, counts.shape, 0.0)[:, None]
        omega = np.ones(counts.shape) if weights is None else floats("weights", weights, counts.shape, 0.0)
        if self.utility.further is None:
            raise ValueError(f"utility must be a signal to extend a plan, got {self.utility.name!r}")
        group = (alpha, beta, right[:, None], counts[:, None].astype(np.float64))
        more = np.arange(self.max_rollouts + 1)
        table = self.utility.further(*group, more) * omega[:, None] ** self.utility.weight_power
        room = np.where(counts > 0, self.max_rollouts - counts, 0)
        return counts, np.where(more[1:] <= room[:, None], np.diff(table), -np.inf)

    def settings(self) -> dict[str, Any]:
        """What a saved state must agree with, as plain numbers and texts."""
        return {
            "mean_rollouts": self.mean_rollouts,
            "min_rollouts": self.min_rollouts,
            "max_rollouts": self.max_rollouts,
            "utility": self.utility.name,
            "per_bin": self.per_bin,
            "permute": self.permute,
        }


def _gain_for_sale(utility: Floats, arm: Ints) -> float:
    """max_{i, m > 0} (U_i(n_i + m) - U_i(n_i)) / m, 0 if every row is at its last arm."""
    more = np.arange(utility.shape[1]) - arm[:, None]
    gain = utility - utility[np.arange(arm.size), arm][:, None]
    return float(np.max(gain[more > 0] / more[more > 0], initial=0.0))
