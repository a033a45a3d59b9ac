"""Slow, literal versions of what gdro_llm computes: one sequence and one token at a time, no cache, no padding."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from gdro_llm.config import Config
from gdro_llm.engine.policy import Policy
from gdro_llm.engine.rollouts import Decoding, Rollouts
from gdro_llm.engine.transformers import HFSampler
from gdro_llm.problems.rewards import Grader
from gdro_llm.training import evaluation

PROMPTS = ["12+3=", "s5=", "M12,40,7=", "7*8=", "d123="]  # lengths 3 to 9


def token_ids(policy: Policy, text: str) -> list[int]:
    return policy.tokenizer.encode(text, add_special_tokens=False)


def prompts(policy: Policy, texts: list[str] | None = None) -> list[list[int]]:
    """Token ids of prompts (PROMPTS by default)."""
    return [token_ids(policy, text) for text in (PROMPTS if texts is None else texts)]


def log_softmax(policy: Policy, logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the distribution that is sampled from."""
    return torch.log_softmax(logits.float() / policy.temperature, dim=-1)


def sample(policy: Policy, ids: list[list[int]], counts, max_new_tokens: int, *, seed: int, rows: int) -> Rollouts:
    """At the policy's temperature with transformers, `rows` side by side."""
    sampler = HFSampler(policy, Config(sample_rows=rows))
    return sampler.sample(ids, counts, Decoding(max_new_tokens, policy.temperature), seed=seed)


def score(policy: Policy, problems, config: Config, name: str = ""):
    """`evaluation.score` by the policy's own sampler."""
    with Grader(config) as grader:
        return evaluation.score(policy, problems, config, HFSampler(policy, config), grader, name=name)


def evaluate(policy: Policy, problems, config: Config):
    """`evaluation.evaluate` by the policy's own sampler."""
    return evaluation.tabulate(score(policy, problems, config))


def logprobs_of(policy: Policy, prompt: str, completion: list[int]) -> torch.Tensor:
    """Log-probability of each completion token from one plain forward pass."""
    ids = token_ids(policy, prompt)
    logits = policy.model(torch.tensor([ids + completion]), use_cache=False).logits[0]
    logprobs = []
    for t, token in enumerate(completion):
        scaled = logits[len(ids) + t - 1].double() / policy.temperature
        logprobs.append(scaled[token] - torch.logsumexp(scaled, 0))
    return torch.stack(logprobs)


def rows(tokens_R_T: torch.Tensor, mask_R_T: torch.Tensor) -> list[list[int]]:
    """Completions as lists without padding."""
    return [row[: int(mask.sum())] for row, mask in zip(tokens_R_T.tolist(), mask_R_T, strict=True)]


def pad(completions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, completions))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in completions])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in completions])
    return tokens, mask


def advantages(rewards, owner, scale) -> np.ndarray:
    result = np.zeros(len(rewards))
    for i in set(owner.tolist()):
        group = [r for r, o in zip(rewards, owner, strict=True) if o == i]
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / len(group))
        for j, o in enumerate(owner):
            if o == i and std > 1e-8:
                result[j] = (rewards[j] - mean) / (std + 1e-6 if scale else 1.0)
    return result


def surrogate(logprob, old, advantage, low, high):
    """One token of Eq. 4-5: -min(rho A, clip(rho) A). Works on floats and on 0-dimensional tensors."""
    ratio = (logprob - old).exp() if isinstance(logprob, torch.Tensor) else math.exp(logprob - old)
    if advantage >= 0:
        return -ratio * advantage if ratio <= 1 + high else -(1 + high) * advantage
    return -ratio * advantage if ratio >= 1 - low else -(1 - low) * advantage


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def token_losses(kind, logprobs, old, advantage, low, high) -> list:
    """Losses of one sequence's tokens as the papers have them: 0-dimensional tensors and floats, one by one."""
    if kind == "gspo":  # the sequence ratio is the geometric mean of the token ratios
        product = torch.ones((), dtype=torch.float64)
        for logprob, before in zip(logprobs, old, strict=True):
            product = product * logprob.exp() / math.exp(before)
        ratio = product ** (1 / len(old))
        clipped = min(max(float(ratio.detach()), 1 - low), 1 + high)
        pessimist = min(float(ratio.detach()) * advantage, clipped * advantage)
        loss = -ratio * advantage if pessimist == float(ratio.detach()) * advantage else -clipped * advantage
        return [loss] * len(old)
    losses = []
    for logprob, before in zip(logprobs, old, strict=True):
        if kind == "cispo":
            weight = min(math.exp(float(logprob.detach()) - before), 1 + high)  # a number: no gradient flows
            losses.append(-weight * advantage * logprob)
        else:
            losses.append(surrogate(logprob, before, advantage, low, high))
    return losses


def batch_loss(kind, losses: list[list], max_new_tokens: int):
    """Mean of the token losses of a mini-batch's sequences, by the words of each paper."""
    if kind in ("dapo", "cispo"):
        return sum(loss for row in losses for loss in row) / sum(len(row) for row in losses)
    if kind == "dr_grpo":
        return sum(sum(row) / max_new_tokens for row in losses) / len(losses)
    return sum(sum(row) / len(row) for row in losses) / len(losses)
