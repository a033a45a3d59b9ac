"""The recommended controller: rollouts go where both outcomes are likely, at exactly the budget; none is forgotten."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_core import (
    MIXED,
    SIGNAL,
    GDROController,
    Observation,
    OnlineDifficultyClassifier,
    Planner,
    RolloutGDRO,
    VarianceComponents,
    frontier_utility,
    frontier_weight,
    signal,
)

SEEDS = st.integers(0, 2**32 - 1)


def trained(rates, steps=8, seed=0, **options):
    """A recommended controller after some whole batches of prompts with fixed pass rates."""
    controller, rng = GDROController.recommended(4, seed=seed, **options), np.random.default_rng(seed)
    for _ in range(steps):
        plan = controller.plan(range(len(rates)))
        controller.observe(plan, Observation(plan, rng.binomial(plan.counts, rates).astype(float), plan.counts))
    return controller


def gradients(rng, prompts, own, noise, dimension=32, half=8):
    """Two halves of each prompt's group at p = 1/2, with own parts and noise of the given squared lengths."""
    correct = rng.binomial(half, 0.5, (prompts, 2))
    spread = correct * (half - correct) / (half * (half - 1.0))
    part = rng.standard_normal((prompts, 1, dimension)) * np.sqrt(own / dimension)
    blur = rng.standard_normal((prompts, 2, dimension)) * np.sqrt(noise / dimension * spread / (half - 1))[:, :, None]
    halves = spread[:, :, None] * (part + 1.0 / np.sqrt(dimension)) + blur
    return halves[:, 0], halves[:, 1], correct, np.full((prompts, 2), half)


def test_rollouts_go_where_both_outcomes_are_likely():
    """Of solved, hopeless and half-solved prompts the last get most, over 20 batches; uniform gives each a third."""
    rates, rng = np.repeat([1.0, 0.0, 0.5], 20), np.random.default_rng(2)
    controller, total = trained(rates), np.zeros(3)
    for _ in range(20):
        plan = controller.plan(range(60))
        total += plan.counts.reshape(3, 20).sum(axis=1)
        controller.observe(plan, Observation(plan, rng.binomial(plan.counts, rates).astype(float), plan.counts))
    solved, hopeless, half = total / total.sum()
    assert half > 0.75
    assert max(solved, hopeless) < 0.15


@settings(max_examples=50)
@given(SEEDS, st.integers(1, 40), st.sampled_from([0, 2, 3]))
def test_the_budget_is_exact_and_no_group_has_one_rollout(seed, size, least):
    """Counts are 0 (with n_min = 0) or at least 2, and sum to n_bar N, for any prompts and history."""
    rng = np.random.default_rng(seed)
    controller = trained(rng.random(size) ** 2, steps=4, seed=seed % 2**31, min_rollouts=least)
    plan = controller.plan(range(-3, size))
    assert plan.counts.sum() == 4 * (size + 3)
    assert ((plan.counts >= max(least, 2)) | ((plan.counts == 0) & (least == 0))).all()
    assert plan.counts.max() <= 12
    assert (plan.counts[:3] == 4).all()  # unseen


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_prompt_that_is_passed_over_is_tried_again(rate):
    """What is known of it fades: a solved or hopeless prompt is sampled at least once in 40 batches, not in all."""
    rates = np.array([rate] + [0.5] * 15)
    controller, rng, tried = trained(rates), np.random.default_rng(1), 0
    for _ in range(40):
        plan = controller.plan(range(16))
        tried += int(plan.counts[0] > 0)
        controller.observe(plan, Observation(plan, rng.binomial(plan.counts, rates).astype(float), plan.counts))
    assert 1 <= tried <= 20


def test_weights_have_mean_one_over_the_rollouts_that_are_expected_to_count():
    """sum n w M = sum n M with M = E P(mixed); within a bin they fall with n and v as the Wiener weights do."""
    controller = trained(np.linspace(0.02, 0.98, 60))
    plan = controller.plan(range(60))
    a, b = controller.classifier.posterior(range(60))
    chance = np.array([MIXED.of([x], [y], [n])[0, 0] for x, y, n in zip(a, b, plan.counts, strict=True)])
    assert plan.counts * chance @ plan.weights == pytest.approx(plan.counts @ chance)
    v = (a + 1) * (b + 1) / ((a + b + 2) * (a + b + 3))  # E v^2 / E v
    omega = plan.weights / frontier_weight(plan.counts, 1.0, v, 0.5)
    for level in set(plan.bins.tolist()):
        np.testing.assert_allclose(omega[plan.bins == level], omega[plan.bins == level][0])


