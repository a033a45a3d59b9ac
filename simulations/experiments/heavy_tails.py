"""Theorem 8: payoffs of infinite variance ruin an adversary that sees plain means, not one that sees robust means.

A round shows Hedge an estimate of each bin's mean payoff from 30 values; bin 1 is harder by 0.5. One value of a tail of
index a can outweigh t rounds with probability t^-a, which costs the plain mean a regret of order T^(2 - a).
"""

from __future__ import annotations

from math import log, sqrt

import numpy as np
from matplotlib.figure import Figure
from scipy import integrate, special

from gdro_core import Hedge, deviation_bound, median_of_means, truncated_mean
from gdro_llm.intervals import slope_interval
from simulations.harness import Row, Verdict, table

CLAIM = "With infinite variance robust bin means keep regret at √T and their deviation bounds; the plain mean does not"
SOURCE = "Theorem 8"
COLUMNS = {
    "seed": "independent repetition",
    "noise": "normal, or Pareto / Student-t of tail index 1.1 (infinite variance)",
    "estimator": "of a bin's mean payoff in a round",
    "measured": "regret | miss: share of errors beyond the bound at level delta | error: their quantile 1 - delta",
    "size": "horizon T (rounds) of a regret, delta (1) otherwise",
    "value": "regret or error (payoff), or share (1)",
}
SEEDS, BLOCK = 60, 60
INDEX, ORDER, LEVELS = 1.1, 1.05, (0.1, 0.01, 0.001)
NOISES, ESTIMATORS = ("normal", "pareto", "student"), ("mean", "median_of_means", "truncated_mean")
MEANS = np.array([0.0, 0.5, 0.0])


