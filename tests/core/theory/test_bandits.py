"""Bandits (theorems 4 and 12): slow references, regret bounds on many seeds, measured rates, states, bad input."""

from __future__ import annotations

import json
from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq

from gdro_core.theory.bandits import Exp3, Exp3IX, Exp3P, Exp3S, Hedge, TsallisINF
from gdro_core.theory.regret import (
    delayed_hedge_bound,
    exp3_bound,
    exp3_ix_bound,
    exp3_p_bound,
    exp3_s_bound,
    hedge_bound,
    limited_advice_bound,
    tsallis_inf_bound,
)

DELTA = 0.05
MAKE = {  # name -> policy for K arms and horizon T
    "Hedge": lambda k, t, **kw: Hedge.for_horizon(k, t, **kw),
    "Exp3": lambda k, t, **kw: Exp3.for_horizon(k, t, **kw),
    "Exp3IX": lambda k, t, **kw: Exp3IX.for_horizon(k, t, **kw),
    "Exp3P": lambda k, t, **kw: Exp3P.for_horizon(k, t, DELTA, **kw),
    "Exp3S": lambda k, t, **kw: Exp3S.for_horizon(k, t, 4, **kw),
    "TsallisINF": lambda k, t, **kw: TsallisINF(k, **kw),
}
BANDITS = [name for name in MAKE if name != "Hedge"]


class Uniforms:
    """Stands in for a Generator: row t of a (T, R) table of uniforms, as many as asked for."""

    def __init__(self, table):
        self.rows = iter(table)

    def random(self, size):
        return next(self.rows)[:size]


def play(policy, losses, rng, rounds):
    """Regret (R,) of each replicate against its own best arm; `losses(t, policy)` is (R, K) or (K,)."""
    paid, total = np.zeros(policy.replicates), np.zeros((policy.replicates, policy.num_arms))
    rows = np.arange(policy.replicates)
    for t in range(rounds):
        table = np.broadcast_to(losses(t, policy), total.shape)
        total += table
        if isinstance(policy, Hedge):
            paid += (policy.probabilities * table).sum(axis=1)
            policy.update(table)
        else:
            arms = policy.sample(rng)
            paid += table[rows, arms]
            policy.update(arms, table[rows, arms])
    return paid - total.min(axis=1)


def slope(horizons, values):
    return np.polyfit(np.log(horizons), np.log(values), 1)[0]


def coins(rng, shape):
    """No arm is better: what hurts exponential weights (regret of the order of the bound)."""
    return lambda t, policy: rng.integers(0, 2, shape).astype(float)


def gap(rng, shape, best=0.3):
    """Stochastic: one arm is better."""
    means = np.full(shape[1], 0.6)
    means[-1] = best
    return lambda t, policy: (rng.random(shape) < means).astype(float)


