"""The first part of a step: plan -> sample -> grade -> observe. What moves the policy is `gdro_llm.training.update`.

With a pilot there are two stages: plan -> sample -> grade -> replan -> sample -> grade -> observe (theorem 21).

Nothing random has a state: every draw is seeded by (seed, step), so that a resumed run needs no generator saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gdro_core import GDROController, Observation, Plan, Planner
from gdro_llm.config import Config
from gdro_llm.engine.rollouts import Decoding, Rollouts, interleaved
from gdro_llm.engine.sampler import Sampler
from gdro_llm.engine.workers import Workers
from gdro_llm.problems.load import batch_indices
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.prompting import prompt_tokens
from gdro_llm.problems.rewards import Grader
from gdro_llm.training.batch import Batch, make_batch
from gdro_llm.training.clock import Clock
from gdro_llm.training.planners import candidates_of


@dataclass(frozen=True)
class Drawn:
    """Rollouts of a stage, or of a plan, and their rewards."""

    rollouts: Rollouts  # of this process
    rewards: np.ndarray  # of these
    rewards_R: np.ndarray  # of all processes
    over_limit: float  # completions of all processes that broke a limit of the grader

    def followed_by(self, later: Drawn, plan: Plan) -> Drawn:
        """Both stages, in the order of the whole plan."""
        owner_R = plan.owner[np.argsort(plan.stage, kind="stable")]  # as they were drawn
        mine_R = np.concatenate([x.rollouts.owner_R.cpu().numpy() for x in (self, later)])
        rewards, rewards_R = (
            np.concatenate([getattr(x, name) for x in (self, later)])[np.argsort(owner, kind="stable")]
            for name, owner in (("rewards", mine_R), ("rewards_R", owner_R))
        )
        return Drawn(interleaved(self.rollouts, later.rollouts), rewards, rewards_R, self.over_limit + later.over_limit)


@dataclass(frozen=True)
class Collected:
    """What a step collects before the update."""

    plan: Plan
    problems: list[Problem]  # (P,) of the plan
    batch: Batch  # this process' rows
    own_rewards: np.ndarray  # of these rows
    rewards_R: np.ndarray  # of all rows of the plan
    graded: dict[str, float]  # the grader's metrics
    observed: dict[str, Any]  # the controller's metrics


def collect(
    step: int,
    problems: Sequence[Problem],
    controller: Planner,
    sampler: Sampler,
    grader: Grader,
    config: Config,
    workers: Workers,
    clock: Clock,
) -> Collected:
    """Plan a batch, sample and grade this process' rows, and let the controller observe the rewards of all rows."""
    with clock("controller"):
        offered = {problem.id: problem for problem in candidates(problems, config, step)}
        plan = controller.plan(list(offered), budget=config.batch_size * config.mean_rollouts)
    chosen = [offered[str(name)] for name in plan.ids]
    prompts = [  # those passed over stay empty
        prompt_tokens(sampler.policy.tokenizer, problem, config) if count else []
        for problem, count in zip(chosen, plan.counts, strict=True)
    ]
    process_P = workers.divide(plan.counts, config.minibatches)

    def draw(counts_P: np.ndarray, stage: int) -> Drawn:
        mine = workers.rows(process_P, counts_P)
        with clock("sample"):
            decoding, seed = Decoding(config.max_new_tokens, config.temperature), step_seed(config.seed, step, stage)
            rollouts = sampler.sample(prompts, counts_P, decoding, seed=seed, rows=mine)
        with clock("grade"):
            rewards = grader.grade([chosen[p] for p in rollouts.owner_R.tolist()], rollouts.texts)
            rewards = flip_rewards(rewards, mine, int(counts_P.sum()), config, step, stage)
            rewards_R = np.array(workers.collect(mine, rewards.tolist(), int(counts_P.sum())))
            return Drawn(rollouts, rewards, rewards_R, float(workers.total(np.array(grader.over_limit))))

    with clock("sync"):
        sampler.sync()
    drawn = draw(plan.counts, 0)
    if plan.rest and isinstance(controller, GDROController):  # pilot and commit
        with clock("controller"):
            plan = controller.replan(plan, drawn.rewards_R)
        drawn = drawn.followed_by(draw(plan.more, 1), plan)
    with clock("sample"):
        sampler.sleep()
    with clock("controller"):
        mine = workers.rows(process_P, plan.counts)
        tokens_R = workers.collect(mine, drawn.rollouts.cost_R.tolist(), len(plan.owner))
        observed = controller.observe(plan, Observation.of(plan, drawn.rewards_R, tokens=tokens_R))
    with clock("update"):
        batch = make_batch(drawn.rollouts, drawn.rewards, plan, config)
    # other graders have no limits
    graded = {"grade_limit_share": drawn.over_limit / len(plan.owner)} if config.grader == "math" else {}
    return Collected(plan, chosen, batch, drawn.rewards, drawn.rewards_R, graded, observed)


