"""The largest micro-batch first: a GPU that is too small says so before the first step, not after hours.

Lengths of completions grow in training, and the widest batch may come late. So before the first step one forward and
backward pass runs on rows of the greatest length, with memory set aside for what the optimizer has not allocated yet.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from gdro_llm.config import Config
from gdro_llm.engine.policy import Policy
from gdro_llm.engine.rollouts import Rollouts
from gdro_llm.engine.workers import SINGLE_PROCESS, Workers
from gdro_llm.training.batch import Batch
from gdro_llm.training.gradient import BatchLoss


def rehearse(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    longest_prompt: int,
    config: Config,
    workers: Workers = SINGLE_PROCESS,
) -> None:
    """Run the largest micro-batch forward and backward; weights, gradients and moments are as before.

    Args:
        policy: that will be trained.
        optimizer: over its trained weights.
        longest_prompt: of the training problems [tokens].
        config: of the run.
        workers: the processes; all call this together.
    """
    row = longest_prompt + config.max_new_tokens
    rows = max(1, min(config.update_tokens // row, config.batch_size * config.max_rollouts))
    batch = _synthetic(rows, longest_prompt, config.max_new_tokens)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    pending = 0 if optimizer.state else trained * (8 if config.optimizer == "adamw" else 2)
    moments = torch.empty(pending // workers.size, dtype=torch.uint8, device=policy.device)
    objective = BatchLoss(policy, batch, replace(config, minibatches=1, passes=1), workers)
    objective.gradient(*objective.minibatches)
    optimizer.zero_grad()
    del moments
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()  # the sampler may be another process


def _synthetic(rows: int, prompt: int, completion: int) -> Batch:
    """Rows of full length, each with a prompt of its own, so that none is encoded once for several."""
    tokens = torch.ones(rows, completion, dtype=torch.long)
    rollouts = Rollouts(
        [[1] * prompt for _ in range(rows)],
        torch.arange(rows),
        tokens,
        torch.ones_like(tokens),
        torch.zeros(rows, completion),
        torch.zeros(rows, dtype=torch.bool),
        [""] * rows,
    )
    ones = np.ones(rows)
    return Batch(rollouts, ones, ones, ones.astype(bool))
