"""Theorem 21: stage-wise baselines are unbiased, pooled ones are not; what a pilot is worth."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_core import (
    best_two_stage,
    frontier_utility,
    gradient_weight,
    pilot_gain,
    pooled_bias,
    staged_advantages,
    staged_efficiency,
    staged_weight,
)

RULES = st.lists(st.integers(0, 3), min_size=2, max_size=4)  # n_2 after K_1 = 0, 1, ..., n_1
RATES = st.floats(0.02, 0.98)


def outcomes(second, p):
    """Every sequence of rewards of a two-stage group: chance, rewards, stages."""
    first = len(second) - 1
    for start in product((0, 1), repeat=first):
        for rest in product((0, 1), repeat=second[sum(start)]):
            rewards = np.array(start + rest, dtype=float)
            chance = np.prod(np.where(rewards == 1, p, 1 - p))
            yield chance, rewards, np.repeat([0, 1], [first, rewards.size - first])


def enumerated(second, p, advantages):
    """c and E sum A^2 by the definition: E sum_j A_j E[z_j | r_j], with E[z | r] = grad p (r - p) / (p (1 - p))."""
    weight, noise = 0.0, 0.0
    for chance, rewards, stage in outcomes(second, p):
        a = advantages(rewards, stage)
        weight += chance * a @ (rewards - p) / (p * (1 - p))
        noise += chance * a @ a
    return weight, noise


def staged(rewards, stage, scale=False):
    return staged_advantages(rewards, np.zeros(rewards.size), stage, scale=scale)


def pooled(rewards, stage, scale=False):
    return staged(rewards, np.zeros(rewards.size), scale)


@settings(max_examples=40, deadline=None)
@given(RULES, RATES)
def test_theorem_21_stagewise_baselines_are_unbiased_and_pooled_ones_are_not(second, p):
    """By enumeration of all rewards: n_1 - 1 + E[n_2 (1 - 1/n)], and E n - 1 + the stated covariance."""
    first, chance = len(second) - 1, np.zeros(len(second))
    for probability, rewards, _ in outcomes([0] * len(second), p):
        chance[int(rewards.sum())] += probability
    n2 = np.array(second, dtype=float)
    wanted = first - 1 + chance @ (n2 * (1 - 1 / (first + n2)))
    assert enumerated(second, p, staged)[0] == pytest.approx(wanted, abs=1e-9)
    assert staged_weight(second, [p])[0] == pytest.approx(wanted, abs=1e-9)
    biased = chance @ (first + n2) - 1 + pooled_bias(second, [p])[0]
    assert enumerated(second, p, pooled)[0] == pytest.approx(biased, abs=1e-9)
    assert staged_weight(second, [p], pooled=True)[0] == pytest.approx(biased, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(RULES, RATES, st.booleans(), st.booleans())
def test_theorem_21_finite_sums_against_enumeration(second, p, of_all, scale):
    """Weight and efficiency in all four forms; the + 1e-6 of the scaled advantages is within the tolerance."""
    weight, noise = enumerated(second, p, lambda r, s: (pooled if of_all else staged)(r, s, scale))
    options = {"pooled": of_all, "scale": scale}
    assert staged_weight(second, [p], **options)[0] == pytest.approx(weight, rel=2e-5, abs=1e-9)
    if noise > 0:
        value = weight**2 * p * (1 - p) / noise
        assert staged_efficiency(second, [p], **options)[0] == pytest.approx(value, rel=5e-5, abs=1e-9)


def test_theorem_21_other_baselines_known_before_a_rollout_is_drawn():
    """Leave-one-out over all up to the stage gives n_1 + E n_2; so does the first stage's mean for the second stage."""
    second, p = [3, 0, 2, 1], 0.3
    chance = [0.7**3, 3 * 0.3 * 0.49, 3 * 0.09 * 0.7, 0.027]

    def others(rewards, stage, seen=2):
        known = [np.flatnonzero(stage <= min(s, seen)) for s in stage]
        return np.array([r - rewards[k[k != j]].mean() for j, (r, k) in enumerate(zip(rewards, known, strict=True))])

    wanted = 3 + np.dot(chance, second)
    assert enumerated(second, p, others)[0] == pytest.approx(wanted)
    assert enumerated(second, p, lambda r, s: others(r, s, seen=0))[0] == pytest.approx(wanted)


def test_theorem_21_stages_of_one_rollout_and_a_stop_at_the_first_success():
    """Any number of stages: sum_s E[n_s (1 - 1/N_s)], here by a stop after the first success, at 4 at the latest."""
    p, staged_sum, pooled_sum, wanted = 0.3, 0.0, 0.0, 0.0
    for n in range(1, 5):
        for last in (0, 1) if n == 4 else (1,):
            rewards = np.array([0.0] * (n - 1) + [last])
            chance = (1 - p) ** (n - 1) * (p if last else 1 - p)
            score = (rewards - p) / (p * (1 - p))
            staged_sum += chance * staged(rewards, np.arange(n)) @ score
            pooled_sum += chance * (rewards - rewards.mean()) @ score
            wanted += chance * (n - np.sum(1 / np.arange(1, n + 1)))
    assert staged_sum == pytest.approx(wanted)
    assert abs(pooled_sum / wanted - 1) > 0.1


