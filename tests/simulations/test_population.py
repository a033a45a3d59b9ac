"""The environment of the learning experiments: calibrated, exact, paired and at equal budgets."""

from __future__ import annotations

import numpy as np
import pytest

from gdro_core import GDROController, gradient_weight
from simulations.experiments import calibration
from simulations.experiments.aggregation import Counting
from simulations.population import SkillPopulation, train


def test_learning_curves_under_uniform_sampling_are_those_of_a_real_run():
    """Five populations: every bin starts and ends within .06 of the real run, as does the zero-variance share; the
    change from visit to visit and its binomial part are within .01 of the real .161 and .151.

    False alarm one in ten if the seeds were new: [.2, .4) ends .049 ± .009 above; the others are 6 sigma away.
    """
    verdict = calibration.judge(calibration.simulate(np.arange(5), quick=False))
    assert verdict.holds, verdict.text


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("noise", [(0.0, 0.0), (0.1, 0.2)])
def test_the_expected_update_is_the_mean_of_sampled_updates(estimator, noise):
    """4,000 sampled gradients of a ragged, weighted batch: the mean is w_n(r) grad r within five standard errors.

    Five coordinates: false alarm 3e-6 if the seed were new.
    """
    population = SkillPopulation(
        0,
        prompts=40,
        held_out=10,
        skills=4,
        learning_rate=1.0,
        estimator=estimator,
        false_positive=noise[0],
        false_negative=noise[1],
    )
    rng = np.random.default_rng(1)
    rows, counts, weights = np.arange(30), rng.integers(2, 9, 30), rng.uniform(0.5, 2.0, 30)
    drawn = np.array(
        [population.gradient(rows, counts, population.sample(rows, counts, rng), weights) for _ in range(4000)]
    )
    population.expected_update(rows, counts, weights)  # from theta 0 at rate 1: theta is the expected gradient
    error = np.abs(drawn.mean(axis=0) - population.theta) / (drawn.std(axis=0) / np.sqrt(4000))
    assert error.max() < 5


def test_the_expected_update_is_the_gradient_of_the_weighted_pass_rate():
    """Against finite differences of sum_i w_i w_n(p_i) p_i / N with w_n held still."""
    population = SkillPopulation(0, prompts=20, held_out=10, skills=4, learning_rate=1.0)
    rows, counts = np.arange(20), np.full(20, 8)
    factor = gradient_weight(8, population.pass_rate)
    numerical = np.empty(5)
    for s in range(5):
        values = []
        for sign in (1.0, -1.0):
            population.theta = sign * 1e-5 * (np.arange(5) == s)
            values.append(float(factor @ population.pass_rate) / 20)
        numerical[s] = (values[0] - values[1]) / 2e-5
    population.theta = np.zeros(5)
    population.expected_update(rows, counts, np.ones(20))
    np.testing.assert_allclose(population.theta, numerical, rtol=1e-6)


def test_normalised_steps_have_one_length():
    """Whatever weights and batch."""
    population = SkillPopulation(0, prompts=20, held_out=10, normalised=True)
    rng = np.random.default_rng(0)
    lengths = []
    for scale in (1e-3, 1.0, 50.0):
        before = population.theta
        rows, counts = np.arange(20), np.full(20, 4)
        population.update(rows, counts, population.sample(rows, counts, rng), np.full(20, scale))
        lengths.append(np.linalg.norm(population.theta - before))
    np.testing.assert_allclose(lengths, lengths[0])


def test_surrogate_losses_are_zero_before_the_first_update_and_drift_after():
    """F1: the first mini-batch has loss 0 whatever the difficulty; the second leans to below 0 by its own drift."""
    population = SkillPopulation(0, prompts=200, held_out=10, learning_rate=0.5)
    rows, counts = np.arange(200), np.full(200, 4)
    rewards = population.sample(rows, counts, np.random.default_rng(0))
    losses = population.prompt_losses(rows, counts, rewards, np.ones(200))
    np.testing.assert_allclose(losses[:100], 0.0, atol=1e-12)
    assert losses[100:].mean() < 0


def test_the_verifier_errs_at_its_two_rates():
    """40,000 rollouts at fp .1 and fn .2."""
    population = SkillPopulation(0, prompts=100, held_out=10, false_positive=0.1, false_negative=0.2)
    graded = population.sample(np.arange(100), np.full(100, 400), np.random.default_rng(0))
    assert graded[~population.correct].mean() == pytest.approx(0.1, abs=0.01)
    assert 1.0 - graded[population.correct].mean() == pytest.approx(0.2, abs=0.02)  # both 5.5 sigma: 4e-8 if new


