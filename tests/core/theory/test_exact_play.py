"""Exact play: draws follow the Gibbs law of the summed estimates, under the exact budget (theorem 6, F3)."""

from __future__ import annotations

import json
from itertools import product
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from gdro_core import ExactPlay, path_learning_rate

BATCH, SIZE = np.array([0, 0, 1, 2, 3, 3]), np.array([2, 1, 1, 2])
FEASIBLE = [c for c in product(range(2, 7), repeat=4) if np.dot(SIZE, c) == 24]


def bandit_law(game):
    """Gibbs over the feasible allocations, by enumeration, and its marginals (4, 5)."""
    rate = game.step_size
    if rate is None:
        rate = path_learning_rate(game.state_dict()["rounds"] + 1, 4, 5, feedback="bandit") / sqrt(2)
    scores = np.array(game.state_dict()["scores"])
    energy = np.array([rate * scores[range(4), np.subtract(c, 2)].sum() for c in FEASIBLE])
    law = np.exp(energy - energy.max())
    law /= law.sum()
    marginals = np.zeros((4, 5))
    for c, probability in zip(FEASIBLE, law, strict=True):
        marginals[range(4), np.subtract(c, 2)] += probability
    return law, marginals


@pytest.mark.parametrize("step_size", [None, 0.3])
def test_the_bandit_feeds_importance_weighted_losses_to_exact_play(step_size):
    """F3, theorem 6: draws follow the Gibbs law of the summed estimates, each weighted by the exact marginal."""
    rng = np.random.default_rng(0)
    game = ExactPlay(4, 4, 2, 6, step_size=step_size, loss_bound=2.0)
    for t in range(40):
        law, marginals = bandit_law(game)
        before = np.array(game.state_dict()["scores"])
        counts = game.counts(BATCH, rng=rng)
        losses = rng.normal(scale=2.0, size=6)
        game.observe(BATCH, counts, losses)
        played, mean = counts[[0, 2, 3, 4]], np.bincount(BATCH, losses) / SIZE
        before[range(4), played - 2] -= (np.clip(mean / 2.0, -1, 1) + 1) / 2 / marginals[range(4), played - 2]
        np.testing.assert_allclose(game.state_dict()["scores"], before, rtol=1e-9)
        assert game.state_dict()["rounds"] == t + 1
    law, marginals = bandit_law(game)
    drawn = [tuple(game.counts(BATCH, rng=np.random.default_rng(s))[[0, 2, 3, 4]]) for s in range(3000)]
    likely = law * 3000 > 5
    seen = [drawn.count(c) for c in FEASIBLE]
    observed = [*np.array(seen)[likely], np.array(seen)[~likely].sum()]
    expected = [*law[likely] * 3000, law[~likely].sum() * 3000]
    scaled = np.array(expected) * sum(observed) / sum(expected)
    assert chisquare(observed, scaled).pvalue > 1e-3  # false alarm 1e-3 if the seeds were new
    p = game.arm_probabilities
    product_law = np.array([p[range(4), np.subtract(c, 2)].prod() for c in FEASIBLE])
    np.testing.assert_allclose(product_law / product_law.sum(), law, rtol=1e-9)


def test_the_bandits_estimates_are_unbiased():
    """Averaged over its own draws, an update adds exactly minus the scaled loss to every arm that can be played."""
    game = ExactPlay(4, 4, 2, 6, step_size=0.5)
    start = game.state_dict() | {"scores": np.random.default_rng(1).normal(size=(4, 5)).tolist()}
    game.load_state_dict(start)
    law, marginals = bandit_law(game)
    loss_of_arm, mean = np.random.default_rng(2).uniform(-1, 1, (4, 5)), np.zeros((4, 5))
    for c, probability in zip(FEASIBLE, law, strict=True):
        game.load_state_dict(start)
        game.observe(BATCH, np.repeat(c, SIZE), np.repeat(loss_of_arm[range(4), np.subtract(c, 2)], SIZE))
        mean += probability * (np.array(game.state_dict()["scores"]) - start["scores"])
    np.testing.assert_allclose(mean, np.where(marginals > 0, -(loss_of_arm + 1) / 2, 0.0), rtol=1e-9)
    assert (marginals > 0).sum() > 12


