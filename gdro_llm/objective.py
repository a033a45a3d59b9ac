"""From rewards to a gradient: ragged group advantages and the clipped surrogate, averaged over tokens."""

from __future__ import annotations

import numpy as np
import torch


def group_advantages(rewards_R: np.ndarray, owner_R: np.ndarray, *, scale: bool) -> np.ndarray:
    r"""A_j = (r_j - mean) / (std + 1e-6) within each prompt's group, of any size (Eq. 3; population std).

    Args:
        rewards_R: (R,) rewards.
        owner_R: (R,) prompt row of each rollout, 0..P-1.
        scale: divide by the standard deviation (GRPO) or not (Dr.GRPO).

    Returns:
        (R,) advantages; they sum to zero in every group, and are zero where all rewards of a group are equal.
    """
    size = np.bincount(owner_R)
    mean = np.bincount(owner_R, weights=rewards_R) / np.maximum(size, 1)
    centred = rewards_R - mean[owner_R]
    same = np.bincount(owner_R, weights=np.abs(centred) > 1e-9) == 0  # rounding of the mean must not become a signal
    centred = np.where(same[owner_R], 0.0, centred)
    if not scale:
        return centred
    std = np.sqrt(np.bincount(owner_R, weights=centred**2) / np.maximum(size, 1))
    return np.asarray(centred / (std[owner_R] + 1e-6))


def rollout_scale(weights_P: np.ndarray, counts_P: np.ndarray, owner_R: np.ndarray, aggregation: str) -> np.ndarray:
    r"""Positive factor on each rollout's advantage: its prompt's weight, and n_bar / n_i to undo its number.

    Args:
        weights_P: (P,) prompt weights of the plan.
        counts_P: (P,) rollouts of the plan.
        owner_R: (R,) prompt row of each rollout.
        aggregation: `"prompt"`: the factors of a prompt sum to n_bar times its weight, however many rollouts it got;
            `"rollout"`: every rollout counts the same, so that they sum to n_i times it (plain token mean, as DAPO).

    Returns:
        (R,) factors.
    """
    factor_P = weights_P * (counts_P.mean() / counts_P) if aggregation == "prompt" else weights_P
    return np.asarray(factor_P[owner_R])


def clipped_surrogate(
    logprobs_R_T: torch.Tensor,
    old_logprobs_R_T: torch.Tensor,
    advantages_R: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    r"""(R, T) token losses -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho the probability ratio (Eq. 5)."""
    ratio_R_T = (logprobs_R_T - old_logprobs_R_T).exp()
    advantages = advantages_R[:, None]
    return -torch.minimum(ratio_R_T * advantages, ratio_R_T.clamp(1 - clip_low, 1 + clip_high) * advantages)
