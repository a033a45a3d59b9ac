"""`update` against the documented loss, written out token by token over all rows."""

import sys
from dataclasses import replace

import literal
import numpy as np
import pytest
import torch

import gdro_llm.training.gradient
from gdro_llm.config import UsageError
from gdro_llm.engine.policy import load_policy
from gdro_llm.engine.rollouts import Rollouts
from gdro_llm.training.batch import Batch
from gdro_llm.training.evaluation import draw_seed
from gdro_llm.training.gradient import BatchLoss
from gdro_llm.training.losses import group_advantages, rollout_scale
from gdro_llm.training.step import step_seed
from gdro_llm.training.update import build_optimizer, set_learning_rate, update

PROMPTS = [*literal.PROMPTS, "r123="]
COUNTS = np.array([2, 5, 3, 4, 7, 3])
WEIGHTS = np.array([0.4, 1.7, 1.0, 0.2, 1.1, 3.0])
OWNER = np.repeat(np.arange(6), COUNTS)
REWARDS = np.random.default_rng(3).integers(0, 2, OWNER.size).astype(float)
REWARDS[OWNER == 2], REWARDS[OWNER == 3] = 1.0, 0.0  # two groups without a signal


def sampled(policy, rewards=REWARDS, *, drift=0.0, seed=0):
    """Rollouts and their advantages; with `drift` the old log-probabilities are off the policy's: clipping matters."""
    rollouts = literal.sample(policy, literal.prompts(policy, PROMPTS), COUNTS, 6, seed=seed, rows=100)
    noise = torch.randn(rollouts.logprobs_R_T.shape, generator=torch.Generator().manual_seed(1))
    rollouts.logprobs_R_T = rollouts.logprobs_R_T + drift * noise * rollouts.mask_R_T
    return rollouts, group_advantages(rewards, OWNER, scale=True)


def record(rollouts, advantages, scale, included=None):
    """What enters the loss; all rows are included where nothing else is said."""
    return Batch(rollouts, advantages, scale, np.ones(len(scale), bool) if included is None else included)


def literal_update(policy, optimizer, rollouts, config, rewards=REWARDS, weights=WEIGHTS):
    """The loss of the module's header, over ALL rows, token by token; Eq. 7's prompt losses and the clipped share."""
    completions = literal.rows(rollouts.tokens_R_T, rollouts.mask_R_T)
    advantages = literal.advantages(rewards, OWNER, config.scale_rewards)
    size = len(PROMPTS) // config.minibatches
    prompt_losses, clipped, seen = np.zeros(len(PROMPTS)), 0, 0
    for first in range(0, len(PROMPTS), size):
        mine = [r for r in range(OWNER.size) if first <= OWNER[r] < first + size]
        tokens = sum(len(completions[r]) for r in mine)
        loss = torch.zeros(())
        for r in mine:
            i = OWNER[r]
            factor = weights[i] * (COUNTS.mean() / COUNTS[i] if config.aggregation == "prompt" else 1.0)
            terms = []
            for t, logprob in enumerate(literal.logprobs_of(policy, PROMPTS[i], completions[r])):
                old = float(rollouts.logprobs_R_T[r, t])
                term = literal.surrogate(logprob, old, advantages[r], config.clip_low, config.clip_high)
                loss = loss + factor * term / tokens
                terms.append(float(torch.as_tensor(term).detach()))
                ratio = (logprob.detach() - old).exp().item()
                if advantages[r] != 0:
                    seen += 1
                    clipped += ratio > 1 + config.clip_high if advantages[r] > 0 else ratio < 1 - config.clip_low
            prompt_losses[i] += np.mean(terms) / COUNTS[i]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.grad_clip)
        optimizer.step()
    return prompt_losses, clipped / seen


def sgd(policy, lr=0.05):
    """Plain steps, so that a step shows the gradient."""
    return torch.optim.SGD(policy.model.parameters(), lr=lr)