def switching(horizon, blocks, arms):
    """Fixed in advance: the good arm changes at the start of each of `blocks` equal blocks."""
    return lambda t, policy: 1.0 - np.eye(arms)[(t * blocks // horizon) % arms]


def lure(horizon, arms):
    """Fixed in advance: arm 0 is best for a third of the time, arm 1 catches up and wins at the end."""
    early, late = np.full(arms, 0.5), np.full(arms, 0.5)
    early[:2], late[:2] = (0.0, 0.5), (1.0, 0.0)
    return lambda t, policy: early if 3 * t < horizon else late


def spite(t, policy):
    """Sees the past: the arm most likely to be played pays 1."""
    return np.eye(policy.num_arms)[policy.probabilities.argmax(axis=1)]


# ---------------------------------------------------------------------------------------------------- slow references


def reference(name, arms, horizon, uniforms, losses):
    """One replicate in plain Python, from the recursions: the arms played and the last probabilities."""
    k, t_max, played = arms, horizon, []
    total, p = [0.0] * k, [1.0 / k] * k
    beta, gamma = sqrt(log(k / DELTA) / (t_max * k)), 1.05 * sqrt(k * log(k) / t_max)
    eta = {
        "Hedge": sqrt(8 * log(k) / t_max),
        "Exp3": sqrt(2 * log(k) / (t_max * k)),
        "Exp3IX": sqrt(2 * log(k) / (t_max * k)),
        "Exp3P": 0.95 * sqrt(log(k) / (t_max * k)),
        "TsallisINF": None,
    }
    alpha = 4 / (t_max - 1)
    stay = t_max - 5
    cost = 5 * log(k) + 4 * log((t_max - 1) / 4) + stay * log((t_max - 1) / stay)
    eta["Exp3S"] = sqrt(2 * cost / (t_max * k))
    for t in range(1, t_max + 1):
        if name == "TsallisINF":
            rate = 2 / sqrt(t)

            def excess(x, rate=rate, total=total):
                return sum(4 / (rate * (loss - x)) ** 2 for loss in total) - 1

            low, high = min(total) - 2 * sqrt(k) / rate - 1, min(total) - 2 / rate + 1e-12
            x = brentq(excess, low, high, xtol=1e-13, rtol=1e-15)
            p = [4 / (rate * (loss - x)) ** 2 for loss in total]
        elif name != "Exp3S":
            sign = 1 if name == "Exp3P" else -1
            top = max(sign * v for v in total)
            w = [exp(eta[name] * (sign * v - top)) for v in total]
            p = [v / sum(w) for v in w]
            if name == "Exp3P":
                p = [(1 - gamma) * v + gamma / k for v in p]
        level, arm = uniforms[t - 1] * sum(p), 0
        while arm < k - 1 and level >= sum(p[: arm + 1]):
            arm += 1
        played.append(arm)
        loss = losses[t - 1][arm]
        if name == "Hedge":
            total = [v + x for v, x in zip(total, losses[t - 1], strict=True)]
        elif name == "Exp3P":
            total = [v + ((i == arm) * (1 - loss) + beta) / p[i] for i, v in enumerate(total)]
        elif name == "Exp3S":
            w = [v * (exp(-eta[name] * loss / v) if i == arm else 1.0) for i, v in enumerate(p)]
            p = [(1 - alpha) * v / sum(w) + alpha / k for v in w]
        else:
            total[arm] += loss / (p[arm] + (eta[name] / 2 if name == "Exp3IX" else 0.0))
    return played, p


def run(policy, uniforms, losses):
    """Arms (T, R) and, before the last update, probabilities of a policy on given uniforms (T, R), losses (T, R, K)."""
    rng, arms = Uniforms(uniforms), []
    for table in losses:
        table = table[0] if policy.replicates is None else table[: policy.replicates]
        arm, p = policy.sample(rng), policy.probabilities.copy()
        arms.append(arm)
        if isinstance(policy, Hedge):
            policy.update(table)
        else:
            policy.update(arm, np.take_along_axis(table, np.asarray(arm)[..., None], axis=-1)[..., 0])
    return np.array(arms), p


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("k", [2, 5, 30])
def test_policies_agree_with_plain_python(name, k):
    """Each recursion, replicate by replicate on the same uniforms: same arms, same probabilities."""
    rng = np.random.default_rng(1)
    t, r = 250, 3
    uniforms, losses = rng.random((t, r)), rng.random((t, r, k)) ** rng.uniform(0.2, 4, k)
    policy = MAKE[name](k, t, replicates=r)
    arms, p = run(policy, uniforms, losses)
    p_after = policy.probabilities
    for i in range(r):
        expected, q = reference(name, k, t, uniforms[:, i], losses[:, i])
        np.testing.assert_array_equal(arms[:, i], expected)
        np.testing.assert_allclose(p_after[i] if name == "Exp3S" else p[i], q, rtol=1e-9)


@pytest.mark.parametrize("name", MAKE)
def test_replicates_are_independent(name):
    """A replicate's path depends neither on R (not even on there being replicates) nor on the others' losses."""
    rng = np.random.default_rng(2)
    t, k = 200, 10
    uniforms, losses = rng.random((t, 7)), rng.random((t, 7, k))
    changed = losses.copy()
    changed[:, 3:] = rng.random((t, 4, k)) ** 3
    base_arms, base = run(MAKE[name](k, t, replicates=7), uniforms, losses)
    for replicates, table in [(7, changed), (3, losses)]:
        arms, p = run(MAKE[name](k, t, replicates=replicates), uniforms, table)
        np.testing.assert_array_equal(arms[:, :3], base_arms[:, :3])
        np.testing.assert_array_equal(p[:3], base[:3])
    single, p = run(MAKE[name](k, t), uniforms, losses)
    np.testing.assert_array_equal(single, base_arms[:, 0])
    np.testing.assert_allclose(p, base[0], rtol=1e-12)
    assert (base_arms[:, 0] != base_arms[:, 1]).any()


@given(st.data())
def test_tsallis_solves_its_problem(data):
    """The Newton steps reach sum p = 1 for any spread of estimates, and p is the minimiser (KKT: one multiplier)."""
    k = data.draw(st.sampled_from([2, 10, 200]))
    spread = data.draw(st.floats(-6, 12))
    rounds = data.draw(st.integers(0, 10**6))
    scores = 10.0**spread * np.random.default_rng(data.draw(st.integers(0, 99))).exponential(size=(1, k)) ** 3
    policy = TsallisINF(k)
    policy.load_state_dict({**policy.state_dict(), "rounds": rounds, "scores": scores.tolist()})
    p = policy.probabilities
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    multiplier = scores[0] - sqrt(rounds + 1) / np.sqrt(p)  # L_i - 2 / (eta_t sqrt(p_i))
    np.testing.assert_allclose(multiplier, multiplier[0], atol=1e-9 * (scores.max() + sqrt((rounds + 1) * k)))


def test_sample_follows_the_probabilities():
    """Frequencies of draws within 5 standard errors of the probabilities; an arm of probability 0 is never drawn."""
    policy = Hedge(4, 1.0, replicates=200_000)
    policy.update(np.broadcast_to([0.0, 1.0, 2.0, 1e9], (200_000, 4)))
    share = np.bincount(policy.sample(np.random.default_rng(3)), minlength=4) / 200_000
    p = policy.probabilities[0]
    assert p[3] == share[3] == 0.0
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / 200_000)).all()  # false alarm 2e-6 if the seed were new
    rounded, rng = Hedge(4, 1.0, replicates=1000), np.random.default_rng(3)
    rounded.update(np.hstack([rng.random((1000, 3)), np.full((1000, 1), 1e9)]))
    assert rounded.probabilities.sum(axis=1).min() < 1.0  # where rounding could leave something for the last arm
    assert rounded.sample(Uniforms([np.full(1000, 1 - 2**-53)])).max() == 2
    single = Hedge(4, 1.0)
    for losses, u, arm in [([0, 9e9, 9e9, 9e9], 1 - 2**-53, 0), ([9e9, 0, 9e9, 9e9], 0.0, 1)]:
        single.load_state_dict(Hedge(4, 1.0).state_dict())
        single.update(losses)
        assert single.sample(Uniforms([np.array([u])])) == arm


