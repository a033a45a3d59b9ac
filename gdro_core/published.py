"""The paper's own games and controller, with every departure listed; the rest of the library is what we recommend.

Both games learn from the update's prompt losses (Eq. 7), so that the controller needs `observe_losses` after each
update. That payoff is blind to difficulty (F1), the rollout bandit draws nothing (F3) and its loss is flat in n (F2).

Where the released code and the paper differ, this follows the paper. What the released trainer does when it is executed
(code of 26 May 2026), and what is played here:

    released                                                      here
    rollouts are assigned by position in the batch: 739 of 944    bins are looked up by prompt id
      prompts got the count of another bin
    arm scores and the price mu are never updated                 both are, after every update (Eq. 20, 21)
    the arm score has the opposite sign of Eq. 20                 the sign of Eq. 20
    weights are q over the bins present, with mean 1              min(e^{eta S}, max_weight), unnormalised (Eq. 16)
    scores are not clipped                                        clipped at C = 1 (Eq. 14 names no C)
    prompts never seen count as hardest                           weight 1 and n_bar rollouts
    launch scripts name 3 or 7 edges; two of the four for         B bins of equal width (Section 3.1); none excluded
      prompts give the hardest bin weight 0, three leave out
      the extreme bins
    no count is drawn, no loss weighted by its probability        the same: see `theory.exact_play.ExactPlay`

Departs: ties break at random, and the shadow price is projected on [0, inf); the paper says neither. Hysteresis is
below its 0.03 with more than 10 bins, where 0.03 would soon be half a bin.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._budget import CountsPerBin
from gdro_core._old_states import published_controller_1, published_prompt_2, published_rollout_1
from gdro_core._validate import (
    Floats,
    Ints,
    check_number,
    check_state,
    floats,
    integer,
    integers,
    load_parts,
    number,
    unique_ids,
)
from gdro_core.ambiguity import entropic
from gdro_core.controller import Observation, Plan
from gdro_core.difficulty import Arrays, OnlineDifficultyClassifier, Statistic, equal_edges
from gdro_core.theory.paths import exact_budget_allocation
from gdro_core.theory.price import ShadowPrice

BATCHES_WITHOUT_LOSSES = 10  # batches observed without any losses until `plan` raises an error


@dataclass(frozen=True)
class AnyOfN(Statistic):
    """Share of the last `window` visits with any correct rollout (Eq. 10).

    It grows with the number of rollouts, so that allocation feeds back on difficulty (F10). 2 + 8 ceil(H / 64) bytes a
    prompt besides the posterior, which it does not use.

    Args:
        window: H <= 65535 visits.

    >>> classifier = OnlineDifficultyClassifier([0.5], AnyOfN(window=2))
    >>> for correct in ([1], [0], [0]):
    ...     classifier.observe(["a"], correct, trials=[4])
    >>> classifier.bins(["a"])  # none of the last two visits
    array([0])
    """

    window: int = 100

    def __post_init__(self) -> None:
        check_number("window", self.window, 1, 65535)
        object.__setattr__(self, "window", integer("window", self.window, 1))

    def arrays(self, rows: int) -> Arrays:
        """How many visits are known, and which of them had a correct rollout: the latest in bit 0 of word 0."""
        words = -(-self.window // 64)
        return {"visits": np.zeros(rows, dtype=np.uint16), "hits": np.zeros((rows, words), dtype=np.uint64)}

    def observe(self, memory: Arrays, rows: Ints, correct: Floats) -> None:
        """Shift a visit in."""
        hits = memory["hits"][rows]  # (n, words)
        carry = np.concatenate([(correct > 0).astype(np.uint64)[:, None], hits[:, :-1] >> 63], axis=1)
        hits = hits << 1 | carry
        hits[:, -1] &= np.uint64(2 ** ((self.window - 1) % 64 + 1) - 1)
        memory["hits"][rows] = hits
        memory["visits"][rows] = np.minimum(memory["visits"][rows] + np.int64(1), self.window)

    def estimate(self, a: Floats, b: Floats, memory: Arrays) -> Floats:
        """See `Statistic.estimate`."""
        hits: Ints = np.bitwise_count(memory["hits"]).sum(axis=1, dtype=np.int64)
        return np.asarray(hits / memory["visits"].astype(np.float64))

    def check(self, memory: Arrays) -> None:
        """No hit lies before the first visit."""
        visits = integers("visits", memory["visits"], (-1,), 1, self.window)
        for word, hits in enumerate(memory["hits"].T):
            if (hits >> np.clip(visits - 64 * word, 0, 64).astype(np.uint64)).any():
                raise ValueError(f"hits must be 0 before the first of the visits, got {hits.max():#x} in word {word}")


class PublishedPromptGDRO:
    r"""Weights e^{eta S} of the bins, unnormalised (§3.2, App. A).

        S_b <- (1 - beta) S_b + beta l_b / max(share of b in the batch, 0.01)      bins present only (Eq. 12)
        w_b = min(e^{eta S_b}, max_weight) (Eq. 16),      q = (1 - gamma) softmax(eta S) + gamma / B (Eq. 14, 15)

    with S_0 = 0, not debiased. Departs: Eq. 14 clips S at an unnamed C; here C = 1.

    Args:
        num_bins: B.
        step_size: eta >= 0.
        ema: beta in (0, 1].
        exploration: gamma in [0, 1]; of `probabilities` alone.
        max_weight: cap on a weight, >= 1.
        share_normalised: divide l_b by the bin's share in the batch, as above.

    >>> game = PublishedPromptGDRO(num_bins=2)
    >>> game.observe([0, 1, 1, 1], losses=[1.0, 0.0, 0.0, 0.0])
    >>> game.weights([0, 1, -1]).round(3)
    array([1.366, 1.   , 1.   ])
    """

    def __init__(
        self,
        num_bins: int,
        *,
        step_size: float = 0.65,
        ema: float = 0.12,
        exploration: float = 0.01,
        max_weight: float = 15.0,
        share_normalised: bool = True,
    ) -> None:
        self.num_bins = integer("num_bins", num_bins, 1)
        self.step_size = number("step_size", step_size, 0.0)
        self.ema = number("ema", ema, 0.0, 1.0, open_low=True)
        self.exploration = number("exploration", exploration, 0.0, 1.0)
        self.max_weight = number("max_weight", max_weight, 1.0)
        self.share_normalised = bool(share_normalised)
        self._scores = np.zeros(self.num_bins)

    @property
    def scores(self) -> Floats:
        """(B,) S_b, clipped at C = 1."""
        return np.clip(self._scores, -1.0, 1.0)

    @property
    def probabilities(self) -> Floats:
        """(B,) q_b, the adversary's mixture over bins (Eq. 15)."""
        uniform = np.full(self.num_bins, 1.0 / self.num_bins)
        play = entropic(self.scores, self.step_size, uniform).q
        return np.asarray((1.0 - self.exploration) * play + self.exploration * uniform)

    @property
    def bin_weights(self) -> Floats:
        """(B,) w_b."""
        weight = np.exp(np.minimum(self.step_size * self.scores, 700.0))  # e^700 is still finite; the cap is below
        return np.asarray(np.clip(weight, 1e-300, self.max_weight))

    def weights(self, bins: ArrayLike) -> Floats:
        """(N,) weight of each prompt by its bin; 1 for unseen prompts (bin −1)."""
        b = integers("bins", bins, (-1,), -1, self.num_bins - 1)
        return np.where(b >= 0, self.bin_weights[b], 1.0)

    def observe(self, bins: ArrayLike, losses: ArrayLike) -> None:
        """Update the scores by the (N,) prompt losses of an update; unseen prompts (bin −1) do not count."""
        b = integers("bins", bins, (-1,), -1, self.num_bins - 1)
        loss = floats("losses", losses, b.shape)
        loss, b = loss[b >= 0], b[b >= 0]
        if b.size == 0:
            return
        size = np.bincount(b, minlength=self.num_bins)
        present = size > 0
        mean = np.bincount(b, weights=loss, minlength=self.num_bins)[present] / size[present]
        if self.share_normalised:
            mean = mean / np.maximum(size[present] / b.size, 0.01)
        self._scores[present] += self.ema * (mean - self._scores[present])

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain lists and numbers."""
        return {**self._settings(), "scores": self._scores.tolist()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a game with the same settings; on ValueError nothing has changed."""
        if saved.get("version") == 2:
            saved = published_prompt_2(saved)
        check_state("PublishedPromptGDRO", saved, self._settings(), ("scores",))
        self._scores = floats("scores", saved["scores"], (self.num_bins,)).copy()

    def _settings(self) -> dict[str, Any]:
        names = ("num_bins", "step_size", "ema", "exploration", "max_weight", "share_normalised")
        return {"version": 3, **{name: getattr(self, name) for name in names}}


