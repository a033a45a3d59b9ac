"""The race that compares planners at equal total rollouts; those that are thrown away count too.

A peer is a `Planner` like the controllers. One that looks at rollouts before it decides (`Adaptive`) also asks for
`more` (further rollouts for the same prompts, round after round) and says what to `keep` (what is trained on).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from gdro_core import Planner, PublishedController
from simulations.controls import controller_of
from simulations.epochs import Epochs, offered
from simulations.harness import Row
from simulations.population import Floats, Ints, Population
from simulations.testbeds import Learner

MEASURE_EVERY = 10  # steps


@dataclass(frozen=True, eq=False)
class Groups:
    """Graded rollouts, prompt after prompt."""

    rows: Ints  # (N,) prompts
    counts: Ints  # (N,) rollouts of each
    weights: Floats  # (N,)
    rewards: Floats  # (sum of counts,) as graded
    correct: np.ndarray  # (sum of counts,) in truth

    @property
    def owner(self) -> Ints:
        """(sum of counts,) row of each rollout."""
        return np.repeat(np.arange(self.rows.size), self.counts)

    @property
    def successes(self) -> Floats:
        """(N,) rollouts graded right."""
        return np.asarray(np.bincount(self.owner, self.rewards, minlength=self.rows.size), dtype=np.float64)

    @property
    def mixed(self) -> np.ndarray:
        """(N,) whether the group has both outcomes."""
        return np.asarray((self.successes > 0) & (self.successes < self.counts))

    def with_more(self, other: Groups) -> Groups:
        """Further rollouts of the same prompts."""
        order = np.argsort(np.concatenate([self.owner, other.owner]), kind="stable")
        rewards, correct = (
            np.concatenate(pair)[order] for pair in ((self.rewards, other.rewards), (self.correct, other.correct))
        )
        return replace(self, counts=self.counts + other.counts, rewards=rewards, correct=correct)

    def thinned(self, kept: np.ndarray) -> Groups:
        """Some of the rollouts: a mask (sum of counts,)."""
        counts = np.bincount(self.owner[kept], minlength=self.rows.size)
        return replace(self, counts=counts, rewards=self.rewards[kept], correct=self.correct[kept])

    def of(self, prompts: np.ndarray) -> Groups:
        """Some of the prompts: a mask (N,)."""
        rollouts = prompts[self.owner]
        return Groups(
            self.rows[prompts],
            self.counts[prompts],
            self.weights[prompts],
            self.rewards[rollouts],
            self.correct[rollouts],
        )


@runtime_checkable
class Adaptive(Planner, Protocol):
    """A planner that looks at rollouts before it decides; `peers.Uniform` does so in the plainest way, not at all."""

    fills_batches: bool  # whether only what is kept is trained on, collected until a batch is full

    def more(self, groups: Groups, done: int) -> Ints | None:
        """(N,) further rollouts after `done` rounds, or None."""

    def keep(self, groups: Groups) -> Groups:
        """What is trained on."""


def race(population: Population, planner: Planner, total: int, batch: int, seed: int) -> list[Row]:
    """Train until `total` rollouts are spent; per step the rollouts so far, held-out metrics and share of mixed groups
    among the prompts with rollouts. A controller with variance components is shown gradients every tenth step, and
    at first until it knows kappa.

    The last step may pass `total`: interpolate. Streams and epochs are those of `population.train`, so that runs
    of different planners are paired, and a planner that spends n_bar a prompt has the same run in both.

    Args:
        population: at its start; trained in place.
        planner: a controller, or a peer with `own_stream(seed)` for its draws.
        total: rollouts to spend, discarded ones included.
        batch: prompts of a step.
        seed: of batches and outcomes.
    """
    order, outcome, sketches = (np.random.default_rng([seed, stream]) for stream in (1, 2, 4))
    adaptive = planner if isinstance(planner, Adaptive) else None
    measuring = controller_of(planner)
    epochs = Epochs(population.prompts, offered(planner, batch, population.prompts), order)
    step, rollouts, states = 0, 0, [_state(population, 0, 0.0)]
    waiting: Groups | None = None
    while rollouts < total:
        plan = planner.plan(epochs.draw())
        rows = np.asarray(plan.ids, dtype=np.int64)
        groups, stage = _sample(population, rows, plan.counts, plan.weights, outcome), None
        if measuring is not None and plan.rest:
            plan = measuring.replan(plan, groups.rewards)
            more = _sample(population, rows, plan.more, plan.weights, outcome)
            groups, stage = replace(groups.with_more(more), weights=plan.weights), plan.stage
        kept = groups
        if adaptive is not None:
            done = 1
            while (extra := adaptive.more(groups, done)) is not None:
                groups, done = groups.with_more(_sample(population, rows, extra, plan.weights, outcome)), done + 1
            plan, kept = replace(plan, counts=groups.counts), adaptive.keep(groups)
        rollouts += int(groups.counts.sum())
        full = True
        if adaptive is not None and adaptive.fills_batches:
            waiting = kept if waiting is None else _joined(waiting, kept)
            full = waiting.rows.size >= batch
            kept = waiting.of(np.arange(waiting.rows.size) < batch)
        if full:
            population.correct = kept.correct
            if measuring is not None and isinstance(population, Learner) and measuring.measures(plan, MEASURE_EVERY):
                halves = population.halves(kept.rows, kept.counts, kept.rewards, sketches)
                parts = (halves.first, halves.second, halves.correct, halves.trials)
                measuring.observe_gradients(plan, halves.places, *parts)
            if isinstance(planner, PublishedController):
                losses = population.prompt_losses(kept.rows, kept.counts, kept.rewards, kept.weights)
                planner.observe_losses(plan, losses)
            if stage is None:
                population.update(kept.rows, kept.counts, kept.rewards, kept.weights)
            elif isinstance(population, Learner):
                population.update(kept.rows, kept.counts, kept.rewards, kept.weights, stage)
            waiting = None
        planner.observe(plan, groups.rewards)
        step += 1
        states.append(_state(population, rollouts, float(groups.mixed[groups.counts > 0].mean())))
    return states


def own_stream(seed: int) -> np.random.Generator:
    """The generator of a peer's own draws in a race of this seed."""
    return np.random.default_rng([seed, 3])


def _state(population: Population, rollouts: int, mixed: float) -> Row:
    return {"rollouts": rollouts, "mixed": mixed, **population.metrics()}


def _sample(population: Population, rows: Ints, counts: Ints, weights: Floats, rng: np.random.Generator) -> Groups:
    rewards = population.sample(rows, counts, rng)
    return Groups(rows, counts, weights, rewards, population.correct)


def _joined(first: Groups, second: Groups) -> Groups:
    names = ("rows", "counts", "weights", "rewards", "correct")
    return Groups(*(np.concatenate([getattr(first, name), getattr(second, name)]) for name in names))
