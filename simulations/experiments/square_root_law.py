"""Theorem 4.2 and F8: n ∝ √v minimises the summed variance; the paper's WSE is minimised by n ∝ v^(1/3) instead."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gdro_core import sqrt_allocation
from simulations.harness import Row, Verdict

CLAIM = "Among n ∝ v^a, the summed variance is least at a = 1/2 and the WSE of Eq. 33 at a = 1/3"
SOURCE = "Theorem 4.2, F8"
COLUMNS = {
    "seed": "population of bins",
    "exponent": "a of n ∝ v^a at the same mean budget",
    "variance": "sum q v / n relative to uniform n (1)",
    "wse": "sum q sqrt(v / n) relative to uniform n (1)",
}
SEEDS, BLOCK = 200, 50
BINS, BUDGET, EXPONENTS = 10, 4.0, np.round(np.arange(0.0, 1.0001, 1 / 24), 6)


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Bins with log-normal variances and Dirichlet shares."""
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        v, q = rng.lognormal(0.0, 1.5, BINS), rng.dirichlet(np.ones(BINS))
        for exponent in EXPONENTS[:: 4 if quick else 1]:
            n = sqrt_allocation(v ** (2 * exponent), BUDGET, share=q)  # n ∝ v^a
            variance, wse = q @ (v / n), q @ np.sqrt(v / n)
            uniform = q @ (v / BUDGET), q @ np.sqrt(v / BUDGET)
            rows.append(
                {
                    "seed": int(seed),
                    "exponent": float(exponent),
                    "variance": float(variance / uniform[0]),
                    "wse": float(wse / uniform[1]),
                }
            )
    return rows


def _best(rows: list[Row], key: str) -> np.ndarray:
    """Per seed, the exponent with the least value."""
    by_seed: dict[int, Any] = {}
    for row in rows:
        if row["seed"] not in by_seed or row[key] < by_seed[row["seed"]][key]:
            by_seed[row["seed"]] = row
    return np.array([row["exponent"] for row in by_seed.values()])


def judge(rows: list[Row]) -> Verdict:
    """Both minima lie at the grid point nearest the theory's in every population."""
    exponents = np.unique([row["exponent"] for row in rows])
    wanted = {key: exponents[np.abs(exponents - a).argmin()] for key, a in (("variance", 1 / 2), ("wse", 1 / 3))}
    found = {key: _best(rows, key) for key in wanted}
    holds = all((found[key] == wanted[key]).all() for key in wanted)
    return Verdict(holds, ", ".join(f"{key} least at a = {values.mean():.3f}" for key, values in found.items()))


def draw(rows: list[Row]) -> Figure:
    """Mean and 10-90 % band over populations against the exponent."""
    figure = Figure(figsize=(6.4, 3.2))
    axis = figure.subplots()
    exponents = np.unique([row["exponent"] for row in rows])
    for key, label, best in (("variance", "Σ q v / n (Theorem 4.2)", 1 / 2), ("wse", "Σ q √(v / n) (Eq. 33)", 1 / 3)):
        values = np.array([[row[key] for row in rows if row["exponent"] == a] for a in exponents])
        (line,) = axis.plot(exponents, values.mean(axis=1), label=label)
        axis.fill_between(exponents, *np.quantile(values, [0.1, 0.9], axis=1), alpha=0.15, color=line.get_color())
        axis.axvline(best, color=line.get_color(), linewidth=0.8, linestyle=":")
    axis.set(xlabel="exponent a of n ∝ v^a", ylabel="relative to uniform n", title="What the square root minimises")
    axis.legend()
    return figure
