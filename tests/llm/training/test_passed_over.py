"""Prompts without rollouts (the recommended controller): in the plan, in no sample, no loss and no mean."""

import math
from types import SimpleNamespace

import literal
import numpy as np
import pytest

import gdro_llm.training.step as step_module
from gdro_core import GDROController, Plan
from gdro_llm.config import Config, UsageError
from gdro_llm.engine.transformers import HFSampler
from gdro_llm.engine.workers import SINGLE_PROCESS, Workers, split_prompts
from gdro_llm.measuring.comparison import _proxies
from gdro_llm.measuring.report import summary_table, write_report
from gdro_llm.measuring.signal import ascent, split
from gdro_llm.problems.load import load_problems
from gdro_llm.problems.rewards import Grader
from gdro_llm.training.batch import make_batch
from gdro_llm.training.clock import Clock
from gdro_llm.training.losses import rollout_scale
from gdro_llm.training.planners import build_controller
from gdro_llm.training.step import collect, summarise
from gdro_llm.training.trainer import train

PASSING = {"controller": "recommended", "min_rollouts": 0}


def every_third(plan: Plan) -> Plan:
    """The same budget without rollouts on every third prompt, whatever the controller knows."""
    counts = plan.counts.copy()
    for i in range(0, len(counts), 3):
        counts[(i + 1) % len(counts)] += counts[i]
        counts[i] = 0
    return Plan(plan.ids, plan.bins, plan.weights, counts, plan.price, plan.step)


@pytest.fixture
def passing_over(monkeypatch):
    """Every plan of a controller passes over every third prompt; the list of plans fills up."""
    plans, plan = [], GDROController.plan

    def planned(self, ids, *, budget=None):
        plans.append(every_third(plan(self, ids, budget=budget)))
        return plans[-1]

    monkeypatch.setattr(GDROController, "plan", planned)
    return plans


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"aggregation": "prompt", "minibatches": 4, "kl_coef": 0.1, "passes": 2},
        {"controller": "null", "importance_cap": 2.0, "loss": "grpo"},
        {"refill": True},
        {"candidates": 3, "minibatches": 4},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_a_run_passes_prompts_over(run_config, tmp_path, passing_over, monkeypatch, settings):
    """They reach neither tokenizer nor sampler; all numbers are finite; the budget is spent; the run is reported."""
    config = run_config(**{**PASSING, **settings})
    asked, tokenized, draw, tokens = [], [], HFSampler.sample, step_module.prompt_tokens

    def sample(self, prompts, counts_P, decoding, *, seed, rows=None):
        if decoding.max_new_tokens == config.max_new_tokens and rows is not None:
            asked.append([bool(prompt) for prompt in prompts])
        return draw(self, prompts, counts_P, decoding, seed=seed, rows=rows)

    monkeypatch.setattr(HFSampler, "sample", sample)
    monkeypatch.setattr(step_module, "prompt_tokens", lambda *args: (tokenized.append(args), tokens(*args))[1])
    train(config, tmp_path)
    rows = literal.read_log(tmp_path / "metrics.jsonl")
    assert [row["rollouts"] for row in rows] == [32 * step for step in range(1, 7)]
    for row, plan in zip(rows, passing_over, strict=True):
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        drawn = float((plan.counts > 0).mean())
        assert row["passed_over_share"] == pytest.approx(1 - drawn)
        assert row["all_wrong_share"] + row["mixed_share"] + row["all_correct_share"] == pytest.approx(1)
    if settings.get("controller") != "null":  # which changes the plan once more
        assert [flags for flags in asked if not all(flags)] == [(plan.counts > 0).tolist() for plan in passing_over]
        assert len(tokenized) == sum((plan.counts > 0).sum() for plan in passing_over)
    assert len(literal.read_log(tmp_path / "samples.jsonl")) == 6
    write_report([tmp_path], tmp_path)
    summary_table([tmp_path])
    assert all(math.isfinite(value) for value in _proxies(rows).values() if value is not None)


def test_the_signal_utility_passes_solved_and_hopeless_prompts_over():
    """By itself: with enough memory of both, no rollout goes to them, and the budget is spent on the others."""
    controller = build_controller(Config(**PASSING, batch_size=4, max_rollouts=16))
    ids = ["never", "always", "often", "half"]
    for _ in range(40):
        plan = controller.plan(ids)
        p = np.array([0.0, 1.0, 0.75, 0.5])[plan.owner]
        place = np.concatenate([np.arange(n) for n in plan.counts]) % 4
        controller.observe(plan, (place < 4 * p).astype(float))
    counts = dict(zip(ids, controller.plan(ids).counts.tolist(), strict=True))
    assert min(counts["never"], counts["always"]) == 0
    assert sum(counts.values()) == 16


def test_metrics_are_of_the_prompts_with_rollouts(tiny):
    """By hand: prompts 0, 2 and the last have none."""
    counts = np.array([0, 2, 0, 3, 0])
    rollouts = literal.sample(tiny, literal.prompts(tiny), counts, 6, seed=0, rows=100)
    weights = np.array([9.0, 1.0, 9.0, 3.0, 9.0])
    owner = np.repeat(np.arange(5), counts)
    metrics = summarise(np.array([1, 1, 1, 0, 0.0]), owner, weights, rollouts, SINGLE_PROCESS)
    assert metrics["reward"] == pytest.approx((1 + 1 / 3) / 2)
    assert metrics["weighted_reward"] == pytest.approx((1 * 1 + 3 / 3) / 4)
    assert (metrics["all_correct_share"], metrics["mixed_share"], metrics["all_wrong_share"]) == (0.5, 0.5, 0.0)
    assert metrics["passed_over_share"] == pytest.approx(3 / 5)


