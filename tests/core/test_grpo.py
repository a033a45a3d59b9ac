"""How rollouts enter the gradient (F6-F8, theorem 10): exact sums against enumeration, autograd, Monte Carlo."""

from __future__ import annotations

from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdro_core import rollout_utility, sqrt_allocation
from gdro_core.grpo import ESTIMATORS, decoupling_price, gradient_variance, gradient_weight, mixed_group_probability

SEEDS = st.integers(0, 2**32 - 1)
RATES = st.floats(0.0, 1.0)


def advantages(rewards, estimator):
    """(..., n) advantages of groups along the last axis, written out from the definitions."""
    n = rewards.shape[-1]
    mean = rewards.mean(axis=-1, keepdims=True)
    if estimator == "rloo":
        return rewards - (rewards.sum(axis=-1, keepdims=True) - rewards) / (n - 1)
    if estimator == "dr_grpo":
        return rewards - mean
    std = rewards.std(axis=-1, keepdims=True)
    return np.divide(rewards - mean, std, out=np.zeros_like(rewards), where=std > 0)


@pytest.mark.parametrize(
    ("n", "p", "weight"),
    [(2, 0.05, 1.0), (2, 0.9, 1.0), (4, 0.05, 1.71), (12, 0.05, 2.94), (12, 0.5, 1.91)],
)
def test_weights_quoted_in_f6(n, p, weight):
    assert gradient_weight(n, p) == pytest.approx(weight, abs=0.005)


@given(st.integers(1, 150), st.floats(1e-6, 1 - 1e-6))
def test_theorem_10_weight_is_the_expected_standard_deviation_over_p_one_minus_p(n, p):
    """The definition, w_n = sum_k C(n, k) p^k (1-p)^(n-k) sqrt((k/n)(1 - k/n)) / (p (1-p)), with exact binomials."""
    terms = [comb(n, k) * p**k * (1 - p) ** (n - k) * sqrt(k * (n - k)) / n for k in range(n + 1)]
    assert gradient_weight(n, p) == pytest.approx(sum(terms) / (p * (1 - p)), rel=1e-9)


@given(st.integers(2, 400), RATES)
def test_weight_is_symmetric_monotone_and_bounded(n, p):
    """w_n(p) = w_n(1 - p) <= w_{n+1}(p); 2 (n-1)/n <= w_n <= min(sqrt(n-1), sqrt((n-1)/(n p (1-p)))); w_2 = 1."""
    weight = float(gradient_weight(n, p))
    assert weight == pytest.approx(gradient_weight(n, 1 - p), rel=1e-9)
    assert weight <= gradient_weight(n + 1, p) * (1 + 1e-11)
    assert 2 * (n - 1) / n * (1 - 1e-11) <= weight <= sqrt(n - 1) * (1 + 1e-11)
    assert weight * sqrt(p * (1 - p)) <= sqrt((n - 1) / n) * (1 + 1e-11)
    assert gradient_weight(2, p) == pytest.approx(1.0, rel=1e-12)


def test_limits_of_the_weight():
    """sqrt(n - 1) at p = 0 and 1, reached continuously; 1/sqrt(p (1 - p)) as n grows; no rollout to compare with: 0."""
    n = np.arange(1, 40)
    for p in (0.0, 1.0):
        np.testing.assert_allclose(gradient_weight(n, p), np.sqrt(n - 1.0), rtol=1e-12)
    for p in (1e-300, 1e-12, 1 - 1e-12):
        np.testing.assert_allclose(gradient_weight(n, p), np.sqrt(n - 1.0), rtol=1e-9)
    p = np.array([0.1, 0.5, 0.8])
    np.testing.assert_allclose(gradient_weight(20000, p), 1 / np.sqrt(p * (1 - p)), rtol=1e-3)
    for estimator in ("grpo", "dr_grpo"):
        assert (gradient_weight(1, [0.0, 0.3, 1.0], estimator) == 0).all()
        assert (gradient_variance(1, [0.0, 0.3, 1.0], estimator, separation=1.0) == 0).all()


def test_weight_without_standardisation():
    """Dr.GRPO: (n - 1)/n; RLOO: 1, whatever p."""
    n, p = np.array([[2], [5], [12]]), np.array([0.0, 0.2, 1.0])
    np.testing.assert_array_equal(gradient_weight(n, p, "dr_grpo"), np.broadcast_to((n - 1) / n, (3, 3)))
    np.testing.assert_array_equal(gradient_weight(n, p, "rloo"), np.ones((3, 3)))


