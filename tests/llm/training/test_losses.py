"""Advantages, losses and their means against literal loops; what `preserve_objective` preserves, by enumeration."""

import inspect
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import literal
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdro_core import GDROController, OnlineDifficultyClassifier, RolloutGDRO
from gdro_core.grpo import gradient_weight
from gdro_llm.config import Config, UsageError
from gdro_llm.training.losses import (
    LOSSES,
    Loss,
    all_tokens,
    clipped_surrogate,
    group_advantages,
    importance_weights,
    kl_to_reference,
    overlong_penalty,
    rollout_scale,
)

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}  # of commands in processes of their own

groups = st.lists(
    st.lists(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)), min_size=1, max_size=9), min_size=1, max_size=7
)


def flat(groups: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(groups), np.repeat(np.arange(len(groups)), [len(group) for group in groups])


@given(groups, st.booleans(), st.randoms())
def test_advantages_equal_a_loop_over_groups_in_any_row_order(rewards_of_groups, scale, random):
    """Eq. 3 per group, whatever the sizes and wherever the rows stand."""
    rewards, owner = flat(rewards_of_groups)
    order = list(range(len(rewards)))
    random.shuffle(order)
    got = group_advantages(rewards[order], owner[order], scale=scale)
    spread = np.array([np.ptp(group) for group in rewards_of_groups])[owner[order]]
    clear = (spread == 0) | (spread > 1e-6)  # between them it is a matter of rounding
    np.testing.assert_allclose(got[clear], literal.advantages(rewards, owner, scale)[order][clear], atol=1e-6)


@given(groups, st.booleans())
def test_advantages_of_a_group_sum_to_zero_and_are_bounded(rewards_of_groups, scale):
    """Sum 0 per group; scaled ones have at most unit mean square."""
    rewards, owner = flat(rewards_of_groups)
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


@given(groups, st.booleans(), st.integers(0, 2**32 - 1))
def test_rollouts_left_out_count_neither_in_mean_nor_in_deviation(rewards_of_groups, scale, seed):
    """The others' advantages are those without them, whatever reward they hold; they themselves get 0."""
    rewards, owner = flat(rewards_of_groups)
    included = np.random.default_rng(seed).random(len(rewards)) < 0.6  # often whole groups are left out
    got = group_advantages(np.where(included, rewards, np.nan), owner, scale=scale, included_R=included)
    assert (got[~included] == 0).all()
    np.testing.assert_array_equal(got[included], group_advantages(rewards[included], owner[included], scale=scale))


def test_overlong_penalty_at_its_corners():
    """0 up to max - buffer, linear, -1 at max, where truncated completions are; never outside of [-1, 0]."""
    lengths = np.array([1, 5, 6, 7, 8, 9, 10, 11])
    np.testing.assert_array_equal(overlong_penalty(lengths, 10, 4), [0.0, 0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0])
    np.testing.assert_array_equal(overlong_penalty(np.array([9, 10]), 10, 1), [0.0, -1.0])
    np.testing.assert_array_equal(overlong_penalty(np.array([1, 10]), 10, 9), [0.0, -1.0])


def test_overlong_penalty_tells_equal_rewards_apart():
    """Among completions that are all wrong the long one is pushed down; a correct long one ends below a short one."""
    owner, lengths = np.array([0, 0, 0, 1, 1]), np.array([3, 10, 3, 9, 2])
    rewards = np.array([0.0, 0.0, 0.0, 1.0, 1.0]) + overlong_penalty(lengths, 10, 4)
    got = group_advantages(rewards, owner, scale=False)
    np.testing.assert_allclose(got, [1 / 3, -2 / 3, 1 / 3, -0.375, 0.375])


LOW, HIGH, LONGEST = 0.2, 0.28, 9  # clip range; max_new_tokens
BOUNDS = np.log([1 - LOW, 1 + HIGH])


def ragged(seed: int, rows: int = 40, width: int = 7) -> dict[str, torch.Tensor]:
    """Rows of 1 to `width` tokens, ratios on both sides of the range, advantages of both signs and 0; float64."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, rows)
    lengths[0], lengths[1] = 1, width
    mask = np.arange(width) < lengths[:, None]
    old = rng.normal(-1, 0.5, (rows, width))
    new = old + rng.normal(0, 0.5, (rows, 1)) + rng.normal(0, 0.3, (rows, width))
    advantages = rng.normal(0, 1.5, rows) * (rng.random(rows) < 0.9)
    named = {"new": new, "old": old, "advantages": advantages, "mask": mask}
    return {name: torch.tensor(value) for name, value in named.items()}


def losses_of(kind, data, new=None):
    return LOSSES[kind].token_losses(
        data["new"] if new is None else new,
        data["old"],
        data["mask"],
        data["advantages"],
        clip_low=LOW,
        clip_high=HIGH,
    )


def weights_of(kind, data):
    mask = data["mask"]
    return LOSSES[kind].token_weights(
        mask.double(), tokens=float(mask.sum()), rollouts=float(len(mask)), max_new_tokens=LONGEST
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradient_equal_a_loop_over_sequences_and_tokens(kind):
    """Each token's loss, the batch's and its gradient, on ragged rows, clipped in both directions."""
    data = ragged(0)
    new = data["new"].requires_grad_()
    losses, clipped = losses_of(kind, data, new)
    loss = (weights_of(kind, data) * losses).sum()
    (gradient,) = torch.autograd.grad(loss, new)

    slow = data["new"].detach().clone().requires_grad_()
    slow_losses = []
    for r, length in enumerate(data["mask"].sum(-1).tolist()):
        row = [slow[r, t] for t in range(length)]
        slow_losses.append(
            literal.token_losses(kind, row, data["old"][r, :length].tolist(), float(data["advantages"][r]), LOW, HIGH)
        )
        np.testing.assert_allclose(
            losses[r].detach(),
            [torch.as_tensor(x, dtype=torch.float64).item() for x in slow_losses[-1]] + [0.0] * (7 - length),
            rtol=1e-9,
        )
    expected = literal.batch_loss(kind, slow_losses, LONGEST)
    (expected_gradient,) = torch.autograd.grad(expected, slow)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-12)

    mask, up = data["mask"], (data["advantages"] > 0)[:, None]
    down = (data["advantages"] < 0)[:, None]
    assert (clipped & up).any()
    assert (clipped & down).any()
    assert (~clipped & mask & up).any()
    assert (~clipped & mask & down).any()
    if kind != "cispo":  # where the clip holds back no gradient is left, and nowhere else
        assert ((gradient != 0) == (mask & ~clipped & (up | down))).all()
    else:
        assert ((gradient != 0) == (mask & (up | down))).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_equals_finite_differences_away_from_kinks(kind):
    """torch.autograd.gradcheck in float64. CISPO's weights hold no gradient, so there all of them are capped."""
    data = ragged(1, rows=12, width=4)
    if kind == "cispo":
        data["new"] = data["old"] + 0.3 + torch.rand_like(data["old"], generator=torch.Generator().manual_seed(0))
    gaps, bounds = (data["new"] - data["old"])[..., None], torch.tensor(BOUNDS)
    if kind == "gspo":
        means = (gaps[..., 0] * data["mask"]).sum(-1) / data["mask"].sum(-1)
        assert ((means[:, None] - bounds).abs() > 1e-3).all()
    else:
        assert ((gaps - bounds).abs() > 1e-3).all()

    def loss(new):
        return (weights_of(kind, data) * losses_of(kind, data, new)[0]).sum()

    assert torch.autograd.gradcheck(loss, data["new"].detach().requires_grad_())


@pytest.mark.parametrize("kind", LOSSES)
def test_all_kinds_have_the_policy_gradient_at_ratio_one(kind):
    """-A grad log pi times the token's weight; nothing is clipped."""
    data = ragged(2)
    data["new"] = data["old"].clone().requires_grad_()
    losses, clipped = losses_of(kind, data)
    weights = weights_of(kind, data)
    (gradient,) = torch.autograd.grad((weights * losses).sum(), data["new"])
    np.testing.assert_allclose(gradient, -weights * data["advantages"][:, None], rtol=1e-9, atol=1e-15)
    assert not clipped.any()


def test_clipped_tokens_of_each_kind():
    """Ratios 1.27, 1.29, 0.81, 0.79: the surrogate's pessimistic side; CISPO's cap, for both signs; rows of GSPO."""
    gaps = torch.tensor([1.27, 1.29, 0.81, 0.79, 9.0]).log().expand(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 0]] * 3)
    advantages = torch.tensor([1.0, -1.0, 0.0])
    expected = {
        "dapo": [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5],
        "cispo": [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0] * 5],
        "gspo": [[0] * 5, [0] * 5, [0] * 5],  # their geometric mean is 1.01
    }
    expected["dr_grpo"] = expected["grpo"] = expected["dapo"]
    for kind, loss in LOSSES.items():
        _, clipped = loss.token_losses(gaps, 0 * gaps, mask, advantages, clip_low=LOW, clip_high=HIGH)
        assert clipped.dtype == torch.bool
        assert clipped.int().tolist() == expected[kind]
    for shift, clips in ((0.5, 0), (-0.5, 1)):
        _, clipped = LOSSES["gspo"].token_losses(gaps + shift, 0 * gaps, mask, advantages, clip_low=LOW, clip_high=HIGH)
        assert clipped.int().tolist() == [[1, 1, 1, 1, 0] if r == clips else [0] * 5 for r in range(3)]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_clip_below_zero_is_no_clip(kind):
    """clip_low of 1 and more leaves ratios free below, as with a tiny one that is never reached."""
    data = ragged(3)
    for clip_low in (1.0, 5.0):
        arguments = (data["new"], data["old"], data["mask"], data["advantages"])
        losses, clipped = LOSSES[kind].token_losses(*arguments, clip_low=clip_low, clip_high=HIGH)
        expected, fewer = LOSSES[kind].token_losses(*arguments, clip_low=1 - 1e-9, clip_high=HIGH)
        assert torch.equal(losses, expected)
        assert torch.equal(clipped, fewer)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e4])
