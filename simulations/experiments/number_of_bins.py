"""How many difficulty bins, and how firmly a prompt should stay in its own."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gdro_core import GDROController, OnlineDifficultyClassifier, PromptGDRO, RolloutGDRO
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict
from simulations.population import SkillPopulation, train

CLAIM = "No number of bins from 2 to 20 ends with a higher held-out pass@8 than 6, which looked best in the paper"
SOURCE = "§3.1, App. A"
COLUMNS = {
    "seed": "population and run, the same for all classifiers",
    "bins": "number of equal bins",
    "rule": "free: by the estimate, discount .5; slow: discount .9; hysteresis: .03, or .3 / bins, discount .5; "
    "confidence: .1, discount 1",
    "flips": "share of visits at which a prompt is in another bin than at its last visit",
    "mean_at_8": "held-out mean pass rate at the end",
    "pass_at_8": "held-out pass@8 at the end",
    "worst": "mean pass rate of the worst held-out group at the end",
}
SEEDS, BLOCK = 50, 5
BUDGET, BINS, BEST = 4, (2, 3, 4, 6, 8, 10, 15, 20), 6
DISCOUNTS = {"free": 0.5, "slow": 0.9, "hysteresis": 0.5, "confidence": 1.0}
FIRM = ("slow", "hysteresis", "confidence")
RULES = [("free", bins) for bins in BINS] + [(rule, bins) for rule in FIRM for bins in (6, 10)]


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Recommended joint controller, normalised steps, 200 of them at 2.5 times the calibrated learning rate."""
    rows = []
    steps, prompts, batch = (20, 120, 24) if quick else (200, 600, 120)
    for seed in seeds.tolist():
        for rule, bins in RULES:
            population = SkillPopulation(seed, prompts=prompts, learning_rate=0.0108 * 500 / steps, normalised=True)
            controller = GDROController(
                OnlineDifficultyClassifier(
                    np.linspace(0.0, 1.0, bins + 1)[1:-1],
                    hysteresis=min(0.03, 0.3 / bins) if rule == "hysteresis" else 0.0,
                    confidence=0.1 if rule == "confidence" else None,
                    discount=DISCOUNTS[rule],
                ),
                PromptGDRO(bins),
                RolloutGDRO(BUDGET, 2, 12),
                seed=seed,
            )
            last, changed = np.full(prompts, -1), []
            run = train(population, controller, steps, batch, BUDGET, seed)
            for plan in (step["plan"] for step in run):
                ids = np.array(plan.ids)
                known = last[ids] >= 0
                changed.append((last[ids] != plan.bins)[known])
                last[ids] = plan.bins
            row = {"seed": seed, "bins": bins, "rule": rule, "flips": float(np.concatenate(changed).mean())}
            rows.append(row | {key: run[-1][key] for key in ("mean_at_8", "pass_at_8", "worst")})
    return rows


def _values(rows: list[Row], rule: str, bins: int, measure: str) -> np.ndarray:
    return np.array([row[measure] for row in rows if (row["rule"], row["bins"]) == (rule, bins)])


def judge(rows: list[Row]) -> Verdict:
    """Paired by seed against 6 bins: the claim fails where an interval lies above 0 (Bonferroni is not applied)."""
    six = _values(rows, "free", BEST, "pass_at_8")
    gains = {bins: mean_interval(_values(rows, "free", bins, "pass_at_8") - six) for bins in BINS if bins != BEST}
    better = [bins for bins, (_, low, _) in gains.items() if low > 0]
    findings = [f"{bins} bins {mean:+.4f} [{low:+.4f}, {high:+.4f}]" for bins, (mean, low, high) in gains.items()]
    flips = [f"{rule} {_values(rows, rule, 10, 'flips').mean():.2f}" for rule in DISCOUNTS]
    firm = [
        f"{rule} {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        for rule in FIRM
        for mean, low, high in [
            mean_interval(_values(rows, rule, 10, "pass_at_8") - _values(rows, "free", 10, "pass_at_8"))
        ]
    ]
    text = f"pass@8 minus 6 bins': {', '.join(findings)}; flips a visit at 10 bins: {', '.join(flips)}"
    return Verdict(not better, f"{text}; pass@8 minus free at 10 bins: {', '.join(firm)}")


def draw(rows: list[Row]) -> Figure:
    """Paired difference to 6 free bins, and bin flips."""
    figure = Figure(figsize=(7.2, 3.2))
    left, right = figure.subplots(1, 2)
    six = _values(rows, "free", BEST, "pass_at_8")
    for rule, shift in zip(DISCOUNTS, (0.0, -0.2, 0.2, 0.4), strict=True):
        sizes = [bins for name, bins in RULES if name == rule]
        intervals = np.array([mean_interval(_values(rows, rule, bins, "pass_at_8") - six) for bins in sizes])
        error = np.abs(intervals[:, 1:] - intervals[:, :1]).T
        left.errorbar(np.array(sizes) + shift, intervals[:, 0], yerr=error, fmt="o", markersize=4, label=rule)
        right.plot(sizes, [_values(rows, rule, bins, "flips").mean() for bins in sizes], "o-", markersize=4)
    left.axhline(0.0, color="black", linewidth=0.8)
    left.set(xlabel="bins", title="Held-out pass@8, minus that of 6 free bins")
    left.legend()
    for axis in (left, right):
        axis.set_xticks(BINS)
    right.set(xlabel="bins", title="Share of visits in another bin than the last", ylim=(0, None))
    return figure
