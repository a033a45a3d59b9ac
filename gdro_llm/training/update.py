"""One batch of rollouts becomes `passes` x `minibatches` steps of the optimizer.

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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gdro_llm.config import Config, UsageError
from gdro_llm.engine.policy import Policy
from gdro_llm.engine.rollouts import Rollouts
from gdro_llm.engine.scoring import TokenLogprobs
from gdro_llm.engine.workers import ALONE, Workers, full, reshard
from gdro_llm.training.losses import importance_weights, kl_to_reference, token_losses, token_weights


def build_optimizer(policy: Policy, config: Config) -> torch.optim.Optimizer:
    """AdamW over what is trained, with float32 moments or with moments in 8 bits."""
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (0.9, config.adam_beta2),
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, fused=policy.device.type == "cuda", **settings)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UsageError("optimizer adamw8bit needs torchao: pip install torchao") from error
    return AdamW8bit(trained, **settings)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    """Linear warm-up, then constant."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao compiles its step, a new number would compile it again
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@dataclass
class Batch:
    """This process' rows on the device, and how they are scored."""

    prompts: list[list[int]]
    owner_R: torch.Tensor
    tokens_R_T: torch.Tensor
    mask_R_T: torch.Tensor
    sampler_R_T: torch.Tensor
    shared: bool  # prompts are encoded once

    def score(self, scorer: TokenLogprobs, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of some rows, cut at their longest completion; of one token for no rows."""
        if len(rows) == 0:  # other processes have rows, and need this one in their forward passes
            one = self.tokens_R_T.new_ones(1, 1)
            return scorer.plain(self.prompts[:1], one[0] - 1, one - 1, one)
        width = self.width(rows)
        used, local = self.owner_R[rows].unique(return_inverse=True)
        prompts = [self.prompts[p] for p in used.tolist()]
        how = scorer.shared if self.shared else scorer.plain
        return how(prompts, local, self.tokens_R_T[rows, :width], self.mask_R_T[rows, :width])

    def width(self, rows: torch.Tensor) -> int:
        """Tokens of the longest completion of some rows."""
        return int(self.mask_R_T[rows].sum(-1).max())


@dataclass
class MiniBatch:
    """The rows of one optimizer step."""

    micro_batches: list[torch.Tensor]  # row numbers; empty ones at the end if other processes have more
    tokens: float  # of all rows that count, in all processes
    rollouts: float  # likewise


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    advantages_R: np.ndarray,
    scale_R: np.ndarray,
    config: Config,
    workers: Workers = ALONE,
    included_R: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, float]]:
    """`config.passes` x `config.minibatches` optimizer steps on one batch; all processes call it together.

    Args:
        policy: whose weights move.
        optimizer: over its trained weights.
        rollouts: this process' rows, of all prompts of the batch or of some.
        advantages_R: their advantages.
        scale_R: positive factor on each.
        config: the update group.
        workers: the processes, which get the same result.
        included_R: False for rows that are left out of the loss and of its mean; None includes all.

    Returns:
        losses_P: (P,) prompt losses of Eq. 7, without weights (0 where all rewards of a group are equal), by pass.
        metrics: loss and grad_norm, means over steps; clip_share, of tokens with an advantage; sampler_kl (k3) and
            sampler_gap (mean absolute difference of log-probabilities), trainer to sampler, at the tokens trained on in
            the first step; trained_entropy of the whole distribution [nats] and, with `kl_coef`, kl to the starting
            policy, at the tokens trained on; learning_rate. A mean over no token is 0, but then there is no entropy.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; the weights are still those of the last good step.
    """
    device = policy.device
    included = torch.ones(len(scale_R), dtype=torch.bool) if included_R is None else torch.from_numpy(included_R)
    included, scale = included.to(device), torch.from_numpy(scale_R).to(device, torch.float32)
    steered = torch.from_numpy(advantages_R).to(device, torch.float32) * scale * included
    used = included if config.kl_coef else steered != 0
    owner, mask, sampler = (x.to(device) for x in (rollouts.owner_R, rollouts.mask_R_T, rollouts.logprobs_R_T))
    batch = Batch(rollouts.prompts, owner, rollouts.tokens_R_T.to(device), mask, sampler, False)
    batch.shared = workers.size == 1 and not config.gradient_checkpointing and sharing_pays(batch, used)
    minibatches = _minibatches(batch, used, included, config, workers)
    steps = config.passes * config.minibatches

    before = reference = None
    if config.importance_cap and steps > 1:
        before = _score_all(batch, policy.scorer, minibatches)
    if config.kl_coef:
        with policy.reference() as start:
            reference = _score_all(batch, start, minibatches)

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses_P = torch.zeros(len(batch.prompts), dtype=torch.float64, device=device)
    sums = np.zeros(len(_SUMS))
    loss_sum = norm_sum = 0.0
    for step in range(steps):
        minibatch = minibatches[step % config.minibatches]
        optimizer.zero_grad()
        step_sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        loss_here = torch.zeros((), dtype=torch.float64, device=device)
        for rows in minibatch.micro_batches:
            logprobs, entropy = batch.score(policy.scorer, rows)
            if len(rows) == 0:
                (0.0 * logprobs.sum()).backward()
                continue
            width = logprobs.shape[1]
            mask, sampler = batch.mask_R_T[rows, :width], batch.sampler_R_T[rows, :width]
            old = sampler
            if config.importance_cap:
                old = logprobs.detach() if before is None else before[rows, :width]
            terms, clipped = token_losses(
                config.loss,
                logprobs,
                old,
                mask,
                steered[rows],
                clip_low=config.clip_low,
                clip_high=config.clip_high,
            )
            weights = token_weights(
                config.loss,
                mask,
                tokens=minibatch.tokens,
                rollouts=minibatch.rollouts,
                max_new_tokens=config.max_new_tokens,
            )
            kl = torch.zeros_like(terms)
            if reference is not None:
                kl = kl_to_reference(logprobs, reference[rows, :width])
            corrected = terms
            if config.importance_cap:
                corrected = terms * importance_weights(old, sampler, mask, config.importance_cap)
            loss = ((corrected + config.kl_coef * kl) * weights).sum()
            (loss * workers.size).backward()  # FSDP takes the mean over processes
            with torch.no_grad():
                losses_P.index_add_(0, batch.owner_R[rows], (terms.sum(-1) / mask.sum(-1) / scale[rows]).double())
                loss_here += loss
                gap = ((logprobs - sampler) * mask).double()  # log of the probability ratio
                first = float(step == 0)  # before the first step of the batch both should be the same policy
                step_sums += torch.stack(
                    [
                        clipped.sum(),
                        mask[steered[rows] != 0].sum(),
                        entropy.sum(),
                        kl.sum(),
                        mask.sum(),
                        first * (gap.expm1() - gap).sum(),
                        first * gap.abs().sum(),
                        first * mask.sum(),
                    ]
                ).double()
        if not minibatch.micro_batches:
            continue
        loss_all = float(workers.total(loss_here.cpu().numpy()))
        norm = float(full(torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)))
        if not np.isfinite([loss_all, norm]).all():
            raise FloatingPointError(
                f"mini-batch {step % config.minibatches + 1} of {config.minibatches}, pass "
                f"{step // config.minibatches + 1}: loss {loss_all}, gradient norm {norm}; the weights were not "
                "changed"
            )
        optimizer.step()
        loss_sum, norm_sum = loss_sum + loss_all, norm_sum + norm
        sums += step_sums.cpu().numpy()
    optimizer.zero_grad()  # their memory is the sampler's

    counts_P = np.bincount(batch.owner_R[included].cpu().numpy(), minlength=len(batch.prompts))
    everything = workers.total(np.concatenate([losses_P.cpu().numpy(), counts_P, sums]))
    losses, counts, sums = np.split(everything, [len(counts_P), 2 * len(counts_P)])
    total = dict(zip(_SUMS, sums.tolist(), strict=True))
    tokens, first_tokens = total["tokens"], max(total["first_tokens"], 1.0)
    metrics = {
        "loss": loss_sum / steps,
        "grad_norm": norm_sum / steps,
        "clip_share": total["clipped"] / max(total["signal_tokens"], 1.0),
        "sampler_kl": total["sampler_kl"] / first_tokens,
        "sampler_gap": total["sampler_gap"] / first_tokens,
        "learning_rate": float(optimizer.param_groups[0]["lr"]),
    }
    if tokens:
        metrics["trained_entropy"] = total["entropy"] / tokens
    if config.kl_coef:
        metrics["kl"] = total["kl"] / max(tokens, 1.0)
    return losses / np.maximum(counts, 1) / config.passes, metrics


def sampler_gap(policy: Policy, rollouts: Rollouts, config: Config, workers: Workers = ALONE) -> float:
    """Mean |log-probability of the sampler - of the trainer| per token, of a few rows of each process.

    Unlike `update`'s it does not depend on rewards: stale weights give wrong answers only, and nothing to train on.
    """
    device, found = policy.device, rollouts
    owner, tokens, mask, sampler = (
        x.to(device) for x in (found.owner_R, found.tokens_R_T, found.mask_R_T, found.logprobs_R_T)
    )
    batch = Batch(found.prompts, owner, tokens, mask, sampler, False)
    longest = max(map(len, found.prompts)) + mask.shape[1]
    count = min(len(owner), max(1, config.update_tokens // longest), 64)
    rows = torch.linspace(0, len(owner) - 1, count, device=device).long()
    with torch.no_grad():
        logprobs, _ = batch.score(policy.scorer, rows)
    reshard(policy.scorer)
    gap = here = 0.0
    if count:
        width = logprobs.shape[1]
        gap = float(((logprobs - sampler[rows, :width]) * mask[rows, :width]).abs().double().sum())
        here = float(mask[rows].sum())
    total, tokens_in_all = workers.total(np.array([gap, here]))
    return float(total / max(tokens_in_all, 1.0))


_SUMS = ("clipped", "signal_tokens", "entropy", "kl", "tokens", "sampler_kl", "sampler_gap", "first_tokens")


@torch.no_grad()
def _score_all(batch: Batch, scorer: TokenLogprobs, minibatches: list[MiniBatch]) -> torch.Tensor:
    """(R, T) log-probabilities of all rows of all mini-batches, without gradients; 0 elsewhere."""
    found = torch.zeros_like(batch.sampler_R_T)
    for minibatch in minibatches:
        for rows in minibatch.micro_batches:
            logprobs, _ = batch.score(scorer, rows)
            if len(rows):
                found[rows, : logprobs.shape[1]] = logprobs
    reshard(scorer)
    return found


def _minibatches(
    batch: Batch, used_R: torch.Tensor, included_R: torch.Tensor, config: Config, workers: Workers
) -> list[MiniBatch]:
    """Consecutive prompts, in micro-batches; what all processes must know of each other is gathered here."""
    per_minibatch = len(batch.prompts) // config.minibatches
    plans = []
    for first in range(0, len(batch.prompts), per_minibatch):
        mine = (batch.owner_R >= first) & (batch.owner_R < first + per_minibatch)
        micro_batches = _micro_batches(batch, (mine & used_R).nonzero()[:, 0], config.update_tokens)
        counting = mine & included_R
        plans.append((micro_batches, int(batch.mask_R_T[counting].sum()), int(counting.sum())))
    told = np.array(workers.gather([(len(rows), tokens, rollouts) for rows, tokens, rollouts in plans]))
    most, totals = told[:, :, 0].max(0), told.sum(0)
    nothing = torch.zeros(0, dtype=torch.long, device=batch.owner_R.device)
    return [
        MiniBatch(
            micro_batches + [nothing] * int(most[m] - len(micro_batches)),
            float(totals[m, 1]),
            # planned, not drawn: the number must not move with the counts of other mini-batches (`objective`)
            float(config.mean_rollouts * per_minibatch if config.preserve_objective else totals[m, 2]),
        )
        for m, (micro_batches, _, _) in enumerate(plans)
    ]


def _micro_batches(batch: Batch, rows: torch.Tensor, budget: int) -> list[torch.Tensor]:
    """Rows of like length together, the longest first, in as many padded tokens as the budget allows; at least one row.

    Where prompts are shared the rows of a prompt stay together, and its tokens count once.
    """
    owner = batch.owner_R[rows].cpu().numpy()
    prompt = np.array([len(batch.prompts[p]) for p in owner], dtype=int)
    length = batch.mask_R_T[rows].sum(-1).cpu().numpy()
    key = prompt + length
    if batch.shared:
        longest = np.zeros(len(batch.prompts), int)
        np.maximum.at(longest, owner, key)
        key = longest[owner]
    order = np.lexsort((np.arange(len(owner)), owner, -key))
    found: list[list[int]] = []
    widest_prompt = widest = whole = prompts = count = 0
    last = -1
    for i in order:
        widest_prompt, widest = max(widest_prompt, prompt[i]), max(widest, length[i])
        whole, prompts, count = max(whole, prompt[i] + length[i]), prompts + (owner[i] != last), count + 1
        padded = prompts * widest_prompt + count * widest if batch.shared else count * whole
        if not found or padded > budget:
            found.append([])
            widest_prompt, widest, whole, prompts, count = prompt[i], length[i], prompt[i] + length[i], 1, 1
        found[-1].append(i)
        last = owner[i]
    return [rows[torch.tensor(part, device=rows.device)] for part in found]


def sharing_pays(batch: Batch, used_R: torch.Tensor) -> bool:
    """Whether prompts encoded once and completions are at most two thirds of the tokens of all rows on their own."""
    owner = batch.owner_R[used_R].cpu().numpy()
    prompt_P = np.array([len(ids) for ids in batch.prompts])
    completions = int(batch.mask_R_T[used_R].sum())
    return bool(1.5 * (prompt_P[np.unique(owner)].sum() + completions) <= prompt_P[owner].sum() + completions)


@contextmanager
def out_of_memory_advice(config: Config, *, training: bool = False) -> Iterator[None]:
    """Says which options save memory when the GPU has none left."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedies = [f"lower sample_rows (now {config.sample_rows})"]
        if training:
            remedies = [f"lower update_tokens (now {config.update_tokens}) or sample_rows (now {config.sample_rows})"]
        if training and not config.gradient_checkpointing:
            remedies.append("set gradient_checkpointing")
        if config.engine == "vllm":
            remedies.append(f"lower vllm_memory (now {config.vllm_memory:g})")
        if training:
            remedies.append("and --resume: the last checkpoint, if there is one, is intact")
        if config.dtype == "float32":
            remedies.append("or take dtype bfloat16" + " in a new run" * training)
        raise UsageError(f"out of memory on the GPU: {', '.join(remedies)}") from error
