"""What plan and observe cost as the number of known prompts grows, in units that are the same on every machine.

Wall-clock times would not give the same bytes twice, so CSV and figure hold bytes and interpreter calls (every call of
a Python or C function, as `sys.setprofile` sees them); a loop over prompts would show in the latter.
`python -m simulations.experiments.overhead` prints seconds on this machine and stores nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter
from types import FrameType
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gdro_core import GDROController
from gdro_llm.intervals import slope
from simulations.harness import Row, Verdict

CLAIM = "Memory is linear, below 40 bytes a prompt with integer ids, and a step costs the same however many are known"
SOURCE = "overhead"
COLUMNS = {
    "seed": "repetition: ids of the batch and rewards",
    "prompts": "prompts that the controller knows",
    "memory": "bytes of the classifier's arrays, spare rows and 16 bytes an integer id included [bytes]",
    "per_prompt": "the same per prompt [bytes]",
    "calls": "interpreter calls of one plan and observe of a batch of 256, integer ids",
}
SEEDS, BLOCK = 3, 1
SIZES = (10**2, 10**3, 10**4, 10**5, 10**6)
BATCH, BUDGET, FAR = 256, 4, 10**8


def _known(prompts: int) -> GDROController:
    """A joint controller that has seen all prompts once."""
    controller = GDROController.joint_play(mean_rollouts=BUDGET)
    for ids in np.array_split(np.arange(prompts), -(-prompts // 50_000)):
        controller.classifier.observe(ids, ids % 5, np.full(ids.size, 4))
    return controller


def _step(controller: GDROController, ids: np.ndarray, rng: np.random.Generator) -> None:
    plan = controller.plan(ids)  # type: ignore[arg-type]  # an array of integers is a sequence of ids
    controller.observe(plan, (rng.random(plan.counts.sum()) < 0.4).astype(float))


def _calls(work: Callable[[], None]) -> int:
    """Calls of Python and C functions while `work` runs."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Fill the memory, then count one step; the first step of a process may import, so it is not counted."""
    rows: list[Row] = []
    for seed in map(int, seeds):
        for prompts in SIZES[:3] if quick else SIZES:
            controller, rng = _known(prompts), np.random.default_rng(seed)
            ids = rng.choice(prompts, min(BATCH, prompts), replace=False)
            ids = np.concatenate([ids, np.arange(prompts, prompts + BATCH - ids.size)])  # always 256
            _step(controller, ids, rng)
            calls = _calls(lambda c=controller, i=ids, g=rng: _step(c, i, g))  # type: ignore[misc]
            memory = controller.classifier.nbytes + 16 * len(controller.classifier)
            row: Row = {"seed": seed, "prompts": prompts, "memory": memory, "calls": calls}
            rows.append(row | {"per_prompt": memory / len(controller.classifier)})
    return rows


def _mean(rows: list[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.unique([r["prompts"] for r in rows])
    return sizes, np.array([np.mean([r[key] for r in rows if r["prompts"] == size]) for size in sizes])


def judge(rows: list[Row]) -> Verdict:
    """Bytes per prompt below 40, slope of memory 1, calls the same within 5 % from the least to the most prompts."""
    sizes, each = _mean(rows, "per_prompt")
    _, calls = _mean(rows, "calls")
    _, memory = _mean(rows, "memory")
    growth = slope(sizes[1:], memory[1:])  # with 100 known prompts the batch itself adds most of the rows
    holds = each.max() < 40 and abs(growth - 1) < 0.05 and np.ptp(calls) / calls.mean() < 0.05
    return Verdict(
        bool(holds),
        f"at most {each.max():.1f} bytes a prompt, log-log slope of memory {growth:.3f}; {calls.min():.0f} to "
        f"{calls.max():.0f} calls a step; extrapolated, not measured: {each[-1] * FAR / 1e9:.1f} GB at {FAR:.0e}",
    )


def draw(rows: list[Row]) -> Figure:
    """Memory with its extrapolation, and calls of a step."""
    figure = Figure(figsize=(8.4, 3.2))
    left, right = figure.subplots(1, 2)
    sizes, memory = _mean(rows, "memory")
    left.loglog(sizes, memory, "o-", label="measured")
    each = _mean(rows, "per_prompt")[1][-1]
    left.loglog([sizes[-1], FAR], [memory[-1], each * FAR], "--", color="#555555", label="extrapolated")
    left.plot(FAR, each * FAR, "o", markerfacecolor="white", color="#555555")
    left.set(xlabel="known prompts", ylabel="memory of the classifier [bytes]", title="Memory")
    left.legend()
    right.semilogx(*_mean(rows, "calls"), "o-")
    right.set(xlabel="known prompts", ylabel="interpreter calls", ylim=(0, None), title="plan + observe of 256 prompts")
    return figure


def _print_seconds() -> None:
    """Wall-clock time of a step on this machine, best of five."""
    for prompts in SIZES:
        controller, rng, best = _known(prompts), np.random.default_rng(0), np.inf
        for _ in range(5):
            ids = rng.permutation(max(prompts, BATCH))[:BATCH]
            start = perf_counter()
            _step(controller, ids, rng)
            best = min(best, perf_counter() - start)
        print(f"{prompts:>9,} known prompts: {1e3 * best:7.2f} ms for plan + observe of {BATCH}")


if __name__ == "__main__":
    _print_seconds()
