"""Theorem 6: allocations under an exact budget drawn from their exact Gibbs law, and what playing them costs.

F3 is the released play: no arm is drawn, no loss is weighted by its chance; the dynamic program takes the likeliest
allocation by averaged scores. It sees what the bandit sees. Where losses drift that costs nothing; an
opponent who knows the rule foresees every allocation, and makes each bin's likeliest arm lose: `chosen`.

The claim was first stated with a slope of at most 1/2 for the bandit too; up to T = 3000 its slope is about 0.6, as its
learning rate has then hardly separated the paths. The theorem is the bound; the bandit's slopes are reported.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from matplotlib.figure import Figure

from gdro_core import (
    PublishedRolloutGDRO,
    allocation_marginals,
    path_learning_rate,
    path_regret_bound,
    sample_budget_allocation,
)
from gdro_llm.intervals import mean_interval, slope, slope_interval
from simulations.harness import Row, Verdict, table

CLAIM = (
    "Exact path play has the enumerated marginals and regret under its bound, with full feedback no faster than √T; "
    "where losses are chosen against the player, the released play, which draws no arm, has linear regret"
)
SOURCE = "Theorem 6, F3"
COLUMNS = {
    "seed": "bin sizes, budget and losses",
    "part": "marginals: one random instance; regret: one game",
    "feedback": "regret: full, bandit or published; empty for marginals",
    "losses": "regret: drifting rates, or 1 for the arm of each bin most likely to be played; empty for marginals",
    "horizon": "T [rounds]; empty for marginals",
    "measured": "marginals: greatest |exact - enumerated| (1); regret: against the best fixed allocation [loss]",
    "limit": "marginals: the same for 4000 samples, at most about 4 / sqrt(4000) (1); regret: "
    "path_regret_bound [loss], empty for published",
}
SEEDS, BLOCK = 20, 5
BINS, ARMS, LOW = 4, 4, 2
HORIZONS = (100, 300, 1000, 3000, 10000)
GAMES = (
    ("full", "drifting"),
    ("bandit", "drifting"),
    ("published", "drifting"),
    ("bandit", "chosen"),
    ("published", "chosen"),
)
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


def _regret(feedback: str, losses: str, seed: int, horizon: int) -> float:
    """Losses 0 or 1; the comparator is the best fixed allocation of these very losses."""
    rng = np.random.default_rng([seed, horizon, feedback == "full"])
    size, budget, paths = _instance(seed)
    rate = 0.0 if feedback == "published" else path_learning_rate(horizon, BINS, ARMS, feedback=feedback)
    bins, mean = np.repeat(np.arange(BINS), size), budget / size.sum()
    released = PublishedRolloutGDRO(BINS, mean, LOW, LOW + ARMS - 1)
    base, wave = rng.random((BINS, ARMS)), rng.random((BINS, ARMS))
    summed, suffered, estimate = np.zeros((BINS, ARMS)), 0.0, np.zeros((BINS, ARMS))
    rows, last = np.arange(BINS), np.cumsum(size) - 1
    for t in range(horizon):
        if losses == "drifting":
            chance = np.clip(base + 0.3 * np.sin(2 * np.pi * (3 * t / horizon + wave)), 0.0, 1.0)
            loss = (rng.random((BINS, ARMS)) < chance).astype(float)
        if feedback == "full":
            law = allocation_marginals(-rate * summed, size, budget, min_rollouts=LOW)
        elif feedback == "published":
            law = (released.counts(bins)[last, None] == np.arange(ARMS) + LOW).astype(float)  # but for ties
            counts = released.counts(bins, rng=rng)
        else:
            counts, law = sample_budget_allocation(-rate * estimate, size, budget, min_rollouts=LOW, rng=rng)
        if losses == "chosen":
            loss = (np.arange(ARMS) == law.argmax(axis=1)[:, None]).astype(float)
        if feedback == "full":
            suffered += float((law * loss).sum())
        elif feedback == "published":
            suffered += float(loss[rows, counts[last] - LOW].sum())
            released.observe(bins, counts, loss[bins, counts - LOW])
        else:
            played = counts - LOW
            suffered += float(loss[rows, played].sum())
            estimate[rows, played] += loss[rows, played] / law[rows, played]
        summed += loss
    return suffered - float(summed[rows, paths].sum(axis=1).min())


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """One enumeration and a game per play and horizon."""
    rows: list[Row] = []
    for seed in map(int, seeds):
        exact, drawn = _marginal_errors(seed)
        row: Row = {"seed": seed, "part": "marginals", "measured": exact, "limit": drawn}
        rows.append(row | dict.fromkeys(("feedback", "losses", "horizon"), ""))
        for feedback, losses in GAMES:
            for horizon in (30, 90) if quick else HORIZONS[: 5 if (feedback, losses) in GAMES[:2] else 4]:
                bound = "" if feedback == "published" else path_regret_bound(horizon, BINS, ARMS, feedback=feedback)
                row = {"seed": seed, "part": "regret", "feedback": feedback, "losses": losses, "horizon": horizon}
                rows.append(row | {"measured": _regret(feedback, losses, seed, horizon), "limit": bound})
    return rows


def judge(rows: list[Row]) -> Verdict:
    """Marginals to rounding; mean regret under the bound at every T; slopes by their intervals over seeds.

    Full feedback: not above 1/2 beyond noise. Chosen losses: published above .9, the bandit below.
    """
    marginals = [r for r in rows if r["part"] == "marginals"]
    error, drawn = max(r["measured"] for r in marginals), max(r["limit"] for r in marginals)
    holds, text = error < 1e-9 and drawn < 4 / np.sqrt(4000), [f"marginals to {error:.0e}, 4000 samples to {drawn:.3f}"]
    for feedback, losses in GAMES:
        horizons, regret = table(rows, "measured", feedback=feedback, losses=losses)
        middle, low, high = slope_interval(horizons, regret)
        last = slope(horizons[-2:], np.maximum(regret.mean(axis=0)[-2:], 1e-9))
        finding = (
            f"{feedback}, {losses}: slope {middle:.2f} [{low:.2f}, {high:.2f}], of the last two horizons {last:.2f}"
        )
        if feedback != "published":
            limit = table(rows, "limit", feedback=feedback, losses=losses)[1][0]
            share = max(mean_interval(regret[:, t])[2] / limit[t] for t in range(horizons.size))
            holds &= bool(share < 1 and (feedback == "bandit" or low <= 0.5))
            finding += f", at most {share:.2f} of the bound"
        if losses == "chosen":
            holds &= bool(low > 0.9 if feedback == "published" else high < 0.9)
        text.append(finding)
    at = int(max(r["horizon"] for r in rows if r["feedback"] == "published"))
    for losses in ("drifting", "chosen"):
        pair = [
            np.array([r["measured"] for r in rows if (r["feedback"], r["losses"], r["horizon"]) == (name, losses, at)])
            for name in ("published", "bandit")
        ]
        mean, low, high = mean_interval((pair[0] - pair[1]) / at)
        text.append(f"published minus bandit, {losses}: {mean:+.3f} [{low:+.3f}, {high:+.3f}] a round at T = {at}")
    return Verdict(bool(holds), "; ".join(text))


def draw(rows: list[Row]) -> Figure:
    """Regret per round over T with the bounds, both kinds of losses."""
    figure = Figure(figsize=(9.0, 3.6))
    axes = dict(zip(("drifting", "chosen"), figure.subplots(1, 2, sharey=True), strict=True))
    colours = {"full": "C0", "bandit": "C1", "published": "C2"}
    for feedback, losses in GAMES:
        horizons, regret = table(rows, "measured", feedback=feedback, losses=losses)
        intervals = np.array([mean_interval(column) for column in (regret / horizons).T])
        error, colour = np.abs(intervals[:, 1:].T - intervals[:, 0]), colours[feedback]
        name = "released play (F3)" if feedback == "published" else f"{feedback} feedback"
        axes[losses].errorbar(
            horizons, intervals[:, 0], error, fmt="o-", capsize=3, color=colour, label=f"{name} (95 %)"
        )
        if feedback != "published":
            limit = table(rows, "limit", feedback=feedback, losses=losses)[1][0]
            axes[losses].plot(horizons, limit / horizons, ":", color=colour, label=f"bound, {feedback}")
    titles = {"drifting": "losses of drifting rates", "chosen": "the likeliest arm of each bin loses"}
    for losses, axis in axes.items():
        axis.set(xscale="log", yscale="log", xlabel="horizon T [rounds]", title=titles[losses])
        axis.legend(fontsize=7)
    axes["drifting"].set_ylabel(f"regret a round [loss], {BINS} bins, {ARMS} arms")
    return figure
