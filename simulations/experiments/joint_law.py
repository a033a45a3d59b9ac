"""F7: with prompt weights the best counts are n ∝ ω√v; ignoring the weights costs 1 + CV²(ω)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gdro_core import RolloutGDRO, decoupling_price, sqrt_allocation
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict

CLAIM = "n ∝ ω√v has the least variance of the weighted gradient, and n ∝ √v pays exactly 1 + CV²(ω) times as much"
SOURCE = "F7, Theorem 4.2"
COLUMNS = {
    "seed": "population of prompts",
    "spread": "sigma of the log-normal prompt weights",
    "cv2": "CV²(ω) under the measure ∝ √v (1)",
    "rule": "uniform, decoupled (n ∝ √v) or joint (n ∝ ω√v)",
    "real": "sum ω² v / n with real counts, relative to joint (1)",
    "integer": "the same with the whole counts in 2..24 that RolloutGDRO gives, relative to joint real counts (1)",
}
SEEDS, BLOCK = 100, 20
PROMPTS, BUDGET, LOW, HIGH = 256, 8, 2, 24
SPREADS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
RULES = ("uniform", "decoupled", "joint")


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Pass rates Beta(1, 2), independent log-normal weights of mean 1."""
    rows: list[Row] = []
    for seed in map(int, seeds):
        for spread in SPREADS[:: 2 if quick else 1]:
            rng = np.random.default_rng([seed, round(100 * spread)])
            p = rng.beta(1.0, 2.0, PROMPTS)
            omega, v = rng.lognormal(-(spread**2) / 2, spread, PROMPTS), p * (1 - p)
            tight = 1e9  # a posterior so certain that its mean variance is p (1 - p)
            game = RolloutGDRO(BUDGET, LOW, HIGH)
            least = (omega**2 * v / sqrt_allocation(omega**2 * v, BUDGET)).sum()
            for rule in RULES:
                real, whole = np.full(PROMPTS, float(BUDGET)), np.full(PROMPTS, BUDGET)
                if rule != "uniform":
                    weight = omega if rule == "joint" else np.ones(PROMPTS)
                    real = sqrt_allocation(weight**2 * v, BUDGET)
                    whole = game.counts(np.zeros(PROMPTS), tight * p, tight * (1 - p), weight)
                rows.append(
                    {
                        "seed": seed,
                        "spread": spread,
                        "cv2": decoupling_price(omega, v) - 1.0,
                        "rule": rule,
                        "real": float((omega**2 * v / real).sum() / least),
                        "integer": float((omega**2 * v / whole).sum() / least),
                    }
                )
    return rows


def _values(rows: list[Row], rule: str, key: str, spread: float) -> np.ndarray:
    return np.array([r[key] for r in rows if r["rule"] == rule and r["spread"] == spread])


def judge(rows: list[Row]) -> Verdict:
    """The identity to rounding, joint least; whole counts in bounds keep the order wherever weights differ."""
    decoupled = [r for r in rows if r["rule"] == "decoupled"]
    error = max(abs(r["real"] / (1.0 + r["cv2"]) - 1.0) for r in decoupled)
    least = all(r["real"] >= 1.0 - 1e-12 for r in rows)
    spreads = sorted({r["spread"] for r in rows})
    gains = {}
    for spread in spreads:
        pair = [_values(rows, rule, "integer", spread) for rule in ("decoupled", "joint")]
        gains[spread] = mean_interval(pair[0] / pair[1])
    text = ", ".join(f"{s:g}: {gains[s][0]:.3f} [{gains[s][1]:.3f}, {gains[s][2]:.3f}]" for s in spreads[1:])
    ordered = all(gains[s][1] > 1.0 for s in spreads[1:])
    return Verdict(
        bool(error < 1e-9 and least and ordered),
        f"identity to {error:.0e} in {len(decoupled)} populations; whole counts, decoupled / joint by spread {text}",
    )


def draw(rows: list[Row]) -> Figure:
    """Relative variance over CV² of the weights."""
    figure = Figure(figsize=(8.4, 3.3))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, title in zip(axes, ("real", "integer"), ("Real counts", "Whole counts in 2..24"), strict=True):
        for rule in RULES:
            selected = [r for r in rows if r["rule"] == rule]
            axis.plot([1 + r["cv2"] for r in selected], [r[key] for r in selected], ".", markersize=3, label=rule)
        top = max(r["cv2"] for r in rows)
        axis.plot([1, 1 + top], [1, 1 + top], color="#555555", linewidth=0.8, label="1 + CV²(ω)")
        axis.set(xlabel="1 + CV²(ω) under the measure ∝ √v", title=title, xscale="log", yscale="log")
    axes[0].set(ylabel="variance / least variance")
    axes[1].legend(markerscale=3)
    return figure
