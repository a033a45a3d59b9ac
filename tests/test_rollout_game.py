"""Rollout-GDRO: utilities are expectations, budgets are met exactly, prices are marginal gains."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import roots_jacobi
from scipy.stats import chisquare

from gdro_core import RolloutGDRO, rollout_utility, sqrt_allocation

SEEDS = st.integers(0, 2**32 - 1)
GIVEN_P = {  # utility of n rollouts at pass rate p
    "variance": lambda p, n: -p * (1 - p) / n,
    "mixed": lambda p, n: 1 - p**n - (1 - p) ** n,
    "hit": lambda p, n: 1 - (1 - p) ** n,
}
SURROGATE = {"utility": "surrogate", "granularity": "bin"}
KINDS = [{"utility": name, "granularity": g} for name in GIVEN_P for g in ("prompt", "bin")] + [SURROGATE]


def batch(rng, size, bins=4, unseen=True):
    """Bins with unseen prompts, posterior, weights."""
    return (
        rng.integers(-int(unseen), bins, size),
        rng.gamma(1, 3, size) + 0.1,
        rng.gamma(1, 3, size) + 0.1,
        rng.random(size),
    )


@pytest.mark.parametrize("name", GIVEN_P)
@given(a=st.floats(0.1, 50), b=st.floats(0.1, 50))
def test_utility_is_the_posterior_mean_and_concave(name, a, b):
    """Gauss-Jacobi quadrature, exact for these polynomials in p, agrees; second differences in n are <= 0."""
    arms = np.arange(1, 17)
    node, weight = roots_jacobi(12, b - 1, a - 1)
    p = (1 + node[:, None]) / 2
    utility = rollout_utility(name, [a], [b], arms)[0]
    np.testing.assert_allclose(utility, weight @ GIVEN_P[name](p, arms) / weight.sum(), atol=1e-9)
    assert (np.diff(utility, 2) <= 1e-12).all()
    assert (np.diff(utility) >= -1e-12).all()


@pytest.mark.parametrize("name", GIVEN_P)
def test_utility_agrees_with_monte_carlo(name):
    """Draw p from its posterior: means within five standard errors."""
    p = np.random.default_rng(0).beta(1.5, 4.0, (20000, 1))
    draws = GIVEN_P[name](p, np.array([1, 2, 5, 12]))
    error = 5 * draws.std(axis=0) / np.sqrt(20000) + 1e-12
    assert (np.abs(rollout_utility(name, [1.5], [4.0], [1, 2, 5, 12])[0] - draws.mean(axis=0)) < error).all()


@given(SEEDS)
def test_counts_follow_the_joint_law(seed):
    """F7 and Theorem 4.2 with bounds: in a large batch n_i is n ∝ ω√v, clipped, rounded to a neighbouring integer."""
    rng = np.random.default_rng(seed)
    a, b, omega = rng.gamma(1, 3, 2000) + 0.05, rng.gamma(1, 3, 2000) + 0.05, rng.uniform(0.2, 4, 2000)
    counts = RolloutGDRO(1, 8, 2, 24).counts(np.zeros(2000), a, b, omega)
    variance = -rollout_utility("variance", a, b, [1])[:, 0]
    law = sqrt_allocation(omega**2 * variance, 8.0, lower=2, upper=24)
    assert np.abs(counts - law).max() < 1
    assert counts.sum() == 16000


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, low=st.integers(1, 4), span=st.integers(0, 8), size=st.integers(1, 20), fraction=st.floats(0, 1))
def test_the_budget_is_exact_and_unseen_prompts_get_the_mean(kind, seed, low, span, size, fraction):
    """sum n_i = n_bar N inside the bounds, for every n_bar with n_bar N whole; unseen prompts get n_bar rounded."""
    rng = np.random.default_rng(seed)
    total = size * low + round(fraction * size * span)
    if kind["granularity"] == "bin":
        total -= total % size  # with a whole n_bar one count per bin always meets the budget
    game = RolloutGDRO(4, total / size, low, low + span, **kind)
    bins, a, b, omega = batch(rng, size)
    counts = game.counts(bins, a, b, omega, rng=rng)
    assert counts.sum() == total
    assert ((low <= counts) & (counts <= low + span)).all()
    assert (np.abs(counts[bins < 0] - total / size) < 1).all()
    if kind["granularity"] == "bin":
        assert all(np.ptp(counts[bins == b]) == 0 for b in set(bins) - {-1})


def test_a_mean_that_floats_cannot_hold_is_still_met():
    """1.15 x 100 is 114.99999999999999 in floating point, and 115 rollouts."""
    assert RolloutGDRO(1, 1.15, 1, 3).counts(np.zeros(100), np.ones(100), np.ones(100)).sum() == 115


@given(SEEDS)
def test_the_price_is_what_one_rollout_more_is_worth(seed):
    """Per prompt: the optimal utility of budget + 1 less that of the budget, and the largest gain nobody bought."""
    rng = np.random.default_rng(seed)
    bins, a, b, omega = batch(rng, 10, unseen=False)
    utility = rollout_utility("mixed", a, b, np.arange(2, 8)) * omega[:, None]
    values, prices, rows = [], [], np.arange(10)
    for total in (*range(40, 44), 70):
        counts, price = RolloutGDRO(4, total / 10, 2, 7, utility="mixed").allocate(bins, a, b, omega)
        values.append(utility[rows, counts - 2].sum())
        prices.append(price)
    np.testing.assert_allclose(np.diff(values)[:3], prices[:3], atol=1e-12)
    assert prices[-1] == 0.0  # everybody is at n_max
    assert RolloutGDRO(4, 4, 2, 7).allocate([-1, -1], [1, 1], [1, 1])[1] == 0.0


def test_the_price_of_a_bin_is_per_rollout():
    """A bin's gain is shared by its prompts: the same bin thrice as large has the same price."""
    for copies in (1, 3):
        bins = np.repeat([0, 1], copies)
        a, b = np.repeat([2.0, 8.0], copies), np.repeat([2.0, 1.0], copies)
        game = RolloutGDRO(2, 3, 1, 8, granularity="bin")
        counts, price = game.allocate(bins, a, b)
        gains = np.diff(rollout_utility("variance", a, b, game.arms), axis=1)
        assert price == pytest.approx(gains[np.arange(bins.size), counts - 1].max())