@pytest.mark.parametrize("kind", LOSSES)
def test_padding_may_hold_anything(kind, junk):
    """Losses, gradients, weights and importance weights are what they are without it, and 0 there."""
    data = ragged(4)
    clean = data["new"].clone().requires_grad_()
    (expected,) = torch.autograd.grad((weights_of(kind, data) * losses_of(kind, data, clean)[0]).sum(), clean)
    dirty = torch.where(data["mask"], data["new"], junk).requires_grad_()
    losses, clipped = losses_of(kind, data | {"old": torch.where(data["mask"], data["old"], -junk)}, dirty)
    (gradient,) = torch.autograd.grad((weights_of(kind, data) * losses).sum(), dirty)
    assert torch.equal(gradient, expected)
    assert (losses[~data["mask"]] == 0).all()
    assert not clipped[~data["mask"]].any()
    assert (weights_of(kind, data)[~data["mask"]] == 0).all()
    assert (importance_weights(dirty, data["old"], data["mask"], 2.0)[~data["mask"]] == 0).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_huge_ratios_make_no_nan(kind):
    """Beyond float32's exp: what the clip cuts off is exact; what it leaves is infinite, never NaN."""
    gaps = torch.tensor([[300.0], [-300.0]]).repeat(3, 1)
    advantages = torch.tensor([2.0, 2.0, 0.0, 0.0, -2.0, -2.0])
    new = (gaps - 400.0).requires_grad_()
    losses, _ = LOSSES[kind].token_losses(
        new, torch.full_like(gaps, -400.0), torch.ones_like(gaps), advantages, clip_low=LOW, clip_high=HIGH
    )
    (gradient,) = torch.autograd.grad(losses.sum(), new)
    if kind == "cispo":
        weights = torch.tensor([1.28, 0.0] * 3)
        np.testing.assert_allclose(losses.detach()[:, 0], -weights * advantages * new.detach()[:, 0], rtol=1e-6)
        np.testing.assert_allclose(gradient[:, 0], -weights * advantages, rtol=1e-6)
    else:
        np.testing.assert_allclose(losses.detach()[:, 0], [-2.56, 0, 0, 0, np.inf, 1.6], rtol=1e-6)
        np.testing.assert_array_equal(gradient[:, 0], [0, 0, 0, 0, np.inf, 0])


