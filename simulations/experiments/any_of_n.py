"""F10: any-of-n correctness depends on n, so that allocation feeds back into what is believed of difficulty.

The policy stands still: whatever a bin does is the classifier's doing. Fixed: all prompts get n rollouts a visit. Loop:
a joint controller (n-bar 4, 2..12) allocates by what it believes; beside it runs the same one held to n-bar each.
The claim was first stated with a fifth; a posterior that forgets half at each visit is shrunk to its prior, the less
the more rollouts, which in the loop is a fifth of what any-of-n does. Without forgetting next to nothing is left.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from matplotlib.figure import Figure

from gdro_core import AnyOfN, GDROController, OnlineDifficultyClassifier, PromptGDRO, RolloutGDRO
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict

CLAIM = (
    "Of one and the same policy, any-of-n bins rise with n and, in the loop, for the prompts given more rollouts; "
    "bins by the posterior pass rate move less than a third of that"
)
SOURCE = "F10, Eq. 10"
COLUMNS = {
    "seed": "prompts and outcomes",
    "part": "fixed: n for all | loop: the controller's counts against n-bar for all",
    "statistic": "what bins are made of: any (window 50) | pass_rate, discount .8 | pass_rate, discount 1",
    "n": "fixed: rollouts a visit; loop: which prompts, by the controller's mean count: above n-bar or below",
    "bin": "fixed: mean bin (0 hardest); loop: mean bin minus that with n-bar rollouts for all [bins]",
}
SEEDS, BLOCK = 40, 10
PROMPTS, VISITS, BUDGET, BINS = 256, 60, 4, 10
STATISTICS = ("any", "pass_rate, discount .8", "pass_rate, discount 1")
COUNTS = (2, 3, 4, 6, 8, 12)


def _classifier(statistic: str) -> OnlineDifficultyClassifier:
    if statistic == "any":
        return OnlineDifficultyClassifier(statistic=AnyOfN(50))
    return OnlineDifficultyClassifier(discount=float(statistic.split()[-1]))


def _play(controller: GDROController, p: np.ndarray, seed: int, visits: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) mean counts and bins over the last half of the visits."""
    rng, ids = np.random.default_rng([seed, 1]), range(p.size)
    plans = []
    for _ in range(visits):
        plan = controller.plan(ids)
        controller.observe(plan, (rng.random(plan.owner.size) < p[plan.owner]).astype(float))
        plans.append(plan)
    late = plans[visits // 2 :]
    return np.mean([plan.counts for plan in late], axis=0), np.mean([plan.bins for plan in late], axis=0)


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Heavy at the hard end: p ~ Beta(.6, 1.2)."""
    rows: list[Row] = []
    visits = 20 if quick else VISITS
    for seed, statistic in product(map(int, seeds), STATISTICS):
        p = np.random.default_rng(seed).beta(0.6, 1.2, PROMPTS)
        row: Row = {"seed": seed, "statistic": statistic}
        for n in COUNTS:
            _, bins = _play(GDROController(_classifier(statistic), mean_rollouts=n), p, seed, visits)
            rows.append(row | {"part": "fixed", "n": n, "bin": float(bins.mean())})
        rollout = RolloutGDRO(BUDGET, 2, 12)
        loop = GDROController(_classifier(statistic), PromptGDRO(BINS), rollout)
        held = GDROController(_classifier(statistic), PromptGDRO(BINS), mean_rollouts=BUDGET)
        (counts, bins), (_, unmoved) = (_play(controller, p, seed, visits) for controller in (loop, held))
        for which, subset in (("above", counts > BUDGET), ("below", counts < BUDGET)):
            rows.append(row | {"part": "loop", "n": which, "bin": float((bins - unmoved)[subset].mean())})
    return rows


def _values(rows: list[Row], statistic: str, n: int | str) -> np.ndarray:
    return np.array([row["bin"] for row in rows if (row["statistic"], row["n"]) == (statistic, n)])


def judge(rows: list[Row]) -> Verdict:
    """Any-of-n moves up beyond noise; the posteriors' moves stay, by their intervals, within a third of that."""
    holds, findings = True, []
    compared: dict[str, tuple[int | str, int | str]] = {
        "n 12 less 2": (12, 2),
        "loop, more less fewer": ("above", "below"),
    }
    for name, (more, less) in compared.items():
        moves = {s: mean_interval(_values(rows, s, more) - _values(rows, s, less)) for s in STATISTICS}
        least = moves["any"][1]
        holds &= least > 0 and all(max(-moves[s][1], moves[s][2]) < least / 3 for s in STATISTICS[1:])
        finding = ", ".join(f"{s}: {mean:+.2f} [{low:+.2f}, {high:+.2f}]" for s, (mean, low, high) in moves.items())
        findings.append(f"{name} [bins] {finding}")
    return Verdict(bool(holds), "; ".join(findings))


def draw(rows: list[Row]) -> Figure:
    """Mean bin over n; shift of bins in the loop."""
    figure = Figure(figsize=(7.6, 3.2))
    left, right = figure.subplots(1, 2)
    for i, statistic in enumerate(STATISTICS):
        label = "any of n (published)" if statistic == "any" else statistic.replace("_", " ")
        for axis, x, groups in (
            (left, np.array(COUNTS), COUNTS),
            (right, np.arange(2) + 0.1 * (i - 1), ("below", "above")),
        ):
            intervals = np.array([mean_interval(_values(rows, statistic, n)) for n in groups])
            error = np.abs(intervals[:, 1:].T - intervals[:, 0])
            axis.errorbar(x, intervals[:, 0], error, fmt="o-" if axis is left else "o", capsize=3, label=label)
    left.set(xlabel="rollouts n of every prompt", ylabel="mean bin (0 hardest)", ylim=(0, BINS - 1))
    left.set_title("The same policy")
    left.legend()
    right.axhline(0.0, color="#555555", linewidth=0.8)
    right.set_xticks([0, 1], ["fewer than n-bar", "more than n-bar"])
    right.set(xlim=(-0.5, 1.5), ylabel="bins against n-bar for all", title="In the loop")
    return figure