def test_theorem_21_a_second_stage_that_does_not_depend_on_the_first():
    """Pooled is then one group of n (theorems 10 and 15); stage by stage it pays n_2 / n rollouts more."""
    p = np.array([0.1, 0.5])
    assert staged_weight([6] * 3, p, pooled=True) == pytest.approx(8 * gradient_weight(8, p, "dr_grpo"))
    assert staged_weight([6] * 3, p, pooled=True, scale=True) == pytest.approx(8 * gradient_weight(8, p))
    assert staged_efficiency([6] * 3, p, pooled=True) == pytest.approx(7.0)
    assert staged_efficiency([6] * 3, p) == pytest.approx(7.0 - 6 / 8)
    assert pooled_bias([6] * 3, p) == pytest.approx(0.0, abs=1e-12)


LAW = {"rates": np.linspace(0.02, 0.98, 25), "mass": np.full(25, 1 / 25)}


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_theorem_21_one_stage_is_the_best_count_of_theorem_16(kappa):
    """With no first stage the value is the concave envelope of the utility at n_bar."""
    v = LAW["rates"] * (1 - LAW["rates"])
    v = float((v**2).sum() / v.sum()), float(v.mean() / np.sqrt((v**2).mean()))
    u = frontier_utility(np.arange(13), v[1], v[0], kappa)
    slopes = [u[hi] * 4 / hi if lo == 0 else u[lo] + (u[hi] - u[lo]) * (4 - lo) / (hi - lo)
              for lo in range(4) for hi in range(4, 13)]  # fmt: skip
    found = best_two_stage(0, 4.0, 12, **LAW, value=np.ones(25), kappa=kappa)
    assert found.value == pytest.approx(max(slopes), rel=1e-9)


@pytest.mark.parametrize("kappa", [0.0, 0.3])
def test_theorem_21_no_other_second_stage_and_weights_do_better(kappa):
    """Against 25 random rules within the budget, each with its best weights, by enumeration."""
    rng, first, mean, most = np.random.default_rng(1), 2, 4.0, 8
    lam = 1 - LAW["rates"]
    best = best_two_stage(first, mean, most, **LAW, value=lam, kappa=kappa)
    p, mass = LAW["rates"], LAW["mass"]
    share = np.array([(mass * (1 - p) ** 2).sum(), (mass * 2 * p * (1 - p)).sum(), (mass * p**2).sum()])
    assert best.second @ share == pytest.approx(mean - first)
    rules = [n2 for n2 in product(range(most - first + 1), repeat=3) if np.dot(n2, share) <= mean - first + 1e-9]
    for n2 in [rules[i] for i in rng.integers(len(rules), size=25)]:
        signal, square = np.zeros(4), np.zeros((4, 4))  # of the weights of stage 1 and of stage 2 after each K_1
        for rate, m, value in zip(p, mass, lam, strict=True):
            for chance, rewards, stage in outcomes(n2, rate):
                a, k = staged(rewards, stage), int(rewards[:2].sum())
                part, energy = np.zeros(4), np.zeros(4)
                for s, place in ((0, 0), (1, 1 + k)):
                    part[place] = (a * (rewards - rate))[stage == s].sum()
                    energy[place] = (a**2)[stage == s].sum()
                signal += m * chance * value * part
                square += m * chance * (np.diag(energy) + kappa * np.outer(part, part))
        reached = signal @ np.linalg.pinv(square) @ signal
        assert reached <= best.value * (1 + 1e-6)


def test_theorem_21_a_pilot_pays_where_groups_are_not_filled_and_many_prompts_are_solved_or_hopeless():
    """Its gain falls with kappa and grows with the mass near 0 and 1; at kappa 1/2 and Beta(1/2, 1/2) it is none."""
    gains = [pilot_gain(4, 8, 24, 0.5, 0.5, kappa) for kappa in (0.0, 0.05, 0.15, 0.5)]
    assert (np.diff(gains) < 0).all()
    assert gains[0] > 0.25
    assert abs(gains[3]) < 0.05
    assert pilot_gain(4, 8, 24, 0.2, 0.3, 0.05) > gains[1] > pilot_gain(4, 8, 24, 1.0, 2.0, 0.05)


def test_theorem_21_a_spike_of_hopeless_prompts_gets_nothing_more():
    """At kappa .05 with 40 % at p = 0: 4 of 8 rollouts first gain over 30 % on the best plan of one stage."""
    rates = np.concatenate([[0.0], np.linspace(0.05, 0.95, 19)])
    mass = np.concatenate([[0.4], np.full(19, 0.6 / 19)])
    law = {"rates": rates, "mass": mass, "value": np.ones(20), "kappa": 0.05}
    adaptive, one = (best_two_stage(first, 8.0, 24, **law) for first in (4, 0))
    assert adaptive.value > 1.3 * one.value
    assert adaptive.second[[0, 4]].tolist() == [0.0, 0.0]
    assert adaptive.second[2] == adaptive.second.max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: staged_weight([3], [0.5]), "second must have"),
        (lambda: staged_weight([3, -1], [0.5]), "second must hold"),
        (lambda: staged_weight([3, 1], [0.0]), "p must hold"),
        (lambda: best_two_stage(4, 3.0, 12, [0.5], [1.0], [1.0], 0.0), "mean must lie"),
        (lambda: best_two_stage(2, 4.0, 12, [0.5], [0.9], [1.0], 0.0), "mass must sum to 1"),
        (lambda: best_two_stage(2, 4.0, 12, [0.5], [1.0], [1.0], -1.0), "kappa must lie"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