@pytest.mark.parametrize("kind", LOSSES)
def test_weights_times_ones_is_the_documented_mean(kind):
    """1 for the means over tokens and over rollouts; mean length / max_new_tokens for Dr.GRPO; 0 without tokens."""
    data = ragged(5)
    lengths = data["mask"].sum(-1).double()
    total = weights_of(kind, data).sum().item()
    assert total == pytest.approx(float(lengths.mean()) / LONGEST if kind == "dr_grpo" else 1.0)
    per_row = weights_of(kind, data).sum(-1)
    shares = {"dapo": lengths / lengths.sum(), "grpo": torch.full_like(lengths, 1 / 40), "dr_grpo": lengths / 360}
    shares |= {"cispo": shares["dapo"], "gspo": shares["grpo"]}
    np.testing.assert_allclose(per_row, shares[kind])
    empty = torch.zeros(2, 3, dtype=torch.bool)
    assert (LOSSES[kind].token_weights(empty, tokens=5.0, rollouts=2.0, max_new_tokens=4) == 0).all()


@pytest.mark.parametrize("kind", LOSSES)
@given(seed=st.integers(0, 2**32 - 1))
def test_micro_batches_add_up_to_the_mini_batch(kind, seed):
    """Rows in any order and pieces, each cut to its longest row: the same loss and gradient."""
    data = ragged(seed, rows=15)
    new = data["new"].requires_grad_()
    whole = (weights_of(kind, data) * losses_of(kind, data)[0]).sum()
    (expected,) = torch.autograd.grad(whole, new)
    rng = np.random.default_rng(seed)
    pieces = np.split(rng.permutation(15), np.sort(rng.integers(0, 16, 4)))
    loss = torch.zeros((), dtype=torch.float64)
    for rows in pieces:
        if len(rows):
            width = int(data["mask"][rows].sum(-1).max())
            part = {n: x[rows] if n == "advantages" else x[rows, :width] for n, x in data.items()}
            weights = LOSSES[kind].token_weights(
                part["mask"], tokens=float(data["mask"].sum()), rollouts=15.0, max_new_tokens=LONGEST
            )
            loss = loss + (weights * losses_of(kind, part)[0]).sum()
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
@given(seed=st.integers(0, 2**32 - 1), weight=st.floats(0.01, 100.0))
def test_a_prompts_weight_scales_exactly_its_contribution(kind, seed, weight):
    """Advantages times w: losses and gradient of its rows times w, clipped or not; the others' bit for bit the same."""
    data = ragged(seed, rows=12)
    owner = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, 12))
    mine = owner == int(owner[0])

    def contribution(advantages):
        new = data["new"].clone().requires_grad_()
        losses, clipped = losses_of(kind, data | {"advantages": advantages}, new)
        weighted = weights_of(kind, data) * losses
        return weighted.detach(), torch.autograd.grad(weighted.sum(), new)[0], clipped

    before = contribution(data["advantages"])
    after = contribution(torch.where(mine, weight * data["advantages"], data["advantages"]))
    for x, y in zip(before[:2], after[:2], strict=True):
        np.testing.assert_allclose(y[mine], weight * x[mine], rtol=1e-12)
        assert torch.equal(x[~mine], y[~mine])
    assert torch.equal(before[2], after[2])


