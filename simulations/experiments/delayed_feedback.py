"""Theorem 12: what late and missing payoffs cost the adversary, and that merging reports in any order costs nothing.

Late: coins held for d + 1 rounds, which nobody can learn from in time under a delay of d, played by Hedge tuned to the
sum of delays D = T d. Missing: one of 4 arms is better by 0.3, each loss is seen with chance o. Merging: reports on a
batch arrive in parts, merged by a random tree; the controller must end in the very state that the whole batch leaves.
"""

from __future__ import annotations

import json
from math import log, sqrt

import numpy as np
from matplotlib.figure import Figure

from gdro_core import GDROController, Hedge, Observation, delayed_hedge_bound, limited_advice_bound
from gdro_llm.intervals import slope_interval
from simulations.harness import Row, Verdict, table

CLAIM = "Delays cost regret like √(T + 2D) and missing losses like √(T/o), within the bounds; merging changes nothing"
SOURCE = "Theorem 12, theorem 5"
COLUMNS = {
    "seed": "independent repetition",
    "part": "late: regret of delayed Hedge | missing: regret with losses seen by chance | merged: see value",
    "amount": "delay d (rounds) | chance o of seeing a loss (1) | parts of a batch",
    "horizon": "T (rounds); batches if merged",
    "effort": "T + 2 D | T / o (rounds); 0 if merged",
    "value": "regret (losses in [0, 1]); if merged, 1 where the state differs from that of the whole batches",
    "bound": "on every run if late, on the mean if missing, 0 if merged",
}
SEEDS, BLOCK = 100, 50
ARMS, DELAYS, CHANCES = 4, (0, 1, 4, 16, 64), (1.0, 0.5, 0.2, 0.05)


def _late(seeds: np.ndarray, delay: int, horizon: int) -> np.ndarray:
    """(R,) regret when the losses of round t can be used from round t + d + 1 on."""
    rng = np.random.default_rng([*seeds.tolist(), delay, horizon])
    policy = Hedge.for_horizon(ARMS, horizon, total_delay=float(horizon * delay), replicates=seeds.size)
    paid, total, waiting = np.zeros(seeds.size), np.zeros((seeds.size, ARMS)), []
    for t in range(horizon):
        if t % (delay + 1) == 0:
            losses = rng.integers(0, 2, (seeds.size, ARMS)).astype(np.float64)
        paid += (policy.probabilities * losses).sum(axis=1)
        total += losses
        waiting.append(losses)
        if len(waiting) > delay:
            policy.update(waiting.pop(0))
    return np.asarray(paid - total.min(axis=1))


def _missing(seeds: np.ndarray, chance: float, horizon: int) -> np.ndarray:
    """(R,) regret when each loss is seen with the same chance."""
    rng = np.random.default_rng([*seeds.tolist(), round(100 * chance), horizon])
    policy = Hedge(ARMS, sqrt(2 * log(ARMS) * chance / horizon), replicates=seeds.size)
    paid, total = np.zeros(seeds.size), np.zeros((seeds.size, ARMS))
    means, known = np.array([0.6, 0.6, 0.6, 0.3]), np.full((seeds.size, ARMS), chance)
    for _ in range(horizon):
        losses = (rng.random(total.shape) < means).astype(np.float64)
        paid += (policy.probabilities * losses).sum(axis=1)
        total += losses
        policy.update(losses, observed=rng.random(total.shape) < chance, observation_probability=known)
    return np.asarray(paid - total.min(axis=1))