class PublishedRolloutGDRO(CountsPerBin):
    r"""A score of each count n per bin, and the feasible allocation of greatest probability (§3.3, App. A).

        S_b(n) <- (1 - beta) S_b(n) - beta (l_b + mu n)    at the count played (Eq. 20)
        n = argmax  sum_b log p_b(n_b)   s.t.  sum_b c_b n_b = n_bar N
        p_b = (1 - gamma) softmax(eta S_b) + gamma / A

    No count is drawn and no loss weighted (F3), and no bound is known; `theory.exact_play.ExactPlay` repairs both.
    Since the budget is met exactly, Eq. 21 leaves mu at its start, 0.

    Args:
        num_bins: B.
        mean_rollouts: n_bar; n_bar N must be an integer.
        min_rollouts: n_min >= 1.
        max_rollouts: n_max; n_min <= n_bar <= n_max.
        step_size: eta >= 0.
        exploration: gamma in [0, 1].
        ema: beta in (0, 1].
        price_step_size: alpha_mu of Eq. 21.

    >>> game = PublishedRolloutGDRO(num_bins=2, mean_rollouts=4, min_rollouts=2, max_rollouts=6)
    >>> game.observe([0, 1], counts=[6, 2], losses=[-1.0, -1.0])
    >>> game.counts([0, 1, -1])
    array([6, 2, 4])
    """

    def __init__(
        self,
        num_bins: int,
        mean_rollouts: float,
        min_rollouts: int,
        max_rollouts: int,
        *,
        step_size: float = 0.65,
        exploration: float = 0.01,
        ema: float = 0.4,
        price_step_size: float = 0.05,
    ) -> None:
        super().__init__(num_bins, mean_rollouts, min_rollouts, max_rollouts)
        self.step_size = number("step_size", step_size, 0.0)
        self.exploration = number("exploration", exploration, 0.0, 1.0)
        self.ema = number("ema", ema, 0.0, 1.0, open_low=True)
        self.shadow_price = ShadowPrice(self.mean_rollouts, price_step_size)

    @property
    def _log_arm_probabilities(self) -> Floats:
        logits = self.step_size * self._scores
        log_softmax = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        with np.errstate(divide="ignore"):  # log 0 = -inf at exploration 0 or 1
            log_exploit, log_explore = np.log(1.0 - self.exploration), np.log(self.exploration / self.arms.size)
        return np.asarray(np.logaddexp(log_exploit + log_softmax, log_explore))

    def _choose(self, log_p: Floats, size: Ints, budget: int, rng: np.random.Generator | None) -> Ints:
        return exact_budget_allocation(log_p, size, budget, min_rollouts=self.min_rollouts, rng=rng)

    def observe(self, bins: ArrayLike, counts: ArrayLike, losses: ArrayLike) -> None:
        """Take the prompt losses of an update.

        Args:
            bins: (N,) the bins of the plan.
            counts: (N,) the counts of the plan; seen prompts of a bin share one.
            losses: (N,) prompt losses (Eq. 7).

        Raises:
            ValueError: a bad argument; nothing has changed then.
        """
        n, played, _, mean_loss = self._played(bins, counts, losses)
        arm_loss = mean_loss + self.shadow_price.price * self.arms[played[1]]  # Eq. 20
        self._scores[played] += self.ema * (-arm_loss - self._scores[played])
        self.shadow_price.update(float(n.mean()))

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain lists and numbers."""
        return {**self._settings(), "scores": self._scores.tolist(), "price": self.shadow_price.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a game with the same settings; on ValueError nothing has changed."""
        if saved.get("version") == 1:
            saved = published_rollout_1(saved)
        check_state("PublishedRolloutGDRO", saved, self._settings(), ("scores", "price"))
        scores = floats("scores", saved["scores"], self._scores.shape)
        self.shadow_price.load_state_dict(saved["price"])
        self._scores = scores.copy()

    def _settings(self) -> dict[str, Any]:
        names = ("num_bins", "mean_rollouts", "min_rollouts", "max_rollouts", "step_size", "exploration", "ema")
        return {"version": 2, **{name: getattr(self, name) for name in names}}


