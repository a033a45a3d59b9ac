"""Giving up prompts that are never solved: the evidence holds at every look (theorem 20)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from gdro_core.theory.giving_up import failure_e_value, failures_to_give_up

RATES = st.floats(0.01, 0.9)


@given(st.integers(0, 60), st.integers(0, 20), RATES)
def test_theorem_20_the_e_value_is_the_mixture_of_likelihood_ratios(failures, successes, p0):
    """The mean of (q / p0)^K ((1 - q) / (1 - p0))^F over q uniform on [0, p0]; after no success the closed form."""

    def ratio(q):
        return (q / p0) ** successes * ((1 - q) / (1 - p0)) ** failures / p0

    value = failure_e_value(failures, p0, successes)
    assert value == pytest.approx(quad(ratio, 0, p0, epsabs=0, epsrel=1e-10)[0], rel=1e-7)
    closed = (1 - (1 - p0) ** (failures + 1)) / ((failures + 1) * p0 * (1 - p0) ** failures)
    assert failure_e_value(failures, p0) == pytest.approx(closed, rel=1e-9)


@given(st.integers(0, 200), st.integers(0, 30), RATES, st.floats(0, 1))
def test_theorem_20_it_is_a_supermartingale_for_every_rate_from_p0_up(failures, successes, p0, part):
    """p e(K + 1, F) + (1 - p) e(K, F + 1) <= e(K, F) for p >= p0, with equality at p0 alone; e(0, 0) = 1."""
    p = p0 + part * (1 - p0)
    now, hit, miss = failure_e_value([failures, failures, failures + 1], p0, [successes, successes + 1, successes])
    assert p * hit + (1 - p) * miss <= now * (1 + 1e-12)
    assert p0 * hit + (1 - p0) * miss == pytest.approx(now, rel=1e-9)
    assert failure_e_value(0, p0) == 1.0
    assert (1 - p) * miss <= now * (1 + 1e-12)  # and so is the value that falls to 0 at a success


def test_theorem_20_failures_to_give_up():
    """70 for p0 = 1/16 and delta = .05 (47 if no success is ever forgiven), the least with e >= 1 / delta, always."""
    assert failures_to_give_up(1 / 16, 0.05) == 70
    assert np.ceil(np.log(0.05) / np.log(15 / 16)) == 47
    for p0, delta, successes in ((1 / 16, 0.05, 0), (0.3, 0.01, 0), (0.01, 0.1, 2), (0.9, 0.5, 1)):
        n = failures_to_give_up(p0, delta, successes)
        assert failure_e_value(n - 1, p0, successes) < 1 / delta <= failure_e_value(n, p0, successes)
        assert failures_to_give_up(p0, delta, successes + 1) > n
        assert n >= np.log(delta) / np.log1p(-p0)


@pytest.mark.parametrize("rule", ["least", "drifting", "spiteful"])
def test_theorem_20_error_at_any_stopping_rule(rule):
    """10 000 prompts of p_t >= p0, looked at after each of 600 rollouts: at most delta are ever given up.

    One p; a p that wanders above p0; a p that falls to p0 whenever the evidence is high and is large otherwise.
    False alarm 3e-5 (4 sigma above delta) if the seed were new.
    """
    rng = np.random.default_rng(0)
    p0, delta, prompts, rollouts = 1 / 16, 0.05, 10_000, 600
    evidence = failure_e_value(np.arange(rollouts + 1), p0, np.arange(120)[:, None])
    reached = evidence >= 1 / delta
    limit = np.where(reached.any(axis=1), reached.argmax(axis=1), rollouts + 1)
    failures, successes, given_up = np.zeros(prompts, int), np.zeros(prompts, int), np.zeros(prompts, bool)
    p = np.full(prompts, p0)
    for _ in range(rollouts):
        if rule == "drifting":
            p = np.clip(p + 0.01 * rng.normal(size=prompts), p0, 0.2)
        elif rule == "spiteful":
            p = np.where(failures > 0.5 * limit[np.minimum(successes, 119)], p0, 0.1)
        hit = rng.random(prompts) < p
        successes, failures = successes + hit, failures + ~hit
        given_up |= (successes < 120) & (failures >= limit[np.minimum(successes, 119)])
    assert given_up.mean() <= delta + 4 * np.sqrt(delta * (1 - delta) / prompts)
    assert given_up.mean() > (0.02 if rule == "least" else 0.0)


def test_a_hopeless_prompt_is_given_up_on_time():
    """At p = 0 the evidence reaches 1 / delta at the number stated; arrays broadcast; large counts are no NaN."""
    value = failure_e_value(np.arange(200)[:, None], 1 / 16, [0, 1])
    assert value.shape == (200, 2)
    assert (value[:, 0] >= 20).argmax() == 70
    assert (value[:, 1] >= 20).argmax() == failures_to_give_up(1 / 16, 0.05, 1)
    assert failure_e_value(20_000, 0.5) == np.inf
    assert 0 <= failure_e_value(0, 0.5, 10_000) < 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: failure_e_value(-1, 0.1), "failures must hold .*-1"),
        (lambda: failure_e_value(1.5, 0.1), "failures must hold integers, got 1.5"),
        (lambda: failure_e_value(1, 0.1, -1), "successes must hold .*-1"),
        (lambda: failure_e_value(1, 0.0), r"p0 must lie in \(0, 1\), got 0.0"),
        (lambda: failure_e_value(1, 1.0), "p0 must lie in .*1.0"),
        (lambda: failures_to_give_up(0.1, 0.0), "delta must lie in .*0.0"),
        (lambda: failures_to_give_up(2.0, 0.1), "p0 must lie in .*2.0"),
        (lambda: failures_to_give_up(0.1, 0.1, -1), "successes must be an integer >= 0, got -1"),
    ],
)
def test_bad_input_is_refused(call, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        call()
