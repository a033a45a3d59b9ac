"""The frontier law: signal and noise of a group, best weights, group sizes, no harm (theorems 15 to 18)."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from gdro_core import frontier_allocation, greedy_allocation
from gdro_core.theory.frontier import (
    best_group_size,
    frontier_utility,
    frontier_weight,
    group_efficiency,
    group_size_gain,
    purity,
    step_cosine,
)

SEEDS = st.integers(0, 2**32 - 1)
RATES = st.floats(1e-6, 1 - 1e-6)
KAPPAS = st.floats(-3, 3).map(lambda e: 10.0**e)
ESTIMATORS = ["grpo", "dr_grpo", "rloo"]


def spread(n, p):
    """X = n k (1 - k) of every K = 0..n, and its probability."""
    successes = np.arange(n + 1)
    return successes * (1 - successes / n), binom.pmf(successes, n, p)


def scale(n, estimator):
    """f(K) of the advantages f(K) (r - k)."""
    x = spread(n, 0.5)[0]
    if estimator == "grpo":
        return np.divide(np.sqrt(n), np.sqrt(x), out=np.zeros(n + 1), where=x > 0)
    return np.full(n + 1, n / (n - 1) if estimator == "rloo" else 1.0)


@given(st.integers(2, 4), st.floats(0.05, 0.95), st.floats(-2, 2), st.floats(0, 2), st.sampled_from(ESTIMATORS))
def test_theorem_15_signal_and_noise_of_a_group_by_enumeration(n, p, separation, sigma, estimator):
    """Over all rewards and scores a (r - p) +- sigma: E G = a E[f X], variance given the rewards sigma^2 E[f^2 X]."""
    rewards = np.array(list(product([0.0, 1.0], repeat=n)))
    signs = np.array(list(product([-1.0, 1.0], repeat=n)))
    probability = np.prod(np.where(rewards == 1, p, 1 - p), axis=1)
    hits = rewards.sum(axis=1).astype(int)
    advantages = scale(n, estimator)[hits][:, None] * (rewards - rewards.mean(axis=1, keepdims=True))
    scores = separation * (rewards[:, None] - p) + sigma * signs
    gradient = (advantages[:, None] * scores).sum(axis=2)  # (rewards, signs)
    (x, pmf), f = spread(n, p), scale(n, estimator)
    assert probability @ gradient.mean(axis=1) == pytest.approx(separation * pmf @ (f * x), abs=1e-12)
    assert probability @ gradient.var(axis=1) == pytest.approx(sigma**2 * pmf @ (f**2 * x), abs=1e-12)


@given(SEEDS, st.integers(2, 40), RATES)
def test_theorem_15_no_scale_of_the_advantages_beats_a_constant(seed, n, p):
    """E[f X]^2 / E[f^2 X] <= (n - 1) p (1 - p), with equality for constant f alone."""
    x, pmf = spread(n, p)
    best = (n - 1) * p * (1 - p)
    for f in (np.ones(n + 1), scale(n, "rloo")):
        assert (pmf @ (f * x)) ** 2 / (pmf @ (f**2 * x)) == pytest.approx(best, rel=1e-9)
    f = np.random.default_rng(seed).normal(size=n + 1)
    ratio = (pmf @ (f * x)) ** 2 / (pmf @ (f**2 * x))
    assert ratio <= best * (1 + 1e-9)
    if n >= 4 and 0.1 < p < 0.9:
        assert ratio < best * (1 - 1e-9)


@given(st.integers(2, 200), RATES, st.sampled_from(ESTIMATORS))
def test_theorem_15_efficiency_is_the_ratio_to_the_bound(n, p, estimator):
    """By its definition, and for GRPO as E[x]^2 / E[x^2] over Binomial(n - 2, p); 1 where f is constant when mixed."""
    (x, pmf), f = spread(n, p), scale(n, estimator)
    efficiency = group_efficiency(n, p, estimator)
    defined = (pmf @ (f * x)) ** 2 / (pmf @ (f**2 * x)) / ((n - 1) * p * (1 - p))
    assert efficiency == pytest.approx(defined, rel=1e-8)
    if estimator == "grpo":
        j = np.arange(n - 1)
        y, law = 1 / np.sqrt((j + 1.0) * (n - 1 - j)), binom.pmf(j, n - 2, p)
        assert efficiency == pytest.approx((law @ y) ** 2 / (law @ y**2), rel=1e-9)
    if estimator != "grpo" or n <= 3:
        assert efficiency == pytest.approx(1.0, rel=1e-9)


def test_theorem_15_grpo_loses_at_most_4_percent_to_12_rollouts_and_6_3_percent_to_64():
    """For all p. E[x] and E[x^2] fall on [0, 1/2], so E[x](right)^2 / E[x^2](left) bounds a whole interval; bisect."""
    for sizes, most in ((range(2, 13), 0.038), (range(13, 65), 0.063)):
        for n in sizes:
            j = np.arange(n - 1)
            y = 1 / np.sqrt((j + 1.0) * (n - 1 - j))
            assert (np.diff(y, 2) > -1e-12).all()  # convex and symmetric, hence so is E[x] in p; its square the same
            edges = np.linspace(0, 0.5, 65)
            left, right = edges[:-1], edges[1:]
            for _ in range(20):
                below = (binom.pmf(j, n - 2, right[:, None]) @ y) ** 2 / (binom.pmf(j, n - 2, left[:, None]) @ y**2)
                open_ = below < 1 - most
                left, right = left[open_], right[open_]
                if not left.size:
                    break
                middle = (left + right) / 2
                left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
            assert not left.size, n
    assert group_efficiency(12, 0.1347) < 1 - 0.0374  # nothing below 3.74 % would do
    assert group_efficiency(64, 0.0331) < 1 - 0.0627
    assert (group_efficiency([4, 12, 64], [[0.0], [1.0]]) == 1.0).all()


@given(st.integers(1, 60), RATES)
def test_theorem_16_moments_of_the_spread(n, p):
    """E X = v (n - 1) and E X^2 = E X (v (n - 1) + ((n - 1) (1 - 4 v) + 2 v) / n): what the two closed forms need."""
    (x, pmf), v = spread(n, p), p * (1 - p)
    assert pmf @ x == pytest.approx(v * (n - 1), rel=1e-9, abs=1e-15)
    if n > 1:
        own = pmf @ x**2 / (pmf @ x)
        assert own == pytest.approx(v * (n - 1) + ((n - 1) * (1 - 4 * v) + 2 * v) / n, rel=1e-8)
        for kappa in (0.0, 0.3, 20.0):
            closed = 4.0 * v / ((1 + 2 * kappa * v) / (n - 1) + kappa * (1 - 6 * v) / n + kappa * v)
            assert frontier_utility(n, 2.0, v, kappa) == pytest.approx(closed, rel=1e-12)
            assert closed == pytest.approx(4 * (pmf @ x) ** 2 / (pmf @ x + kappa * pmf @ x**2), rel=1e-8)
            assert frontier_weight(n, 2.0, v, kappa) == pytest.approx(2.0 / (1 + kappa * own), rel=1e-8)


def random_prompts(rng, prompts, most=12):
    """lambda, v, counts (some 0) and kappa of a batch."""
    value, rate = rng.uniform(0.05, 1, prompts), rng.uniform(0.01, 0.99, prompts)
    counts = rng.integers(2, most + 1, prompts) * (rng.random(prompts) < 0.8)
    return value, rate * (1 - rate), counts, 10 ** rng.uniform(-3, 1.5)


def gain(weights, value, variance, counts, kappa, common):
    """<step, common direction> over the root mean square length of the step, over the same without noise."""
    x = variance * np.maximum(counts - 1, 0)
    own = np.divide(x**2, frontier_utility(counts, 1.0, variance, kappa), out=np.zeros_like(x), where=x > 0)
    signal = np.sum(weights * value * x)
    return np.sqrt(common) * signal / np.sqrt(common * signal**2 + np.sum(weights**2 * own))


@given(SEEDS, st.floats(-3, 3).map(lambda e: 10.0**e))
def test_theorem_16_the_weights_are_the_best_and_reach_the_sum_of_utilities(seed, common):
    """With the common part in the norm or (c small) hardly: no other weights gain more; theirs is the stated gain."""
    rng = np.random.default_rng(seed)
    value, variance, counts, kappa = random_prompts(rng, int(rng.integers(1, 12)))
    counts[0] = 2
    weights = frontier_weight(counts, value, variance, kappa)
    best = gain(weights, value, variance, counts, kappa, common)
    assert best == pytest.approx(step_cosine(frontier_utility(counts, value, variance, kappa).sum(), common), rel=1e-9)
    for other in (rng.exponential(size=value.size), weights * rng.uniform(0.9, 1.1, value.size), value):
        assert gain(other, value, variance, counts, kappa, common) <= best * (1 + 1e-12)


def test_theorem_16_by_monte_carlo_of_scores():
    """Vector scores with a common and an own part: mean along the common direction and mean square length.

    The common part's own fluctuation, which the theorem leaves out, is added here; it is 2 % of the square. 4 standard
    errors: false alarm 1.3e-4 if the seed were new.
    """
    rng = np.random.default_rng(0)
    dims, runs, common, kappa = 48, 3000, 0.05, 1.5
    rates, counts = np.array([0.1, 0.3, 0.5, 0.2, 0.7]), np.array([4, 2, 6, 8, 3])
    variance = rates * (1 - rates)
    weights = frontier_weight(counts, 1.0, variance, kappa)
    step, fluctuation = np.zeros((runs, dims)), 0.0
    for p, n, w in zip(rates, counts, weights, strict=True):
        separation = rng.normal(0, np.sqrt(kappa / dims), (runs, dims))  # own part, tau^2 = kappa
        separation[:, 0] += np.sqrt(common)
        rewards = (rng.random((runs, n)) < p).astype(float)
        scores = separation[:, None] * (rewards - p)[..., None] + rng.normal(0, 1 / np.sqrt(dims), (runs, n, dims))
        step += w * ((rewards - rewards.mean(axis=1, keepdims=True))[..., None] * scores).sum(axis=1)
        x, pmf = spread(n, p)
        fluctuation += w**2 * common * (pmf @ x**2 - (pmf @ x) ** 2)
    total = frontier_utility(counts, 1.0, variance, kappa).sum()
    length = common * total**2 + total + fluctuation  # with these weights sum w x = N = t
    along, square = step[:, 0], (step**2).sum(axis=1)
    assert fluctuation < 0.03 * length
    assert abs(along.mean() - np.sqrt(common) * total) < 4 * along.std() / np.sqrt(runs)
    assert abs(square.mean() - length) < 4 * square.std() / np.sqrt(runs)
    assert along.mean() / np.sqrt(square.mean()) == pytest.approx(step_cosine(total, common), rel=0.05)


@given(st.floats(1e-6, 0.25), KAPPAS)
def test_theorem_16_utility_is_concave_from_one_rollout_on_and_not_from_none(v, kappa):
    """On the integers; U(3) - U(2) > U(2) / 2, so that no value of one rollout smaller than U(3) / 3 bends it back."""
    utility = frontier_utility(np.arange(200), 1.0, v, kappa)
    assert (utility[:2] == 0).all()
    assert (np.diff(utility) >= 0).all()
    assert (np.diff(utility[1:], 2) <= 1e-12 * utility.max()).all()
    assert utility[3] - utility[2] > utility[2] / 2


def test_theorem_16_weights_fixed_before_the_rollouts_reach_less_than_the_expected_utility():
    """p ~ Beta(1/2, 9/2), lambda = 1 - p: weights for known p reach E U, one for all reaches U at other moments."""
    a, b = 0.5, 4.5
    p = np.random.default_rng(0).beta(a, b, 200_000)
    v, value = p * (1 - p), 1 - p
    known = np.mean(value**2 * v)
    one = np.mean(value * v) ** 2 / np.mean(v)
    closed = a * b * (b + 1) ** 2 / ((a + b) * (a + b + 1) * (a + b + 2) ** 2)
    assert one == pytest.approx(closed, rel=0.02)
    assert one < 0.98 * known
    n, kappa = 6, 0.7
    signal = v * (n - 1)
    noise = signal**2 / frontier_utility(n, 1.0, v, kappa)  # E X + kappa E X^2
    moments = np.mean(value * v) / np.sqrt(np.mean(v**2)), np.mean(v**2) / np.mean(v)
    assert np.mean(value * signal) ** 2 / np.mean(noise) == pytest.approx(frontier_utility(n, *moments, kappa))
    weight = frontier_weight(n, np.mean(value * v) / np.mean(v), moments[1], kappa)
    assert weight == pytest.approx(np.mean(value * signal) / np.mean(noise))


@given(st.floats(0.0, 1.0), st.floats(0.0, 0.49), st.floats(-2, 2))
def test_theorem_16_purity_is_the_separation_by_graded_rewards(p, phi, separation):
    """Scores of mean a (r - p), grades turned round with chance phi: their separation by grade is a u."""
    right = phi + (1 - 2 * phi) * p
    if min(right, 1 - right) < 1e-3:
        return
    hit = (1 - phi) * p / right  # P(truly right | graded right)
    missed = phi * p / (1 - right)  # P(truly right | graded wrong)
    u = purity(right, phi)
    assert separation * (hit - missed) == pytest.approx(separation * u, abs=1e-9)
    assert 0 <= u <= 1 - 2 * phi + 1e-12


def test_theorem_16_a_prompt_graded_right_no_more_often_than_by_mistake_is_worth_nothing():
    """u = 0 there, and p^2 (1 - 2 phi)^2 / (phi (1 - phi)) times the rest just above; u = 1 without errors."""
    phi = 0.05
    rates = np.array([0.0, 0.01, phi, 1 - phi, 1.0])
    assert np.abs(purity(rates, phi)).max() < 1e-15
    assert np.abs(frontier_utility(8, purity(rates, phi), rates * (1 - rates), 0.0)).max() < 1e-15
    p = 1e-4
    r = phi + (1 - 2 * phi) * p
    worth = frontier_utility(2, purity(r, phi), r * (1 - r), 0.0)
    assert worth == pytest.approx((p * (1 - 2 * phi)) ** 2 / (phi * (1 - phi)), rel=2e-3)
    assert (purity([0.0, 0.3, 1.0], 0.0) == 1.0).all()


@given(st.floats(1e-4, 0.25), st.floats(-2, 4).map(lambda e: 10.0**e))
def test_theorem_17_best_group_size(v, kappa):
    """The real maximiser of U(n) / n, the rule for integers, never pairs, near 1 + 1 / sqrt(kappa v)."""
    best = float(best_group_size(kappa, v))
    sizes = np.concatenate([np.arange(2, max(int(best) + 3, 10)), best * np.array([0.99, 1.0, 1.01])])
    rate = frontier_utility(sizes, 1.0, v, kappa) / sizes
    assert rate.max() <= rate[-2] * (1 + 1e-12)
    whole = rate[:-3]
    n = int(whole.argmax()) + 2
    part = kappa * v / (1 + 2 * kappa * v)
    assert 1 / (n * (n - 1)) <= part * (1 + 1e-9)
    assert part <= 1 / ((n - 1) * (n - 2)) * (1 + 1e-9)
    assert n >= 3
    assert 1 / np.sqrt(kappa * v) <= best - 1 <= 1 / np.sqrt(kappa * v) + np.sqrt(2)
    least = 1 + kappa * (1 - 3 * v) + 2 * np.sqrt(kappa * v * (1 + 2 * kappa * v))
    assert rate[-2] == pytest.approx(v / least, rel=1e-9)
    assert best_group_size(0.0, v) == np.inf


@given(SEEDS, KAPPAS)
def test_theorem_17_one_size_for_a_pool(seed, kappa):
    """Filtered weights: between the least and the greatest n*. Equal weights: n* at v = E[v^2] / E[v]."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.01, 0.99, 20)
    v = p * (1 - p)
    sizes = np.arange(2, 400)
    rates = group_size_gain(sizes, kappa, v)
    assert rates[0] == pytest.approx(np.mean([frontier_utility(2, 1.0, x, kappa) / 2 for x in v]), rel=1e-12)
    best = best_group_size(kappa, v)
    assert np.floor(best.min()) <= sizes[rates.argmax()] <= np.ceil(best.max())
    signal = v[:, None] * (sizes - 1)
    noise = signal**2 / frontier_utility(sizes, 1.0, v[:, None], kappa)
    equal = signal.mean(axis=0) ** 2 / noise.mean(axis=0) / sizes
    assert (equal <= rates * (1 + 1e-12)).all()
    assert abs(sizes[equal.argmax()] - best_group_size(kappa, np.mean(v**2) / np.mean(v))) < 1


