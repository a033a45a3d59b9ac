"""Regret bounds against their derivations, the duality gap of GDRO as a game (theorem 5), heavy tails (theorem 8)."""

from __future__ import annotations

from itertools import pairwise, product
from math import e, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdro_core.theory.bandits import Exp3, Exp3IX, Exp3P, Exp3S, Hedge
from gdro_core.theory.estimators import median_of_means, truncated_mean
from gdro_core.theory.regret import (
    best_in_hindsight,
    delayed_hedge_bound,
    duality_gap,
    duality_gap_bound,
    exp3_bound,
    exp3_ix_bound,
    exp3_p_bound,
    exp3_s_bound,
    gdro_full_information_bound,
    gdro_one_sample_bound,
    hedge_bound,
    limited_advice_bound,
    tracking_complexity,
    tsallis_inf_bound,
)


def slope(horizons, values):
    return np.polyfit(np.log(horizons), np.log(values), 1)[0]


# ------------------------------------------------------------------------------------------- bounds, from the proofs

instances = pytest.mark.parametrize(("t", "k"), [(50, 2), (3000, 3), (10**6, 40)])


@instances
def test_bounds_are_the_proofs_terms_at_the_policies_steps(t, k):
    """Theorem 4: each bound equals penalty + stability at the step size that `for_horizon` sets."""
    eta = Hedge.for_horizon(k, t).step_size
    assert hedge_bound(t, k) == pytest.approx(log(k) / eta + eta * t / 8) == pytest.approx(sqrt(t * log(k) / 2))
    eta = Hedge.for_horizon(k, t, total_delay=5 * t).step_size
    assert delayed_hedge_bound(t, k, 5 * t) == pytest.approx(log(k) / eta + eta * t / 8 + eta * 5 * t / 4)
    eta = Exp3.for_horizon(k, t).step_size
    assert exp3_bound(t, k) == pytest.approx(log(k) / eta + eta * t * k / 2) == pytest.approx(sqrt(2 * t * k * log(k)))
    chance = np.linspace(0.1, 1, t)
    eta = sqrt(2 * log(k) / (1 / chance).sum())
    assert limited_advice_bound(k, chance) == pytest.approx(log(k) / eta + eta / 2 * (1 / chance).sum())


@instances
@pytest.mark.parametrize("delta", [0.3, 0.01])
def test_high_probability_bounds_are_the_proofs_terms(t, k, delta):
    """Exp3-IX: union of Neu's Lemma 1; half of the commonly quoted delta term. Exp3.P: the sum is just under 5.15."""
    policy = Exp3IX.for_horizon(k, t)
    eta, gamma = policy.step_size, policy.implicit_exploration
    proof = log(k) / eta + log(2 * k / delta) / (2 * gamma)
    proof += (eta / 2 + gamma) * (k * t + log(2 / delta) / (2 * gamma))
    assert exp3_ix_bound(t, k, delta) == pytest.approx(proof)
    quoted = 2 * sqrt(2 * k * t * log(k)) + (sqrt(2 * k * t / log(k)) + 1) * log(2 / delta)
    assert quoted - proof == pytest.approx(sqrt(k * t / (2 * log(k))) * log(2 / delta))
    if exp3_p_bound(t, k, delta) < t:
        policy = Exp3P.for_horizon(k, t, delta)
        eta, beta, gamma = policy.step_size, policy.bias, policy.exploration
        assert (1 + beta) * k * eta <= gamma <= 0.5
        proof = beta * t * k + gamma * t + (1 + beta) * eta * k * t + log(k / delta) / beta + log(k) / eta
        assert proof <= exp3_p_bound(t, k, delta)
    assert exp3_p_bound(t, k, delta) == pytest.approx(5.15 * sqrt(t * k * log(k / delta)))


@instances
def test_tsallis_bound_covers_its_proof(t, k):
    """Tsallis-INF: penalty + stability is at most 4 sqrt(K T) + 1, and not half of it."""
    proof = (4 * sqrt(k) - 4) * sqrt(t) / 2 + (sqrt(k) / np.sqrt(np.arange(1, t + 1))).sum()
    assert 0.5 * tsallis_inf_bound(t, k) < proof <= tsallis_inf_bound(t, k)
    assert tsallis_inf_bound(t, k) == pytest.approx(4 * sqrt(k * t) + 1)


