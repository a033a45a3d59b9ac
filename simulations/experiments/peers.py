"""Every peer and every controller at equal total rollouts, on the calibrated population and three stressed ones.

The calibrated run is 500 steps; here it is 100 steps of five times the learning rate, the same way in fewer batches, so
that a prompt is visited ten times. Metrics are interpolated at the rollouts of the uniform run. With plain gradient
steps a method that picks prompts of large gradient also takes longer steps; with `normalised steps` every update has
the same length, as under a normalising optimizer: a method then wins by direction and by low noise alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gdro_llm.intervals import ENDS, mean_interval, resampled_rows
from gdro_llm.measuring.tables import markdown, with_interval
from simulations.harness import Row, Verdict
from simulations.peers import PEERS
from simulations.population import SkillPopulation
from simulations.race import own_stream, race

CLAIM = "At equal total rollouts the joint controller ends with the highest pass@8 of all methods, on every population"
SOURCE = "theory §4"
COLUMNS = {
    "seed": "population, batches and outcomes",
    "population": "calibrated; heavy tail: 1.5 degrees of freedom; noisy verifier: 10 % errors; normalised steps",
    "method": "name in simulations.peers",
    "pass_at_8": "held-out, at the uniform run's rollouts (1)",
    "mean_at_8": "held-out mean pass rate, there (1)",
    "worst": "held-out mean pass rate of the hardest group, there (1)",
    "rollouts_to_uniform": "rollouts until the uniform run's final pass@8 is first reached; empty if it never is",
    "mixed": "share of groups drawn that have both outcomes, mean over steps (1)",
    "steps": "batches drawn",
}
SEEDS, BLOCK = 50, 2
MEAN = 8
POPULATIONS: dict[str, dict[str, Any]] = {
    "calibrated": {},
    "heavy tail": {"tail": 1.5},
    "noisy verifier": {"false_positive": 0.1, "false_negative": 0.1},
    "normalised steps": {"normalised": True},
}
SHARES = {
    "pass_at_8": "pass@8 [%]",
    "mean_at_8": "mean@8 [%]",
    "worst": "worst group [%]",
    "mixed": "mixed groups [%]",
}
OURS = ("recommended prompt", "recommended rollout", "joint", "joint, objective preserved")


def _run(name: str, method: str, seed: int, steps: int, prompts: int, batch: int) -> list[Row]:
    population = SkillPopulation(seed, prompts=prompts, held_out=prompts // 3, **POPULATIONS[name])
    population.learning_rate *= 5.0
    return race(population, PEERS[method](population, MEAN, own_stream(seed)), steps * batch * MEAN, batch, seed)


def _first_reach(rollouts: np.ndarray, values: np.ndarray, target: float) -> float | str:
    """Linear interpolation of the first crossing."""
    above = np.flatnonzero(values >= target)
    if above.size == 0:
        return ""
    k = int(above[0])
    if k == 0:
        return float(rollouts[0])
    return float(np.interp(target, values[k - 1 : k + 1], rollouts[k - 1 : k + 1]))


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Every method on the same populations, batches and streams."""
    steps, prompts, batch = (3, 60, 20) if quick else (100, 1200, 120)
    total = steps * batch * MEAN
    rows: list[Row] = []
    for seed in map(int, seeds):
        for name in POPULATIONS:
            target = 0.0
            for method in PEERS:
                run = _run(name, method, seed, steps, prompts, batch)
                spent = np.array([r["rollouts"] for r in run], dtype=float)
                curves = {k: np.array([r[k] for r in run]) for k in ("pass_at_8", "mean_at_8", "worst")}
                end = {key: float(np.interp(total, spent, curve)) for key, curve in curves.items()}
                target = end["pass_at_8"] if method == "uniform" else target
                reached = _first_reach(spent, curves["pass_at_8"], target)
                row: Row = {"seed": seed, "population": name, "method": method, **end, "rollouts_to_uniform": reached}
                rows.append(row | {"mixed": float(np.mean([r["mixed"] for r in run[1:]])), "steps": len(run) - 1})
    return rows


def differences(rows: list[Row], population: str, key: str = "pass_at_8") -> dict[str, np.ndarray]:
    """Per method (seeds,) value minus that of uniform."""
    values = {m: np.array([r[key] for r in rows if (r["population"], r["method"]) == (population, m)]) for m in PEERS}
    return {method: value - values["uniform"] for method, value in values.items()}


