"""F6: should a prompt that gets more rollouts also count more in the update? In the calibrated population."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from gdro_core import GDROController, Observation, Plan
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict
from simulations.population import SkillPopulation, train

CLAIM = (
    "Joint play ends with a higher held-out pass@8 where a prompt counts by its rollouts (mean "
    "over rollouts) than where they are averaged first (mean over prompts), with plain and with normalised steps"
)
SOURCE = "F6, Eq. 7"
COLUMNS = {
    "seed": "population and run, the same for all",
    "steps": "plain gradient steps, or normalised to one length",
    "controller": "planner of the run",
    "aggregation": "what the update averages over: rollouts, or prompts as Eq. 7 (the same for uniform)",
    "rollouts": "in all",
    "mean_at_8": "held-out mean pass rate after the last step",
    "pass_at_8": "held-out mean of 1 - (1 - p)^8 after the last step",
}
SEEDS, BLOCK = 20, 2
BUDGET = 4
MEASURES = {"mean_at_8": "mean@8", "pass_at_8": "pass@8"}
GAMES = ("joint", "rollout game")
WAYS = (("uniform", "prompts"), *((game, way) for game in GAMES for way in ("prompts", "rollouts")))


class Counting:
    """A controller in an update that averages over rollouts: a prompt's weight is multiplied by its rollouts."""

    def __init__(self, controller: GDROController) -> None:
        self.controller = controller

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """The controller's, weights times n / n_bar."""
        self.decided = self.controller.plan(ids)
        weights = self.decided.weights * self.decided.counts / self.decided.counts.mean()
        return replace(self.decided, weights=weights)

    def observe(self, plan: Plan, rewards: ArrayLike | Observation) -> dict[str, Any]:
        """The controller's."""
        return self.controller.observe(self.decided, rewards)


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """200 steps at 2.5 times the calibrated learning rate, as `controllers_on_population`."""
    rows = []
    steps, prompts, batch = (20, 120, 24) if quick else (200, 600, 120)
    for seed in seeds.tolist():
        for normalised in (False, True):
            for game, way in WAYS:
                controller = GDROController.uniform(BUDGET, seed=seed)
                if game in GAMES:
                    controller = GDROController.joint_play(BUDGET, prompt=game == "joint", seed=seed)
                population = SkillPopulation(
                    seed, prompts=prompts, learning_rate=0.0108 * 500 / steps, normalised=normalised
                )
                end = train(
                    population, Counting(controller) if way == "rollouts" else controller, steps, batch, BUDGET, seed
                )[-1]
                kind = {"seed": seed, "steps": "normalised" if normalised else "plain"}
                kind |= {"controller": game, "aggregation": way}
                rows.append(kind | {key: end[key] for key in ("rollouts", *MEASURES)})
    return rows


def _of(rows: list[Row], steps: str, controller: str, aggregation: str, measure: str) -> np.ndarray:
    """(seeds,) of a measure."""
    wanted = (steps, controller, aggregation)
    return np.array([row[measure] for row in rows if (row["steps"], row["controller"], row["aggregation"]) == wanted])


def judge(rows: list[Row]) -> Verdict:
    """Paired 95 % interval of pass@8, rollouts minus prompts, above 0 for both kinds of steps."""
    if len({row["rollouts"] for row in rows}) != 1:
        raise ValueError(f"runs must spend the same, got {sorted({row['rollouts'] for row in rows})} rollouts")
    holds, findings = True, []
    for steps in ("plain", "normalised"):
        for game in GAMES:
            by = {way: _of(rows, steps, game, way, "pass_at_8") for way in ("rollouts", "prompts")}
            mean, low, high = mean_interval(by["rollouts"] - by["prompts"])
            holds &= low > 0 or game != "joint"
            findings.append(f"{game}, {steps} steps: {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
            mean, low, high = mean_interval(by["rollouts"] - _of(rows, steps, "uniform", "prompts", "pass_at_8"))
            findings.append(f"{game}, {steps} steps, over uniform: {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    return Verdict(holds, "pass@8 of rollouts minus of prompts: " + "; ".join(findings))


def draw(rows: list[Row]) -> Figure:
    """Differences to uniform of both ways, with 95 % intervals."""
    figure = Figure(figsize=(7.6, 2.8))
    places = [(game, steps) for steps in ("plain", "normalised") for game in GAMES][::-1]
    for axis, (measure, label) in zip(figure.subplots(1, 2, sharey=True), MEASURES.items(), strict=True):
        for shift, way in ((0.12, "prompts"), (-0.12, "rollouts")):
            intervals = np.array(
                [
                    mean_interval(
                        _of(rows, steps, game, way, measure) - _of(rows, steps, "uniform", "prompts", measure)
                    )
                    for game, steps in places
                ]
            )
            error = np.abs(intervals[:, 1:] - intervals[:, :1]).T
            axis.errorbar(
                intervals[:, 0],
                np.arange(len(places)) + shift,
                xerr=error,
                fmt="o",
                markersize=4,
                label=f"mean over {way}",
            )
        axis.axvline(0.0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(places)), [f"{game}, {steps} steps" for game, steps in places])
        axis.set(xlabel=f"Δ {label} from uniform")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure
