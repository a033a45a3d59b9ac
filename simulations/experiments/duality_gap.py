"""Theorem 5: averaged play of a convex group-DRO game approaches its saddle point at the rate 1/√T.

Three groups with L_i(θ) = (1 - <θ, v_i>) / 2 over the unit disc, v_i sampled as u_i or -u_i with mean 0.8 u_i. The
saddle point is known: θ* points at the middle of v_0 and v_1, q* = (1/2, 1/2, 0), the value is (1 - |v_0 + v_1|/2) / 2.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from matplotlib.figure import Figure

from gdro_core import (
    Exp3IX,
    Hedge,
    duality_gap,
    duality_gap_bound,
    gdro_full_information_bound,
    gdro_one_sample_bound,
)
from gdro_llm.intervals import slope_interval
from simulations.harness import Row, Verdict, table

CLAIM = "The duality gap of averaged play falls like 1/√T and stays under its bounds, with all groups sampled or one"
SOURCE = "Theorem 5, Eq. 27"
COLUMNS = {
    "seed": "independent repetition",
    "play": "full: a sample of every group a round, Hedge | one: of one group, drawn by Exp3-IX",
    "horizon": "T (rounds)",
    "gap": "max_i L_i(θ̄) - min_θ Σ q̄ L(θ) (loss)",
    "regrets": "Eq. 27: (regret of the learner + regret of the adversary) / T (loss)",
    "bound": "on the expected gap, theorem 5 (loss)",
    "excess": "worst group loss of θ̄ minus the value of the game (loss)",
    "distance": "largest |q̄_i - q*_i| (1)",
}
SEEDS, BLOCK = 100, 50
ANGLES = np.deg2rad([0.0, 150.0, 60.0])
UNITS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
MEANS, SADDLE = 0.8 * UNITS, np.array([0.5, 0.5, 0.0])
VALUE = (1 - np.linalg.norm(SADDLE @ MEANS)) / 2
DIAMETER, GRADIENT = 2.0, 0.5
BOUNDS = {"full": gdro_full_information_bound, "one": gdro_one_sample_bound}


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Projected gradient descent against Hedge or Exp3-IX, all repetitions of a block side by side."""
    rows: list[Row] = []
    size, each = seeds.size, np.arange(seeds.size)
    for play in BOUNDS:
        for horizon in (30, 120) if quick else (500, 2000, 8000, 32000):
            rng = np.random.default_rng([*seeds.tolist(), horizon])
            theta, thetas, mixtures = np.zeros((size, 2)), np.zeros((size, 2)), np.zeros((size, 3))
            paid = np.zeros(size)
            adversary = (Exp3IX if play == "one" else Hedge).for_horizon(3, horizon, replicates=size)
            for _ in range(horizon):
                q = adversary.probabilities
                thetas += theta
                mixtures += q
                paid += (q * (1 - theta @ MEANS.T) / 2).sum(axis=1)
                v = np.where(rng.random((size, 3, 1)) < 0.9, 1.0, -1.0) * UNITS
                losses = (1 - (v * theta[:, None, :]).sum(axis=2)) / 2
                if isinstance(adversary, Hedge):
                    gradient = -(q[:, :, None] * v).sum(axis=1) / 2
                    adversary.update(-losses)
                else:
                    group = np.asarray(adversary.sample(rng))
                    gradient = -v[each, group] / 2
                    adversary.update(group, 1 - losses[each, group])
                theta = theta - DIAMETER / (GRADIENT * sqrt(horizon)) * gradient
                theta /= np.maximum(np.linalg.norm(theta, axis=1, keepdims=True), 1.0)
            worst = ((1 - thetas / horizon @ MEANS.T) / 2).max(axis=1)
            best = (1 - np.linalg.norm(mixtures / horizon @ MEANS, axis=1)) / 2
            bound = BOUNDS[play](horizon, 3, DIAMETER, GRADIENT)
            distance = np.abs(mixtures / horizon - SADDLE).max(axis=1)
            for i, seed in enumerate(seeds):
                regrets = float(paid[i] - horizon * best[i]), float(horizon * worst[i] - paid[i])
                measured = {
                    "gap": duality_gap(float(worst[i]), float(best[i])),
                    "regrets": duality_gap_bound(*regrets, horizon),
                    "bound": bound,
                    "excess": float(worst[i] - VALUE),
                    "distance": float(distance[i]),
                }
                rows.append({"seed": int(seed), "play": play, "horizon": horizon, **measured})
    return rows


def judge(rows: list[Row]) -> Verdict:
    """Slope interval meets [-0.6, -0.4], mean gap plus two standard errors under its bound, Eq. 27 on every run."""
    holds, findings = True, []
    every = all(row["gap"] <= row["regrets"] + 1e-12 and -1e-12 <= row["excess"] <= row["gap"] + 1e-12 for row in rows)
    for play in BOUNDS:
        horizons, gap = table(rows, "gap", play=play)
        middle, low, high = slope_interval(horizons, gap)
        limit = table(rows, "bound", play=play)[1][0]
        under = gap.mean(axis=0) + 2 * gap.std(axis=0) / sqrt(len(gap)) <= limit
        holds &= low <= -0.4 and high >= -0.6 and bool(under.all())
        distance = table(rows, "distance", play=play)[1][:, -1].mean()
        findings.append(
            f"{play}: slope {middle:.3f} [{low:.3f}, {high:.3f}], gap {gap[:, -1].mean():.4f} of a bound"
            f" {limit[-1]:.4f} at T = {horizons[-1]}, mixture within {distance:.3f} of the saddle point"
        )
    findings.append("Eq. 27 " + ("holds on every run" if every else "FAILS on a run"))
    return Verdict(bool(holds and every), "; ".join(findings))


def draw(rows: list[Row]) -> Figure:
    """Gap against the horizon with bounds, and the averaged mixture's distance from the saddle point."""
    figure = Figure(figsize=(7.6, 3.2))
    left, right = figure.subplots(1, 2)
    for play, label in (("full", "all groups sampled (Hedge)"), ("one", "one group sampled (Exp3-IX)")):
        horizons, gap = table(rows, "gap", play=play)
        (line,) = left.loglog(horizons, gap.mean(axis=0), marker="o", markersize=3, label=label)
        left.fill_between(horizons, *np.quantile(gap, [0.1, 0.9], axis=0), alpha=0.15, color=line.get_color())
        left.loglog(horizons, table(rows, "bound", play=play)[1][0], linestyle=":", color=line.get_color())
        distance = table(rows, "distance", play=play)[1]
        right.loglog(horizons, distance.mean(axis=0), marker="o", markersize=3)
        right.fill_between(horizons, *np.quantile(distance, [0.1, 0.9], axis=0), alpha=0.15, color=line.get_color())
    left.set(xlabel="horizon T [rounds]", ylabel="duality gap [loss]", title="gap (dotted: its bound; band: 10-90 %)")
    right.set(xlabel="horizon T [rounds]", ylabel="largest |q̄ − q*|", title="averaged mixture")
    left.legend(loc="lower left")
    return figure
