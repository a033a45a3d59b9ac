"""Prompt-GDRO: the adversary's answer is Lemma 4.1's, its weights depend on the past alone."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax, xlogy
from scipy.stats import binom

from gdro_core import (
    ERROR,
    LEARNABILITY,
    Adversary,
    ChiSquare,
    CVaR,
    Entropic,
    NoRegret,
    Payoff,
    PromptGDRO,
    chi_square,
    cvar,
    prompt_payoff,
)
from gdro_core._validate import dials

SEEDS = st.integers(0, 2**32 - 1)
UNIFORM = {"uniform_reference": True}
HEDGE = {"adversary": NoRegret(), **UNIFORM}
IX = {"adversary": NoRegret(implicit_exploration=True), **UNIFORM}
ADVERSARIES = [Entropic(2.0), CVaR(0.5), ChiSquare(0.5), HEDGE["adversary"], IX["adversary"]]
both_references = pytest.mark.parametrize("uniform", [False, True])


def no_regret(step, implicit=False):
    """Settings of a game whose adversary has no regret."""
    return {"adversary": NoRegret(step, implicit_exploration=implicit), **UNIFORM}


def played(rng, batches=6, bins=4, **options):
    """A game after some random batches with unseen prompts and missing bins; every bin was observed at least once."""
    game = PromptGDRO(bins, **options)
    game.observe(np.arange(bins), rng.random(bins))
    for _ in range(batches):
        game.observe(rng.integers(-1, rng.integers(1, bins + 1), 7), rng.random(7))
    return game


def reference_of(game):
    return np.full(game.num_bins, 1 / game.num_bins) if game.uniform_reference else game.share


def regularised(q, game, reference):
    """sum q S - KL(q || r) / eta."""
    return float(q @ game.scores - (xlogy(q, q) - xlogy(q, reference)).sum() / game.adversary.step_size)


@both_references
@given(seed=SEEDS)
def test_theorem_1_q_is_the_maximiser_of_lemma_4_1(uniform, seed):
    """q maximises sum q S - KL(q || r)/eta, with value (1/eta) log sum r e^(eta S); the hard maximum is near.

    For uniform r, sum q S + H(q)/eta differs by the constant log(B)/eta, the bound of the lemma.
    """
    rng = np.random.default_rng(seed)
    game = played(rng, uniform_reference=uniform, adversary=Entropic(float(rng.uniform(0.1, 5))))
    r = reference_of(game)
    value = logsumexp(game.adversary.step_size * game.scores, b=r) / game.adversary.step_size
    assert regularised(game.probabilities, game, r) == pytest.approx(value, abs=1e-9)
    for other in rng.dirichlet(np.ones(4), 20):
        assert regularised(other, game, r) <= value + 1e-12
    if uniform:
        assert game.scores.max() - np.log(4) / game.adversary.step_size <= value + 1e-12
        assert value <= game.scores.max() + 1e-12


@pytest.mark.parametrize("seed", range(5))
@both_references
def test_theorem_1_q_agrees_with_a_numerical_maximiser_and_is_the_gradient(uniform, seed):
    """Lemma 4.1 by a generic solver over the simplex, and its gradient d value / d S = q by finite differences."""
    rng = np.random.default_rng(seed)
    game = played(rng, uniform_reference=uniform)
    r = reference_of(game)
    optimum = minimize(lambda z: -regularised(softmax(z), game, r), np.zeros(4), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(game.probabilities, softmax(optimum.x), atol=1e-5)

    def value(scores):
        return logsumexp(game.adversary.step_size * scores, b=r) / game.adversary.step_size

    step = 1e-6 * np.eye(4)
    slopes = [(value(game.scores + e) - value(game.scores - e)) / 2e-6 for e in step]
    np.testing.assert_allclose(slopes, game.probabilities, atol=1e-8)


@both_references
@pytest.mark.parametrize("adversary", ADVERSARIES, ids=str)
@given(seed=SEEDS, exploration=st.sampled_from([0.0, 0.1, 1.0]))
def test_importance_weights_turn_the_shares_into_q(adversary, uniform, seed, exploration):
    """F9: p_b w_b = q_b, so the weights have mean 1 under the running share while none is capped."""
    uniform = uniform or adversary.cumulative
    options = {"adversary": adversary, "uniform_reference": uniform, "exploration": exploration}
    game = played(np.random.default_rng(seed), max_weight=1e6, **options)
    np.testing.assert_allclose(game.share * game.bin_weights, game.probabilities, rtol=1e-9, atol=1e-290)
    assert game.share @ game.bin_weights == pytest.approx(1.0, rel=1e-9)
    assert game.probabilities.sum() == pytest.approx(1.0, rel=1e-12)


@both_references
@given(seed=SEEDS, exploration=st.sampled_from([0.0, 0.5]))
def test_the_cap_is_the_last_thing_applied(uniform, seed, exploration):
    """w_b = min(q_b / p_b, max_weight), also with exploration."""
    options = {"uniform_reference": uniform, "exploration": exploration, "adversary": Entropic(9.0)}
    game = played(np.random.default_rng(seed), max_weight=1.5, **options)
    expected = np.minimum(game.probabilities / game.share, 1.5)
    np.testing.assert_allclose(game.bin_weights, expected, rtol=1e-9)


@given(SEEDS)
def test_scores_and_shares_are_debiased_averages(seed):
    """S_b is the normalised EMA of the bin means over the batches that had the bin; p_b the same over all batches."""
    rng = np.random.default_rng(seed)
    game, means, shares = PromptGDRO(3, ema=0.3), [[], [], []], []
    for _ in range(8):
        bins, payoff = rng.integers(-1, 3, 6), rng.random(6)
        game.observe(bins, payoff)
        for b in set(bins[bins >= 0]):
            means[b].append(payoff[bins == b].mean())
        if (bins >= 0).any():
            shares.append(np.bincount(bins[bins >= 0], minlength=3) / (bins >= 0).sum())
    seen = [b for b in range(3) if means[b]]
    averages = [np.average(means[b], weights=0.7 ** np.arange(len(means[b]))[::-1]) for b in seen]
    np.testing.assert_allclose(game.scores[seen], averages, rtol=1e-9)
    np.testing.assert_allclose(game.share, np.average(shares, axis=0, weights=0.7 ** np.arange(len(shares))[::-1]))


def test_a_bin_never_observed_lies_between_its_neighbours():
    """Linear between the nearest observed bins, and level beyond the last one."""
    game = PromptGDRO(6)
    game.observe([1, 4], [1.0, 0.4])
    np.testing.assert_allclose(game.scores, [1.0, 1.0, 0.8, 0.6, 0.4, 0.4])


@pytest.mark.parametrize("options", [{}, {"adversary": CVaR(0.5)}, {"adversary": ChiSquare(0.5)}, HEDGE, IX])
@given(seed=SEEDS)
def test_a_weight_depends_on_the_bin_and_the_past_alone(options, seed):
    """What else is in the batch changes nothing; unseen prompts weigh 1 and teach nothing."""
    rng = np.random.default_rng(seed)
    game = played(rng, **options)
    bins = rng.integers(-1, 4, 30)
    alone = [game.weights([b])[0] for b in bins]
    np.testing.assert_array_equal(game.weights(bins), alone)
    assert (game.weights(bins)[bins < 0] == 1.0).all()
    before = game.state_dict()
    game.observe([-1, -1], [1.0, 0.0])
    assert game.state_dict() == before


def test_a_missing_bin_keeps_its_score():
    """Only bins of the batch move."""
    game = PromptGDRO(3)
    game.observe([0, 1, 2], [0.2, 0.4, 0.6])
    before = game.scores
    game.observe([0, 0], [1.0, 1.0])
    assert game.scores[0] > before[0]
    np.testing.assert_array_equal(game.scores[1:], before[1:])


def test_before_the_first_batch_the_game_is_neutral():
    """Weights 1, q the reference."""
    for options in ({}, UNIFORM, HEDGE):
        game = PromptGDRO(3, **options)
        assert game.weights([0, 1, 2, -1]).tolist() == [1, 1, 1, 1]
        np.testing.assert_allclose(game.probabilities, 1 / 3)


def test_a_step_size_of_zero_is_no_adversary():
    """The limit eta -> 0: weights r_b / p_b, which is 1 around the share."""
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(played(rng, adversary=Entropic(0.0)).bin_weights, 1.0)
    game = played(rng, adversary=Entropic(0.0), **UNIFORM)
    np.testing.assert_allclose(game.bin_weights, 0.25 / game.share)


@pytest.mark.parametrize("options", [{}, UNIFORM, {"exploration": 0.1}])
@pytest.mark.parametrize("scale", [1e3, 1e100])
def test_huge_step_sizes_and_payoffs_neither_overflow_nor_vanish(options, scale):
    """Weights stay in (0, max_weight] and q on the simplex, with a bin that was never drawn and one that is rare."""
    game = PromptGDRO(4, adversary=Entropic(scale), **options)
    for payoff in (scale, -scale):
        game.observe([0] + [1] * 500, [payoff] + [0.0] * 500)
        assert (game.bin_weights > 0).all()
        assert (game.bin_weights <= 15).all()
        assert game.probabilities.sum() == pytest.approx(1.0)
    game.observe([2], [0.0])
    assert np.isfinite(game.bin_weights).all()


@both_references
@given(seed=SEEDS, size=st.sampled_from([0.1, 0.4, 0.9]))
def test_theorem_13_cvar_and_chi_square_play_the_best_response_to_the_scores(uniform, seed, size):
    """q is `ambiguity`'s answer to S around the reference; a bin of no share yet is weighed by its score alone."""
    for adversary, answer in ((CVaR(size), cvar), (ChiSquare(size), chi_square)):
        game = played(np.random.default_rng(seed), adversary=adversary, uniform_reference=uniform)
        np.testing.assert_allclose(game.probabilities, answer(game.scores, size, reference_of(game)).q, atol=1e-12)
    game = PromptGDRO(3, adversary=CVaR(0.5), max_weight=10)
    game.observe([0, 0, 1, 1], [0.9, 0.9, 0.1, 0.1])
    np.testing.assert_allclose(game.bin_weights[:2], [2.0, 0.0], atol=1e-9)  # 1 / alpha on the worse half
    assert game.bin_weights[2] < 1e-9  # level with bin 1, below the tail