@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("update_rows", [1, 5, 1000])
@pytest.mark.parametrize(
    "settings",
    [
        {"minibatches": 1, "aggregation": "prompt"},
        {"minibatches": 1, "aggregation": "rollout"},
        {"minibatches": 2, "aggregation": "prompt"},
        {"minibatches": 3, "aggregation": "rollout", "grad_clip": 0.05, "temperature": 0.7},
    ],
    ids=["prompt", "rollout", "two-minibatches", "three-clipped-cold"],
)
def test_a_step_is_the_step_of_the_documented_loss(tiny_config, settings, update_rows, drift):
    """Weights after the update, prompt losses and clip share equal the literal ones: rows left out carry nothing."""
    config = tiny_config(**{"batch_size": 6, "update_tokens": 6 * update_rows, "grad_clip": 1e6} | settings)
    policy, slow = load_policy(config), load_policy(config)
    before = literal.weights(policy)
    rollouts, advantages = sampled(policy, drift=drift)
    scale = rollout_scale(WEIGHTS, COUNTS, OWNER, config.aggregation)
    losses, metrics = update(policy, sgd(policy), record(rollouts, advantages, scale), config)
    expected_losses, expected_share = literal_update(slow, sgd(slow), rollouts, config)
    after, expected = literal.weights(policy), literal.weights(slow)
    for name in before:
        step, expected_step = after[name] - before[name], expected[name] - before[name]
        assert expected_step.norm() > 0
        assert (step - expected_step).norm() < 2e-3 * expected_step.norm(), name
    np.testing.assert_allclose(losses, expected_losses, atol=2e-5)
    assert metrics["clip_share"] == pytest.approx(expected_share, abs=1e-9)
    assert metrics["clip_share"] > 0.1 if drift else config.minibatches > 1 or metrics["clip_share"] == 0


def test_unscaled_advantages_reach_the_gradient(tiny_config):
    """Dr.GRPO's advantages are the caller's: update uses what it is given."""
    config = tiny_config(batch_size=6, scale_rewards=False, grad_clip=1e6)
    policy, slow = load_policy(config), load_policy(config)
    rollouts, _ = sampled(policy)
    advantages = group_advantages(REWARDS, OWNER, scale=False)
    scale = rollout_scale(WEIGHTS, COUNTS, OWNER, config.aggregation)
    update(policy, sgd(policy), record(rollouts, advantages, scale), config)
    literal_update(slow, sgd(slow), rollouts, config)
    after, expected = literal.weights(policy), literal.weights(slow)
    assert all(torch.allclose(after[name], expected[name], atol=2e-5) for name in after)


def test_the_published_payoff_is_blind_at_ratio_one(tiny_config):
    """F1: right after sampling Eq. 7's loss is 0 for every prompt, whatever its difficulty, weight and group size."""
    config = tiny_config(batch_size=6)
    policy = load_policy(config)
    rollouts, advantages = sampled(policy)
    scale = rollout_scale(WEIGHTS, COUNTS, OWNER, "prompt")
    losses, _ = update(policy, sgd(policy), record(rollouts, advantages, scale), config)
    np.testing.assert_allclose(losses, 0.0, atol=1e-5)


def test_prompt_losses_do_not_see_the_weights(tiny_config):
    """Eq. 7 is unweighted: other weights, other step, same losses."""
    config = tiny_config(batch_size=6)
    results = []
    for weights in (np.ones(6), WEIGHTS, 1e-3 * WEIGHTS):
        policy = load_policy(config)
        rollouts, advantages = sampled(policy, drift=0.3)
        scale = rollout_scale(weights, COUNTS, OWNER, "prompt")
        results.append(update(policy, sgd(policy), record(rollouts, advantages, scale), config)[0])
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)
    np.testing.assert_allclose(results[2], results[0], atol=1e-5)
    assert np.abs(results[0]).max() > 0.05
    assert (results[0][2:4] == 0).all(), "groups without a signal"


