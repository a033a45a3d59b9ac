"""Theorem 4.2 and F8: n ∝ √v minimises the summed variance; the paper's WSE is minimised by n ∝ v^(1/3) instead.

In a box low <= n <= high the minimiser is n = clip(√(v/μ), low, high), with μ such that the budget is met (KKT). Here μ
is found by root search, not by the breakpoints of `sqrt_allocation`. The law without bounds, clipped, is off the
budget.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import brentq

from gdro_core import sqrt_allocation
from simulations.harness import Row, Verdict

CLAIM = (
    "Among n ∝ v^a, in a box or not, the summed variance is least at a = 1/2 and the WSE of Eq. 33 at a = 1/3; "
    "in a box the counts are clip(√(v/μ), low, high) and meet the budget"
)
SOURCE = "Theorem 4.2, F8"
COLUMNS = {
    "seed": "population of bins",
    "part": "power: all bins at one exponent | law: one bin in the box, a = 1/2",
    "bounds": "none: n = c v^a | box: n = clip(c v^a, 2, 12), at the same mean budget",
    "exponent": "a; empty for law",
    "variance": "sum q v / n relative to uniform n (1); law: v of the bin",
    "wse": "sum q sqrt(v / n) relative to uniform n (1); empty for law",
    "share": "law: q of the bin (1); empty for power",
    "rollouts": "law: n of the bin [rollouts / prompt]; empty for power",
    "kkt": "law: clip(sqrt(v / mu), 2, 12) [rollouts / prompt]; empty for power",
    "clipped": "law: the law without bounds, then clipped to the box [rollouts / prompt]; empty for power",
}
SEEDS, BLOCK = 200, 50
BINS, BUDGET, LOW, HIGH, EXPONENTS = 10, 4.0, 2.0, 12.0, np.round(np.arange(0.0, 1.0001, 1 / 24), 6)
BOUNDS: dict[str, dict[str, Any]] = {"none": {}, "box": {"lower": LOW, "upper": HIGH}}
BEST = {"variance": 1 / 2, "wse": 1 / 3}


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Bins with log-normal variances and Dirichlet shares."""
    rows: list[Row] = []
    for seed in map(int, seeds):
        rng = np.random.default_rng(seed)
        v, q = rng.lognormal(0.0, 1.5, BINS), rng.dirichlet(np.ones(BINS))
        uniform = q @ (v / BUDGET), q @ np.sqrt(v / BUDGET)
        for bounds, exponent in product(BOUNDS, EXPONENTS[:: 4 if quick else 1]):
            n = sqrt_allocation(v ** (2 * exponent), BUDGET, share=q, **BOUNDS[bounds])
            row: Row = {"seed": seed, "part": "power", "bounds": bounds, "exponent": float(exponent)}
            row |= {"variance": float(q @ (v / n) / uniform[0]), "wse": float(q @ np.sqrt(v / n) / uniform[1])}
            rows.append(row | dict.fromkeys(("share", "rollouts", "kkt", "clipped"), ""))
        mu = brentq(lambda mu: q @ np.clip(np.sqrt(v / mu), LOW, HIGH) - BUDGET, 1e-9, v.max(), xtol=1e-15)  # noqa: B023
        law = sqrt_allocation(v, BUDGET, share=q, **BOUNDS["box"])
        clipped = np.clip(sqrt_allocation(v, BUDGET, share=q), LOW, HIGH)
        of_bin = zip(v, q, law, np.clip(np.sqrt(v / mu), LOW, HIGH), clipped, strict=True)
        for values in of_bin:
            row = dict(zip(("variance", "share", "rollouts", "kkt", "clipped"), map(float, values), strict=True))
            rows.append({"seed": seed, "part": "law", "bounds": "box", "exponent": "", "wse": "", **row})
    return rows


