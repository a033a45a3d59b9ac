"""Rollout-GDRO: more rollouts for the prompts that need them, at exactly the same mean budget (§3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, Ints, choice, floats, integer, integers, number, state
from gdro_core.allocation import greedy_allocation
from gdro_core.theory.paths import (
    allocation_marginals,
    exact_budget_allocation,
    path_learning_rate,
    sample_budget_allocation,
)
from gdro_core.theory.price import ShadowPrice

UTILITIES = ("variance", "mixed", "hit", "surrogate")
FEEDBACKS = ("full", "bandit", "published")


def rollout_utility(name: str, a: ArrayLike, b: ArrayLike, arms: ArrayLike) -> Floats:
    r"""Expected utility of n rollouts on a prompt whose pass rate is p ~ Beta(a, b); concave in n >= 1.

    - `"variance"`: -E[p(1 - p)] / n, minus the variance of a mean of n rewards (Eq. 28, Theorem 4.2); needs n >= 1
    - `"mixed"`: 1 - E[p^n] - E[(1 - p)^n], probability that a group has both outcomes, hence a gradient; 0 for n = 0
      and n = 1, so concave from n = 1 on only
    - `"hit"`: 1 - E[(1 - p)^n], probability of any correct rollout; concave from n = 0 on

    with E[p^n] = prod_{j<n} (a + j)/(a + b + j).

    Args:
        name: see above.
        a: (N,) > 0.
        b: (N,) > 0.
        arms: (A,) integers n >= 0 (n >= 1 for `"variance"`, which is -inf at 0).

    Returns:
        (N, A).

    >>> rollout_utility("hit", [1.0], [1.0], [1, 2, 3]).round(3)
    array([[0.5  , 0.667, 0.75 ]])
    """
    choice("utility", name, UTILITIES[:3])
    alpha = floats("a", a, (-1,), 0.0)[:, None]
    beta = floats("b", b, alpha.shape[:1], 0.0)[:, None]
    n = integers("arms", arms, (-1,), _fewest(name), 2**20)
    for parameter, values in (("a", alpha), ("b", beta)):
        if not values.all():
            raise ValueError(f"{parameter} must be above 0, got 0.0")
    total = alpha + beta
    if name == "variance":
        return np.asarray(-(alpha * beta / (total * (total + 1.0))) / n)
    steps = np.arange(max(int(n.max(initial=0)), 1))
    all_wrong = np.cumprod((beta + steps) / (total + steps), axis=1)[:, n - 1]
    if name == "hit":
        return np.where(n == 0, 0.0, 1.0 - all_wrong)
    all_correct = np.cumprod((alpha + steps) / (total + steps), axis=1)[:, n - 1]
    return np.where(n == 0, 0.0, 1.0 - all_wrong - all_correct)


def _fewest(utility: str) -> int:
    """The fewest rollouts at which a utility is finite (a surrogate loss needs a rollout)."""
    return 0 if utility in ("mixed", "hit") else 1


class RolloutGDRO:
    r"""Integer rollout counts that maximise a utility under the exact budget sum_i n_i = n_bar N (Eq. 19).

    With `granularity="prompt"` every prompt gets its own count, by greedy (exact for concave utilities; `mixed` from
    n_min = 0 is not, and takes the dynamic program); with `"bin"` all prompts of a bin share one (as published), by
    dynamic program. A prompt's utility is expected under its Beta posterior. Prompt weights ω enter as the joint law
    demands (F7): `variance` is multiplied by ω², so that n_i ∝ ω_i √v_i up to rounding and bounds; `mixed` and `hit` by
    ω. Prompts never seen (bin −1) get n_bar. With n_min = 0 a prompt may get no rollout, and is then not observed.

    Feedback. These utilities know every arm counterfactually: `"full"`. `utility="surrogate"` sees the loss of the arms
    played alone, per bin the mean prompt loss l_b, and plays in one of two ways:

    - `"bandit"`: draws the whole allocation from P(n) ∝ exp(-eta sum_b sum_s l^_s(b, n_b)) over all that meet the
      budget, where l^(b, n) = x_b 1[n_b = n] / P(n_b = n) with the exact marginals of the draw and
      x_b = (clip(l_b / loss_bound, -1, 1) + 1) / 2 in [0, 1]. Regret against the best fixed feasible allocation, while
      bin sizes and budget do not change: `path_regret_bound`, for eta = `path_learning_rate`; step_size None is
      eta_t = path_learning_rate(t) / sqrt(2), without a horizon, for sqrt(2) times the bound. `observe` recomputes the
      marginals, so no other `observe` may come between a plan and its own.
    - `"published"`: per bin a score of each arm n, an EMA of minus the arm loss L_b(n) = l_b + mu n of the arm played
      (Eq. 20), probabilities p_b = (1 - gamma) softmax(eta S_b) + gamma / A, and the allocation of greatest
      probability: no arm is drawn and no loss weighted (F3), and no bound is known.

    Either way l_b is flat in n (F2), and since the budget is met exactly, Eq. 21 leaves mu at its start, 0.

    Args:
        num_bins: B.
        mean_rollouts: n_bar; n_bar N must be an integer.
        min_rollouts: n_min >= 1; 0 is allowed for `"mixed"` and `"hit"`, which are finite there.
        max_rollouts: n_max; n_min <= n_bar <= n_max.
        utility: `"variance"`, `"mixed"`, `"hit"` (`rollout_utility`) or `"surrogate"`.
        granularity: `"prompt"` or `"bin"`; `"surrogate"` knows bins only.
        feedback: `"full"`; for `"surrogate"` `"bandit"` or `"published"`.
        permute: the zero-information null (F5): the counts of the seen prompts, whatever utility asked for them, are
            permuted at random. Not with `"surrogate"`, whose prompts share a count per bin.
        step_size: eta of the arms (`"surrogate"` only); None: 0.65 if published, the decreasing rate if bandit.
        loss_bound: losses beyond ±loss_bound are clipped (`"bandit"` only).
        exploration: gamma in [0, 1] (`"published"` only).
        ema: weight of a new arm loss in its score (`"published"` only).
        price_step_size: alpha_mu of Eq. 21 (`"published"` only).

    >>> game = RolloutGDRO(num_bins=2, mean_rollouts=4, min_rollouts=2, max_rollouts=12)
    >>> game.counts([0, 1, -1], a=[5.0, 0.5, 0.5], b=[5.0, 9.5, 0.5])  # p about .5, .05, unknown
    array([6, 2, 4])
    """

    def __init__(
        self,
        num_bins: int,
        mean_rollouts: float,
        min_rollouts: int,
        max_rollouts: int,
        *,
        utility: str = "variance",
        granularity: str = "prompt",
        feedback: str = "full",
        permute: bool = False,
        step_size: float | None = None,
        loss_bound: float = 1.0,
        exploration: float = 0.01,
        ema: float = 0.4,
        price_step_size: float = 0.05,
    ) -> None:
        self.num_bins = integer("num_bins", num_bins, 1)
        self.utility = choice("utility", utility, UTILITIES)
        self.min_rollouts = integer(f'min_rollouts with utility "{utility}"', min_rollouts, _fewest(utility))
        self.max_rollouts = integer("max_rollouts", max_rollouts, 1)
        if self.max_rollouts < self.min_rollouts:
            raise ValueError(f"max_rollouts must be at least min_rollouts = {min_rollouts}, got {max_rollouts}")
        self.mean_rollouts = number("mean_rollouts", mean_rollouts, self.min_rollouts, self.max_rollouts)
        self.granularity = choice("granularity", granularity, ("prompt", "bin"))
        if self.utility == "surrogate" and self.granularity != "bin":
            raise ValueError(f'granularity must be "bin" for utility "surrogate", got {granularity!r}')
        self.feedback = choice("feedback", feedback, FEEDBACKS)
        if (self.utility == "surrogate") == (self.feedback == "full"):
            fits = '"bandit" or "published"' if self.utility == "surrogate" else '"full"'
            raise ValueError(f'feedback must be {fits} for utility "{utility}", got {feedback!r}')
        self.permute = bool(permute)
        if self.permute and self.utility == "surrogate":
            raise ValueError('permute must be False for utility "surrogate", got True')
        if step_size is None and self.feedback != "bandit":
            step_size = 0.65
        self.step_size = None if step_size is None else number("step_size", step_size, 0.0)
        self.loss_bound = number("loss_bound", loss_bound, 0.0, open_low=True)
        self.exploration = number("exploration", exploration, 0.0, 1.0)
        self.ema = number("ema", ema, 0.0, 1.0, open_low=True)
        self.shadow_price = ShadowPrice(self.mean_rollouts, price_step_size)
        self._scores = np.zeros((self.num_bins, self.arms.size))  # minus losses: an EMA, or summed estimates if bandit
        self._rounds = 0

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
        rng: np.random.Generator | None = None,
    ) -> tuple[Ints, float]:
        """Rollouts of each prompt of a batch, and what one rollout more would be worth.

        Args:
            bins: (N,) in −1..B − 1.
            a: (N,) posterior successes (`OnlineDifficultyClassifier.posterior`).
            b: (N,) posterior failures.
            weights: (N,) prompt weights ω >= 0 of the joint law; None for 1.
            rng: breaks ties at random; draws for `"bandit"` and `permute`, which need it.

        Returns:
            counts: (N,) integers in n_min..n_max with sum n_bar N.
            price: shadow price mu >= 0 [utility / rollout], the largest gain per rollout still for sale at this
                allocation (0 if everybody is at n_max or unseen); the state of Eq. 21 for `"surrogate"`.

        Raises:
            ValueError: n_bar N is no integer, no choice per bin meets the budget, or no rng to draw with.
        """
        if rng is None and (self.permute or self.feedback == "bandit"):
            raise ValueError('rng must be given with permute or feedback "bandit", got None')
        group = integers("bins", bins, (-1,), -1, self.num_bins - 1)
        alpha, beta = floats("a", a, group.shape, 0.0), floats("b", b, group.shape, 0.0)
        omega = np.ones(group.shape) if weights is None else floats("weights", weights, group.shape, 0.0)
        total = round(self.mean_rollouts * group.size)
        if abs(self.mean_rollouts * group.size - total) > 1e-9 * total:  # 1.15 x 100 is 114.99999999999999
            raise ValueError(f"mean_rollouts x batch size must be an integer, got {self.mean_rollouts} x {group.size}")
        counts = np.full(group.shape, int(self.mean_rollouts), dtype=np.int64)
        new, seen = np.flatnonzero(group < 0), np.flatnonzero(group >= 0)
        spent_on_new = round(self.mean_rollouts * new.size)
        counts[new[: spent_on_new - int(counts[new].sum())]] += 1  # n_bar that is not whole: some get one more
        if seen.size == 0:
            return counts, self.shadow_price.price if self.utility == "surrogate" else 0.0
        budget = total - spent_on_new
        there, member, size = np.unique(group[seen], return_inverse=True, return_counts=True)
        low = self.min_rollouts
        if self.utility == "surrogate":
            log_p = self._log_arm_probabilities[there]  # (bins present, A)
            if self.feedback == "bandit" and rng is not None:
                per_bin, _ = sample_budget_allocation(log_p, size, budget, min_rollouts=low, rng=rng)
            else:
                per_bin = exact_budget_allocation(log_p, size, budget, min_rollouts=low, rng=rng)
            counts[seen] = per_bin[member]
            return counts, self.shadow_price.price
        scale = omega[seen] ** 2 if self.utility == "variance" else omega[seen]
        utility = rollout_utility(self.utility, alpha[seen], beta[seen], self.arms) * scale[:, None]
        if self.granularity == "bin":
            total_utility = np.zeros((there.size, self.arms.size))
            np.add.at(total_utility, member, utility)
            per_bin = exact_budget_allocation(total_utility, size, budget, min_rollouts=low, rng=rng)
            counts[seen], price = per_bin[member], _gain_for_sale(total_utility / size[:, None], per_bin - low)
        else:
            if self.utility == "mixed" and low == 0:  # not concave: the first rollout of a prompt gains nothing
                one_each = np.ones(seen.size)
                counts[seen] = exact_budget_allocation(utility, one_each, budget, min_rollouts=low, rng=rng)
            else:
                counts[seen] = greedy_allocation(utility, budget, min_rollouts=low, rng=rng)
            price = _gain_for_sale(utility, counts[seen] - low)
        if self.permute and rng is not None:
            counts[seen] = rng.permutation(counts[seen])
        return counts, price

    @property
    def arm_probabilities(self) -> Floats:
        """(B, A) p_b(n) of the surrogate game; `"bandit"` draws from their product, given that the budget is met."""
        return np.asarray(np.exp(self._log_arm_probabilities))

    @property
    def _log_arm_probabilities(self) -> Floats:
        rate = self.step_size
        if rate is None:
            rate = path_learning_rate(self._rounds + 1, self.num_bins, self.arms.size, feedback="bandit") / sqrt(2.0)
        logits = rate * self._scores
        log_softmax = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        if self.feedback == "bandit":
            return np.asarray(log_softmax)
        with np.errstate(divide="ignore"):  # log 0 = -inf at exploration 0 or 1
            log_exploit, log_explore = np.log(1.0 - self.exploration), np.log(self.exploration / self.arms.size)
        return np.asarray(np.logaddexp(log_exploit + log_softmax, log_explore))

    def observe(self, bins: ArrayLike, counts: ArrayLike, losses: ArrayLike) -> None:
        """Feed the arms with the prompt losses of an update (`utility="surrogate"` only).

        Args:
            bins: (N,) the bins of the plan.
            counts: (N,) the counts of the plan; seen prompts of a bin share one.
            losses: (N,) prompt losses (Eq. 7).

        Raises:
            ValueError: a bad argument; nothing has changed then.
        """
        if self.utility != "surrogate":
            raise ValueError(f'observe needs utility "surrogate"; "{self.utility}" learns from the classifier alone')
        group = integers("bins", bins, (-1,), -1, self.num_bins - 1)
        n = integers("counts", counts, group.shape, self.min_rollouts, self.max_rollouts)
        loss = floats("losses", losses, group.shape)
        members = {int(b): group == b for b in np.unique(group[group >= 0])}
        for b, rows in members.items():
            if np.ptp(n[rows]):
                raise ValueError(f"counts must be the same for all prompts of bin {b}, got {n[rows].tolist()}")
        there = np.array(list(members), dtype=np.int64)
        size = np.array([rows.sum() for rows in members.values()], dtype=np.int64)
        played = np.array([n[rows][0] for rows in members.values()], dtype=np.int64)
        mean_loss = np.array([loss[rows].mean() for rows in members.values()])
        arm = (there, played - self.min_rollouts)
        if self.feedback == "published":
            arm_loss = mean_loss + self.shadow_price.price * played  # Eq. 20
            self._scores[arm] += self.ema * (-arm_loss - self._scores[arm])
        elif there.size:
            log_p = self._log_arm_probabilities[there]
            law = allocation_marginals(log_p, size, int(size @ played), min_rollouts=self.min_rollouts)
            marginal = law[np.arange(there.size), played - self.min_rollouts]
            if not marginal.all():
                raise ValueError(f"counts must be a draw of the present state, which never gives {played.tolist()}")
            self._scores[arm] -= (np.clip(mean_loss / self.loss_bound, -1.0, 1.0) + 1.0) / 2.0 / marginal
            self._rounds += 1
        self.shadow_price.update(float(n.mean()))

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain lists and numbers."""
        return {
            **self._settings(),
            "scores": self._scores.tolist(),
            "rounds": self._rounds,
            "price": self.shadow_price.state_dict(),
        }

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a game with the same settings; on ValueError nothing has changed."""
        state("RolloutGDRO", found, self._settings(), ("scores", "rounds", "price"))
        scores = floats("scores", found["scores"], self._scores.shape)
        rounds = integer("rounds", found["rounds"], 0)
        self.shadow_price.load_state_dict(found["price"])
        self._scores, self._rounds = scores.copy(), rounds

    def _settings(self) -> dict[str, Any]:
        names = ("num_bins", "mean_rollouts", "min_rollouts", "max_rollouts", "utility", "granularity", "feedback")
        more = ("permute", "step_size", "loss_bound", "exploration", "ema")
        return {"version": 1, **{name: getattr(self, name) for name in (*names, *more)}}


def _gain_for_sale(utility: Floats, arm: Ints) -> float:
    """max_{i, m > 0} (U_i(n_i + m) - U_i(n_i)) / m, for concave rows at m = 1; 0 if every row is at its last arm."""
    more = np.arange(utility.shape[1]) - arm[:, None]
    gain = utility - utility[np.arange(arm.size), arm][:, None]
    return float(np.max(gain[more > 0] / more[more > 0], initial=0.0))
