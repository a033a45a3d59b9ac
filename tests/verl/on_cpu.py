"""verl's own trainer on a CPU: everything real but the two pieces that need a GPU.

Real: the configuration (hydra), data set and data loader, agent loops in Ray workers, load balancer, reward loop with a
custom reward function, TransferQueue, replay buffer, batch balancing and padding, GRPO advantages, metrics, logging,
checkpoints of step and data loader, and `fit`. Replaced:

- the vLLM/SGLang server, by the Ray actor `Server`, which answers right in a known share of the calls for a prompt;
- the actor's worker group (FSDP/Megatron with NCCL) and the transfer of its weights, by `Actor` and `Weights`, which
  write made-up log-probabilities to TransferQueue and keep what they are given to train on.
"""

import uuid
from collections import Counter
from pathlib import Path

import pandas
import ray
import torch
import transfer_queue as tq
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.single_controller.ray import ResourcePoolManager
from verl.utils import tensordict_utils
from verl.workers.rollout.replica import TokenOutput

import gdro_llm
from gdro_llm.integrations.verl import GDROTrainer

ASSETS = Path(gdro_llm.__file__).parent / "assets" / "quickstart"
REWARD = """
from itertools import count

places = {}


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    if "verdicts" in extra_info:  # of the first, second, ... rollout of a prompt in a run
        place = places.setdefault((extra_info["run"], data_source, extra_info["index"]), count())
        return float(extra_info["verdicts"][next(place)])
    right = "1" in solution_str
    return {"score": 1.0 if right else float(ground_truth), "acc": right}
"""


@ray.remote
class Server:
    """Stands in for a vLLM server.

    Call k for a prompt is right if floor((k + 1) p) > floor(k p), with p = 0, 1/4, ..., 1 by the prompt's tokens;
    of prompts that begin with `often` all calls but the first fail, of those with `once` the second.
    """

    def __init__(self, right: int, wrong: int, often: int, once: int, end: int) -> None:
        self.right, self.wrong, self.often, self.once, self.end = right, wrong, often, once, end
        self.calls: Counter[tuple[int, ...]] = Counter()

    async def generate(self, request_id, prompt_ids, sampling_params, **kwargs):
        prompt = tuple(prompt_ids)
        k, kind = self.calls[prompt], sum(prompt) % 5
        self.calls[prompt] += 1
        if (k and prompt[0] == self.often) or (k == 1 and prompt[0] == self.once):
            raise RuntimeError("a tool broke")
        token = self.right if (k + 1) * kind // 4 > k * kind // 4 else self.wrong
        answer = [token] * (1 + k % 3) + [self.end]  # of ragged lengths
        return TokenOutput(token_ids=answer, log_probs=[-0.5] * len(answer), extra_fields={"global_steps": 0})


class Actor:
    """Stands in for the worker group of the actor, two data-parallel ranks."""

    def __init__(self) -> None:
        self._dispatch_info = {"actor": [0, 1]}
        self.trained, self.saved, self.loaded = [], [], []

    def compute_log_prob(self, batch):
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["input_ids"])
        made_up = [torch.full((len(row),), -0.5) for row in data["input_ids"].unbind()]
        nested = torch.nested.as_nested_tensor(made_up, layout=torch.jagged)
        fields = tensordict_utils.get_tensordict({"log_probs": nested, "entropy": nested.clone()})
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def update_actor(self, batch):
        fields = ["advantages", "returns", "rm_scores", "data_source", "extra_info"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        self.trained.append((list(batch.keys), list(batch.tags), data))
        return {"metrics": {"mfu": 0.0, "grad_norm": 1.0}}

    def save_checkpoint(self, path, *args, **kwargs):
        self.saved.append(path)

    def load_checkpoint(self, local_path, **kwargs):
        self.loaded.append(local_path)


class Weights:
    """Stands in for the manager that carries the weights from actor to server."""

    def sleep_replicas(self): ...

    def update_weights(self, *args): ...


class OnCPU(GDROTrainer):
    """The trainer with the stand-ins, which keeps a record of what it submits and observes."""

    def __init__(self, config, rewards=None):
        self.rewards, self.submitted, self.plans = rewards, [], []
        super().__init__(config)
        observe = self.controller.observe

        def record(plan, observation):
            self.plans.append(plan)
            return observe(plan, observation)

        self.controller.observe = record

    def _setup(self):  # as PPOTrainer._setup, without worker groups and servers
        self._init_tokenizer()
        self._init_dataloader()
        self._init_dump_executor()
        self.resource_pool_manager = ResourcePoolManager(resource_pool_spec={"global_pool": [1]}, mapping={})
        self.actor_rollout_wg, self.checkpoint_manager = Actor(), Weights()
        self.reward_loop_manager = self.rewards
        self.replay_buffer.poll_interval = 0.05  # [s]
        self._load_checkpoint()

    def _submit_batch_to_rollout(self, batch):
        names = [f"{s}/{i.get('index')}" for s, i in zip(batch["data_source"], batch["extra_info"], strict=True)]
        self.submitted.append(dict(zip(batch["uid"], names, strict=True)))
        return super()._submit_batch_to_rollout(batch)


def configuration(folder, out, *overrides, rows=None, index=lambda row: {"index": row % 8}, wrong=0, often=(), once=()):
    """verl's configuration of a run on 16 prompts from two sources, 4 a batch.

    Args:
        rows: other data.
        index: what extra_info holds of a row.
        wrong: reward of a wrong answer.
        often, once: rows of prompts that begin so that the server fails.
    """
    rows = rows or [
        {
            "data_source": "easy" if row < 8 else "hard",
            "prompt": [
                {"role": "user", "content": f"{'-' if row in often else '*' if row in once else ''}{row:02d}+{row % 7}"}
            ],
            "reward_model": {"style": "rule", "ground_truth": str(wrong)},
            "extra_info": {"split": "train", **index(row)},
        }
        for row in range(16)
    ]
    data = str(out / f"{uuid.uuid4().hex}.parquet")
    pandas.DataFrame(rows).to_parquet(data)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            [
                "trainer.v1.trainer_mode=gdro_sync",
                "algorithm.adv_estimator=grpo",
                "critic.enable=False",
                f"data.train_files={data}",
                f"data.val_files={data}",
                "data.train_batch_size=4",
                "data.max_prompt_length=16",
                "data.max_response_length=8",
                "data.dataloader_num_workers=0",
                f"actor_rollout_ref.model.path={folder / 'model'}",
                "actor_rollout_ref.rollout.name=vllm",
                "actor_rollout_ref.rollout.n=4",
                "actor_rollout_ref.rollout.agent.num_workers=2",
                "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                "reward.num_workers=1",
                f"reward.custom_reward_function.path={folder / 'reward.py'}",
                f"trainer.default_local_dir={out / 'checkpoints'}",
                "trainer.logger=[file]",
                "trainer.val_before_train=False",
                "trainer.total_training_steps=3",
                "trainer.save_freq=1",
                *overrides,
            ],
        )
    OmegaConf.resolve(config)
    return config
