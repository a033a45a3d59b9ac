"""What a comparison of plans needs beside uniform: groups of other sizes at the same budget, and plans dealt at random.

Groups of n on n_bar / n as many prompts show what group size does alone; the null of a planner's own (weight, count)
pairs shows what their spread does without knowing which prompts they are for.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gdro_core import GDROController, Observation, Plan, Planner


class GroupsOf:
    """GRPO with groups of n, on as many prompts of the epoch as the budget n_bar x batch allows.

    Where n does not divide the budget, groups are a little smaller, and differ by one rollout at most.

    Args:
        size: n.
        mean_rollouts: n_bar, which with the loop's batch sets the budget.
        batch: prompts of the loop's batch.
    """

    def __init__(self, size: int, mean_rollouts: int, batch: int) -> None:
        self.budget, self.step = mean_rollouts * batch, 0
        self.candidates = -(-self.budget // size) / batch

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """All that is offered, with weights 1."""
        least, more = divmod(self.budget, len(ids))
        counts = np.where(np.arange(len(ids)) < more, least + 1, least)
        return Plan(tuple(ids), np.full(len(ids), -1), np.ones(len(ids)), counts, 0.0, self.step)

    def observe(self, plan: Plan, rewards: ArrayLike | Observation) -> dict[str, Any]:
        """Learns nothing."""
        self.step += 1
        return {}


class Choosing:
    """A controller that is offered more prompts than the budget has room for, and chooses among them.

    Args:
        controller: one that may pass prompts over.
        mean_rollouts: n_bar, which with the loop's batch sets the budget.
        batch: prompts of the loop's batch.
        candidates: prompts offered for each one of the batch.
    """

    def __init__(self, controller: GDROController, mean_rollouts: int, batch: int, candidates: float = 2.0) -> None:
        self.controller, self.budget, self.candidates = controller, mean_rollouts * batch, candidates

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """The controller's, at the budget of the batch."""
        return self.controller.plan(ids, budget=self.budget)

    def observe(self, plan: Plan, rewards: ArrayLike | Observation) -> dict[str, Any]:
        """The controller's."""
        return self.controller.observe(plan, rewards)


def controller_of(planner: Planner) -> GDROController | None:
    """The controller of gdro_core that a planner is, or that a control of this file holds."""
    while isinstance(planner, Choosing | Dealt):
        planner = planner.controller if isinstance(planner, Choosing) else planner.planner
    return planner if isinstance(planner, GDROController) else None


class Dealt:
    """The null: a planner's own (weight, count) pairs, dealt at random to the prompts that it was offered.

    Args:
        planner: what decides the pairs, and learns from the rollouts of the prompts that got them.
        rng: of the deal.
    """

    def __init__(self, planner: Planner, rng: np.random.Generator) -> None:
        self.planner, self.rng = planner, rng
        self.candidates = getattr(planner, "candidates", 1.0)

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """The planner's pairs and as many of the prompts."""
        decided = self.planner.plan(ids, budget=budget)
        known = dict(zip(decided.ids, decided.bins.tolist(), strict=True))
        dealt = [ids[k] for k in self.rng.permutation(len(ids))[: len(decided.ids)]]
        return replace(decided, ids=tuple(dealt), bins=np.array([known.get(i, -1) for i in dealt], dtype=np.int64))

    def observe(self, plan: Plan, rewards: ArrayLike | Observation) -> dict[str, Any]:
        """The planner's."""
        return self.planner.observe(plan, rewards)
