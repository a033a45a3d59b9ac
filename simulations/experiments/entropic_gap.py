"""Lemma 4.1 and F4: the entropic surrogate lies within ln(B) / η of the hardest bin, which is far at the published η.

Losses of B bins are drawn from [-1, 1], the range that the published clipping leaves to the score; the last seed of
each block holds the vertex case instead, one bin at 1 and the others at -1, where q is the most concentrated.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from matplotlib.figure import Figure

from gdro_core import entropic
from simulations.harness import Row, Verdict

CLAIM = "The entropic surrogate is within ln(B)/η of the hard maximum; at the published η no bin gets more than 0.288"
SOURCE = "Lemma 4.1, F4"
COLUMNS = {
    "seed": "losses of the bins",
    "bins": "B",
    "step_size": "η (1 / loss)",
    "hard": "greatest loss (loss)",
    "above": "published surrogate (1/η) ln Σ exp(ηL) minus the greatest loss (loss)",
    "below": "greatest loss minus the KL-penalised value at uniform reference (loss)",
    "gap_bound": "ln(B) / η (loss)",
    "greatest_q": "greatest probability of a bin, with exploration γ = 0.01 (1)",
    "gradient_error": "greatest difference between q and the surrogate's central differences (1)",
}
SEEDS, BLOCK = 100, 50
BINS, STEP_SIZES, PUBLISHED = (2, 6, 10, 30), (0.1, 0.3, 0.65, 1.0, 2.0, 5.0, 10.0, 30.0), (10, 0.65)
GAMMA, PROBE = 0.01, 1e-5


def _published(losses: np.ndarray, eta: float) -> np.ndarray:
    """(1/η) ln Σ exp(ηL), Eq. 22, along the last axis."""
    return np.asarray(np.log(np.exp(eta * losses).sum(axis=-1)) / eta)


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Surrogates, mixtures and finite differences of them."""
    rows = []
    for seed, bins, eta in product(seeds, BINS, STEP_SIZES[:: 2 if quick else 1]):
        losses = np.random.default_rng(seed).uniform(-1.0, 1.0, bins)
        if seed == seeds[-1]:
            losses = np.where(np.arange(bins) == 0, 1.0, -1.0)
        q, value = entropic(losses, eta)
        probe = PROBE * np.eye(bins)
        gradient = (_published(losses + probe, eta) - _published(losses - probe, eta)) / (2 * PROBE)
        rows.append(
            {
                "seed": int(seed),
                "bins": bins,
                "step_size": eta,
                "hard": float(losses.max()),
                "above": float(_published(losses, eta) - losses.max()),
                "below": float(losses.max() - value),
                "gap_bound": float(np.log(bins) / eta),
                "greatest_q": float((1 - GAMMA) * q.max() + GAMMA / bins),
                "gradient_error": float(np.abs(gradient - q).max()),
            }
        )
    return rows


def judge(rows: list[Row]) -> Verdict:
    """Both gaps in [0, ln(B)/η] on every instance, gradients equal to 1e-8, and the numbers of F4."""
    inside = all(-1e-12 <= row[key] <= row["gap_bound"] + 1e-12 for row in rows for key in ("above", "below"))
    error = max(row["gradient_error"] for row in rows)
    selected = [row for row in rows if (row["bins"], row["step_size"]) == PUBLISHED]
    greatest, bound = max(row["greatest_q"] for row in selected), selected[0]["gap_bound"]
    typical = np.mean([row["greatest_q"] for row in selected])
    above = np.array([row["above"] for row in selected])
    return Verdict(
        bool(inside and error < 1e-8 and greatest <= 0.288),
        f"{'all' if inside else 'NOT all'} gaps of {len(rows)} instances in [0, ln(B)/η], gradient = q to {error:.0e}; "
        f"at B = {PUBLISHED[0]}, η = {PUBLISHED[1]} and losses in [-1, 1]: q <= {greatest:.3f} (mean of the greatest "
        f"{typical:.3f}), ln(B)/η = {bound:.2f}, surrogate above the maximum by {above.mean():.2f} "
        f"(from {above.min():.2f} to {above.max():.2f})",
    )


def draw(rows: list[Row]) -> Figure:
    """Gap above the hard maximum with its bound, and the greatest probability of a bin."""
    figure = Figure(figsize=(7.6, 3.2))
    left, right = figure.subplots(1, 2)
    etas = np.unique([row["step_size"] for row in rows])
    for bins in BINS:

        def by_eta(key: str, bins: int = bins) -> list[list[float]]:
            return [[row[key] for row in rows if (row["bins"], row["step_size"]) == (bins, eta)] for eta in etas]

        (line,) = left.loglog(etas, np.mean(by_eta("above"), axis=1), label=f"B = {bins}")
        left.loglog(etas, np.log(bins) / etas, linestyle=":", color=line.get_color())
        right.semilogx(etas, np.max(by_eta("greatest_q"), axis=1), color=line.get_color())
    left.axhline(2.0, color="#555555", linewidth=0.8)
    left.annotate("range of the losses", (4.6, 2.4), fontsize=8, color="#555555")
    left.set(xlabel="step size η", ylabel="above the hard maximum [loss]", ylim=(1e-4, 60),
             title="surrogate (dotted: ln(B)/η)")  # fmt: skip
    right.set(xlabel="step size η", ylabel="greatest probability of a bin", title="the most concentrated mixture")
    published = max(row["greatest_q"] for row in rows if (row["bins"], row["step_size"]) == PUBLISHED)
    right.plot(PUBLISHED[1], published, marker="o", color="#555555", linestyle="none", label="published η, B = 10")
    left.legend(loc="lower left")
    right.legend(loc="lower right")
    return figure