def rare_bins(options, rounds, seed, share=(0.02, 0.38, 0.6), prompts=16):
    """A game that met `rounds` batches; the rarest bin has the greatest payoff in the mean. The share is known."""
    rng = np.random.default_rng(seed)
    game = PromptGDRO(3, ema=0.01, max_weight=1e6, **options)
    for _ in range(200):
        game.observe(rng.choice(3, 1000, p=share), np.zeros(1000))
    start = game.scores
    earned = 0.0
    for _ in range(rounds):
        bins = rng.choice(3, prompts, p=share)
        earned += float(game.probabilities @ [0.7, 0.5, 0.4])
        game.observe(bins, (rng.random(prompts) < np.array([0.7, 0.5, 0.4])[bins]).astype(float))
    moved = game.scores - start
    return game, moved, 0.7 * rounds - earned


def test_theorem_4_a_rare_bin_loses_no_payoff_while_it_is_absent():
    """Hedge's cumulated losses are unbiased for every bin, although the rare one is in 28 % of the batches only."""
    step = 1e-4  # so small that scores are linear in the losses
    _, moved, _ = rare_bins(no_regret(step), 3000, seed=0)
    slopes = (moved - moved[1]) / (step * 3000)
    np.testing.assert_allclose(slopes, [0.2, 0.0, -0.1], atol=0.04)