def _noise(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Mean 0."""
    if kind == "pareto":
        return np.asarray(rng.random(shape) ** (-1 / INDEX) - INDEX / (INDEX - 1)) / 2.0
    return rng.standard_t(INDEX, shape) if kind == "student" else rng.normal(size=shape)


def _moment(kind: str) -> float:
    """E|X|^r of the noise, r = 1.05."""
    if kind == "pareto":  # X = (e^{s/a} - m) / 2, s exponential; split where it changes sign
        m = INDEX / (INDEX - 1)
        zero = INDEX * log(m)
        low = integrate.quad(lambda s: (m - np.exp(s / INDEX)) ** ORDER * np.exp(-s), 0, zero)[0]
        high = integrate.quad(  # with y = s - zero: (m / 2)^r m^-a (e^{y/a} - 1)^r e^-y, tail e^{-(1 - r/a) y}
            lambda y: (1 - np.exp(-y / INDEX)) ** ORDER * np.exp(-(1 - ORDER / INDEX) * y), 0, np.inf, limit=200
        )[0]
        return float((low + m ** (ORDER - INDEX) * high) / 2.0**ORDER)
    if kind == "student":
        rest = special.gamma((INDEX - ORDER) / 2) / (sqrt(np.pi) * special.gamma(INDEX / 2))
        return float(INDEX ** (ORDER / 2) * special.gamma((ORDER + 1) / 2) * rest)
    return float(2 ** (ORDER / 2) * special.gamma((ORDER + 1) / 2) / sqrt(np.pi))


def _estimate(name: str, x: np.ndarray, moment: float, delta: float) -> np.ndarray:
    """Estimates along the last axis."""
    if name == "mean":
        return np.asarray(x.mean(axis=-1))
    return median_of_means(x, delta) if name == "median_of_means" else truncated_mean(x, moment, ORDER, delta)


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Games at several horizons, then errors of single estimates from 400 values at several levels."""
    rows: list[Row] = []
    for kind in NOISES:
        moment = _moment(kind)
        about_zero = 2 ** (ORDER - 1) * (moment + 0.5**ORDER)  # of the payoffs of bin 1
        for horizon in (10, 40) if quick else (200, 800, 3200):
            rng = np.random.default_rng([*seeds.tolist(), horizon])
            step = sqrt(8 * log(3) / horizon) / 2.0  # for estimates that span about 2
            policies = {name: Hedge(3, step, replicates=seeds.size) for name in ESTIMATORS}
            regret = {name: np.zeros(seeds.size) for name in ESTIMATORS}
            for _ in range(horizon):
                payoffs = MEANS[:, None] + _noise(kind, rng, (seeds.size, 3, 30))
                for name, policy in policies.items():
                    regret[name] += 0.5 - policy.probabilities @ MEANS
                    policy.update(-_estimate(name, payoffs, about_zero, 0.25))
            for name in ESTIMATORS:
                common = {"noise": kind, "estimator": name, "measured": "regret", "size": float(horizon)}
                for seed, value in zip(seeds, regret[name], strict=True):
                    rows.append({"seed": int(seed), **common, "value": float(value)})
        for seed in seeds:
            sample = _noise(kind, np.random.default_rng(seed), (20 if quick else 2000, 400))
            for name in ESTIMATORS:
                for delta in LEVELS:
                    error = np.abs(_estimate(name, sample, moment, delta))
                    bound = deviation_bound(name, 400, moment, delta, order=ORDER)
                    common = {"seed": int(seed), "noise": kind, "estimator": name, "size": delta}
                    rows.append({**common, "measured": "miss", "value": float((error > bound).mean())})
                    rows.append({**common, "measured": "error", "value": float(np.quantile(error, 1 - delta))})
    return rows


def judge(rows: list[Row]) -> Verdict:
    """Under infinite variance robust slopes <= 0.6 and plain > 0.75; no level missed by two standard errors."""
    holds, findings = True, []
    for kind in NOISES:
        for name in ESTIMATORS:
            regret = table(rows, "value", "size", noise=kind, estimator=name, measured="regret")
            middle, low, high = slope_interval(*regret)
            plain_fails = name == "mean" and kind != "normal"
            holds &= low > 0.75 if plain_fails else high <= 0.6
            findings.append(f"{kind} {name} {middle:.2f} [{low:.2f}, {high:.2f}]")
    worst = 0.0
    for kind in NOISES:
        for name in ESTIMATORS:
            delta, miss = table(rows, "value", "size", noise=kind, estimator=name, measured="miss")
            holds &= bool((miss.mean(axis=0) - 2 * miss.std(axis=0) / sqrt(len(miss)) <= delta).all())
            worst = max(worst, float((miss.mean(axis=0) / delta).max()))
    ratio = []
    for kind in NOISES[1:]:
        plain, robust = (
            table(rows, "value", "size", noise=kind, estimator=name, measured="error")[1][:, 0].mean()
            for name in ESTIMATORS[:2]
        )
        ratio.append(plain / robust)
    text = f"; misses at most {worst:.2f} delta; error at delta = 0.001 of the plain mean over median of means: "
    return Verdict(bool(holds), "slopes " + "; ".join(findings) + text + ", ".join(f"{r:.0f}" for r in ratio))


def draw(rows: list[Row]) -> Figure:
    """Regret against the horizon for each noise; errors against their level."""
    figure = Figure(figsize=(9.6, 3.2))
    axes = figure.subplots(1, 4)
    for axis in axes[1:3]:
        axis.sharey(axes[0])
    for axis, kind in zip(axes, NOISES, strict=False):
        for name in ESTIMATORS:
            x, value = table(rows, "value", "size", noise=kind, estimator=name, measured="regret")
            axis.errorbar(x, value.mean(axis=0), 1.96 * value.std(axis=0) / sqrt(len(value)),
                          marker="o", markersize=3, label=name.replace("_", " "))  # fmt: skip
        axis.set(title=kind, xlabel="horizon T [rounds]", xscale="log", yscale="log")
        axis.set_xticks(x, [f"{t:g}" for t in x])
        axis.minorticks_off()
    for name in ESTIMATORS:
        x, value = table(rows, "value", "size", noise="pareto", estimator=name, measured="error")
        axes[3].loglog(x, value.mean(axis=0), marker="o", markersize=3)
    axes[0].set_ylabel("regret [payoff]")
    axes[3].set(title="pareto: one estimate", xlabel="level δ", ylabel="error exceeded w.p. δ [payoff]")
    axes[3].invert_xaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