def test_a_loss_that_is_not_listed_is_refused():
    """The table has every loss under its name; the configuration names argument, rule and value of another."""
    assert all(loss.name == name for name, loss in LOSSES.items())
    with pytest.raises(UsageError, match="loss must be one of dapo, dr_grpo, grpo, gspo, cispo, got 'ppo'"):
        Config(loss="ppo")


@pytest.mark.parametrize("kind", LOSSES)
def test_a_surrogate_is_minus_the_advantage_at_ratio_one(kind):
    """So that its mean over a group is 0, as the published games need; with another loss they are refused."""
    data = ragged(6)
    losses, _ = losses_of(kind, data | {"old": data["new"]})
    expected = torch.where(data["mask"], -data["advantages"][:, None], 0.0)
    assert torch.allclose(losses, expected) == LOSSES[kind].is_surrogate
    if not LOSSES[kind].is_surrogate:
        with pytest.raises(UsageError, match=f"loss must not be '{kind}' with a published controller"):
            Config(loss=kind, controller="published-prompt")


def reinforce(tokens):
    return -tokens.advantages_R[:, None] * tokens.new_R_T, tokens.mask_R_T.bool() & False


WITH_REINFORCE = f"""
import sys
from gdro_llm.training.losses import LOSSES, Loss, all_tokens
{inspect.getsource(reinforce)}
LOSSES["reinforce"] = Loss("reinforce", reinforce, all_tokens, is_surrogate=False)
from gdro_llm.cli import main
sys.exit(main())
"""


