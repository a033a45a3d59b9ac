"""F4: the published adversary follows a moving hardest bin and never settles on a fixed one; Hedge does the reverse.

Six bins of equal share, 48 prompts a round with 4 rollouts each, error payoff. The hardest bin fails 0.8 of the time,
the others 0.5; it is the same for ever, or moves on to the next bin eight times. Regret is against the single best bin
in hindsight, tracking regret against the hardest bin of every round, both in true failure rates under the mixture q.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gdro_core import (
    Entropic,
    Exp3S,
    Hedge,
    NoRegret,
    PromptGDRO,
    PublishedPromptGDRO,
    best_in_hindsight,
    hedge_bound,
)
from gdro_llm.intervals import mean_interval, slope_interval
from simulations.harness import Row, Verdict, table

CLAIM = "The published EMA adversary has linear regret against a fixed bin and follows a moving one better than Hedge"
SOURCE = "F4, theorem 4"
COLUMNS = {
    "seed": "independent repetition",
    "adversary": "who mixes the bins",
    "bins": "stationary | moving hardest bin",
    "horizon": "T (rounds)",
    "regret": "failures missed against the best single bin (summed failure rate)",
    "tracking": "failures missed against the hardest bin of each round (summed failure rate)",
}
SEEDS, BLOCK = 10, 5
BINS, PROMPTS, ROLLOUTS, PHASES = 6, 48, 4, 8
ADVERSARIES = ("published EMA", "EMA, η = 20", "Hedge", "EXP3-IX", "EXP3.S")


def _adversary(name: str, horizon: int) -> Any:
    """Steps by theorem 4 where it has one."""
    if name == "EXP3.S":
        return Exp3S.for_horizon(BINS, horizon, PHASES - 1)
    if name == "published EMA":  # but for its payoff, which is blind (F1)
        return PublishedPromptGDRO(BINS, share_normalised=False)
    if name == "EMA, η = 20":
        return PromptGDRO(BINS, adversary=Entropic(20.0), uniform_reference=True)
    step = Hedge.for_horizon(BINS, horizon).step_size
    adversary = NoRegret(step, implicit_exploration=name == "EXP3-IX")
    return PromptGDRO(BINS, adversary=adversary, uniform_reference=True)


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """All adversaries see the same prompts."""
    rows: list[Row] = []
    for seed, kind, horizon in product(seeds, ("stationary", "moving"), (16, 64) if quick else (200, 800, 3200)):
        rng = np.random.default_rng([seed, horizon])
        hardest = (
            np.zeros(horizon, dtype=int) if kind == "stationary" else np.arange(horizon) * PHASES // horizon % BINS
        )
        failing = 0.5 + 0.3 * np.eye(BINS)[hardest]  # (T, B)
        adversaries = {name: _adversary(name, horizon) for name in ADVERSARIES}
        earned = dict.fromkeys(ADVERSARIES, 0.0)
        for t in range(horizon):
            bins = rng.integers(0, BINS, PROMPTS)
            errors = rng.binomial(ROLLOUTS, failing[t, bins]) / ROLLOUTS
            for name, adversary in adversaries.items():
                earned[name] += float(adversary.probabilities @ failing[t])
                if name == "EXP3.S":  # samples one bin and sees that alone
                    arm = adversary.sample(rng)
                    seen = errors[bins == arm]
                    adversary.update(arm, 1.0 - float(seen.mean()) if seen.size else 0.5)
                else:
                    adversary.observe(bins, errors)
        best, every = -best_in_hindsight(-failing), float(failing.max(axis=1).sum())
        for name, total in earned.items():
            regrets = {"regret": best - total, "tracking": every - total}
            rows.append({"seed": int(seed), "adversary": name, "bins": kind, "horizon": horizon, **regrets})
    return rows


def judge(rows: list[Row]) -> Verdict:
    """Stationary: slopes, and Hedge's bound. Moving: paired difference of tracking regret at the longest horizon."""
    holds, findings = True, []
    for name in ADVERSARIES[:4]:
        horizons, regret = table(rows, "regret", adversary=name, bins="stationary")
        middle, low, high = slope_interval(horizons, regret)
        findings.append(f"{name} {middle:.2f} [{low:.2f}, {high:.2f}]")
        if name == "published EMA":
            holds &= low > 0.9
        elif name in ("Hedge", "EXP3-IX"):
            holds &= high <= 0.6 and bool((regret.mean(axis=0) <= [hedge_bound(int(t), BINS) for t in horizons]).all())
    last = int(horizons[-1])
    tracking = {name: table(rows, "tracking", adversary=name, bins="moving")[1][:, -1] / last for name in ADVERSARIES}
    compared = {name: mean_interval(tracking[name] - tracking["Hedge"]) for name in ADVERSARIES if name != "Hedge"}
    holds &= compared["published EMA"][2] < 0
    text = (
        "; moving, tracking regret per round less Hedge's "
        + f"({tracking['Hedge'].mean():.3f}; uniform q: {0.3 * (1 - 1 / BINS):.3f}): "
    )
    text += ", ".join(f"{name} {m:+.3f} [{a:+.3f}, {b:+.3f}]" for name, (m, a, b) in compared.items())
    return Verdict(bool(holds), "stationary, slopes of regret " + ", ".join(findings) + text)


def draw(rows: list[Row]) -> Figure:
    """Regret per round against the horizon, both comparators."""
    figure = Figure(figsize=(7.6, 3.2))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, kind, value in zip(axes, ("stationary", "moving"), ("regret", "tracking"), strict=True):
        for name in ADVERSARIES:
            x, regret = table(rows, value, adversary=name, bins=kind)
            share = regret / x
            axis.errorbar(x, share.mean(axis=0), 1.96 * share.std(axis=0) / np.sqrt(len(share)),
                          marker="o", markersize=3, label=name)  # fmt: skip
        axis.axhline(0.3 * (1 - 1 / BINS), color="#555555", linewidth=0.8, linestyle=":", label="uniform q")
        axis.set(title=f"{kind} hardest bin", xlabel="horizon T [rounds]", xscale="log")
        axis.set_xticks(x, [f"{t:g}" for t in x])
        axis.minorticks_off()
    axes[0].set_ylabel("failures missed per round")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
