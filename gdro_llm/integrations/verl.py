"""The controllers in verl: trainer mode `gdro_sync`, tested with verl 0.9.1.

verl samples, grades and trains; this trainer decides and weights, around two steps of verl's `sync` trainer:

1. before generation: the ids of the batch -> plan -> each prompt's number of rollouts, `__rollout_n__`;
2. after verl's GRPO advantages, which are centred in groups of any size: times the prompt's factor (`rollout_scale`).
   A KL or entropy term stays unweighted. What the controller observes are the rewards, without weights.

`VERL_USE_EXTERNAL_MODULES=gdro_llm.integrations.verl` registers it, or the entry point of the installed package; then

    trainer.v1.trainer_mode=gdro_sync algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8 +gdro.max_rollouts=16

`rollout.n` is the mean number of rollouts, met exactly in every batch; the keys under `gdro` are those of `Settings`.
A budget of tokens is none of them: verl's mini-batches are multiples of `rollout.n` rows, so that another total would
change the number of updates.
`trainer.use_v1` must stay True, its default: verl's legacy trainer ignores all of these keys, `gdro` too.
Rows of `data.train_files` need `data_source` and a unique `extra_info.index`: together they are the prompt's id.

verl divides by a group's sample standard deviation (n - 1), the own loop by the population's (n). The factor turns the
one into the other, times the constant sqrt((n_bar - 1) / n_bar): groups of n_bar keep verl's scale, so that learning
rates mean the same, and n enters by w_n(p) alone (`gdro_core.gradient_weight`). Without a game (`gdro.controller=grpo`)
nothing is replaced: the advantages are verl's to the bit.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
import verl
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.utils import tensordict_utils

from gdro_core import GDROController, Observation, Plan
from gdro_llm.config import UsageError
from gdro_llm.training.checkpoint import write_file
from gdro_llm.training.losses import rollout_scale
from gdro_llm.training.tracking import flatten

TESTED = "0.9.1"  # with transformers 5.10, torch 2.13; without a GPU
MODE = "gdro_sync"
STATE = "gdro_controller.json"  # beside data.pt in verl's checkpoint folder
CONTROLLERS = ("grpo", "recommended", "joint", "joint-prompt", "joint-rollout")

# loss(w A) = w loss(A) for w > 0: weighting the advantage is weighting the sample's loss. Not so: clip_cov and kl_cov
# choose tokens by the size of A, dro has a term without A; of a loss of the user's own it is not known.
LOSSES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "geo_mean", "cispo", "bypass_mode")


@dataclass
class Settings:
    """The key `gdro` of verl's configuration."""

    controller: str = "recommended"  # one of CONTROLLERS; "grpo" is plain GRPO with difficulty in the metrics
    # fewest rollouts a prompt can get, 0 (joint play: then 2) or at least 2: verl makes no advantage of a single one
    min_rollouts: int = 0
    max_rollouts: int = 12  # most rollouts a prompt can get
    num_bins: int = 10  # difficulty bins, equal in pass rate
    kappa: float = 0.5  # of recommended: a prompt's own part of the gradient over the noise of a rollout (not measured)
    verifier_error: float = 0.0  # of recommended: share of the grades that the verifier gets wrong
    seed: int = 0  # decides ties
    metric: str = "reward"  # what is observed: the reward, or an entry of reward_extra_info like "acc"; in [0, 1]
    aggregation: str = "rollout"  # a prompt's factor in the loss: its weight times its rollouts, or ("prompt") without

    @classmethod
    def of(cls, config: DictConfig) -> Settings:
        """Read and check `config.gdro`.

        Raises:
            UsageError: a key that is not a field, or a value of another type or range.
        """
        try:
            settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), config.get("gdro") or {}))
        except OmegaConfBaseException as error:
            known = ", ".join(cls.__dataclass_fields__)
            raise UsageError(f"gdro.{error.full_key}: {error.msg.splitlines()[0]}; the keys are {known}") from error
        assert isinstance(settings, cls)
        for name, value, choices in (
            ("controller", settings.controller, CONTROLLERS),
            ("aggregation", settings.aggregation, ("rollout", "prompt")),
        ):
            if value not in choices:
                raise UsageError(f"gdro.{name} must be one of {', '.join(choices)}, got {value!r}")
        if not 0 <= settings.verifier_error <= 0.49:
            raise UsageError(f"gdro.verifier_error must lie in [0, 0.49], got {settings.verifier_error:g}")
        mean = config.actor_rollout_ref.rollout.n
        if not 2 <= (settings.min_rollouts or 2) <= mean <= settings.max_rollouts:
            raise UsageError(
                "rollouts must satisfy 2 <= gdro.min_rollouts <= actor_rollout_ref.rollout.n <= gdro.max_rollouts, or "
                f"gdro.min_rollouts 0, got {settings.min_rollouts}, {mean} and {settings.max_rollouts}"
            )
        return settings

    def build(self, mean_rollouts: int) -> GDROController:
        """The controller these settings name.

        Raises:
            UsageError: a number out of range.
        """
        try:
            if self.controller == "grpo":
                return GDROController.uniform(mean_rollouts, num_bins=self.num_bins, seed=self.seed)
            shared: dict[str, Any] = {"num_bins": self.num_bins, "seed": self.seed}
            if self.controller == "recommended":
                return GDROController.recommended(
                    mean_rollouts,
                    self.min_rollouts,
                    self.max_rollouts,
                    kappa=self.kappa,
                    error=self.verifier_error,
                    **shared,
                )
            game = self.controller.partition("-")[2]
            return GDROController.joint_play(
                mean_rollouts,
                self.min_rollouts or 2,
                self.max_rollouts,
                prompt=game != "rollout",
                rollout=game != "prompt",
                **shared,
            )
        except ValueError as error:
            raise UsageError(f"gdro: {error}") from error


