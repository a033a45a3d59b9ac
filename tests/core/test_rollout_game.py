"""Rollout-GDRO: utilities are expectations, budgets are met exactly, prices are marginal gains."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import roots_jacobi
from scipy.stats import chisquare

from gdro_core import (
    HIT,
    MIXED,
    VARIANCE,
    GDROController,
    OnlineDifficultyClassifier,
    PromptGDRO,
    RolloutGDRO,
    Utility,
    rollout_utility,
    signal,
    sqrt_allocation,
)
from gdro_core.utilities import UTILITIES

SEEDS = st.integers(0, 2**32 - 1)
GIVEN_P = {  # utility of n rollouts at pass rate p
    "variance": lambda p, n: -p * (1 - p) / n,
    "mixed": lambda p, n: 1 - p**n - (1 - p) ** n,
    "hit": lambda p, n: 1 - (1 - p) ** n,
}
KINDS = [{"utility": UTILITIES[name], "per_bin": per_bin} for name in GIVEN_P for per_bin in (False, True)]


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
    """Draw p from its posterior: means within five standard errors (four means: 2e-6 if the seed were new)."""
    p = np.random.default_rng(0).beta(1.5, 4.0, (20000, 1))
    draws = GIVEN_P[name](p, np.array([1, 2, 5, 12]))
    error = 5 * draws.std(axis=0) / np.sqrt(20000) + 1e-12
    assert (np.abs(rollout_utility(name, [1.5], [4.0], [1, 2, 5, 12])[0] - draws.mean(axis=0)) < error).all()


@given(SEEDS)
def test_counts_follow_the_joint_law(seed):
    """F7 and Theorem 4.2 with bounds: in a large batch n_i is n ∝ ω√v, clipped, rounded to a neighbouring integer."""
    rng = np.random.default_rng(seed)
    a, b, omega = rng.gamma(1, 3, 2000) + 0.05, rng.gamma(1, 3, 2000) + 0.05, rng.uniform(0.2, 4, 2000)
    counts = RolloutGDRO(8, 2, 24).counts(np.zeros(2000), a, b, omega)
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
    if kind["per_bin"]:
        total -= total % size  # with a whole n_bar one count per bin always meets the budget
    game = RolloutGDRO(total / size, low, low + span, **kind)
    bins, a, b, omega = batch(rng, size)
    counts = game.counts(bins, a, b, omega, rng=rng)
    assert counts.sum() == total
    assert ((low <= counts) & (counts <= low + span)).all()
    assert (np.abs(counts[bins < 0] - total / size) < 1).all()
    if kind["per_bin"]:
        assert all(np.ptp(counts[bins == b]) == 0 for b in set(bins) - {-1})


def test_a_mean_that_floats_cannot_hold_is_still_met():
    """1.15 x 100 is 114.99999999999999 in floating point, and 115 rollouts."""
    assert RolloutGDRO(1.15, 1, 3).counts(np.zeros(100), np.ones(100), np.ones(100)).sum() == 115


@given(SEEDS)
def test_the_price_is_what_one_rollout_more_is_worth(seed):
    """Per prompt: the optimal utility of budget + 1 less that of the budget, and the largest gain nobody bought."""
    rng = np.random.default_rng(seed)
    bins, a, b, omega = batch(rng, 10, unseen=False)
    utility = rollout_utility("mixed", a, b, np.arange(2, 8)) * omega[:, None]
    values, prices, rows = [], [], np.arange(10)
    for total in (*range(40, 44), 70):
        counts, price = RolloutGDRO(total / 10, 2, 7, MIXED).allocate(bins, a, b, omega)
        values.append(utility[rows, counts - 2].sum())
        prices.append(price)
    np.testing.assert_allclose(np.diff(values)[:3], prices[:3], atol=1e-12)
    assert prices[-1] == 0.0  # everybody is at n_max
    assert RolloutGDRO(4, 2, 7).allocate([-1, -1], [1, 1], [1, 1])[1] == 0.0


@given(SEEDS)
def test_the_price_of_a_group_is_per_rollout(seed):
    """With no rollout for some, the price is the best mean gain of any more rollouts for any prompt."""
    rng = np.random.default_rng(seed)
    bins, a, b, omega = batch(rng, 10, unseen=False)
    utility = signal(0.5)
    values = utility.of(a, b, np.arange(9)) * omega[:, None] ** 2
    counts, price = RolloutGDRO(int(rng.integers(1, 9)), 0, 8, utility).allocate(bins, a, b, omega)
    gains = [
        (row[m] - row[n]) / (m - n) for row, n in zip(values, counts, strict=True) for m in range(int(n) + 1, 9)
    ]  # fmt: skip
    assert price == pytest.approx(max(gains, default=0.0), rel=1e-12)


def test_the_price_of_a_bin_is_per_rollout():
    """A bin's gain is shared by its prompts: the same bin three times as large has the same price."""
    for copies in (1, 3):
        bins = np.repeat([0, 1], copies)
        a, b = np.repeat([2.0, 8.0], copies), np.repeat([2.0, 1.0], copies)
        game = RolloutGDRO(3, 1, 8, per_bin=True)
        counts, price = game.allocate(bins, a, b)
        gains = np.diff(rollout_utility("variance", a, b, game.arms), axis=1)
        assert price == pytest.approx(gains[np.arange(bins.size), counts - 1].max())