def tabulate(rows: list[Row]) -> str:
    """A section a population: means over seeds, with the mean difference from uniform and its paired 95 % interval.

    Rollouts are the median over seeds of those to the uniform run's final pass@8, over its own; a run that never gets
    there counts as infinitely many, and is missing from `reached`.
    """
    header = ["method", *SHARES.values(), "rollouts to uniform's pass@8 [× uniform's]", "reached"]
    text = ["# Methods at equal total rollouts", (tabulate.__doc__ or "").replace("\n    ", "\n").strip()]
    for population in dict.fromkeys(row["population"] for row in rows):
        lines = [header]
        mine = [row for row in rows if row["population"] == population]
        by_method = {m: [row for row in mine if row["method"] == m] for m in dict.fromkeys(r["method"] for r in mine)}
        own = np.array([row["rollouts_to_uniform"] for row in by_method["uniform"]], dtype=float)
        for method, runs in by_method.items():
            cells = []
            for key in SHARES:
                values, base = (100 * np.array([r[key] for r in group]) for group in (runs, by_method["uniform"]))
                mean, low, high = mean_interval(values - base)
                against = "" if method == "uniform" else f" ({with_interval(mean, low, high, '+.2f')})"
                cells.append(f"{values.mean():.2f}{against}")
            needed = np.array([np.inf if r["rollouts_to_uniform"] == "" else r["rollouts_to_uniform"] for r in runs])
            median = [f"{x:.2f}" if np.isfinite(x) else "never" for x in _median(needed / own)]
            cells += [f"{median[0]} [{median[1]}, {median[2]}]", f"{np.isfinite(needed).sum()} of {len(runs)}"]
            lines.append([method, *cells])
        text += [f"## {population}, {own.size} seeds", markdown(lines, "<" * len(header))]
    return "\n\n".join(text) + "\n"


def _median(values: np.ndarray) -> np.ndarray:
    """Median and its 95 % bootstrap interval (fixed resampling seed); values may be infinite."""
    medians = np.quantile(values[resampled_rows(values.size, 2000)], 0.5, axis=1, method="inverted_cdf")
    ends = np.quantile(medians, ENDS, method="inverted_cdf")
    return np.array([np.quantile(values, 0.5, method="inverted_cdf"), *ends])


def judge(rows: list[Row]) -> Verdict:
    """Joint above the best of the others by its paired interval, everywhere; who beats uniform (95 % pointwise)."""
    holds, text = True, []
    for population in POPULATIONS:
        gains = differences(rows, population)
        others = {m: d for m, d in gains.items() if m not in ("joint", "Neyman oracle")}
        best = max(others, key=lambda m: float(others[m].mean()))
        mean, low, high = mean_interval(100 * (gains["joint"] - gains[best]))
        holds &= low > 0
        winners = {m: 100 * d.mean() for m, d in gains.items() if m != "uniform" and mean_interval(d)[1] > 0}
        ranked = sorted(winners, key=lambda m: -winners[m])
        beat = ", ".join(f"{m} {winners[m]:+.2f}" for m in ranked) or "nobody"
        mine, below, above = mean_interval(100 * gains["joint"])
        text.append(
            f"{population}: joint {mine:+.2f} [{below:.2f}, {above:.2f}] points against uniform, {mean:+.2f} "
            f"[{low:.2f}, {high:.2f}] against {best}; above uniform: {beat}"
        )
    return Verdict(bool(holds), "; ".join(text))


def draw(rows: list[Row]) -> Figure:
    """Paired differences from uniform with 95 % intervals."""
    figure = Figure(figsize=(11.0, 6.0))
    axes = figure.subplots(1, len(POPULATIONS), sharey=True)
    methods = [m for m in PEERS if m != "uniform"]
    for axis, population in zip(axes, POPULATIONS, strict=True):
        gains = differences(rows, population)
        for ours in (False, True):
            rows_of = [k for k, m in enumerate(methods) if (m in OURS) == ours]
            dots = np.array([mean_interval(100 * gains[methods[k]]) for k in rows_of])
            error = np.abs(dots[:, 1:].T - dots[:, 0])
            label = "this project" if ours else "peers"
            axis.errorbar(dots[:, 0], rows_of, xerr=error, fmt="o", markersize=4, capsize=2, label=label)
        axis.axvline(0, color="#555555", linewidth=0.8, linestyle="--", label="uniform")
        axis.set_xscale("symlog", linthresh=0.5)  # linear within half a point
        axis.set_xticks([-5, -1, -0.25, 0.25, 1, 5], ["−5", "−1", "−¼", "¼", "1", "5"])
        axis.set_xticks([], minor=True)
        axis.set(xlabel="pass@8 minus uniform's [points]", title=population, xlim=(-10, 10))
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
