r"""Prompts with shared and own parameters, trained by sampled GRPO groups under steps whose length noise takes part in.

    logit p_i = difficulty_i + L_i . theta + own_i

Per rollout, grad log pi = (correct - p_i) (L_i, √tau² e_i) + noise: the shared part teaches other prompts, the own part
(e_i, a direction of its own) the prompt alone, and so no held-out one; noise of variance sigma² does no good and lies
in other directions. So a group of n with advantages r - mean has, in expectation, signal (n - 1) v (L_i, √tau² e_i),
v = p (1 - p), and the squared length E |G|² of its gradient is (n - 1) v sigma² + (n - 1)² v² (|L_i|² + tau²) and the
variance of the signal. The loss is averaged over rollouts: a prompt's factor is w_i n_i over all rollouts.

What a hit teaches need not be what the prompt asks for: `agreement` turns rare hits away from the shared direction
(they were partly lucky), `opposed` prompts are solved by a false route that unteaches the right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from gdro_core import staged_advantages
from simulations.population import GROUP_EDGES, Floats, Ints, SkillPopulation

RUNGS = (
    -0.1, -0.4, -0.8, -0.8, -1.8, -1.1, -1.3, -1.3, -1.3, -1.3, -1.6, -1.8, -2.0, -3.0, -3.4, -3.2, -4.2, -4.7,
)  # mean start logit of each task  # fmt: skip
WITHIN = 1.2  # standard deviation within a task
SKETCH, MEASURED = 128, 48  # directions that own parts and noise are projected to, and groups, of a measurement


@dataclass(frozen=True, eq=False)
class Ground:
    """Training prompts 0..prompts - 1, then held-out ones."""

    difficulty: Floats  # (T,) logit of the pass rate at the start
    loadings: Floats  # (T, S) L
    prompts: int
    opposed: NDArray[np.bool_]  # (T,) whether hits come by a false route


@dataclass(frozen=True, eq=False)
class Halves:
    """Gradients of the halves of M groups, each an unbiased estimate of the gradient of its prompt's graded rate.

    Own parts and noise are projected to SKETCH directions, which keeps inner products in expectation.
    """

    places: Ints  # (M,) of the groups in the plan
    first: Floats  # (M, S + SKETCH)
    second: Floats  # (M, S + SKETCH)
    correct: Ints  # (M, 2) rollouts of each half that were graded right
    trials: Ints  # (M, 2) rollouts of each half


class Steps(Protocol):
    """Scale of a step by the squared length of the whole gradient."""

    def scale(self, square: float) -> float:
        """Factor on the learning rate; `square` is above 0."""


class Plain:
    """SGD."""

    def scale(self, square: float) -> float:
        """1."""
        return 1.0


class Normalised:
    """Steps of one length."""

    def scale(self, square: float) -> float:
        """1 / length."""
        return float(square**-0.5)


class AdamLike:
    """Steps by the running root mean square of the length, bias corrected; one scale for all coordinates."""

    def __init__(self, beta: float = 0.98) -> None:
        self.beta, self.mean, self.weight = beta, 0.0, 0.0

    def scale(self, square: float) -> float:
        """1 / rms."""
        self.mean = self.beta * self.mean + (1 - self.beta) * square
        self.weight = self.beta * self.weight + (1 - self.beta)
        return float((self.weight / self.mean) ** 0.5)


class Learner:
    """A policy that learns on a `Ground`; what `SkillPopulation` offers, it offers too.

    Args:
        ground: prompts.
        steps: rule for the length of a step.
        learning_rate: lr [logit / scaled gradient].
        own: tau², squared separation of right and wrong in the prompt's own direction; |L_i|² is about 1.
        noise: sigma², variance of a rollout's score.
        agreement: p_0: what a rollout teaches is rho L_i + √(1 - rho²) |L_i| idle, rho = p² / (p² + p_0²).
        forgetting: share of all that was learnt, shared and own, that is lost at each step.
        false_positive: probability that a wrong answer is graded right.
        false_negative: probability that a right answer is graded wrong.
    """

    def __init__(
        self,
        ground: Ground,
        *,
        steps: Steps,
        learning_rate: float,
        own: float = 0.0,
        noise: float = 30.0,
        agreement: float = 0.0,
        forgetting: float = 0.0,
        false_positive: float = 0.0,
        false_negative: float = 0.0,
    ) -> None:
        self.ground, self.steps, self.learning_rate = ground, steps, learning_rate
        self.own, self.noise, self.agreement, self.forgetting = own, noise, agreement, forgetting
        self.false_positive, self.false_negative = false_positive, false_negative
        self.staged = False  # with stages: each against what came up to it, instead of against the whole group
        self.prompts = ground.prompts
        self.ids = list(range(self.prompts))
        groups = np.searchsorted(GROUP_EDGES, expit(ground.difficulty), side="right")
        self.group, self.held_out_group = groups[: self.prompts], groups[self.prompts :]
        self.theta = np.zeros(ground.loadings.shape[1])
        self.learnt = np.zeros(ground.difficulty.size)  # own_i; stays 0 on held-out prompts
        self.length = np.linalg.norm(ground.loadings, axis=1)
        self.correct = np.zeros(0, dtype=bool)

    @property
    def kappa(self) -> float:
        """tau² / sigma², what decides the best group size (theorem 17)."""
        return self.own / self.noise

    @property
    def pass_rate(self) -> Floats:
        """(N,) of the training prompts."""
        return self._rate(np.arange(self.prompts))

    @property
    def held_out_pass_rate(self) -> Floats:
        """(M,) of the prompts never trained on."""
        return self._rate(np.arange(self.prompts, self.learnt.size))

    def sample(self, rows: Ints, counts: Ints, rng: np.random.Generator) -> Floats:
        """(sum of counts,) graded rewards 0 or 1, prompt after prompt; two uniforms a rollout, whatever the noise."""
        draws = rng.random((2, int(counts.sum())))
        self.correct = draws[0] < np.repeat(self._rate(rows), counts)
        flipped = draws[1] < np.where(self.correct, self.false_negative, self.false_positive)
        return np.asarray(self.correct ^ flipped, dtype=np.float64)

    def update(self, rows: Ints, counts: Ints, rewards: Floats, weights: Floats, stage: Ints | None = None) -> None:
        """One step on the rewards of the last `sample`, which must be of the same rows and counts.

        With the (sum of counts,) stage of each rollout, advantages are taken stage by stage if `staged`.
        """
        owner = np.repeat(np.arange(rows.size), counts)
        size = np.maximum(counts, 1)
        mean = np.bincount(owner, rewards, minlength=rows.size) / size
        spread = np.sqrt(mean * (1.0 - mean))
        factor = np.divide(weights, spread, out=np.zeros(rows.size), where=spread > 1e-6) / max(owner.size, 1)
        centred, square = rewards - mean[owner], mean * (1.0 - mean) * size
        if stage is not None and self.staged:
            centred = staged_advantages(rewards, owner, stage)
            square = np.asarray(np.bincount(owner, centred**2, minlength=rows.size), dtype=np.float64)
        pull = factor * self._pull(rows, owner, centred)  # 0 unless mixed
        energy = factor**2 * square
        taught, idle = self._taught(rows)
        shared = pull @ taught
        length = float(shared @ shared + pull**2 @ (self.own + idle**2) + self.noise * energy.sum())
        if length > 0.0:
            rate = self.learning_rate * self.steps.scale(length)
            self.theta = self.theta + rate * shared
            self.learnt[rows] += rate * self.own * pull
        self.theta = (1.0 - self.forgetting) * self.theta
        self.learnt *= 1.0 - self.forgetting

    def components(self, rows: Ints) -> tuple[Floats, Floats]:
        """(N, S) shared and (N,) squared own part of the score's separation; times v they are those of grad p."""
        taught, idle = self._taught(rows)
        return taught, self.own + idle**2

    def halves(self, rows: Ints, counts: Ints, rewards: Floats, rng: np.random.Generator) -> Halves:
        """Gradients of both halves of at most MEASURED groups of the last `sample`; call before `update`.

        A rollout's advantage is its reward minus the mean of the others of its half, as `VarianceComponents` asks.

        Args:
            rows: (N,) prompts.
            counts: (N,) rollouts of each; groups of fewer than 4 are not measured.
            rewards: (sum of counts,) as sampled.
            rng: of the choice of groups and of the noise.
        """
        chosen = np.sort(rng.permutation(np.flatnonzero(counts >= 4))[:MEASURED])
        start, which = (np.cumsum(counts) - counts)[chosen], rows[chosen]
        taught, own = self.components(which)
        direction = np.zeros((which.size, SKETCH))
        for k, row in enumerate(which.tolist()):  # a fixed direction for each prompt
            direction[k] = np.random.default_rng([97, row]).standard_normal(SKETCH)
        direction *= (np.sqrt(own) / np.linalg.norm(direction, axis=1))[:, None]
        middle = counts[chosen] // 2
        sizes, gradients, hits = np.stack([middle, counts[chosen] - middle], axis=1), [], []
        for begin, size in ((start, sizes[:, 0]), (start + middle, sizes[:, 1])):
            owner = np.repeat(np.arange(chosen.size), size)
            place = np.arange(owner.size) + np.repeat(begin - (np.cumsum(size) - size), size)
            correct = np.bincount(owner, rewards[place], minlength=chosen.size)
            mean = correct / size
            score = self.correct[place] - self._rate(which)[owner]
            pull = np.bincount(owner, (rewards[place] - mean[owner]) * score, minlength=chosen.size) / (size - 1)
            deviation = np.sqrt(self.noise * mean * (1 - mean) * size / SKETCH) / (size - 1)
            blur = deviation[:, None] * rng.standard_normal((chosen.size, SKETCH))
            gradients.append(np.hstack([pull[:, None] * taught, pull[:, None] * direction + blur]))
            hits.append(correct)
        return Halves(chosen, gradients[0], gradients[1], np.stack(hits, axis=1).astype(np.int64), sizes)

    def prompt_losses(self, rows: Ints, counts: Ints, rewards: Floats, weights: Floats) -> Floats:
        """(N,) zeros: with one update a step every ratio is 1, and the advantages of a group sum to 0 (F1)."""
        return np.zeros(rows.size)

    def metrics(self) -> dict[str, float]:
        """Exact held-out mean@8, pass@8 and mean pass rate of the worst difficulty group."""
        p = self.held_out_pass_rate
        size = np.bincount(self.held_out_group)
        groups = np.bincount(self.held_out_group, p)[size > 0] / size[size > 0]
        return {
            "mean_at_8": float(p.mean()),
            "pass_at_8": float((1 - (1 - p) ** 8).mean()),
            "worst": float(groups.min()),
        }

    def _pull(self, rows: Ints, owner: Ints, centred: Floats) -> Floats:
        score = self.correct - self._rate(rows)[owner]
        return np.asarray(np.bincount(owner, centred * score, minlength=rows.size))

    def _taught(self, rows: Ints) -> tuple[Floats, Floats]:
        """(N, S) shared part and (N,) length of the idle part of what a rollout teaches."""
        p = self._rate(rows)
        rho = 1.0 / (1.0 + (self.agreement / np.maximum(p, 1e-30)) ** 2)
        sign = np.where(self.ground.opposed[rows], -1.0, 1.0)
        return (sign * rho)[:, None] * self.ground.loadings[rows], np.sqrt(1.0 - rho**2) * self.length[rows]

    def _rate(self, rows: Ints) -> Floats:
        z = self.ground.difficulty[rows] + self.ground.loadings[rows] @ self.theta + self.learnt[rows]
        return np.asarray(expit(z))