@given(st.integers(2, 10**5), st.integers(2, 50), st.data())
def test_tracking_complexity_is_the_log_loss_of_sharing(t, k, data):
    """Exp3.S: C = ln K + S ln(K / alpha) + (T - 1 - S) ln 1/(1 - alpha) at alpha = S/(T - 1), minimal over alpha."""
    s = data.draw(st.integers(1, t - 1))

    def cost(alpha):
        stay = (t - 1 - s) * -np.log1p(-alpha) if s < t - 1 else 0.0
        return log(k) + s * log(k / alpha) + stay

    complexity = tracking_complexity(t, k, s)
    assert complexity == pytest.approx(cost(s / (t - 1)))
    assert all(complexity <= cost(a) * (1 + 1e-9) for a in (0.5 * s / (t - 1), (s / (t - 1) + 1) / 2) if a < 1)
    assert complexity <= (s + 1) * log(k) + s * log(e * (t - 1) / s) + 1e-9
    policy = Exp3S.for_horizon(k, t, s)
    assert policy.share == s / (t - 1)
    assert exp3_s_bound(t, k, s) == pytest.approx(complexity / policy.step_size + policy.step_size * t * k / 2)
    assert exp3_s_bound(t, k, 0) == pytest.approx(exp3_bound(t, k))


def test_gdro_bounds_are_the_sums_of_their_parts():
    """Theorem 5: learner's and adversary's regret and the price of noise, over T."""
    t, m, d, g = 5000, 7, 3.0, 0.4
    learner, hoeffding = 2 * d * g * sqrt(t), sqrt(t * log(m) / 2)
    assert gdro_full_information_bound(t, m, d, g) == pytest.approx((learner + hedge_bound(t, m) + hoeffding) / t)
    levels = np.exp(-np.arange(0.0, 60.0, 0.01) - log(0.5))  # E R <= A + B (ln 2 + int_0^inf min(1, delta) dx)
    slope_in_log = exp3_ix_bound(t, m, 1 / e) - exp3_ix_bound(t, m, 1.0)  # B
    mean = exp3_ix_bound(t, m, 1.0) + slope_in_log * (levels / 2).sum() * 0.01  # A + B ln 2 + B
    assert gdro_one_sample_bound(t, m, d, g) == pytest.approx((learner + hoeffding + mean) / t, rel=1e-2)


# ---------------------------------------------------------------------------------------------------- best in hindsight


@pytest.mark.parametrize("switches", range(6))
@pytest.mark.parametrize("shape", [(1, 3), (5, 1), (6, 2), (5, 3)])
def test_best_in_hindsight_is_the_minimum_over_all_sequences(shape, switches):
    """Dynamic programming = brute force over K^T sequences."""
    losses = np.random.default_rng(22).normal(size=shape)
    t, k = losses.shape
    brute = min(
        sum(losses[i, arm] for i, arm in enumerate(path))
        for path in product(range(k), repeat=t)
        if sum(a != b for a, b in pairwise(path)) <= switches
    )
    assert best_in_hindsight(losses, switches) == pytest.approx(brute, abs=1e-9)


# ------------------------------------------------------------------------------------------- GDRO as a game, theorem 5

# Groups with L_i(theta) = (1 - <theta, v_i>) / 2 over the unit disc: D = 2, G = 1/2, l in [0, 1]. The saddle point is
# the point of least norm in the hull of the v_i: here the middle of v_0 and v_1, the third group has no weight.
ANGLES = np.deg2rad([0.0, 150.0, 60.0])
MEANS = 0.8 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)  # (3, 2) v_i = 0.8 u_i, sampled as u_i or -u_i
VALUE = (1 - np.linalg.norm(MEANS[:2].mean(axis=0))) / 2


def play_game(horizon, replicates, rng, *, one_sample):
    """Averaged play of projected gradient descent and Hedge (all groups sampled) or Exp3-IX (one): gaps and regrets."""
    theta, q_sum = np.zeros((replicates, 2)), np.zeros((replicates, 3))
    theta_sum, paid, rows = np.zeros((replicates, 2)), np.zeros(replicates), np.arange(replicates)
    adversary = (Exp3IX if one_sample else Hedge).for_horizon(3, horizon, replicates=replicates)
    for _ in range(horizon):
        q = adversary.probabilities
        theta_sum += theta
        q_sum += q
        paid += (q * (1 - theta @ MEANS.T) / 2).sum(axis=1)
        units = np.where(rng.random((replicates, 3, 1)) < 0.9, 1.0, -1.0) * (MEANS / 0.8)  # mean v_i
        losses = (1 - (units @ theta[:, :, None])[:, :, 0]) / 2
        if one_sample:
            i = adversary.sample(rng)
            gradient = -units[rows, i] / 2
            adversary.update(i, 1 - losses[rows, i])
        else:
            gradient = -(q[:, :, None] * units).sum(axis=1) / 2
            adversary.update(-losses)
        theta = theta - 2.0 / (0.5 * sqrt(horizon)) * gradient
        theta /= np.maximum(np.linalg.norm(theta, axis=1, keepdims=True), 1.0)
    worst = ((1 - theta_sum / horizon @ MEANS.T) / 2).max(axis=1)
    best = (1 - np.linalg.norm(q_sum / horizon @ MEANS, axis=1)) / 2
    regret_learner, regret_adversary = paid - horizon * best, horizon * worst - paid
    return worst, best, regret_learner, regret_adversary