def test_factors_have_mean_one_over_the_rollouts_whoever_is_passed_over():
    """A step is as long as without the prompts that are passed over, by both aggregations."""
    weights, counts = np.ones(4), np.array([0, 2, 6, 0])
    owner = np.repeat(np.arange(4), counts)
    alone = rollout_scale(weights[:2], counts[1:3], np.repeat([0, 1], [2, 6]), "prompt")
    assert rollout_scale(weights, counts, owner, "rollout").tolist() == [1.0] * 8
    assert rollout_scale(weights, counts, owner, "prompt").tolist() == alone.tolist()
    assert alone.mean() == pytest.approx(1.0)
    assert alone[0] * 2 == pytest.approx(alone[-1] * 6)


def test_a_batch_is_the_one_without_the_prompts_that_are_passed_over(tiny, tiny_config):
    """Advantages, factors and the gradient of the whole loss."""
    counts, rewards = np.array([0, 4, 0, 3, 2]), np.array([1, 0, 0, 1, 0, 1, 1, 0, 1.0])
    ids = literal.prompts(tiny)
    plan = Plan(tuple(range(5)), np.zeros(5, int), np.arange(1.0, 6.0), counts, 0.0, 0)
    with_empty = [prompt if n else [] for prompt, n in zip(ids, counts, strict=True)]
    few = np.flatnonzero(counts)
    short = Plan(tuple(few.tolist()), plan.bins[few], plan.weights[few], counts[few], 0.0, 0)
    gradients = []
    for of_plan, prompts in ((plan, with_empty), (short, [ids[i] for i in few])):
        for aggregation in ("rollout", "prompt"):
            config = tiny_config(aggregation=aggregation)
            rollouts = literal.sample(tiny, prompts, of_plan.counts, 6, seed=0, rows=100)
            batch = make_batch(rollouts, rewards, of_plan, config)
            gradients.append(ascent(tiny, batch, config))
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[2]).norm() <= 1e-5 * gradients[2].norm()
    assert (gradients[1] - gradients[3]).norm() <= 1e-5 * gradients[3].norm()


def test_halves_of_the_prompts_with_rollouts():
    """`gdro signal`: alternate prompts of those that were sampled, so that neither half is empty."""
    halves = split(np.repeat(np.arange(6), [2, 0, 3, 0, 4, 0]))
    assert [rows.tolist() for rows in halves] == [[0, 1, 5, 6, 7, 8], [2, 3, 4]]
    with pytest.raises(UsageError, match="at least 2 prompts with rollouts"):
        split(np.array([3, 3, 3]))


class Second(Workers):
    """The second of two processes, whose partner has the rewards, or tokens, of the rows 0..7 to exchange."""

    def gather(self, value):
        return [(list(range(8)), [0.5, 1.0] * 4) if isinstance(value, tuple) else np.zeros_like(value), value]


def test_a_process_without_rows_goes_through_a_step(run_config, tiny, monkeypatch):
    """Its partner has all rollouts: it samples, grades and batches nothing, and observes all the same."""
    config = run_config(**PASSING, batch_size=2, candidates=1, max_rollouts=8)
    problems, _ = load_problems(config)
    controller = build_controller(config)
    plan = controller.plan

    def one_prompt(ids, *, budget=None):
        whole = plan(ids, budget=budget)
        return Plan(whole.ids, whole.bins, whole.weights, np.array([8, 0]), whole.price, whole.step)

    monkeypatch.setattr(controller, "plan", one_prompt)
    with Grader(config) as grader:
        sampler = HFSampler(tiny, config)
        collected = collect(0, problems, controller, sampler, grader, config, Second(1, 2), Clock(tiny.device))
    assert collected.batch.rollouts.texts == []
    assert collected.rewards_R.tolist() == [0.5, 1.0] * 4
    assert collected.batch.advantages_R.size == collected.batch.scale_R.size == 0
    assert controller.state_dict()["step"] == 1


@pytest.mark.parametrize(("name", "graded"), [("math", {"grade_limit_share": 3 / 8}), ("exact", {})])
def test_answers_that_broke_the_graders_limits_are_counted(name, graded, run_config, tiny):
    """As a share of the step's rollouts, where the grader has limits."""
    config = run_config(**PASSING, batch_size=2, candidates=1, max_rollouts=8, grader=name)
    problems, _ = load_problems(config)
    grader = SimpleNamespace(grade=lambda problems, texts: np.zeros(len(texts)), over_limit=3)
    sampler = HFSampler(tiny, config)
    workers, clock = Workers(0, 1), Clock(tiny.device)
    collected = collect(0, problems, build_controller(config), sampler, grader, config, workers, clock)
    assert collected.graded == graded


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_minibatches_hold_equally_many_prompts_with_rollouts(parts):
    """Whichever are passed over, and whether or not their number divides; every process has its share of each."""
    counts = np.array([0, 3, 0, 0, 2, 5, 4, 0, 2, 2, 0, 3, 6, 2, 0, 0])
    split = split_prompts(counts > 0, parts)
    assert np.concatenate(split).tolist() == np.flatnonzero(counts).tolist()
    assert max(map(len, split)) - min(map(len, split)) <= 1
    owner = np.repeat(np.arange(16), counts)
    rows = [Workers(rank, 2).assign(counts, parts) for rank in range(2)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(counts.sum()))
    for part in split:
        loads = [np.isin(owner[mine], part).sum() for mine in rows]
        assert abs(loads[0] - loads[1]) <= counts[part].max()
        assert min(loads) > 0