# ------------------------------------------------------------------------------------------------------ regret bounds


def environments(rng, rounds, shape):
    arms = shape[1]
    return {
        "coins": coins(rng, shape),
        "gap": gap(rng, shape),
        "switching": switching(rounds, 7, arms),
        "lure": lure(rounds, arms),
    }


@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("kind", ["coins", "gap", "switching", "lure", "spite"])
def test_theorem_4_hedge_regret_is_at_most_its_bound(k, kind):
    """Hedge, R <= sqrt(T ln K / 2) on every sequence, also one that reacts: the largest of 256 seeds."""
    t, r = 800, 256
    rng = np.random.default_rng(4)
    losses = spite if kind == "spite" else environments(rng, t, (r, k))[kind]
    regret = play(MAKE["Hedge"](k, t, replicates=r), losses, rng, t)
    assert regret.max() <= hedge_bound(t, k)
    if kind == "coins":
        assert regret.max() > 0.6 * hedge_bound(t, k)  # not idle: a sixth of the seeds are above, false alarm < 1e-20


@pytest.mark.parametrize("kind", ["coins", "gap", "switching", "lure"])
@pytest.mark.parametrize(
    ("name", "bound"), [("Exp3", exp3_bound), ("TsallisINF", tsallis_inf_bound), ("Exp3IX", None), ("Exp3P", None)]
)
def test_theorem_4_expected_regret_is_at_most_its_bound(name, bound, kind):
    """Exp3, E R <= sqrt(2 T K ln K); Tsallis-INF, E R <= 4 sqrt(K T) + 1: mean + 3 s.e. over 256 seeds.

    Exp3-IX and Exp3.P: the (1 - delta) quantile is at most the bound with probability 1 - delta. False alarms: none to
    fear, the means are 19 s.e. below the bounds or more, the largest of 256 regrets below half.
    """
    t, k, r = 1000, 6, 256
    rng = np.random.default_rng(5)
    regret = play(MAKE[name](k, t, replicates=r), environments(rng, t, (r, k))[kind], rng, t)
    if bound:
        assert regret.mean() + 3 * regret.std() / sqrt(r) <= bound(t, k)
    else:
        bounds = {"Exp3IX": exp3_ix_bound(t, k, DELTA), "Exp3P": exp3_p_bound(t, k, DELTA)}
        assert np.quantile(regret, 1 - DELTA) <= bounds[name]


