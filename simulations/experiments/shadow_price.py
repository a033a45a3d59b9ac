"""Theorem 7: dual ascent on the price of a rollout meets the mean budget at rate 1/√T, if demand is free to miss it."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import brentq

from gdro_core import PublishedRolloutGDRO, ShadowPrice, violation_bound
from gdro_llm.intervals import mean_interval, slope
from simulations.harness import Row, Verdict

CLAIM = "With alpha ∝ 1/√T the mean violation falls like 1/√T under its bound; an exact budget never moves the price"
SOURCE = "Theorem 7, Eq. 21, 31"
COLUMNS = {
    "seed": "population of bins and batches",
    "part": "ascent: a run of T steps from price 0; stairs: demand at a fixed price",
    "demand": "real: clip(sqrt(v/mu)); integer: best whole count at that price; exact: dynamic program of the paper",
    "horizon": "T [steps]; empty for stairs",
    "price": "mu at the end, or the fixed price [variance / rollout]",
    "violation": "mean rollouts above the mean budget, over the run or at the price [rollouts / prompt]",
    "bound": "violation_bound of theorem 7 [rollouts / prompt]; empty for stairs",
    "price_error": "mean |mu / mu* - 1| in the last half, mu* that of real counts; empty for stairs and exact",
}
SEEDS, BLOCK = 40, 10
BINS, BATCH, BUDGET, LOW, HIGH = 10, 256, 4, 2, 12
STEP = 0.02  # alpha = STEP / sqrt(T)
HORIZONS = (64, 256, 1024, 4096)
ARMS = np.arange(LOW, HIGH + 1)


def _demand(kind: str, v: np.ndarray, price: float) -> np.ndarray:
    """Counts per bin at a price."""
    if price == 0:
        return np.full(v.shape, float(HIGH))
    if kind == "real":
        return np.asarray(np.clip(np.sqrt(v / price), LOW, HIGH))
    return np.asarray(ARMS[(-v[:, None] / ARMS - price * ARMS).argmax(axis=1)].astype(float))


def _world(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Variances p (1 - p) and shares of bins."""
    rng = np.random.default_rng(seed)
    p = rng.beta(0.8, 0.8, BINS)
    return p * (1 - p), rng.dirichlet(np.ones(BINS))