def refuse(config: DictConfig) -> None:
    """Raise UsageError for settings of verl under which weights or counts would not do what they say."""
    v1, algorithm = config.trainer.v1, config.algorithm
    loss = config.actor_rollout_ref.actor.policy_loss.loss_mode
    for wrong, message in (
        (
            algorithm.adv_estimator != "grpo",
            f"algorithm.adv_estimator must be grpo (advantages within a prompt's group), got {algorithm.adv_estimator}",
        ),
        (
            loss not in LOSSES,
            f"actor_rollout_ref.actor.policy_loss.loss_mode must be one of {', '.join(LOSSES)}, got {loss}: in others "
            "a weighted advantage is not a weighted loss",
        ),
        (
            algorithm.filter_groups.enable,
            "algorithm.filter_groups.enable must be False: the controller has to see the groups it would drop",
        ),
        (
            v1.sampler.sync_refill_failed_groups,
            "trainer.v1.sampler.sync_refill_failed_groups must be False: a batch is planned once, as a whole",
        ),
        (
            v1.sync.get("parameter_sync_step", 1) != 1,
            "trainer.v1.sync.parameter_sync_step must be 1: a plan is observed once, as a whole",
        ),
        (
            v1.sampler.custom_sampler.path is not None,
            "trainer.v1.sampler.custom_sampler must be left out: a batch is observed as it was planned",
        ),
        (
            config.distillation.enabled,
            "distillation.enabled must be False: weights do not reach its loss",
        ),
        (
            config.skip.rollout_tq.enable,
            "skip.rollout_tq.enable must be False: rollouts of a file were not planned",
        ),
    ):
        if wrong:
            raise UsageError(message)