@pytest.mark.parametrize(("name", "bound"), [("Exp3IX", exp3_ix_bound), ("Exp3P", exp3_p_bound)])
def test_theorem_4_high_probability_bounds_hold_against_an_adversary_that_sees_the_past(name, bound):
    """Exp3-IX and Exp3.P, w.p. 1 - delta against adaptive losses: quantile of 256 seeds, horizon above bound.

    False alarms: none to fear, the largest of 256 regrets is below a third of the bound.
    """
    t, k, r = 3000, 3, 256
    rng = np.random.default_rng(6)
    regret = play(MAKE[name](k, t, replicates=r), spite, rng, t)
    assert np.quantile(regret, 1 - DELTA) <= bound(t, k, DELTA) < t


@pytest.mark.parametrize("name", MAKE)
def test_theorem_4_regret_grows_like_the_square_root_of_the_horizon(name):
    """Theorem 4, rate: the log-log slope over T is about 1/2 on coins, where no algorithm does better."""
    horizons, k, r = (250, 1000, 4000), 4, 400
    rng = np.random.default_rng(7)
    means = [play(MAKE[name](k, t, replicates=r), coins(rng, (r, k)), rng, t).mean() for t in horizons]
    assert 0.44 <= slope(horizons, means) <= 0.56  # no alarm at 5 other seeds


@pytest.mark.parametrize("name", [name for name in MAKE if name != "TsallisINF"])
def test_steps_tuned_to_the_horizon_give_the_square_root_also_when_one_arm_is_better(name):
    """Theorem 4, rate: about 1/2 with a constant gap, where playing uniformly has slope 1."""
    horizons, k, r = (1000, 4000, 16000), 4, 100
    rng = np.random.default_rng(7)
    means = [play(MAKE[name](k, t, replicates=r), gap(rng, (r, k)), rng, t).mean() for t in horizons]
    assert 0.4 <= slope(horizons, means) <= 0.62  # no alarm at 5 other seeds


def test_theorem_4_tsallis_inf_regret_is_logarithmic_when_one_arm_is_better():
    """Tsallis-INF, stochastic with gap: slope far below 1/2, regret linear in ln T; Exp3 on the same has 1/2."""
    horizons, k, r = (1000, 4000, 16000), 3, 200
    shape, means = (r, k), {}
    for name in ("TsallisINF", "Exp3"):
        rng = np.random.default_rng(8)
        means[name] = [play(MAKE[name](k, t, replicates=r), gap(rng, shape), rng, t).mean() for t in horizons]
    assert slope(horizons, means["TsallisINF"]) < 0.3  # .245 ± .010 over seeds: 5 sigma
    assert slope(horizons, means["Exp3"]) > 0.4
    assert means["TsallisINF"][-1] < 0.5 * means["Exp3"][-1]
    first, second = np.diff(means["TsallisINF"])  # equal steps in ln T
    assert second < 1.6 * first  # √T has 2; here 1.06 ± .20 over seeds: false alarm 4e-3 if the seed were new


