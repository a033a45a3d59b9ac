"""Advantages of ragged groups, rollout factors and the clipped surrogate, each against a literal loop."""

import literal
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdro_llm.objective import clipped_surrogate, group_advantages, rollout_scale

groups = st.lists(
    st.lists(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)), min_size=1, max_size=9), min_size=1, max_size=7
)


def flat(found: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(found), np.repeat(np.arange(len(found)), [len(group) for group in found])


@given(groups, st.booleans(), st.randoms())
def test_advantages_equal_a_loop_over_groups_in_any_row_order(found, scale, random):
    """Eq. 3 per group, whatever the sizes and wherever the rows stand."""
    rewards, owner = flat(found)
    order = list(range(len(rewards)))
    random.shuffle(order)
    got = group_advantages(rewards[order], owner[order], scale=scale)
    spread = np.array([np.ptp(group) for group in found])[owner[order]]
    clear = (spread == 0) | (spread > 1e-6)  # between them it is a matter of rounding
    np.testing.assert_allclose(got[clear], literal.advantages(rewards, owner, scale)[order][clear], atol=1e-6)


@given(groups, st.booleans())
def test_advantages_of_a_group_sum_to_zero_and_are_bounded(found, scale):
    """Sum 0 per group; scaled ones have at most unit mean square."""
    rewards, owner = flat(found)
    got = group_advantages(rewards, owner, scale=scale)
    np.testing.assert_allclose(np.bincount(owner, got), 0.0, atol=1e-6)
    assert (np.bincount(owner, got**2) / np.bincount(owner) <= 1 + 1e-9).all()


@given(st.floats(0, 1), st.integers(1, 64), st.booleans())
def test_equal_rewards_give_exactly_zero(reward, size, scale):
    """A mean that rounds (0.1 three times) must not become a signal."""
    rewards, owner = np.full(size + 2, reward), np.repeat([0, 1], [size, 2])
    assert (group_advantages(rewards, owner, scale=scale) == 0).all()


def test_scaling_divides_by_the_population_deviation():
    """One right of four: 3/4 and -1/4 unscaled; sqrt(3) and -1/sqrt(3) scaled."""
    rewards, owner = np.array([0.0, 1.0, 0.0, 0.0]), np.zeros(4, int)
    np.testing.assert_array_equal(group_advantages(rewards, owner, scale=False), [-0.25, 0.75, -0.25, -0.25])
    expected = np.array([-1, 3, -1, -1]) / np.sqrt(3)
    np.testing.assert_allclose(group_advantages(rewards, owner, scale=True), expected, rtol=1e-5)


@pytest.mark.parametrize("aggregation", ["prompt", "rollout"])
def test_total_pull_of_a_prompt(aggregation):
    """Sum of a prompt's factors: n_bar w_i or n_i w_i; at w = 1 the batch's total is n_bar N either way."""
    counts, weights = np.array([2, 7, 3, 4]), np.array([0.5, 2.0, 1.0, 0.1])
    owner = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))
    factors = rollout_scale(weights, counts, owner, aggregation)
    pull = np.bincount(owner, factors)
    np.testing.assert_allclose(pull, (counts.mean() if aggregation == "prompt" else counts) * weights)
    for i in range(4):
        assert np.ptp(factors[owner == i]) == 0
    np.testing.assert_allclose(rollout_scale(np.ones(4), counts, owner, aggregation).sum(), counts.sum())


def test_surrogate_and_its_gradient_equal_a_loop_over_tokens():
    """Eq. 4-5 token by token, values and gradients, with ratios far inside and outside of the clip range."""
    rng = np.random.default_rng(1)
    new = torch.tensor(rng.normal(-1, 0.4, (30, 5)), requires_grad=True)
    old, advantage = rng.normal(-1, 0.4, (30, 5)), rng.normal(size=30)
    losses = clipped_surrogate(new, torch.tensor(old), torch.tensor(advantage), 0.2, 0.28)
    (gradient,) = torch.autograd.grad(losses.sum(), new)
    for r in range(30):
        for t in range(5):
            x = new[r, t].detach().clone().requires_grad_()
            loss = literal.surrogate(x, old[r, t], advantage[r], 0.2, 0.28)
            expected = torch.autograd.grad(loss, x)[0] if isinstance(loss, torch.Tensor) else 0.0
            assert losses[r, t].item() == pytest.approx(torch.as_tensor(loss).item(), rel=1e-12)
            assert float(gradient[r, t]) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_gradient_is_policy_gradient_at_ratio_one_and_stops_on_one_side_only(advantage):
    """-A grad log p at ratio 1; a good token stops above 1 + high only, a bad one below 1 - low only."""
    ratios = torch.tensor([1.0, 1.27, 1.29, 0.81, 0.79, 5.0, 0.1])
    new = ratios.log()[None].requires_grad_()
    losses = clipped_surrogate(new, torch.zeros(1, 7), torch.tensor([advantage]), 0.2, 0.28)
    (gradient,) = torch.autograd.grad(losses.sum(), new)
    stops = ratios > 1.28 if advantage > 0 else ratios < 0.8
    np.testing.assert_allclose(gradient[0], torch.where(stops, 0.0, -advantage * ratios), rtol=1e-6)
    assert float(gradient[0, 0]) == -advantage
