"""Classifiers and allocators judged on the accuracy traces of a real GRPO run, without any counterfactual of learning.

A prompt's visit t was 8 rollouts, c of them right, whatever the past says. So what a rule decides from visits before t
can be scored at visit t without bias: an accuracy by its error, and an allocation of 2 <= n <= 8 rollouts by

    P(group of n is mixed):  1 - (C(c, n) + C(8 - c, n)) / C(8, n);   P(any right):  1 - C(8 - c, n) / C(8, n);
    p (1 - p) / n:  c (8 - c) / (56 n)

A controller plays from visit to visit, in batches: it observes as many of a visit's 8 rollouts as it plans, drawn at
random, and its plan is scored at that visit. How training would have gone on with other rollouts is not in the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import comb

from gdro_core import (
    HIT,
    MIXED,
    VARIANCE,
    AnyOfN,
    GDROController,
    Observation,
    OnlineDifficultyClassifier,
    PassAtK,
    RolloutGDRO,
    Utility,
)
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict

CLAIM = (
    "On a real run the recommended classifier predicts the next visit better than the published one, its posterior "
    "finds more mixed groups than uniform allocation at the same budget, and so does what the recommended controller "
    "plays, with less loss weight on prompts that are never solved"
)
SOURCE = "§3.1, F2, F10; traces"
COLUMNS = {
    "seed": "random half of the prompts that is scored; bin means come from the other half",
    "rule": "classifier, allocator, or controller that plays",
    "measure": "mse, log_loss [nats / rollout] of the next accuracy; flips: share of prompts that change bin a visit; "
    "mixed, hit: share of groups that would be mixed / have a right answer; variance: mean p (1 - p) / n; of "
    "controllers mixed_groups: share of the groups drawn; mixed_prompts: of the prompts; unsolved_weight: share of the "
    "loss weight n w on prompts with 0 of 8 right",
    "value": "mean over prompts and visits",
}
SEEDS, BLOCK = 60, 60
NEEDS_DATA = True
VISITS, FIRST, GROUP = 44, 5, 8  # every trace has 44 visits; scored from visit FIRST on (0-based)
BUDGET, LEAST, MOST = 4, 2, 8
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "recommended: d .8": {},
    "d .25": {"discount": 0.25},
    "d .7": {"discount": 0.7},
    "d .5": {"discount": 0.5},
    "d .9": {"discount": 0.9},
    "d 1": {"discount": 1.0},
    "d .8, hysteresis .03": {"hysteresis": 0.03},
    "confidence .1": {"discount": 1.0, "confidence": 0.1},
    "pass@8": {"statistic": PassAtK(8)},
    "published: any of 8": {"statistic": AnyOfN(100), "hysteresis": 0.03},
}
ALLOCATORS = {"uniform": VARIANCE, "null": VARIANCE, "Neyman": VARIANCE, "mixed": MIXED, "hit": HIT}

BATCH = 100
PLAYERS: dict[str, Callable[[int], GDROController]] = {
    "uniform plays": lambda seed: GDROController.uniform(BUDGET, seed=seed),
    "joint plays": lambda seed: GDROController.joint_play(BUDGET, LEAST, MOST, seed=seed),
    "recommended plays": lambda seed: GDROController.recommended(BUDGET, max_rollouts=MOST, seed=seed),
}


@cache
def traces() -> NDArray[np.int64]:
    """(prompts, VISITS) right answers of 8 at the first visits of each prompt."""
    folder = os.environ.get("GDRO_DATA_DIR")
    if not folder:
        raise ValueError("GDRO_DATA_DIR must name the folder of grpo_accuracy_traces.jsonl, got nothing")
    with (Path(folder) / "grpo_accuracy_traces.jsonl").open(encoding="utf-8") as file:
        accuracy = np.array([json.loads(line)["accuracy"][:VISITS] for line in file])
    return np.asarray(np.rint(accuracy * GROUP), dtype=np.int64)


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Every classifier runs once through all prompts; a seed only decides which half is scored."""
    right = traces()[:, : 10 if quick else VISITS]
    ids = np.arange(right.shape[0])
    splits = [np.random.default_rng(seed).permutation(ids.size) < ids.size // 2 for seed in seeds]
    scores: dict[tuple[int, str, str], list[float]] = {}

    def note(seed: int, rule: str, **measures: float) -> None:
        for measure, value in measures.items():
            scores.setdefault((int(seed), rule, measure), []).append(float(value))

    for seed, scored in zip(seeds, splits, strict=True):
        for name, build in PLAYERS.items():
            for measures in _played(build(int(seed)), right[scored], np.random.default_rng(seed)):
                note(seed, name, **measures)
    for rule, options in CLASSIFIERS.items():
        classifier = OnlineDifficultyClassifier(**options)
        before = np.full(ids.size, -1)
        for t in range(right.shape[1]):
            bins = classifier.bins(ids)
            if t >= FIRST:
                a, b = classifier.posterior(ids)
                for seed, scored in zip(seeds, splits, strict=True):
                    note(seed, rule, **_prediction(bins, right[:, t], scored), flips=np.mean(bins != before))
                    if rule.startswith("recommended"):
                        for name, utility in ALLOCATORS.items():
                            counts = _counts(name, utility, bins[scored], a[scored], b[scored], [int(seed), t])
                            note(seed, name, **_groups(counts, right[scored, t]))
            classifier.observe(ids, right[:, t], np.full(ids.size, GROUP))
            before = bins
    return [
        {"seed": seed, "rule": rule, "measure": measure, "value": float(np.mean(values))}
        for (seed, rule, measure), values in scores.items()
    ]


def _played(
    controller: GDROController, right: NDArray[np.int64], rng: np.random.Generator
) -> Iterator[dict[str, float]]:
    """Measures of every plan from visit FIRST on, over one epoch of batches a visit."""
    for t in range(right.shape[1]):
        order = rng.permutation(right.shape[0])
        for rows in np.array_split(order, max(1, order.size // BATCH)):
            hits = right[rows, t]
            plan = controller.plan(rows.tolist())
            n, weight = plan.counts, plan.counts * plan.weights
            if t >= FIRST:
                mixed = 1.0 - (comb(hits, n) + comb(GROUP - hits, n)) / comb(GROUP, n)
                mixed = np.where(n > 0, mixed, 0.0)
                yield {
                    "mixed_groups": float(mixed.sum() / (n > 0).sum()),
                    "mixed_prompts": float(mixed.mean()),
                    "unsolved_weight": float(weight[hits == 0].sum() / weight.sum()),
                }
            controller.observe(plan, Observation(plan, rng.hypergeometric(hits, GROUP - hits, n).astype(float), n))


def _prediction(bins: NDArray[np.int64], right: NDArray[np.int64], scored: NDArray[np.bool_]) -> dict[str, float]:
    """Error of a bin's mean accuracy in the other half (plus half a right and half a wrong rollout) as a prediction."""
    size = GROUP * np.bincount(bins[~scored], minlength=10)
    rate = (np.bincount(bins[~scored], right[~scored], minlength=10) + 0.5) / (size + 1.0)
    p, accuracy = rate[bins[scored]], right[scored] / GROUP
    log_loss = -accuracy * np.log(p) - (1.0 - accuracy) * np.log1p(-p)
    return {"mse": float(((accuracy - p) ** 2).mean()), "log_loss": float(log_loss.mean())}


def _counts(
    name: str,
    utility: Utility,
    bins: NDArray[np.int64],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    seed: list[int],
) -> NDArray[np.int64]:
    if name == "uniform":
        return np.full(bins.size, BUDGET)
    game = RolloutGDRO(BUDGET, LEAST, MOST, utility, permute=name == "null")
    return game.counts(bins, a, b, rng=np.random.default_rng(seed))


def _groups(counts: NDArray[np.int64], right: NDArray[np.int64]) -> dict[str, float]:
    """Unbiased for groups of `counts` rollouts at the same policy."""
    all_wrong = comb(GROUP - right, counts) / comb(GROUP, counts)
    all_right = comb(right, counts) / comb(GROUP, counts)
    variance = right * (GROUP - right) / (GROUP * (GROUP - 1.0)) / counts
    return {
        "mixed": float(1.0 - (all_wrong + all_right).mean()),
        "hit": float(1.0 - all_wrong.mean()),
        "variance": float(variance.mean()),
    }


def _values(rows: list[Row], rule: str, measure: str) -> NDArray[np.float64]:
    return np.array([row["value"] for row in rows if (row["rule"], row["measure"]) == (rule, measure)])


def judge(rows: list[Row]) -> Verdict:
    """Over splits: log loss recommended below published, mixed groups above uniform and above the null."""
    ours, published = "recommended: d .8", "published: any of 8"
    loss = mean_interval(_values(rows, ours, "log_loss") - _values(rows, published, "log_loss"))
    error = mean_interval(_values(rows, ours, "mse") - _values(rows, published, "mse"))
    gain = {
        name: mean_interval(_values(rows, "mixed", "mixed") - _values(rows, name, "mixed"))
        for name in ("uniform", "null")
    }
    play = {
        measure: mean_interval(_values(rows, "recommended plays", measure) - _values(rows, "uniform plays", measure))
        for measure in ("mixed_groups", "mixed_prompts", "unsolved_weight")
    }
    holds = loss[2] < 0 and error[2] < 0 and all(low > 0 for _, low, _ in gain.values())
    holds &= play["mixed_groups"][1] > 0 and play["unsolved_weight"][2] < 0
    shares = {name: ", ".join(f"{_values(rows, name, measure).mean():.3f}" for measure in play) for name in PLAYERS}
    best = min(CLASSIFIERS, key=lambda rule: _values(rows, rule, "log_loss").mean())
    findings = [
        f"log loss {loss[0]:+.4f} [{loss[1]:+.4f}, {loss[2]:+.4f}]",
        f"MSE {error[0]:+.5f} [{error[1]:+.5f}, {error[2]:+.5f}] against the published bins",
        *(f"mixed groups {g:+.3f} [{lo:+.3f}, {hi:+.3f}] over {name}" for name, (g, lo, hi) in gain.items()),
        f"least log loss: {best}",
        *(
            f"recommended plays {measure} {g:+.3f} [{lo:+.3f}, {hi:+.3f}] over uniform"
            for measure, (g, lo, hi) in play.items()
        ),
        *(f"{name} {text} ({', '.join(play)})" for name, text in shares.items()),
    ]
    return Verdict(holds, "; ".join(findings) + " (intervals over random halves of one run)")


def draw(rows: list[Row]) -> Figure:
    """Classifiers by log loss and bin flips; allocators by what their groups would have been."""
    figure = Figure(figsize=(7.4, 3.6))
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.2, 0.8, 1.4])
    order = sorted(CLASSIFIERS, key=lambda rule: -_values(rows, rule, "log_loss").mean())
    for axis, measure, title in ((left, "log_loss", "Log loss, next visit"), (middle, "flips", "Bin flips / visit")):
        axis.plot([_values(rows, rule, measure).mean() for rule in order], order, "o")
        axis.set(title=title)
    middle.set_yticklabels([])
    for shift, (measure, label) in enumerate((("mixed", "mixed"), ("hit", "any right"), ("variance", "Σ p(1−p)/n"))):
        base = _values(rows, "uniform", measure).mean()
        ratio = [_values(rows, name, measure).mean() / base for name in ALLOCATORS]
        right.plot(np.arange(len(ALLOCATORS)) + 0.15 * (shift - 1), ratio, "o", label=label)
    right.set_xticks(range(len(ALLOCATORS)), list(ALLOCATORS), rotation=30)
    right.set(ylim=(0.6, 1.5), title="Groups at mean 4 / uniform")
    right.axhline(1.0, color="black", linewidth=0.8)
    right.legend(loc="upper left")
    return figure
