"""One Ray, TransferQueue and set of agent loop workers for all tests of the adapter for verl."""

import json
import shutil
from pathlib import Path

import pytest
import ray
import transfer_queue as tq
from omegaconf import OmegaConf
from on_cpu import ASSETS, REWARD, OnCPU, Server, configuration
from transformers import AutoTokenizer
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.workers.rollout.llm_server import GlobalRequestLoadBalancer, LLMServerClient


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tiny Qwen3 with a tokenizer as verl needs it (a chat template, an end of turn) and a reward function."""
    folder = tmp_path_factory.mktemp("verl")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    tokenizer.add_tokens(["\n", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(ASSETS / name, folder / "model")
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture
def configure(folder, tmp_path):
    """`configuration` of a run in tmp_path, by overrides."""
    return lambda *overrides, **data: configuration(folder, tmp_path, *overrides, **data)


@pytest.fixture(scope="session")
def fit(folder, tmp_path_factory):
    """Function: (trainer, its log) of a configuration, with a real TransferQueue in a Ray of 16 logical CPUs."""
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    config = configuration(folder, tmp_path_factory.mktemp("engine"))
    rewards = RewardLoopManager(config=config)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokens = [tokenizer.convert_tokens_to_ids(text) for text in ("1", "0", "-", "*", tokenizer.eos_token)]

    balancer = ray.remote(GlobalRequestLoadBalancer).remote({"server": Server.remote(*tokens)})
    manager = AgentLoopManagerTQ.create(
        config=config,
        llm_client=LLMServerClient(config, balancer),
        reward_loop_worker_handles=rewards.reward_loop_worker_handles,
    )

    def train(config):
        for partition, keys in (tq.kv_list() or {}).items():
            if keys:  # of a run that was refused half-way
                tq.kv_clear(keys=list(keys), partition_id=partition)
        log = Path(config.trainer.default_local_dir).with_suffix(".jsonl")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VERL_FILE_LOGGER_PATH", str(log))
            trainer = OnCPU(config, rewards)
            trainer.init()
            trainer.fit(manager)
            trainer.logger.finish()
        return trainer, [json.loads(line)["data"] for line in log.read_text().splitlines()]

    yield train
    tq.close()
    ray.shutdown()