@pytest.mark.parametrize("minibatches", [1, 3])
def test_gradients_add_up_and_move_no_weight(tiny_config, minibatches):
    """Over all mini-batches: minus the sum of the steps of plain gradient descent, each taken from the same weights."""
    config = tiny_config(batch_size=6, minibatches=minibatches, grad_clip=1e6)
    policy = load_policy(config)
    before = literal.weights(policy)
    batch = record(*sampled(policy, drift=0.3), rollout_scale(WEIGHTS, COUNTS, OWNER, "prompt"))
    objective = BatchLoss(policy, batch, config)
    sums = [objective.gradient(minibatch) for minibatch in objective.minibatches]
    assert all(torch.equal(before[name], weight) for name, weight in literal.weights(policy).items())
    gradients = literal.gradients(policy)
    steps = {name: torch.zeros_like(weight) for name, weight in before.items()}
    losses = []
    for minibatch in range(minibatches):
        other = load_policy(config)
        kept = np.flatnonzero(OWNER // (6 // minibatches) == minibatch)
        _, metrics = update(other, sgd(other, 1.0), batch.select(kept), replace(config, minibatches=1))
        losses.append(metrics["loss"])
        for name, weight in literal.weights(other).items():
            steps[name] += weight - before[name]
    assert [float(part.loss) for part in sums] == pytest.approx(losses, rel=1e-5)
    for name, step in steps.items():
        assert (step + gradients[name]).norm() < 1e-4 * step.norm(), name


def test_a_batch_without_signal_changes_nothing(tiny_config):
    """All right or all wrong: no step, no decay, no momentum, although the optimizer has both."""
    config = tiny_config(batch_size=6, minibatches=2)
    policy = load_policy(config)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1, weight_decay=0.1)
    rollouts, advantages = sampled(policy)
    update(policy, optimizer, record(rollouts, advantages, np.ones(OWNER.size)), config)
    before = literal.weights(policy)
    rollouts, advantages = sampled(policy, (OWNER % 2).astype(float), seed=1)
    losses, metrics = update(policy, optimizer, record(rollouts, advantages, np.ones(OWNER.size)), config)
    after = literal.weights(policy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (losses == 0).all()
    assert metrics["loss"] == metrics["grad_norm"] == metrics["clip_share"] == metrics["sampler_kl"] == 0


def test_sampler_kl_is_zero_for_the_sampler_itself_and_estimates_the_divergence_otherwise(tiny_config):
    """0 (to rounding) when the trainer is the sampler, also with several minibatches, where the policy moves after the
    first; with drifted log-probabilities the mean of ratio - 1 - log ratio over the first minibatch's tokens."""
    config = tiny_config(batch_size=6, minibatches=3)
    policy = load_policy(config)
    rollouts, advantages = sampled(policy)
    _, metrics = update(policy, sgd(policy), record(rollouts, advantages, np.ones(OWNER.size)), config)
    assert 0 <= metrics["sampler_kl"] < 1e-9
    assert metrics["clip_share"] > 0, "the second and third minibatch are off-policy"

    config = replace(config, minibatches=1)
    policy = load_policy(config)
    rollouts, advantages = sampled(policy, drift=0.2)
    terms = []
    for r, completion in enumerate(literal.rows(rollouts.tokens_R_T, rollouts.mask_R_T)):
        if advantages[r] != 0:
            with torch.no_grad():
                gap = literal.logprobs_of(policy, PROMPTS[OWNER[r]], completion).numpy()
            gap = gap - rollouts.logprobs_R_T[r, : len(completion)].numpy()
            terms += (np.exp(gap) - 1 - gap).tolist()
    _, metrics = update(policy, sgd(policy), record(rollouts, advantages, np.ones(OWNER.size)), config)
    assert metrics["sampler_kl"] == pytest.approx(np.mean(terms), rel=1e-3)


def test_frozen_layers_stay_and_the_others_move_as_without_freezing(tiny_config):
    """Freezing the first block changes no gradient of the last one."""
    steps = []
    for layers in (0, 1):
        config = tiny_config(batch_size=6, trainable_layers=layers, grad_clip=1e6)
        policy = load_policy(config)
        before = literal.weights(policy)
        rollouts, advantages = sampled(policy)
        optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.05)
        update(policy, optimizer, record(rollouts, advantages, np.ones(OWNER.size)), config)
        steps.append({name: value - before[name] for name, value in literal.weights(policy).items()})
    for name in steps[0]:
        if name.startswith("model.layers.1.") or name == "model.norm.weight":
            assert torch.allclose(steps[1][name], steps[0][name], atol=1e-6), name
        else:
            assert (steps[1][name] == 0).all(), name