def cells(
    seed: int,
    *,
    kinds: int = 24,
    transfer: float = 0.05,
    interfere: float = 0.0,
    dead: float = 0.0,
    opposed: float = 0.0,
    prompts: int = 1200,
    held_out: int = 400,
) -> Ground:
    """Kinds of prompts, each with a skill of its own, and one skill common to all; easy, middle and hard kinds.

    Args:
        seed: of everything.
        kinds: 30 % of them start at p in .5...85, 25 % in .1...4; the others, with 45 % of the prompts, in .004...05.
        transfer: share of the kernel common to all pairs.
        interfere: variance of four further loadings of random sign a kind: what helps one kind may hurt another.
        dead: share of prompts out of reach, half with p = 0, half in 1e-6..1e-4.
        opposed: share of the prompts with p < .1 whose hits come by a false route.
        prompts: to train on.
        held_out: to evaluate on.
    """
    rng = np.random.default_rng([seed, 77])
    total = prompts + held_out
    easy, middle = round(0.3 * kinds), round(0.25 * kinds)
    tier = np.repeat([0, 1, 2], [easy, middle, kinds - easy - middle])
    rates = rng.uniform([0.5, 0.1, np.log(0.004)], [0.85, 0.4, np.log(0.05)], (kinds, 3))[np.arange(kinds), tier]
    base = logit(np.where(tier == 2, np.exp(rates), rates))
    share = np.where(tier == 2, 0.45 / (tier == 2).sum(), 0.55 / (tier < 2).sum())
    kind = rng.choice(kinds, total, p=share)
    difficulty = base[kind] + 0.6 * rng.standard_normal(total)
    scale = rng.lognormal(0, 0.2, total)[:, None]
    signs = rng.standard_normal((kinds, 4))
    signs *= np.sqrt(interfere) / np.linalg.norm(signs, axis=1, keepdims=True)
    skill = np.sqrt(1 - transfer) * np.eye(kinds)[kind]
    loadings = scale * np.hstack([np.full((total, 1), np.sqrt(transfer)), skill, signs[kind]])
    gone, zero, false = rng.random(total) < dead, rng.random(total) < 0.5, rng.random(total) < opposed
    tail = np.where(zero, -60.0, rng.uniform(logit(1e-6), logit(1e-4), total))
    opposes = false & ~gone & (expit(difficulty) < 0.1)
    return Ground(np.where(gone, tail, difficulty), loadings, prompts, opposes)