@pytest.mark.parametrize(("one_sample", "bound"), [(False, gdro_full_information_bound), (True, gdro_one_sample_bound)])
def test_theorem_5_duality_gap_falls_like_the_inverse_square_root_of_the_horizon(one_sample, bound):
    """Theorem 5: mean gap + 3 s.e. under its bound, slope about -1/2, the value of the game found from both sides."""
    horizons, r, gaps = (1000, 4000, 16000), 64, []
    for t in horizons:
        worst, best, *regrets = play_game(t, r, np.random.default_rng(20), one_sample=one_sample)
        gap = np.array([duality_gap(*pair) for pair in zip(worst, best, strict=True)])
        limits = [duality_gap_bound(*pair, t) for pair in zip(*regrets, strict=True)]
        assert (gap <= np.add(limits, 1e-12)).all()  # Eq. 27, every run
        assert gap.mean() + 3 * gap.std() / sqrt(r) <= bound(t, 3, 2.0, 0.5)
        assert (worst >= VALUE - 1e-12).all()
        assert (best <= VALUE + 1e-12).all()
        gaps.append(gap.mean())
    assert -0.6 <= slope(horizons, gaps) <= -0.42  # no alarm at 5 other seeds


def test_the_gap_of_a_strictly_convex_game_is_below_the_regrets():
    """Eq. 27 is an inequality: quadratic groups |theta - c_i|^2 / 8 on a circle, the centre is the saddle point."""
    centres = np.stack([np.cos(2 * np.pi * np.arange(5) / 5), np.sin(2 * np.pi * np.arange(5) / 5)], axis=1)
    horizon, theta, adversary = 2000, np.array([0.9, -0.2]), Hedge.for_horizon(5, 2000)
    thetas, qs = np.zeros((horizon, 2)), np.zeros((horizon, 5))
    for t in range(horizon):
        thetas[t], qs[t] = theta, adversary.probabilities
        losses = ((theta - centres) ** 2).sum(axis=1) / 8
        theta = theta - 2.0 / (0.5 * sqrt(horizon)) * (theta - qs[t] @ centres) / 4
        adversary.update(-losses)
    table = ((thetas[:, None] - centres) ** 2).sum(axis=2) / 8  # (T, 5) L_i(theta_t)
    paid, q = (qs * table).sum(), qs.mean(axis=0)
    low = q @ ((q @ centres - centres) ** 2).sum(axis=1) / 8  # the minimiser of a q-mixture is the mixed centre
    high = (((thetas.mean(axis=0) - centres) ** 2).sum(axis=1) / 8).max()
    regret_learner, regret_adversary = paid - horizon * low, -paid - best_in_hindsight(-table)
    assert regret_adversary <= hedge_bound(horizon, 5)
    gap = duality_gap(high, low)
    assert 0 < gap < 0.9 * duality_gap_bound(regret_learner, regret_adversary, horizon)
    assert low <= 1 / 8 <= high


# ---------------------------------------------------------------------------------------------- heavy tails, theorem 8


def heavy_regret(estimate, noise, horizon, rng, replicates=60, samples=30):
    """Hedge on estimated bin means: bin 1 is harder by 0.5, a bin's payoffs have infinite variance."""
    means = np.array([0.0, 0.5, 0.0])
    policy = Hedge(
        3, sqrt(8 * log(3) / horizon) / 2.0, replicates=replicates
    )  # means and estimates: a range of about 2
    earned = np.zeros(replicates)
    for _ in range(horizon):
        earned += policy.probabilities @ means
        policy.update(-estimate(means[:, None] + noise(rng, (replicates, 3, samples))))
    return (0.5 * horizon - earned).mean()


