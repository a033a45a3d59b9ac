"""Exact play: a bandit over rollout allocations that meet the budget, with a regret bound (F3 repaired, theorem 6)."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._budget import CountsPerBin
from gdro_core._old_states import exact_play_1
from gdro_core._validate import Floats, Ints, check_state, floats, integer, number
from gdro_core.theory.paths import allocation_marginals, path_learning_rate, sample_budget_allocation


class ExactPlay(CountsPerBin):
    r"""One rollout count per bin, drawn under the exact budget, learnt from the losses of the counts played alone.

        P(n) ∝ exp(-eta sum_b sum_s l^_s(b, n_b))    over    sum_b c_b n_b = n_bar N,   n_b in n_min..n_max
        l^(b, n) = x_b 1[n_b = n] / P(n_b = n),      x_b = (clip(l_b / loss_bound, -1, 1) + 1) / 2 in [0, 1]

    with the exact marginals of the draw and l_b the mean prompt loss of bin b. Regret against the best fixed feasible
    allocation, while bin sizes and budget do not change: `path_regret_bound`, for eta = `path_learning_rate`. It
    repairs the published bandit, which draws nothing (F3); the loss it is fed is flat in n all the same (F2).

    `observe` computes the marginals again, so no other `observe` may come between an allocation and its own.

    Args:
        num_bins: B.
        mean_rollouts: n_bar; n_bar N must be an integer.
        min_rollouts: n_min >= 1.
        max_rollouts: n_max; n_min <= n_bar <= n_max.
        step_size: eta; None is eta_t = path_learning_rate(t) / sqrt(2), without a horizon, for sqrt(2) times the bound.
        loss_bound: losses beyond ±loss_bound are clipped.

    >>> game = ExactPlay(num_bins=2, mean_rollouts=4, min_rollouts=2, max_rollouts=6)
    >>> counts = game.counts([0, 1], rng=np.random.default_rng(0))
    >>> counts.sum()
    np.int64(8)
    >>> game.observe([0, 1], counts, losses=[0.1, -0.2])
    """

    def __init__(
        self,
        num_bins: int,
        mean_rollouts: float,
        min_rollouts: int,
        max_rollouts: int,
        *,
        step_size: float | None = None,
        loss_bound: float = 1.0,
    ) -> None:
        super().__init__(num_bins, mean_rollouts, min_rollouts, max_rollouts)
        self.step_size = None if step_size is None else number("step_size", step_size, 0.0)
        self.loss_bound = number("loss_bound", loss_bound, 0.0, open_low=True)
        self._rounds = 0  # whose estimated losses are summed up, negative, in the scores

    @property
    def _log_arm_probabilities(self) -> Floats:
        rate = self.step_size
        if rate is None:
            rate = path_learning_rate(self._rounds + 1, self.num_bins, self.arms.size, feedback="bandit") / sqrt(2.0)
        logits = rate * self._scores
        return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))

    def _choose(self, log_p: Floats, size: Ints, budget: int, rng: np.random.Generator | None) -> Ints:
        if rng is None:
            raise ValueError("rng must be given, to draw the counts, got None")
        return sample_budget_allocation(log_p, size, budget, min_rollouts=self.min_rollouts, rng=rng)[0]

    def observe(self, bins: ArrayLike, counts: ArrayLike, losses: ArrayLike) -> None:
        """Take the prompt losses of an update.

        Args:
            bins: (N,) the bins of the plan.
            counts: (N,) the counts drawn; seen prompts of a bin share one.
            losses: (N,) prompt losses (Eq. 7).

        Raises:
            ValueError: a bad argument, or counts that the present state cannot have drawn; nothing has changed then.
        """
        _, (present, arm), size, mean_loss = self._played(bins, counts, losses)
        if not present.size:
            return
        log_p, spent = self._log_arm_probabilities[present], int(size @ self.arms[arm])
        law = allocation_marginals(log_p, size, spent, min_rollouts=self.min_rollouts)
        marginal = law[np.arange(present.size), arm]
        if not marginal.all():
            raise ValueError(f"counts must be a draw of the present state, which never gives {self.arms[arm].tolist()}")
        scaled = (np.clip(mean_loss / self.loss_bound, -1.0, 1.0) + 1.0) / 2.0
        self._scores[present, arm] -= scaled / marginal
        self._rounds += 1

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain lists and numbers."""
        return {**self._settings(), "scores": self._scores.tolist(), "rounds": self._rounds}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a game with the same settings; on ValueError nothing has changed."""
        if saved.get("version") == 1:
            saved = exact_play_1(saved)
        check_state("ExactPlay", saved, self._settings(), ("scores", "rounds"))
        scores = floats("scores", saved["scores"], self._scores.shape)
        self._rounds = integer("rounds", saved["rounds"], 0)
        self._scores = scores.copy()

    def _settings(self) -> dict[str, Any]:
        names = ("num_bins", "mean_rollouts", "min_rollouts", "max_rollouts", "step_size", "loss_bound")
        return {"version": 2, **{name: getattr(self, name) for name in names}}