def test_theorem_17_prompts_are_funded_in_the_order_of_their_rates_at_their_own_size():
    """Those with the greatest max U(n) / n, each with at least that n, the last one and its donors apart."""
    rng = np.random.default_rng(3)
    p, value, kappa = rng.uniform(0.02, 0.98, 400), rng.uniform(0.2, 1, 400), 0.8
    table = frontier_utility(np.arange(25), value[:, None], (p * (1 - p))[:, None], kappa)
    rate = table[:, 2:] / np.arange(2, 25)
    counts = frontier_allocation(table, 300)
    funded = counts > 0
    assert (counts[funded] >= 2).all()
    assert (counts < rate.argmax(axis=1) + 2)[funded].sum() <= 1
    assert np.sort(rate.max(axis=1)[funded])[1] >= np.sort(rate.max(axis=1)[~funded])[-2]
    alike = frontier_utility(np.arange(25), np.ones((400, 1)), 0.15, 2.5)  # of equal prompts: n* for each, here 3
    assert np.unique(frontier_allocation(alike, 300), return_counts=True)[1].tolist() == [300, 100]


@given(SEEDS, st.integers(2, 6))
def test_theorem_18_the_plan_gains_at_least_what_uniform_does(seed, mean):
    """At true p, lambda and kappa, for any weights of uniform counts, and whatever the common part of the norm."""
    rng = np.random.default_rng(seed)
    value, variance, _, kappa = random_prompts(rng, int(rng.integers(1, 30)))
    table = frontier_utility(np.arange(13), value[:, None], variance[:, None], kappa)
    rows = np.arange(value.size)
    counts = frontier_allocation(table, mean * value.size, rng=rng)
    uniform = np.full(value.size, mean)
    plan = step_cosine(table[rows, counts].sum(), 0.3)
    assert plan >= step_cosine(table[:, mean].sum(), 0.3) * (1 - 1e-12)
    for weights in (np.ones(value.size), frontier_weight(uniform, value, variance, kappa)):
        assert plan >= gain(weights, value, variance, uniform, kappa, 0.3) * (1 - 1e-12)
    spread_out = greedy_allocation(table[:, 2:], mean * value.size, min_rollouts=2)
    assert table[rows, counts].sum() >= table[rows, spread_out].sum() * (1 - 1e-12)