def test_the_bandit_refuses_counts_it_cannot_have_drawn():
    """A plan of another state has no marginal to weight by; nothing has changed after the error."""
    game = ExactPlay(4, 4, 2, 6, step_size=1.0)
    game.load_state_dict(game.state_dict() | {"scores": np.full((4, 5), [0.0, -1e4, 0.0, -1e4, 0.0]).tolist()})
    before = game.state_dict()
    with pytest.raises(ValueError, match=r"counts must be a draw of the present state.*\[3, 4, 4, 5\]"):
        game.observe(BATCH, [3, 3, 4, 4, 5, 5], np.zeros(6))
    assert game.state_dict() == before


def test_a_batch_of_unseen_prompts_is_no_round_of_the_bandit():
    """Nothing was played, so nothing is learnt and the rate does not fall."""
    game = ExactPlay(4, 4, 2, 6)
    before = game.state_dict()
    game.observe([-1, -1], [4, 4], [1.0, -1.0])
    assert game.state_dict() == before


def test_the_bandit_finds_the_best_allocation():
    """One arm of each bin is better by half of the range: after 600 rounds the joint optimum is played far more."""
    best, rng = np.array([2, 6, 6, 4]), np.random.default_rng(0)
    game, hits = ExactPlay(4, 4, 2, 6, step_size=path_learning_rate(600, 4, 5, feedback="bandit")), []
    for _ in range(600):
        counts = game.counts(BATCH, rng=rng)
        game.observe(BATCH, counts, np.where(counts == best[BATCH], -0.5, 0.5))
        hits.append((counts == best[BATCH]).all())
    assert best @ SIZE == 24
    assert np.mean(hits[-100:]) > 5 * np.mean(hits[:100])  # no alarm at 5 other seeds


@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_the_budget_is_exact_and_unseen_prompts_get_the_mean(seed, size):
    """Sum n_i = n_bar N inside the bounds, one count a bin."""
    rng = np.random.default_rng(seed)
    bins = rng.integers(-1, 4, size)
    counts = ExactPlay(4, 4, 2, 6).counts(bins, rng=rng)
    assert counts.sum() == 4 * size
    assert ((counts >= 2) & (counts <= 6)).all()
    assert (counts[bins < 0] == 4).all()
    assert all(np.ptp(counts[bins == b]) == 0 for b in set(bins) - {-1})


def test_state_round_trips_through_json():
    """A restored game continues bit for bit."""
    rng = np.random.default_rng(0)
    original, restored = ExactPlay(4, 4, 2, 6), ExactPlay(4, 4, 2, 6)
    for _ in range(3):
        plans = [game.counts(BATCH, rng=np.random.default_rng(5)) for game in (original, restored)]
        np.testing.assert_array_equal(*plans)
        original.observe(BATCH, plans[0], rng.normal(size=6))
        restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
        assert restored.state_dict() == original.state_dict()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda game: game.load_state_dict(game.state_dict() | {"rounds": -1}), "rounds must be an integer >= 0"),
        (lambda game: game.load_state_dict(game.state_dict() | {"scores": [[0.0]]}), "scores must have shape"),
        (lambda game: game.load_state_dict(game.state_dict() | {"loss_bound": 2.0}), "loss_bound = 2.0"),
        (lambda game: game.load_state_dict(game.state_dict() | {"version": 3}), "version = 3"),
        (lambda game: game.observe([0], [7], [0.0]), "counts must hold .*7"),
        (lambda game: game.observe([0], [4], [np.nan]), "losses must hold .*nan"),
        (lambda game: game.observe([0, 0], [4, 5], [1, 1]), r"counts must be the same .* bin 0, got \[4, 5\]"),
        (lambda game: game.counts([0]), "rng must be given, to draw the counts, got None"),
        (lambda game: game.counts([4], rng=np.random.default_rng(0)), "bins must hold .*4"),
        (lambda game: ExactPlay(4, 4, 2, 6, loss_bound=0.0), "loss_bound must lie in .*0.0"),
        (lambda game: ExactPlay(4, 4, 0, 6), "min_rollouts must be an integer >= 1, got 0"),
        (lambda game: ExactPlay(4, 4, 2, 6, step_size=-0.1), "step_size must lie in .*-0.1"),
    ],
)
def test_bad_input_is_refused(call, message):
    """Errors name argument, rule and value, and the game is as it was."""
    game = ExactPlay(4, 4, 2, 6)
    game.observe(BATCH, np.full(6, 4), np.zeros(6))
    before = game.state_dict()
    with pytest.raises(ValueError, match=message):
        call(game)
    assert game.state_dict() == before