def prompt_ids(sources: Sequence[Any] | None, extra_infos: Sequence[Any] | None) -> list[str]:
    """Stable ids, `data_source/index`, of the prompts of a batch.

    Args:
        sources: (N,) `data_source` of each row, or None if the data have no such column.
        extra_infos: (N,) `extra_info` of each row. verl's own `index` is not used: it is 0 where none was given.

    Raises:
        UsageError: a row lacks `data_source` or `extra_info.index`, or two rows have the same.
    """
    if sources is None or extra_infos is None:
        raise UsageError("rows of data.train_files must have data_source and extra_info.index, which name a prompt")
    row_of: dict[str, int] = {}
    for row, (source, info) in enumerate(zip(sources, extra_infos, strict=True)):
        index = info.get("index") if isinstance(info, Mapping) else None
        if source is None or index is None:
            raise UsageError(
                "rows of data.train_files must have data_source and extra_info.index, which name a prompt, got "
                f"{source!r} and {info!r}; number the rows of each source"
            )
        name = f"{source}/{index}"
        if name in row_of:
            raise UsageError(
                f"data_source and extra_info.index must name one prompt of a batch, got {name!r} twice; number the "
                "rows of each source, drop repeated ones, and leave data.gen_batch_size at data.train_batch_size"
            )
        row_of[name] = row
    return list(row_of)