@pytest.mark.parametrize("p", [0.03, 0.4, 0.9])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_theorem_10_weight_against_automatic_differentiation_of_the_loss(n, p):
    """The trainer's loss over all 2^n groups of a Bernoulli policy has gradient -w_n(p) dp/dtheta."""
    torch = pytest.importorskip("torch")
    objective = pytest.importorskip("gdro_llm.training.losses")
    theta = torch.tensor(np.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    groups = np.array(list(product([0.0, 1.0], repeat=n)))  # (2^n, n)
    owner = np.repeat(np.arange(len(groups)), n)
    right = torch.tensor(groups.ravel(), dtype=torch.float64)
    logprobs = (right * torch.nn.functional.logsigmoid(theta) + (1 - right) * torch.nn.functional.logsigmoid(-theta))[
        :, None
    ]
    probability = torch.tensor(np.prod(np.where(groups == 1, p, 1 - p), axis=1), dtype=torch.float64)
    for estimator in ESTIMATORS if n > 1 else ("grpo", "dr_grpo"):
        factors = objective.group_advantages(groups.ravel(), owner, scale=estimator == "grpo")
        factors = factors * n / (n - 1) if estimator == "rloo" else factors
        losses = objective.clipped_surrogate(logprobs, logprobs.detach(), torch.tensor(factors), 0.2, 0.28)
        loss = probability @ losses.reshape(len(groups), n).mean(dim=1)
        (slope,) = torch.autograd.grad(loss, theta, retain_graph=True)
        # The trainer adds 1e-6 to the standard deviation.
        assert -float(slope) == pytest.approx(gradient_weight(n, p, estimator) * p * (1 - p), rel=5e-6, abs=1e-15)


@given(st.integers(2, 5), st.floats(0.02, 0.98), st.sampled_from(ESTIMATORS), st.floats(0, 2), st.floats(-2, 2))
def test_mean_and_variance_by_enumeration_of_rewards_and_scores(n, p, estimator, noise, separation):
    """Over all 4^n outcomes of score = a (r - p) +- sigma, E g = a p (1-p) w_n(p) and Var g is as stated."""
    rewards = np.array(list(product([0.0, 1.0], repeat=n)))[:, None, :]
    signs = np.array(list(product([-1.0, 1.0], repeat=n)))[None, :, :]
    probability = np.prod(np.where(rewards == 1, p, 1 - p), axis=-1) / 2**n  # (2^n, 1)
    score = separation * (rewards - p) + noise * signs
    gradient = (advantages(rewards, estimator) * score).mean(axis=-1)
    mean = (probability * gradient).sum()
    assert mean == pytest.approx(separation * p * (1 - p) * gradient_weight(n, p, estimator), abs=1e-12)
    variance = gradient_variance(n, p, estimator, score_variance=noise**2, separation=separation)
    assert (probability * (gradient - mean) ** 2).sum() == pytest.approx(variance, abs=1e-12)


@given(st.integers(2, 200), RATES, st.floats(0, 3))
def test_theorem_10_variance_has_its_closed_forms(n, p, sigma):
    """Scores independent of rewards in {0, 1}: the closed forms of the docstring."""
    closed = {
        "grpo": mixed_group_probability(n, p) / n,
        "dr_grpo": p * (1 - p) * (n - 1) / n**2,
        "rloo": p * (1 - p) / (n - 1),
    }
    for estimator, value in closed.items():
        ours = gradient_variance(n, p, estimator, score_variance=sigma**2)
        assert ours == pytest.approx(sigma**2 * value, rel=1e-9, abs=1e-15)


def test_theorem_10_by_monte_carlo_with_rewards_of_plus_and_minus_one():
    """Gaussian scores of any mean, independent of the rewards: theorem 10's literal formulas, 4 times ours.

    2 % is six times sqrt(2 / runs) or more: false alarm 1e-8 if the seed were new.
    """
    rng = np.random.default_rng(0)
    n, p, sigma, runs = 6, 0.3, 1.5, 200_000
    rewards = np.where(rng.random((runs, n)) < p, 1.0, -1.0)
    scores = 0.7 + sigma * rng.normal(size=(runs, n))
    literal = {
        "grpo": sigma**2 * (1 - p**n - (1 - p) ** n) / n,  # the scale of the rewards cancels
        "dr_grpo": 4 * sigma**2 * p * (1 - p) * (n - 1) / n**2,
        "rloo": 4 * sigma**2 * p * (1 - p) / (n - 1),
    }
    for estimator, value in literal.items():
        gradient = (advantages(rewards, estimator) * scores).mean(axis=1)
        assert np.var(gradient) == pytest.approx(value, rel=0.02)
        ours = gradient_variance(n, p, estimator, score_variance=sigma**2)
        assert ours * (1 if estimator == "grpo" else 4) == pytest.approx(value, rel=1e-12)


def test_weight_by_monte_carlo_at_training_sizes():
    """n = 8 and 16 rollouts of a Bernoulli policy, whose score is r - p: the mean gradient over p (1 - p) is w_n(p)."""
    rng = np.random.default_rng(1)
    for n, p in ((8, 0.05), (16, 0.6)):
        rewards = (rng.random((200_000, n)) < p).astype(float)
        gradient = (advantages(rewards, "grpo") * (rewards - p)).mean(axis=1)
        error = gradient.std() / sqrt(gradient.size)
        # 4 sigma, twice: 1.3e-4 if the seed were new
        assert abs(gradient.mean() - p * (1 - p) * gradient_weight(n, p)) < 4 * error


@given(st.integers(1, 60), st.one_of(RATES, st.floats(-300, -1).map(lambda e: 10.0**e)))
def test_mixed_group_probability_is_stable(n, p):
    """1 - p^n - (1 - p)^n as the sum of its positive terms, to 12 digits even for tiny p; symmetric; 0 at n = 1."""
    terms = [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(1, n)]
    assert mixed_group_probability(n, p) == pytest.approx(sum(terms), rel=1e-11, abs=0.0)
    assert mixed_group_probability(n, 1 - p) == pytest.approx(mixed_group_probability(n, 1 - (1 - p)), rel=1e-11, abs=0)


def test_one_rollout_is_never_a_mixed_group():
    """Exactly 0 at n = 1, for every p; 2 p (1 - p) at n = 2."""
    p = np.linspace(0, 1, 1001)
    assert (mixed_group_probability(1, p) == 0).all()
    np.testing.assert_allclose(mixed_group_probability(2, p), 2 * p * (1 - p), rtol=1e-12)


def test_mixed_group_probability_under_a_beta_posterior_is_the_mixed_utility():
    """Integrated over p ~ Beta(2, 5), the expectation form is `rollout_utility("mixed", ...)`."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    p = 0.5 * (nodes + 1)
    density = 0.5 * weights * 30 * p * (1 - p) ** 4
    arms = np.arange(1, 13)
    expected = mixed_group_probability(arms[:, None], p) @ density
    np.testing.assert_allclose(rollout_utility("mixed", [2.0], [5.0], arms)[0], expected, atol=1e-12)


def test_broadcasting():
    """A column of n against a row of p; scalars give 0-d arrays; each entry is what it is alone."""
    n, p = np.array([[2], [5], [9]]), np.array([0.0, 0.2, 0.5, 1.0])
    for f in (gradient_weight, gradient_variance):
        for estimator in ESTIMATORS:
            table = f(n, p, estimator)
            assert table.shape == (3, 4)
            assert f(4, 0.5, estimator).shape == ()
            alone = [[float(f(int(i), float(j), estimator)) for j in p] for i in n[:, 0]]
            np.testing.assert_allclose(table, alone, rtol=1e-13)
    assert mixed_group_probability(n, p).shape == (3, 4)
    assert gradient_weight([], []).shape == (0,)


@given(SEEDS)
def test_price_of_decoupling_is_the_ratio_of_the_two_variances(seed):
    """F7: 1 + CV^2(w) under q sqrt(v) = Var(n prop sqrt v) / Var(n prop w sqrt v), and n prop w sqrt v is the best."""
    rng = np.random.default_rng(seed)
    bins = int(rng.integers(1, 8))
    weights, variance, share = (
        rng.exponential(size=bins),
        rng.gamma(0.5, size=bins) + 1e-6,
        rng.dirichlet(np.ones(bins)),
    )

    def weighted_variance(counts):
        return share @ (weights**2 * variance / counts)

    decoupled = weighted_variance(sqrt_allocation(variance, 4.0, share=share))
    joint = weighted_variance(sqrt_allocation(weights**2 * variance, 4.0, share=share))
    price = decoupling_price(weights, variance, share)
    assert price == pytest.approx(decoupled / joint, rel=1e-9)
    assert price >= 1
    assert decoupling_price(1e200 * weights, 1e-200 * variance, share) == pytest.approx(price, rel=1e-9)
    other = rng.exponential(size=bins) + 1e-3
    assert joint <= weighted_variance(4.0 * other / (share @ other)) * (1 + 1e-12)


def test_price_of_decoupling_is_one_for_equal_weights():
    """Equal weights cost nothing; bins without variance or share do not count."""
    assert decoupling_price([2.0, 2.0], [0.1, 0.2]) == 1.0
    assert decoupling_price([2.0, 2.0, 9.0], [0.1, 0.2, 0.0]) == pytest.approx(1.0, abs=1e-15)
    assert decoupling_price([2.0, 2.0, 9.0], [0.1, 0.2, 0.3], [0.5, 0.5, 0.0]) == pytest.approx(1.0, abs=1e-15)


@given(SEEDS)
def test_wse_is_least_at_the_two_thirds_power(seed):
    """F8: sum_b q_b sigma_b / sqrt(n_b) at sum_b q_b n_b = n_bar is least at n prop sigma^(2/3), not at sigma (Neyman).

    Its least value is (sum_b q_b sigma_b^(2/3))^(3/2) / sqrt(n_bar). If the WSE's weights q differ from the shares s of
    the budget, the minimiser is n prop (q sigma / s)^(2/3).
    """
    rng = np.random.default_rng(seed)
    bins = int(rng.integers(2, 8))
    sigma, share, adversary = rng.uniform(0.05, 1, bins), rng.dirichlet(np.ones(bins)), rng.dirichlet(np.ones(bins))

    def wse(shape, weights):
        return weights @ (sigma / np.sqrt(4.0 * shape / (share @ shape)))

    best = wse(sigma ** (2 / 3), share)
    assert best == pytest.approx((share @ sigma ** (2 / 3)) ** 1.5 / 2.0, rel=1e-12)
    best_adversary = wse((adversary * sigma / share) ** (2 / 3), adversary)
    nearby = sigma ** (2 / 3) * rng.uniform(0.99, 1.01, bins)
    for other in (sigma, np.ones(bins), rng.exponential(size=bins) + 1e-3, nearby):
        assert best <= wse(other, share) * (1 + 1e-12)
        assert best_adversary <= wse(other, adversary) * (1 + 1e-12)
    if np.ptp(sigma) > 0.1 and share.min() > 0.01:
        assert best < wse(sigma, share)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradient_weight(0, 0.5), r"n must hold .*\[1, .* got 0.0"),
        (lambda: gradient_weight(1.5, 0.5), "n must hold integers, got 1.5"),
        (lambda: gradient_weight(1, 0.5, "rloo"), r"n must hold .*\[2, .* got 1.0"),
        (lambda: gradient_variance(1, 0.5, "rloo"), r"n must hold .*\[2, .* got 1.0"),
        (lambda: gradient_weight(2, 1.1), r"p must hold .*\[0, 1\], got 1.1"),
        (lambda: gradient_weight(2, np.nan), "p must hold .*nan"),
        (lambda: gradient_weight(2, 0.5, "ppo"), "estimator must be one of 'grpo', 'dr_grpo', 'rloo', got 'ppo'"),
        (lambda: gradient_variance(2, 0.5, score_variance=-1.0), "score_variance must lie in .*-1.0"),
        (lambda: gradient_variance(2, 0.5, separation=np.inf), "separation must lie in .*inf"),
        (lambda: mixed_group_probability(0, 0.5), "n must hold .*0.0"),
        (lambda: mixed_group_probability(2, -0.1), "p must hold .*-0.1"),
        (lambda: decoupling_price([1.0], [1.0, 2.0]), r"weights must have shape \(2,\).*got \(1,\)"),
        (lambda: decoupling_price([1.0, -1.0], [1.0, 2.0]), "weights must hold .*-1.0"),
        (lambda: decoupling_price([1.0, 1.0], [1.0, 2.0], [0.5, 0.6]), "share must .* sum to 1, got 2 with sum 1.1"),
        (lambda: decoupling_price([], []), "share must have at least one entry"),
        (lambda: decoupling_price([0.0, 1.0], [1.0, 0.0]), "must all be above 0 in at least one bin"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