@pytest.mark.parametrize(
    ("warmup_steps", "shares"), [(0, [1, 1, 1, 1, 1]), (1, [1, 1, 1, 1, 1]), (4, [0.25, 0.5, 0.75, 1, 1])]
)
def test_learning_rate_warms_up_linearly_and_stays(tiny_config, warmup_steps, shares):
    """Step 0 moves already, step `warmup_steps` - 1 has the peak."""
    config, optimizer = tiny_config(warmup_steps=warmup_steps), torch.optim.SGD([torch.zeros(1)], lr=9.0)
    rates = []
    for step in range(5):
        set_learning_rate(optimizer, config, step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [share * config.learning_rate for share in shares]


def test_steps_and_seeds_draw_from_different_streams():
    """No two of 10 seeds x 500 steps share a seed, none collides with an evaluation's, and torch takes them all."""
    seeds = {step_seed(seed, step) for seed in range(10) for step in range(500)}
    assert len(seeds | {draw_seed(seed, "", block) for seed in range(10) for block in range(2)}) == 5020
    assert min(seeds) >= 0
    assert max(seeds) < 2**63


def move(policy, size=0.2):
    """Away from where training started, so that the KL is not 0."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def written_out(policy, optimizer, rollouts, config, advantages, scale, included):
    """Every option at once for `dapo` and `grpo`, row by row and token by token: the loss of each step, in order."""
    completions = literal.rows(rollouts.tokens_R_T, rollouts.mask_R_T)
    size = len(PROMPTS) // config.minibatches

    def scores(scored):
        with torch.no_grad():
            return [literal.logprobs_of(scored, PROMPTS[OWNER[r]], completions[r]) for r in range(OWNER.size)]

    reference, trainer = scores(load_policy(config)), scores(policy)
    losses = []
    for _ in range(config.passes):
        for first in range(0, len(PROMPTS), size):
            mine = [r for r in range(OWNER.size) if first <= OWNER[r] < first + size and included[r]]
            tokens = sum(len(completions[r]) for r in mine)
            loss = torch.zeros(())
            for r in mine:
                share = 1 / tokens if config.loss == "dapo" else 1 / len(mine) / len(completions[r])
                for t, logprob in enumerate(literal.logprobs_of(policy, PROMPTS[OWNER[r]], completions[r])):
                    sampler, weight = float(rollouts.logprobs_R_T[r, t]), 1.0
                    old = sampler
                    if config.importance_cap:
                        old = float(trainer[r][t])
                        weight = min(float(np.exp(old - sampler)), config.importance_cap)
                    term = literal.surrogate(logprob, old, advantages[r] * scale[r], config.clip_low, config.clip_high)
                    gap = reference[r][t] - logprob
                    loss = loss + share * (weight * term + config.kl_coef * (gap.exp() - 1 - gap))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "settings",
    [
        {"passes": 3},
        {"importance_cap": 1.1},
        {"importance_cap": 1.1, "passes": 2, "minibatches": 3},
        {"kl_coef": 0.5},
        {"kl_coef": 0.02, "passes": 2, "loss": "grpo", "importance_cap": 1.1, "minibatches": 2},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize(("masked", "update_tokens"), [(False, 60), (True, 10_000)])
def test_every_option_is_the_loss_written_out(tiny_config, settings, masked, update_tokens):
    """Weights after all steps and the mean loss: several passes, importance weights capped from above, KL to the policy
    at the start also of rows without advantage, rows that are left out of the loss and of its mean."""
    config = tiny_config(batch_size=6, grad_clip=1e6, update_tokens=update_tokens, **settings)
    included = np.arange(OWNER.size) % 5 != 0 if masked else np.ones(OWNER.size, bool)
    policy, slow = load_policy(config), load_policy(config)
    rollouts, advantages = sampled(policy, drift=0.3)
    scale = rollout_scale(WEIGHTS, COUNTS, OWNER, "prompt")
    move(policy, 0.05)
    move(slow, 0.05)
    before = literal.weights(policy)
    lr = 0.005 if config.kl_coef else 0.05  # exp(reference - policy) soon overflows on this model
    _, metrics = update(policy, sgd(policy, lr), record(rollouts, advantages, scale, included), config)
    losses = written_out(slow, sgd(slow, lr), rollouts, config, advantages, scale, included)
    for name, weight in literal.weights(policy).items():
        step, expected = weight - before[name], literal.weights(slow)[name] - before[name]
        assert (step - expected).norm() < 5e-3 * expected.norm(), name
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-3, abs=1e-5)
    assert ("kl" in metrics) == (config.kl_coef > 0)


def test_metrics_of_the_whole_distribution_and_of_the_mismatch(tiny_config):
    """Entropy, KL to the start and the gap to the sampler, each against its definition, over the rows trained on."""
    config = tiny_config(batch_size=6, kl_coef=0.1, minibatches=2)
    policy = load_policy(config)
    rollouts, advantages = sampled(policy, drift=0.3)
    move(policy, 0.05)
    start, entropy, kl, gap = load_policy(config), [], [], []
    for r, completion in enumerate(literal.rows(rollouts.tokens_R_T, rollouts.mask_R_T)):
        ids = literal.token_ids(policy, PROMPTS[OWNER[r]])
        with torch.no_grad():
            logits = policy.model(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1]
            logprobs = literal.logprobs_of(policy, PROMPTS[OWNER[r]], completion)
            d = literal.logprobs_of(start, PROMPTS[OWNER[r]], completion) - logprobs
        entropy += torch.distributions.Categorical(logits=logits).entropy().tolist()
        kl += (d.exp() - 1 - d).tolist()
        if OWNER[r] < 3:  # the first mini-batch
            gap += (logprobs - rollouts.logprobs_R_T[r, : len(completion)]).abs().tolist()
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1e-9)
    _, metrics = update(policy, optimizer, record(rollouts, advantages, np.ones(OWNER.size)), config)
    assert metrics["trained_entropy"] == pytest.approx(np.mean(entropy), rel=1e-4)
    assert metrics["kl"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert metrics["sampler_gap"] == pytest.approx(np.mean(gap), rel=1e-4)
    assert metrics["sampler_gap"] > 0.1


@pytest.mark.parametrize("what", ["logprobs", "weights"])
def test_a_loss_that_is_not_finite_stops_before_the_step(tiny_config, what):
    """Neither the weights nor the optimizer's state change, and the error says where it happened."""
    config = tiny_config(batch_size=6, minibatches=2)
    policy = load_policy(config)
    rollouts, advantages = sampled(policy)
    if what == "logprobs":
        rollouts.logprobs_R_T[np.flatnonzero((OWNER >= 3) & (advantages != 0))[0], 0] = float("nan")
    else:
        with torch.no_grad():
            policy.model.lm_head.weight[3, 0] = float("inf")
    optimizer = build_optimizer(policy, config)
    before = literal.weights(policy)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(literal.weights(policy)))
    where = "mini-batch 2 of 2, pass 1" if what == "logprobs" else "mini-batch 1 of 2, pass 1"
    with pytest.raises(FloatingPointError, match=where):
        update(policy, optimizer, record(rollouts, advantages, np.ones(OWNER.size)), config)
    last = steps[-1] if steps else before
    assert len(steps) == (what == "logprobs")
    assert all(torch.equal(last[name], weight) for name, weight in literal.weights(policy).items())


