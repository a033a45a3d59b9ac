"""Groups of other sizes and dealt plans spend the same budget, on prompts that every epoch visits once."""

from __future__ import annotations

import numpy as np
import pytest

from gdro_core import GDROController
from simulations.controls import Choosing, Dealt, GroupsOf, controller_of
from simulations.epochs import Epochs, offered
from simulations.population import train
from simulations.race import race
from simulations.testbeds import SKETCH, AdamLike, Learner, cells


def learner(seed=0):
    return Learner(cells(seed, prompts=96, held_out=32), steps=AdamLike(), learning_rate=0.25)


@pytest.mark.parametrize("size", [2, 4, 8, 12, 16, 5])
def test_groups_of_any_size_spend_the_budget(size):
    """64 rollouts a step in groups of n, or a little smaller where n does not divide 64; every prompt in its turn."""
    steps = train(learner(), GroupsOf(size, 4, 16), 6, 16, 4, seed=0)
    plans = [step["plan"] for step in steps]
    assert all(plan.counts.sum() == 64 for plan in plans)
    assert all(plan.counts.max() == size for plan in plans if 64 % size == 0)
    assert all(np.ptp(plan.counts) <= 1 and plan.counts.max() <= size for plan in plans)
    assert {len(plan.ids) for plan in plans} == {-(-64 // size)}
    visits = np.bincount(np.concatenate([plan.ids for plan in plans]), minlength=96)
    assert np.ptp(visits) <= 1
    assert steps[-1]["rollouts"] == 6 * 64


def test_sizes_see_the_same_stream_of_prompts():
    """Groups of 2 take in one step what groups of 4 take in two."""
    pairs, fours = (train(learner(), GroupsOf(n, 4, 16), 4, 16, 4, seed=3) for n in (2, 4))
    assert pairs[0]["plan"].ids == fours[0]["plan"].ids + fours[1]["plan"].ids


def test_a_control_of_size_n_bar_is_uniform():
    """The same run as the controller's, to the bit."""
    one, other = learner(), learner()
    ends = [race(one, GroupsOf(4, 4, 16), 640, 16, 1)[-1], race(other, GDROController.uniform(4), 640, 16, 1)[-1]]
    assert ends[0] == ends[1]


def test_a_planner_is_offered_its_candidates():
    """A multiple of the batch, between one prompt and all."""
    control = GroupsOf(4, 4, 16)
    for candidates, expected in ((1.0, 16), (2.0, 32), (0.25, 4), (0.01, 1), (50.0, 96)):
        control.candidates = candidates
        assert offered(control, 16, 96) == expected
    assert offered(GDROController.uniform(4), 16, 96) == 16


def test_epochs_are_permutations():
    """Batches that do not divide the epoch: no prompt twice in a batch, visits differ by one at most."""
    epochs = Epochs(50, 15, np.random.default_rng(0))
    batches = [epochs.draw() for _ in range(9)]
    assert all(len(set(batch)) == 15 for batch in batches)
    assert np.ptp(np.bincount(np.concatenate(batches), minlength=50)) <= 1


def test_a_dealt_plan_has_the_pairs_of_its_planner_on_prompts_at_random():
    """The same (weight, count) pairs; over many deals every prompt gets every count equally often."""
    planner, one = GDROController.recommended(4, seed=0), learner()
    race(one, planner, 10 * 16 * 4, 16, 0)
    ids = list(range(16))
    own = planner.plan(ids)
    assert np.ptp(own.counts) > 2
    dealt = Dealt(planner, np.random.default_rng(0))
    plans = [dealt.plan(ids) for _ in range(400)]
    pairs = sorted(zip(own.weights.tolist(), own.counts.tolist(), strict=True))
    for plan in plans:
        assert sorted(zip(plan.weights.tolist(), plan.counts.tolist(), strict=True)) == pairs
        assert set(plan.ids) == set(ids)
    counts = np.array([plan.counts[np.argsort(plan.ids)] for plan in plans])
    np.testing.assert_allclose(counts.mean(axis=0), 4.0, atol=5 * own.counts.std() / 20)
    place = {prompt: k for k, prompt in enumerate(own.ids)}
    assert all(own.bins[place[i]] == b for i, b in zip(plans[0].ids, plans[0].bins.tolist(), strict=True))


def test_a_dealt_planner_learns_from_what_was_dealt():
    """Its memory holds the prompts that got the rollouts."""
    planner = GDROController.recommended(4, seed=0)
    dealt = Dealt(planner, np.random.default_rng(0))
    plan = dealt.plan(list(range(8)))
    dealt.observe(plan, np.ones(32))
    assert (planner.classifier.bins(list(plan.ids)) >= 0).all()


def test_a_controller_with_components_is_shown_halves_without_a_change_of_the_run(monkeypatch):
    """At steps 0, 10 and 20 of 25; the streams of prompts and outcomes are untouched."""
    seen = []
    monkeypatch.setattr(GDROController, "observe_gradients", lambda self, plan, *halves: seen.append((plan, *halves)))
    blind = GDROController.recommended(4, seed=0)
    blind.components = None
    watched = race(learner(), GDROController.recommended(4, seed=0), 25 * 64, 16, 0)
    assert watched == race(learner(), blind, 25 * 64, 16, 0)
    assert [plan.step for plan, *_ in seen] == [*range(10), 10, 20]  # at first until kappa is known, in vain
    _, rows, first, second, correct, trials = seen[0]
    assert rows.tolist() == list(range(16))
    assert first.shape == second.shape == (16, learner().theta.size + SKETCH)
    assert trials.tolist() == [[2, 2]] * 16
    assert (correct <= trials).all()


def test_a_controller_chooses_among_what_it_is_offered():
    """Twice the prompts at the budget of the batch; the controller inside is found, also under a dealt plan."""
    controller = GDROController.recommended(4, seed=0)
    choosing = Choosing(controller, 4, 16)
    rows = race(learner(), choosing, 10 * 64, 16, 0)
    assert rows[-1]["rollouts"] == 640
    plan = choosing.plan(list(range(32)))
    assert plan.counts.sum() == 64
    assert controller_of(Dealt(choosing, np.random.default_rng(0))) is controller
    assert controller_of(GroupsOf(4, 4, 16)) is None
