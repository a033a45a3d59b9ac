"""Budgets by cost: what a rollout costs, plans within a budget of tokens, and the ledger that keeps it (theorem 22)."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_core import (
    GDROController,
    Observation,
    RolloutGDRO,
    TokenBudget,
    TokenCosts,
    equal_edges,
    frontier_allocation,
    signal,
    token_allocation,
)
from gdro_core.difficulty import OnlineDifficultyClassifier


def instance(seed: int, prompts: int = 4, most: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Utilities of random posteriors, weights and kappa, and log-normal costs."""
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(0.3, 8.0, (2, prompts))
    table = signal(float(rng.choice([0.0, 0.5, 2.5]))).of(a, b, np.arange(most + 1))
    return table * rng.uniform(0.5, 2.0, (prompts, 1)), rng.lognormal(5.0, 0.6, prompts)


def value(table: np.ndarray, counts: np.ndarray) -> float:
    return float(table[np.arange(counts.size), counts].sum())


def best_by_enumeration(table: np.ndarray, cost: np.ndarray, budget: float, room: int) -> float:
    plans = itertools.product([0, *range(2, table.shape[1])], repeat=cost.size)
    feasible = [n for n in map(np.array, plans) if cost @ n <= budget and n.sum() <= room]
    return max(value(table, n) for n in feasible)


def fractional(table: np.ndarray, cost: np.ndarray, budget: float) -> tuple[float, float]:
    """Value of the optimum on concave envelopes, and the loss of stopping at the first piece that does not fit."""
    pieces = []
    for row, c in zip(table, cost, strict=True):
        end = max(range(2, row.size), key=lambda n: row[n] / n)
        pieces.append((row[end] / end / c, end * c))
        pieces += [((row[n + 1] - row[n]) / c, c) for n in range(end, row.size - 1)]
    total, left = 0.0, budget
    for density, size in sorted(pieces, reverse=True):
        if size > left:
            return total + density * left, density * left
        total, left = total + density * size, left - size
    return total, 0.0


@given(st.integers(0, 2**20), st.floats(1.0, 5.0))
@settings(max_examples=60, deadline=None)
def test_theorem_22_greedy_by_gain_per_token_is_within_its_bound(seed, mean):
    """Fractional optimum of the envelopes >= brute force >= plan >= fractional optimum less what one piece may lose."""
    table, cost = instance(seed)
    budget = mean * float(cost.sum())
    counts = token_allocation(table, cost, budget)
    assert cost @ counts <= budget * (1 + 1e-9)
    assert not (counts == 1).any()
    bound, loss = fractional(table, cost, budget)
    best, mine = best_by_enumeration(table, cost, budget, 1000), value(table, counts)
    assert bound * (1 + 1e-9) >= best >= mine * (1 - 1e-9)
    assert mine >= (bound - loss) * (1 - 1e-9)
    equal = min(int(mean), table.shape[1] - 1)
    assert equal < 2 or mine >= table[:, equal].sum() * (1 - 1e-9)  # uniform counts are one of the plans


def test_theorem_22_the_bound_is_close_to_1_in_a_batch():
    """l < max c n° is a small part of the budget of 64 prompts: at least .95 of what no plan exceeds, mostly .999."""
    ratios = []
    for seed in range(40):
        table, cost = instance(seed, prompts=64, most=12)
        budget = 4.0 * float(cost.sum())
        counts = token_allocation(table, cost, budget)
        ratios.append(value(table, counts) / fractional(table, cost, budget)[0])
        assert budget - cost @ counts < cost[(counts > 0) & (counts < 12)].min(initial=np.inf)  # no rollout fits
    assert min(ratios) > 0.95
    assert np.median(ratios) > 0.999


@given(st.integers(0, 2**20), st.integers(4, 30))
@settings(max_examples=30, deadline=None)
def test_the_limit_of_rollouts_is_hard_and_costs_little(seed, room):
    """At most `most_rollouts`, whatever the tokens; of few prompts at least .7 of the optimum under both limits."""
    table, cost = instance(seed)
    budget = 3.0 * float(cost.sum())
    counts = token_allocation(table, cost, budget, most_rollouts=room)
    assert counts.sum() <= room
    assert cost @ counts <= budget * (1 + 1e-9)
    assert value(table, counts) >= 0.7 * best_by_enumeration(table, cost, budget, room)


