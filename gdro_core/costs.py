"""What a rollout costs in tokens, and a budget of tokens that is met over steps (theorem 22).

A rollout's tokens are those of its prompt and of its completion, the prompt's once a rollout: sampling with a prefix
cache encodes a prompt once a group, but training passes forward and backward over it with every rollout, and that is
where prompt tokens cost time. So costs are additive in rollouts. Any other positive cost of a rollout does as well.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._rows import RowIndex
from gdro_core._validate import Floats, check_entries, check_state, floats, integer, integers, number
from gdro_core.difficulty import _packed, _plain, _unpacked

MEAN_DISCOUNT = 0.9  # of what the means of bins and of new prompts are made of, at each step that adds to them
MEAN_STRENGTH = 8.0  # rollouts of the mean over all, in the mean of each
LARGEST_CORRECTION = 0.1  # of a step's budget, by errors of earlier steps


class TokenCosts:
    r"""Expected tokens of a rollout of each prompt.

        c_i <- (w (c_i + M(bin_i after) - M(bin_i before)) + its tokens) / (w + its rollouts),    expected: level c_i

    All tokens are in units of the level, that of the present policy: a step's tokens over what was expected of its
    rollouts at level 1. So what is remembered of a prompt stays right while all answers grow or shrink. The level must
    not take for a change of all answers that the prompts of a plan are learnt and answered shorter: M is the mean of a
    bin, by which a prompt's cost moves when its bin does. (By differences, not ratios: bins are noisy, and a prompt
    known to be long that falls back into the bin of its like would be made longer twice.) A level that averages steps
    would lag behind growth, and the lag add up over a run. Prompts that were never sampled cost what such prompts cost
    at their first visits lately; after the first, the mean of their bin counts as `strength` rollouts.

    Outcomes are not told apart: a prompt's own mean has the mixture that it had, while the posterior of one that is
    passed over fades to 1/2, and a mixture by it would be wrong.

    Args:
        num_bins: B.
        discount: in (0, 1], weight of what is known of a prompt each time that it is sampled again.
        strength: > 0 [rollouts]: variance of tokens within a prompt over that between prompts of a bin.

    >>> costs = TokenCosts(num_bins=2)
    >>> costs.observe(["a", "b"], [0, 1], rollouts=[4, 4], tokens=[400, 1200])
    >>> costs.expected(["a", "b", "new"]).round()
    array([122., 278., 200.])
    """

    def __init__(self, num_bins: int, *, discount: float = 0.8, strength: float = 2.0) -> None:
        self.num_bins = integer("num_bins", num_bins, 1)
        self.discount = number("discount", discount, 0.0, 1.0, open_low=True)
        self.strength = number("strength", strength, 0.0, open_low=True)
        self._index = RowIndex()
        self._prompts = np.zeros((3, 1))  # c at level 1, w [rollouts], bin; the last column is never written
        self._means = np.zeros((2, self.num_bins + 1))  # tokens, rollouts: of the bins, and of prompts when new
        self._level = 1.0  # tokens of the last step over what was expected of them at level 1

    def observe(self, ids: Sequence[Hashable], bins: ArrayLike, rollouts: ArrayLike, tokens: ArrayLike) -> None:
        """Learn from the rollouts of a step.

        Args:
            ids: N unique ids.
            bins: (N,) in 0..B - 1, after the step; -1 for prompts without rollouts that were never seen.
            rollouts: (N,) of each prompt; 0 teaches nothing.
            tokens: (N,) in all of them.

        Raises:
            ValueError: a bad argument, or rollouts without tokens; nothing has changed then.
        """
        names, rows = self._index.find(ids)
        n = floats("rollouts", rollouts, (len(names),), 0.0)
        total, drawn = floats("tokens", tokens, n.shape, 0.0), n > 0
        place = integers("bins", bins, n.shape, -1, self.num_bins - 1)
        if (drawn != (total > 0)).any() or (drawn & (place < 0)).any():
            raise ValueError(
                "tokens must be above 0, bins at least 0, where there are rollouts, and tokens 0 elsewhere"
            )
        if not drawn.any():
            return
        new, place, means = rows < 0, np.where(drawn, place, 0), self._bin_means()
        own, weight, before = self._prompts[:, rows]
        moved = np.maximum(own + means[place] - means[before.astype(np.int64)], 0.1 * own)
        self._level = float(total.sum() / (n @ np.where(new, means[-1], moved)))
        total = total / self._level
        step = [np.bincount(place, x, self.num_bins + 1) for x in (total, n)]
        step[0][-1], step[1][-1] = total[new].sum(), n[new].sum()
        self._means = np.where(step[1], MEAN_DISCOUNT, 1.0) * self._means + step
        own, weight = np.where(new, self._bin_means()[place], moved), np.where(new, self.strength, weight)
        known = len(self)
        rows = self._index.add(names, rows, drawn)[drawn]
        self._prompts = np.pad(self._prompts[:, :known], ((0, 0), (0, len(self) + 1 - known)))
        learnt = (weight * own + total) / (weight + n), self.discount * (weight + n), place
        self._prompts[:, rows] = np.stack(learnt)[:, drawn]

    def expected(self, ids: Sequence[Hashable]) -> Floats:
        """(N,) expected tokens of one rollout, above 0; all 1 while nothing was observed."""
        rows = self._index.find(ids)[1]
        return np.asarray(self._level * np.where(rows < 0, self._bin_means()[-1], self._prompts[0, rows]))

    def __len__(self) -> int:
        """Number of prompts observed so far."""
        return self._index.size

    def _bin_means(self) -> Floats:
        """(B + 1,) mean tokens at level 1 of bins, and of prompts when new, shrunk to the mean of all rollouts."""
        tokens, rollouts = self._means
        total = self._means[:, :-1].sum(axis=1)
        overall = total[0] / total[1] if total[1] else 1.0
        return np.asarray((tokens + MEAN_STRENGTH * overall) / (rollouts + MEAN_STRENGTH))

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory for JSON; numbers by prompt are base64, as in `OnlineDifficultyClassifier`."""
        ids = self._index.ids()
        names = list(_plain(ids)) if isinstance(ids, list) else _packed(ids)
        memory = {"prompts": _packed(self._prompts), "means": self._means.tolist(), "level": self._level}
        return {**self._settings(), "ids": names, **memory}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue bit for bit from `state_dict()` with the same settings; on ValueError nothing has changed."""
        check_state("TokenCosts", saved, self._settings(), ("ids", "prompts", "means", "level"))
        plain = _plain(saved["ids"])
        ids = list(plain) if isinstance(plain, tuple) else _unpacked("ids", plain, np.dtype(np.int64), (-1,))
        index = RowIndex()
        names, rows = index.find(ids)
        index.add(names, rows, rows < 0)
        prompts = _unpacked("prompts", saved["prompts"], np.dtype(np.float64), (3, index.size + 1)).copy()
        check_entries("prompts", prompts, 0.0)
        means = floats("means", saved["means"], self._means.shape, 0.0)
        level = number("level", saved["level"], 0.0, open_low=True)
        self._index, self._prompts, self._means, self._level = index, prompts, means, level

    def _settings(self) -> dict[str, Any]:
        names = ("num_bins", "discount", "strength")
        return {"version": 1, **{name: getattr(self, name) for name in names}}


class TokenBudget:
    r"""Steps that cost what n_bar rollouts for each prompt of their batches would have cost (theorem 22).

    A plan is given the expected tokens of the uniform one, less a share `gain` of what was overspent so far:

        debt_t = sum_{s <= t} (spent_s - uniform_s),    budget_{t+1} = n_bar sum_i c_i - gain debt_t

    gain debt_t is the price of theorem 7 for a constraint that may be missed to either side: it rises with what was
    spent above the target, and the average violation telescopes to price / (gain T). The price of a token within a step
    needs no ascent: the plan solves for it. What a uniform step would have cost, uniform_s, is not observed. It is
    counted after the step, by what the rollouts of each prompt cost where it had some, so that a step of n_bar each
    has no debt whatever it cost, and by `TokenCosts.expected` where it had none.

    Args:
        num_bins: B, of the controller's classifier.
        evenness: in [0, 1], see `RolloutGDRO.allocate_tokens`: 0 spends the tokens by gain per token, the best step in
            the model, which prefers easy prompts; 1 by gain per rollout. 1/2 was chosen on the tuning populations of
            `simulations/experiments/frontier.py`, with lengths: 1 gains a little more pass@8 there, 0 loses.
        gain: in (0, 1], share of the debt that a step pays back, at most a tenth of its budget.
        most: most rollouts of a step over n_bar a prompt, >= 1: short answers are many for the same tokens, and memory
            is finite.

    >>> budget = TokenBudget()
    >>> budget.settle(spent=1100.0, uniform=1000.0)
    >>> budget.allowance(1000.0), round(budget.excess, 3)
    (980.0, 0.1)
    """

    def __init__(self, num_bins: int = 10, *, evenness: float = 0.5, gain: float = 0.2, most: float = 1.5) -> None:
        self.costs = TokenCosts(num_bins)
        self.evenness = number("evenness", evenness, 0.0, 1.0)
        self.gain = number("gain", gain, 0.0, 1.0, open_low=True)
        self.most = number("most", most, 1.0)
        self.spent, self.uniform = 0.0, 0.0  # tokens so far

    def allowance(self, uniform: float) -> float:
        """Expected tokens that a plan may cost where the uniform one costs `uniform`."""
        correction = self.gain * (self.spent - self.uniform)
        return uniform - min(max(correction, -LARGEST_CORRECTION * uniform), LARGEST_CORRECTION * uniform)

    def limits(self, ids: Sequence[Hashable], batch: int, mean_rollouts: float) -> tuple[Floats, float, int]:
        """What a plan has to keep to.

        Args:
            ids: N prompts offered, of which the first `batch` set the budget.
            batch: prompts of which the uniform plan is made.
            mean_rollouts: n_bar.

        Returns:
            costs: (N,) expected tokens of a rollout; tokens: `allowance` of n_bar rollouts for each of the batch; most:
            rollouts.
        """
        costs = self.costs.expected(ids)
        uniform = mean_rollouts * float(costs[:batch].sum())
        return costs, self.allowance(uniform), int(self.most * mean_rollouts * batch)

    def settle(self, spent: float, uniform: float) -> None:
        """Count a step: tokens of its rollouts, and what n_bar rollouts each would have cost."""
        self.spent += number("spent", spent, 0.0)
        self.uniform += number("uniform", uniform, 0.0)

    @property
    def excess(self) -> float:
        """Tokens spent so far over those of uniform steps, less 1."""
        return self.spent / self.uniform - 1.0 if self.uniform else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory for JSON."""
        memory = {"spent": self.spent, "uniform": self.uniform, "costs": self.costs.state_dict()}
        return {**self._settings(), **memory}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue bit for bit from `state_dict()`; on ValueError nothing has changed."""
        check_state("TokenBudget", saved, self._settings(), ("spent", "uniform", "costs"))
        spent, uniform = (number(name, saved[name], 0.0) for name in ("spent", "uniform"))
        self.costs.load_state_dict(saved["costs"])
        self.spent, self.uniform = spent, uniform

    def _settings(self) -> dict[str, Any]:
        return {"version": 1, "evenness": self.evenness, "gain": self.gain, "most": self.most}