def test_theorem_4_tracking_follows_switches_and_a_fixed_comparator_policy_does_not():
    """Exp3.S, E R_S <= sqrt(2 T K C) against S switches: bound, rate 1/2, and far below Exp3 on the same sequence."""
    k, r, switches, horizons = 3, 200, 4, (500, 2000, 8000)
    rng = np.random.default_rng(9)
    tracking, fixed = [], []
    for t in horizons:
        losses = switching(t, switches + 1, k)
        for name, into in (("Exp3S", tracking), ("Exp3", fixed)):
            # the best fixed arm is good in two blocks of five; the comparator with 4 switches loses nothing
            regret = play(MAKE[name](k, t, replicates=r), losses, rng, t) + 0.6 * t
            into.append(regret.mean())
            if name == "Exp3S":
                assert regret.mean() + 3 * regret.std() / sqrt(r) <= exp3_s_bound(t, k, switches)
    assert 0.4 <= slope(horizons, tracking) <= 0.6  # no alarm at 5 other seeds
    assert slope(horizons, fixed) > 0.9
    assert tracking[-1] < 0.3 * fixed[-1]


# ----------------------------------------------------------------------------------------- missing and late feedback


def test_theorem_5_missing_losses_are_weighted_by_their_chance():
    """Hedge with missing arms: bound on coins, and the rarely observed bad arm does not pass for a good one."""
    t, k, r = 1500, 4, 256
    rng = np.random.default_rng(10)
    chance = np.array([0.1, 1.0, 0.5, 0.5])
    step = sqrt(2 * log(k) / (t / chance.min()))
    bound = limited_advice_bound(k, np.full(t, chance.min()))
    for means in (np.full(k, 0.5), np.array([0.8, 0.4, 0.8, 0.8])):
        policy, paid, total = Hedge(k, step, replicates=r), np.zeros(r), np.zeros((r, k))
        for _ in range(t):
            losses = (rng.random((r, k)) < means).astype(float)
            seen = rng.random((r, k)) < chance
            paid += (policy.probabilities * losses).sum(axis=1)
            total += losses
            policy.update(
                np.where(seen, losses, np.nan), observed=seen, observation_probability=np.tile(chance, (r, 1))
            )
        regret = paid - total.min(axis=1)
        assert regret.mean() + 3 * regret.std() / sqrt(r) <= bound  # no alarm at 5 other seeds
    assert policy.probabilities[:, 1].mean() > 0.9


def test_missing_estimates_are_unbiased_and_all_observed_is_full_information():
    """l 1{observed} / o, by its score steps: mean over the two outcomes is l; o = 1 equals the plain update."""
    step, loss, chance = 0.3, 0.7, 0.25
    policy = Hedge(2, step)
    policy.update([loss, np.nan], observed=[True, False], observation_probability=[chance, 0.5])
    odds = np.log(policy.probabilities[1] / policy.probabilities[0])
    assert chance * odds / step == pytest.approx(loss)
    full, masked = Hedge(3, step), Hedge(3, step)
    full.update([0.1, 0.9, 0.4])
    masked.update([0.1, 0.9, 0.4], observed=np.ones(3), observation_probability=np.ones(3))
    np.testing.assert_array_equal(full.probabilities, masked.probabilities)


@pytest.mark.parametrize("delay", [3, "random"])
def test_theorem_12_late_feedback_costs_at_most_the_sum_of_delays(delay):
    """Theorem 12: R <= sqrt((T + 2 D) ln K / 2) on every sequence; on coins held for d + 1 rounds delays do cost."""
    t, k, r = 1200, 4, 200
    rng = np.random.default_rng(11)
    delays = np.full(t, 3) if delay == 3 else rng.integers(0, 12, t)
    policy = Hedge.for_horizon(k, t, total_delay=float(delays.sum()), replicates=r)
    paid, total, due = np.zeros(r), np.zeros((r, k)), {}
    for i in range(t):
        for late in due.pop(i, []):
            policy.update(late)
        if i % 4 == 0:
            held = rng.integers(0, 2, (r, k)).astype(float)
        paid += (policy.probabilities * held).sum(axis=1)
        total += held
        due.setdefault(i + int(delays[i]) + 1, []).append(held)
    regret = paid - total.min(axis=1)
    assert regret.max() <= delayed_hedge_bound(t, k, float(delays.sum()))
    assert regret.mean() > hedge_bound(t, k)  # no alarm at 5 other seeds


