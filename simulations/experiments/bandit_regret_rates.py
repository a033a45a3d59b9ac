"""Theorem 4: regret of the adversaries on offer grows like √T, and like ln T for Tsallis-INF when one bin is worst.

Losses in [0, 1] of K = 4 arms: coins (no arm is better), switching (arm 0 is best for a third of the time, then arm 1
overtakes it), chosen (the arm most likely to be played pays 1, which is the worst that an adversary who sees the past
can do next) and stochastic (one arm is better by 0.3 in mean). Regret is that of the
arms drawn against the best arm in hindsight.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gdro_core import (
    Exp3,
    Exp3IX,
    Exp3P,
    Hedge,
    TsallisINF,
    exp3_bound,
    exp3_ix_bound,
    exp3_p_bound,
    hedge_bound,
    tsallis_inf_bound,
)
from gdro_llm.intervals import percentile_interval, slope, slope_interval
from simulations.harness import Row, Verdict, table

CLAIM = "Regret grows like √T on adversarial losses and stays under its bounds; Tsallis-INF has ln T on stochastic ones"
SOURCE = "Theorem 4"
COLUMNS = {
    "seed": "independent repetition",
    "policy": "online learner over 4 arms",
    "losses": "how the losses arise",
    "horizon": "T (rounds)",
    "regret": "loss of the arms played (Hedge: of its mixture) minus that of the best arm (losses in [0, 1])",
    "bound": "what theorem 4 promises in mean, or with probability 0.95 (Exp3-IX, Exp3.P) (losses in [0, 1])",
}
SEEDS, BLOCK = 200, 200
ARMS, DELTA = 4, 0.05
LOSSES = ("coins", "switching", "chosen", "stochastic")
POLICIES: dict[str, Any] = {
    "Hedge": (Hedge.for_horizon, hedge_bound),
    "Exp3": (Exp3.for_horizon, exp3_bound),
    "Exp3-IX": (Exp3IX.for_horizon, lambda t, k: exp3_ix_bound(t, k, DELTA)),
    "Exp3.P": (lambda k, t, replicates: Exp3P.for_horizon(k, t, DELTA, replicates=replicates),
               lambda t, k: exp3_p_bound(t, k, DELTA)),
    "Tsallis-INF": (lambda k, t, replicates: TsallisINF(k, replicates=replicates), tsallis_inf_bound),
}  # fmt: skip


def _losses(kind: str, t: int, horizon: int, played: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(R, K) losses of round t against the mixtures `played`."""
    if kind == "coins":
        return rng.integers(0, 2, played.shape).astype(np.float64)
    if kind == "stochastic":
        return (rng.random(played.shape) < np.array([0.6, 0.6, 0.6, 0.3])).astype(np.float64)
    if kind == "chosen":
        return np.asarray(np.eye(ARMS)[played.argmax(axis=1)])
    return np.tile([0.0, 0.5, 0.5, 0.5] if 3 * t < horizon else [1.0, 0.0, 0.5, 0.5], (len(played), 1))


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """All repetitions of a block side by side."""
    rows, each = [], np.arange(seeds.size)
    for horizon, kind, name in product((20, 80, 320) if quick else (1000, 4000, 16000), LOSSES, POLICIES):
        rng = np.random.default_rng([*seeds.tolist(), horizon])
        make, bound = POLICIES[name]
        policy = make(ARMS, horizon, replicates=seeds.size)
        paid, total = np.zeros(seeds.size), np.zeros((seeds.size, ARMS))
        for t in range(horizon):
            losses = _losses(kind, t, horizon, policy.probabilities, rng)
            total += losses
            if isinstance(policy, Hedge):
                paid += (policy.probabilities * losses).sum(axis=1)
                policy.update(losses)
            else:
                arms = policy.sample(rng)
                paid += losses[each, arms]
                policy.update(arms, losses[each, arms])
        common = {"policy": name, "losses": kind, "horizon": horizon, "bound": bound(horizon, ARMS)}
        regret = paid - total.min(axis=1)
        rows += [{"seed": int(seed), **common, "regret": float(r)} for seed, r in zip(seeds, regret, strict=True)]
    return rows


