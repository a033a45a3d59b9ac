"""Advantages of groups drawn in stages, where later stages were decided by earlier ones (theorem 21)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, floats, integers


def staged_advantages(rewards: ArrayLike, owner: ArrayLike, stage: ArrayLike, *, scale: bool = False) -> Floats:
    r"""A_j = r_j - mean of the prompt's rewards up to and including the stage of j (theorem 21).

    A rollout is compared with what was known when its number was decided, and with its own stage: never with later
    rollouts, whose number depends on its reward. The summed gradient of a prompt then has mean
    (sum_s E[n_s (1 - 1 / N_s)]) grad p, N_s rollouts up to stage s, whatever rule decides the stages. With one stage
    these are the advantages of Dr.GRPO. They do not sum to 0 in a group of several stages.

    Args:
        rewards: (R,).
        owner: (R,) prompt row of each rollout, 0..P-1, in any order (`Plan.owner`).
        stage: (R,) stage of each rollout, 0, 1, ... (`Plan.stage`).
        scale: divide by the population std of the prompt's whole group + 1e-6, as GRPO does (Eq. 3); what this does to
            the mean is `theory.two_stage.staged_weight`.

    Returns:
        (R,) advantages; 0 where all rewards of the group are equal.

    Raises:
        ValueError: a bad argument.

    >>> rewards, stage = [1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]
    >>> staged_advantages(rewards, [0, 0, 0, 0, 0, 0], stage).round(3)
    array([ 0.5  , -0.5  ,  0.667, -0.333, -0.333, -0.333])
    """
    reward = floats("rewards", rewards, (-1,))
    row = integers("owner", owner, reward.shape, 0, 2**31)
    step = integers("stage", stage, reward.shape, 0, 2**20)
    if reward.size == 0:
        return reward
    prompts, stages = int(row.max()) + 1, int(step.max()) + 1
    place, shape = row * stages + step, (prompts, stages)
    size = np.bincount(place, minlength=prompts * stages).reshape(shape).cumsum(axis=1)
    total = np.bincount(place, reward, prompts * stages).reshape(shape).cumsum(axis=1)
    mean = total / np.maximum(size, 1)
    least, most = np.full(prompts, np.inf), np.full(prompts, -np.inf)
    np.minimum.at(least, row, reward)
    np.maximum.at(most, row, reward)
    advantage = np.where((least == most)[row], 0.0, reward - mean[row, step])  # rounding must not become a signal
    if not scale:
        return advantage
    square = np.bincount(row, (reward - mean[row, -1]) ** 2, prompts)
    return np.asarray(advantage / (np.sqrt(square / np.maximum(size[:, -1], 1)) + 1e-6)[row])