def skilled(seed: int, *, tail: float = 4.0, prompts: int = 1200) -> Ground:
    """The prompts of `SkillPopulation`, which are calibrated to real traces."""
    source = SkillPopulation(seed, prompts=prompts, held_out=prompts // 3, tail=tail)
    return Ground(source.difficulty, source.loadings, prompts, np.zeros(source.difficulty.size, dtype=bool))


def ladder(
    seed: int,
    *,
    common: float = 0.3,
    sharpening: float = 2.0,
    prompts: int = 360,
    held_out: int = 360,
) -> Ground:
    """Rungs of tasks for a pretrained model; RUNGS and WITHIN are exact start rates of SmolLM2-135M on 18 tasks.

    Each rung has a skill of its own, with squared loading .2.

    Args:
        seed: of everything.
        common: squared loading on the skill common to all, for a prompt of mean difficulty.
        sharpening: how much the common loading rises with the start logit, per standard deviation. Above about 1 it is
            negative for hard prompts: what makes likely answers likelier makes rare right ones rarer.
        prompts: to train on.
        held_out: to evaluate on.
    """
    rng = np.random.default_rng([seed, 79])
    total, rungs = prompts + held_out, len(RUNGS)
    kind = np.arange(total) % rungs
    difficulty = np.asarray(RUNGS)[kind] + WITHIN * rng.standard_normal(total)
    shift = np.sqrt(common) * (1.0 + sharpening * (difficulty - difficulty.mean()) / difficulty.std())
    loadings = np.hstack([shift[:, None], np.sqrt(0.2) * np.eye(rungs)[kind]])
    return Ground(difficulty, loadings, prompts, np.zeros(total, dtype=bool))