def forward_widths(policy, rollouts, advantages, config) -> list[tuple[int, ...]]:
    """Shapes of the inputs of all forward passes of an update."""
    shapes = []
    policy.model.model.embed_tokens.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    update(policy, sgd(policy), record(rollouts, advantages, np.ones(OWNER.size)), config)
    return shapes


@pytest.mark.parametrize("budget", [1, 40, 90, 10_000])
@pytest.mark.parametrize("shared", [False, True])
def test_micro_batches_hold_rows_of_like_length_within_the_budget(tiny_config, monkeypatch, budget, shared):
    """Padded tokens stay within update_tokens, or it is one row; the longest come first; padding is rare."""
    config = tiny_config(batch_size=6, update_tokens=budget, max_new_tokens=12)
    policy = load_policy(config)
    monkeypatch.setattr(gdro_llm.training.gradient, "sharing_pays", lambda *_: shared)
    rollouts = literal.sample(policy, literal.prompts(policy, PROMPTS), COUNTS, 12, seed=0, rows=100)
    advantages = group_advantages(REWARDS, OWNER, scale=True)
    shapes = forward_widths(policy, rollouts, advantages, config)
    if shared:  # prompts, then completions on their caches
        passes = [a[0] * a[1] + b[0] * (b[1] + 1) for a, b in zip(shapes[::2], shapes[1::2], strict=True)]
        rows = [b[0] for b in shapes[1::2]]
    else:
        passes, rows = [n * width for n, width in shapes], [n for n, _ in shapes]
        assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)
        lengths = [len(rollouts.prompts[p]) + n for p, n in zip(OWNER, rollouts.mask_R_T.sum(-1), strict=True)]
        real = sum(int(n) for n, advantage in zip(lengths, advantages, strict=True) if advantage != 0)
        assert budget > 90 or sum(passes) < 1.2 * real
    assert sum(rows) == (advantages != 0).sum()
    assert all(tokens <= budget or n == 1 for tokens, n in zip(passes, rows, strict=True))
    if budget == 10_000:
        assert len(passes) == 1


