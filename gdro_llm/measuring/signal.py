r"""`gdro signal`: how much signal one step's gradient has, and where it points, by method, at a fixed policy.

The policy does not move: a controller first learns the problems' pass rates from batches at this policy, then further
batches are planned, sampled and graded as in training, and the prompts with rollouts of each are split in two halves,
with gradients g_1 and g_2. With g = (g_1 + g_2) / 2 the gradient of the batch,

    E [g_1 . g_2] = |E g|^2 (signal),    E |g_1 - g_2|^2 / 4 = E |g - E g|^2 (noise),    SNR = signal / noise,

the first because halves of a batch are independent but for the plan. As success probabilities p must be known
(`evaluation.no_exact_rates`), mean@1 and pass@k have exact gradients u over the training problems; `cosine` is
E [g . u] / (sqrt(E |g|^2) |u|): the share of one step along the wanted gradient. It is what a batch is worth to an
optimizer that normalises its steps, and does not depend on the scale of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gdro_core import PublishedController
from gdro_llm.config import Config, UsageError
from gdro_llm.engine.policy import Policy, accepted_sequences, load_policy, sequence_logprobs
from gdro_llm.engine.transformers import HFSampler
from gdro_llm.engine.workers import SINGLE_PROCESS
from gdro_llm.intervals import percentile_interval
from gdro_llm.measuring import tables
from gdro_llm.measuring.compare import Method
from gdro_llm.problems.load import hold_out, load_problems
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.prompting import prompt_tokens
from gdro_llm.problems.rewards import Grader
from gdro_llm.training.batch import Batch
from gdro_llm.training.checkpoint import write_file
from gdro_llm.training.clock import Clock
from gdro_llm.training.evaluation import exact_rates
from gdro_llm.training.gradient import BatchLoss
from gdro_llm.training.planners import build_controller
from gdro_llm.training.step import collect


def measure(config: Config, methods: Sequence[Method], warm_up: int, batches: int, out: Path) -> dict[str, Any]:
    """Signal and noise of every method at the policy of `config`; writes signal.json and signal.md.

    Args:
        config: model, data and update; a method's settings come on top.
        methods: which.
        warm_up: batches from which the controllers learn before.
        batches: batches measured.
        out: folder to write.

    Raises:
        UsageError: data without exact success probabilities, too few batches, or a method whose step is not that of
            one batch at a policy that does not move.
    """
    if batches < 2:
        raise UsageError(f"batches must be at least 2 for an interval, got {batches}")
    runs = {method.label: replace(config, **method.settings) for method in methods}
    for label, run in runs.items():
        reasons = {
            "waits for mixed groups of several batches": run.refill,
            "learns from the losses of updates": isinstance(build_controller(run), PublishedController),
            "has a KL term to the very policy that is measured": run.kl_coef > 0,
        }
        for reason, applies in reasons.items():
            if applies:
                raise UsageError(f"gdro signal cannot measure {label!r}, which {reason}; leave it out of --methods")
    train, _ = load_problems(config)
    train, _ = hold_out(train, config)
    policy = load_policy(config)
    wanted = {"mean@1": 1, f"pass@{config.eval_samples}": config.eval_samples}
    rates = exact_rates(policy, train, config)
    directions = {name: exact_gradient(policy, train, config, rates, k) for name, k in wanted.items()}
    named = replace(config, model=Path(config.model).name)  # not where it lies
    result: dict[str, Any] = {"config": asdict(named), "warm_up": warm_up, "batches": batches, "methods": {}}
    for label, run in runs.items():
        result["methods"][label] = _summary(_halves(policy, train, run, warm_up, batches, label), directions)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "signal.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_file(out / "signal.md", table(result) + "\n")
    return result


def exact_gradient(
    policy: Policy, problems: Sequence[Problem], config: Config, p_P: np.ndarray, k: int, rows: int = 256
) -> torch.Tensor:
    """Flat gradient of the mean over problems of 1 - (1 - p)^k, by teacher forcing of the correct completions."""
    factor = torch.tensor(k * (1.0 - p_P) ** (k - 1) / len(problems), device=policy.device)
    prompts = [prompt_tokens(policy.tokenizer, problem, config) for problem in problems]
    sequences = accepted_sequences(policy, [problem.correct for problem in problems], config.max_new_tokens)
    parameters = [p for p in policy.working.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters))
    for start in range(0, len(sequences), rows):
        chunk = sequences[start : start + rows]
        logprobs_S = sequence_logprobs(policy, prompts, chunk, config.max_new_tokens, config.eval_temperature)
        objective = (logprobs_S.exp() * factor[[i for i, _ in chunk]]).sum()
        total += torch.cat([g.flatten().float() for g in torch.autograd.grad(objective, parameters)]).cpu()
    return total


def _halves(
    policy: Policy, problems: list[Problem], config: Config, warm_up: int, batches: int, label: str
) -> torch.Tensor:
    """(batches, 2, D): ascent directions of the two halves of each batch's prompts."""
    controller, sampler = build_controller(config), HFSampler(policy, config)
    ascents = []
    with Grader(config) as grader:
        for step in tqdm(range(warm_up + batches), desc=label, unit="batch", leave=False):
            clock = Clock(policy.device)
            collected = collect(step, problems, controller, sampler, grader, config, SINGLE_PROCESS, clock)
            if step >= warm_up:
                halves = split(collected.plan.owner)
                ascents.append(torch.stack([ascent(policy, collected.batch.select(rows), config) for rows in halves]))
    return torch.stack(ascents)