def pareto(rng, shape):
    """Tail index 1.1, mean 0: E|X|^r is finite for r < 1.1 only."""
    return (rng.random(shape) ** (-1 / 1.1) - 11.0) / 2.0


def student(rng, shape):
    return rng.standard_t(1.1, shape)


@pytest.mark.parametrize("noise", [pareto, student])
@pytest.mark.parametrize("robust", ["median_of_means", "truncated_mean"])
def test_theorem_8_an_adversary_fed_robust_bin_means_keeps_its_rate_where_the_plain_mean_does_not(noise, robust):
    """Theorem 8: slope at most about 1/2 with a robust mean per round, about 1 with the plain mean."""
    estimate = {
        "median_of_means": lambda x: median_of_means(x, 0.25),  # 10 blocks of 3
        "truncated_mean": lambda x: truncated_mean(x, 15.0, 1.05, 0.25),  # E|X|^1.05 < 15 in every bin
    }[robust]
    horizons = (100, 400, 1600)
    kept = [heavy_regret(estimate, noise, t, np.random.default_rng(21)) for t in horizons]
    plain = [heavy_regret(lambda x: x.mean(axis=-1), noise, t, np.random.default_rng(21)) for t in horizons]
    assert slope(horizons, kept) <= 0.56  # these three: no alarm at 5 other seeds
    assert slope(horizons, plain) > 0.85
    assert kept[-1] < 0.2 * plain[-1]


# ---------------------------------------------------------------------------------------------------------- bad input

BAD = [
    (lambda: hedge_bound(0, 2), "horizon must be an integer >= 1, got 0"),
    (lambda: hedge_bound(10, 1), "num_arms must be an integer >= 2, got 1"),
    (lambda: delayed_hedge_bound(10, 2, -1.0), "total_delay must lie in .*-1.0"),
    (lambda: limited_advice_bound(2, [0.5, 0.0]), "observation_probability must be positive, got 0.0"),
    (lambda: limited_advice_bound(2, [0.5, 1.5]), "observation_probability must hold .*1.5"),
    (lambda: exp3_ix_bound(10, 2, 0.0), r"delta must lie in \(0, 1\], got 0.0"),
    (lambda: exp3_p_bound(10, 2, 1.5), r"delta must lie in \(0, 1\], got 1.5"),
    (lambda: exp3_s_bound(10, 2, 10), "switches must be at most horizon - 1 = 9, got 10"),
    (lambda: tracking_complexity(10, 2, -1), "switches must be an integer >= 0, got -1"),
    (lambda: gdro_full_information_bound(10, 1, 1.0, 1.0), "num_groups must be an integer >= 2, got 1"),
    (lambda: gdro_one_sample_bound(10, 2, -1.0, 1.0), "diameter must lie in .*-1.0"),
    (lambda: gdro_one_sample_bound(10, 2, 1.0, np.nan), "gradient_norm must lie in .*nan"),
    (lambda: best_in_hindsight([0.0, 1.0]), r"losses must have shape \(-1, -1\)"),
    (lambda: best_in_hindsight([[0.0, np.inf]]), "losses must hold finite numbers, got inf"),
    (lambda: best_in_hindsight(np.zeros((3, 0))), r"losses must have at least one arm, got shape \(3, 0\)"),
    (lambda: duality_gap(0.4, 0.5), "best_adversary must be at least best_learner = 0.5, got 0.4"),
    (lambda: duality_gap(0.5 - 1e-8, 0.5), "best_adversary must be at least best_learner = 0.5"),
    (lambda: duality_gap(1e6 - 0.01, 1e6), "best_adversary must be at least best_learner = 1000000.0"),
    (lambda: duality_gap(np.nan, 0.5), "best_adversary must lie in .*nan"),
    (lambda: duality_gap_bound(1.0, 1.0, 0), "horizon must be an integer >= 1, got 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_round_off_is_not_a_negative_gap():
    assert duality_gap(0.5 - 1e-12, 0.5) == 0.0


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_a_duality_gap_below_zero_by_rounding_is_zero(size):
    """1e-10 of the values' size (of 1 for smaller ones) is rounding; ten times the tolerance of 1e-9 is an error."""
    assert duality_gap(size - 1e-10 * max(size, 1.0), size) == 0.0
    with pytest.raises(ValueError, match="best_adversary must be at least"):
        duality_gap(size - 1e-8 * max(size, 1.0), size)