def test_theorem_4_implicit_exploration_damps_the_losses_of_rare_bins_alone():
    """1 / (o + eta/2) against 1 / o: a bin that is always there is hardly changed, a rare one counts o/(o + eta/2)."""
    step = 0.5
    batch = [0] * 1 + [1] * 99
    games = [PromptGDRO(2, **no_regret(step, implicit)) for implicit in (False, True)]
    fed = []
    for game in games:
        game.observe(batch, np.ones(100))  # tells the shares, loses nothing
        game.observe(batch, np.zeros(100))
        fed.append(np.diff(game.scores)[0])
    o = 1 - (1 - (1 + 1) / (2 + 100)) ** 100, 1.0
    assert fed[0] == pytest.approx(step * (1 / o[0] - 1 / o[1]), rel=1e-6)
    assert fed[1] == pytest.approx(step * (1 / (o[0] + step / 2) - 1 / (o[1] + step / 2)), rel=1e-6)


@pytest.mark.parametrize("implicit", [False, True])
def test_theorem_4_no_regret_against_the_best_bin_where_the_tracking_adversary_has_linear_regret(implicit):
    """F4: cumulated losses find the worst bin although it is rare: regret <= ln K / eta + eta T / (2 o_min), slope 1/2.

    The published answer to an average loses the same in every round instead.
    """
    horizons, rarest = np.array([300, 900, 2700]), 1 - 0.98**16
    steps = np.sqrt(2 * np.log(3) / horizons)
    regret = [
        np.mean([rare_bins(no_regret(step, implicit), rounds, seed)[2] for seed in range(4)])
        for rounds, step in zip(horizons, steps, strict=True)
    ]
    assert (regret <= np.log(3) / steps + steps * horizons / (2 * rarest)).all()
    assert 0.35 < np.polyfit(np.log(horizons), np.log(regret), 1)[0] < 0.65
    tracking = PromptGDRO(3, adversary=Entropic(0.65), **UNIFORM)
    tracking.observe([0, 1, 2], [0.7, 0.5, 0.4])
    assert 0.7 - tracking.probabilities @ [0.7, 0.5, 0.4] > 0.1  # per round, whatever T


