"""Who plans: the controllers of `gdro_core`, and the peers and control experiments that `gdro compare` brings.

All are controllers, so that the trainer treats them alike. What they do is a plan for the batch; none draws from
anything but (seed, step).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gdro_core import GDROController, Plan, gradient_weight
from gdro_llm.config import Config, UsageError

CANDIDATES = 4  # prompts that "mopps" chooses each of its own from


class Shuffled(GDROController):
    """The zero-information null of both games (F5): the plan's (weight, count) pairs, dealt to the prompts at random.

    Weights and counts have the law of the real plan and say nothing of the prompt that gets them.
    """

    def plan(self, ids: Sequence[Hashable]) -> Plan:
        """See `GDROController.plan`."""
        plan = super().plan(ids)
        order = np.random.default_rng([self.seed, plan.step, 1]).permutation(len(plan.ids))
        return replace(plan, weights=plan.weights[order], counts=plan.counts[order])


class AsWeights(GDROController):
    """n_bar rollouts each, with the weights that the planned counts would imply (F6).

    These are n w_n(p) / (n_bar w_nbar(p)), without n / n_bar where `aggregation` is "prompt". Separates what rollouts
    do as weights from what they do to the variance: compare with the same controller, which has both, and with
    `preserve_objective`, which has the second only.
    """

    aggregation = "rollout"

    def plan(self, ids: Sequence[Hashable]) -> Plan:
        """See `GDROController.plan`."""
        plan = super().plan(ids)
        mean = len(plan.owner) // len(plan.ids)
        p = self.classifier.pass_rate(plan.ids)
        weights = plan.weights * gradient_weight(plan.counts, p) / gradient_weight(mean, p)
        if self.aggregation == "rollout":
            weights = weights * plan.counts / mean
        counts = np.full(len(plan.ids), mean)
        return replace(plan, weights=weights / weights.mean(), counts=counts)


class MoPPS(GDROController):
    """MoPPS (arXiv 2507.04632): draw p ~ Beta(a, b) for four candidates a prompt, train on those nearest to 1/2.

    `plan` gets the candidates and plans for a quarter of them.
    """

    def plan(self, ids: Sequence[Hashable]) -> Plan:
        """See `GDROController.plan`; the ids of the plan are some of `ids`."""
        a, b = self.classifier.posterior(ids)
        draws = np.random.default_rng([self.seed, self._step, 1]).beta(a, b)
        nearest = np.sort(np.argsort(np.abs(draws - 0.5), kind="stable")[: max(1, len(ids) // CANDIDATES)])
        return super().plan([ids[i] for i in nearest])


def build_controller(config: Config) -> GDROController:
    """The planner that `config.controller` names."""
    family, _, game = config.controller.partition("-")
    common: dict[str, Any] = {"num_bins": config.num_bins, "seed": config.seed}
    if family == "grpo":
        return GDROController.uniform(config.mean_rollouts, **common)
    if family == "mopps":
        return MoPPS.uniform(config.mean_rollouts, **common)
    kind, options = GDROController, {}
    if family != "published":
        kind = {"null": Shuffled, "implicit": AsWeights}.get(family, GDROController)
        family = "recommended"
        options = {
            "adversary": config.adversary,
            "step_size": config.adversary_step,
            "utility": config.utility,
            "preserve_objective": config.preserve_objective,
        }
    try:
        controller = getattr(kind, family)(
            config.mean_rollouts,
            config.min_rollouts,
            config.max_rollouts,
            prompt=game != "rollout",
            rollout=game != "prompt",
            **common,
            **options,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if isinstance(controller, AsWeights):
        controller.aggregation = config.aggregation
    return controller
