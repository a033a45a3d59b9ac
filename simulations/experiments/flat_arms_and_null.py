"""F2: the published arm loss says nothing about n. F5: an exact budget alone moves rollouts to rare bins.

The claim was first stated for both arm losses below; the run refuted it for the second, so that it is stated for the
first, and the verdict reports both. `flat` is F2: a mean of n terms of the same mean. `drift` is what a second
mini-batch adds to first order, the pull w_n(p) p (1 - p) of std-normalised GRPO (F6), which does depend on n.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from gdro_core import (
    ExactPlay,
    PublishedRolloutGDRO,
    RolloutGDRO,
    allocation_marginals,
    gradient_weight,
    sqrt_allocation,
)
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict

CLAIM = "Fed with flat arm losses, the rollout bandit gets no nearer to the square-root law than a random allocation"
SOURCE = "F2, F5"
COLUMNS = {
    "seed": "population of bins and noise",
    "part": "bandit: allocations over rounds; tied: what equal scores give rare bins",
    "loss": "bandit: flat (mean of n equal terms) or drift (its mean follows -w_n(p) p (1 - p)); empty if tied",
    "method": "who allocates",
    "distance": "bandit: (V - V_law) / (V_uniform - V_law), V = sum q v / n over the last half: 1 uniform, 0 law",
    "prompt_share": "tied: share of prompts in the five rare bins",
    "rollout_share": "tied: their share of rollouts, expected over all feasible allocations",
}
SEEDS, BLOCK = 30, 5
BINS, BATCH, BUDGET, LOW, HIGH = 10, 256, 4, 2, 12
RATES = (np.arange(BINS) + 0.5) / BINS  # pass rate of a bin
RARE = (0.05, 0.10, 0.15, 0.20, 0.30, 0.40, 0.50)
METHODS = ("published", "bandit", "random", "variance")


def _play(method: str, loss: str, seed: int, rounds: int) -> float:
    """Distance from the square-root law, as in COLUMNS."""
    rng = np.random.default_rng([seed, METHODS.index(method), loss == "drift"])
    world = np.random.default_rng(seed)
    share, level = world.dirichlet(np.full(BINS, 2.0)), world.normal(0.0, 0.02, BINS)
    v = RATES * (1 - RATES)
    bandits = {"published": PublishedRolloutGDRO, "bandit": ExactPlay, "random": PublishedRolloutGDRO}
    law_of_posterior = RolloutGDRO(BUDGET, LOW, HIGH, per_bin=True)
    game = None if method == "variance" else bandits[method](BINS, BUDGET, LOW, HIGH)
    variances: list[list[float]] = []  # V of the counts, of the law, of uniform
    for t in range(rounds):
        bins = np.sort(world.choice(BINS, BATCH, p=share))
        if game is None:
            counts = law_of_posterior.counts(bins, 1e6 * RATES[bins], 1e6 * (1 - RATES[bins]), rng=rng)
        else:
            counts = game.counts(bins, rng=rng)
        law = sqrt_allocation(v[bins], BUDGET, lower=LOW, upper=HIGH)
        mean = level[bins]
        if loss == "drift":  # first order of the second mini-batch: all steps help, by the pull of n rollouts (F6)
            mean = mean - 0.05 * gradient_weight(counts, RATES[bins]) * v[bins]
        if game is not None and method != "random":  # `random` never learns: its scores stay tied
            game.observe(bins, counts, mean + rng.normal(0.0, 0.1, BATCH) / np.sqrt(counts))
        if t >= rounds // 2:
            variances.append([float((v[bins] / n).mean()) for n in (counts, law, np.full(BATCH, BUDGET))])
    reached, lawful, uniform = np.mean(variances, axis=0)
    return float((reached - lawful) / (uniform - lawful))


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Rounds of the four allocators, and the exact marginals of the tied dynamic program."""
    rows: list[Row] = []
    for seed in map(int, seeds):
        for loss in ("flat", "drift"):
            for method in METHODS:
                distance = _play(method, loss, seed, 20 if quick else 200)
                rows.append(
                    {"seed": seed, "part": "bandit", "loss": loss, "method": method, "distance": distance}
                    | {"prompt_share": "", "rollout_share": ""}
                )
        rng = np.random.default_rng([seed, 1])
        for rare in RARE:
            share = np.repeat([rare / 5, (1 - rare) / 5], 5)
            size = rng.multinomial(BATCH, share)
            arms = np.arange(LOW, HIGH + 1)
            law = allocation_marginals(np.zeros((BINS, arms.size)), size, BUDGET * BATCH, min_rollouts=LOW)
            spent = size * (law @ arms)
            rows.append(
                {"seed": seed, "part": "tied", "loss": "", "method": "dynamic program, equal scores", "distance": ""}
                | {"prompt_share": size[:5].sum() / BATCH, "rollout_share": float(spent[:5].sum() / spent.sum())}
            )
    return rows


