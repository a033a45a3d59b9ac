"""F1: what the published payoff (the prompt loss of Eq. 7) says of difficulty, next to the error payoff.

Group-standardised advantages sum to zero, so the loss is 0 while all ratios are 1. In a second mini-batch they have
drifted: at random (log-ratio normal with s.d. 0.1 per rollout), or because training on other prompts moved the prompt's
logit, by 0.3 on average, so that a right answer has ratio p'/p and a wrong one (1 - p')/(1 - p). The clipped loss
(0.2 / 0.28) of what is left is ranked against true difficulty 1 - p, over 256 prompts of 8 rollouts and over 10 bins.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from matplotlib.figure import Figure
from scipy.special import expit, logit
from scipy.stats import spearmanr

from gdro_core import prompt_payoff
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict

CLAIM = "The published payoff does not rank prompts by difficulty, at ratio 1 or after drift; the error payoff does"
SOURCE = "F1, Eq. 3-7"
COLUMNS = {
    "seed": "independent batch of prompts",
    "population": "pass rates: uniform, hard Beta(1, 3) or easy Beta(3, 1)",
    "payoff": "error, or published loss with the named drift of the ratios",
    "size": "greatest absolute payoff of a prompt (payoff)",
    "by_prompt": "Spearman rank correlation with 1 - p over prompts; 0 if all payoffs are below 1e-12 (1)",
    "by_bin": "the same over the means of 10 equal bins of true p that hold prompts (1)",
}
SEEDS, BLOCK = 200, 50
PROMPTS, ROLLOUTS, BINS = 256, 8, 10
POPULATIONS = {"uniform": (1.0, 1.0), "hard": (1.0, 3.0), "easy": (3.0, 1.0)}
PAYOFFS = ("error", "ratio 1", "random drift", "shared drift")


def _loss(rewards: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """(N,) -mean_j min(ρ A, clip(ρ, 0.8, 1.28) A), A standardised by the population s.d. of the group (Eq. 3-7)."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    advantage = np.clip(centred / (rewards.std(axis=1, keepdims=True) + 1e-6), -5.0, 5.0)
    return np.asarray(-np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage).mean(axis=1))


def _rank(values: np.ndarray, difficulty: np.ndarray) -> float:
    if np.abs(values).max() < 1e-12:  # rounding of exact zeros has no rank
        return 0.0
    return float(spearmanr(values, difficulty).statistic)


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """The same rollouts under every payoff."""
    rows: list[Row] = []
    for seed, (population, shape) in product(seeds, POPULATIONS.items()):
        rng = np.random.default_rng([seed, len(population)])
        p = np.clip(rng.beta(*shape, 64 if quick else PROMPTS), 1e-3, 1 - 1e-3)
        right = rng.random((p.size, ROLLOUTS)) < p[:, None]
        moved = expit(logit(p) + rng.normal(0.3, 0.3, p.size))
        ratios = {
            "ratio 1": np.ones(right.shape),
            "random drift": np.exp(rng.normal(0.0, 0.1, right.shape)),
            "shared drift": np.where(right, (moved / p)[:, None], ((1 - moved) / (1 - p))[:, None]),
        }
        payoffs = {name: _loss(2.0 * right - 1.0, ratio) for name, ratio in ratios.items()}
        payoffs["error"] = prompt_payoff("error", right.sum(axis=1), np.full(p.size, ROLLOUTS))
        bins = np.minimum((p * BINS).astype(int), BINS - 1)
        present = np.unique(bins)
        for name in PAYOFFS:
            means = np.array([payoffs[name][bins == b].mean() for b in present])
            measured = {
                "size": float(np.abs(payoffs[name]).max()),
                "by_prompt": _rank(payoffs[name], 1 - p),
                "by_bin": _rank(means, -present.astype(float)),
            }
            rows.append({"seed": int(seed), "population": population, "payoff": name, **measured})
    return rows


def _values(rows: list[Row], population: str, payoff: str, key: str) -> np.ndarray:
    return np.array([row[key] for row in rows if (row["population"], row["payoff"]) == (population, payoff)])


def judge(rows: list[Row]) -> Verdict:
    """Holds if every published payoff has mean |correlation| over prompts below 0.1 and the error payoff above 0.7."""
    holds, findings = True, []
    for population, payoff in product(POPULATIONS, PAYOFFS):
        middle, low, high = mean_interval(_values(rows, population, payoff, "by_prompt"))
        bins = _values(rows, population, payoff, "by_bin").mean()
        holds &= low > 0.7 if payoff == "error" else max(-low, high) < 0.1
        findings.append(f"{population}, {payoff}: {middle:+.2f} [{low:+.2f}, {high:+.2f}] (bins {bins:+.2f})")
    at_one = max(_values(rows, population, "ratio 1", "size").max() for population in POPULATIONS)
    holds &= at_one < 1e-12
    text = f"greatest loss at ratio 1 {at_one:.0e}; rank correlation with difficulty: "
    return Verdict(bool(holds), text + "; ".join(findings))


def draw(rows: list[Row]) -> Figure:
    """Mean and 5-95 % range over seeds of both correlations."""
    figure = Figure(figsize=(7.6, 3.2))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, title in zip(axes, ("by_prompt", "by_bin"), ("over prompts", "over bins of true p"), strict=True):
        for i, payoff in enumerate(PAYOFFS):
            values = np.array([_values(rows, population, payoff, key) for population in POPULATIONS])
            middle = values.mean(axis=1)
            low, high = np.quantile(values, [0.05, 0.95], axis=1)
            axis.errorbar(np.arange(3) + 0.15 * (i - 1.5), middle, [middle - low, high - middle], fmt="o",
                          markersize=4, label=payoff if payoff == "error" else f"published, {payoff}")  # fmt: skip
        axis.axhline(0.0, color="#555555", linewidth=0.8)
        axis.set_xticks(range(3), POPULATIONS)
        axis.set(title=title, xlabel="population of pass rates")
    axes[0].set_ylabel("rank correlation with difficulty")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