class PublishedController:
    """The paper's choices (App. A). Its runs play one game at a time; both together are uncoupled.

    Prompt: share-normalised losses, η 0.65, γ 0.01, β 0.12, ω_max 15; window 100. Rollout: η 0.65, γ 0.01, EMA 0.4,
    α_μ 0.05; window 50. Both: any-of-n bins, δ 0.03 (0.3 / B above 10 bins, as 0.03 would soon be half a bin).

    A `Planner` that learns from the update's losses: call `observe_losses(plan, losses)` after each update. It raises
    an error after ten batches without losses.

    Args:
        mean_rollouts: n_bar, a whole number.
        min_rollouts: of the rollout game.
        max_rollouts: likewise.
        num_bins: difficulty bins of equal width.
        prompt: play Prompt-GDRO.
        rollout: play Rollout-GDRO.
        seed: decides ties.

    >>> controller = PublishedController(mean_rollouts=2)
    >>> plan = controller.plan(["a", "b"])
    >>> metrics = controller.observe(plan, rewards=[1, 0, 0, 0])
    >>> controller.observe_losses(plan, losses=[0.1, 0.0])
    """

    def __init__(
        self,
        mean_rollouts: int,
        min_rollouts: int = 2,
        max_rollouts: int = 12,
        *,
        num_bins: int = 10,
        prompt: bool = True,
        rollout: bool = False,
        seed: int = 0,
    ) -> None:
        edges, hysteresis = equal_edges(num_bins), min(0.03, 0.3 / num_bins)
        self.classifier = OnlineDifficultyClassifier(edges, AnyOfN(100 if prompt else 50), hysteresis=hysteresis)
        self.prompt = PublishedPromptGDRO(num_bins) if prompt else None
        self.rollout = PublishedRolloutGDRO(num_bins, mean_rollouts, min_rollouts, max_rollouts) if rollout else None
        self.mean_rollouts = integer("mean_rollouts", mean_rollouts, 1)
        self.seed = integer("seed", seed, 0)
        self._step = 0
        self._without_losses: int | None = 0  # observations since the start or the restart; None once losses have come

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """See `Planner.plan`; it does not choose among candidates.

        Raises:
            ValueError: ids empty or not unique, or a budget that cannot be met, or that is not n_bar N.
            RuntimeError: ten batches were observed and losses never came.
        """
        batches = self._without_losses
        if batches is not None and batches >= BATCHES_WITHOUT_LOSSES and (self.prompt or self.rollout):
            raise RuntimeError(
                "published games learn from the update's losses alone, and none came in "
                f"{batches} batches: call observe_losses(plan, losses) after each update, or use "
                "GDROController.recommended"
            )
        names = unique_ids(ids)
        if budget not in (None, self.mean_rollouts * len(names)):
            raise ValueError(f"budget must be {self.mean_rollouts * len(names)} for {len(names)} ids, got {budget}")
        bins = self.classifier.bins(names)
        weights = np.ones(len(names)) if self.prompt is None else self.prompt.weights(bins)
        if self.rollout is None:
            counts, price = np.full(len(names), self.mean_rollouts, dtype=np.int64), 0.0
        else:
            rng = np.random.default_rng([self.seed, self._step])
            counts, price = self.rollout.counts(bins, rng=rng), self.rollout.shadow_price.price
        return Plan(tuple(names), bins, weights, counts, price, self._step)

    def observe(self, plan: Plan, rewards: ArrayLike | Observation) -> dict[str, Any]:
        """See `Planner.observe`: rewards move the difficulty bins, and nothing else."""
        observation = Observation.of_plan(plan, rewards)
        self.classifier.observe(plan.ids, observation.correct, observation.trials)
        self._step += 1
        if self._without_losses is not None:
            self._without_losses += 1
        return self.metrics(observation)

    def observe_losses(self, plan: Plan, losses: ArrayLike) -> None:
        """Feed the games with the update's prompt losses (Eq. 7), unweighted.

        Args:
            plan: the plan of the batch.
            losses: (N,) mean over the prompt's rollouts of the clipped surrogate loss.
        """
        loss = floats("losses", losses, (len(plan.ids),))
        if self.rollout is not None:
            self.rollout.observe(plan.bins, plan.counts, loss)
        if self.prompt is not None:
            self.prompt.observe(plan.bins, loss)
        self._without_losses = None

    def metrics(self, observation: Observation) -> dict[str, Any]:
        """See `GDROController.metrics`."""
        metrics = observation.by_bin(self.classifier.num_bins)
        if self.prompt is not None:
            metrics["bin_probability"] = self.prompt.probabilities.tolist()
        if self.prompt is not None or self.rollout is not None:
            metrics |= observation.steering(self.classifier.num_bins)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """All memory as plain lists and numbers; `load_state_dict` continues bit for bit."""
        parts = {"classifier": self.classifier, "prompt": self.prompt, "rollout": self.rollout}
        saved = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        return {**self._settings(), "step": self._step, **saved}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a controller with the same parts and settings.

        Raises:
            ValueError: other parts, settings, shapes or version; nothing has changed then.
        """
        if saved.get("version") == 1:
            saved = published_controller_1(saved)
        parts = {"classifier": self.classifier, "prompt": self.prompt, "rollout": self.rollout}
        check_state("PublishedController", saved, self._settings(), ("step", *parts))
        step = integer("step", saved["step"], 0)
        load_parts("PublishedController", parts, saved)
        self._step, self._without_losses = step, 0

    def _settings(self) -> dict[str, Any]:
        return {"version": 2, "seed": self.seed, "mean_rollouts": self.mean_rollouts}