@pytest.mark.parametrize("implicit", [False, True])
def test_theorem_4_a_bin_in_one_batch_of_150_is_believed_rare_when_it_shows_up(implicit):
    """The worst bin is not played for being rare: the regret stays below the bound with its true chance.

    A moving share that already has the present batch in it would make its losses a hundredth, and the regret linear.
    """
    share, payoff, rounds, prompts = np.array([1e-4, 0.4, 0.5999]), np.array([0.1, 0.9, 0.5]), 3000, 64
    rng, chance = np.random.default_rng(0), 1 - (1 - 1e-4) ** 64
    step = float(np.sqrt(2 * np.log(3) * chance / rounds))
    game = PromptGDRO(3, **no_regret(step, implicit))
    regret = 0.0
    for _ in range(rounds):
        bins = rng.choice(3, prompts, p=share)
        regret += 0.9 - float(game.probabilities @ payoff)
        game.observe(bins, payoff[bins])
    assert regret <= np.log(3) / step + step * rounds / (2 * chance)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("name", "target"), [("error", lambda p: 1 - p), ("learnability", lambda p: 4 * p * (1 - p))])
def test_payoffs_are_unbiased_and_bounded(name, target, p):
    """E[payoff] = 1 - p and 4 p (1 - p), exactly, for every n."""
    for n in (2, 3, 12):
        hits = np.arange(n + 1)
        payoff = prompt_payoff(name, hits, np.full(n + 1, n))
        assert binom.pmf(hits, n, p) @ payoff == pytest.approx(target(p))
        assert (payoff >= 0).all()


@pytest.mark.parametrize("options", [{}, UNIFORM, {"adversary": CVaR(0.5)}, HEDGE, IX])
def test_state_round_trips_through_json(options):
    """A restored game continues bit for bit."""
    original = played(np.random.default_rng(0), **options)
    restored = PromptGDRO(4, **options)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    for game in (original, restored):
        game.observe([0, 1, 1, -1], [0.3, 0.1, 0.9, 0.5])
    assert restored.state_dict() == original.state_dict()
    np.testing.assert_array_equal(restored.bin_weights, original.bin_weights)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"version": 0}, "version = 0"),
        ({}, {"num_bins": 5}, "num_bins = 5"),
        ({}, {"adversary": dials(Entropic(1.0))}, "adversary = .*1.0"),
        ({}, {"adversary": dials(CVaR(0.5))}, "adversary = .*CVaR"),
        ({}, {"payoff": "learnability"}, "payoff = 'learnability'"),
        ({}, {"share": [0, 0, 0, np.nan]}, "share must hold .*nan"),
        ({}, {"share_weight": -1.0}, "share_weight must lie in .*-1"),
        ({}, {"memory": {"sum": [0.0], "weight": [0.0] * 4}}, "sum must have shape"),
        ({}, {"memory": {"sum": [0.0] * 4, "weight": [0, 0, 0, 2]}}, "weight must hold .*2"),
        ({}, {"memory": {"sum": [0.0] * 4}}, "lacks 'weight'"),
        (HEDGE, {"memory": {"drawn": [0, 0, 0, -1.0], "hedge": {}}}, "drawn must hold .*-1"),
        (HEDGE, {"memory": {"drawn": [0, 0, 0, 0]}}, "lacks 'hedge'"),
    ],
)
def test_state_of_another_shape_is_refused(options, change, message):
    """Nothing has changed after the error."""
    game = played(np.random.default_rng(0), **options)
    before = game.state_dict()
    with pytest.raises(ValueError, match=message):
        game.load_state_dict({**before, **change})
    assert game.state_dict() == before


