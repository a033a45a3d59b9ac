"""Theorem 9: learning where samples are worth most, while sampling."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gdro_core import ClipOGD, PlugInNeyman, neyman_regret
from gdro_llm.intervals import slope_interval
from gdro_llm.measuring.tables import with_interval
from simulations.harness import Row, Verdict, table

CLAIM = "Clip-OGD's Neyman regret grows like √T, the plug-in's like log T, and uniform sampling's like T"
SOURCE = "Theorem 9"
COLUMNS = {
    "seed": "outcomes and samples",
    "design": "clip_ogd, plug_in or uniform",
    "horizon": "T [units]",
    "regret": "sum_t sum_b y^2 / p above the best fixed p in hindsight [squared outcome]",
}
SEEDS, BLOCK = 200, 50
SCALES = np.array([1.0, 0.25])  # outcomes are uniform on [0.5, 1] times these
HORIZONS = (250, 1000, 4000, 16000)
DESIGNS = ("clip_ogd", "plug_in", "uniform")


def _regrets(design: str, seeds: np.ndarray, horizon: int) -> np.ndarray:
    """(seeds,) one game per seed, all in step."""
    streams = [np.random.default_rng([int(seed), horizon, DESIGNS.index(design)]) for seed in seeds]
    y = np.array([np.random.default_rng([int(s), horizon]).uniform(0.5, 1.0, (horizon, 2)) for s in seeds]) * SCALES
    coin = np.array([stream.random(horizon) for stream in streams])
    p, rows = np.full(y.shape, 0.5), np.arange(seeds.size)
    clip, plug_in = ClipOGD(horizon, replicates=(seeds.size,)), PlugInNeyman(2, replicates=(seeds.size,))
    for t in range(horizon if design != "uniform" else 0):
        first = clip.probability if design == "clip_ogd" else plug_in.probabilities[:, 0]
        p[:, t] = np.stack([first, 1.0 - first], axis=1)
        second = (coin[:, t] >= first).astype(np.int64)
        if design == "clip_ogd":
            clip.update(1 - second, y[rows, t, second])
        else:
            plug_in.update(second, y[rows, t, second])
    return np.asarray(neyman_regret(p, y))


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Every design on the same outcomes, over horizons."""
    rows: list[Row] = []
    for design in DESIGNS:
        for horizon in HORIZONS[:2] if quick else HORIZONS:
            for seed, regret in zip(seeds, _regrets(design, seeds, horizon), strict=True):
                rows.append({"seed": int(seed), "design": design, "horizon": horizon, "regret": float(regret)})
    return rows


def judge(rows: list[Row]) -> Verdict:
    """Log-log slopes over T, seeds resampled: 1/2 ± 0.15, below 0.3 with equal steps per factor of 4, and 1."""
    slopes = {d: slope_interval(*table(rows, "regret", design=d), resamples=1000) for d in DESIGNS}
    text = [f"{design}: slope {with_interval(*slopes[design], '.3f')}" for design in DESIGNS]
    steps = np.diff(table(rows, "regret", design="plug_in")[1].mean(axis=0))
    text.append("plug-in adds " + ", ".join(f"{step:.1f}" for step in steps) + " per factor of 4 of T")
    _, low, high = slopes["clip_ogd"]
    holds = low >= 0.35 and high <= 0.65 and slopes["plug_in"][2] < 0.3 and abs(slopes["uniform"][1] - 1.0) < 0.05
    return Verdict(bool(holds and steps[-1] < 1.5 * steps[0]), "; ".join(text))


def draw(rows: list[Row]) -> Figure:
    """Mean regret with the 10-90 % band over seeds."""
    figure = Figure(figsize=(5.6, 3.4))
    axis = figure.subplots()
    labels = {"clip_ogd": "Clip-OGD (√T)", "plug_in": "plug-in with floor (log T)", "uniform": "uniform sampling (T)"}
    for design in DESIGNS:
        horizons, regret = table(rows, "regret", design=design)
        (line,) = axis.loglog(horizons, regret.mean(axis=0), "o-", label=labels[design])
        axis.fill_between(horizons, *np.quantile(regret, [0.1, 0.9], axis=0), alpha=0.15, color=line.get_color())
    axis.set(xlabel="horizon T [units]", ylabel="Neyman regret [squared outcome]")
    axis.set_title("Regret against the best fixed allocation")
    axis.legend()
    return figure
