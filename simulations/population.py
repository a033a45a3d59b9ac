r"""Prompts of heavy-tailed difficulty, shared skills and a Bernoulli policy trained by GRPO: where controllers learn.

    logit p_i = difficulty_i + L_i . theta,    theta <- theta + lr (1/N) sum_i w_i (1/n_i) sum_j A_ij grad log pi(y_ij)

with grad log pi = (1 - p_i) L_i for a right answer, -p_i L_i for a wrong one, so that E = w_n(p) grad p (theorem 10).
A prompt learns through skills only: training on j moves the logit of i by the kernel L_i . L_j >= 0, of which a share
`transfer` is common to all pairs and the rest is shared by prompts of similar difficulty above all. Difficulties are
Student's t. Held-out prompts have the same law and are never trained on.

Calibrated by hand, under uniform sampling alone and before any controller was run, to the accuracy traces of a GRPO run
of Qwen2.5-Math-1.5B (ypwang61/One-Shot-RLVR: 1,209 prompts, groups of 8, 500 steps) at 1,200 prompts, batch 120, 500
steps, 8 seeds: MEDIAN, HARD and EASY to the starting accuracies, RESPONSE and `learning_rate` to the final ones.
`tail`, `skills` and `transfer` are not identified by one uniform run and were not tuned. `experiments/calibration.py`
measures the fit. Prompts have no component of their own: all visit-to-visit noise of the traces is binomial.

Left out: plain gradient steps pay for noise only to second order (`normalised` steps, as Adam's, pay to first order);
no update makes a prompt harder in expectation; wrong answers that fool the verifier are not learnt as such.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from gdro_core import Planner, PublishedController, gradient_weight
from simulations.epochs import Epochs, offered
from simulations.harness import Row

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MEDIAN, HARD, EASY = -1.4, 3.0, 2.4  # of the difficulties [logit]: median, scale below it, scale above it
RESPONSE = 0.7  # loadings of the easiest minus of the hardest, relative to the median prompt's
STEP = 0.243  # mean length of the gradient under uniform groups of 8
GROUP_EDGES = (0.2, 0.4, 0.6, 0.8)  # of the pass rate at the start
CLIP = (0.8, 1.28)  # of the ratio in the surrogate loss (App. A)


class Population(Protocol):
    """What a loop trains and a peer may look at."""

    prompts: int  # training prompts, with ids 0..prompts - 1
    ids: list[int]
    group: Ints  # (N,) difficulty group of the training prompts at the start, hardest = 0
    correct: NDArray[np.bool_]  # the true outcomes of the last sample, which `update` needs

    @property
    def pass_rate(self) -> Floats:
        """(N,) of the training prompts."""

    def sample(self, rows: Ints, counts: Ints, rng: np.random.Generator) -> Floats:
        """(sum of counts,) graded rewards 0 or 1, prompt after prompt."""

    def update(self, rows: Ints, counts: Ints, rewards: Floats, weights: Floats) -> None:
        """One step on the rewards of the last `sample`, which must be of the same rows and counts."""

    def prompt_losses(self, rows: Ints, counts: Ints, rewards: Floats, weights: Floats) -> Floats:
        """(N,) clipped surrogate loss (Eq. 7)."""

    def metrics(self) -> dict[str, float]:
        """Exact held-out mean@8, pass@8 and mean pass rate of the worst difficulty group."""


class SkillPopulation:
    """Prompts, skills and the policy's `theta`.

    Args:
        seed: of difficulties and skills; the same for all planners that are compared.
        prompts: training prompts, with ids 0..prompts - 1.
        held_out: prompts to evaluate on.
        skills: besides the common one.
        tail: degrees of freedom of Student's t.
        transfer: share of the kernel that is common to all pairs of prompts, in [0, 1].
        learning_rate: lr [logit / mean gradient].
        false_positive: probability that a wrong answer is graded right.
        false_negative: probability that a right answer is graded wrong.
        estimator: "grpo" (standard deviation), "dr_grpo" (no division) or "rloo" (leave one out).
        normalised: steps have the fixed length that uniform groups of 8 have on average, whatever the gradient's.
    """

    def __init__(
        self,
        seed: int,
        *,
        prompts: int = 1200,
        held_out: int = 400,
        skills: int = 16,
        tail: float = 4.0,
        transfer: float = 0.5,
        learning_rate: float = 0.0108,
        false_positive: float = 0.0,
        false_negative: float = 0.0,
        estimator: str = "grpo",
        normalised: bool = False,
    ) -> None:
        rng = np.random.default_rng(seed)
        total = prompts + held_out
        spread = rng.standard_t(tail, total)
        self.difficulty = MEDIAN + np.where(spread < 0, HARD, EASY) * spread
        quantile = self.difficulty.argsort().argsort() / total
        place = (np.arange(skills) + 0.5) / skills  # of each skill among the difficulties
        taste = -np.abs(quantile[:, None] - place) / 0.25 + rng.gumbel(size=(total, skills))
        amount = rng.exponential(size=(total, skills)) * (taste >= np.sort(taste, axis=1)[:, [-3]])  # three skills each
        own = amount / np.linalg.norm(amount.mean(axis=0))  # mean of own @ own.T is 1
        common = np.full((total, 1), np.sqrt(transfer))
        gain = 1.0 + RESPONSE * (quantile[:, None] - 0.5)
        self.loadings = gain * np.hstack([common, np.sqrt(1.0 - transfer) * own])  # (prompts + held_out, skills + 1)
        self.theta = np.zeros(skills + 1)
        self.prompts, self.learning_rate, self.estimator = prompts, learning_rate, estimator
        self.false_positive, self.false_negative = false_positive, false_negative
        self.normalised = normalised
        self.ids = list(range(prompts))
        groups = np.searchsorted(GROUP_EDGES, expit(self.difficulty), side="right")
        self.group, self.held_out_group = groups[:prompts], groups[prompts:]  # hardest = 0
        self.correct = np.zeros(0, dtype=bool)  # the true outcomes of the last sample, which `update` needs

    @property
    def pass_rate(self) -> Floats:
        """(N,) of the training prompts."""
        return self._rate(np.arange(self.prompts))

    @property
    def held_out_pass_rate(self) -> Floats:
        """(M,) of the prompts never trained on."""
        return self._rate(np.arange(self.prompts, self.difficulty.size))

    def sample(self, rows: Ints, counts: Ints, rng: np.random.Generator) -> Floats:
        """(sum of counts,) graded rewards 0 or 1, prompt after prompt; two uniforms a rollout, whatever the noise."""
        draws = rng.random((2, int(counts.sum())))
        self.correct = draws[0] < np.repeat(self._rate(rows), counts)
        flipped = draws[1] < np.where(self.correct, self.false_negative, self.false_positive)
        return np.asarray(self.correct ^ flipped, dtype=np.float64)

    def gradient(self, rows: Ints, counts: Ints, rewards: Floats, weights: Floats) -> Floats:
        """(skills + 1,) weighted policy gradient of the last sample, averaged per prompt and then over them."""
        owner = np.repeat(np.arange(rows.size), counts)
        score = self.correct - self._rate(rows)[owner]  # grad log pi is this times L
        pull = np.bincount(owner, self.advantages(counts, rewards) * score, minlength=rows.size) / np.maximum(counts, 1)
        drawn = max(int((counts > 0).sum()), 1)  # without those that are passed over
        return np.asarray((weights * pull) @ self.loadings[rows] / drawn)

    def update(self, rows: Ints, counts: Ints, rewards: Floats, weights: Floats) -> None:
        """One step on the rewards of the last `sample`, which must be of the same rows and counts."""
        self.theta = self._after(self.gradient(rows, counts, rewards, weights))

    def expected_update(self, rows: Ints, counts: Ints, weights: Floats) -> None:
        """The same step without sampling noise: w_n(r) grad r, r the rate of graded rewards."""
        p, slope = self._rate(rows), 1.0 - self.false_positive - self.false_negative
        drawn, graded_rate = counts > 0, self.false_positive + slope * p
        factor = gradient_weight(np.where(drawn, counts, 2), graded_rate, self.estimator) * drawn
        pull = factor * slope * p * (1.0 - p)
        self.theta = self._after((weights * pull) @ self.loadings[rows] / max(drawn.sum(), 1))

    def advantages(self, counts: Ints, rewards: Floats) -> Floats:
        """(sum of counts,) by the estimator; 0 in groups of equal rewards."""
        owner = np.repeat(np.arange(counts.size), counts)
        mean = np.bincount(owner, rewards, minlength=counts.size) / np.maximum(counts, 1)
        if self.estimator == "grpo":
            factor = np.where(mean * (1.0 - mean) > 1e-12, 1.0 / np.sqrt(np.maximum(mean * (1.0 - mean), 1e-12)), 0.0)
        else:
            factor = counts / np.maximum(counts - 1, 1) if self.estimator == "rloo" else np.ones(counts.size)
        return np.asarray(factor[owner] * (rewards - mean[owner]))

    def prompt_losses(self, rows: Ints, counts: Ints, rewards: Floats, weights: Floats) -> Floats:
        """(N,) clipped surrogate loss (Eq. 7), call before `update`: 0 in the first mini-batch, drift in the second."""
        half = rows.size // 2
        owner = np.repeat(np.arange(rows.size), counts)
        first = np.where(np.arange(rows.size) < half, 2.0 * weights, 0.0)
        theta = self._after(self.gradient(rows, counts, rewards, first))
        moved = expit(self.difficulty[rows] + self.loadings[rows] @ theta)
        before, after = (np.where(self.correct, p, 1.0 - p) for p in (self._rate(rows)[owner], moved[owner]))
        ratio = np.where(owner >= half, after / before, 1.0)  # what was drawn had a probability above 0
        advantage = self.advantages(counts, rewards)
        surrogate = np.minimum(ratio * advantage, np.clip(ratio, *CLIP) * advantage)
        return np.asarray(-np.bincount(owner, surrogate, minlength=rows.size) / np.maximum(counts, 1))

    def metrics(self) -> dict[str, float]:
        """Exact held-out mean@8, pass@8 and mean pass rate of the worst difficulty group."""
        p = self.held_out_pass_rate
        groups = [p[self.held_out_group == g].mean() for g in np.unique(self.held_out_group)]
        return {
            "mean_at_8": float(p.mean()),
            "pass_at_8": float((1 - (1 - p) ** 8).mean()),
            "worst": float(min(groups)),
        }

    def _after(self, gradient: Floats) -> Floats:
        length = np.linalg.norm(gradient)
        scale = STEP / length if self.normalised and length > 0 else 1.0
        return np.asarray(self.theta + self.learning_rate * scale * gradient)

    def _rate(self, rows: Ints) -> Floats:
        return np.asarray(expit(self.difficulty[rows] + self.loadings[rows] @ self.theta))


def train(
    population: Population,
    planner: Planner,
    steps: int,
    batch: int,
    mean_rollouts: int,
    seed: int,
) -> list[Row]:
    """Train in epochs of permutations; per step the held-out metrics after it, cumulative rollouts, plan and successes.

    Batches depend on the seed alone: runs of different planners are paired.

    Raises:
        ValueError: rollouts off the budget.
    """
    order, outcome = (np.random.default_rng([seed, stream]) for stream in (1, 2))
    epochs, rows_out, rollouts = Epochs(population.prompts, offered(planner, batch, population.prompts), order), [], 0
    for step in range(steps):
        plan = planner.plan(epochs.draw())
        spent = int(plan.counts.sum())
        if spent != mean_rollouts * batch:
            raise ValueError(f"counts must sum to mean_rollouts x batch = {mean_rollouts * batch}, got {spent}")
        rows = np.asarray(plan.ids, dtype=np.int64)
        rewards = population.sample(rows, plan.counts, outcome)
        if isinstance(planner, PublishedController):
            planner.observe_losses(plan, population.prompt_losses(rows, plan.counts, rewards, plan.weights))
        population.update(rows, plan.counts, rewards, plan.weights)
        seen = planner.observe(plan, rewards)
        rollouts += spent
        successes = np.bincount(np.repeat(np.arange(rows.size), plan.counts), rewards, minlength=rows.size)
        batch_record = {"plan": plan, "successes": successes, "observed": seen}
        rows_out.append({"step": step + 1, "rollouts": rollouts, **population.metrics(), **batch_record})
    return rows_out