@given(st.floats(0, 20), st.floats(0.05, 0.95), st.integers(2, 16))
def test_signal_of_a_known_rate_is_the_frontier_utility(kappa, p, n):
    """A sharp posterior leaves the utility of theorem 16 at p; an uncertain one has omega^2 E v (n - 1) at kappa 0."""
    sharp = signal(kappa).of([p * 1e7], [(1 - p) * 1e7], [n])[0, 0]
    assert sharp == pytest.approx(frontier_utility(n, 1.0, p * (1 - p), kappa), rel=1e-4)
    assert SIGNAL.of([0.5], [2.0], [n])[0, 0] == pytest.approx(0.5 * 2.0 / (2.5 * 3.5) * (n - 1))


@given(SEEDS, st.floats(0, 10))
def test_signal_is_no_more_than_its_posterior_mean(seed, kappa):
    """Weights fixed before the rollouts attain at most E U: by Monte Carlo over the posterior, within its error."""
    rng = np.random.default_rng(seed)
    a, b, n = *rng.gamma(1, 4, 2) + 0.3, np.arange(2, 13)
    p = rng.beta(a, b, 4000)[:, None]
    draws = frontier_utility(n, 1.0, p * (1 - p), kappa)
    error = 5 * draws.std(axis=0) / np.sqrt(4000)
    assert (signal(kappa).of([a], [b], n)[0] <= draws.mean(axis=0) + error + 1e-12).all()


def test_a_verifier_that_errs_makes_rare_hits_worthless():
    """Graded right as often as by mistake, a prompt has utility and weight 0; error 0 is the plain utility."""
    noisy = signal(0.5, error=0.1)
    assert (noisy.of([1.0], [19.0], [2, 8]) == 0).all()
    assert noisy.of([10.0], [10.0], [4])[0, 0] > 0
    assert signal(0.5, 0.0) == signal(0.5) != noisy
    plan = trained(np.repeat([0.04, 0.5], 20), error=0.1, steps=20).plan(range(40))
    assert plan.counts[:20].sum() < 0.1 * plan.counts.sum()


def test_a_budget_lets_the_controller_choose_among_candidates():
    """Seen candidates share the budget; unseen ones get n_bar within the batch and nothing beyond."""
    controller = trained(np.repeat([0.5, 0.0, 1.0, 0.3], 10), steps=5)
    ids = [*range(30), "new", *range(30, 40), "later"]
    plan = controller.plan(ids, budget=4 * 32)
    assert plan.counts.sum() == 4 * 32
    assert plan.counts[30] == 4
    assert plan.counts[-1] == 0
    assert plan.counts[:10].sum() > plan.counts[10:30].sum()
    with pytest.raises(ValueError, match=r"budget must lie in \[0, 168\] for these prompts, got 169"):
        controller.plan(ids, budget=169)
    with pytest.raises(ValueError, match="budget must be None without a rollout game, got 3"):
        GDROController.uniform(4).plan(ids, budget=3)
    planner: Planner = controller
    assert planner.plan(ids).counts.sum() == 4 * 42


def test_counts_spread_as_kappa_is_measured_to_be_large():
    """Own parts a tenth or ten times the noise: kappa is found, and with it more prompts get smaller groups."""
    rates, rng = np.random.default_rng(0).uniform(0.2, 0.8, 60), np.random.default_rng(1)
    sampled = {}
    for own in (0.1, 10.0):
        controller = trained(rates)
        assert controller.kappa is None
        for _ in range(4):
            plan = controller.plan(range(60))
            controller.observe_gradients(plan, np.arange(60), *gradients(rng, 60, own, noise=1.0))
        assert controller.kappa == pytest.approx(min(own, 2.5), rel=0.5)
        metrics = controller.observe(plan, np.ones(plan.counts.sum()))
        assert metrics["kappa"] == controller.kappa
        sampled[own] = int((controller.plan(range(60)).counts > 0).sum())
    assert sampled[10.0] > sampled[0.1] + 5


