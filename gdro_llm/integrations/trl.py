r"""TRL's GRPOTrainer under a controller: `GDROTrainer` wraps four of its methods and copies none.

A generation batch of TRL is N prompts x n_bar rows (`num_generations`), split over the processes. For each batch, on
every process:

1. The N ids are gathered, the controller plans, and the same N n_bar row slots are assigned anew, `plan.counts[i]` to
   prompt i with all its columns (none where it is 0). TRL then samples, grades and measures lengths row by row, and
   never sees the counts.
2. TRL's own advantages assume n_bar rows a prompt. They are replaced by those of the ragged groups, times the factor
   of the own loop (`losses.rollout_scale`: the prompt's weight). For every loss of TRL that is the
   same as a factor on the row's policy loss; a KL or entropy term stays unweighted.
3. The controller observes the gathered rewards, unweighted, and its metrics go to TRL's log under the own loop's
   names, with `gdro/` before them: `gdro/bin_error/bin00`.

`scale_rewards="group"` divides by the population standard deviation, like the own loop, and by the constant
sqrt(n_bar / (n_bar - 1)): groups of n_bar rows keep TRL's scale (it has n - 1 in its deviation), so that learning rates
mean the same, and n enters by w_n(p) alone (`gdro_core.gradient_weight`), which n - 1 in each group would change.
Without a game (`GDROController.uniform`) nothing is replaced: the losses are those of GRPOTrainer, to the bit.

The controller's memory is saved in each checkpoint, `gdro_controller.json`. A generation batch lives in no checkpoint,
so that a run resumes from between two of them only. Departs from TRL: a run resumed in a later epoch goes on in that
epoch's order; TRL starts over with the first epoch's.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from trl import GRPOTrainer

from gdro_core import GDROController, Observation, Plan, PublishedController
from gdro_llm.config import UsageError
from gdro_llm.training.losses import group_advantages, rollout_scale
from gdro_llm.training.tracking import flatten

TESTED = "1.16.0"  # with transformers 5.19, accelerate 1.15, torch 2.13; one and two processes
ID = "prompt_id"
STATE = "gdro_controller.json"

Rows = list[dict[str, Any]]


def add_prompt_ids(
    dataset: Dataset | IterableDataset, source: str, columns: Sequence[str] = ("prompt",)
) -> Dataset | IterableDataset:
    """The data set with a column `prompt_id`: `source`, "/" and a hash of the content, as the own loop names problems.

    Args:
        dataset: a `Dataset`, or an `IterableDataset`, where repetitions are noticed only within a batch.
        source: where the prompts come from; keeps sets that are concatenated afterwards apart.
        columns: what makes a prompt what it is; texts, or conversations and other JSON. Pictures need ids of your own.

    Raises:
        UsageError: a column is missing or no JSON, the ids are present already, or a prompt occurs twice.
    """
    known = dataset.column_names
    if known is not None:
        if ID in known:
            raise UsageError(f"dataset has a column {ID!r} already; remove it first: dataset.remove_columns({ID!r})")
        for column in columns:
            if column not in known:
                raise UsageError(f"columns must be among the dataset's {', '.join(known)}, got {column!r}")

    def name(row: dict[str, Any]) -> str:
        values = [row[column] for column in columns]
        try:
            texts = [v if isinstance(v, str) else json.dumps(v, sort_keys=True, ensure_ascii=False) for v in values]
        except TypeError as error:
            raise UsageError(f"columns must hold texts or JSON ({error}); add a column {ID!r} of your own") from error
        content = "\0".join(texts)
        return f"{source}/{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda row: {ID: name(row)})
    first: dict[str, int] = {}
    for i, row in enumerate(dataset.select_columns(list(columns))):
        if (other := first.setdefault(name(row), i)) != i:
            raise UsageError(
                f"dataset rows {other} and {i} are the same in {', '.join(columns)}; a prompt has one difficulty, so "
                "keep one of them, or name in columns what distinguishes them"
            )
    return dataset.add_column(ID, list(first))


@dataclass
class _PlannedBatch:
    """A generation batch between its plan and its rewards."""

    plan: Plan
    rows: slice  # this process' part of plan.owner
    rewards_R_F: torch.Tensor | None = None  # of all processes and reward functions


class GDROTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is not installed everywhere: types do not depend on it
    """`GRPOTrainer` whose prompts have weights and numbers of rollouts.

    Args:
        positional, named: GRPOTrainer's arguments. `args` is required, with `num_generations` = n_bar, and the training
            data need a column `prompt_id` (`add_prompt_ids`), with each prompt once.
        controller: decides; not a published one, whose games need the losses of the update. It plans the prompts of
            TRL's batch and no further candidates. `GDROController.recommended` passes some over, which then have no
            rows; its `kappa` is the number that it is made with: no gradients are measured here.
        to_unit: (R, F) rewards of all R rollouts by the F reward functions -> (R,) what the controller observes, in
            [0, 1], 1 is correct; NaN where there is no verdict. None takes the rewards of the one function as they are.
            For -1 and 1: `lambda r: (r[:, 0] + 1) / 2`; with several functions: `lambda r: r[:, 0]`. The policy is
            trained on TRL's reward in any case.
        aggregation: a prompt's factor in the loss: `"rollout"`: its weight times its rollouts; `"prompt"`: its weight,
            which `preserve_objective` needs.

    Raises:
        UsageError: at construction or in the step where it shows: what cannot work, with the argument and the remedy.
    """

    def __init__(
        self,
        *positional: Any,
        controller: GDROController,
        to_unit: Callable[[np.ndarray], np.ndarray] | None = None,
        aggregation: str = "rollout",
        **named: Any,
    ) -> None:
        if trl.__version__ != TESTED:
            warnings.warn(
                f"gdro_llm.integrations.trl wraps private methods of TRL and was tested with {TESTED}, this is "
                f"{trl.__version__}: run tests/llm/integrations/test_trl.py, or pip install trl=={TESTED}",
                stacklevel=2,
            )
        given = inspect.signature(GRPOTrainer).bind(*positional, **named).arguments
        for message in _refusals(type(self), given, controller, aggregation):
            raise UsageError(message)
        self.controller, self.to_unit, self.aggregation = controller, to_unit, aggregation
        self._batch: _PlannedBatch | None = None  # while one is made in training
        self._sampler: Any = None  # a streamed data set has none
        super().__init__(*positional, **named)
        if to_unit is None and len(self.reward_funcs) != 1:
            raise UsageError(
                f"to_unit must say which of the {len(self.reward_funcs)} reward functions decides what is correct, "
                "for the first: to_unit=lambda r: r[:, 0]"
            )

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        prompts = self._prompts(inputs)
        plan = self.controller.plan([row[ID] for row in prompts])
        decided = (plan.step, plan.ids, plan.counts.tolist(), plan.weights.tolist())
        if any(other != decided for other in gather_object([decided])):
            raise UsageError("controller must be the same on every process, got different plans; give it one seed")
        start = self.accelerator.process_index * len(inputs)
        batch = self._batch = _PlannedBatch(plan, slice(start, start + len(inputs)))
        try:
            output = super()._generate_and_score_completions([dict(prompts[p]) for p in plan.owner[batch.rows]])
        finally:
            self._batch = None
        if batch.rewards_R_F is None:
            raise RuntimeError(f"TRL {trl.__version__} did not ask _calculate_rewards for the rewards of a batch")
        rewards_R_F = batch.rewards_R_F.double().cpu().numpy()
        weights_F = self.reward_weights.double().cpu().numpy()
        rewards_R = np.where(np.isnan(rewards_R_F).all(1), np.nan, np.nansum(rewards_R_F * weights_F, axis=1))
        self._check_values(rewards_R)
        observation = self._observation(plan, rewards_R_F)
        if self.controller.prompt is not None or self.controller.rollout is not None:
            advantages_R = ragged_advantages(rewards_R, plan, self.scale_rewards)
            weighted_R = advantages_R * rollout_scale(plan.weights, plan.counts, plan.owner, self.aggregation)
            output["advantages"] = torch.from_numpy(weighted_R[batch.rows]).to(output["advantages"])
            self._logs["advantages"].extend(weighted_R.tolist())  # in place of TRL's own, which drop out
            same = np.bincount(plan.owner, weights=advantages_R != 0)[plan.owner] == 0
            self._metrics["train"]["frac_reward_zero_std"][-1] = float(same.mean())
        metrics = {**_means(observation), **self.controller.observe(plan, observation)}
        for name, value in flatten({"gdro": metrics}).items():
            self._metrics["train"][name].append(value)
        return output

    def _calculate_rewards(self, inputs: Rows, *others: Any, **named: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, *others, **named)
        if (batch := self._batch) is not None:
            expected = [batch.plan.ids[p] for p in batch.plan.owner[batch.rows]]
            shape = (len(batch.plan.owner), len(self.reward_funcs))
            if [row[ID] for row in inputs] != expected or rewards.shape != shape:
                raise RuntimeError(f"TRL {trl.__version__} graded other rows than were planned; use TRL {TESTED}")
            batch.rewards_R_F = rewards
        return rewards

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, *others: Any, **named: Any
    ) -> Any:
        """One completion a row: vLLM's server takes every `num_generations`-th row's prompt for a whole group."""
        if self._batch is not None and (self._batch.plan.counts != num_generations).any():
            num_generations = 1
        return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, *others, **named)

    def _prompts(self, rows: Rows) -> Rows:
        """The first row of every group of `num_generations`, of all processes; groups may lie across processes."""
        size, first = self.num_generations, self.accelerator.process_index * len(rows)
        ids = gather_object([row.get(ID) for row in rows])
        if wrong := [x for x in ids if not isinstance(x, str | int)]:
            raise UsageError(
                f"train_dataset needs a column {ID!r} of texts or whole numbers, got {wrong[0]!r} in a row with the "
                f"columns {', '.join(rows[0])}: add_prompt_ids(dataset, source=NAME)"
            )
        if len(ids) != self.args.generation_batch_size or any(x != ids[j - j % size] for j, x in enumerate(ids)):
            raise UsageError(
                f"a generation batch must hold each prompt on num_generations = {size} successive rows, as TRL's "
                "sampler yields them; use no other sampler, collator or dispatch_batches"
            )
        return list(gather_object([row for j, row in enumerate(rows, start=first) if j % size == 0]))

    def _check_values(self, rewards_R: np.ndarray) -> None:
        if self.controller.preserve_objective and (np.isnan(rewards_R).any() or np.unique(rewards_R).size > 2):
            raise UsageError(
                "reward_funcs must give every rollout one of two values with preserve_objective, got "
                f"{np.unique(rewards_R)[:4]}; switch preserve_objective off, or grade right and wrong only"
            )

    def _observation(self, plan: Plan, rewards_R_F: np.ndarray) -> Observation:
        unit_R = rewards_R_F[:, 0] if self.to_unit is None else np.asarray(self.to_unit(rewards_R_F.copy()), float)
        if unit_R.shape != plan.owner.shape:
            raise UsageError(f"to_unit must give one number for each of {plan.owner.size} rollouts, got {unit_R.shape}")
        graded = ~np.isnan(unit_R)
        if outside := unit_R[graded][(unit_R[graded] < 0) | (unit_R[graded] > 1)].tolist():
            raise UsageError(
                f"rewards must lie in [0, 1] for the controller, got {outside[0]:g}; say how to map them by to_unit, "
                "for -1 and 1: to_unit=lambda r: (r[:, 0] + 1) / 2"
            )
        return Observation.of(plan, unit_R[graded], rows=np.flatnonzero(graded))

    def _get_train_sampler(self, *others: Any, **named: Any) -> Any:
        self._sampler = super()._get_train_sampler(*others, **named)
        return self._sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            left = -self._step % (self.args.steps_per_generation * self.num_iterations)
            _write(folder / STATE, {"version": 1, "left": left, "controller": self.controller.state_dict()})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        if not path.is_file():
            raise UsageError(
                f"resume_from_checkpoint must name a checkpoint of GDROTrainer, {checkpoint} has no {STATE}: take an "
                "earlier one, or give it as model to start a run of its own"
            )
        saved = json.loads(path.read_bytes())
        if saved["left"]:
            raise UsageError(
                f"resume_from_checkpoint must lie between two generation batches, {checkpoint} lies inside one with "
                f"{saved['left']} of its micro-batches left, which no checkpoint holds: take an earlier one"
            )
        self.controller.load_state_dict(saved["controller"])
        if getattr(self._sampler, "shuffle", False):  # it draws an order at the start of every epoch
            for _ in range(int(self.state.epoch)):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)


def ragged_advantages(rewards_R: np.ndarray, plan: Plan, scale_rewards: str) -> np.ndarray:
    """Unweighted advantages of ragged groups by TRL's `scale_rewards`.

    Args:
        rewards_R: (R,) in plan order; NaN where no function graded: advantage 0, and no part in mean and deviation.
        plan: decides the groups.
        scale_rewards: `"group"`, `"batch"` or `"none"`.

    Returns:
        (R,) advantages; they sum to zero in every group.
    """
    scored = ~np.isnan(rewards_R)
    advantages_R = group_advantages(
        np.where(scored, rewards_R, 0.0), plan.owner, scale=scale_rewards == "group", included_R=scored
    )
    if scale_rewards == "group":
        mean_rollouts = float(plan.counts.mean())
        return advantages_R * math.sqrt((mean_rollouts - 1) / mean_rollouts)
    if scale_rewards == "batch" and advantages_R.any():
        return np.asarray(advantages_R / (np.std(rewards_R[scored], ddof=1) + 1e-4))
    return advantages_R


def _refusals(
    kind: type, given: dict[str, Any], controller: GDROController | PublishedController, aggregation: str
) -> Iterator[str]:
    """What cannot work, seen before anything is loaded."""
    args, dataset = given.get("args"), given.get("train_dataset")
    mean = controller.mean_rollouts
    if args is None:
        yield f"args must be a GRPOConfig, with num_generations={mean:g}, got None"
        return
    if isinstance(controller, PublishedController):
        yield (
            "controller must not be a published one: its games need losses of the update, which TRL does not pass on; "
            "use GDROController.recommended, or the own loop (gdro train --controller published-prompt)"
        )
        return
    if args.num_generations != mean:
        yield f"num_generations must be the controller's mean_rollouts = {mean:g}, got {args.num_generations}"
    if controller.pilot != 0:
        yield f"pilot must be 0, got {controller.pilot}: TRL draws all rollouts of a batch before it grades one"
    game = controller.rollout
    if game is not None and game.min_rollouts == 1:
        yield "min_rollouts must be at least 2, or 0, got 1: a rollout alone in its group teaches nothing"
    if controller.tokens is not None:
        yield "controller must have no budget of tokens: TRL's batch has num_generations rows a prompt, in all"
    if given.get("rollout_func") is not None:
        yield "rollout_func must be None: it decides the rows itself, so that counts cannot reach it"
    for method in ("_get_train_sampler", "get_train_dataloader"):
        if getattr(kind, method) is not getattr(GDROTrainer, method):
            yield f"{kind.__name__} must not override {method}: counts replace the rows of TRL's own sampler"
    if args.multi_objective_aggregation != "sum_then_normalize":
        yield (
            "multi_objective_aggregation must be 'sum_then_normalize', got "
            f"{args.multi_objective_aggregation!r}: that one is not defined for groups of different sizes"
        )
    if args.scale_rewards not in ("group", "batch", "none"):
        yield f"scale_rewards must be 'group', 'batch' or 'none', got {args.scale_rewards!r}"
    if aggregation not in ("rollout", "prompt"):
        yield f"aggregation must be 'rollout' or 'prompt', got {aggregation!r}"
    kept = (aggregation, args.scale_rewards, args.mask_truncated_completions, args.beta, args.num_iterations)
    if controller.preserve_objective and kept != ("prompt", "group", False, 0.0, 1):
        yield (
            "preserve_objective needs aggregation 'prompt', scale_rewards 'group', mask_truncated_completions False, "
            f"beta 0, num_iterations 1: else it is not preserved, got {', '.join(map(str, kept))}"
        )
    if args.remove_unused_columns:
        yield f"remove_unused_columns must be False: it removes the column {ID!r}"
    if dataset is None:
        yield f"train_dataset must be given, with a column {ID!r}: the controller knows prompts by it"
    elif dataset.column_names is not None and ID not in dataset.column_names:
        yield (
            f"train_dataset needs a column {ID!r}, got {', '.join(dataset.column_names)}: "
            "add_prompt_ids(dataset, source=NAME) adds it"
        )
    micro_batches = args.steps_per_generation * args.num_iterations
    period = micro_batches // math.gcd(micro_batches, args.gradient_accumulation_steps)
    name = {"steps": "save_steps", "best": "eval_steps"}.get(args.save_strategy)
    if name is not None and (steps := getattr(args, name)) is not None and steps % period:
        yield (
            f"{name} must be a multiple of {period}, got {steps}: a checkpoint inside a generation batch "
            "(steps_per_generation x num_iterations micro-batches) cannot be resumed"
        )


def _means(observation: Observation) -> dict[str, float]:
    """Mean reward with every prompt once, however many rollouts it got; and the same under the weights."""
    graded = observation.trials > 0
    if not graded.any():
        return {}
    mean_P, weights_P = (observation.correct[graded] / observation.trials[graded]), observation.plan.weights[graded]
    return {"reward": float(mean_P.mean()), "weighted_reward": float(np.average(mean_P, weights=weights_P))}


def _write(path: Path, state: dict[str, Any]) -> None:
    """A JSON file, whole or absent, also after a power cut."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(state, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
