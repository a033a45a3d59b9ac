"""Theorem 6: allocations under an exact budget drawn from their exact Gibbs law, and what playing them costs.

The claim was first stated with a slope of at most 1/2 for the bandit too; up to T = 3000 its slope is about 0.6, as its
learning rate has then hardly told the paths apart. The theorem is the bound; the bandit's slopes are reported.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from matplotlib.figure import Figure

from gdro_core import allocation_marginals, path_learning_rate, path_regret_bound, sample_budget_allocation
from simulations.harness import Row, Verdict, paired, slope

CLAIM = "Exact path play has the enumerated marginals and regret under its bound, with full feedback no faster than √T"
SOURCE = "Theorem 6"
COLUMNS = {
    "seed": "bin sizes, budget and losses",
    "part": "marginals: one random instance; regret: one game",
    "feedback": "regret: full or bandit; empty for marginals",
    "horizon": "T [rounds]; empty for marginals",
    "measured": "marginals: greatest |exact - enumerated| (1); regret: against the best fixed allocation [loss]",
    "limit": "marginals: the same for 4000 samples, at most about 4 / sqrt(4000) (1); regret: path_regret_bound [loss]",
}
SEEDS, BLOCK = 20, 5
BINS, ARMS, LOW = 4, 4, 2
HORIZONS = (100, 300, 1000, 3000, 10000)
OPTIONS = np.array(list(product(range(ARMS), repeat=BINS)))  # (A^B, B) arms


def _instance(seed: int) -> tuple[np.ndarray, int, np.ndarray]:
    """Sizes 1..5, a feasible budget with at least 10 paths, and the (paths, B) arms that meet it."""
    rng = np.random.default_rng(seed)
    while True:
        size = rng.integers(1, 6, BINS)
        spent = (OPTIONS + LOW) @ size
        budget = int(rng.choice(spent))
        if (spent == budget).sum() >= 10:
            return size, budget, OPTIONS[spent == budget]


def _marginal_errors(seed: int) -> tuple[float, float]:
    """Of the exact marginals and of 4000 samples, against enumeration."""
    rng = np.random.default_rng([seed, 1])
    size, budget, paths = _instance(seed)
    logits = rng.normal(0.0, 2.0, (BINS, ARMS))
    weight = np.exp(logits[np.arange(BINS), paths].sum(axis=1))
    weight /= weight.sum()
    truth = np.array([np.bincount(paths[:, b], weight, minlength=ARMS) for b in range(BINS)])
    draws, exact = sample_budget_allocation(logits, size, budget, min_rollouts=LOW, rng=rng, samples=4000)
    drawn = np.array([np.bincount(draws[:, b] - LOW, minlength=ARMS) / len(draws) for b in range(BINS)])
    return float(np.abs(exact - truth).max()), float(np.abs(drawn - truth).max())


def _regret(feedback: str, seed: int, horizon: int) -> float:
    """Losses 0 or 1 whose rates drift; the comparator is the best fixed allocation of these very losses."""
    rng = np.random.default_rng([seed, horizon, feedback == "full"])
    size, budget, paths = _instance(seed)
    rate = path_learning_rate(horizon, BINS, ARMS, feedback=feedback)
    base, wave = rng.random((BINS, ARMS)), rng.random((BINS, ARMS))
    summed, suffered, estimate = np.zeros((BINS, ARMS)), 0.0, np.zeros((BINS, ARMS))
    rows = np.arange(BINS)
    for t in range(horizon):
        chance = np.clip(base + 0.3 * np.sin(2 * np.pi * (3 * t / horizon + wave)), 0.0, 1.0)
        loss = (rng.random((BINS, ARMS)) < chance).astype(float)
        if feedback == "full":
            law = allocation_marginals(-rate * summed, size, budget, min_rollouts=LOW)
            suffered += float((law * loss).sum())
        else:
            counts, law = sample_budget_allocation(-rate * estimate, size, budget, min_rollouts=LOW, rng=rng)
            played = counts - LOW
            suffered += float(loss[rows, played].sum())
            estimate[rows, played] += loss[rows, played] / law[rows, played]
        summed += loss
    return suffered - float(summed[rows, paths].sum(axis=1).min())


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """One enumeration and a game per feedback and horizon."""
    rows: list[Row] = []
    for seed in map(int, seeds):
        exact, drawn = _marginal_errors(seed)
        rows.append(
            {"seed": seed, "part": "marginals", "feedback": "", "horizon": "", "measured": exact, "limit": drawn}
        )
        for feedback in ("full", "bandit"):
            for horizon in (30, 90) if quick else HORIZONS:
                row: Row = {"seed": seed, "part": "regret", "feedback": feedback, "horizon": horizon}
                bound = path_regret_bound(horizon, BINS, ARMS, feedback=feedback)
                rows.append(row | {"measured": _regret(feedback, seed, horizon), "limit": bound})
    return rows


def _games(rows: list[Row], feedback: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Horizons (T,), and values (seeds, T)."""
    found = [r for r in rows if r["feedback"] == feedback]
    horizons = np.unique([r["horizon"] for r in found])
    return horizons, np.array([r[key] for r in found], dtype=float).reshape(-1, horizons.size)