def test_same_seed_same_run_and_budgets_are_equal():
    """Two runs are bit for bit the same; a controller spends what uniform spends at every step, on the same prompts."""
    runs = [
        train(SkillPopulation(3, prompts=60, held_out=20), controller, 15, 20, 4, 5)
        for controller in (GDROController.joint_play(4), GDROController.joint_play(4), GDROController.uniform(4))
    ]
    for step, again, uniform in zip(*runs, strict=True):
        assert all(step[key] == again[key] for key in ("rollouts", "mean_at_8", "pass_at_8", "worst"))
        assert (step["plan"].ids, step["rollouts"]) == (uniform["plan"].ids, uniform["rollouts"])
    assert runs[0][-1]["rollouts"] == 15 * 20 * 4
    assert runs[0][-1]["mean_at_8"] != runs[2][-1]["mean_at_8"]


def test_epochs_visit_every_prompt_once_even_if_batches_do_not_divide_them():
    """50 prompts, batch 15: after 10 batches every prompt was drawn three times, never twice in a batch."""
    steps = train(SkillPopulation(0, prompts=50, held_out=20), GDROController.uniform(2), 10, 15, 2, 0)
    ids = [step["plan"].ids for step in steps]
    assert all(len(set(batch)) == 15 for batch in ids)
    assert (np.bincount(np.concatenate(ids), minlength=50) == 3).all()


class Greedy:
    """Spends one rollout more than it may."""

    def plan(self, ids, *, budget=None):
        base = GDROController.uniform(2).plan(ids)
        base.counts[0] += 1
        return base

    def observe(self, plan, rewards):
        assert rewards.size == plan.counts.sum()


def test_a_planner_off_the_budget_is_refused():
    """Comparisons are at equal total rollouts."""
    population = SkillPopulation(0, prompts=20, held_out=10)
    with pytest.raises(ValueError, match=r"counts must sum to mean_rollouts x batch = 20, got 21"):
        train(population, Greedy(), 2, 10, 2, 0)


def test_counting_makes_the_update_a_mean_over_rollouts():
    """By a loop over rollouts: weight times advantage times score, over all; the controller is not disturbed."""
    population, planner = SkillPopulation(0, prompts=40), Counting(GDROController.joint_play(4, seed=0))
    alone, rng, rows = GDROController.joint_play(4, seed=0), np.random.default_rng(0), np.arange(40)
    for _ in range(4):
        plan, own = planner.plan(rows.tolist()), alone.plan(rows.tolist())
        rewards = population.sample(rows, plan.counts, rng)
        planner.observe(plan, rewards)
        alone.observe(own, rewards)
    assert np.ptp(plan.counts) > 2
    assert planner.controller.state_dict() == alone.state_dict()
    advantages, rate = population.advantages(plan.counts, rewards), population.pass_rate
    expected = sum(
        own.weights[i] * advantages[r] * (population.correct[r] - rate[i]) * population.loadings[i]
        for r, i in enumerate(own.owner)
    )
    computed = population.gradient(rows, plan.counts, rewards, plan.weights)
    np.testing.assert_allclose(computed, expected / own.owner.size, rtol=1e-10)


def test_prompts_that_are_passed_over_are_not_there():
    """Sampled and expected steps are those of the batch without them, by every estimator."""
    for estimator in ("grpo", "dr_grpo", "rloo"):
        thetas = []
        for counts in (np.array([0, 4, 0, 3, 8]), np.array([4, 3, 8])):
            population = SkillPopulation(0, prompts=40, held_out=10, skills=4, estimator=estimator)
            rows = np.array([5, 6, 7, 8, 9] if counts.size == 5 else [6, 8, 9])
            weights = np.where(np.isin(rows, [5, 7]), 9.0, 0.5)
            rewards = population.sample(rows, counts, np.random.default_rng(0))
            population.update(rows, counts, rewards, weights)
            sampled = population.theta.copy()
            population.expected_update(rows, counts, weights)
            thetas.append((sampled, population.theta))
        assert np.abs(thetas[0][0]).max() > 0
        np.testing.assert_allclose(thetas[0], thetas[1], rtol=1e-12)