def _broken(rows: list[Row]) -> list[str]:
    """Where a bound is exceeded: mean by two standard errors, or more than 5 % of the seeds (Exp3-IX, Exp3.P)."""
    broken = []
    for name, kind in product(POLICIES, LOSSES):
        if kind == "chosen" and name in ("Exp3", "Tsallis-INF"):
            continue  # their bounds are for losses fixed in advance
        x, regret = table(rows, "regret", policy=name, losses=kind)
        bound = table(rows, "bound", policy=name, losses=kind)[1][0]
        if name in ("Exp3-IX", "Exp3.P"):
            beyond = (regret > bound).mean(axis=0) > DELTA
        elif name == "Hedge":
            beyond = regret.max(axis=0) > bound + 1e-9  # on every sequence
        else:
            beyond = regret.mean(axis=0) - 2 * regret.std(axis=0) / np.sqrt(len(regret)) > bound
        broken += [f"{name} on {kind} at T = {t}" for t in x[beyond]]
    return broken


def _increments(rows: list[Row], name: str) -> tuple[float, float, float]:
    """Stochastic losses: last increment of mean regret over the first, and its 95 % bootstrap interval.

    Horizons grow by a factor 4, so it is 1 if regret is linear in ln T and 2 if it is linear in √T.
    """
    regret = table(rows, "regret", policy=name, losses="stochastic")[1]

    def growth(runs: np.ndarray) -> np.ndarray:
        """(..., seeds, T) regrets -> (...,) last increment of their mean over the first."""
        increments = np.diff(runs.mean(axis=-2))
        return np.asarray(increments[..., -1] / increments[..., 0])

    ends = percentile_interval(lambda rows: growth(regret[rows]), len(regret), resamples=500)
    return float(growth(regret)), *ends


def judge(rows: list[Row]) -> Verdict:
    """Slopes within 0.1 of 1/2 on coins (where no learner does better), at most 0.6 on the worst of the adversarial
    losses, and `_increments` nearer to those of ln T than to those of √T."""
    findings, holds = [], not _broken(rows)
    for name in POLICIES:
        horizons, coins = table(rows, "regret", policy=name, losses="coins")
        adversarial = np.stack([table(rows, "regret", policy=name, losses=kind)[1] for kind in LOSSES[:3]])
        worst = adversarial.mean(axis=1).max(axis=0)
        middle, low, high = slope_interval(horizons, coins)
        gap = slope_interval(horizons, table(rows, "regret", policy=name, losses="stochastic")[1])
        holds &= low <= 0.6 and high >= 0.4 and slope(horizons, worst) <= 0.6
        findings.append(
            f"{name} {middle:.2f} [{low:.2f}, {high:.2f}] on coins, {slope(horizons, worst):.2f} on the worst, "
            f"{gap[0]:.2f} [{gap[1]:.2f}, {gap[2]:.2f}] on stochastic"
        )
    grown = {name: _increments(rows, name) for name in ("Tsallis-INF", "Exp3")}
    holds &= grown["Tsallis-INF"][2] < np.sqrt(2.0)
    findings += [f"{name} last over first increment {a:.2f} [{b:.2f}, {c:.2f}]" for name, (a, b, c) in grown.items()]
    return Verdict(
        bool(holds), "slopes " + "; ".join(findings) + "; bounds exceeded: " + (", ".join(_broken(rows)) or "none")
    )


def draw(rows: list[Row]) -> Figure:
    """Mean regret as a share of its bound, by kind of losses: flat is √T, below 0 no single arm does as well."""
    figure = Figure(figsize=(9.6, 3.0))
    axes = figure.subplots(1, 4, sharey=True)
    for axis, kind in zip(axes, LOSSES, strict=True):
        for name in POLICIES:
            x, regret = table(rows, "regret", policy=name, losses=kind)
            share = regret / table(rows, "bound", policy=name, losses=kind)[1]
            error = 1.96 * share.std(axis=0) / np.sqrt(len(share))
            axis.errorbar(x, share.mean(axis=0), error, marker="o", markersize=3, label=name)
        axis.axhline(1.0, color="#555555", linewidth=0.8, linestyle=":")
        axis.set(title=kind, xlabel="horizon T [rounds]", xscale="log")
        axis.set_xticks(x, [f"{t:g}" for t in x])
        axis.minorticks_off()
    axes[0].set_ylabel("mean regret / its bound")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(POLICIES))
    return figure
