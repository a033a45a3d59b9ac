"""The paper's games and controller: its equations, its hyper-parameters, and what is wrong with them (F1-F5)."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from gdro_core import (
    AnyOfN,
    PromptGDRO,
    PublishedController,
    PublishedPromptGDRO,
    PublishedRolloutGDRO,
    ShadowPrice,
    prompt_payoff,
)

SEEDS = st.integers(0, 2**32 - 1)
IDS = [f"task/{i}" for i in range(40)]


def test_published_scores_are_the_plain_recursion():
    """Eq. 12, 14-16: S from 0, not debiased, clipped at 1; payoff over batch share >= .01; capped e^(eta S)."""
    game = PublishedPromptGDRO(3, max_weight=1.5)
    game.observe([0, 0, 0, 1, -1], [0.1, 0.2, 0.3, -0.4, 9.0])
    np.testing.assert_allclose(game.scores, [0.12 * 0.2 / 0.75, 0.12 * -0.4 / 0.25, 0.0])
    np.testing.assert_allclose(game.weights([0, 1, 2, -1]), np.exp(0.65 * np.append(game.scores, 0.0)))
    game.observe(np.r_[np.zeros(999, dtype=int), 1], np.r_[np.zeros(999), 1.0])
    assert game.scores[1] == 1.0  # 0.12 * 1 / 0.01 and more, clipped
    assert game.weights([1]).tolist() == [1.5]


@given(SEEDS)
def test_the_published_payoff_is_blind(seed):
    """F1: group-standardised advantages sum to 0, so at ratio 1 every prompt's loss is 0, and with it every score."""
    rng = np.random.default_rng(seed)
    rewards = (rng.random((12, 8)) < rng.random((12, 1))).astype(float)  # (prompts, rollouts), all difficulties
    advantages = (rewards - rewards.mean(axis=1, keepdims=True)) / (rewards.std(axis=1, keepdims=True) + 1e-6)
    losses = -advantages.mean(axis=1)  # Eq. 5-7 at ratio 1
    np.testing.assert_allclose(losses, 0.0, atol=1e-9)
    bins = (rewards.mean(axis=1) * 3.999).astype(int)
    blind, seeing = PublishedPromptGDRO(4), PromptGDRO(4)
    blind.observe(bins, losses)
    seeing.observe(bins, prompt_payoff("error", rewards.sum(axis=1), np.full(12, 8)))
    np.testing.assert_allclose(blind.weights(bins), 1.0, atol=1e-8)
    assert np.ptp(bins) == 0 or np.ptp(seeing.weights(bins)) > 0


@given(SEEDS)
def test_the_published_adversary_never_nears_a_vertex(seed):
    """F4: eta .65, |S| <= 1, B = 10 give q <= .288, reached; the entropic gap log(B)/eta exceeds the loss range 2."""
    rng = np.random.default_rng(seed)
    game = PublishedPromptGDRO(10, share_normalised=False)
    for _ in range(5):
        game.observe(np.arange(10), rng.normal(scale=100, size=10))
    assert game.probabilities.max() <= 0.288
    game.load_state_dict({**game.state_dict(), "scores": [9.0] + [-9.0] * 9})
    assert 0.2877 < game.probabilities[0] <= 0.288
    assert np.log(10) / game.step_size > 3.54 > 2


@given(SEEDS)
def test_the_published_bandit_learns_the_played_arms_alone(seed):
    """Eq. 20: S moves by the EMA of -(mean loss + mu n) at (bin, its n) alone; the exact budget leaves mu alone."""
    rng = np.random.default_rng(seed)
    game, expected = PublishedRolloutGDRO(4, 4, 2, 6), np.zeros((4, 5))
    game.load_state_dict(game.state_dict() | {"price": game.state_dict()["price"] | {"price": 0.25}})
    for _ in range(5):
        bins = rng.integers(-1, 4, 8)
        counts = game.counts(bins, rng=rng)
        losses = rng.normal(size=8)
        game.observe(bins, counts, losses)
        for bin_ in set(bins) - {-1}:
            n = counts[bins == bin_][0]
            expected[bin_, n - 2] += 0.4 * (-(losses[bins == bin_].mean() + 0.25 * n) - expected[bin_, n - 2])
        np.testing.assert_allclose(game.state_dict()["scores"], expected, atol=1e-12)
        assert game.shadow_price.price == 0.25
    softmax = np.exp(0.65 * expected) / np.exp(0.65 * expected).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(game.arm_probabilities, 0.99 * softmax + 0.01 / 5)


