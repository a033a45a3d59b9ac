"""Pilot and commit: two stages at exactly the budget, by what the first has shown; one stage once prompts are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_core import (
    MIXED,
    GDROController,
    Observation,
    OnlineDifficultyClassifier,
    RolloutGDRO,
    signal,
    staged_advantages,
)

SEEDS = st.integers(0, 2**32 - 1)


def step(controller, ids, rates, rng):
    """Both stages of a step, then `observe`."""
    plan = controller.plan(ids)
    first = rng.random(plan.counts.sum()) < np.asarray(rates)[plan.owner]
    whole = controller.replan(plan, first)
    correct = np.bincount(plan.owner, first, len(ids)) + rng.binomial(whole.more, rates)
    metrics = controller.observe(whole, Observation(whole, correct, whole.counts))
    return plan, whole, metrics


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([(4, 2), (8, 3), (8, 4), (16, 8)]))
def test_the_budget_is_exact_and_the_first_stage_stays(seed, sizes):
    """Over 4 batches of known and unseen prompts; no group has one rollout, none more than n_max."""
    mean, pilot = sizes
    rng = np.random.default_rng(seed)
    controller = GDROController.recommended(mean, 0, 3 * mean, pilot=pilot, seed=seed % 100)
    rates = rng.beta(0.4, 0.8, 60)
    for t in range(4):
        ids = rng.permutation(60)[:20] if t else np.arange(20)
        bins = controller.classifier.bins(ids)
        plan, whole, _ = step(controller, ids.tolist(), rates[ids], rng)
        assert plan.counts.sum() + plan.rest == whole.counts.sum() == mean * 20
        assert plan.rest > 0 or (bins >= 0).any()
        assert (plan.counts[bins < 0] == pilot).all()
        assert (whole.more >= 0).all()
        assert (whole.more[plan.counts == 0] == 0).all()
        assert not (whole.counts == 1).any()
        assert whole.counts.max() <= 3 * mean
        stages = np.bincount(whole.owner, whole.stage, 20)
        assert stages.tolist() == whole.more.tolist()
        assert (np.diff(whole.stage)[np.diff(whole.owner) == 0] >= 0).all()


def test_known_prompts_need_no_pilot():
    """When all of a batch were seen, the plan is the one of a controller without a pilot, and `replan` returns it."""
    rng, rates = np.random.default_rng(0), np.linspace(0, 1, 16)
    piloting, plain = GDROController.recommended(8, pilot=4), GDROController.recommended(8)
    for controller in (piloting, plain):
        plan = plain.plan(range(16))
        correct = np.round(8 * rates)
        controller.observe(plan, Observation(plan, correct, plan.counts))
    one, two = plain.plan(range(16)), piloting.plan(range(16))
    assert two.rest == 0
    assert piloting.replan(two, rng.random(two.counts.sum()) < 0.5) is two
    assert (two.counts == one.counts).all()
    assert (two.weights == one.weights).all()
    assert (two.more == 0).all()
    assert (two.stage == 0).all()


def test_further_rollouts_go_where_both_outcomes_were_seen():
    """A prompt with 2 of 4 gets more than one with 0 of 4 or 4 of 4, at small kappa; at kappa 2.5 they are level."""
    for kappa in (0.02, 2.5):
        controller = GDROController.recommended(8, 0, 24, pilot=4, kappa=kappa)
        plan = controller.plan(["none", "half", "all"])
        more = controller.replan(plan, [0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]).more
        assert abs(more[0] - more[2]) <= 1
        assert more[1] == 12 if kappa < 1 else more[1] <= more[0]


def test_what_was_shown_is_certain():
    """The utility after equal rewards is that of a new group whose baseline is free; after a spread X it starts higher.

    There it is X / (1 + kappa X) (theorem 16, weights by the rewards).
    """
    utility, kappa = signal(0.7), 0.7
    a, b, n = np.array([[2.0]]), np.array([[5.0]]), np.arange(6)
    none = utility.further(a, b, np.array([[0.0]]), np.array([[4.0]]), n)
    assert none[0, 1:] == pytest.approx(utility.table(a, b, n[1:] + 1)[0])
    half = utility.further(a, b, np.array([[2.0]]), np.array([[4.0]]), n)
    assert half[0, 0] == pytest.approx(1.0 / (1.0 + kappa))
    assert (np.diff(half) > 0).all()
    assert (np.diff(half, n=2) < 1e-12).all()


def test_replan_changes_nothing_and_is_the_same_after_a_resume():
    rng = np.random.default_rng(3)
    first = GDROController.recommended(8, pilot=4, seed=5)
    step(first, list(range(10)), np.linspace(0, 1, 10), rng)
    saved = json.loads(json.dumps(first.state_dict()))
    second = GDROController.recommended(8, pilot=4, seed=5)
    second.load_state_dict(saved)
    ids = list(range(5, 15))
    plan = first.plan(ids)
    rewards = rng.random(plan.counts.sum()) < 0.4
    wholes = [c.replan(c.plan(ids), rewards) for c in (first, second, first)]
    assert all((w.counts == wholes[0].counts).all() and (w.weights == wholes[0].weights).all() for w in wholes)
    assert first.state_dict() == saved
    merged = Observation.of(plan, rewards[::2], np.arange(0, rewards.size, 2)).merge(
        Observation.of(plan, rewards[1::2], np.arange(1, rewards.size, 2))
    )
    assert (first.replan(plan, merged).counts == wholes[0].counts).all()


def test_a_state_without_a_pilot_is_read():
    """Version 3 had one stage only."""
    controller = GDROController.recommended(8)
    step(controller, ["a", "b"], [0.2, 0.7], np.random.default_rng(0))
    old = {name: value for name, value in controller.state_dict().items() if name != "pilot"} | {"version": 3}
    again = GDROController.recommended(8)
    again.load_state_dict(old)
    assert again.state_dict() == controller.state_dict()
    with pytest.raises(ValueError, match="pilot = 0"):
        GDROController.recommended(8, pilot=4).load_state_dict(old)


def test_its_own_choice_follows_theorem_21():
    """n_bar / 2 at small kappa, none at large kappa, none for n_bar below 8."""
    for mean, kappa, first in ((8, 0.02, 4), (16, 0.02, 8), (8, 0.5, 8), (8, 2.5, 8), (4, 0.02, 4)):
        plan = GDROController.recommended(mean, 0, 3 * mean, pilot=None, kappa=kappa).plan(range(6))
        assert plan.counts.tolist() == [first] * 6
        assert plan.rest == 6 * (mean - first)


def test_a_plan_that_is_not_whole_is_not_observed():
    controller = GDROController.recommended(8, pilot=4)
    plan = controller.plan(["a", "b"])
    with pytest.raises(ValueError, match="8 rollouts left for `replan`"):
        controller.observe(plan, [1] * 8)
    with pytest.raises(ValueError, match="shape"):
        controller.replan(plan, [1] * 7)


@pytest.mark.parametrize("pilot", [1, 9, 2.5, -1])
def test_bad_pilots(pilot):
    with pytest.raises(ValueError, match="pilot must"):
        GDROController.recommended(8, pilot=pilot)


@pytest.mark.parametrize("game", [RolloutGDRO(8, 0, 24, MIXED), RolloutGDRO(8, 0, 24, signal(0.5), permute=True), None])
def test_a_pilot_needs_a_signal_utility_and_counts_of_prompts(game):
    mean = {"mean_rollouts": 8} if game is None else {}
    with pytest.raises(ValueError, match="pilot must be 0"):
        GDROController(OnlineDifficultyClassifier(), None, game, pilot=4, **mean)


def test_extend_refuses_more_than_there_is_room_for():
    with pytest.raises(ValueError, match=r"rest must lie in \[0, 10\]"):
        RolloutGDRO(4, 0, 12, signal(0.5)).extend([2, 0], [1, 0], 11, [1.0, 1.0], [1.0, 1.0])


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.booleans())
def test_staged_advantages_equal_a_loop(seed, scale):
    """In any row order; groups of one stage are centred, groups of equal rewards are 0."""
    rng = np.random.default_rng(seed)
    owner, stage = rng.integers(0, 4, 30), rng.integers(0, 3, 30)
    rewards = rng.choice([0.0, 0.1, 1.0], 30) * rng.integers(0, 2, 4)[owner]
    found = staged_advantages(rewards, owner, stage, scale=scale)
    for j in range(30):
        group = owner == owner[j]
        std = rewards[group].std() + 1e-6 if scale else 1.0
        wanted = (rewards[j] - rewards[group & (stage <= stage[j])].mean()) / std
        assert found[j] == pytest.approx(0.0 if np.ptp(rewards[group]) == 0 else wanted, abs=1e-9)
    one = staged_advantages(rewards, owner, np.zeros(30), scale=scale)
    assert np.bincount(owner, one) == pytest.approx(np.zeros(owner.max() + 1), abs=1e-6)
    assert staged_advantages([], [], []).size == 0
