"""Do the games train a better policy than uniform GRPO at the same total of rollouts? In the calibrated population."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from gdro_core import GDROController, OnlineDifficultyClassifier, Planner, PromptGDRO, PublishedController, RolloutGDRO
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict
from simulations.population import SkillPopulation, train

CLAIM = (
    "At equal total rollouts joint play ends with a higher held-out pass@8 than uniform, "
    "with plain and with normalised steps"
)
SOURCE = "§3.2, §3.3, F5, F6, F7"
COLUMNS = {
    "seed": "population and run, the same for all controllers",
    "steps": "plain gradient steps, or normalised to one length",
    "transfer": "share of the kernel common to all prompts; .5 is the default, no data identify it",
    "controller": "planner of the run",
    "rollouts": "in all",
    "mean_at_8": "held-out mean pass rate after the last step",
    "pass_at_8": "held-out mean of 1 - (1 - p)^8 after the last step",
    "worst": "mean pass rate of the held-out group with the lowest, groups by starting difficulty",
}
SEEDS, BLOCK = 50, 5
BUDGET = 4
TRANSFERS = (0.5, 0.0, 0.9)  # other than the first: uniform and joint only
MEASURES = {"mean_at_8": "mean@8", "pass_at_8": "pass@8", "worst": "worst group"}


def _permuted(seed: int) -> GDROController:
    rollout = RolloutGDRO(BUDGET, 2, 12, permute=True)
    return GDROController(OnlineDifficultyClassifier(), None, rollout, seed=seed)


def _preserving(seed: int) -> GDROController:
    rollout = RolloutGDRO(BUDGET, 2, 12)
    return GDROController(OnlineDifficultyClassifier(), PromptGDRO(10), rollout, preserve_objective=True, seed=seed)


CONTROLLERS: dict[str, Callable[[int], Planner]] = {
    "uniform": lambda seed: GDROController.uniform(BUDGET, seed=seed),
    "null: counts permuted": _permuted,
    "published prompt": lambda seed: PublishedController(BUDGET, seed=seed),
    "published rollout": lambda seed: PublishedController(BUDGET, prompt=False, rollout=True, seed=seed),
    "prompt game alone": lambda seed: GDROController.joint_play(BUDGET, rollout=False, seed=seed),
    "rollout game alone": lambda seed: GDROController.joint_play(BUDGET, prompt=False, seed=seed),
    "joint play": lambda seed: GDROController.joint_play(BUDGET, seed=seed),
    "joint, objective preserved": _preserving,
}


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """200 steps at 2.5 times the calibrated learning rate: the way of 500 calibrated steps."""
    rows = []
    steps, prompts, batch = (20, 120, 24) if quick else (200, 600, 120)
    for seed in seeds.tolist():
        for transfer, normalised in ((t, n) for t in TRANSFERS for n in (False, True)):
            for name, controller in CONTROLLERS.items():
                if transfer != TRANSFERS[0] and name not in ("uniform", "joint play"):
                    continue
                rate = 0.0108 * 500 / steps
                population = SkillPopulation(
                    seed, prompts=prompts, learning_rate=rate, transfer=transfer, normalised=normalised
                )
                end = train(population, controller(seed), steps, batch, BUDGET, seed)[-1]
                kind = {"seed": seed, "steps": "normalised" if normalised else "plain", "transfer": transfer}
                rows.append(kind | {"controller": name} | {key: end[key] for key in ("rollouts", *MEASURES)})
    return rows


def _gain(rows: list[Row], steps: str, controller: str, measure: str, transfer: float = TRANSFERS[0]) -> np.ndarray:
    """(seeds,) measure minus uniform's, paired by seed."""

    def of(name: str) -> np.ndarray:
        wanted = (steps, transfer, name)
        return np.array([row[measure] for row in rows if (row["steps"], row["transfer"], row["controller"]) == wanted])

    return np.asarray(of(controller) - of("uniform"))


def judge(rows: list[Row]) -> Verdict:
    """Paired 95 % interval of pass@8, joint minus uniform, above 0 for both kinds of steps."""
    if len({row["rollouts"] for row in rows}) != 1:
        raise ValueError(f"runs must spend the same, got {sorted({row['rollouts'] for row in rows})} rollouts")
    holds, findings = True, []
    for steps in ("plain", "normalised"):
        for controller in ("joint play", "prompt game alone", "rollout game alone"):
            mean, low, high = mean_interval(_gain(rows, steps, controller, "pass_at_8"))
            findings.append(f"{controller} {mean:+.4f} [{low:+.4f}, {high:+.4f}] with {steps} steps")
            holds &= low > 0 or controller != "joint play"
        for transfer in TRANSFERS[1:]:
            mean, low, high = mean_interval(_gain(rows, steps, "joint play", "pass_at_8", transfer))
            findings.append(f"joint {mean:+.4f} [{low:+.4f}, {high:+.4f}] with {steps} steps at transfer {transfer:g}")
    return Verdict(holds, "pass@8 minus uniform's: " + "; ".join(findings))


def draw(rows: list[Row]) -> Figure:
    """Δ: paired difference to uniform, with its 95 % interval."""
    figure = Figure(figsize=(7.6, 3.6))
    others = [(name, TRANSFERS[0]) for name in CONTROLLERS if name != "uniform"]
    others = [*others, *(("joint play", transfer) for transfer in TRANSFERS[1:])][::-1]
    labels = [name if transfer == TRANSFERS[0] else f"{name}, transfer {transfer:g}" for name, transfer in others]
    for axis, (measure, label) in zip(figure.subplots(1, 3, sharey=True), MEASURES.items(), strict=True):
        for shift, steps in ((0.12, "plain"), (-0.12, "normalised")):
            intervals = np.array(
                [mean_interval(_gain(rows, steps, name, measure, transfer)) for name, transfer in others]
            )
            error = np.abs(intervals[:, 1:] - intervals[:, :1]).T
            axis.errorbar(
                intervals[:, 0],
                np.arange(len(others)) + shift,
                xerr=error,
                fmt="o",
                markersize=4,
                label=f"{steps} steps",
            )
        axis.axvline(0.0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(others)), labels)
        axis.set(xlabel=f"Δ {label}")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure
