"""The shadow price: how often dual ascent misses the budget, and what a hard budget costs (theorem 7)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdro_core import ShadowPrice
from gdro_core.theory.price import hard_budget_regret_bound, violation_bound

VARIANCE, SHARE = np.array([0.25, 0.16, 0.04, 0.01]), np.array([0.1, 0.2, 0.3, 0.4])
LOW, HIGH, TARGET = 2.0, 12.0, 4.0
CLEARING = (0.19 / 3.2) ** 2  # 0.4 x 2 + sum_{b < 3} q_b sqrt(v_b / mu) = 4


def demand(price, variance=VARIANCE):
    """(B,) n_b(mu) = clip(sqrt(v_b / mu), n_min, n_max) (Eq. 31)."""
    return np.clip(np.sqrt(variance / max(price, 1e-12)), LOW, HIGH)


def run(horizon, step_size, rng, prompts=8, bounded=False):
    """Realised means of batches whose bins (or, if bounded, whose variances) are drawn anew each step."""
    price, realised = ShadowPrice(TARGET, step_size), np.empty(horizon)
    for t in range(horizon):
        if bounded:  # noise that never lifts the demand above the target at the price of the largest variance
            realised[t] = SHARE @ demand(price.price, VARIANCE * rng.uniform(0.5, 1.0, 4))
        else:
            realised[t] = demand(price.price)[rng.choice(4, prompts, p=SHARE)].mean()
        price.update(realised[t])
    return price, realised


@pytest.mark.parametrize("bounded", [True, False])
def test_theorem_7_violation_of_a_noisy_demand_is_within_the_bound(bounded):
    """Theorem 7: on every path by telescoping, for sure under bounded noise, in the mean under noisy batches."""
    assert SHARE @ demand(CLEARING) == pytest.approx(TARGET)
    violations, bounds = [], []
    for seed in range(30):
        step_size = 10.0 ** np.random.default_rng(seed).uniform(-5, -2)
        price, realised = run(300, step_size, np.random.default_rng(seed), bounded=bounded)
        mean = realised.mean() - TARGET
        assert mean <= violation_bound(300, step_size, price.price) + 1e-12
        if bounded:
            reach = CLEARING + step_size * (HIGH - TARGET)
            assert price.highest <= reach
            assert mean <= violation_bound(300, step_size, reach)
        else:
            violations.append(mean)
            bounds.append(violation_bound(300, step_size, CLEARING, noise=HIGH - TARGET))
    if not bounded:
        assert np.mean(np.array(violations) - bounds) <= 0  # no alarm at 5 other seeds


def test_theorem_7_violation_falls_like_the_inverse_square_root():
    """alpha ∝ 1 / sqrt(T): the mean violation from a cold start has log-log slope -1/2, below its bound."""
    horizons, means = [100, 400, 1600, 6400], []
    for horizon in horizons:
        step_size = 2e-3 / np.sqrt(horizon)
        runs = [run(horizon, step_size, np.random.default_rng(seed))[0] for seed in range(3)]
        means.append(np.mean([price.mean_violation for price in runs]))
        assert means[-1] <= violation_bound(horizon, step_size, CLEARING, noise=HIGH - TARGET)
    assert -0.6 < np.polyfit(np.log(horizons), np.log(means), 1)[0] < -0.4  # no alarm at 5 other seeds


def test_diagnostics_are_what_a_user_would_plot():
    """Running mean violation and highest price, continued by the state."""
    price, realised = run(50, 1e-3, np.random.default_rng(0))
    assert price.updates == 50
    assert price.mean_violation == pytest.approx(realised.mean() - TARGET)
    copy = ShadowPrice(TARGET, 1e-3)
    path = [copy.update(n) for n in realised]
    assert price.highest == max(path)
    restored = ShadowPrice(TARGET, 1e-3)
    restored.load_state_dict(json.loads(json.dumps(price.state_dict())))
    assert restored == price
    for change in ({"updates": -1}, {"mean_violation": -5.0}, {"highest": np.nan}):
        with pytest.raises(ValueError, match=next(iter(change))):
            restored.load_state_dict({**price.state_dict(), **change})
    assert restored == price


ARMS = np.arange(13)


def hard_budget(horizon, step_size, seeds, price=0.0):
    """(R,) reward of buying hit probability at the price until n_bar T is spent, and the most that could be bought."""
    rng = np.random.default_rng(0)
    p = rng.beta(0.5, 1.5, (seeds, horizon))
    mu, left, reward = np.full(seeds, price), np.full(seeds, 4 * horizon), np.zeros(seeds)
    for t in range(horizon):
        value = 1.0 - (1.0 - p[:, t, None]) ** ARMS
        wanted = (value - mu[:, None] * ARMS).argmax(axis=1)
        bought = np.where(wanted <= left, wanted, 0)
        reward += value[np.arange(seeds), bought]
        left -= bought
        mu = np.maximum(mu + step_size * (bought - 4.0), 0.0)
    gains = (p[..., None] * (1.0 - p[..., None]) ** ARMS[:-1]).reshape(seeds, -1)  # concave: the largest gains win
    gains.partition(gains.shape[1] - 4 * horizon, axis=1)
    return reward, gains[:, -4 * horizon :].sum(axis=1)


def test_theorem_7_regret_under_a_hard_budget():
    """C_1 + C_2 eta T + C_3 / eta over 200 seeds at any step size; at the best one it grows no faster than sqrt(T)."""
    setting = {"target": 4.0, "max_reward": 1.0, "max_cost": 12.0}
    for step_size in (1e-4, 1e-2, 0.3):
        for price in (0.0, 0.2):
            reward, best = hard_budget(200, step_size, 200, price)
            regret = best - reward
            assert regret.min() >= -1e-9
            assert regret.mean() <= hard_budget_regret_bound(200, step_size, price=price, **setting)
    horizons, means = [100, 400, 1600], []
    for horizon in horizons:
        step_size = 0.25 / 8 / np.sqrt(horizon)  # sqrt(C_3 / (C_2 T))
        reward, best = hard_budget(horizon, step_size, 200)
        means.append((best - reward).mean())
        assert means[-1] <= hard_budget_regret_bound(horizon, step_size, **setting)
        assert hard_budget_regret_bound(horizon, step_size, **setting) == pytest.approx(3 + 2 * np.sqrt(horizon))
    assert 0.3 < np.polyfit(np.log(horizons), np.log(means), 1)[0] < 0.6


@pytest.mark.parametrize(
    ("price", "reward", "expected"),
    [
        (0.0, 1.0, 3.0 + 32 * 5.0 + 0.25**2 / 2 / 0.05),
        (0.2, 0.5, 1.5 + 32 * 5.0 + 0.2**2 / 2 / 0.05),  # the start is farther from 0 than from f / n_bar = .125
        (0.05, 0.5, 1.5 + 32 * 5.0 + 0.075**2 / 2 / 0.05),  # and here farther from f / n_bar
        (0.125, 0.5, 1.5 + 32 * 5.0 + 0.125**2 / 2 / 0.05),
    ],
)
def test_theorem_7_the_bound_under_a_hard_budget_by_hand(price, reward, expected):
    """C_1 = f c / n_bar, C_2 = (c - n_bar)^2 / 2, C_3 = max(mu_0, f / n_bar - mu_0)^2 / 2, at f < 1 and mu_0 > 0."""
    bound = hard_budget_regret_bound(100, 0.05, target=4.0, max_reward=reward, max_cost=12.0, price=price)
    assert bound == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.floats(0, 12), min_size=1, max_size=40), st.floats(0.001, 1), st.floats(0, 1), st.floats(0, 1))
def test_projected_descent_keeps_the_inequality_of_the_proof(costs, step_size, start, other):
    """sum (mu_t - mu) g_t <= (mu - mu_0)^2 / (2 eta) + eta T G^2 / 2 on every sequence, g = n_bar - cost, G = 8."""
    price, total = ShadowPrice(4.0, step_size, start), 0.0
    for cost in costs:
        total += (price.price - other) * (4.0 - cost)
        price.update(cost)
    assert total <= (other - start) ** 2 / (2 * step_size) + step_size * len(costs) * 64 / 2 + 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: violation_bound(0, 0.1, 1.0), "horizon must be an integer >= 1, got 0"),
        (lambda: violation_bound(10, 0.0, 1.0), "step_size must lie in .*0.0"),
        (lambda: violation_bound(10, 0.1, -1.0), "price_range must lie in .*-1.0"),
        (lambda: violation_bound(10, 0.1, 1.0, noise=-1.0), "noise must lie in .*-1.0"),
        (
            lambda: hard_budget_regret_bound(10, 0.1, target=4, max_reward=1, max_cost=3),
            r"max_cost must lie in \[4, inf\], got 3",
        ),
        (lambda: hard_budget_regret_bound(10, 0.1, target=0, max_reward=1, max_cost=3), "target must lie in .*0"),
        (lambda: hard_budget_regret_bound(10, 0.1, target=4, max_reward=-1, max_cost=9), "max_reward must lie .*-1"),
        (lambda: hard_budget_regret_bound(10, -0.1, target=4, max_reward=1, max_cost=9), "step_size must lie .*-0.1"),
    ],
)
def test_bounds_refuse(call, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        call()
