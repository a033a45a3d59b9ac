"""Speed and memory of gdro_core; `make bench` runs this file. Nothing here is asserted: the numbers are for people.

For scale: the paper reports 312 ms (Prompt-GDRO) and 403 ms (Rollout-GDRO) a step added by its own bookkeeping.
"""

from __future__ import annotations

import numpy as np
import pytest

from gdro_core import (
    Exp3IX,
    GDROController,
    OnlineDifficultyClassifier,
    exact_budget_allocation,
    sample_budget_allocation,
)

BINS, ARMS, BUDGET = 10, 11, 1024  # the paper's: 10 bins, 2..12 rollouts, 256 prompts x 4


@pytest.mark.parametrize("prompts", [256, 512, 65_536])
def test_plan_and_observe(benchmark, prompts):
    """One step of the joint recommended controller at n_bar = 4 with string ids."""
    rng = np.random.default_rng(0)
    ids = [f"dapo_math/{i:016x}" for i in range(prompts)]
    controller = GDROController.recommended(mean_rollouts=4)
    difficulty = rng.random(prompts)

    def rewards(plan):
        return (rng.random(plan.counts.sum()) < difficulty[plan.owner]).astype(float)

    for _ in range(3):  # past the first visits
        plan = controller.plan(ids)
        controller.observe(plan, rewards(plan))
    graded = rewards(controller.plan(ids))

    def step():
        plan = controller.plan(ids)
        controller.observe(plan, np.resize(graded, plan.counts.sum()))

    benchmark(step)


def test_exact_dynamic_program(benchmark):
    """The best joint configuration: 10 bins, arms 2..12, budget 1024."""
    rng = np.random.default_rng(0)
    utility, size = rng.normal(size=(BINS, ARMS)), rng.multinomial(256, np.full(BINS, 0.1))
    benchmark(exact_budget_allocation, utility, size, BUDGET, min_rollouts=2)


def test_exact_sampling_with_marginals(benchmark):
    """One draw from the Gibbs distribution over feasible configurations, and its marginals."""
    rng = np.random.default_rng(0)
    log_weights, size = rng.normal(size=(BINS, ARMS)), rng.multinomial(256, np.full(BINS, 0.1))
    benchmark(sample_budget_allocation, log_weights, size, BUDGET, min_rollouts=2, rng=rng)


def test_bandit_rounds(benchmark):
    """100 rounds of EXP3-IX over 10 arms in 4,096 replicates: 409,600 rounds a call."""
    rng = np.random.default_rng(0)
    policy = Exp3IX.for_horizon(10, 1000, replicates=4096)
    losses = rng.random(4096)

    def rounds():
        for _ in range(100):
            policy.update(policy.sample(rng), losses)

    benchmark(rounds)
    benchmark.extra_info["million_rounds_per_second"] = round(0.4096 / benchmark.stats["mean"], 1)


def test_ten_million_prompts(benchmark):
    """Observe and classify 10 million integer ids in batches of a million."""
    batches = np.arange(10_000_000).reshape(10, -1)
    correct, trials = np.random.default_rng(0).integers(0, 5, 1_000_000), np.full(1_000_000, 4)
    classifier = OnlineDifficultyClassifier()

    def visit_all():
        for ids in batches:
            classifier.observe(ids, correct, trials)
            classifier.bins(ids)

    benchmark.pedantic(visit_all, rounds=2)
    benchmark.extra_info["bytes_per_prompt"] = round(classifier.nbytes / len(classifier), 1)