def test_prompts_are_shared_where_that_saves_a_third_of_the_tokens(tiny_config):
    """Long prompts with short answers; never with gradient checkpointing, which keeps no cache."""
    config = tiny_config(batch_size=2)
    policy = load_policy(config)
    advantages = np.tile([1.0, -1.0], 4)
    for length, expected in ((20, [(2, 20), (8, 3)]), (1, [(8, 5)])):
        prompts = [[5] * length, [6] * length]
        rollouts = Rollouts(
            prompts,
            torch.tensor([0, 1]).repeat_interleave(4),
            torch.ones(8, 4, dtype=torch.long),
            torch.ones(8, 4, dtype=torch.long),
            torch.zeros(8, 4),
            torch.zeros(8, dtype=torch.bool),
            [""] * 8,
        )
        for checkpointing in (False, True):
            policy = load_policy(tiny_config(batch_size=2, gradient_checkpointing=checkpointing))
            shapes = []
            policy.model.model.embed_tokens.register_forward_hook(
                lambda _, args, __, shapes=shapes: shapes.append(tuple(args[0].shape))
            )
            config = replace(config, gradient_checkpointing=checkpointing)
            update(policy, sgd(policy), record(rollouts, advantages, np.ones(8)), config)
            assert shapes == ([(8, length + 4)] if checkpointing else expected)


def test_only_what_is_trained_is_given_to_the_optimizer(tiny_config):
    """AdamW with the configured rates."""
    config = tiny_config(trainable_layers=1, weight_decay=0.1, adam_beta2=0.95)
    policy = load_policy(config)
    optimizer = build_optimizer(policy, config)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.95), 0.1)
    assert sum(p.numel() for p in group["params"]) == sum(
        p.numel() for p in policy.model.parameters() if p.requires_grad
    )


def test_the_8_bit_optimizer_names_its_package(tiny_config, monkeypatch):
    """Without torchao: one line that says what to install."""
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    config = tiny_config(optimizer="adamw8bit")
    with pytest.raises(UsageError, match="pip install torchao"):
        build_optimizer(load_policy(config), config)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torchao and the compiler that it calls warn of their own affairs
def test_the_8_bit_optimizer_steps_like_adamw(tiny_config):
    """The first step has the size of the learning rate along every gradient; the rate follows the warm-up."""
    pytest.importorskip("torchao")
    changes = []
    for name in ("adamw", "adamw8bit"):
        config = tiny_config(batch_size=6, optimizer=name, warmup_steps=2)
        policy = load_policy(config)
        optimizer = build_optimizer(policy, config)
        rollouts, advantages = sampled(policy)
        before = literal.weights(policy)
        for step in range(2):
            set_learning_rate(optimizer, config, step)
            _, metrics = update(policy, optimizer, record(rollouts, advantages, np.ones(OWNER.size)), config)
            assert metrics["learning_rate"] == pytest.approx(1e-3 * (step + 1) / 2)
        changes.append({name: value - before[name] for name, value in literal.weights(policy).items()})
    for name, step in changes[0].items():
        assert (changes[1][name] - step).norm() < 0.1 * step.norm(), name


def test_prompt_losses_are_means_over_passes_and_gradients_are_freed(tiny_config):
    """Where nothing moves a second pass changes nothing; the sampler gets the gradients' memory."""
    results = []
    for passes in (1, 3):
        config = tiny_config(batch_size=6, passes=passes)
        policy = load_policy(config)
        rollouts, advantages = sampled(policy, drift=0.3)
        results.append(update(policy, sgd(policy, 0.0), record(rollouts, advantages, np.ones(OWNER.size)), config))
        assert all(parameter.grad is None for parameter in policy.model.parameters())
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-6)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"loss": "grpo", "kl_coef": 0.1, "importance_cap": 2.0, "passes": 2}])
@pytest.mark.parametrize("left", [[], [4, 5]])
def test_mini_batches_that_are_masked_entirely_are_skipped(tiny_config, settings, left):
    """Where no rollout of a mini-batch counts there is no mean to take: all stays finite, and no weight moves."""
    config = tiny_config(batch_size=6, minibatches=3, overlong="mask", **settings)
    policy = load_policy(config)
    optimizer = build_optimizer(policy, config)
    rollouts, _ = sampled(policy)
    included = np.isin(OWNER, left)
    advantages = group_advantages(REWARDS, OWNER, scale=True, included_R=included)
    before = literal.weights(policy)
    losses, metrics = update(policy, optimizer, record(rollouts, advantages, WEIGHTS[OWNER], included), config)
    assert np.isfinite([*losses, *metrics.values()]).all()
    assert (metrics["grad_norm"] > 0) == bool(left)
    assert all(torch.equal(before[name], weight) for name, weight in literal.weights(policy).items()) != bool(left)
    assert len(optimizer.state) == 0 or left