@given(SEEDS)
def test_bin_allocation_is_brute_force(seed):
    """The best of all joint choices of one count per bin that meet the budget."""
    rng = np.random.default_rng(seed)
    bins, a, b, omega = batch(rng, 9, bins=3, unseen=False)
    present, size = np.unique(bins, return_counts=True)
    utility = rollout_utility("hit", a, b, [1, 2, 3, 4, 5]) * omega[:, None]
    counts = RolloutGDRO(3, 1, 5, HIT, per_bin=True).counts(bins, a, b, omega)
    best = max(
        sum(utility[bins == bin_, n - 1].sum() for bin_, n in zip(present, choice, strict=True))
        for choice in product(range(1, 6), repeat=present.size)
        if size @ choice == 27
    )
    assert utility[np.arange(9), counts - 1].sum() == pytest.approx(best)


@given(SEEDS)
def test_permuting_a_batch_permutes_its_counts(seed):
    """Where no gains tie, a count belongs to the prompt and not to its place."""
    rng = np.random.default_rng(seed)
    columns = batch(rng, 12, unseen=False)
    order = rng.permutation(12)
    game = RolloutGDRO(4, 2, 12)
    np.testing.assert_array_equal(game.counts(*columns)[order], game.counts(*(column[order] for column in columns)))