def _merged(seed: int, parts: int, batches: int) -> bool:
    """Whether a controller that observes merged parts differs from one that observes all at once."""
    rng = np.random.default_rng([seed, parts])
    at_once, in_parts = (GDROController.joint_play(mean_rollouts=4, num_bins=5, seed=seed) for _ in range(2))
    solved = rng.random(40)
    for _ in range(batches):
        ids = rng.choice(40, 16, replace=False)
        plan, same = at_once.plan(ids.tolist()), in_parts.plan(ids.tolist())
        rewards = (rng.random(plan.owner.size) < solved[ids[plan.owner]]).astype(np.float64)
        at_once.observe(plan, rewards)
        where = rng.integers(0, parts, rewards.size)
        graded = [Observation.of(same, rewards[where == i], rows=np.flatnonzero(where == i)) for i in range(parts)]
        while len(graded) > 1:
            first, second = graded.pop(rng.integers(len(graded))), graded.pop(rng.integers(len(graded)))
            graded.append(first.merge(second))
        in_parts.observe(same, graded[0])
    return json.dumps(at_once.state_dict()) != json.dumps(in_parts.state_dict())


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """All three parts."""
    rows: list[Row] = []
    for horizon in (40, 160) if quick else (500, 2000, 8000):
        for delay in DELAYS[: 2 if quick else None]:
            effort, bound = horizon * (1 + 2 * delay), delayed_hedge_bound(horizon, ARMS, float(horizon * delay))
            common = {"part": "late", "amount": float(delay), "horizon": horizon, "effort": effort, "bound": bound}
            values = _late(seeds, delay, horizon)
            rows += [{"seed": int(s), **common, "value": float(v)} for s, v in zip(seeds, values, strict=True)]
        for chance in CHANCES:
            effort, bound = round(horizon / chance), limited_advice_bound(ARMS, np.full(horizon, chance))
            common = {"part": "missing", "amount": chance, "horizon": horizon, "effort": effort, "bound": bound}
            values = _missing(seeds, chance, horizon)
            rows += [{"seed": int(s), **common, "value": float(v)} for s, v in zip(seeds, values, strict=True)]
    for seed in seeds:
        for parts in (2, 5, 16):
            batches = 2 if quick else 10
            differs = {"value": float(_merged(int(seed), parts, batches)), "effort": 0, "bound": 0.0}
            rows.append({"seed": int(seed), "part": "merged", "amount": float(parts), "horizon": batches, **differs})
    return rows


def judge(rows: list[Row]) -> Verdict:
    """Slopes within 0.1 of 1/2, over T and, at the longest T, over T + 2D or T/o; bounds; equal states."""
    holds, findings = True, []
    for part, amounts in (("late", DELAYS), ("missing", CHANCES)):
        used = 0.0
        for amount in amounts:
            if not any((row["part"], row["amount"]) == (part, amount) for row in rows):
                continue  # a quick run has few
            horizons, regret = table(rows, "value", part=part, amount=amount)
            bound = table(rows, "bound", part=part, amount=amount)[1][0]
            middle, low, high = slope_interval(horizons, regret)
            mean, error = regret.mean(axis=0), regret.std(axis=0) / sqrt(len(regret))
            holds &= bool((regret.max(axis=0) <= bound).all() if part == "late" else (mean + 2 * error <= bound).all())
            holds &= low <= 0.6 and high >= 0.4
            used = max(used, float((mean / bound).max()))
            findings.append(f"{part} {amount:g}: slope {middle:.2f} [{low:.2f}, {high:.2f}]")
        longest = max(row["horizon"] for row in rows if row["part"] == part)
        middle, low, high = slope_interval(*table(rows, "value", "effort", part=part, horizon=longest))
        holds &= low <= 0.6 and high >= 0.4
        findings.append(f"over {'T + 2D' if part == 'late' else 'T/o'} {middle:.2f} [{low:.2f}, {high:.2f}]")
        findings.append(f"mean regret at most {used:.2f} of its bound")
    merged = np.array([row["value"] for row in rows if row["part"] == "merged"])
    findings.append(f"{int(merged.sum())} of {merged.size} merged states differ")
    return Verdict(bool(holds and not merged.any()), "; ".join(findings))


def draw(rows: list[Row]) -> Figure:
    """Regret against the horizon for each delay and each chance, with bounds."""
    figure = Figure(figsize=(8.4, 3.3))
    axes = figure.subplots(1, 2, sharey=True)
    names = {"late": "delay {:g}", "missing": "seen with chance {:g}"}
    for axis, (part, name) in zip(axes, names.items(), strict=True):
        for amount in sorted({row["amount"] for row in rows if row["part"] == part}, reverse=part == "missing"):
            horizons, regret = table(rows, "value", part=part, amount=amount)
            error = 1.96 * regret.std(axis=0) / sqrt(len(regret))
            drawn = axis.errorbar(horizons, regret.mean(axis=0), error, marker="o", markersize=3,
                                  label=name.format(amount))  # fmt: skip
            bound = table(rows, "bound", part=part, amount=amount)[1][0]
            axis.plot(horizons, bound, linestyle=":", linewidth=0.9, color=drawn.lines[0].get_color())
        axis.set(title=f"{part} losses (dotted: bounds)", xlabel="horizon T [rounds]", xscale="log", yscale="log")
        axis.set_xticks(horizons, [f"{t:g}" for t in horizons])
        axis.minorticks_off()
        axis.legend(loc="upper left", fontsize=7)
    axes[0].set_ylabel("regret")
    return figure
