r"""From rewards to a gradient: advantages of ragged groups, token losses and the factors that average them.

The loss of a mini-batch is a plain sum over the tokens of all its rollouts, in whatever pieces they come:

    L = sum_r sum_t u_rt l_rt,     u = `Loss.token_weights`: how tokens are averaged,     l = `Loss.token_losses`,

with advantages A_r = (weight of the prompt's game) x (advantage within its group), times n_bar / n_i with
`aggregation="prompt"`: the games enter here and nowhere else. Everything returned is 0 at padding, whatever the inputs
hold there.

When rollouts change the variance of the update and not its mean (`GDROController(preserve_objective=True)`). Let f_r be
any function of completion r alone, and rewards be 0 or 1. Std-normalised advantages of a group of n with K successes
sum to 0, and sum_r A_r r_r / n = sqrt((K/n)(1 - K/n)), hence

    E[(1/n) sum_r A_r f_r] = w_n(p) p (1 - p) (E[f | r = 1] - E[f | r = 0]),        w_n = `gdro_core.gradient_weight`:

n enters by w_n(p) only, and the factor w_nbar(p) / w_n(p) of the controller removes it. The update has this form, with
clipped ratios and importance weights too (r_r gives the sign of A_r), wherever u does not depend on the draws:

- `"dr_grpo"`, `"grpo"`, `"gspo"`: exact for completions of any lengths;
- `"dapo"`, `"cispo"`: exact if all completions have one length. Otherwise the number of tokens in the denominator is
  random and moves with the counts: a prompt's pull is preserved up to that factor, which all prompts share.

It needs `aggregation="prompt"`, scaled rewards (w_n is that of advantages divided by the population std), the true pass
rate p, and for several mini-batches `rollouts` = n_bar x their prompts in `Loss.token_weights`; a later mini-batch is
then exact given the policy it meets, a second pass over the same rollouts is not. It fails, and should be refused, with
`aggregation="rollout"` (pulls by n_i w_n), without scaled rewards ((n - 1) / n instead of w_n), with rewards of more
than two values (partial credit, overlong punishment), with overlong masking (the group is smaller than planned), and
with a KL term, whose rows carry no n_bar / n_i. `tests/llm/training/test_losses.py` has each by exact enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # `gdro_llm.config` reads the table below, and does without torch
    import torch


def group_advantages(
    rewards_R: np.ndarray, owner_R: np.ndarray, *, scale: bool, included_R: np.ndarray | None = None
) -> np.ndarray:
    r"""A_j = (r_j - mean) / (std + 1e-6) within each prompt's group, of any size (Eq. 3; population std).

    Args:
        rewards_R: (R,) rewards.
        owner_R: (R,) prompt row of each rollout, 0..P-1.
        scale: divide by the standard deviation (GRPO) or not (Dr.GRPO).
        included_R: (R,) bool; the others (masked overlong ones) count neither in mean nor in std and get 0. None: all.

    Returns:
        (R,) advantages; they sum to zero in every group, and are zero where all rewards of a group are equal.
    """
    included = np.ones(len(rewards_R), bool) if included_R is None else included_R
    size = np.bincount(owner_R, weights=included)
    mean = np.bincount(owner_R, weights=np.where(included, rewards_R, 0.0)) / np.maximum(size, 1)
    centred = np.where(included, rewards_R - mean[owner_R], 0.0)
    same = np.bincount(owner_R, weights=np.abs(centred) > 1e-9) == 0  # rounding of the mean must not become a signal
    centred = np.where(same[owner_R], 0.0, centred)
    if not scale:
        return centred
    std = np.sqrt(np.bincount(owner_R, weights=centred**2) / np.maximum(size, 1))
    return np.asarray(centred / (std[owner_R] + 1e-6))


def rollout_scale(weights_P: np.ndarray, counts_P: np.ndarray, owner_R: np.ndarray, aggregation: str) -> np.ndarray:
    r"""Positive factor on each rollout's advantage: its prompt's weight, and on request n_bar / n_i to undo its number.

    Here n_bar is the mean over the prompts that have rollouts: where all weights are 1 the factors have mean 1 over the
    rollouts, whether prompts were passed over or not, so that passing over does not shorten the step.

    Args:
        weights_P: (P,) prompt weights of the plan.
        counts_P: (P,) rollouts of the plan, 0 for prompts that are passed over.
        owner_R: (R,) prompt row of each rollout.
        aggregation: `"prompt"`: the factors of a prompt sum to n_bar times its weight, however many rollouts it got;
            `"rollout"`: every rollout counts the same, so that they sum to n_i times it (plain token mean, as DAPO).

    Returns:
        (R,) factors.
    """
    if aggregation != "prompt":
        return np.asarray(weights_P[owner_R])
    return np.asarray((weights_P * counts_P[counts_P > 0].mean())[owner_R] / counts_P[owner_R])


def overlong_penalty(lengths_R: np.ndarray, max_new_tokens: int, buffer: int) -> np.ndarray:
    r"""Soft punishment of long completions, to be added to their rewards (DAPO, arXiv 2503.14476).

        min(0, max(-1, (max_new_tokens - buffer - length) / buffer))

    Departs: rewards here are 0 or 1, not DAPO's -1 or 1, so that the same punishment counts twice as much against a
    correct answer. It belongs to advantages only: what the controller observes stays without it.

    Args:
        lengths_R: (R,) tokens of each completion; truncated ones have max_new_tokens.
        max_new_tokens: longest completion, in tokens.
        buffer: last tokens over which it grows from 0 to -1; above 0.

    Returns:
        (R,) punishments in [-1, 0].
    """
    return np.asarray(np.clip((max_new_tokens - buffer - np.asarray(lengths_R)) / buffer, -1.0, 0.0))


def clipped_surrogate(
    logprobs_R_T: torch.Tensor,
    old_logprobs_R_T: torch.Tensor,
    advantages_R: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    r"""(R, T) token losses -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho the probability ratio (Eq. 5).

    The clip is put on log rho, on the one side where it acts (above at A = 0): what it cuts off cannot overflow, so
    that no gradient is 0 x inf. An infinite loss is left for A < 0 and a ratio beyond the range of the number format.
    """
    low, high = _log_range(clip_low, clip_high)
    log_ratio = logprobs_R_T - old_logprobs_R_T
    advantages = advantages_R[:, None].to(log_ratio.dtype)
    lower = advantages.new_full(advantages.shape, low).masked_fill(advantages >= 0, -math.inf)
    upper = advantages.new_full(advantages.shape, high).masked_fill(advantages < 0, math.inf)
    return -advantages * log_ratio.clamp(lower, upper).exp()


@dataclass(frozen=True)
class Tokens:
    """What a loss is made of, for some rows; log-probabilities are 0 at padding."""

    new_R_T: torch.Tensor  # log-probabilities under the policy that is trained, with gradient
    old_R_T: torch.Tensor  # those that the ratio is taken against, without
    mask_R_T: torch.Tensor  # 1 or True where a completion token stands
    advantages_R: torch.Tensor  # already times the weights of the games
    clip_low: float  # the ratio is clipped below 1 - clip_low; nothing is where clip_low >= 1
    clip_high: float  # the ratio is clipped above 1 + clip_high


Terms = tuple["torch.Tensor", "torch.Tensor"]  # (R, T) losses, and where the clip holds back; padding is not used


def token_surrogate(tokens: Tokens) -> Terms:
    r"""The clipped surrogate of each token (`clipped_surrogate`), and where its clip leaves no gradient."""
    low, high = _log_range(tokens.clip_low, tokens.clip_high)
    advantages, log_ratio = tokens.advantages_R[:, None], (tokens.new_R_T - tokens.old_R_T).detach()
    clipped = ((advantages > 0) & (log_ratio > high)) | ((advantages < 0) & (log_ratio < low))
    losses = clipped_surrogate(tokens.new_R_T, tokens.old_R_T, tokens.advantages_R, tokens.clip_low, tokens.clip_high)
    return losses, clipped


def sequence_surrogate(tokens: Tokens) -> Terms:
    r"""GSPO (arXiv 2507.18071; not GSPO-token): every token of row r holds the loss of the sequence,

        -min(s A, clip(s) A),     s = exp(mean_t log rho_rt),

    so that their mean is that loss and its gradient reaches each log-probability as -s A / length. Its clip ranges are
    of the order of 3e-4; where it clips, it clips all tokens of the row.
    """
    length = _length(tokens.mask_R_T)
    new, old = (x.sum(-1, keepdim=True) / length for x in (tokens.new_R_T, tokens.old_R_T))
    losses, clipped = token_surrogate(replace(tokens, new_R_T=new, old_R_T=old))
    return losses.expand_as(tokens.new_R_T), clipped.expand_as(tokens.new_R_T)


def weighted_log_likelihood(tokens: Tokens) -> Terms:
    r"""CISPO (MiniMax-M1, arXiv 2506.13585, Eq. 4-5): -sg(min(rho, 1 + clip_high)) A log pi, sg: no gradient flows.

    The weight is capped above only, for both signs of A, as in the paper, which puts no lower bound on it: clip_low is
    not used, and no token ever loses its gradient. Clipped are the tokens with a capped weight.
    """
    _, high = _log_range(tokens.clip_low, tokens.clip_high)
    advantages, log_ratio = tokens.advantages_R[:, None], (tokens.new_R_T - tokens.old_R_T).detach()
    losses = -log_ratio.clamp(max=high).exp() * advantages * tokens.new_R_T
    return losses, (log_ratio > high) & (advantages != 0)


def all_tokens(mask_R_T: torch.Tensor, tokens: float, rollouts: float, max_new_tokens: int) -> float:
    """The tokens of the mini-batch: the mean over tokens."""
    return tokens


def rollouts_and_own_tokens(
    mask_R_T: torch.Tensor, tokens: float, rollouts: float, max_new_tokens: int
) -> torch.Tensor:
    """(R, 1) rollouts x length of the row: the mean over rollouts of the mean over their tokens."""
    return rollouts * _length(mask_R_T)


def rollouts_and_most_tokens(mask_R_T: torch.Tensor, tokens: float, rollouts: float, max_new_tokens: int) -> float:
    """Rollouts x max_new_tokens, a constant: long completions are not favoured."""
    return rollouts * max_new_tokens


@dataclass(frozen=True)
class Loss:
    """A loss of single tokens, and how they are averaged.

    Args:
        name: in the configuration.
        terms: how the ratio is taken and what becomes of it: the losses of single tokens, and where they are clipped.
        denominator: (mask_R_T, tokens, rollouts, max_new_tokens) -> by what a token's loss is divided, a number or
            (R, 1); see `token_weights`.
        is_surrogate: at rho = 1 a token's loss is minus the advantage, so that losses are 0 on average over a group.
            The published games can be fed with such losses only.
    """

    name: str
    terms: Callable[[Tokens], Terms]
    denominator: Callable[[torch.Tensor, float, float, int], torch.Tensor | float]
    is_surrogate: bool

    def token_losses(
        self,
        logprobs_R_T: torch.Tensor,
        old_logprobs_R_T: torch.Tensor,
        mask_R_T: torch.Tensor,
        advantages_R: torch.Tensor,
        *,
        clip_low: float,
        clip_high: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Losses of single tokens, to be averaged with `token_weights`; rho is the ratio of probabilities, new to old.

        Args:
            logprobs_R_T: (R, T) log-probabilities under the policy that is trained, with gradient.
            old_logprobs_R_T: (R, T) those that the ratio is taken against, without.
            mask_R_T: (R, T) 1 or True at completion tokens; padding may hold anything.
            advantages_R: (R,) advantages, already times the weights of the games.
            clip_low: the ratio is clipped below 1 - clip_low; nothing is where clip_low >= 1.
            clip_high: the ratio is clipped above 1 + clip_high.

        Returns:
            losses_R_T: (R, T) losses, 0 at padding; linear in the advantage of the row as long as its sign stays.
            clipped_R_T: (R, T) bool, where the clip holds back. For a surrogate: rho above the range and A > 0, or
                below it and A < 0, where no gradient is left.
        """
        absent = ~mask_R_T.bool()
        new, old = logprobs_R_T.masked_fill(absent, 0.0), old_logprobs_R_T.masked_fill(absent, 0.0)
        losses, clipped = self.terms(Tokens(new, old, mask_R_T, advantages_R, clip_low, clip_high))
        return losses.masked_fill(absent, 0.0), clipped & ~absent

    def token_weights(
        self, mask_R_T: torch.Tensor, *, tokens: float, rollouts: float, max_new_tokens: int
    ) -> torch.Tensor:
        r"""Factors u such that the loss of a mini-batch is the sum over all its rows of u times `token_losses`.

        Args:
            mask_R_T: (R, T) 1 or True at completion tokens, of the rows at hand.
            tokens: completion tokens of the whole mini-batch, in all micro-batches and processes; above 0.
            rollouts: its rollouts, in the same sense; above 0.
            max_new_tokens: longest completion, in tokens.

        Returns:
            (R, T) factors, 0 at padding.
        """
        return mask_R_T / self.denominator(mask_R_T, tokens, rollouts, max_new_tokens)


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("dapo", token_surrogate, all_tokens, is_surrogate=True),
        Loss("dr_grpo", token_surrogate, rollouts_and_most_tokens, is_surrogate=True),
        Loss("grpo", token_surrogate, rollouts_and_own_tokens, is_surrogate=True),
        Loss("gspo", sequence_surrogate, rollouts_and_own_tokens, is_surrogate=True),
        Loss("cispo", weighted_log_likelihood, all_tokens, is_surrogate=False),
    )
}