def judge(rows: list[Row]) -> Verdict:
    """Marginals to rounding; mean regret under the bound at every T; full-feedback slope not above 1/2 beyond noise."""
    marginals = [r for r in rows if r["part"] == "marginals"]
    error, drawn = max(r["measured"] for r in marginals), max(r["limit"] for r in marginals)
    holds, text = error < 1e-9 and drawn < 4 / np.sqrt(4000), [f"marginals to {error:.0e}, 4000 samples to {drawn:.3f}"]
    for feedback in ("full", "bandit"):
        horizons, regret = _games(rows, feedback, "measured")
        limit = _games(rows, feedback, "limit")[1][0]
        rng = np.random.default_rng(0)
        means = regret[rng.integers(0, len(regret), (1000, len(regret)))].mean(axis=1)  # seeds resampled
        slopes = [slope(horizons, np.maximum(mean, 1e-9)) for mean in means]
        low, high = np.quantile(slopes, [0.025, 0.975])
        share = max(paired(regret[:, t])[2] / limit[t] for t in range(horizons.size))
        holds &= bool(share < 1 and (low <= 0.5 or feedback == "bandit"))
        found = slope(horizons, np.maximum(regret.mean(axis=0), 1e-9))
        last = slope(horizons[-2:], np.maximum(regret.mean(axis=0)[-2:], 1e-9))
        interval = f"{found:.2f} [{low:.2f}, {high:.2f}], of the last two horizons {last:.2f}"
        text.append(f"{feedback}: slope {interval}, at most {share:.2f} of the bound")
    return Verdict(bool(holds), "; ".join(text))


def draw(rows: list[Row]) -> Figure:
    """Regret over T with the bounds."""
    figure = Figure(figsize=(5.6, 3.4))
    axis = figure.subplots()
    for feedback in ("full", "bandit"):
        horizons, regret = _games(rows, feedback, "measured")
        found = np.array([paired(column) for column in regret.T])
        error = np.abs(found[:, 1:].T - found[:, 0])
        line = axis.errorbar(horizons, found[:, 0], error, fmt="o-", capsize=3, label=f"{feedback} feedback (95 %)")
        limit = _games(rows, feedback, "limit")[1][0]
        axis.plot(horizons, limit, ":", color=line[0].get_color(), label=f"bound, {feedback}")
    axis.set(xscale="log", yscale="log", xlabel="horizon T [rounds]", ylabel="regret [loss]")
    axis.set_title(f"Exact path play: {BINS} bins, {ARMS} arms")
    axis.legend()
    return figure