@given(SEEDS)
def test_theorem_18_wrong_values_cost_their_squared_cosine(seed):
    """Planned with lambda', the step has t = cos^2(lambda, lambda') sum U, cos under the measure U / lambda^2."""
    rng = np.random.default_rng(seed)
    value, variance, counts, kappa = random_prompts(rng, 10)
    counts[0], believed = 4, rng.uniform(0.05, 1, 10)
    measure = frontier_utility(counts, 1.0, variance, kappa)
    cosine = measure @ (value * believed) / np.sqrt((measure @ value**2) * (measure @ believed**2))
    weights = frontier_weight(counts, believed, variance, kappa)
    planned = gain(weights, value, variance, counts, kappa, 0.7)
    assert planned == pytest.approx(step_cosine(cosine**2 * (measure @ value**2), 0.7), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_efficiency(1, 0.5), r"n must hold .*\[2, inf\], got 1"),
        (lambda: group_efficiency(4, 1.5), "p must hold .*1.5"),
        (lambda: group_efficiency(4, 0.5, "ppo"), "estimator must be one of .*'ppo'"),
        (lambda: frontier_utility(-1, 1.0, 0.1, 0.5), "n must hold .*-1"),
        (lambda: frontier_utility(2, np.nan, 0.1, 0.5), "value must hold .*nan"),
        (lambda: frontier_utility(2, 1.0, 0.3, 0.5), r"variance must hold .*\[0, 0.25\], got 0.3"),
        (lambda: frontier_weight(2, 1.0, 0.1, -0.5), "kappa must hold .*-0.5"),
        (lambda: step_cosine(-1.0, 0.5), "utility must hold .*-1"),
        (lambda: step_cosine(1.0, -0.5), "common must lie in .*-0.5"),
        (lambda: best_group_size(-1.0, 0.1), "kappa must hold .*-1"),
        (lambda: best_group_size(1.0, 0.5), "variance must hold .*0.5"),
        (lambda: group_size_gain(0, 1.0, [0.1]), "n must hold .*got 0"),
        (lambda: group_size_gain(2, 1.0, []), "variance must have at least one entry"),
        (lambda: purity(1.5, 0.1), "rate must hold .*1.5"),
        (lambda: purity(0.5, 0.5), r"phi must lie in \[0, 0.5\), got 0.5"),
        (lambda: purity(0.5, -0.1), "phi must lie in .*-0.1"),
    ],
)
def test_bad_input_is_refused(call, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        call()
