r"""Gradients of half groups, for the components that `gdro_core.VarianceComponents` separates: common, own and noise.

A group of at least four rollouts is split into two halves by row, before its rewards are looked at. With leave-one-out
baselines within each half of h rollouts (A_j = r_j minus the mean reward of the others) its two gradients

    G = (1/h) sum_j A_j z_j,     z_j = sum_t grad log pi(y_jt),     E G = grad p,

are independent given the policy. They are taken with respect to the matrices of the last block that write into the
residual stream (attention output, MLP output). In such a matrix with inputs x_t and gradients d_t at its outputs,
z_j = sum_t d_t x_t^T, so that no gradient is ever formed: with sign matrices R and S of entries +-1 / sqrt(width),

    R^T z_j S = sum_t (R^T d_t) (S^T x_t)^T,     E <R^T y S, R^T z S> = <y, z>.

R and S are drawn anew for each measurement: products of a measurement share their error, those of others average it.

One pass, cheap for long prompts: every prompt is run once without its last token, then each rollout from that token on.
The graph begins at the last block, whose outputs at earlier positions no completion depends on: the gradient is exact.
Halves of equal rewards have gradient 0 and are not run. The others are until their rollouts are a share `SHARE` of the
step's, so that the cost is a constant share of a step: prompts in the order of a random permutation. All prompts up to
there are part of the answer, so that a mean over prompts stays one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gdro_core import GDROController, Plan, Planner
from gdro_llm.config import Config, UsageError
from gdro_llm.engine.policy import Policy, decoder_layers
from gdro_llm.engine.rollouts import Rollouts
from gdro_llm.engine.scoring import positions, run_prompts
from gdro_llm.engine.workers import SINGLE_PROCESS, Workers, whole_weights

SHARE = 0.2  # of a step's rollouts, run in a measurement
FEWEST = 4  # rollouts of a group: two in each half
WIDTH = 64  # of the sketch: WIDTH x WIDTH numbers a matrix


@dataclass(frozen=True)
class HalfGroups:
    """Of M prompts of a plan, what `VarianceComponents.observe` takes besides their bins."""

    prompts_M: np.ndarray  # rows of the plan
    first_M_D: np.ndarray  # sketched gradients of the halves
    second_M_D: np.ndarray
    correct_M_2: np.ndarray  # right answers and rollouts of each half
    trials_M_2: np.ndarray


def measure(
    controller: Planner,
    policy: Policy,
    rollouts: Rollouts,
    rewards_R: np.ndarray,
    plan: Plan,
    config: Config,
    step: int,
    workers: Workers = SINGLE_PROCESS,
) -> None:
    """Let a controller that learns variance components observe `half_gradients`, when it asks for them."""
    if isinstance(controller, GDROController) and controller.measures(plan, config.measure_every):
        h = half_gradients(policy, rollouts, rewards_R, plan, config, step, workers)
        controller.observe_gradients(plan, h.prompts_M, h.first_M_D, h.second_M_D, h.correct_M_2, h.trials_M_2)


def half_gradients(
    policy: Policy,
    rollouts: Rollouts,
    rewards_R: np.ndarray,
    plan: Plan,
    config: Config,
    step: int,
    workers: Workers = SINGLE_PROCESS,
    *,
    share: float = SHARE,
    width: int = WIDTH,
) -> HalfGroups:
    """Split groups of the plan and the sketched gradients of their halves at the policy that drew them.

    Args:
        policy: at the weights that sampled.
        rollouts: this process' rows, of whole prompts; `owner_R` holds the plan's rows.
        rewards_R: of all rows of the plan, as the controller observes them; groups with partial credit are left out.
        plan: of the batch.
        config: seed, and `update_tokens` for the memory.
        step: decides, with the seed, which prompts and which sketch.
        workers: the processes; all call this together and get the same answer.
        share: of the plan's rollouts that are run, to the end of the group that reaches it.
        width: of the sketch, which has width^2 numbers a matrix.
    """
    order = np.random.default_rng([config.seed, step, 4]).permutation(np.flatnonzero(plan.counts >= FEWEST))
    prompts_M, correct_M_2, trials_M_2 = _choose(order, plan, rewards_R, rollouts.prompts, share * len(rewards_R))
    owner_R = rollouts.owner_R.cpu().numpy()
    rows: list[int] = []  # of this process' rollouts in halves with a gradient
    halves: list[int] = []
    factors: list[float] = []
    for m, half in np.argwhere((correct_M_2 > 0) & (correct_M_2 < trials_M_2)):
        start, size = half * trials_M_2[m, 0], trials_M_2[m, half]
        mine = np.flatnonzero(owner_R == prompts_M[m])[start : start + size]  # none, if they are another process'
        reward = rewards_R[plan.owner == prompts_M[m]][start : start + size]
        rows.extend(mine)
        halves.extend([2 * m + half] * len(mine))
        factors.extend((reward - reward.mean())[: len(mine)] / (size - 1))  # leave-one-out advantage / h
    sketch = _Sketch(policy, 2 * len(prompts_M), width, [config.seed, step, 5])
    with whole_weights(policy.scorer):
        for part in _parts(rollouts, np.array(rows, dtype=int), config.update_tokens):
            sketch.add(rollouts.select(np.array(rows)[part]), np.array(halves)[part], np.array(factors)[part])
    total = workers.total(sketch.sums.cpu().numpy()).reshape(len(prompts_M), 2, sketch.sums.shape[1])
    return HalfGroups(prompts_M, total[:, 0], total[:, 1], correct_M_2, trials_M_2)


def _choose(
    order: np.ndarray, plan: Plan, rewards_R: np.ndarray, prompts: list[list[int]], most: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts in this order until halves with a gradient have `most` rollouts; right answers and rollouts by half."""
    start_P = np.cumsum(plan.counts) - plan.counts
    chosen, correct, trials, running = [], [], [], 0
    for p in order.tolist():
        reward = rewards_R[start_P[p] : start_P[p] + plan.counts[p]]
        if running >= most:
            break
        if len(prompts[p]) < 2 or not np.isin(reward, (0.0, 1.0)).all():
            continue
        first, second = np.split(reward, [len(reward) // 2])
        chosen.append(p)
        correct.append((first.sum(), second.sum()))
        trials.append((len(first), len(second)))
        running += sum(len(half) for half in (first, second) if np.ptp(half) > 0)
    shapes = ((chosen, (-1,)), (correct, (-1, 2)), (trials, (-1, 2)))
    prompts_M, correct_M_2, trials_M_2 = (np.array(column, dtype=np.int64).reshape(shape) for column, shape in shapes)
    return prompts_M, correct_M_2, trials_M_2


def _parts(rollouts: Rollouts, rows: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Places in `rows`, in order, of at most `budget` padded tokens together: prompts once, completions each."""
    length_P = np.array([len(ids) for ids in rollouts.prompts])
    owner, width = rollouts.owner_R.cpu().numpy()[rows], rollouts.tokens_R_T.shape[1]
    first = 0
    for last in range(1, len(rows) + 1):
        used = np.unique(owner[first : last + 1])
        if last == len(rows) or len(used) * length_P[used].max() + (last + 1 - first) * width > budget:
            yield np.arange(first, last)
            first = last


def signs(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, columns) of +-1 / sqrt(columns)."""
    return np.asarray((2.0 * rng.integers(0, 2, (rows, columns), dtype=np.int8) - 1.0) / columns**0.5)


class _Sketch:
    """Sums of sketched score gradients.

    Args:
        policy: whose.
        size: number of sums.
        width: columns of the sign matrices.
        seed: of these.
    """

    def __init__(self, policy: Policy, size: int, width: int, seed: list[int]) -> None:
        self._policy = policy
        self._modules = _writers(policy)
        rng = np.random.default_rng(seed)

        def matrix(rows: int) -> torch.Tensor:
            return torch.from_numpy(signs(rows, width, rng)).to(policy.device, torch.float32)

        self._sides = [(matrix(module.in_features), matrix(module.out_features)) for module in self._modules]
        numbers = sum(inputs.shape[1] * outputs.shape[1] for inputs, outputs in self._sides)
        self.sums = torch.zeros(size, numbers, dtype=torch.float64, device=policy.device)

    def add(self, rollouts: Rollouts, places_R: np.ndarray, factors_R: np.ndarray) -> None:
        """Add factor x sketch of each rollout to a sum. The graph begins at the last block."""
        device = self._policy.device
        owner, tokens, mask = (x.to(device) for x in (rollouts.owner_R, rollouts.tokens_R_T, rollouts.mask_R_T))
        width = int(mask.sum(-1).max())
        factors = torch.from_numpy(factors_R).to(device, torch.float32)
        sketches = []
        gradients = score_gradients(
            self._policy, self._modules, rollouts.prompts, owner, tokens[:, :width], mask[:, :width]
        )
        for (inputs, outputs), (x_R_T_I, d_R_T_O) in zip(self._sides, gradients, strict=True):
            left, right = d_R_T_O @ outputs, x_R_T_I @ inputs
            sketches.append(torch.einsum("r,rti,rtj->rij", factors, left, right).flatten(1))
        self.sums.index_add_(0, torch.from_numpy(places_R).to(device), torch.cat(sketches, dim=1).double())


def _writers(policy: Policy) -> list[nn.Linear]:
    """The matrices of the last block that write into the residual stream; with adapters, those beneath them."""
    block = decoder_layers(policy.working)[-1]
    found = [
        getattr(module, "base_layer", module)
        for name, module in block.named_modules()
        if name.endswith(("self_attn.o_proj", "mlp.down_proj"))
    ]
    if not found:
        raise UsageError(
            f"measure_every must be 0 for {type(policy.model).__name__}: its last block has no matrices named "
            "self_attn.o_proj and mlp.down_proj"
        )
    return found


def score_gradients(
    policy: Policy,
    modules: list[nn.Linear],
    prompts: list[list[int]],
    owner_R: torch.Tensor,
    tokens_R_T: torch.Tensor,
    mask_R_T: torch.Tensor,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each module of the last block, its inputs and the gradients of the rollouts' log-probabilities at its outputs.

    Args:
        policy: the model.
        modules: of its last block, each of which acts on one position at a time.
        prompts: P prompts of at least 2 tokens.
        owner_R: (R,) row of the prompt of each completion.
        tokens_R_T: (R, T) completions, padded on the right.
        mask_R_T: (R, T) 1 at completion tokens.

    Returns:
        Per module float32 (R, T, inputs) and (R, T, outputs), at the position that predicts token t; gradients are 0 at
        padding. The gradient of rollout r by the module's weight is the sum over t of outputs x inputs.
    """
    model = policy.working
    kept: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.no_grad():
        out, mask_P_T = run_prompts(model, [ids[:-1] for ids in prompts])
        cache = out.past_key_values
        cache.batch_select_indices(owner_R)
        last_P = torch.tensor([ids[-1] for ids in prompts], device=owner_R.device)
        tokens = torch.cat([last_P[owner_R][:, None], tokens_R_T[:, :-1]], dim=1)
        seen = torch.cat(
            [mask_P_T[owner_R], torch.ones_like(tokens[:, :1]), mask_R_T[:, :-1].to(mask_P_T.dtype)], dim=1
        )
        with _recorded(decoder_layers(model)[-1], modules, kept):
            hidden = model.base_model(
                input_ids=tokens,
                attention_mask=seen,
                position_ids=positions(seen)[:, mask_P_T.shape[1] :],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        with torch.enable_grad():
            total = policy.scorer.read(hidden[mask_R_T.bool()], tokens_R_T, mask_R_T)[0].sum()
    gradients = torch.autograd.grad(total, [kept[module][1] for module in modules])
    return [(kept[module][0].float(), gradient.float()) for module, gradient in zip(modules, gradients, strict=True)]


@contextmanager
def _recorded(
    block: nn.Module, modules: list[nn.Linear], kept: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """Keep inputs and outputs of modules; the graph begins at the block."""

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not output.requires_grad:  # a frozen weight
            output.requires_grad_()
        kept[module] = (inputs[0].detach(), output)

    def begin(*_: Any) -> None:
        torch.set_grad_enabled(True)

    hooks = [block.register_forward_pre_hook(begin), *(module.register_forward_hook(keep) for module in modules)]
    try:
        yield
    finally:
        torch.set_grad_enabled(False)
        for hook in hooks:
            hook.remove()