# ------------------------------------------------------------------------------------------------ extremes and states


@given(arrays(np.float64, (6, 3), elements=st.floats(allow_nan=False, allow_infinity=False)), st.floats(1e-9, 1e9))
def test_hedge_stays_finite_for_any_finite_losses(table, step):
    """Log domain: no overflow for any finite losses and step; p is a distribution, its order that of one update."""
    policy = Hedge(3, step)
    for i, losses in enumerate(table):
        policy.update(losses)
        p = policy.probabilities
        assert np.isfinite(p).all()
        assert p.sum() == pytest.approx(1.0)
        if i == 0:
            assert p[losses.argmin()] == p.max()
    json.dumps(policy.state_dict(), allow_nan=False)


def test_hedge_takes_1e300_and_comes_back():
    """A loss of 1e300 rules an arm out; as large a loss of the other brings both back level."""
    policy = Hedge(2, 1.0)
    policy.update([1e300, 0.0])
    assert policy.probabilities.tolist() == [0.0, 1.0]
    policy.update([0.0, 1e300])
    assert policy.probabilities.tolist() == [0.5, 0.5]
    for losses in ([1e308, 0.0], [0.0, 1e308]) * 5:  # the sum is beyond the largest float
        policy.update(losses)
    policy.update([log(3.0), 0.0])
    assert policy.probabilities.tolist() == pytest.approx([0.25, 0.75])


@given(arrays(np.float64, (5, 4), elements=st.floats(0, 1)), st.floats(-50, 50), st.floats(0.1, 10))
def test_hedge_ignores_shifts_and_scales_with_its_step(table, shift, scale):
    """Adding a constant to a round changes nothing; scaling losses by c is scaling eta by c."""
    plain, moved, scaled = Hedge(4, 0.5), Hedge(4, 0.5), Hedge(4, 0.5 / scale)
    for losses in table:
        plain.update(losses)
        moved.update(losses + shift)
        scaled.update(losses * scale)
    np.testing.assert_allclose(moved.probabilities, plain.probabilities, atol=1e-12)
    np.testing.assert_allclose(scaled.probabilities, plain.probabilities, atol=1e-12)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("replicates", [None, 4])
