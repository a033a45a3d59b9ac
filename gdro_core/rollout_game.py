"""Rollout-GDRO: more rollouts for the prompts that need them, at exactly the same mean budget (§3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, Ints, choice, floats, integer, integers, number, state
from gdro_core.allocation import exact_budget_allocation, greedy_allocation
from gdro_core.price import ShadowPrice

UTILITIES = ("variance", "mixed", "hit", "surrogate")


def rollout_utility(name: str, a: ArrayLike, b: ArrayLike, arms: ArrayLike) -> Floats:
    r"""Expected utility of n rollouts on a prompt whose pass rate is p ~ Beta(a, b); concave in n.

    - `"variance"`: -E[p(1 - p)] / n, minus the variance of a mean of n rewards (Eq. 28, Theorem 4.2)
    - `"mixed"`: 1 - E[p^n] - E[(1 - p)^n], probability that a group has both outcomes, hence a gradient
    - `"hit"`: 1 - E[(1 - p)^n], probability of any correct rollout

    with E[p^n] = prod_{j<n} (a + j)/(a + b + j).

    Args:
        name: see above.
        a: (N,) > 0.
        b: (N,) > 0.
        arms: (A,) integers n >= 1.

    Returns:
        (N, A).

    >>> rollout_utility("hit", [1.0], [1.0], [1, 2, 3]).round(3)
    array([[0.5  , 0.667, 0.75 ]])
    """
    choice("utility", name, UTILITIES[:3])
    alpha = floats("a", a, (-1,), 0.0)[:, None]
    beta = floats("b", b, alpha.shape[:1], 0.0)[:, None]
    n = integers("arms", arms, (-1,), 1, 2**20)
    for parameter, values in (("a", alpha), ("b", beta)):
        if not values.all():
            raise ValueError(f"{parameter} must be above 0, got 0.0")
    total = alpha + beta
    if name == "variance":
        return np.asarray(-(alpha * beta / (total * (total + 1.0))) / n)
    steps = np.arange(n.max())
    all_wrong = np.cumprod((beta + steps) / (total + steps), axis=1)[:, n - 1]
    if name == "hit":
        return np.asarray(1.0 - all_wrong)
    all_correct = np.cumprod((alpha + steps) / (total + steps), axis=1)[:, n - 1]
    return np.asarray(1.0 - all_wrong - all_correct)


class RolloutGDRO:
    r"""Integer rollout counts that maximise a utility under the exact budget sum_i n_i = n_bar N (Eq. 19).

    With `granularity="prompt"` every prompt gets its own count, by greedy (exact for these utilities); with `"bin"` all
    prompts of a bin share one (as published), by dynamic program. A prompt's utility is expected under its Beta
    posterior. Prompt weights ω enter as the joint law demands (F7): `variance` is multiplied by ω², so that
    n_i ∝ ω_i √v_i up to rounding and bounds; `mixed` and `hit` by ω. Prompts never seen (bin −1) get n_bar.

    `utility="surrogate"` is the published game: per bin a score of each arm n, fed with minus the arm loss
    L_b(n) = l_b + mu n of the arm played (Eq. 20; l_b = mean prompt loss), probabilities
    p_b = (1 - gamma) softmax(eta S_b) + gamma / A, and the allocation of greatest probability. Its arm loss is flat in
    n (F2), and since the budget is met exactly, Eq. 21 leaves mu at its start.

    Args:
        num_bins: B.
        mean_rollouts: n_bar; n_bar N must be an integer.
        min_rollouts: n_min >= 1.
        max_rollouts: n_max; n_min <= n_bar <= n_max.
        utility: `"variance"`, `"mixed"`, `"hit"` (`rollout_utility`) or `"surrogate"`.
        granularity: `"prompt"` or `"bin"`; `"surrogate"` knows bins only.
        step_size: eta of the arms (`"surrogate"` only).
        exploration: gamma in [0, 1] (`"surrogate"` only).
        ema: weight of a new arm loss in its score (`"surrogate"` only).
        price_step_size: alpha_mu of Eq. 21 (`"surrogate"` only).

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
        step_size: float = 0.65,
        exploration: float = 0.01,
        ema: float = 0.4,
        price_step_size: float = 0.05,
    ) -> None:
        self.num_bins = integer("num_bins", num_bins, 1)
        self.min_rollouts = integer("min_rollouts", min_rollouts, 1)
        self.max_rollouts = integer("max_rollouts", max_rollouts, 1)
        if self.max_rollouts < self.min_rollouts:
            raise ValueError(f"max_rollouts must be at least min_rollouts = {min_rollouts}, got {max_rollouts}")
        self.mean_rollouts = number("mean_rollouts", mean_rollouts, self.min_rollouts, self.max_rollouts)
        self.utility = choice("utility", utility, UTILITIES)
        self.granularity = choice("granularity", granularity, ("prompt", "bin"))
        if self.utility == "surrogate" and self.granularity != "bin":
            raise ValueError(f'granularity must be "bin" for utility "surrogate", got {granularity!r}')
        self.step_size = number("step_size", step_size, 0.0)
        self.exploration = number("exploration", exploration, 0.0, 1.0)
        self.ema = number("ema", ema, 0.0, 1.0, open_low=True)
        self.shadow_price = ShadowPrice(self.mean_rollouts, price_step_size)
        self._scores = np.zeros((self.num_bins, self.arms.size))

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
            rng: breaks ties at random.

        Returns:
            counts: (N,) integers in n_min..n_max with sum n_bar N.
            price: shadow price mu >= 0 [utility / rollout], the largest gain still for sale at this allocation (0 if
                everybody is at n_max or unseen); the state of Eq. 21 for `"surrogate"`.

        Raises:
            ValueError: n_bar N is no integer, or no choice per bin meets the budget.
        """
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
        if self.utility == "surrogate":
            utility = self._log_arm_probabilities[there]  # (bins present, A)
        else:
            scale = omega[seen] ** 2 if self.utility == "variance" else omega[seen]
            utility = rollout_utility(self.utility, alpha[seen], beta[seen], self.arms) * scale[:, None]
            if self.granularity == "prompt":
                counts[seen] = greedy_allocation(utility, budget, min_rollouts=self.min_rollouts, rng=rng)
                return counts, _gain_for_sale(utility, counts[seen] - self.min_rollouts)
            per_prompt, utility = utility, np.zeros((there.size, self.arms.size))
            np.add.at(utility, member, per_prompt)
        per_bin = exact_budget_allocation(utility, size, budget, min_rollouts=self.min_rollouts, rng=rng)
        counts[seen] = per_bin[member]
        if self.utility == "surrogate":
            return counts, self.shadow_price.price
        return counts, _gain_for_sale(utility / size[:, None], per_bin - self.min_rollouts)

    @property
    def arm_probabilities(self) -> Floats:
        """(B, A) p_b(n) of the published game."""
        return np.asarray(np.exp(self._log_arm_probabilities))

    @property
    def _log_arm_probabilities(self) -> Floats:
        logits = self.step_size * self._scores
        log_softmax = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        with np.errstate(divide="ignore"):  # log 0 = -inf at exploration 0 or 1
            log_exploit, log_explore = np.log(1.0 - self.exploration), np.log(self.exploration / self.arms.size)
        return np.asarray(np.logaddexp(log_exploit + log_softmax, log_explore))

    def observe(self, bins: ArrayLike, counts: ArrayLike, losses: ArrayLike) -> None:
        """Feed the published game with the prompt losses of an update (`utility="surrogate"` only).

        Args:
            bins: (N,) the bins of the plan.
            counts: (N,) the counts of the plan; seen prompts of a bin share one.
            losses: (N,) prompt losses (Eq. 7).
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
        for b, rows in members.items():
            played = int(n[rows][0])
            arm_loss = loss[rows].mean() + self.shadow_price.price * played  # Eq. 20
            arm = played - self.min_rollouts
            self._scores[b, arm] += self.ema * (-arm_loss - self._scores[b, arm])
        self.shadow_price.update(float(n.mean()))

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain lists and numbers."""
        return {**self._settings(), "scores": self._scores.tolist(), "price": self.shadow_price.state_dict()}

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a game with the same settings; on ValueError nothing has changed."""
        state("RolloutGDRO", found, self._settings())
        scores = floats("scores", found["scores"], self._scores.shape)
        self.shadow_price.load_state_dict(found["price"])
        self._scores = scores.copy()

    def _settings(self) -> dict[str, Any]:
        names = ("num_bins", "mean_rollouts", "min_rollouts", "max_rollouts", "utility", "granularity")
        return {"version": 1, **{name: getattr(self, name) for name in (*names, "step_size", "exploration", "ema")}}


def _gain_for_sale(utility: Floats, arm: Ints) -> float:
    """max_i U_i(n_i + 1) - U_i(n_i) over the rows not yet at their last arm; 0 if all are."""
    open_rows = np.flatnonzero(arm < utility.shape[1] - 1)
    if open_rows.size == 0:
        return 0.0
    return float((utility[open_rows, arm[open_rows] + 1] - utility[open_rows, arm[open_rows]]).max())
