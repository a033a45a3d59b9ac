"""A verifier that errs changes what the games believe to be hard: where do weights and rollouts go then?"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gdro_core import GDROController
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict
from simulations.population import SkillPopulation, train

CLAIM = (
    "10 % false positives draw the rollout game's budget towards unsolvable prompts and the prompt game's weight "
    "away from them; 10 % false negatives draw both towards solved ones"
)
SOURCE = "§3.2, §3.3, F2"
COLUMNS = {
    "seed": "population and run, the same for all controllers and errors",
    "error": "positives: wrong answers graded right; negatives: right answers graded wrong",
    "rate": "probability of the error; at 0 both kinds are the same run",
    "controller": "uniform, or the prompt or the rollout game of joint play alone",
    "unsolvable_rollouts": "rollouts of prompts with true pass rate < .02 at the start, relative to the mean prompt's",
    "unsolvable_weight": "their weights, relative to the mean prompt's",
    "solved_rollouts": "rollouts of prompts with true pass rate > .95 at the start, relative to the mean prompt's",
    "solved_weight": "their weights, relative to the mean prompt's",
    "mean_at_8": "held-out mean pass rate at the end, by a verifier without errors",
    "pass_at_8": "held-out pass@8 at the end, by a verifier without errors",
    "worst": "mean pass rate of the worst held-out group at the end, by a verifier without errors",
}
SEEDS, BLOCK = 40, 5
BUDGET, RATES = 4, (0.0, 0.05, 0.1, 0.2)
GAMES = {"uniform": (False, False), "prompt game": (True, False), "rollout game": (False, True)}


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Normalised steps, 200 of them at 2.5 times the calibrated learning rate; shares over the second half."""
    rows = []
    steps, prompts, batch = (20, 120, 24) if quick else (200, 600, 120)
    for seed in seeds.tolist():
        for error, rate in ((error, rate) for error in ("positives", "negatives") for rate in RATES):
            for name, (prompt, rollout) in GAMES.items():
                population = SkillPopulation(
                    seed,
                    prompts=prompts,
                    learning_rate=0.0108 * 500 / steps,
                    normalised=True,
                    false_positive=rate if error == "positives" else 0.0,
                    false_negative=rate if error == "negatives" else 0.0,
                )
                start = population.pass_rate
                if prompt or rollout:
                    controller = GDROController.joint_play(BUDGET, prompt=prompt, rollout=rollout, seed=seed)
                else:
                    controller = GDROController.uniform(BUDGET, seed=seed)
                run = train(population, controller, steps, batch, BUDGET, seed)
                later = [step["plan"] for step in run[steps // 2 :]]
                ids = np.concatenate([plan.ids for plan in later])
                row = {"seed": seed, "error": error, "rate": rate, "controller": name}
                for kind, selected in (("unsolvable", start[ids] < 0.02), ("solved", start[ids] > 0.95)):
                    for what, field in (("rollouts", "counts"), ("weight", "weights")):
                        amount = np.concatenate([getattr(plan, field) for plan in later])
                        row[f"{kind}_{what}"] = float(amount[selected].mean() / amount.mean())
                rows.append(row | {key: run[-1][key] for key in ("mean_at_8", "pass_at_8", "worst")})
    return rows


def _values(rows: list[Row], error: str, rate: float, controller: str, measure: str) -> np.ndarray:
    wanted = (error, rate, controller)
    return np.array([row[measure] for row in rows if (row["error"], row["rate"], row["controller"]) == wanted])


def judge(rows: list[Row]) -> Verdict:
    """Paired by seed: 10 % errors minus none, for the four shares of the claim; and what the games gain at 10 %."""
    holds, findings = True, []
    for error, controller, measure, sign in (
        ("positives", "rollout game", "unsolvable_rollouts", 1),
        ("positives", "prompt game", "unsolvable_weight", -1),
        ("negatives", "rollout game", "solved_rollouts", 1),
        ("negatives", "prompt game", "solved_weight", 1),
    ):
        before, after = (_values(rows, error, rate, controller, measure) for rate in (0.0, 0.1))
        _, low, high = mean_interval(after - before)
        holds &= low > 0 if sign > 0 else high < 0
        findings.append(f"{measure.replace('_', ' ')} x{before.mean():.2f} -> x{after.mean():.2f} with {error}")
    for error, rate in (("positives", 0.0), ("positives", 0.1), ("negatives", 0.1)):
        for controller in ("prompt game", "rollout game"):
            gain = _values(rows, error, rate, controller, "pass_at_8") - _values(
                rows, error, rate, "uniform", "pass_at_8"
            )
            mean, low, high = mean_interval(gain)
            findings.append(
                f"{controller} {mean:+.4f} [{low:+.4f}, {high:+.4f}] pass@8 on uniform at {rate:.0%} {error}"
            )
    return Verdict(bool(holds), "; ".join(findings))


def draw(rows: list[Row]) -> Figure:
    """Where weights and rollouts go, and what is learnt, against the rate of errors."""
    figure = Figure(figsize=(7.8, 4.8))
    axes = figure.subplots(2, 3, sharex=True)
    for line, error in zip(axes, ("positives", "negatives"), strict=True):
        for axis, kind in zip(line, ("unsolvable", "solved"), strict=False):
            for controller, what in (("prompt game", "weight"), ("rollout game", "rollouts")):
                means = [_values(rows, error, rate, controller, f"{kind}_{what}").mean() for rate in RATES]
                axis.plot(RATES, means, "o-", markersize=4, label=f"{controller}: {what}")
            axis.axhline(1.0, color="black", linewidth=0.8)
            axis.set(title=f"On {kind} prompts", ylabel=f"false {error}\n/ mean prompt" if kind == "unsolvable" else "")
        for controller, colour in (("uniform", "C6"), ("prompt game", "C0"), ("rollout game", "C1")):
            means = [_values(rows, error, rate, controller, "pass_at_8").mean() for rate in RATES]
            line[2].plot(RATES, means, "o-", markersize=4, color=colour, label=controller)
        line[2].set(title="Held-out pass@8, end")
    for axis in axes[1]:
        axis.set(xlabel="probability of the error")
    axes[0, 0].legend()
    axes[0, 2].legend()
    return figure