def _powers(rows: list[Row], bounds: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(E,) exponents and (seeds, E) values."""
    selected = [row for row in rows if (row["part"], row["bounds"]) == ("power", bounds)]
    exponents = np.unique([row["exponent"] for row in selected])
    return exponents, np.array([row[key] for row in selected]).reshape(-1, exponents.size)


def _law(rows: list[Row], key: str) -> np.ndarray:
    """(seeds, B)."""
    return np.array([row[key] for row in rows if row["part"] == "law"]).reshape(-1, BINS)


def judge(rows: list[Row]) -> Verdict:
    """In every population the grid point nearest the theory's is a minimum, and the boxed counts are the KKT point."""
    holds, text = True, []
    for bounds, (key, best) in product(BOUNDS, BEST.items()):
        exponents, values = _powers(rows, bounds, key)
        least = values[:, np.abs(exponents - best).argmin()] <= values.min(axis=1) + 1e-12
        holds &= bool(least.all())
        text.append(f"{key} least at a = {best:.3f} in {least.mean():.0%} ({bounds})")
    n, share = _law(rows, "rollouts"), _law(rows, "share")
    error, off = np.abs(n - _law(rows, "kkt")).max(), np.abs((share * n).sum(axis=1) - BUDGET).max()
    held = np.mean((n <= LOW) | (n >= HIGH))
    missed = np.abs((share * _law(rows, "clipped")).sum(axis=1) - BUDGET).mean()
    text.append(
        f"box: {held:.0%} of bins at a bound, counts within {error:.0e} of the KKT point, budget within {off:.0e}; "
        f"the clipped law misses it by {missed:.2f} on average"
    )
    return Verdict(bool(holds and error < 1e-6 and off < 1e-9 and 0 < held < 1), ", ".join(text))


def draw(rows: list[Row]) -> Figure:
    """Mean and 10-90 % band over populations against the exponent; the counts of one population in the box."""
    figure = Figure(figsize=(9.6, 3.2))
    left, right = figure.subplots(1, 2)
    names = {"variance": "Σ q v / n (Theorem 4.2)", "wse": "Σ q √(v / n) (Eq. 33)"}
    for colour, (key, best) in zip(("C0", "C1"), BEST.items(), strict=True):
        for bounds, style in (("none", "-"), ("box", "--")):
            exponents, values = _powers(rows, bounds, key)
            label = names[key] + (", 2 ≤ n ≤ 12" if bounds == "box" else "")
            left.plot(exponents, values.mean(axis=0), style, color=colour, label=label)
            if bounds == "none":
                left.fill_between(exponents, *np.quantile(values, [0.1, 0.9], axis=0), alpha=0.15, color=colour)
        left.axvline(best, color=colour, linewidth=0.8, linestyle=":")
    left.set(xlabel="exponent a of n ∝ v^a", ylabel="relative to uniform n", title="What the square root minimises")
    left.legend()
    n = _law(rows, "rollouts")
    shown = int(((n >= HIGH).sum(axis=1)).argmax())  # a population with many bins at the upper bound
    order = _law(rows, "variance")[shown].argsort()
    v, n, kkt, clipped = (_law(rows, key)[shown, order] for key in ("variance", "rollouts", "kkt", "clipped"))
    right.plot(v, clipped, "x", color="C1", label="law without bounds, clipped")
    right.plot(v, n, "o", color="C0", markersize=5, label="sqrt_allocation")
    dense = np.geomspace(v[0], v[-1], 200)
    inside = (n > LOW) & (n < HIGH)
    root_mu = float(np.median(np.sqrt(v[inside]) / kkt[inside])) if inside.any() else np.nan
    right.plot(
        dense, np.clip(np.sqrt(dense) / root_mu, LOW, HIGH), color="C0", linewidth=1, label="clip(√(v/μ), 2, 12)"
    )
    right.set(xscale="log", xlabel="variance v of a bin", ylabel="rollouts / prompt", title="Bins of one population")
    right.legend()
    return figure