@dataclass(frozen=True, eq=False)
class Pending:
    """A plan whose rollouts are on the way."""

    plan: Plan
    row_of: Mapping[str, int]  # uid -> prompt row of the plan

    def locate(self, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where TransferQueue's rows belong.

        Args:
            keys: (R,) `uid_session_output`: an agent loop may put several outputs for one rollout, or none.

        Returns:
            owner_R: (R,) prompt rows; rollout_R: (R,) rollouts, as in `plan.owner`; last_R: (R,) bool, the last output
            of its rollout, whose reward is the rollout's.

        Raises:
            RuntimeError: a row that was not planned.
        """
        first = np.cumsum(self.plan.counts) - self.plan.counts
        rows = []
        latest: dict[int, int] = {}
        for key in keys:
            uid, session, output = key.rsplit("_", 2)
            owner = self.row_of.get(uid, -1)
            if owner < 0 or not int(session) < self.plan.counts[owner]:
                raise RuntimeError(f"rollout {key!r} was not planned in this step; is another sampler configured?")
            rollout = int(first[owner]) + int(session)
            rows.append((owner, rollout, int(output)))
            latest[rollout] = max(latest.get(rollout, 0), int(output))
        owner_R, rollout_R, output_R = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        last_R = output_R == np.array([latest[rollout] for rollout in rollout_R.tolist()], dtype=np.int64)
        return owner_R, rollout_R, last_R

    def factors(self, owner_R: np.ndarray, rollout_R: np.ndarray, aggregation: str, *, scaled: bool) -> np.ndarray:
        """(R,) what verl's advantages are multiplied with.

        Departs from verl: 0 for the only survivor of a group whose other rollouts failed, whose "advantage" would be
        its reward.

        Args:
            owner_R: (R,) prompt rows, of `locate`.
            rollout_R: (R,) rollouts, of `locate`.
            aggregation: of `Settings`.
            scaled: whether verl divides by the standard deviation (`algorithm.norm_adv_by_std_in_grpo`).
        """
        factor_R = rollout_scale(self.plan.weights, self.plan.counts, owner_R, aggregation)
        n_R = np.bincount(self.plan.owner[np.unique(rollout_R)], minlength=len(self.plan.ids))[owner_R]
        alone_R = n_R == 1
        if scaled:
            n_bar, n_R = self.plan.counts.mean(), np.where(alone_R, 2, n_R)
            factor_R = factor_R * np.sqrt((n_R / (n_R - 1)) / (n_bar / (n_bar - 1)))
        return np.where(alone_R, 0.0, factor_R)


@register_trainer(MODE)  # type: ignore[misc, untyped-decorator, unused-ignore]
class GDROTrainer(PPOTrainerSync):  # type: ignore[misc, unused-ignore]
    """verl's synchronous trainer with GDRO's plan around it; see the head of this file.

    Raises:
        UsageError: settings that are unknown, out of range, or that this trainer refuses (`refuse`).
    """

    def __init__(self, config: DictConfig) -> None:
        if verl.__version__ != TESTED:
            warnings.warn(
                f"gdro_llm.integrations.verl wraps private methods of verl and was tested with {TESTED}, this is "
                f"{verl.__version__}: run make test-verl with it, or pip install verl=={TESTED}",
                stacklevel=2,
            )
        self.settings = Settings.of(config)
        refuse(config)
        self.controller = self.settings.build(config.actor_rollout_ref.rollout.n)
        self._pending: Pending | None = None
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl branches on this text, also in other processes
        super().__init__(config)

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        sources, infos = (list(batch[key]) if key in batch else None for key in ("data_source", "extra_info"))
        uids = list(batch["uid"])
        if any("_" in uid for uid in uids):
            raise RuntimeError(f"uid must not contain '_', which ends it in verl's keys, got {uids}")
        plan = self.controller.plan(prompt_ids(sources, infos))
        self._pending = Pending(plan, {uid: row for row, uid in enumerate(uids)})
        tensordict_utils.assign_non_tensor_stack(batch, "__rollout_n__", plan.counts.tolist())
        return super()._submit_batch_to_rollout(batch)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        done = super()._compute_advantage(batch, metrics)
        if self._pending is None:
            raise RuntimeError("advantages came before a plan; is another sampler configured?")
        keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
        owner_R, rollout_R, last_R = self._pending.locate(keys)
        source = "rm_scores" if self.settings.metric == "reward" else "extra_fields"
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["advantages", source])
        if self.controller.prompt is not None or self.controller.rollout is not None:
            scaled = self.config.algorithm.norm_adv_by_std_in_grpo
            factor_R = self._pending.factors(owner_R, rollout_R, self.settings.aggregation, scaled=scaled)
            rows = [row * float(factor) for row, factor in zip(data["advantages"].unbind(), factor_R, strict=True)]
            fields = {"advantages": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}
            weighted = TensorDict(fields, batch_size=[len(keys)])
            tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=weighted)

        rewards = np.array([self._reward(row) for row in data[source]])[last_R]
        try:
            observation = Observation.of(self._pending.plan, rewards, rollout_R[last_R])
        except ValueError as error:
            raise UsageError(
                f"gdro.metric={self.settings.metric}: {error}; let the reward function return a dictionary with "
                "a score and, in [0, 1], 'acc', and set gdro.metric=acc"
            ) from error
        learnt = {**self.controller.observe(self._pending.plan, observation), **_rewards(observation)}
        metrics.update(flatten({"gdro": learnt}))
        self._pending = None
        return done

    def _reward(self, row: Any) -> float:
        """The observed reward of one row of `rm_scores` (T,) or `extra_fields`."""
        if isinstance(row, torch.Tensor):
            return float(row.sum())
        info = getattr(row, "data", row).get("reward_extra_info", {})
        if self.settings.metric not in info:
            raise UsageError(
                f"gdro.metric must be 'reward' or what the reward function returns ({', '.join(info) or 'a score'}), "
                f"got {self.settings.metric!r}"
            )
        return float(info[self.settings.metric])

    def _save_checkpoint(self) -> None:
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / STATE, json.dumps(self.controller.state_dict()))  # first: verl's part makes it the latest
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps == 0:
            return
        trainer = self.config.trainer
        if trainer.resume_mode == "resume_path":
            folder = Path(trainer.resume_from_path)
        else:
            folder = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
        if not (folder / STATE).is_file():
            raise UsageError(
                f"{folder} must hold {STATE}, which a run in mode {MODE} writes; to start from the weights of another "
                "run give them as actor_rollout_ref.model.path, with trainer.resume_mode=disable"
            )
        try:
            self.controller.load_state_dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
        except ValueError as error:
            raise UsageError(f"{folder / STATE} is of other settings: {error}") from error


def _rewards(observation: Observation) -> dict[str, float]:
    """As the own loop logs them: every prompt counts once, however many rollouts it got."""
    graded = observation.trials > 0
    mean_P = observation.correct[graded] / observation.trials[graded]
    return {
        "reward": float(mean_P.mean()),
        "weighted_reward": float(np.average(mean_P, weights=observation.plan.weights[graded])),
        "all_correct_share": float((mean_P == 1).mean()),
        "all_wrong_share": float((mean_P == 0).mean()),
        "mixed_share": float(((mean_P > 0) & (mean_P < 1)).mean()),
        "rollouts": float(observation.trials.sum()),
        "missing_rollouts": float((observation.plan.counts - observation.trials).sum()),
    }
