"""Two stages in a step: what is drawn, in which order, whose advantages, and that a run resumes exactly."""

from __future__ import annotations

import json
from threading import Barrier, Thread

import literal
import numpy as np
import pytest
import torch

from gdro_core import staged_advantages
from gdro_llm.config import CONTROLLERS, Config, UsageError
from gdro_llm.engine.rollouts import Decoding
from gdro_llm.engine.sampler import HFSampler
from gdro_llm.engine.workers import Workers
from gdro_llm.problems.load import load_problems
from gdro_llm.problems.rewards import Grader
from gdro_llm.training.clock import Clock
from gdro_llm.training.losses import group_advantages, overlong_penalty
from gdro_llm.training.planners import build_controller
from gdro_llm.training.step import Collected, collect, step_seed
from gdro_llm.training.trainer import train

PILOT = {"pilot": 2, "mean_rollouts": 6, "candidates": 1, "batch_size": 8}


def collected(policy, config: Config, workers: Workers | None = None) -> Collected:
    """The first step, of prompts that nobody has seen."""
    problems, _ = load_problems(config)
    with Grader(config) as grader:
        sampler, clock = HFSampler(policy, config), Clock(policy.device)
        return collect(0, problems, build_controller(config), sampler, grader, config, workers or Workers(), clock)


def test_the_second_stage_follows_the_first_in_the_order_of_the_plan(run_config, tiny):
    """The first rows of every prompt are what one stage of so many would have drawn; the budget is met."""
    config = run_config(**PILOT)
    got = collected(tiny, config)
    plan, rollouts = got.plan, got.batch.rollouts
    assert plan.first.tolist() == [2] * 8
    assert plan.counts.sum() == 48
    assert len(set(plan.counts.tolist())) > 1, "the second stage must depend on the first for this test to count"
    assert rollouts.owner_R.tolist() == plan.owner.tolist()
    assert plan.stage.tolist() == [s for n in plan.counts for s in [0, 0] + [1] * (n - 2)]
    seeds = step_seed(config.seed, 0), step_seed(config.seed, 0, 1)
    assert len({*seeds, step_seed(config.seed, 1)}) == 3
    for stage, counts, seed in zip((0, 1), (plan.first, plan.more), seeds, strict=True):
        alone = HFSampler(tiny, config).sample(
            rollouts.prompts, counts, Decoding(config.max_new_tokens, config.temperature), seed=seed
        )
        rows = plan.stage == stage
        assert torch.equal(alone.tokens_R_T, rollouts.tokens_R_T[torch.from_numpy(rows)])
        assert alone.texts == [text for text, mine in zip(rollouts.texts, rows, strict=True) if mine]
    problems = [got.problems[p] for p in plan.owner]
    assert got.rewards_R.tolist() == Grader(config).grade(problems, rollouts.texts).tolist()


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("settings", [{}, {"overlong": "punish", "overlong_buffer": 3, "max_new_tokens": 4}])
def test_fractional_rewards_have_baselines_by_stage(run_config, tiny, settings, scale):
    """Of 0 and 1 the group is pooled (theorem 21 b); a soft punishment makes fractions."""
    config = run_config(**PILOT, **settings, scale_rewards=scale)
    got = collected(tiny, config)
    plan, rewards = got.plan, got.rewards_R
    assert plan.first is not None
    pooled = group_advantages(rewards, plan.owner, scale=scale)
    if not settings:
        assert got.batch.advantages_R.tolist() == pooled.tolist()
        assert np.abs(pooled).max() > 0
        return
    lengths = got.batch.rollouts.mask_R_T.sum(-1).numpy()
    punished = rewards + overlong_penalty(lengths, config.max_new_tokens, config.overlong_buffer)
    expected = staged_advantages(punished, plan.owner, plan.stage, scale=scale)
    assert got.batch.advantages_R.tolist() == expected.tolist()
    assert np.abs(expected - group_advantages(punished, plan.owner, scale=scale)).max() > 0


def both_halves(policy, config: Config) -> list[Collected]:
    """What two processes collect, in threads that meet at every exchange."""
    meet, values, results = Barrier(2), [None, None], [None, None]

    class Process(Workers):
        def gather(self, value: object) -> list[object]:
            values[self.rank] = value
            meet.wait()
            both = list(values)
            meet.wait()
            return both

    def run(rank: int) -> None:
        results[rank] = collected(policy, config, Process(rank, 2))

    threads = [Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_processes_collect_what_one_does(run_config, tiny):
    """The same plan and rewards; every prompt's rows of both stages in one process."""
    config = run_config(**PILOT, minibatches=2)
    whole, parts = collected(tiny, config), both_halves(tiny, config)
    owners = []
    for part in parts:
        assert part.plan.counts.tolist() == whole.plan.counts.tolist()
        assert part.rewards_R.tolist() == whole.rewards_R.tolist()
        owner = part.batch.rollouts.owner_R.numpy()
        owners.append(set(owner.tolist()))
        mine = np.isin(whole.plan.owner, owner)
        assert owner.tolist() == whole.plan.owner[mine].tolist()
        assert part.batch.rollouts.texts == [
            t for t, kept in zip(whole.batch.rollouts.texts, mine, strict=True) if kept
        ]
        assert part.batch.advantages_R.tolist() == whole.batch.advantages_R[mine].tolist()
    assert not owners[0] & owners[1]
    assert owners[0] | owners[1] == set(whole.plan.owner.tolist())


def test_a_run_with_a_pilot_meets_its_budget_and_resumes_exactly(run_config, tmp_path):
    """Also once prompts are known, and planned in one stage; with noise of the verifier."""
    config = run_config(**PILOT, steps=6, reward_noise=0.1)
    train(config, tmp_path / "whole")
    rows = literal.read_log(tmp_path / "whole" / "metrics.jsonl")
    assert np.diff([0] + [row["rollouts"] for row in rows]).tolist() == [48] * 6
    train(run_config(**PILOT, steps=4, reward_noise=0.1), tmp_path / "half")
    config_file = tmp_path / "half" / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "steps": 6}))
    train(config, tmp_path / "half", resume=True)
    again = literal.read_log(tmp_path / "half" / "metrics.jsonl")
    assert again == rows


@pytest.mark.parametrize("controller", [name for name in CONTROLLERS if name != "recommended"])
def test_other_controllers_refuse_a_pilot(controller):
    """A setting without effect is a mistake; the null would learn from its first stage."""
    aggregation = "prompt" if controller == "published-rollout" else "rollout"
    with pytest.raises(UsageError, match=f"pilot changes nothing with controller '{controller}'"):
        Config(controller=controller, aggregation=aggregation, pilot=2)


def test_a_pilot_that_cannot_be_is_refused():
    """One rollout has no baseline; more than the mean leaves nothing for the second stage."""
    for pilot in (1, 5):
        with pytest.raises(UsageError, match=r"pilot must .* got"):
            build_controller(Config(pilot=pilot, mean_rollouts=4))