@given(SEEDS)
def test_the_published_allocation_has_the_greatest_probability(seed):
    """§3.3: of all joint choices that meet the budget, the product of arm probabilities is largest."""
    rng = np.random.default_rng(seed)
    game = PublishedRolloutGDRO(3, 4, 2, 6)
    game.load_state_dict(game.state_dict() | {"scores": rng.normal(size=(3, 5)).tolist()})
    bins = np.array([0, 0, 0, 1, 1, 2, 2])
    counts = game.counts(bins)
    probability = {
        arms: game.arm_probabilities[range(3), arms].prod()
        for arms in product(range(5), repeat=3)
        if np.dot([3, 2, 2], np.add(arms, 2)) == 28
    }
    assert tuple(counts[[0, 3, 5]] - 2) == max(probability, key=probability.get)


def test_tied_arms_are_drawn_from_all_feasible_allocations():
    """F5: before any feedback the published game is the zero-information null, uniform over what meets the budget."""
    game, bins = PublishedRolloutGDRO(3, 4, 2, 6), [0, 1, 2]
    drawn = [tuple(game.counts(bins, rng=np.random.default_rng(s)).tolist()) for s in range(2000)]
    feasible = [c for c in product(range(2, 7), repeat=3) if sum(c) == 12]
    assert chisquare([drawn.count(c) for c in feasible]).pvalue > 1e-3  # false alarm 1e-3 if the seeds were new


@pytest.mark.parametrize("exploration", [0.0, 0.5, 1.0])
def test_arm_probabilities_survive_huge_scores(exploration):
    """A vanishing probability is still comparable: no overflow, no log of zero."""
    game = PublishedRolloutGDRO(2, 3, 2, 4, step_size=1e6, exploration=exploration)
    game.observe([0], [2], [-1e6])  # arm 2 of bin 0 is certain, but for exploration
    np.testing.assert_allclose(game.arm_probabilities.sum(axis=1), 1.0)
    rng = np.random.default_rng(0)
    counts = {tuple(game.counts([0, 1], rng=rng).tolist()) for _ in range(50)}
    assert counts == ({(2, 4), (3, 3), (4, 2)} if exploration == 1.0 else {(2, 4)})


@pytest.mark.parametrize("scale", [1e3, 1e100])
def test_huge_losses_neither_overflow_nor_vanish(scale):
    """Weights stay in (0, max_weight] and q on the simplex."""
    game = PublishedPromptGDRO(4, step_size=scale)
    for loss in (scale, -scale):
        game.observe([0] + [1] * 500, [loss] + [0.0] * 500)
        assert (game.bin_weights > 0).all()
        assert (game.bin_weights <= 15).all()
        assert game.probabilities.sum() == pytest.approx(1.0)


def test_a_share_below_a_hundredth_counts_as_a_hundredth():
    """One prompt of 1,000 has its loss multiplied by 100, not by 1,000; one of 50 by 50."""
    for others, factor in ((999, 100.0), (49, 50.0)):
        game = PublishedPromptGDRO(3)
        game.observe([0] * others + [1], [0.0] * others + [0.005])
        assert game.scores[1] == pytest.approx(0.12 * 0.005 * factor)


def test_a_missing_bin_keeps_its_score_and_unseen_prompts_teach_nothing():
    """Only bins of the batch move."""
    game = PublishedPromptGDRO(3)
    assert game.weights([0, 1, 2, -1]).tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(game.probabilities, 1 / 3)
    game.observe([0, 1, 2], [0.2, 0.4, 0.6])
    before = game.scores
    game.observe([-1, -1], [1.0, 1.0])
    np.testing.assert_array_equal(game.scores, before)
    game.observe([0, 0], [1.0, 1.0])
    assert game.scores[0] > before[0]
    np.testing.assert_array_equal(game.scores[1:], before[1:])


def a_prompt_game():
    game = PublishedPromptGDRO(4)
    game.observe([0, 1, 1, -1], [0.3, 0.1, 0.9, 0.5])
    return game


def a_rollout_game():
    game = PublishedRolloutGDRO(4, 4, 2, 6)
    game.observe([0, 1], [2, 6], [0.5, -0.5])
    return game