@given(SEEDS)
def test_bin_allocation_is_brute_force(seed):
    """The best of all joint choices of one count per bin that meet the budget."""
    rng = np.random.default_rng(seed)
    bins, a, b, omega = batch(rng, 9, bins=3, unseen=False)
    there, size = np.unique(bins, return_counts=True)
    utility = rollout_utility("hit", a, b, [1, 2, 3, 4, 5]) * omega[:, None]
    counts = RolloutGDRO(3, 3, 1, 5, utility="hit", granularity="bin").counts(bins, a, b, omega)
    best = max(
        sum(utility[bins == bin_, n - 1].sum() for bin_, n in zip(there, choice, strict=True))
        for choice in product(range(1, 6), repeat=there.size)
        if size @ choice == 27
    )
    assert utility[np.arange(9), counts - 1].sum() == pytest.approx(best)


@given(SEEDS)
def test_permuting_a_batch_permutes_its_counts(seed):
    """Where no gains tie, a count belongs to the prompt and not to its place."""
    rng = np.random.default_rng(seed)
    columns = batch(rng, 12, unseen=False)
    order = rng.permutation(12)
    game = RolloutGDRO(4, 4, 2, 12)
    np.testing.assert_array_equal(game.counts(*columns)[order], game.counts(*(column[order] for column in columns)))