def _ascent(kind: str, seed: int, horizon: int) -> Row:
    v, share = _world(seed)
    alpha = STEP / np.sqrt(horizon)
    price = ShadowPrice(BUDGET, alpha)
    batches = np.random.default_rng([seed, horizon]).multinomial(BATCH, share, horizon) / BATCH
    best = brentq(lambda mu: share @ np.clip(np.sqrt(v / mu), LOW, HIGH) - BUDGET, 1e-9, 1.0)
    visited = [price.update(float(batch @ _demand(kind, v, price.price))) for batch in batches]
    sure = v.max() / BUDGET**2  # from this price on nobody asks for more than the mean budget, whatever the batch
    if kind == "integer":
        sure = v.max() / (BUDGET * (BUDGET + 1))  # where the fifth rollout is no longer worth its price
    return {
        "seed": seed,
        "part": "ascent",
        "demand": kind,
        "horizon": horizon,
        "price": price.price,
        "violation": price.mean_violation,
        "bound": violation_bound(horizon, alpha, sure + alpha * (HIGH - BUDGET)),
        "price_error": float(np.mean(np.abs(np.array(visited[horizon // 2 :]) / best - 1))),
    }


def _exact(seed: int, horizon: int) -> Row:
    """The paper's own loop: the budget is met exactly, so Eq. 21 adds 0 at every step."""
    _, share = _world(seed)
    rng = np.random.default_rng([seed, horizon, 1])
    game = PublishedRolloutGDRO(BINS, BUDGET, LOW, HIGH)
    for _ in range(horizon):
        bins = rng.choice(BINS, BATCH, p=share)
        counts = game.counts(bins, rng=rng)
        game.observe(bins, counts, rng.normal(0, 0.1, BATCH))
    row = {"seed": seed, "part": "ascent", "demand": "exact", "horizon": horizon, "price": game.shadow_price.highest}
    bound = violation_bound(horizon, game.shadow_price.step_size, 0.0)
    return row | {"violation": game.shadow_price.mean_violation, "bound": bound, "price_error": ""}


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Runs over horizons, one run of the exact game, and the two demand curves."""
    rows: list[Row] = []
    for seed in map(int, seeds):
        horizons = HORIZONS[:2] if quick else HORIZONS
        rows += [_ascent(kind, seed, horizon) for kind in ("real", "integer") for horizon in horizons]
        rows.append(_exact(seed, 16 if quick else 64))
        v, share = _world(seed)
        for mu in np.geomspace(1e-3, 5e-2, 9 if quick else 120):
            for kind in ("real", "integer"):
                excess = float(share @ _demand(kind, v, mu)) - BUDGET
                row: Row = {"seed": seed, "part": "stairs", "demand": kind, "horizon": "", "price": float(mu)}
                rows.append(row | {"violation": excess, "bound": "", "price_error": ""})
    return rows


def _runs(rows: list[Row], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Horizons (T,), and values (seeds, T)."""
    selected = [r for r in rows if r["part"] == "ascent" and r["demand"] == kind]
    horizons = np.unique([r["horizon"] for r in selected])
    return horizons, np.array([r[key] for r in selected], dtype=float).reshape(-1, horizons.size)


def judge(rows: list[Row]) -> Verdict:
    """Slope about -1/2 within its interval over seeds, every run under its bound, exact budget: price 0 throughout."""
    holds, text = True, []
    for kind in ("real", "integer"):
        horizons, violation = _runs(rows, kind, "violation")
        _, bound = _runs(rows, kind, "bound")
        mean, low, high = mean_interval([slope(horizons, np.abs(run)) for run in violation])
        holds &= low >= -0.6 and high <= -0.4 and bool((violation <= bound).all())
        under = f"{np.mean(violation <= bound):.0%} under the bound"
        text.append(f"{kind}: slope {mean:.3f} [{low:.3f}, {high:.3f}], {under}")
    highest = max(r["price"] for r in rows if r["demand"] == "exact")
    return Verdict(bool(holds and highest == 0), "; ".join([*text, f"highest price of the exact game {highest:g}"]))


def draw(rows: list[Row]) -> Figure:
    """Violation over T with bound, error of the price, demand against price."""
    figure = Figure(figsize=(9.6, 3.2))
    left, middle, right = figure.subplots(1, 3)
    for kind in ("real", "integer"):
        horizons, violation = _runs(rows, kind, "violation")
        (line,) = left.loglog(horizons, np.abs(violation).mean(axis=0), "o-", label=f"{kind} counts")
        left.loglog(horizons, _runs(rows, kind, "bound")[1].mean(axis=0), ":", color=line.get_color())
        middle.loglog(horizons, _runs(rows, kind, "price_error")[1].mean(axis=0), "o-", label=f"{kind} counts")
        stairs = [r for r in rows if r["part"] == "stairs" and r["demand"] == kind and r["seed"] == rows[0]["seed"]]
        right.semilogx([r["price"] for r in stairs], [r["violation"] + BUDGET for r in stairs], label=f"{kind} counts")
    left.plot([], [], ":", color="#555555", label="bound (theorem 7)")
    left.set(xlabel="horizon T [steps]", ylabel="|mean violation| [rollouts / prompt]", title="From price 0")
    middle.set(xlabel="horizon T [steps]", ylabel="mean |mu / mu* of real counts − 1|", title="The price converges")
    right.axhline(BUDGET, color="#555555", linewidth=0.8, linestyle="--", label="mean budget")
    right.set(xlabel="price mu [variance / rollout]", ylabel="demand [rollouts / prompt]", title="A staircase")
    for axis in (left, middle, right):
        axis.legend()
    return figure