def test_a_new_loss_is_one_record(tmp_path):
    """REINFORCE, -A log pi in the mean over tokens: the losses of its definition at any ratio; the command takes it,
    trains with it and keeps it from the published games, without another line of code."""
    loss, data = Loss("reinforce", reinforce, all_tokens, is_surrogate=False), ragged(7)
    arguments = (data[name] for name in ("new", "old", "mask", "advantages"))
    losses, clipped = loss.token_losses(*arguments, clip_low=LOW, clip_high=HIGH)
    rows = zip(data["advantages"].tolist(), data["new"].tolist(), data["mask"].tolist(), strict=True)
    expected = [[-a * x if m else 0.0 for x, m in zip(new, mask, strict=True)] for a, new, mask in rows]
    np.testing.assert_allclose(losses, expected)
    assert not clipped.any()

    (tmp_path / "with_reinforce.py").write_text(WITH_REINFORCE)

    def train(*flags: str) -> subprocess.CompletedProcess:
        quick = ["--steps", "1", "--batch-size", "8", "--test-problems", "5", "--out", str(tmp_path / "run")]
        command = [sys.executable, str(tmp_path / "with_reinforce.py"), "train", "quickstart", *quick]
        return subprocess.run(
            [*command, "--loss", "reinforce", *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
        )

    refused = train("--controller", "published-prompt")
    assert refused.returncode == 2
    assert "loss must not be 'reinforce' with a published controller" in refused.stderr
    done = train()
    assert done.returncode == 0, done.stderr
    (row,) = literal.read_log(tmp_path / "run" / "metrics.jsonl")
    assert row["grad_norm"] > 0
    assert row["clip_share"] == 0


def test_the_table_of_losses_needs_no_torch():
    """The configuration reads it, and the command line starts without torch."""
    code = "import sys, gdro_llm.config, gdro_llm.training.losses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, timeout=60).returncode == 0


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k3_is_not_negative_and_zero_at_equality_only(policy, reference):
    """exp(d) - d - 1, also where that formula loses all its digits."""
    got = kl_to_reference(torch.tensor(policy).double(), torch.tensor(reference).double()).item()
    gap = reference - policy
    assert got >= 0
    if abs(gap) > 1e-3:
        assert got == pytest.approx(np.exp(gap) - gap - 1, rel=1e-4)
    assert kl_to_reference(torch.tensor(policy), torch.tensor(policy)).item() == 0


def test_k3_keeps_its_digits_near_zero():
    """d^2 / 2 in float32 for d = 1e-4, where exp(d) - d - 1 would round to noise."""
    got = kl_to_reference(torch.tensor([-1e-4]), torch.zeros(1)).item()
    assert got == pytest.approx(5e-9, rel=0.02)


def test_k3_has_the_mean_of_one_divergence_and_the_mean_gradient_of_the_other():
    """Four categories by enumeration: E k3 = KL(policy || reference), E grad k3 = grad KL(reference || policy)."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(0)
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    mean = (policy.exp().detach() * kl_to_reference(policy, reference)).sum()
    assert mean.item() == pytest.approx((policy.exp() * (policy - reference)).sum().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(mean, logits, retain_graph=True)
    (expected,) = torch.autograd.grad((reference.exp() * (reference - policy)).sum(), logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9)


def test_importance_weights_are_capped_ratios_without_gradient():
    """min(trainer / sampler, cap) where a token stands, 0 elsewhere; huge mismatches stay finite."""
    trainer = torch.tensor([[0.5, 0.9, 0.1, 0.5]]).log().requires_grad_()
    sampler = torch.tensor([[0.25, 0.1, 0.2, 0.5]]).log()
    mask = torch.tensor([[1, 1, 1, 0]])
    got = importance_weights(trainer, sampler, mask, 3.0)
    np.testing.assert_allclose(got, [[2.0, 3.0, 0.5, 0.0]], rtol=1e-6)
    assert not got.requires_grad
    far = importance_weights(torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]]), torch.ones(1, 2), 2.0)
    np.testing.assert_allclose(far, [[2.0, 0.0]], rtol=1e-6)


# What preserve_objective preserves. Two prompts, n_bar = 3, every pattern of completions enumerated.

SINGLE = {"length": [1, 1], "reward": [1.0, 0.0]}  # one Bernoulli token
RAGGED = {
    "length": [1, 2, 2],
    "reward": [0.0, 1.0, 0.0],
}  # stop, or go on and end right or wrong: correct ones are long
START = [[0.4, -0.5], [-0.6, 0.9]]  # logits of the first and the second token, for each prompt
GAMES = np.array([0.7, 1.3])  # weights of the prompt game


def completions(logits: torch.Tensor, table: dict) -> torch.Tensor:
    """(P, C, 2) log-probabilities of each prompt's completions, token by token."""
    first, second = torch.nn.functional.logsigmoid(torch.stack([logits, -logits])).permute(2, 0, 1)  # (2, P) each
    if table is SINGLE:
        pairs = [(log, 0 * log) for log in first]
    else:
        pairs = [(first[1], 0 * first[1]), (first[0], second[0]), (first[0], second[1])]
    return torch.stack([torch.stack(pair, -1) for pair in pairs], 1)


def pass_rates(table: dict, logits=START) -> np.ndarray:
    probabilities = completions(torch.tensor(logits, dtype=torch.float64), table).sum(-1).exp().numpy()
    return probabilities @ (np.array(table["reward"]) == 1)


def expected_gradient(
    kind,
    counts,
    weights,
    *,
    table=RAGGED,
    logits=START,
    prompts=(0, 1),
    rollouts=6,
    drift=0.0,
    aggregation="prompt",
    scale=True,
    kl=0.0,
    overlong="keep",
    partial=0.0,
) -> np.ndarray:
    """(P, 2) exact mean of the loss's gradient over all completions of a mini-batch, drawn from the old policy.

    drift moves the trained policy off the old one; partial is the reward of the last completion; with overlong "mask"
    the last completion counts as truncated.
    """
    old_logits = torch.tensor(logits, dtype=torch.float64)
    theta = (old_logits + drift * torch.tensor([[1.0, -0.8], [-0.7, 1.2]])).requires_grad_()
    old_P_C_T, new_P_C_T = completions(old_logits, table), completions(theta, table)
    owner = np.repeat(prompts, np.array(counts)[list(prompts)])
    drawn = np.array(list(product(range(len(table["length"])), repeat=len(owner))))  # (M, R)
    probability = old_P_C_T.sum(-1).exp().numpy()[owner, drawn].prod(1)
    row, completion = np.tile(owner, len(drawn)), drawn.ravel()
    group = np.repeat(np.arange(len(drawn)), len(owner)) * 2 + row
    lengths = np.array(table["length"])[completion]
    rewards = np.array([*table["reward"][:-1], partial])[completion]
    if overlong == "punish":
        rewards = rewards + overlong_penalty(lengths, 2, 1)
    included = completion != len(table["length"]) - 1 if overlong == "mask" else None
    advantages = group_advantages(rewards, group, scale=scale, included_R=included)
    advantages = advantages * rollout_scale(
        np.tile(weights, len(drawn)), np.tile(counts, len(drawn)), group, aggregation
    )
    mask = torch.from_numpy(np.arange(2) < lengths[:, None])
    losses, _ = LOSSES[kind].token_losses(
        new_P_C_T[row, completion],
        old_P_C_T[row, completion],
        mask,
        torch.from_numpy(advantages),
        clip_low=LOW,
        clip_high=HIGH,
    )
    reference = completions(old_logits + 0.5, table)[row, completion]
    losses = losses + kl * kl_to_reference(new_P_C_T[row, completion], reference)
    tokens = np.repeat(np.array(table["length"])[drawn].sum(1), len(owner))  # of each pattern's mini-batch
    loss = torch.zeros((), dtype=torch.float64)
    chance = torch.from_numpy(np.repeat(probability, len(owner)))
    for total in np.unique(tokens):
        rows = torch.from_numpy(tokens == total)
        weights_R_T = LOSSES[kind].token_weights(
            mask[rows].double(), tokens=float(total), rollouts=rollouts, max_new_tokens=2
        )
        loss = loss + (chance[rows, None] * weights_R_T * losses[rows]).sum()
    return torch.autograd.grad(loss, theta)[0].numpy()


def corrected(counts, table=RAGGED, games=GAMES) -> np.ndarray:
    """The controller's factor w_nbar(p) / w_n(p), at the true pass rate."""
    p = pass_rates(table)
    return games * gradient_weight(3, p) / gradient_weight(np.array(counts), p)


def departure(kind, counts=(2, 4), table=RAGGED, plain=None, **settings) -> float:
    """How far the mean update with these counts is from the one with n_bar rollouts each, relative to it."""
    even = expected_gradient(kind, (3, 3), GAMES, table=table, **settings)
    got = expected_gradient(kind, counts, corrected(counts, table) if plain is None else plain, table=table, **settings)
    return float(np.abs(got - even).max() / np.abs(even).max())


EXACT = 1e-6  # of which group_advantages' 1e-6 beside the deviation takes a part


@pytest.mark.parametrize("drift", [0.0, 1.0])  # on policy; far off it, with clipped tokens of both kinds
@pytest.mark.parametrize("kind", LOSSES)
def test_counts_do_not_move_the_mean_update_where_completions_have_one_length(kind, drift):
    """With the correction it is that of n_bar rollouts each; without, it is not."""
    assert departure(kind, table=SINGLE, drift=drift) < EXACT
    assert departure(kind, (4, 2), table=SINGLE, drift=drift) < EXACT
    assert departure(kind, table=SINGLE, drift=drift, plain=GAMES) > 0.05


@pytest.mark.parametrize("drift", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["dr_grpo", "grpo", "gspo"])
def test_counts_do_not_move_the_mean_update_of_constant_denominators(kind, drift):
    """Means over rollouts or over max_new_tokens: exact for completions of any lengths."""
    assert departure(kind, drift=drift) < EXACT
    assert departure(kind, drift=drift, plain=GAMES) > 0.05


@pytest.mark.parametrize("kind", ["dapo", "cispo"])
def test_a_token_mean_over_ragged_completions_preserves_up_to_its_random_denominator(kind):
    """Counts move the number of tokens: a factor of 1.03 here, the same for all prompts to half a percent."""
    assert departure(kind, plain=GAMES) > 0.05
    factor = expected_gradient(kind, (2, 4), corrected((2, 4))) / expected_gradient(kind, (3, 3), GAMES)
    assert 1.02 < factor.min() < factor.max() < 1.04
    assert np.ptp(factor) < 0.005


@pytest.mark.parametrize(
    "settings",
    [
        {"aggregation": "rollout"},
        {"scale": False},
        {"overlong": "punish"},
        {"overlong": "mask"},
        {"partial": 0.5},
        {"kl": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["dr_grpo", "grpo", "gspo"])
def test_settings_in_which_the_correction_does_not_hold(kind, settings):
    """Each moves the mean update by percents: the trainer refuses them with preserve_objective."""
    assert departure(kind, **settings) > 0.01


@pytest.mark.parametrize("kind", ["dr_grpo", "grpo", "gspo"])
def test_mini_batches_need_the_planned_number_of_rollouts(kind):
    """A mini-batch of one prompt: exact with rollouts = n_bar x 1, not with the 2 rollouts that it has."""
    even = expected_gradient(kind, (3, 3), GAMES, prompts=(0,), rollouts=3)
    got = expected_gradient(kind, (2, 4), corrected((2, 4)), prompts=(0,), rollouts=3)
    np.testing.assert_allclose(got, even, atol=EXACT * np.abs(even).max())
    realised = expected_gradient(kind, (2, 4), corrected((2, 4)), prompts=(0,), rollouts=2)
    np.testing.assert_allclose(realised, 1.5 * even, atol=EXACT * np.abs(even).max())


@pytest.mark.parametrize("kind", LOSSES)
def test_the_controllers_own_plan_preserves_the_mean_update(kind):
    """Its counts and weights, at the pass rates that it believes: the mean update of 3 rollouts each."""
    controller = GDROController(
        OnlineDifficultyClassifier(), rollout=RolloutGDRO(3, 2, 6), preserve_objective=True, seed=0
    )
    controller.observe(controller.plan(["easy", "hard"]), [1, 1, 1, 0, 1, 0])
    plan = controller.plan(["easy", "hard"])
    assert plan.counts.tolist() == [2, 4]
    p = controller.classifier.pass_rate(plan.ids)
    logits = np.stack([np.log(p / (1 - p)), [0.0, 0.0]], 1).tolist()
    even = expected_gradient(kind, (3, 3), np.ones(2), table=SINGLE, logits=logits)
    got = expected_gradient(kind, plan.counts, plan.weights, table=SINGLE, logits=logits)
    np.testing.assert_allclose(got, even, atol=EXACT * np.abs(even).max())
