"""The loss of a batch and its gradient, mini-batch by mini-batch; `update` takes the steps of the optimizer.

1. Rollouts without advantage have no gradient and are left out of the backward pass, which is exact without a KL term;
   their tokens still count in the mean. Rows that are not included (masked overlong ones) count nowhere.
2. Ratios are taken against the sampler's own log-probabilities; with `importance_cap` against the trainer's of before
   the first step, and every token loss is multiplied by a capped importance weight between the two.
3. Micro-batches hold rows of like length, the longest first, up to `update_tokens` padded tokens. Prompts are encoded
   once for all their rollouts where that saves a third of the tokens (`sharing_pays`).
4. Under torchrun every process brings its own rows, whole prompts. All run the same number of forward and backward
   passes (the weights are gathered in each): a process that has fewer adds empty ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gdro_llm.config import Config
from gdro_llm.engine.policy import Policy
from gdro_llm.engine.rollouts import Rollouts
from gdro_llm.engine.scoring import TokenLogprobs
from gdro_llm.engine.workers import SINGLE_PROCESS, Workers, reshard, split_prompts
from gdro_llm.training.batch import Batch
from gdro_llm.training.losses import LOSSES, importance_weights, kl_to_reference


@dataclass
class Rows:
    """This process' rows on the device, and how they are scored."""

    prompts: list[list[int]]  # token ids; none for prompts without rollouts in any process
    owner_R: torch.Tensor
    tokens_R_T: torch.Tensor
    mask_R_T: torch.Tensor
    sampler_R_T: torch.Tensor  # log-probabilities
    shared: bool = False  # prompts are encoded once

    @classmethod
    def of(cls, rollouts: Rollouts, device: torch.device) -> Rows:
        """The rows of rollouts, on a device."""
        tensors = (rollouts.owner_R, rollouts.tokens_R_T, rollouts.mask_R_T, rollouts.logprobs_R_T)
        owner, tokens, mask, sampler = (x.to(device) for x in tensors)
        return cls(rollouts.prompts, owner, tokens, mask, sampler)

    def score(self, scorer: TokenLogprobs, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of some rows, cut at their longest completion; of one token for no rows."""
        if len(chosen) == 0:  # other processes have rows, and need this one in their forward passes
            one = self.tokens_R_T.new_ones(1, 1)
            return scorer.plain(one.tolist(), one[0] - 1, one, one)
        width = int(self.mask_R_T[chosen].sum(-1).max())
        used, local = self.owner_R[chosen].unique(return_inverse=True)
        prompts = [self.prompts[p] for p in used.tolist()]
        how = scorer.shared if self.shared else scorer.plain
        return how(prompts, local, self.tokens_R_T[chosen, :width], self.mask_R_T[chosen, :width])


@dataclass
class MiniBatch:
    """The rows of one optimizer step."""

    micro_batches: list[torch.Tensor]  # row numbers; empty ones at the end if other processes have more
    tokens: float  # of all rows that count, in all processes
    rollouts: float  # likewise


SUMS = ("clipped", "signal_tokens", "entropy", "kl", "tokens", "sampler_kl", "sampler_gap")


@dataclass
class Sums:
    """What the passes over a mini-batch leave besides gradients, of this process' rows."""

    loss: torch.Tensor  # () float64
    totals: torch.Tensor  # float64, over tokens trained on, in the order of `SUMS`
    owner_R: torch.Tensor  # prompts of the rows trained on, as they came
    losses_R: torch.Tensor  # float64, mean token losses of these rows, without the prompt's weight


class BatchLoss:
    """The loss of a batch at a policy, with all that it is taken against.

    Args:
        policy: whose loss; the log-probabilities of before the first step and those of the reference are taken here.
        batch: this process' rows, of all prompts of the batch or of some.
        config: the update group.
        workers: the processes; all construct it and call its methods together.
    """

    def __init__(self, policy: Policy, batch: Batch, config: Config, workers: Workers = SINGLE_PROCESS) -> None:
        device = policy.device
        self.policy, self.config, self.workers = policy, config, workers
        self.included_R = torch.from_numpy(batch.included_R).to(device)
        self.scale_R = torch.from_numpy(batch.scale_R).to(device, torch.float32)
        advantages_R = torch.from_numpy(batch.advantages_R).to(device, torch.float32)
        self.advantages_R = advantages_R * self.scale_R * self.included_R  # times the weights of the games
        used_R = self.included_R if config.kl_coef else self.advantages_R != 0
        self.rows = Rows.of(batch.rollouts, device)
        self.rows.shared = workers.size == 1 and not config.gradient_checkpointing and sharing_pays(self.rows, used_R)
        self.minibatches = _minibatches(self.rows, used_R, self.included_R, config, workers)
        self._before = self._reference = None
        if config.importance_cap and config.passes * config.minibatches > 1:
            self._before = self._score_all(policy.scorer)
        if config.kl_coef:
            with policy.reference() as start:
                self._reference = self._score_all(start)

    def gradient(self, minibatch: MiniBatch) -> Sums:
        """Add the gradient of a mini-batch's loss to every weight's `grad`: forward and backward, no step."""
        config, rows, loss = self.config, self.rows, LOSSES[self.config.loss]
        device = rows.owner_R.device
        totals = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        owners, losses = [rows.owner_R[:0]], [totals[:0]]
        for chosen in minibatch.micro_batches:
            logprobs, entropy = rows.score(self.policy.scorer, chosen)
            if len(chosen) == 0:
                (0.0 * logprobs.sum()).backward()
                continue
            width = logprobs.shape[1]
            mask, sampler = rows.mask_R_T[chosen, :width], rows.sampler_R_T[chosen, :width]
            old = sampler
            if config.importance_cap:
                old = logprobs.detach() if self._before is None else self._before[chosen, :width]
            advantages = self.advantages_R[chosen]
            terms, clipped = loss.token_losses(
                logprobs, old, mask, advantages, clip_low=config.clip_low, clip_high=config.clip_high
            )
            weights = loss.token_weights(
                mask, tokens=minibatch.tokens, rollouts=minibatch.rollouts, max_new_tokens=config.max_new_tokens
            )
            kl = torch.zeros_like(terms)
            if self._reference is not None:
                kl = kl_to_reference(logprobs, self._reference[chosen, :width])
            corrected = terms
            if config.importance_cap:
                corrected = terms * importance_weights(old, sampler, mask, config.importance_cap)
            total = ((corrected + config.kl_coef * kl) * weights).sum()
            (total * self.workers.size).backward()  # FSDP takes the mean over processes
            with torch.no_grad():
                owners.append(rows.owner_R[chosen])
                losses.append((terms.sum(-1) / mask.sum(-1) / self.scale_R[chosen]).double())
                loss_sum += total
                gap = ((logprobs - sampler) * mask).double()  # log of the probability ratio
                totals += torch.stack(
                    [
                        clipped.sum(),
                        mask[advantages != 0].sum(),
                        entropy.sum(),
                        kl.sum(),
                        mask.sum(),
                        (gap.expm1() - gap).sum(),
                        gap.abs().sum(),
                    ]
                ).double()
        return Sums(loss_sum, totals, torch.cat(owners), torch.cat(losses))

    @torch.no_grad()
    def _score_all(self, scorer: TokenLogprobs) -> torch.Tensor:
        """(R, T) log-probabilities of all rows of all mini-batches, without gradients; 0 elsewhere."""
        scores = torch.zeros_like(self.rows.sampler_R_T)
        for minibatch in self.minibatches:
            for chosen in minibatch.micro_batches:
                logprobs, _ = self.rows.score(scorer, chosen)
                if len(chosen):
                    scores[chosen, : logprobs.shape[1]] = logprobs
        reshard(scorer)
        return scores


def sampler_gap(policy: Policy, rollouts: Rollouts, config: Config, workers: Workers = SINGLE_PROCESS) -> float:
    """Mean |log-probability of the sampler - of the trainer| per token, of a few rows of each process.

    Unlike `Sums`' it does not depend on rewards: stale weights give wrong answers only, and nothing to train on.
    """
    rows = Rows.of(rollouts, policy.device)
    mask, sampler = rows.mask_R_T, rows.sampler_R_T
    longest = max(map(len, rows.prompts)) + mask.shape[1]
    count = min(len(mask), max(1, config.update_tokens // longest), 64)
    chosen = torch.linspace(0, len(mask) - 1, count, device=policy.device).long()
    with torch.no_grad():
        logprobs, _ = rows.score(policy.scorer, chosen)
    reshard(policy.scorer)
    gap = tokens = 0.0
    if count:
        width = logprobs.shape[1]
        gap = float(((logprobs - sampler[chosen, :width]) * mask[chosen, :width]).abs().double().sum())
        tokens = float(mask[chosen].sum())
    total_gap, total_tokens = workers.total(np.array([gap, tokens]))
    return float(total_gap / max(total_tokens, 1.0))


def sharing_pays(rows: Rows, used_R: torch.Tensor) -> bool:
    """Whether prompts encoded once and completions are at most two thirds of the tokens of all rows on their own."""
    owner = rows.owner_R[used_R].cpu().numpy()
    prompt_P = np.array([len(ids) for ids in rows.prompts])
    completions = int(rows.mask_R_T[used_R].sum())
    return bool(1.5 * (prompt_P[np.unique(owner)].sum() + completions) <= prompt_P[owner].sum() + completions)


def _minibatches(
    rows: Rows, used_R: torch.Tensor, included_R: torch.Tensor, config: Config, workers: Workers
) -> list[MiniBatch]:
    """Consecutive prompts, in micro-batches; the sums over all processes are made here."""
    parts = split_prompts(np.array([bool(ids) for ids in rows.prompts]), config.minibatches)
    plans = []
    for part in parts:
        mine = torch.isin(rows.owner_R, torch.from_numpy(part).to(rows.owner_R.device))
        micro_batches = _micro_batches(rows, (mine & used_R).nonzero()[:, 0], config.update_tokens)
        counting = mine & included_R
        plans.append((micro_batches, int(rows.mask_R_T[counting].sum()), int(counting.sum())))
    sizes = np.array(workers.gather([(len(micro), tokens, rollouts) for micro, tokens, rollouts in plans]))
    most, totals = sizes[:, :, 0].max(0), sizes.sum(0)
    no_rows = torch.zeros(0, dtype=torch.long, device=rows.owner_R.device)
    return [
        MiniBatch(
            micro_batches + [no_rows] * int(most[m] - len(micro_batches)),
            float(totals[m, 1]),
            # planned, not drawn: the number must not move with the counts of other mini-batches (`losses`)
            float(config.mean_rollouts * len(parts[m]) if config.preserve_objective else totals[m, 2]),
        )
        for m, (micro_batches, _, _) in enumerate(plans)
    ]


def _micro_batches(rows: Rows, chosen: torch.Tensor, budget: int) -> list[torch.Tensor]:
    """Rows of like length together, the longest first, in as many padded tokens as the budget allows; at least one row.

    Where prompts are shared the rows of a prompt stay together, and its tokens count once.
    """
    owner = rows.owner_R[chosen].cpu().numpy()
    prompt = np.array([len(rows.prompts[p]) for p in owner], dtype=int)
    length = rows.mask_R_T[chosen].sum(-1).cpu().numpy()
    key = prompt + length
    if rows.shared:
        longest = np.zeros(len(rows.prompts), int)
        np.maximum.at(longest, owner, key)
        key = longest[owner]
    order = np.lexsort((np.arange(len(owner)), owner, -key))
    parts: list[list[int]] = []
    widest_prompt = widest = whole = prompts = count = 0
    last = -1
    for i in order:
        widest_prompt, widest = max(widest_prompt, prompt[i]), max(widest, length[i])
        whole, prompts, count = max(whole, prompt[i] + length[i]), prompts + (owner[i] != last), count + 1
        padded = prompts * widest_prompt + count * widest if rows.shared else count * whole
        if not parts or padded > budget:
            parts.append([])
            widest_prompt, widest, whole, prompts, count = prompt[i], length[i], prompt[i] + length[i], 1, 1
        parts[-1].append(i)
        last = owner[i]
    return [chosen[torch.tensor(part, device=chosen.device)] for part in parts]
