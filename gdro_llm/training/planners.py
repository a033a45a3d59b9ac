"""Planners: the controllers of `gdro_core`, and the peers and control experiments that `gdro compare` brings.

All are `gdro_core.Planner`s, which the trainer treats in the same way. Each plans a batch; random draws depend on
(seed, step) only. The texts of the configuration become objects here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gdro_core import (
    UTILITIES,
    Adversary,
    ChiSquare,
    CVaR,
    Entropic,
    GDROController,
    LearntPrior,
    Plan,
    PublishedController,
    TokenBudget,
    gradient_weight,
    nearest_to_half,
)
from gdro_llm.config import JOINT_STEP, RECOMMENDED_STEP, Config, UsageError

MOPPS_CANDIDATES = 4  # prompts that "mopps" chooses each of its own from


class PermutedPlan(GDROController):
    """The zero-information null of both games (F5): the plan's (weight, count) pairs, assigned to random prompts.

    Weights and counts are distributed as in the real plan, and do not depend on the prompt that gets them.
    """

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """See `GDROController.plan`."""
        plan = super().plan(ids, budget=budget)
        order = np.random.default_rng([self.seed, plan.step, 1]).permutation(len(plan.ids))
        return replace(plan, weights=plan.weights[order], counts=plan.counts[order])


class ImpliedWeights(GDROController):
    """n_bar rollouts each, with the weights that the planned counts would imply (F6).

    These are n w_n(p) / (n_bar w_nbar(p)), without n / n_bar where the loss is averaged over prompts first
    (`mean_over_rollouts` False). Separates what rollouts do as weights from what they do to the variance: compare with
    the same controller, which has both, and with `preserve_objective`, which has the second only.
    """

    mean_over_rollouts = True

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """See `GDROController.plan`."""
        plan = super().plan(ids, budget=budget)
        mean = len(plan.owner) // len(plan.ids)
        p = self.classifier.pass_rate(plan.ids)
        weights = plan.weights * gradient_weight(plan.counts, p) / gradient_weight(mean, p)
        if self.mean_over_rollouts:
            weights = weights * plan.counts / mean
        counts = np.full(len(plan.ids), mean)
        return replace(plan, weights=weights / weights.mean(), counts=counts)


class MoPPS(GDROController):
    """MoPPS (arXiv 2507.04632): train on those of the candidates that `nearest_to_half` draws."""

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """See `GDROController.plan`; the ids of the plan are some of `ids`."""
        rng = np.random.default_rng([self.seed, self._step, 1])
        size = len(ids) if budget is None else int(budget / self.mean_rollouts)
        chosen = nearest_to_half(*self.classifier.posterior(ids), size, rng)
        return super().plan([ids[i] for i in np.sort(chosen)])


def candidates_of(config: Config) -> int:
    """Prompts offered to the controller for each one of the batch, where the data has so many."""
    if config.controller == "mopps":
        return MOPPS_CANDIDATES
    return config.candidates if config.controller in ("recommended", "null") and not config.min_rollouts else 1


def adversary_of(config: Config, step: float) -> Adversary:
    """The adversary that `config.adversary` names, with its dial; `step` is the entropic one's if none is set."""
    adversaries = {
        "entropic": Entropic(config.adversary_step or step),
        "cvar": CVaR(config.cvar_alpha),
        "chi-square": ChiSquare(config.chi_square_rho),
    }
    return adversaries[config.adversary]


def build_controller(config: Config) -> GDROController | PublishedController:
    """The planner that `config.controller` names."""
    family, _, game = config.controller.partition("-")
    shared: dict[str, Any] = {"num_bins": config.num_bins, "seed": config.seed}
    if family in ("grpo", "mopps"):
        kind = {"grpo": GDROController, "mopps": MoPPS}[family]
        return kind.uniform(config.mean_rollouts, **shared)
    prompt, rollout = game != "rollout", game != "prompt"
    mean, low, high = config.mean_rollouts, config.min_rollouts, config.max_rollouts
    try:
        if family == "published":
            return PublishedController(mean, low or 2, high, prompt=prompt, rollout=rollout, **shared)
        if family in ("recommended", "null"):
            own = {"recommended": GDROController, "null": PermutedPlan}[family]
            return own.recommended(
                mean,
                low,
                high,
                adversary=adversary_of(config, RECOMMENDED_STEP),
                kappa=config.kappa,
                error=config.verifier_error,
                prior=LearntPrior() if config.learnt_prior else (0.5, 0.5),
                pilot=config.pilot,
                tokens=TokenBudget(config.num_bins) if config.budget == "tokens" else None,
                **shared,
            )
        kinds = {"joint": GDROController, "implicit": ImpliedWeights}
        controller = (PermutedPlan if game == "null" else kinds[family]).joint_play(
            mean,
            low or 2,
            high,
            prompt=prompt,
            rollout=rollout,
            adversary=adversary_of(config, JOINT_STEP),
            utility=UTILITIES[config.utility],
            preserve_objective=config.preserve_objective,
            **shared,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if isinstance(controller, ImpliedWeights):
        controller.mean_over_rollouts = config.aggregation == "rollout"
    return controller