@given(SEEDS)
def test_the_published_bandit_learns_the_played_arms_alone(seed):
    """Eq. 20: S moves by the EMA of -(mean loss + mu n) at (bin, its n) alone; the exact budget leaves mu alone."""
    rng = np.random.default_rng(seed)
    game, expected = RolloutGDRO(4, 4, 2, 6, **SURROGATE), np.zeros((4, 5))
    game.load_state_dict(game.state_dict() | {"price": game.state_dict()["price"] | {"price": 0.25}})
    for _ in range(5):
        bins, a, b, _ = batch(rng, 8)
        counts, price = game.allocate(bins, a, b, rng=rng)
        losses = rng.normal(size=8)
        game.observe(bins, counts, losses)
        for bin_ in set(bins) - {-1}:
            n = counts[bins == bin_][0]
            expected[bin_, n - 2] += 0.4 * (-(losses[bins == bin_].mean() + 0.25 * n) - expected[bin_, n - 2])
        np.testing.assert_allclose(game.state_dict()["scores"], expected, atol=1e-12)
        assert price == game.shadow_price.price == 0.25
    softmax = np.exp(0.65 * expected) / np.exp(0.65 * expected).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(game.arm_probabilities, 0.99 * softmax + 0.01 / 5)
    assert game.allocate([-1], [1.0], [1.0])[1] == 0.25


@given(SEEDS)
def test_the_published_allocation_has_the_greatest_probability(seed):
    """§3.3: of all joint choices that meet the budget, the product of arm probabilities is largest."""
    rng = np.random.default_rng(seed)
    game = RolloutGDRO(3, 4, 2, 6, **SURROGATE)
    game.load_state_dict(game.state_dict() | {"scores": rng.normal(size=(3, 5)).tolist()})
    bins = np.array([0, 0, 0, 1, 1, 2, 2])
    counts = game.counts(bins, np.ones(7), np.ones(7))
    probability = {
        arms: game.arm_probabilities[range(3), arms].prod()
        for arms in product(range(5), repeat=3)
        if np.dot([3, 2, 2], np.add(arms, 2)) == 28
    }
    assert tuple(counts[[0, 3, 5]] - 2) == max(probability, key=probability.get)


def test_tied_arms_are_drawn_from_all_feasible_allocations():
    """F5: before any feedback the published game is the zero-information null, uniform over what meets the budget."""
    game, bins, one = RolloutGDRO(3, 4, 2, 6, **SURROGATE), [0, 1, 2], np.ones(3)
    drawn = [tuple(game.counts(bins, one, one, rng=np.random.default_rng(s)).tolist()) for s in range(2000)]
    feasible = [c for c in product(range(2, 7), repeat=3) if sum(c) == 12]
    assert chisquare([drawn.count(c) for c in feasible]).pvalue > 1e-3


