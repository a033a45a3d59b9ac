"""F6, theorem 10: under std-normalised GRPO the number of rollouts is also a weight of the prompt."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gdro_core import GDROController, OnlineDifficultyClassifier, RolloutGDRO, gradient_weight
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict

CLAIM = "n rollouts pull a prompt by w_n(p): from n = 2 to 12 up to threefold; preserve_objective takes that out again"
SOURCE = "F6, theorem 10"
COLUMNS = {
    "seed": "repetition",
    "part": "pull: Monte Carlo over groups; controller: a batch planned with square-root counts",
    "estimator": "grpo, dr_grpo, rloo; for the controller plain or preserved",
    "rollouts": "n of the group; empty for the controller",
    "pass_rate": "p; empty for the controller",
    "pull": "mean gradient / grad p (1); controller: spread (std of log) of the pull relative to n_bar rollouts each",
    "theory": "w_n(p) (1); controller: 0",
    "error": "standard error of the pull (1); empty for the controller",
}
SEEDS, BLOCK = 20, 5
RATES, COUNTS, ESTIMATORS = (0.05, 0.2, 0.5), tuple(range(2, 17)), ("grpo", "dr_grpo", "rloo")
BUDGET = 4


def _pull(estimator: str, n: int, p: float, groups: int, rng: np.random.Generator) -> tuple[float, float]:
    """Policy sigmoid(theta) over two answers: score z = r - p, grad p = p (1 - p). Mean and standard error."""
    reward = (rng.random((groups, n)) < p).astype(float)
    centred = reward - reward.mean(axis=1, keepdims=True)
    deviation = reward.std(axis=1, keepdims=True)
    scale = {"grpo": np.where(deviation > 0, deviation, np.inf), "dr_grpo": np.ones(1), "rloo": np.full(1, 1 - 1 / n)}
    gradient = (centred / scale[estimator] * (reward - p)).mean(axis=1) / (p * (1 - p))
    return float(gradient.mean()), float(gradient.std(ddof=1) / np.sqrt(groups))


def _spread(preserve: bool, seed: int, visits: int) -> float:
    """How far the pulls of a batch are from those of n_bar rollouts each, up to a common factor."""
    rng = np.random.default_rng([seed, 7])
    p = rng.uniform(0.02, 0.98, 128)
    controller = GDROController(
        OnlineDifficultyClassifier(discount=1.0),
        rollout=RolloutGDRO(BUDGET, 2, 12),
        preserve_objective=preserve,
        seed=seed,
    )
    for _ in range(visits):
        plan = controller.plan(range(p.size))
        controller.observe(plan, rng.random(plan.counts.sum()) < p[plan.owner])
    plan = controller.plan(range(p.size))
    pull = plan.weights * gradient_weight(plan.counts, p) / gradient_weight(BUDGET, p)
    return float(np.log(pull).std())


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Groups of a two-answer policy, and a controller after many visits."""
    rows: list[Row] = []
    for seed in map(int, seeds):
        rng = np.random.default_rng(seed)
        for estimator in ESTIMATORS:
            for n in COUNTS[:: 7 if quick else 1]:
                for p in RATES:
                    pull, error = _pull(estimator, n, p, 500 if quick else 20000, rng)
                    theory = float(gradient_weight(n, p, estimator))
                    row: Row = {"seed": seed, "part": "pull", "estimator": estimator, "rollouts": n, "pass_rate": p}
                    rows.append(row | {"pull": pull, "theory": theory, "error": error})
        for name in ("plain", "preserved"):
            spread = _spread(name == "preserved", seed, 10 if quick else 100)
            row = {"seed": seed, "part": "controller", "estimator": name, "rollouts": "", "pass_rate": ""}
            rows.append(row | {"pull": spread, "theory": 0.0, "error": ""})
    return rows


def _cell(rows: list[Row], estimator: str, n: int, p: float, key: str) -> float:
    """Mean over seeds."""
    return float(
        np.mean([r[key] for r in rows if (r["estimator"], r["rollouts"], r["pass_rate"]) == (estimator, n, p)])
    )


def judge(rows: list[Row]) -> Verdict:
    """Monte Carlo within 4.5 standard errors of w_n(p) everywhere; preserved spread far below the plain one."""
    worst, seeds = 0.0, len({r["seed"] for r in rows})
    counts = sorted({r["rollouts"] for r in rows if r["part"] == "pull"})
    for estimator in ESTIMATORS:
        for n in counts:
            for p in RATES:
                pull, theory, error = (_cell(rows, estimator, n, p, key) for key in ("pull", "theory", "error"))
                gap = abs(pull - theory) / max(error / np.sqrt(seeds), 1e-9)  # n = 2 has no noise at all
                worst = max(worst, gap)
    spread = {name: np.array([r["pull"] for r in rows if r["estimator"] == name]) for name in ("plain", "preserved")}
    mean, low, high = mean_interval(spread["plain"] - spread["preserved"])
    ratio = gradient_weight(12, 0.05) / gradient_weight(2, 0.05)
    text = (
        f"largest deviation from w_n(p) {worst:.1f} standard errors over {len(counts) * 9} cells; "
        f"w_12/w_2 = {ratio:.2f} at p = .05; spread of the pull {spread['plain'].mean():.3f} plain, "
        f"{spread['preserved'].mean():.3f} preserved, difference {mean:.3f} [{low:.3f}, {high:.3f}]"
    )
    return Verdict(bool(worst < 4.5 and low > 0 and spread["preserved"].mean() < 0.5 * spread["plain"].mean()), text)


def draw(rows: list[Row]) -> Figure:
    """Left: curves and Monte Carlo. Right: spread of the pull, plain and preserved."""
    figure = Figure(figsize=(8.4, 3.3))
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    counts = sorted({r["rollouts"] for r in rows if r["part"] == "pull"})
    for p in RATES:
        (line,) = left.plot(COUNTS, gradient_weight(np.array(COUNTS), p), label=f"GRPO w_n, p = {p:g}")
        pulls = [_cell(rows, "grpo", n, p, "pull") for n in counts]
        left.plot(counts, pulls, "o", markersize=4, color=line.get_color())
    for estimator, label in (("dr_grpo", "Dr.GRPO (n − 1)/n"), ("rloo", "RLOO 1")):
        (line,) = left.plot(COUNTS, gradient_weight(np.array(COUNTS), 0.2, estimator), "--", label=label)
        pulls = [_cell(rows, estimator, n, 0.2, "pull") for n in counts]
        left.plot(counts, pulls, "s", markersize=3, color=line.get_color())
    left.set(xlabel="rollouts n of the prompt", ylabel="pull: mean gradient / ∇p", title="Dots: Monte Carlo")
    left.legend()
    for x, name in enumerate(("plain", "preserved")):
        values = np.array([r["pull"] for r in rows if r["estimator"] == name])
        right.plot(np.full(values.size, x) + np.linspace(-0.1, 0.1, values.size), values, ".")
    right.set_xticks([0, 1], ["n ∝ √v", "n ∝ √v and\npreserve_objective"])
    right.set(xlim=(-0.5, 1.5), ylim=(0, None), ylabel="std of log(pull / pull at n̄)", title="A planned batch")
    return figure
