"""What enters the loss: rollouts and, by row, an advantage, a factor and whether the row counts.

`make_batch` turns graded rollouts into that record: advantages are centred (and scaled) within each prompt's group,
whatever its size (Eq. 3), and the prompt's weight (Eq. 16) is a factor beside them. Where a plan has two stages the
group is pooled all the same: that keeps the direction for rewards of 0 and 1, and gains more; with a soft punishment
rewards are fractions, and baselines go stage by stage (theorem 21).
`Refill` gathers mixed groups of several steps until they are a batch (dynamic sampling, DAPO).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gdro_core import Plan, staged_advantages
from gdro_llm.config import Config
from gdro_llm.engine.rollouts import Rollouts, joined
from gdro_llm.training.losses import group_advantages, overlong_penalty, rollout_scale


@dataclass(frozen=True)
class Batch:
    """This process' rows of a batch, all rollouts of a prompt or none."""

    rollouts: Rollouts
    advantages_R: np.ndarray  # within the groups; the prompt's weight is in `scale_R`
    scale_R: np.ndarray  # positive factors on the advantages, of `rollout_scale`
    included_R: np.ndarray  # False: left out of the loss and of its mean

    def select(self, rows: np.ndarray) -> Batch:
        """Some rows; prompts are numbered anew."""
        arrays = (self.advantages_R[rows], self.scale_R[rows], self.included_R[rows])
        return Batch(self.rollouts.select(rows), *arrays)


def make_batch(rollouts: Rollouts, rewards_R: np.ndarray, plan: Plan, config: Config) -> Batch:
    """The record of graded rollouts: truncated ones may be left out, or lose reward as they near the limit.

    Args:
        rollouts: rows of whole prompts of the plan; `owner_R` holds the plan's rows.
        rewards_R: their rewards, without any punishment, as the controllers see them.
        plan: of the batch.
        config: the update group.
    """
    included_R = np.ones(len(rewards_R), dtype=bool)
    if config.overlong == "mask":
        included_R = ~rollouts.truncated_R.cpu().numpy()
    elif config.overlong == "punish":
        lengths_R = rollouts.mask_R_T.sum(-1).cpu().numpy()
        rewards_R = rewards_R + overlong_penalty(lengths_R, config.max_new_tokens, config.overlong_buffer)
    owner_R = rollouts.owner_R.cpu().numpy()
    if plan.first is None or config.overlong != "punish":  # of rewards 0 and 1 (theorem 21 b)
        advantages_R = group_advantages(rewards_R, owner_R, scale=config.scale_rewards, included_R=included_R)
    else:
        stage_R = plan.stage[np.isin(plan.owner, owner_R)]
        kept = (rewards_R[included_R], owner_R[included_R], stage_R[included_R])
        advantages_R = np.zeros(len(rewards_R))
        advantages_R[included_R] = staged_advantages(*kept, scale=config.scale_rewards)
    scale_R = rollout_scale(plan.weights, plan.counts, owner_R, config.aggregation)
    return Batch(rollouts, advantages_R, scale_R, included_R)


class Refill:
    """Mixed groups, gathered until they fill a batch. Groups that wait are not saved.

    Args:
        prompts: groups of a batch.
    """

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts
        self.waiting: list[Batch] = []

    def add(self, batch: Batch) -> Batch | None:
        """Keep the mixed groups. Returns a batch once there are enough (the surplus is dropped), else None."""
        owner_R = batch.rollouts.owner_R.cpu().numpy()
        mixed = np.isin(owner_R, owner_R[batch.advantages_R != 0])
        self.waiting.append(batch.select(np.flatnonzero(mixed)))
        if sum(len(part.rollouts.prompts) for part in self.waiting) < self.prompts:
            return None
        parts, self.waiting = self.waiting, []
        whole = Batch(
            joined([part.rollouts for part in parts]),
            np.concatenate([part.advantages_R for part in parts]),
            np.concatenate([part.scale_R for part in parts]),
            np.concatenate([part.included_R for part in parts]),
        )
        return whole.select(np.flatnonzero(whole.rollouts.owner_R.cpu().numpy() < self.prompts))