def test_state_round_trips_and_is_checked(name, replicates):
    """Through JSON, a continuation is bit for bit the same; another policy's or a damaged state changes nothing."""
    t, k = 60, 5
    rng = np.random.default_rng(12)
    uniforms, losses = rng.random((t, 4)), rng.random((t, 4, k))
    policy, other = (MAKE[name](k, t, replicates=replicates) for _ in range(2))
    run(policy, uniforms[:30], losses[:30])
    np.testing.assert_allclose(other.probabilities, 1 / k)  # and is not what it remembers after loading
    saved = json.loads(json.dumps(policy.state_dict()))
    other.load_state_dict(saved)
    for left, right in zip(
        run(policy, uniforms[30:], losses[30:]), run(other, uniforms[30:], losses[30:]), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    before = other.state_dict()
    damaged = [("scores", [[0.0]]), ("scores", [[np.nan] * k] * (replicates or 1)), ("rounds", -1), ("num_arms", 3)]
    damaged += [("version", 2), ("algorithm", "UCB"), ("replicates", 9)]
    damaged += [] if name == "TsallisINF" else [("step_size", 9.0)]
    for key, value in damaged:
        with pytest.raises(ValueError, match=key):
            other.load_state_dict({**saved, key: value})
    assert other.state_dict() == before


def test_probabilities_cannot_be_written_to():
    policy = Exp3.for_horizon(3, 10, replicates=2)
    with pytest.raises(ValueError, match="read-only"):
        policy.probabilities[0, 0] = 1.0


BAD = [
    (lambda: Hedge(1, 0.1), "num_arms must be an integer >= 2, got 1"),
    (lambda: Hedge(2, 0.0), r"step_size must lie in \(0, inf\], got 0.0"),
    (lambda: Exp3(2, 0.0), r"step_size must lie in \(0, inf\], got 0.0"),
    (lambda: Exp3(2, np.inf), "step_size must lie in .*inf"),
    (lambda: Exp3(2, 0.1, replicates=0), "replicates must be an integer >= 1, got 0"),
    (lambda: Exp3IX(2, 0.1, -1.0), "implicit_exploration must lie in .*-1.0"),
    (lambda: Exp3P(2, 0.1, -0.1, 0.1), "bias must lie in .*-0.1"),
    (lambda: Exp3P(2, 0.1, 0.1, 0.0), r"exploration must lie in \(0, 1\], got 0.0"),
    (lambda: Exp3S(2, 0.1, 1.5), r"share must lie in \(0, 1\], got 1.5"),
    (lambda: Exp3.for_horizon(2, 0), "horizon must be an integer >= 1, got 0"),
    (lambda: Exp3P.for_horizon(10, 20, 0.1), "horizon must be at least .* = 25.38.*, got 20"),
    (lambda: Exp3P.for_horizon(10, 200, 0.0), r"delta must lie in \(0, 1\], got 0.0"),
    (lambda: Exp3S.for_horizon(2, 10, 0), "switches must be an integer >= 1, got 0"),
    (lambda: Exp3S.for_horizon(2, 10, 10), "switches must be at most horizon - 1 = 9, got 10"),
    (lambda: Hedge.for_horizon(2, 10, total_delay=-1.0), "total_delay must lie in .*-1.0"),
    (lambda: Hedge(2, 0.1).update([0.0]), r"losses must have shape \(2,\) .*got \(1,\)"),
    (lambda: Hedge(2, 0.1, replicates=3).update([0.0, 1.0]), r"losses must have shape \(3, 2\) .*got \(2,\)"),
    (lambda: Hedge(2, 0.1).update([0.0, np.nan]), "losses must hold finite numbers, got nan"),
    (lambda: Hedge(2, 0.1).update([0.0, 1.0], observed=[1, 1]), "got no observation_probability"),
    (lambda: Hedge(2, 0.1).update([0.0, 1.0], observation_probability=[1, 1]), "got no observed"),
    (
        lambda: Hedge(2, 0.1).update([0.0, 2.0], observed=[1, 1], observation_probability=[1, 1]),
        r"losses must hold .*\[0, 1\], got 2.0",
    ),
    (
        lambda: Hedge(2, 0.1).update(0.5, observed=[1, 0], observation_probability=[1, 1]),
        r"losses must have shape .*got \(\)",
    ),
    (
        lambda: Hedge(2, 0.1).update([0.0, 1.0], observed=[1, 1], observation_probability=[0, 1]),
        "observation_probability must be positive where observed, got 0.0",
    ),
    (lambda: Exp3(2, 0.1).update(2, 0.5), r"arm must hold .*\[0, 1\], got 2.0"),
    (lambda: Exp3(2, 0.1).update(0, 1.5), r"loss must hold .*\[0, 1\], got 1.5"),
    (lambda: Exp3(2, 0.1).update(0, np.nan), "loss must hold .*nan"),
    (lambda: Exp3(2, 0.1, replicates=2).update(0, 0.5), r"arm must have shape \(2,\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_arm_that_cannot_be_drawn_is_refused_and_nothing_changes():
    policy = Exp3(2, 2000.0)
    policy.update(0, 1.0)
    before = policy.state_dict()
    with pytest.raises(ValueError, match=r"arm must be one that can be drawn, got 0 of probability 0\.0"):
        policy.update(0, 1.0)
    assert policy.state_dict() == before


def test_one_interface():
    """Types of a single policy and of replicates."""
    rng = np.random.default_rng(13)
    for name in BANDITS:
        one, many = MAKE[name](3, 100), MAKE[name](3, 100, replicates=4)
        assert isinstance(one.sample(rng), int)
        assert many.sample(rng).shape == (4,)
        assert one.probabilities.shape == (3,)
        assert many.probabilities.shape == (4, 3)
        assert many.probabilities.dtype == np.float64