@pytest.mark.parametrize("exploration", [0.0, 0.5, 1.0])
def test_arm_probabilities_survive_huge_scores(exploration):
    """A vanishing probability is still comparable: no overflow, no log of zero."""
    game = RolloutGDRO(2, 3, 2, 4, step_size=1e6, exploration=exploration, **SURROGATE)
    game.observe([0], [2], [-1e6])  # arm 2 of bin 0 is certain, but for exploration
    np.testing.assert_allclose(game.arm_probabilities.sum(axis=1), 1.0)
    rng = np.random.default_rng(0)
    counts = {tuple(game.counts([0, 1], [1, 1], [1, 1], rng=rng).tolist()) for _ in range(50)}
    assert counts == ({(2, 4), (3, 3), (4, 2)} if exploration == 1.0 else {(2, 4)})


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trips_through_json(kind):
    """A restored game continues bit for bit."""
    rng = np.random.default_rng(0)
    original, restored = (RolloutGDRO(4, 4, 2, 6, **kind) for _ in range(2))
    bins, a, b, omega = batch(rng, 8)
    for _ in range(3):
        plans = [game.counts(bins, a, b, omega, rng=np.random.default_rng(5)) for game in (original, restored)]
        np.testing.assert_array_equal(*plans)
        if kind == SURROGATE:
            original.observe(bins, plans[0], rng.normal(size=8))
        restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
        assert restored.state_dict() == original.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version = 3"),
        ({"max_rollouts": 7}, "max_rollouts = 7"),
        ({"utility": "hit"}, "utility = 'hit'"),
        ({"scores": [[0.0]]}, "scores must have shape"),
        ({"scores": [[np.inf] * 5] * 4}, "scores must hold finite numbers, got inf"),
        ({"price": {"version": 1, "target": 4.0, "step_size": 0.05, "price": -1.0}}, "price must lie in .*-1"),
        ({"price": {"version": 1, "target": 4.0, "step_size": 0.5, "price": 0.0}}, "step_size = 0.5"),
    ],
)
def test_state_of_another_shape_is_refused(change, message):
    """Nothing has changed after the error."""
    game = RolloutGDRO(4, 4, 2, 6, **SURROGATE)
    game.observe([0, 1], [2, 6], [0.5, -0.5])
    before = game.state_dict()
    with pytest.raises(ValueError, match=message):
        game.load_state_dict({**before, "scores": [[1.0] * 5] * 4, **change})
    assert game.state_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bins": 0}, "num_bins must be an integer >= 1, got 0"),
        ({"min_rollouts": 0}, "min_rollouts must be an integer >= 1, got 0"),
        ({"min_rollouts": 7}, "max_rollouts must be at least min_rollouts = 7, got 6"),
        ({"mean_rollouts": 1}, r"mean_rollouts must lie in \[2, 6\], got 1"),
        ({"mean_rollouts": 6.5}, r"mean_rollouts must lie in \[2, 6\], got 6.5"),
        ({"utility": "gain"}, "utility must be one of .*'gain'"),
        ({"granularity": "token"}, "granularity must be one of .*'token'"),
        ({"utility": "surrogate"}, "granularity must be \"bin\" .*'prompt'"),
        ({"step_size": -0.1}, "step_size must lie in .*-0.1"),
        ({"exploration": 2.0}, "exploration must lie in .*2.0"),
        ({"ema": 0.0}, "ema must lie in .*0.0"),
        ({"price_step_size": 0.0}, "step_size must lie in .*0.0"),
    ],
)
def test_construction_refuses(options, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        RolloutGDRO(**{"num_bins": 4, "mean_rollouts": 4, "min_rollouts": 2, "max_rollouts": 6, **options})


def published_game():
    return RolloutGDRO(4, 4, 2, 6, **SURROGATE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda game: game.counts([4], [1], [1]), "bins must hold .*4"),
        (lambda game: game.counts([0], [1, 1], [1]), "a must have shape"),
        (lambda game: game.counts([0], [1], [np.nan]), "b must hold .*nan"),
        (lambda game: game.counts([0], [1], [1], [-1]), "weights must hold .*-1"),
        (lambda game: game.observe([0], [7], [0.0]), "counts must hold .*7"),
        (lambda game: game.observe([0], [4], [np.nan]), "losses must hold .*nan"),
        (lambda game: game.observe([0, 1, 1], [4, 3, 5], [1, 1, 1]), r"counts must be the same .* bin 1, got \[3, 5\]"),
        (
            lambda game: RolloutGDRO(4, 4, 2, 6).observe([0], [4], [0.0]),
            'observe needs utility "surrogate"; "variance"',
        ),
        (lambda game: RolloutGDRO(4, 4, 2, 6).counts([0], [0], [1]), "a must be above 0"),
        (lambda game: RolloutGDRO(4, 4, 2, 6).counts([0], [1], [0]), "b must be above 0"),
        (lambda game: RolloutGDRO(4, 2.5, 2, 6).counts([0], [1], [1]), "must be an integer, got 2.5 x 1"),
        (
            lambda game: RolloutGDRO(4, 2.5, 2, 6, granularity="bin").counts([0, 0], [1, 1], [1, 1]),
            "budget 5 cannot be met .*nearest feasible: 4 and 6",
        ),
        (lambda game: rollout_utility("surrogate", [1], [1], [1]), "utility must be one of .*'surrogate'"),
        (lambda game: rollout_utility("hit", [1], [1], [0]), "arms must hold .*0"),
    ],
)
def test_bad_input_is_refused(call, message):
    """Errors name argument, rule and value, and the game is as it was."""
    game = published_game()
    before = game.state_dict()
    with pytest.raises(ValueError, match=message):
        call(game)
    assert game.state_dict() == before