@pytest.mark.parametrize(
    ("make", "fresh"),
    [
        (a_prompt_game, lambda: PublishedPromptGDRO(4)),
        (a_rollout_game, lambda: PublishedRolloutGDRO(4, 4, 2, 6)),
    ],
)
def test_state_round_trips_through_json(make, fresh):
    """A restored game continues bit for bit."""
    original, restored = make(), fresh()
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    assert restored.state_dict() == original.state_dict() != fresh().state_dict()


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (a_prompt_game, {"version": 1}, "version = 1"),
        (a_prompt_game, {"step_size": 1.0}, "step_size = 1.0"),
        (a_prompt_game, {"scores": [0.0]}, "scores must have shape"),
        (a_prompt_game, {"version": 2, "weighting": "importance"}, "weighting = 'importance'"),
        (a_rollout_game, {"version": 3}, "version = 3"),
        (a_rollout_game, {"max_rollouts": 7}, "max_rollouts = 7"),
        (a_rollout_game, {"scores": [[0.0]]}, "scores must have shape"),
        (a_rollout_game, {"scores": [[np.inf] * 5] * 4}, "scores must hold finite numbers, got inf"),
        (a_rollout_game, {"price": ShadowPrice(4.0, 0.05).state_dict() | {"price": -1.0}}, "price must lie in .*-1"),
        (a_rollout_game, {"price": ShadowPrice(4.0, 0.5).state_dict()}, "step_size = 0.5"),
        (a_rollout_game, {"version": 1, "feedback": "bandit"}, "feedback = 'bandit'"),
    ],
)
def test_state_of_another_shape_is_refused(make, change, message):
    """Nothing has changed after the error."""
    game = make()
    before = game.state_dict()
    with pytest.raises(ValueError, match=message):
        game.load_state_dict({**before, **change})
    assert game.state_dict() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PublishedPromptGDRO(0), "num_bins must be an integer >= 1, got 0"),
        (lambda: PublishedPromptGDRO(4, step_size=-1.0), "step_size must lie in .*-1"),
        (lambda: PublishedPromptGDRO(4, ema=0.0), "ema must lie in .*0.0"),
        (lambda: PublishedPromptGDRO(4, exploration=2.0), "exploration must lie in .*2.0"),
        (lambda: PublishedPromptGDRO(4, max_weight=0.5), "max_weight must lie in .*0.5"),
        (lambda: PublishedPromptGDRO(4).observe([0], [np.nan]), "losses must hold finite numbers, got nan"),
        (lambda: PublishedPromptGDRO(4).observe([4], [1.0]), "bins must hold .*4"),
        (lambda: PublishedRolloutGDRO(4, 4, 0, 6), "min_rollouts must be an integer >= 1, got 0"),
        (lambda: PublishedRolloutGDRO(4, 4, 7, 6), "max_rollouts must be at least min_rollouts = 7, got 6"),
        (lambda: PublishedRolloutGDRO(4, 1, 2, 6), r"mean_rollouts must lie in \[2, 6\], got 1"),
        (lambda: PublishedRolloutGDRO(4, 4, 2, 6, step_size=-0.1), "step_size must lie in .*-0.1"),
        (lambda: PublishedRolloutGDRO(4, 4, 2, 6, exploration=2.0), "exploration must lie in .*2.0"),
        (lambda: PublishedRolloutGDRO(4, 4, 2, 6, ema=0.0), "ema must lie in .*0.0"),
        (lambda: PublishedRolloutGDRO(4, 4, 2, 6, price_step_size=0.0), "step_size must lie in .*0.0"),
        (lambda: PublishedRolloutGDRO(4, 4, 2, 6).counts([4]), "bins must hold .*4"),
        (lambda: PublishedRolloutGDRO(4, 2.5, 2, 6).counts([0]), "must be an integer, got 2.5 x 1"),
        (lambda: a_rollout_game().observe([0], [7], [0.0]), "counts must hold .*7"),
        (lambda: a_rollout_game().observe([0], [4], [np.nan]), "losses must hold .*nan"),
        (lambda: a_rollout_game().observe([0, 1, 1], [4, 3, 5], [1, 1, 1]), r"same .* bin 1, got \[3, 5\]"),
        (lambda: PublishedController(13, rollout=True), r"mean_rollouts must lie in \[2, 12\], got 13"),
        (lambda: PublishedController(0), "mean_rollouts must be an integer >= 1, got 0"),
        (lambda: PublishedController(4, num_bins=0), "num_bins must be an integer >= 1, got 0"),
        (lambda: PublishedController(4, seed=-1), "seed must be an integer >= 0, got -1"),
    ],
)
def test_bad_input_is_refused(call, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        call()


def test_the_seed_and_the_step_decide_ties():
    """Before any difference between arms the published allocation is random, by (seed, step) alone."""

    def count(seed):
        controller = PublishedController(4, prompt=False, rollout=True, seed=seed)
        first = controller.plan(IDS[:4])
        controller.observe(first, np.repeat([0.0, 0.0, 1.0, 1.0], 4))  # losses withheld: scores stay tied
        plans = []
        for _ in range(5):
            plans.append(controller.plan(IDS[:4]))
            controller.observe(plans[-1], np.repeat([0.0, 0.0, 1.0, 1.0], plans[-1].counts))
        return [plan.counts.tolist() for plan in plans]

    assert count(0) == count(0)
    assert len(set(map(tuple, count(0)))) > 1
    assert len({tuple(c) for seed in range(4) for c in count(seed)}) > 3  # of the 5 that are feasible


def test_published_has_the_papers_hyper_parameters():
    """Appendix A, read back from the parts."""
    controller = PublishedController(4, rollout=True)
    state = controller.state_dict()
    for part, expected in {
        "classifier": {"statistic": {"name": "AnyOfN", "window": 100}, "hysteresis": 0.03},
        "prompt": {"step_size": 0.65, "ema": 0.12, "exploration": 0.01, "max_weight": 15.0},
        "rollout": {"min_rollouts": 2, "max_rollouts": 12, "step_size": 0.65, "exploration": 0.01, "ema": 0.4},
    }.items():
        assert expected.items() <= state[part].items()
    assert state["prompt"]["share_normalised"]
    assert controller.rollout.shadow_price.step_size == 0.05
    assert PublishedController(4, prompt=False, rollout=True).classifier.statistic == AnyOfN(50)


@pytest.mark.parametrize("games", [{"prompt": True, "rollout": False}, {"prompt": False, "rollout": True}])
def test_published_games_complain_when_no_losses_ever_come(games):
    """Without `observe_losses` they would plan as if nothing had been learnt; late losses are no complaint."""
    late, never = PublishedController(4, **games), PublishedController(4, **games)
    for _ in range(10):
        for controller in (late, never):
            plan = controller.plan(IDS)
            controller.observe(plan, np.ones(plan.owner.size))
    late.observe_losses(plan, np.zeros(len(IDS)))
    for _ in range(20):
        plan = late.plan(IDS)
        late.observe(plan, np.ones(plan.owner.size))
    with pytest.raises(RuntimeError, match=r"none came in 10 batches: call observe_losses\(plan, losses\)"):
        never.plan(IDS)


def test_a_restart_is_given_ten_batches_again():
    """Loading a state forgets how often losses were missing: the count is of this process."""
    controller = PublishedController(4)
    for _ in range(9):
        plan = controller.plan(IDS)
        controller.observe(plan, np.ones(plan.owner.size))
    controller.load_state_dict(controller.state_dict())
    for _ in range(10):
        plan = controller.plan(IDS)
        controller.observe(plan, np.ones(plan.owner.size))
    with pytest.raises(RuntimeError, match="none came in 10 batches"):
        controller.plan(IDS)
    fed = PublishedController(4)
    plan = fed.plan(IDS)
    fed.observe_losses(plan, np.zeros(40))
    fed.load_state_dict(fed.state_dict())
    for _ in range(10):
        fed.observe(plan := fed.plan(IDS), np.ones(plan.owner.size))
    with pytest.raises(RuntimeError, match="none came in 10 batches"):
        fed.plan(IDS)


@pytest.mark.parametrize(
    ("losses", "message"),
    [(np.zeros(9), "losses must have shape"), ([np.inf] + [0.0] * 9, "losses must hold finite numbers, got inf")],
)
def test_bad_losses_change_nothing(losses, message):
    """The controller is as it was."""
    controller = PublishedController(4, rollout=True)
    plan, before = controller.plan(IDS[:10]), controller.state_dict()
    with pytest.raises(ValueError, match=message):
        controller.observe_losses(plan, losses)
    assert controller.state_dict() == before