def kl_to_reference(logprobs_R_T: torch.Tensor, reference_R_T: torch.Tensor) -> torch.Tensor:
    r"""(R, T) estimates exp(d) - d - 1 >= 0, d = log reference - log policy, of KL(policy || reference) (k3, GRPO).

    Over tokens drawn from the policy the mean is that divergence of the next token. Known (arXiv 2506.09477): the mean
    of the gradient is not its gradient, but that of KL(reference || policy); both vanish where the two agree. Prompt
    weights do not belong on this term. Where both hold the same at padding, 0 say, it is 0 there.
    """
    gap = reference_R_T - logprobs_R_T
    return gap.expm1() - gap


def importance_weights(
    old_trainer_R_T: torch.Tensor, sampler_R_T: torch.Tensor, mask_R_T: torch.Tensor, cap: float
) -> torch.Tensor:
    r"""(R, T) truncated importance weights min(pi_trainer / pi_sampler, cap) of each token, without gradient.

    Both log-probabilities are of the weights that sampled: the ratio corrects the mismatch of two engines, and the
    ratio inside `Loss.token_losses` is then taken against the trainer's own. 0 at padding, whatever that holds.

    Args:
        old_trainer_R_T: (R, T) log-probabilities by the trainer, before the first update of the batch.
        sampler_R_T: (R, T) those of the sampler.
        mask_R_T: (R, T) 1 or True at completion tokens.
        cap: largest weight, above 0.
    """
    log_ratio = (old_trainer_R_T - sampler_R_T).detach().masked_fill(~mask_R_T.bool(), -math.inf)
    return log_ratio.clamp(max=math.log(cap)).exp()


def _log_range(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Logarithms of the ends of the clip range."""
    return math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)


def _length(mask_R_T: torch.Tensor) -> torch.Tensor:
    """(R, 1) completion tokens of each row, at least 1."""
    return mask_R_T.sum(-1, keepdim=True).clamp(min=1)