@pytest.mark.parametrize("seed", range(5))
def test_where_few_rollouts_are_allowed_cost_does_not_matter_and_with_equal_cost_rollouts_are_the_budget(seed):
    """Both ends are `frontier_allocation`, up to the piece that is left over."""
    table, cost = instance(seed, prompts=64, most=12)
    best = value(table, frontier_allocation(table, 128))
    assert value(table, token_allocation(table, cost, 1e9, most_rollouts=128)) >= 0.99 * best
    same = token_allocation(table, np.full(64, 7.0), 128 * 7.0)
    assert same.sum() == 128
    assert value(table, same) >= 0.99 * best


def test_plans_do_not_depend_on_the_unit_of_cost():
    """Seconds, tokens or thousands of them."""
    table, cost = instance(3, prompts=32)
    plans = [token_allocation(table, s * cost, s * 4.0 * cost.sum()).tolist() for s in (2.0**-10, 1.0, 2.0**10)]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"costs": [1.0, 0.0]}, r"costs must be above 0, got 0\.0"),
        ({"costs": [1.0]}, "costs must have shape"),
        ({"budget": -1.0}, "budget must lie in"),
        ({"most_rollouts": -1}, "most_rollouts must be an integer >= 0"),
        ({"utility": [[0, 1, 2], [0, 0, 1]]}, "utility must be 0 at n = 0 and n = 1"),
        ({"utility": [[0, 0, 1, 3], [0, 0, 1, 1]]}, "utility must be non-decreasing and concave"),
    ],
)
def test_a_bad_allocation_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        token_allocation(**({"utility": [[0, 0, 1], [0, 0, 1]], "costs": [1.0, 1.0], "budget": 4.0} | change))


# ------------------------------------------------------------------------------------------------ what a rollout costs


def draw(rng: np.random.Generator, length: np.ndarray, n: np.ndarray) -> np.ndarray:
    """(N,) tokens of n rollouts of each prompt; the coefficient of variation of one is .5."""
    return np.where(n > 0, rng.gamma(np.maximum(4.0 * n, 1e-9)) * length / 4.0, 0.0)