@given(SEEDS)
def test_permuted_counts_are_the_zero_information_null(seed):
    """F5: the same counts, each on a random seen prompt; unseen ones keep the mean; the seed decides."""
    rng = np.random.default_rng(seed)
    columns = batch(rng, 30)
    game, null = RolloutGDRO(4, 2, 12), RolloutGDRO(4, 2, 12, permute=True)
    counts, price = game.allocate(*columns, rng=np.random.default_rng(seed))
    permuted, again = (null.allocate(*columns, rng=np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(np.sort(permuted[0]), np.sort(counts))
    np.testing.assert_array_equal(permuted[0], again[0])
    assert (permuted[0][columns[0] < 0] == 4).all()
    assert permuted[1] == price


def test_permuted_counts_do_not_know_the_prompt():
    """Over seeds every prompt gets every count equally often, however large its own variance."""
    a, b = np.array([0.1, 0.1, 5.0, 5.0]), np.array([9.0, 5.0, 5.0, 4.0])
    counts = RolloutGDRO(4, 2, 12).counts(np.zeros(4), a, b)
    assert len(set(counts)) > 1
    null = RolloutGDRO(4, 2, 12, permute=True)
    drawn = np.array([null.counts(np.zeros(4), a, b, rng=np.random.default_rng(s)) for s in range(1000)])
    top = (drawn == counts.max()).sum(axis=0)
    assert chisquare(top).pvalue > 1e-3  # false alarm 1e-3 if the seeds were new


@pytest.mark.parametrize("utility", [MIXED, HIT], ids=["mixed", "hit"])
@pytest.mark.parametrize("per_bin", [False, True])
@given(seed=SEEDS)
def test_no_rollouts_may_be_best(utility, per_bin, seed):
    """n_min = 0: no utility without rollouts. The optimum is brute force; of `mixed`, not concave, 4/5 at least."""
    rng = np.random.default_rng(seed)
    bins, a, b, omega = batch(rng, 5, bins=3, unseen=False)
    rows = bins if per_bin else np.arange(5)
    value = utility.of(a, b, np.arange(5)) * omega[:, None]
    np.testing.assert_array_equal(value[:, 0], 0.0)
    game = RolloutGDRO(1, 0, 4, utility, per_bin=per_bin)
    counts, price = game.allocate(bins, a, b, omega, rng=rng)
    present, member = np.unique(rows, return_inverse=True)
    feasible = (np.array(c)[member] for c in product(range(5), repeat=present.size))
    best = max(value[np.arange(5), c].sum() for c in feasible if c.sum() == 5)
    assert counts.sum() == 5
    reached = value[np.arange(5), counts].sum()
    if utility == MIXED and not per_bin:  # theorem 16: at least 1 - 1 / budget of it
        assert 0.8 * best - 1e-12 <= reached <= best + 1e-12
        assert 1 not in counts
    else:
        assert reached == pytest.approx(best, abs=1e-12)
    assert price >= 0


def test_a_prompt_without_rollouts_is_not_observed():
    """The flow goes on: metrics are finite, and what got no rollout has taught nothing."""
    controller = GDROController(
        OnlineDifficultyClassifier([0.5], prior=(1.0, 1.0)),
        PromptGDRO(2),
        RolloutGDRO(2, 0, 4, MIXED),
    )
    ids = ["sure", "sure too", "split", "open"]
    controller.observe(controller.plan(ids), [1, 1, 1, 1, 0, 1, 1, 0])
    for _ in range(4):
        plan = controller.plan(ids)
        before = controller.classifier.posterior(ids)
        metrics = controller.observe(plan, (np.arange(8) % 2)[: plan.counts.sum()])
        after = controller.classifier.posterior(ids)
        silent = plan.counts == 0
        assert silent.any()
        np.testing.assert_array_equal(before[0][silent], after[0][silent])
        json.dumps(metrics, allow_nan=False)
        graded = (plan.bins == 1) & ~silent
        if graded.any():
            mean = np.array([(np.arange(8) % 2)[plan.owner == i].mean() for i in np.flatnonzero(graded)])
            assert metrics["bin_error"][1] == pytest.approx(1 - mean.mean())


def expected_grpo_gradient(n, p):
    """Exact mean over all 2^n groups of (1/n) sum_j A_j d log pi(r_j), for one Bernoulli logit (Eq. 3, ε = 0)."""
    total = 0.0
    for rewards in product((0.0, 1.0), repeat=int(n)):
        r = np.array(rewards)
        if r.std() > 0:
            probability = p ** r.sum() * (1 - p) ** (n - r.sum())
            total += probability * ((r - r.mean()) / r.std() * (r - p)).mean()
    return total


@pytest.mark.parametrize("weighted", [True, False])
def test_preserved_objective_has_the_gradient_of_uniform_counts(weighted):
    """F6: where the posterior mean is the pass rate, ragged counts ascend what n_bar rollouts each would."""
    rate = {"hard": (0, 8), "rare": (1, 8), "even": (4, 8), "easy": (8, 8), "fair": (3, 8)}

    def controller(**setting):
        prompt = PromptGDRO(4, uniform_reference=True) if weighted else None
        return GDROController(OnlineDifficultyClassifier([0.2, 0.4, 0.6]), prompt, seed=1, **setting)

    plans = {}
    game = {"rollout": RolloutGDRO(4, 2, 10)}
    for name, setting in {
        "uniform": {"mean_rollouts": 4, "preserve_objective": True},  # nothing to preserve
        "preserved": game | {"preserve_objective": True},
        "pulled": game,
    }.items():
        one = controller(**setting)
        one.classifier.observe(list(rate), *zip(*rate.values(), strict=True))
        if one.prompt is not None:
            one.prompt.observe(one.classifier.bins(list(rate)), [1.0, 0.8, 0.5, 0.0, 0.6])
        plans[name] = one.plan([*rate, "new"])
    p = np.append([(0.5 + c) / (1 + n) for c, n in rate.values()], 0.5)
    assert len(set(plans["preserved"].counts)) > 2
    pull = {
        name: plan.weights * [expected_grpo_gradient(n, rate) for n, rate in zip(plan.counts, p, strict=True)]
        for name, plan in plans.items()
    }
    np.testing.assert_allclose(pull["preserved"], pull["uniform"], rtol=1e-9)
    assert np.abs(pull["pulled"] / pull["uniform"] - 1).max() > 0.1


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (RolloutGDRO(4, 1, 6), "min_rollouts with preserve_objective must lie in .*1"),
        (RolloutGDRO(2.5, 2, 6), "mean_rollouts must be a whole number with preserve_objective, got 2.5"),
    ],
)
def test_preserve_objective_refuses(rollout, message):
    """A single rollout has no gradient to divide by, and w_n needs a whole n."""
    with pytest.raises(ValueError, match=message):
        GDROController(OnlineDifficultyClassifier(), rollout=rollout, preserve_objective=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RolloutGDRO(4, 0, 6), 'min_rollouts with utility "variance" must be an integer >= 1, got 0'),
        (lambda: RolloutGDRO(4, -1, 6, HIT), 'min_rollouts with utility "hit" must be an integer >= 0, got -1'),
        (lambda: RolloutGDRO(4, 7, 6), "max_rollouts must be at least min_rollouts = 7, got 6"),
        (lambda: RolloutGDRO(1, 2, 6), r"mean_rollouts must lie in \[2, 6\], got 1"),
        (lambda: RolloutGDRO(6.5, 2, 6), r"mean_rollouts must lie in \[2, 6\], got 6.5"),
        (lambda: RolloutGDRO(4, 2, 6, "hit"), r"utility must be a Utility such as gdro_core.VARIANCE, got 'hit'"),
        (lambda: RolloutGDRO(4, 2, 6).counts([-2], [1], [1]), "bins must hold .*-2"),
        (lambda: RolloutGDRO(4, 2, 6).counts([0], [1, 1], [1]), "a must have shape"),
        (lambda: RolloutGDRO(4, 2, 6).counts([0], [1], [np.nan]), "b must hold .*nan"),
        (lambda: RolloutGDRO(4, 2, 6).counts([0], [1], [1], [-1]), "weights must hold .*-1"),
        (lambda: RolloutGDRO(4, 2, 6).counts([0], [0], [1]), "a must be above 0"),
        (lambda: RolloutGDRO(4, 2, 6).counts([0], [1], [0]), "b must be above 0"),
        (lambda: RolloutGDRO(2.5, 2, 6).counts([0], [1], [1]), "must be an integer, got 2.5 x 1"),
        (
            lambda: RolloutGDRO(2.5, 2, 6, per_bin=True).counts([0, 0], [1, 1], [1, 1]),
            "budget 5 cannot be met .*nearest feasible: 4 and 6",
        ),
        (lambda: RolloutGDRO(4, 2, 6, permute=True).counts([0], [1], [1]), "rng must be given .*None"),
        (lambda: rollout_utility("surrogate", [1], [1], [1]), "utility must be one of .*'surrogate'"),
        (lambda: rollout_utility("variance", [1], [1], [0]), "arms must hold .*0"),
        (lambda: rollout_utility("hit", [1], [1], [-1]), "arms must hold .*-1"),
    ],
)
def test_bad_input_is_refused(call, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        call()


def test_it_is_a_pure_function_of_posterior_and_weights():
    """Frozen, no state, equal games plan equally; the generator breaks ties alone."""
    game, bins = RolloutGDRO(4, 2, 12), np.zeros(4)
    with pytest.raises(FrozenInstanceError):
        game.max_rollouts = 3
    assert game == RolloutGDRO(mean_rollouts=4, min_rollouts=2, max_rollouts=12, utility=VARIANCE)
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([4.0, 3.0, 1.5, 1.0])
    plans = {tuple(game.counts(bins, a, b, rng=np.random.default_rng(s))) for s in range(5)}
    assert len(plans) == 1


def test_a_utility_of_your_own_needs_no_other_edit():
    """Log rollouts: one record; greedy takes it, and the weight enters by its power."""
    log = Utility("log", fewest=1, concave_from=1, weight_power=1, table=lambda a, b, n: np.log(n) + 0.0 * (a + b))
    game = RolloutGDRO(4, 1, 12, log)
    one = np.ones(3)
    assert game.counts(np.zeros(3), one, one).tolist() == [4, 4, 4]
    heavy = game.counts(np.zeros(3), one, one, [4.0, 1.0, 1.0])
    assert heavy.tolist() == [8, 2, 2]  # n ∝ ω maximises sum ω log n
    assert game.settings()["utility"] == "log"


@pytest.mark.parametrize("utility", UTILITIES.values(), ids=UTILITIES)
def test_concavity_starts_where_the_record_says(utility):
    """Second differences are <= 0 from there on, and not one rollout earlier where fewer are allowed."""
    table = utility.of([0.7, 3.0], [2.0, 0.4], np.arange(utility.fewest, 12))
    bend = np.diff(table, 2, axis=1)
    start = utility.concave_from - utility.fewest
    assert (bend[:, start:] <= 1e-12).all()
    assert (bend[:, :start] > 0).all()