def candidates(problems: Sequence[Problem], config: Config, step: int) -> list[Problem]:
    """The problems of a step, in the order of the epoch; for a controller that chooses, then others at random."""
    rows = batch_indices(len(problems), config.batch_size, step, config.seed)
    more = (candidates_of(config) - 1) * len(rows)
    if more:
        others = np.setdiff1d(np.arange(len(problems)), rows)
        rows = np.concatenate([rows, np.random.default_rng([config.seed, step, 3]).permutation(others)[:more]])
    return [problems[i] for i in rows]


def flip_rewards(
    rewards: np.ndarray, rows: np.ndarray, total: int, config: Config, step: int, stage: int = 0
) -> np.ndarray:
    """Grades of some rows of a stage, a share `reward_noise` of them flipped: r becomes 1 - r."""
    if not config.reward_noise:
        return rewards
    wrong = np.random.default_rng([config.seed, step, 2, *_later(stage)]).random(total)[rows] < config.reward_noise
    return np.where(wrong, 1.0 - rewards, rewards)


def step_seed(seed: int, step: int, stage: int = 0) -> int:
    """Seed of the draws of a step's stage."""
    return int(np.random.SeedSequence([seed, step, *_later(stage)]).generate_state(1, np.uint64)[0] >> 1)


def _later(stage: int) -> list[int]:
    """What a stage adds to a seed; the first adds nothing, so that it draws as a step of one stage."""
    return [stage] if stage else []


def summarise(
    rewards_R: np.ndarray, owner_R: np.ndarray, weights_P: np.ndarray, rollouts: Rollouts, workers: Workers
) -> dict[str, float]:
    """Metrics of sampling and grading: rewards of all rollouts, the rest from this process' own `rollouts`.

    Rewards and shares are of the prompts with a rollout; `passed_over_share` is that of the others in the plan.
    """
    counts_P = np.bincount(owner_R, minlength=len(weights_P))
    drawn = counts_P > 0
    mean_P = np.bincount(owner_R, weights=rewards_R, minlength=len(weights_P))[drawn] / counts_P[drawn]
    mask, logprobs = rollouts.mask_R_T, rollouts.logprobs_R_T
    sums = [mask.sum(), -logprobs.double().sum(), rollouts.truncated_R.sum()]
    tokens, surprise, truncated = workers.total(np.array([float(x) for x in sums]))
    return {
        "reward": float(mean_P.mean()),  # every prompt counts once, however many rollouts it got
        "weighted_reward": float(np.average(mean_P, weights=weights_P[drawn])),
        "all_correct_share": float((mean_P == 1).mean()),
        "all_wrong_share": float((mean_P == 0).mean()),
        "mixed_share": float(((mean_P > 0) & (mean_P < 1)).mean()),
        "passed_over_share": float(1.0 - drawn.mean()),
        "entropy": float(surprise / tokens),  # of the sampled tokens, unbiased [nats]
        "completion_length": float(tokens / len(rewards_R)),
        "truncated_share": float(truncated / len(rewards_R)),
    }