def test_expected_tokens_are_the_prompts_own_shrunk_to_its_bins():
    """Twenty rollouts a prompt: less than a third of the error of the one mean; at one visit better than its own."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.95, 400)
    bins = np.minimum((10 * p).astype(int), 9)
    length = 600 * (1.5 - p) * rng.lognormal(0.0, 0.3, 400)
    costs, n = TokenCosts(10), np.full(400, 4)
    first = draw(rng, length, n)
    costs.observe(range(400), bins, n, first)
    assert error(costs.expected(range(400)), length) < 0.85 * error(first / 4, length)
    for _ in range(8):
        costs.observe(range(400), bins, n, draw(rng, length, n))
    assert error(costs.expected(range(400)), length) < 0.33 * error(np.full(400, length.mean()), length)
    assert costs.expected(range(400)).mean() == pytest.approx(length.mean(), rel=0.03)


def error(guess: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(guess / truth - 1).mean())


def test_what_is_remembered_of_a_prompt_follows_the_growth_of_answers():
    """All answers grow threefold while half of the prompts are not sampled: what those cost is known nevertheless."""
    rng = np.random.default_rng(1)
    bins = np.repeat([2, 7], 60)
    length = 500 * rng.lognormal(0.0, 0.4, 120)
    half = np.arange(120) % 2 == 0
    costs = TokenCosts(10)
    for step in range(40):
        n = np.where(half | (step < 10), 4, 0)
        costs.observe(range(120), bins, n, draw(rng, length * 3.0 ** (step / 39), n))
    guess = costs.expected(range(120))[~half]
    assert guess.mean() == pytest.approx(3.0 * length[~half].mean(), rel=0.1)
    assert np.corrcoef(guess, length[~half])[0, 1] > 0.8


def test_prompts_never_sampled_cost_what_such_prompts_cost():
    """Those first seen, not those seen often."""
    costs = TokenCosts(4)
    assert costs.expected(["a"]).tolist() == [1.0]
    costs.observe(["a"], [3], [80], [80 * 50])
    costs.observe(["a", "b"], [3, 0], [80, 80], [80 * 50, 80 * 250])
    for _ in range(20):
        costs.observe(["a", f"new {len(costs)}", "idle"], [3, 0, -1], [80, 80, 0], [80 * 50, 80 * 250, 0])
    assert costs.expected(["idle"])[0] == pytest.approx(250, rel=0.1)
    assert costs.expected(["a"])[0] == pytest.approx(50, rel=0.1)


def test_costs_scale_with_their_unit():
    """Tokens or quarters of tokens."""
    rng, n, bins = np.random.default_rng(2), np.array([2, 4, 8, 1, 0]), [0, 0, 1, 1, -1]
    pair = [TokenCosts(3), TokenCosts(3)]
    for _ in range(3):
        tokens = draw(rng, np.full(5, 300.0), n)
        for costs, unit in zip(pair, (1.0, 4.0), strict=True):
            costs.observe(range(5), bins, n, unit * tokens)
    plain, scaled = (costs.expected(range(6)) for costs in pair)
    np.testing.assert_allclose(scaled, 4.0 * plain, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [9, 1]}, "tokens must be above 0, .* and tokens 0 elsewhere"),
        ({"tokens": [0, 0]}, "tokens must be above 0"),
        ({"bins": [-1, 0]}, "bins at least 0, where there are rollouts"),
        ({"bins": [0, 4]}, "bins must hold"),
        ({"rollouts": [-1, 0]}, "rollouts must hold"),
        ({"tokens": [9]}, "tokens must have shape"),
    ],
)
def test_a_bad_observation_changes_nothing(change, message):
    """The error names the argument; without rollouts nothing is learnt."""
    costs = TokenCosts(4)
    before = costs.state_dict()
    good = {"bins": [0, 1], "rollouts": [2, 0], "tokens": [9, 0]}
    with pytest.raises(ValueError, match=message):
        costs.observe(["a", "b"], **(good | change))
    costs.observe(["a", "b"], [-1, -1], [0, 0], [0, 0])
    assert costs.state_dict() == before


# -------------------------------------------------------------------------------------------------------- the ledger


@pytest.mark.parametrize("gain", [0.1, 0.2, 0.5])
def test_theorem_22_the_error_of_a_run_telescopes(gain):
    """debt_t = (1 - gain) debt_{t-1} + bias + noise: mean error within (bias / gain + s / √(gain (2 - gain))) / T."""
    rng, steps, bias, noise = np.random.default_rng(3), 200, 30.0, 40.0
    debts = []
    for _ in range(200):
        budget = TokenBudget(gain=gain)
        for error in bias + noise * rng.standard_normal(steps):
            budget.settle(budget.allowance(1000.0) + error, 1000.0)
        debts.append(budget.spent - budget.uniform)
        assert budget.excess == pytest.approx(debts[-1] / (1000.0 * steps))
    spread = noise / np.sqrt(gain * (2 - gain))
    assert np.mean(debts) == pytest.approx(bias / gain, abs=5 * spread / np.sqrt(200))
    assert np.std(debts) == pytest.approx(spread, rel=0.2)


def test_a_step_of_uniform_counts_has_no_debt_whatever_it_cost():
    """The first step, of prompts never seen, is the uniform one: so is its cost."""
    controller = GDROController.recommended(4, tokens=TokenBudget())
    plan = controller.plan(list(range(6)))
    assert plan.counts.tolist() == [4] * 6
    tokens = np.random.default_rng(4).integers(10, 4000, 24)
    rewards = np.random.default_rng(5).integers(0, 2, 24)
    metrics = controller.observe(plan, Observation.of(plan, rewards, tokens=tokens))
    assert metrics["tokens_excess"] == pytest.approx(0.0, abs=1e-12)
    assert metrics["rollout_tokens"] == pytest.approx(tokens.mean())


def run(
    controller: GDROController, seed: int, *, steps: int = 50, batch: int = 64, offered: int = 64, growth: float = 1.5
) -> tuple[float, float]:
    """Tokens spent, and what n_bar rollouts each would have cost in expectation: hard prompts have long answers.

    Answers grow by `growth` over the run, and prompts have lengths of their own.
    """
    rng = np.random.default_rng(seed)
    p = np.clip(rng.beta(0.6, 0.8, 512), 0.002, 0.998)
    own = 400 * (2.0 - 1.4 * p) * rng.lognormal(0.0, 0.35, 512)
    spent = uniform = 0.0
    for step in range(steps):
        length = own * growth ** (step / steps)
        rows = rng.choice(512, offered, replace=False)
        plan = controller.plan(rows.tolist(), budget=4 * batch if offered > batch else None)
        right = rng.random(plan.owner.size) < p[rows][plan.owner]
        mean = length[rows][plan.owner] * np.where(right, 0.7, 1.0)
        tokens = np.ceil(rng.gamma(4.0, mean / 4.0))
        controller.observe(plan, Observation.of(plan, right.astype(float), tokens=tokens))
        spent += tokens.sum()
        uniform += 4 * (length * (1 - 0.3 * p))[rows[:batch]].sum()
    return spent, uniform


@pytest.mark.parametrize("offered", [64, 128])
def test_realised_tokens_are_within_2_percent_of_the_uniform_runs_over_50_steps(offered):
    """In the mean of four runs, each within 3 %, with and without candidates; by rollouts it is off by over 4 %."""
    errors = {}
    for name, tokens in (("tokens", TokenBudget), ("rollouts", lambda: None)):
        runs = [
            run(GDROController.recommended(4, tokens=tokens(), seed=seed), seed, offered=offered) for seed in range(4)
        ]
        errors[name] = [spent / uniform - 1 for spent, uniform in runs]
    assert abs(np.mean(errors["tokens"])) < 0.02
    assert max(map(abs, errors["tokens"])) < 0.03
    assert np.mean(errors["rollouts"]) > 0.04


def test_a_plan_costs_what_the_uniform_plan_would():
    """Expected tokens of the plan equal the allowance but for less than the cheapest rollout; at most 1.5 n_bar N."""
    controller = GDROController.recommended(4, tokens=TokenBudget())
    assert controller.tokens is not None
    run(controller, 0, steps=20)
    plan = controller.plan(list(range(64)))
    cost = controller.tokens.costs.expected(plan.ids)
    allowance = controller.tokens.allowance(4 * float(cost.sum()))
    assert 0 <= allowance - cost @ plan.counts < cost.max()
    assert 4 * 64 != plan.counts.sum() <= 1.5 * 4 * 64


def test_with_answers_of_one_length_the_budget_of_tokens_is_that_of_rollouts():
    """Same prompts, same outcomes: as many rollouts, but for the piece that is left over and the error paid back."""
    rng = np.random.default_rng(6)
    pair = [GDROController.recommended(4, tokens=TokenBudget(), seed=1), GDROController.recommended(4, seed=1)]
    p = rng.uniform(0.02, 0.98, 64)
    for _ in range(8):
        plans = [controller.plan(list(range(64))) for controller in pair]
        assert abs(int(plans[0].counts.sum()) - 256) <= 12
        for controller, plan in zip(pair, plans, strict=True):
            right = rng.random(plan.owner.size) < p[plan.owner]
            seen = Observation.of(plan, right.astype(float), tokens=np.full(right.size, 50.0))
            controller.observe(plan, seen)


def test_workers_merge_tokens_by_addition():
    """Two workers see together what one would have seen, in any order; tokens of one alone are refused."""
    plan = GDROController.uniform(3).plan(["a", "b", "c"])
    rewards, tokens = [1, 0, 1, 0, 0, 0, 1, 1, 0], np.arange(9) + 5
    whole = Observation.of(plan, rewards, tokens=tokens)
    parts = [
        Observation.of(plan, np.array(rewards)[rows], rows=rows, tokens=tokens[rows])
        for rows in (np.array([8, 0, 3]), np.array([1, 2, 4, 5, 6, 7]))
    ]
    for merged in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        np.testing.assert_array_equal(merged.tokens, whole.tokens)
    assert whole.by_bin(10)["wasted_tokens_share"] == pytest.approx(tokens[3:6].sum() / tokens.sum())
    with pytest.raises(ValueError, match="observations must both have tokens or none"):
        parts[0].merge(Observation.of(plan, [0] * 6, rows=[1, 2, 4, 5, 6, 7]))
    with pytest.raises(ValueError, match=r"tokens must be above 0, got 0\.0"):
        Observation.of(plan, rewards, tokens=[0, *tokens[1:]])


def test_a_resumed_controller_goes_on_to_the_bit_and_an_earlier_state_loads_without_a_budget_of_tokens():
    """Through JSON, with ids that are texts and tuples; the debt is part of the state."""
    first = GDROController.recommended(4, tokens=TokenBudget(), seed=2)
    ids, rng = [("set", k) if k % 2 else f"set/{k}" for k in range(24)], np.random.default_rng(7)

    def step(controller: GDROController, draws: np.ndarray) -> tuple[list[int], dict]:
        plan = controller.plan(ids)
        right = draws[0, : plan.owner.size] < (plan.owner / 24)
        tokens = 20 + 400 * draws[1, : plan.owner.size]
        return plan.counts.tolist(), controller.observe(plan, Observation.of(plan, right.astype(float), tokens=tokens))

    for _ in range(4):
        step(first, rng.random((2, 300)))
    second = GDROController.recommended(4, tokens=TokenBudget(), seed=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(4):
        draws = rng.random((2, 300))
        assert step(first, draws) == step(second, draws)
    assert first.state_dict() == second.state_dict()
    plain = GDROController.recommended(4, seed=2)
    earlier = {name: value for name, value in plain.state_dict().items() if name != "tokens"} | {"version": 5}
    plain.load_state_dict(earlier)
    with pytest.raises(ValueError, match="has tokens"):
        plain.load_state_dict(first.state_dict())
    broken = first.state_dict() | {"tokens": {**first.state_dict()["tokens"], "gain": 0.5}}
    with pytest.raises(ValueError, match=r"gain = 0\.5"):
        second.load_state_dict(broken)
    assert first.state_dict() == second.state_dict()


def test_a_budget_of_tokens_needs_tokens_and_a_game_per_prompt():
    """What cannot be served is refused where it shows."""
    controller = GDROController.recommended(4, tokens=TokenBudget())
    plan = controller.plan(["a"])
    before = controller.state_dict()
    with pytest.raises(ValueError, match="rewards must be an observation with tokens"):
        controller.observe(plan, [1, 0, 1, 0])
    assert controller.state_dict() == before
    with pytest.raises(ValueError, match="num_bins of tokens must equal"):
        GDROController.recommended(4, num_bins=5, tokens=TokenBudget())
    game = RolloutGDRO(4, 2, 12, per_bin=True)
    with pytest.raises(ValueError, match="tokens need a rollout game per prompt"):
        GDROController(OnlineDifficultyClassifier(equal_edges(10)), rollout=game, tokens=TokenBudget())
    with pytest.raises(ValueError, match="allocate_tokens needs one count a prompt"):
        game.allocate_tokens([0], [1.0], [1.0], costs=[1.0], tokens=4.0, most=8)


def test_the_second_stage_spends_the_tokens_that_the_first_left():
    """Unseen prompts get first rollouts, then what a token is worth decides; together they cost the uniform plan."""
    controller = GDROController.recommended(8, pilot=2, tokens=TokenBudget())
    budget, rng = controller.tokens, np.random.default_rng(8)
    assert budget is not None
    for start in (0, 16, 24):  # the last batch mixes known and new prompts
        ids = list(range(start, start + 16))
        plan = controller.plan(ids)
        new = plan.bins < 0
        assert (plan.counts[new] == 2).all()
        whole = controller.replan(plan, (rng.random(plan.owner.size) < 0.4).astype(float))
        assert (whole.counts >= plan.counts).all()
        costs, tokens, _ = budget.limits(ids, 16, 8)
        assert 0 <= tokens - costs @ whole.counts < costs.max()
        right = (rng.random(whole.owner.size) < 0.4).astype(float)
        lengths = rng.gamma(4.0, 100.0 + 20.0 * (np.array(ids) % 7)[whole.owner])
        controller.observe(whole, Observation.of(whole, right, tokens=lengths))
    assert abs(budget.excess) < 0.05


@pytest.mark.parametrize("seed", range(20))
def test_the_second_stage_is_greedy_by_gain_per_token(seed):
    """Against enumeration of what the tokens left can buy, less what no longer fits at the last gain per token."""
    rng = np.random.default_rng(seed)
    game, first, right = RolloutGDRO(4, 0, 6, signal(0.0)), np.array([2, 0, 3, 2]), np.array([1, 0, 2, 0])
    a, b, cost = rng.uniform(0.5, 6.0, (3, 4))
    tokens = float(cost @ first + 6.0 * cost.mean())
    counts, price = game.extend_tokens(first, right, a, b, costs=cost, tokens=tokens, most=100)
    further = game.utility.further
    assert further is not None
    table = further(a[:, None], b[:, None], right[:, None], first[:, None].astype(float), np.arange(7))
    plans = map(np.array, itertools.product(range(5), [0], range(4), range(5)))
    best = max(value(table, more) for more in plans if cost @ (first + more) <= tokens)
    left = tokens - cost @ counts
    assert left >= 0
    assert counts[1] == 0
    assert value(table, counts - first) >= best - price * left - 1e-12
    limited, _ = game.extend_tokens(first, right, a, b, costs=cost, tokens=tokens, most=8)
    assert limited.sum() <= 8
    none, nothing = game.extend_tokens(first, right, a, b, costs=cost, tokens=0.0, most=100)
    assert none.tolist() == first.tolist()
    assert nothing == 0.0


def test_evenness_leads_from_gain_per_token_to_gain_per_rollout():
    """At 0 `token_allocation`; at 1 the plan of `frontier_allocation` as far as the tokens go; between, between."""
    rng = np.random.default_rng(9)
    a, b = rng.uniform(0.3, 8.0, (2, 64))
    cost, game, seen = 100.0 + 900.0 * b / (a + b), RolloutGDRO(4, 0, 12, signal(0.5)), np.zeros(64, dtype=int)
    table, tokens = game.utility.of(a, b, np.arange(13)), 4.0 * float(cost.sum())
    plans = {
        even: game.allocate_tokens(seen, a, b, costs=cost, tokens=tokens, most=512, evenness=even)[0]
        for even in (0.0, 0.5, 1.0)
    }
    assert all(0 <= tokens - cost @ n < cost.max() for n in plans.values())
    assert plans[0.0].tolist() == token_allocation(table, cost, tokens, most_rollouts=512).tolist()
    by_rollout = plans[1.0]
    best = value(table, frontier_allocation(table, int(by_rollout.sum())))
    assert value(table, by_rollout) == pytest.approx(best, rel=0.01)
    assert plans[0.0].sum() > plans[0.5].sum() > by_rollout.sum()
    with pytest.raises(ValueError, match=r"evenness must lie in \[0, 1\], got 2"):
        TokenBudget(evenness=2.0)


def test_joint_play_in_tokens_gives_everybody_its_least():
    """n_min is met first; what is left goes by the variance that a token takes away."""
    game = RolloutGDRO(4, 2, 12)
    arguments = ([0, 0, -1], [5.0, 5.0, 0.5], [5.0, 5.0, 0.5])
    counts, price = game.allocate_tokens(*arguments, costs=[1.0, 4.0, 2.0], tokens=30.0, most=100)
    assert counts[2] == 4
    assert counts[1] >= 2
    assert counts[0] > counts[1]
    assert counts @ [1.0, 4.0, 2.0] <= 30.0
    assert price > 0
    poor, _ = game.allocate_tokens(*arguments, costs=[1.0, 4.0, 2.0], tokens=1.0, most=1)
    assert poor.tolist() == [2, 2, 4]
