"""The traveling wave (Figures 3, 7, 9): data, weights and rollouts over difficulty bins while the policy learns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from gdro_core import GDROController, Planner, PublishedController
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict
from simulations.population import SkillPopulation, train

CLAIM = (
    "Recommended weights lean to harder bins than the data in every third of the run, by at least half a bin (Eq. 32); "
    "the published ones lean by less"
)
SOURCE = "Eq. 32; Figures 3, 7, 9"
COLUMNS = {
    "seed": "population and run, the same for all controllers",
    "controller": "joint play, published prompt game or published rollout game",
    "step": "last step of a window of 10; the row is the mean over the window",
    "bin": "difficulty bin of the controller's own classifier, 0 the hardest; rows only for bins with prompts",
    "share": "of the prompts drawn and seen before",
    "weight": "mean weight of the bin's prompts over the mean weight of all seen",
    "rollouts": "mean rollouts of the bin's prompts",
    "lead_lag": "mean bin under the weights minus under the data, Eq. 32 [bins]; the same in all rows of a window",
    "rollout_lead_lag": "mean bin under the rollouts minus under the data [bins]; the same in all rows of a window",
}
SEEDS, BLOCK = 20, 5
BUDGET, BINS, WINDOW = 4, 10, 10
CONTROLLERS: dict[str, Callable[[int], Planner]] = {
    "joint play": lambda seed: GDROController.joint_play(BUDGET, seed=seed),
    "published prompt": lambda seed: PublishedController(BUDGET, seed=seed),
    "published rollout": lambda seed: PublishedController(BUDGET, prompt=False, rollout=True, seed=seed),
}


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """500 calibrated steps, normalised; windows before every prompt was seen once are left out."""
    rows: list[Row] = []
    steps, prompts, batch = (60, 120, 12) if quick else (500, 600, 60)
    for seed in seeds.tolist():
        for name, controller in CONTROLLERS.items():
            rate = 0.0108 * 500 / steps
            population = SkillPopulation(seed, prompts=prompts, learning_rate=rate, normalised=True)
            run = train(population, controller(seed), steps, batch, BUDGET, seed)
            for end in range(2 * WINDOW, steps + 1, WINDOW):
                plans = [step["plan"] for step in run[end - WINDOW : end]]
                bins = np.concatenate([plan.bins for plan in plans])
                weights = np.concatenate([plan.weights for plan in plans])[bins >= 0]
                counts = np.concatenate([plan.counts for plan in plans])[bins >= 0]
                bins = bins[bins >= 0]
                leads = {
                    "lead_lag": float(np.average(bins, weights=weights) - bins.mean()),
                    "rollout_lead_lag": float(np.average(bins, weights=counts) - bins.mean()),
                }
                for b in np.unique(bins).tolist():
                    in_bin = bins == b
                    measured = {
                        "share": float(in_bin.mean()),
                        "weight": float(weights[in_bin].mean() / weights.mean()),
                        "rollouts": float(counts[in_bin].mean()),
                    }
                    rows.append({"seed": seed, "controller": name, "step": end, "bin": b} | measured | leads)
    return rows


def _lead(rows: list[Row], controller: str, key: str) -> np.ndarray:
    """(seeds, windows) lead-lag."""
    seeds, steps = sorted({row["seed"] for row in rows}), sorted({row["step"] for row in rows})
    value_of = {(row["seed"], row["step"]): row[key] for row in rows if row["controller"] == controller}
    return np.array([[value_of[seed, step] for step in steps] for seed in seeds])


def judge(rows: list[Row]) -> Verdict:
    """Intervals over seeds of the lead-lag in each third, and of its difference to the published prompt game's."""
    ours, published = (_lead(rows, name, "lead_lag") for name in ("joint play", "published prompt"))
    holds, findings = True, []
    thirds = zip(np.array_split(ours, 3, axis=1), np.array_split(published, 3, axis=1), strict=True)
    for third, (mine, theirs) in enumerate(thirds, start=1):
        mean, low, high = mean_interval(mine.mean(axis=1))
        other, other_low, other_high = mean_interval(theirs.mean(axis=1))
        closer = mean_interval(np.abs(mine).mean(axis=1) - np.abs(theirs).mean(axis=1))
        holds &= high <= -0.5 and closer[1] > 0
        findings.append(
            f"third {third}: joint play {mean:+.2f} [{low:+.2f}, {high:+.2f}], "
            f"published {other:+.2f} [{other_low:+.2f}, {other_high:+.2f}]"
        )
    for name in ("joint play", "published rollout"):
        mean, low, high = mean_interval(_lead(rows, name, "rollout_lead_lag").mean(axis=1))
        findings.append(f"rollouts of {name} {mean:+.2f} [{low:+.2f}, {high:+.2f}]")
    return Verdict(bool(holds), "lead-lag in bins: " + "; ".join(findings))


def draw(rows: list[Row]) -> Figure:
    """Heat maps bin x step of share, weight and rollouts (white: no prompts), and the lead-lag below."""
    figure = Figure(figsize=(8.4, 8.4))
    axes = figure.subplots(4, len(CONTROLLERS), sharex=True, height_ratios=[1, 1, 1, 0.7])
    steps = sorted({row["step"] for row in rows})
    scales = {"share": (0.0, 0.4, "viridis"), "weight": (0.0, 2.0, "RdBu_r"), "rollouts": (2.0, 6.0, "RdBu_r")}
    for column, name in enumerate(CONTROLLERS):
        mine = [row for row in rows if row["controller"] == name]
        for line, (key, (low, high, colours)) in enumerate(scales.items()):
            total, size = np.zeros((BINS, len(steps))), np.zeros((BINS, len(steps)))
            for row in mine:
                cell = row["bin"], steps.index(row["step"])
                total[cell] += row[key]
                size[cell] += 1
            size = np.maximum(size, 1) if key == "share" else size
            picture = np.ma.masked_array(total / np.maximum(size, 1), mask=size == 0)
            axis = axes[line, column]
            extent = (steps[0] - WINDOW, steps[-1], -0.5, BINS - 0.5)
            image = axis.imshow(
                picture, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high, cmap=colours
            )
            axis.grid(False)
            axis.set(title=name if line == 0 else "", ylabel=f"{key}\nbin (0 hardest)" if column == 0 else "")
            if column == len(CONTROLLERS) - 1:
                figure.colorbar(image, ax=axis)
        for key, label in (("lead_lag", "weights"), ("rollout_lead_lag", "rollouts")):
            lead = _lead(rows, name, key)
            (drawn,) = axes[3, column].plot(steps, lead.mean(axis=0), label=label)
            axes[3, column].fill_between(
                steps, *np.quantile(lead, [0.1, 0.9], axis=0), alpha=0.15, color=drawn.get_color()
            )
        axes[3, column].axhline(0.0, color="black", linewidth=0.8)
        axes[3, column].set(xlabel="step", ylim=(-3, 2), ylabel="lead-lag [bins]" if column == 0 else "")
    axes[3, 0].legend()
    return figure