def split(owner_R: np.ndarray) -> list[np.ndarray]:
    """Rows of two halves of the prompts that have rollouts, taken alternately.

    Raises:
        UsageError: there is one such prompt only.

    >>> split(np.array([1, 1, 3, 5]))  # prompts 1, 3 and 5
    [array([0, 1, 3]), array([2])]
    """
    place_R = np.unique(owner_R, return_inverse=True)[1]
    if not place_R.any():
        raise UsageError("batch_size must leave at least 2 prompts with rollouts in every batch, got one of 1")
    return [np.flatnonzero(place_R % 2 == half) for half in (0, 1)]


def ascent(policy: Policy, batch: Batch, config: Config) -> torch.Tensor:
    """Minus the gradient of the batch's loss, flat: the direction of one step on all of it."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    objective = BatchLoss(policy, batch, replace(config, minibatches=1, passes=1))
    policy.model.zero_grad()
    objective.gradient(objective.minibatches[0])
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    direction = -torch.cat([gradient.flatten() for gradient in flat]).cpu()
    policy.model.zero_grad()
    return direction


def _summary(halves: torch.Tensor, directions: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Ratios of averages over batches, each with a 95 % bootstrap interval over batches."""
    whole = halves.mean(1)
    terms = {
        "signal": (halves[:, 0] * halves[:, 1]).sum(-1),
        "noise": (halves[:, 0] - halves[:, 1]).square().sum(-1) / 4,
        "size": whole.square().sum(-1),
        **{name: whole @ u / u.norm() for name, u in directions.items()},
    }
    values = {name: x.double().numpy() for name, x in terms.items()}

    def entry(top: str, bottom: str, power: float) -> dict[str, float]:
        def ratio(rows: Any) -> Any:
            return values[top][rows].mean(-1) / values[bottom][rows].mean(-1) ** power

        low, high = percentile_interval(ratio, len(whole))
        return {"value": float(ratio(slice(None))), "low": low, "high": high}

    cosines = {f"cosine with {name}": entry(name, "size", 0.5) for name in directions}
    return {"SNR": entry("signal", "noise", 1.0), **cosines}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    names = list(next(iter(result["methods"].values())))
    rows = [["method", *names]]
    for label, values in result["methods"].items():
        entries = [values[name] for name in names]
        rows.append([label, *(tables.with_interval(e["value"], e["low"], e["high"], ".3f") for e in entries)])
    return tables.markdown(rows, "<" + ">" * len(names))