def _distances(rows: list[Row], loss: str, method: str) -> np.ndarray:
    return np.array([r["distance"] for r in rows if (r["part"], r["loss"], r["method"]) == ("bandit", loss, method)])


def judge(rows: list[Row]) -> Verdict:
    """Flat loss, both feedbacks: not significantly nearer to the law than random; the variance utility is there."""
    holds, text = True, []
    for loss in ("flat", "drift"):
        for method in ("published", "bandit"):
            gain = _distances(rows, loss, "random") - _distances(rows, loss, method)
            mean, low, high = mean_interval(gain)
            holds &= low <= 0 or loss == "drift"
            text.append(f"{method}/{loss} nearer than random by {mean:.2f} [{low:.2f}, {high:.2f}]")
    control = np.mean(_distances(rows, "flat", "variance"))
    random = np.mean(_distances(rows, "flat", "random"))
    tied = [r for r in rows if r["part"] == "tied"][2 :: len(RARE)]
    share = [np.mean([r[key] for r in tied]) for key in ("prompt_share", "rollout_share")]
    text.append(f"distance of random {random:.2f}, of the variance utility {control:.2f} (law 0, uniform 1)")
    text.append(f"with tied scores {share[0]:.1%} of prompts get {share[1]:.1%} of rollouts")
    return Verdict(bool(holds and control < 0.2 and share[1] > share[0]), "; ".join(text))


def draw(rows: list[Row]) -> Figure:
    """Left: distance from the law. Right: share of rollouts over share of prompts with tied scores."""
    figure = Figure(figsize=(8.4, 3.4))
    left, right = figure.subplots(1, 2)
    names = {"published": "published\nbandit", "bandit": "exact\nbandit", "random": "random\nallocation"}
    names |= {"variance": "variance utility\n(this project)"}
    for shift, loss in ((-0.12, "flat"), (0.12, "drift")):
        intervals = np.array([mean_interval(_distances(rows, loss, method)) for method in METHODS])
        error = np.abs(intervals[:, 1:].T - intervals[:, 0])
        label = "flat arm loss (F2)" if loss == "flat" else "arm loss that drifts with the pull"
        left.errorbar(np.arange(4) + shift, intervals[:, 0], error, fmt="o", capsize=3, label=label)
    left.axhline(1, color="#555555", linewidth=0.8, linestyle="--", label="uniform n")
    left.axhline(0, color="#555555", linewidth=0.8, linestyle=":", label="square-root law")
    left.set_xticks(range(4), [names[method] for method in METHODS], fontsize=7.5)
    left.set(ylabel="excess variance (1 = that of uniform n)", title="Distance from the square-root law (mean, 95 %)")
    left.legend(loc="center right", bbox_to_anchor=(1.0, 0.45))
    tied = [r for r in rows if r["part"] == "tied"]
    right.plot([r["prompt_share"] for r in tied], [r["rollout_share"] for r in tied], ".", markersize=4)
    right.plot([0, 0.55], [0, 0.55], color="#555555", linewidth=0.8, linestyle="--", label="their share")
    right.set(xlabel="share of prompts in five rare bins", ylabel="their share of rollouts")
    right.set_title("Equal scores under an exact budget (F5)")
    right.legend()
    return figure
