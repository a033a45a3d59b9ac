"""One batch of rollouts becomes `passes` x `minibatches` steps of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gdro_llm.config import Config, UsageError
from gdro_llm.engine.policy import Policy, settled
from gdro_llm.engine.workers import SINGLE_PROCESS, Workers, full
from gdro_llm.training.batch import Batch
from gdro_llm.training.gradient import SUMS, BatchLoss


def build_optimizer(policy: Policy, config: Config) -> torch.optim.Optimizer:
    """AdamW over what is trained, with float32 moments or with moments in 8 bits."""
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (0.9, config.adam_beta2),
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        fused = policy.device.type == "cuda" or policy.compute != torch.float32  # one pass over memory; float32 on
        return torch.optim.AdamW(trained, fused=fused, **settings)  # a CPU keeps the bits of earlier runs
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


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, config: Config, workers: Workers = SINGLE_PROCESS
) -> tuple[np.ndarray, dict[str, float]]:
    """`config.passes` x `config.minibatches` optimizer steps on one batch; all processes call it together.

    Args:
        policy: whose weights move.
        optimizer: over its trained weights.
        batch: this process' rows, of all prompts of the batch or of some.
        config: the update group.
        workers: the processes, which get the same result.

    Returns:
        losses_P: (P,) prompt losses of Eq. 7, without weights (0 where all rewards of a group are equal), by pass.
        metrics: loss and grad_norm, means over steps; clip_share, of tokens with an advantage; sampler_kl (k3) and
            sampler_gap (mean absolute difference of log-probabilities), trainer to sampler, at the tokens trained on in
            the first step; trained_entropy of the whole distribution [nats] and, with `kl_coef`, kl to the starting
            policy, at the tokens trained on; learning_rate. A mean over no token is 0, but then there is no entropy.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; the weights are still those of the last good step.
    """
    objective = BatchLoss(policy, batch, config, workers)
    steps = config.passes * config.minibatches
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    prompts = len(batch.rollouts.prompts)
    losses_P = torch.zeros(prompts, dtype=torch.float64, device=policy.device)
    sums, first_sums = np.zeros(len(SUMS)), np.zeros(len(SUMS))
    loss_sum = norm_sum = 0.0
    for step in range(steps):
        minibatch = objective.minibatches[step % config.minibatches]
        optimizer.zero_grad()
        part = objective.gradient(minibatch)
        losses_P.index_add_(0, part.owner_R, part.losses_R)
        if not minibatch.micro_batches:
            continue
        loss = float(workers.total(part.loss.cpu().numpy()))
        norm = float(full(torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)))
        if not np.isfinite([loss, norm]).all():
            raise FloatingPointError(
                f"mini-batch {step % config.minibatches + 1} of {config.minibatches}, pass "
                f"{step // config.minibatches + 1}: loss {loss}, gradient norm {norm}; the weights were not changed"
            )
        optimizer.step()
        policy.refresh()
        loss_sum, norm_sum = loss_sum + loss, norm_sum + norm
        sums += part.totals.cpu().numpy()
        if step == 0:  # before the first step of the batch sampler and trainer should be the same policy
            first_sums = sums.copy()
    optimizer.zero_grad()  # their memory is the sampler's

    owner_R = batch.rollouts.owner_R.cpu().numpy()
    counts_P = np.bincount(owner_R[batch.included_R], minlength=prompts)
    everything = workers.total(np.concatenate([losses_P.cpu().numpy(), counts_P, sums, first_sums]))
    losses, counts, *both = np.split(everything, np.cumsum([prompts, prompts, len(SUMS)]))
    total, first = (dict(zip(SUMS, values.tolist(), strict=True)) for values in both)
    metrics = {
        "loss": loss_sum / steps,
        "grad_norm": norm_sum / steps,
        "clip_share": total["clipped"] / max(total["signal_tokens"], 1.0),
        "sampler_kl": first["sampler_kl"] / max(first["tokens"], 1.0),
        "sampler_gap": first["sampler_gap"] / max(first["tokens"], 1.0),
        "learning_rate": float(optimizer.param_groups[0]["lr"]),
    }
    if total["tokens"]:
        metrics["trained_entropy"] = total["entropy"] / total["tokens"]
    if config.kl_coef:
        metrics["kl"] = total["kl"] / max(total["tokens"], 1.0)
    return losses / np.maximum(counts, 1) / config.passes, metrics


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
        if settled(config).dtype == "float32":
            remedies.append("or take dtype bfloat16" + " in a new run" * training)
        raise UsageError(f"out of memory on the GPU: {', '.join(remedies)}") from error