def test_components_are_part_of_the_state():
    """Saved through JSON, another one plans the same; one without components refuses it, and refuses gradients."""
    controller, rng = trained(np.linspace(0.1, 0.9, 20)), np.random.default_rng(0)
    plan = controller.plan(range(20))
    controller.observe_gradients(plan, np.arange(20), *gradients(rng, 20, 1.0, 1.0))
    again = GDROController.recommended(4, seed=0)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    np.testing.assert_array_equal(again.plan(range(20)).counts, controller.plan(range(20)).counts)
    assert again.components.state_dict() == controller.components.state_dict()
    without = GDROController.joint_play(4)
    with pytest.raises(ValueError, match="observe_gradients needs a controller with components"):
        without.observe_gradients(plan, np.arange(20), *gradients(rng, 20, 1.0, 1.0))
    before = controller.state_dict()
    with pytest.raises(ValueError, match="rows must hold"):
        controller.observe_gradients(plan, np.arange(20) + 1, *gradients(rng, 20, 1.0, 1.0))
    assert controller.state_dict() == before
    with pytest.raises(ValueError, match="min_rollouts must be 0 or at least 2, got 1"):
        GDROController.recommended(4, 1)
    with pytest.raises(ValueError, match="components need a rollout game with a signal utility"):
        GDROController(OnlineDifficultyClassifier(), None, RolloutGDRO(4, 2, 8), components=VarianceComponents(10))


def test_gradients_are_asked_for_at_first_until_kappa_is_known():
    """Of the first ten steps each, then every tenth; once it is known every tenth; without components never."""
    rng, unknowing = np.random.default_rng(0), trained(np.linspace(0.2, 0.8, 60))
    learning = trained(np.linspace(0.2, 0.8, 60))
    asked = {"unknowing": [], "learning": []}
    for name, controller in (("unknowing", unknowing), ("learning", learning)):
        for step in range(32):
            plan = replace(controller.plan(range(60)), step=step)
            if controller.measures(plan, 10):
                asked[name].append(step)
                if name == "learning":
                    controller.observe_gradients(plan, np.arange(60), *gradients(rng, 60, 10.0, noise=1.0))
    assert asked["unknowing"] == [*range(10), 10, 20, 30]
    assert asked["learning"][-3:] == [10, 20, 30]
    assert len(asked["learning"]) < 8
    assert not learning.measures(replace(plan, step=0), 0)
    assert not GDROController.joint_play(4).measures(replace(plan, step=0), 10)
    with pytest.raises(ValueError, match="every must be an integer >= 0, got -1"):
        learning.measures(plan, -1)


def test_kappa_stays_known(monkeypatch):
    """An interval that is no longer narrow does not bring the first guess back, nor does saving; version 4 did."""
    controller, rng = trained(np.linspace(0.2, 0.8, 60)), np.random.default_rng(0)
    plan = controller.plan(range(60))
    for _ in range(4):
        controller.observe_gradients(plan, np.arange(60), *gradients(rng, 60, 1.0, noise=1.0))
    first = controller.kappa
    monkeypatch.setattr(VarianceComponents, "useful", False)
    controller.observe_gradients(plan, np.arange(60), *gradients(rng, 60, 1.0, noise=1.0))
    assert controller.kappa not in (None, first)
    assert controller.kappa == controller.components.kappa
    saved = json.loads(json.dumps(controller.state_dict()))
    again = GDROController.recommended(4)
    again.load_state_dict(saved)
    assert again.kappa == controller.kappa
    older = {**{key: value for key, value in saved.items() if key != "kappa"}, "version": 4}
    again.load_state_dict(older)
    assert again.kappa is None
    monkeypatch.undo()
    again.load_state_dict(older)
    assert again.kappa == controller.kappa
    for wrong in (-1.0, 3.0):
        with pytest.raises(ValueError, match=r"kappa must lie in \[0, 2.5\]"):
            again.load_state_dict({**saved, "kappa": wrong})
    assert again.kappa == controller.kappa