UNBOUNDED = Payoff("log", fewest=1, greatest=np.inf, formula=lambda c, n: -np.log((c + 0.5) / (n + 1)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PromptGDRO(0), "num_bins must be an integer >= 1, got 0"),
        (lambda: PromptGDRO(4, payoff="error"), "payoff must be an object such as gdro_core.ERROR, got 'error'"),
        (lambda: PromptGDRO(4, adversary="cvar"), r"adversary must be an object .*Entropic\(2.0\), got 'cvar'"),
        (lambda: PromptGDRO(4, ema=0.0), r"ema must lie in \(0, 1\], got 0.0"),
        (lambda: PromptGDRO(4, exploration=1.5), "exploration must lie in .*1.5"),
        (lambda: PromptGDRO(4, max_weight=0.5), "max_weight must lie in .*0.5"),
        (lambda: PromptGDRO(4, adversary=NoRegret()), "NoRegret.*uniform_reference=True, got .*False"),
        (lambda: PromptGDRO(4, **HEDGE, payoff=UNBOUNDED), "NoRegret.* needs a bounded payoff .*'log' up to inf"),
        (lambda: Entropic(-1.0), "step_size must lie in .*-1"),
        (lambda: Entropic(np.nan), "step_size must lie in .*nan"),
        (lambda: CVaR(0.0), r"alpha must lie in \(0, 1\], got 0.0"),
        (lambda: ChiSquare(-1.0), "rho must lie in .*-1"),
        (lambda: NoRegret(0.0), "step_size must lie in .*0.0"),
    ],
)
def test_construction_refuses(build, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        build()


def test_an_adversary_and_a_payoff_of_your_own_need_no_other_edit():
    """A worst-bin adversary and a payoff on the log scale, each one object, play like the library's own."""

    @dataclass(frozen=True)
    class Worst(Adversary):
        def respond(self, scores, reference):
            return np.eye(scores.size)[int(np.argmax(scores))]

    game = PromptGDRO(3, adversary=Worst(), payoff=UNBOUNDED)
    game.observe([0, 1, 2, 2], UNBOUNDED.of([0, 2, 4, 4], [4, 4, 4, 4]))
    np.testing.assert_allclose(game.probabilities, [1.0, 0.0, 0.0])
    again = PromptGDRO(3, adversary=Worst(), payoff=UNBOUNDED)
    again.load_state_dict(json.loads(json.dumps(game.state_dict())))
    assert again.state_dict() == game.state_dict()
    with pytest.raises(ValueError, match=r"adversary = .*Worst"):
        PromptGDRO(3, payoff=UNBOUNDED).load_state_dict(game.state_dict())


def test_an_adversary_that_cumulates_refuses_payoffs_outside_its_range():
    """Its losses are c - payoff >= 0; the others take any finite payoff."""
    for payoff, wrong in ((ERROR, 1.5), (LEARNABILITY, 2.5), (ERROR, -0.1)):
        game = PromptGDRO(4, payoff=payoff, **HEDGE)
        before = game.state_dict()
        with pytest.raises(ValueError, match=f"payoff must hold .*{wrong}"):
            game.observe([0], [wrong])
        assert game.state_dict() == before
        PromptGDRO(4, payoff=payoff).observe([0], [wrong])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda game: game.weights([4]), "bins must hold .*4"),
        (lambda game: game.weights([-2]), "bins must hold .*-2"),
        (lambda game: game.weights([0.5]), "bins must hold integers, got 0.5"),
        (lambda game: game.observe([0, 1], [1.0]), "payoff must have shape"),
        (lambda game: game.observe([0], [np.nan]), "payoff must hold finite numbers, got nan"),
        (lambda game: prompt_payoff("surrogate", [1], [2]), "payoff must be one of .*'surrogate'"),
        (lambda game: prompt_payoff("error", [0], [0]), "trials must hold .*0"),
        (lambda game: prompt_payoff("learnability", [1], [1]), "trials must hold .*1"),
        (lambda game: prompt_payoff("error", [5], [4]), "correct must be at most trials, got 5.0 of 4.0"),
        (lambda game: prompt_payoff("error", [-1], [4]), "correct must hold .*-1"),
    ],
)
def test_bad_input_is_refused(call, message):
    """Errors name argument, rule and value, and the game is as it was."""
    game = played(np.random.default_rng(0))
    before = game.state_dict()
    with pytest.raises(ValueError, match=message):
        call(game)
    assert game.state_dict() == before


def test_the_mixture_is_of_the_present_scores():
    """It follows observations and loaded states, and what a caller does to the array changes nothing."""
    game, other = PromptGDRO(2), PromptGDRO(2)
    other.observe([0, 1], [1.0, 0.0])
    asked = game.probabilities
    asked[:] = 0.0
    np.testing.assert_array_equal(game.probabilities, [0.5, 0.5])
    game.load_state_dict(other.state_dict())
    np.testing.assert_array_equal(game.probabilities, other.probabilities)
    assert game.probabilities[0] > 0.5
    game.observe([0, 1], [0.0, 1.0])
    assert game.probabilities[0] != other.probabilities[0]
