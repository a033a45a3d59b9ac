"""Two gloo processes on the CPU, sharded by FSDP2, do what one process does: the same rollouts, assigned to two."""

import os
import socket
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import literal
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from gdro_core import Plan
from gdro_llm.config import Config, UsageError
from gdro_llm.engine.policy import Policy, load_policy
from gdro_llm.engine.rollouts import Rollouts
from gdro_llm.engine.workers import (
    GROUP_TIMEOUT,
    SINGLE_PROCESS,
    Workers,
    full,
    is_first_failure,
    start_workers,
    stop_workers,
    whole_weights,
)
from gdro_llm.training.batch import Batch
from gdro_llm.training.components import HalfGroups, half_gradients
from gdro_llm.training.losses import group_advantages, rollout_scale
from gdro_llm.training.optimizer_state import load_optimizer_state, optimizer_state
from gdro_llm.training.update import build_optimizer, update

PROMPTS = [*literal.PROMPTS, "r123="]
COUNTS = np.array([2, 5, 3, 4, 7, 3])
WEIGHTS = np.array([0.4, 1.7, 1.0, 0.2, 1.1, 3.0])
OWNER = np.repeat(np.arange(6), COUNTS)
REWARDS = np.random.default_rng(3).integers(0, 2, OWNER.size).astype(float)
ONE_PROMPT = np.where(OWNER == 4, REWARDS, 1.0)  # only the largest group has a signal: one process has none

CASES = {
    "dapo": ({}, REWARDS),
    "grpo": ({"loss": "grpo", "gradient_checkpointing": True}, REWARDS),
    "one-prompt": ({"minibatches": 2}, ONE_PROMPT),
    "all-options": (
        {"passes": 2, "minibatches": 3, "importance_cap": 2.0, "kl_coef": 0.1, "trainable_layers": 1},
        REWARDS,
    ),
    "bfloat16": ({"dtype": "bfloat16", "gradient_checkpointing": True}, REWARDS),
    "lora-bfloat16": ({"lora_rank": 2, "dtype": "bfloat16"}, REWARDS),
    "lora": ({"lora_rank": 2, "kl_coef": 0.1}, REWARDS),
}


def part(rollouts: Rollouts, rows: np.ndarray) -> Rollouts:
    """Some rows of them all."""
    chosen = {
        field.name: value[torch.from_numpy(rows)]
        for field in fields(rollouts)
        if isinstance(value := getattr(rollouts, field.name), torch.Tensor)
    }
    return replace(rollouts, texts=[rollouts.texts[r] for r in rows], **chosen)


def two_steps(config: Config, rewards: np.ndarray, rollouts: Rollouts, workers: Workers, folder: Path) -> dict:
    """All that two updates leave: what they return, gradients, weights, the optimizer; then a resumed third update."""
    policy = load_policy(config, workers=workers)
    optimizer = build_optimizer(policy, config)
    rows = workers.assign(COUNTS, config.minibatches)
    mine = part(rollouts, rows)
    advantages = group_advantages(rewards, OWNER, scale=True)[rows]
    scale = rollout_scale(WEIGHTS, COUNTS, OWNER, "prompt")[rows]
    batch = Batch(mine, advantages, scale, np.ones(len(rows), bool))

    def step(policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[np.ndarray, dict[str, float]]:
        return update(policy, optimizer, batch, config, workers)

    results: dict = {"gradients": {}}

    def keep_gradients(*_) -> None:
        named = policy.model.named_parameters()
        results["gradients"] |= {name: full(p.grad).clone() for name, p in named if p.grad is not None}

    results["measured"] = measured(policy, mine, config, workers)
    hook = optimizer.register_step_pre_hook(keep_gradients)
    results["first"] = step(policy, optimizer)
    hook.remove()
    results["second"] = step(policy, optimizer)
    results["weights"] = {name: weight.clone() for name, weight in policy.named_weights()}
    results["optimizer"] = deepcopy(optimizer_state(optimizer, policy.model.named_parameters(), workers.rank == 0))
    policy.save(folder)
    if workers.rank == 0:
        save_file(results["optimizer"], folder / "optimizer.safetensors")
    workers.barrier()
    results["third"] = step(policy, optimizer)
    again = load_policy(config, folder, workers)
    optimizer = build_optimizer(again, config)
    load_optimizer_state(optimizer, again.model.named_parameters(), load_file(folder / "optimizer.safetensors"))
    results["third again"] = step(again, optimizer)
    results["resumed"] = max(float((a - b).abs().max()) for a, b in zip(each(policy), each(again), strict=True))
    return results


def measured(policy: Policy, rollouts: Rollouts, config: Config, workers: Workers) -> HalfGroups:
    """Halves of all groups of at least 4 rollouts, in micro-batches of one prompt."""
    plan = Plan(tuple(range(6)), np.zeros(6, int), WEIGHTS, COUNTS, 0.0, 0)
    return half_gradients(policy, rollouts, REWARDS, plan, replace(config, update_tokens=1), 0, workers, share=1.0)


def each(policy: Policy):
    return (weight for _, weight in policy.named_weights())


def child(rank: int, port: int, folder: Path, names: list[str]) -> None:
    """One of two processes."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    workers = start_workers("cpu")
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    results = {}
    for name in names:
        settings, rewards = CASES[name]
        config = Config(**{**inputs["config"], **settings})
        results[name] = two_steps(config, rewards, inputs["rollouts"], workers, folder / f"two-{name}")
    policy = load_policy(Config(**inputs["config"]), workers=workers)
    prompts, counts = literal.prompts(policy), np.full(len(literal.PROMPTS), 1 + 3 * rank)
    with whole_weights(policy.scorer):  # the processes draw different numbers of rows: no lockstep
        results["sampled"] = literal.sample(policy, prompts, counts, 6, seed=rank, rows=4)
    results["after"] = {name: type(weight).__name__ for name, weight in policy.model.named_parameters()}
    rows = np.arange(rank, 5, 2)
    results["exchanged"] = (
        workers.gather(f"process {rank}"),
        workers.total(np.array([1.0, rank])).tolist(),
        workers.collect(rows, [10 * int(r) for r in rows], 5),
    )
    results["timeout"] = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    torch.save(results, folder / f"results-{rank}.pt")
    workers.barrier()
    stop_workers()


def run_both(names: list[str], tiny_config, folder: Path) -> tuple[list[dict], dict, Path]:
    """The results of two processes, by rank, those of one, and where they saved."""
    config = tiny_config(batch_size=6, update_tokens=40, learning_rate=1e-2, mean_rollouts=4)
    policy = load_policy(config)
    rollouts = literal.sample(policy, literal.prompts(policy, PROMPTS), COUNTS, 6, seed=0, rows=100)
    noise = torch.randn(rollouts.logprobs_R_T.shape, generator=torch.Generator().manual_seed(1))
    rollouts.logprobs_R_T = rollouts.logprobs_R_T + 0.1 * noise * rollouts.mask_R_T
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    torch.save({"config": settings, "rollouts": rollouts}, folder / "inputs.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(child, (port, folder, names), nprocs=2)
    two = [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(2)]
    one = {
        name: two_steps(
            replace(config, **CASES[name][0]), CASES[name][1], rollouts, SINGLE_PROCESS, folder / f"one-{name}"
        )
        for name in names
    }
    return two, one, folder


def of_model(folder: Path) -> Callable[..., Config]:
    """As the fixture `tiny_config`, for fixtures of a module."""
    values = {"model": str(folder), "threads": 1, "device": "cpu", "dtype": "float32", "max_new_tokens": 6}
    return lambda **overrides: Config(**{**values, **overrides})


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_model):
    return run_both(["dapo", "grpo", "one-prompt"], of_model(tiny_model), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def both_slow(tmp_path_factory, tiny_model):
    return run_both(
        ["all-options", "lora", "bfloat16", "lora-bfloat16"], of_model(tiny_model), tmp_path_factory.mktemp("two-slow")
    )


def compare(two: list[dict], one: dict, _: Path, name: str) -> None:
    for rank in range(2):
        for step in ("first", "second", "third", "third again"):
            losses, metrics = two[rank][name][step]
            expected_losses, expected = one[name][step]
            np.testing.assert_allclose(losses, expected_losses, rtol=1e-4, atol=1e-5)
            assert metrics.keys() == expected.keys()
            for key in metrics:
                assert metrics[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (step, key)
        assert two[rank][name]["gradients"].keys() == one[name]["gradients"].keys()
        for field in fields(HalfGroups):  # before the first step, on the same weights
            mine, other = (getattr(run[name]["measured"], field.name) for run in (two[rank], one))
            assert other.any()
            np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-5 * abs(other).max(), err_msg=field.name)
        for key in ("gradients", "weights"):
            for weight, expected in one[name][key].items():
                weight_of_two = two[rank][name][key][weight]
                assert (weight_of_two - expected).norm() <= 1e-5 * expected.norm() + 1e-8, (key, weight)
        assert two[rank][name]["resumed"] == 0
    assert not two[1][name]["optimizer"]
    state, expected = two[0][name]["optimizer"], one[name]["optimizer"]
    assert state.keys() == expected.keys()
    for key in expected:
        assert torch.allclose(state[key], expected[key], rtol=1e-3, atol=1e-7), key


@pytest.mark.parametrize("name", ["dapo", "grpo", "one-prompt"])
def test_two_processes_train_like_one(both, name):
    """Losses, metrics, whole gradients, weights and moments after two steps of AdamW; a resumed third step is exact."""
    compare(*both, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all-options", "lora"])
def test_two_processes_train_like_one_with_reference_and_several_steps(both_slow, name):
    compare(*both_slow, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16", "lora-bfloat16"])
def test_two_processes_in_bfloat16_come_near_one(both_slow, name):
    """Casts fall elsewhere (autocast or FSDP), so gradients agree in direction; resuming is exact."""
    (first, _), one, _ = both_slow
    of_two, expected = (
        torch.cat([run[name]["gradients"][key].flatten() for key in sorted(one[name]["gradients"])])
        for run in (first, one)
    )
    assert of_two.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(of_two, expected, dim=0) > 0.98
    assert first[name]["resumed"] == 0
    kinds = {weight.dtype for weight in first[name]["weights"].values()}
    assert kinds == ({torch.float32} if name == "bfloat16" else {torch.float32, torch.bfloat16})


def test_sampling_needs_no_lockstep_and_leaves_the_weights_sharded(both, tiny):
    """Each process draws its own number of rows, the ones that a single process draws with its seed."""
    for rank, results in enumerate(both[0]):
        counts = np.full(len(literal.PROMPTS), 1 + 3 * rank)
        expected = literal.sample(tiny, literal.prompts(tiny), counts, 6, seed=rank, rows=4)
        assert torch.equal(results["sampled"].tokens_R_T, expected.tokens_R_T)
        assert torch.allclose(results["sampled"].logprobs_R_T, expected.logprobs_R_T, atol=1e-5)
        assert set(results["after"].values()) == {"DTensor"}


def test_processes_exchange_objects_sums_and_rows(both):
    """By rank, summed, and in the order of the plan."""
    for results in both[0]:
        assert results["exchanged"] == (["process 0", "process 1"], [2.0, 1.0], [0, 10, 20, 30, 40])


def test_processes_wait_while_one_writes_a_checkpoint(both):
    """Hashing and writing 100 GB takes longer than the ten minutes after which NCCL gives up."""
    assert [results["timeout"] for results in both[0]] == [GROUP_TIMEOUT] * 2
    assert GROUP_TIMEOUT.total_seconds() >= 3600


def test_two_processes_save_what_one_saves(both, tiny_config):
    """The same files, which load as the same model in one process."""
    folder = both[2]
    assert {p.name for p in (folder / "two-dapo").iterdir()} == {p.name for p in (folder / "one-dapo").iterdir()}
    two, one = (load_policy(tiny_config(model=str(folder / f"{n}-dapo"))) for n in ("two", "one"))
    for name, weight in literal.weights(one).items():
        assert (literal.weights(two)[name] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_prompts_are_assigned_whole_and_evenly_in_every_minibatch(size):
    """A partition of the rows; no process is ahead by more than a prompt; no prompt is divided."""
    rng = np.random.default_rng(0)
    for parts in (1, 2, 4):
        counts = rng.integers(2, 13, 24)
        owner = np.repeat(np.arange(24), counts)
        assigned = [Workers(rank, size).assign(counts, parts) for rank in range(size)]
        assert sorted(np.concatenate(assigned).tolist()) == list(range(owner.size))
        assert all((np.diff(rows) > 0).all() for rows in assigned)
        assert sum(len(set(owner[rows])) for rows in assigned) == 24
        for part in range(parts):
            loads = [int((owner[rows] // (24 // parts) == part).sum()) for rows in assigned]
            assert max(loads) - min(loads) <= counts.max()


def test_there_is_a_single_process_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start_workers("cpu") == SINGLE_PROCESS
    assert SINGLE_PROCESS.gather("x") == ["x"]
    assert SINGLE_PROCESS.collect(np.array([1, 0]), ["b", "a"], 2) == ["a", "b"]


def test_a_group_of_others_is_left_alone():
    """vLLM makes one in a process without torchrun; training beside it must not take it down."""
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    stop_workers()
    assert dist.is_initialized()
    if mine:
        dist.destroy_process_group()


def test_one_process_says_why_a_run_ends(monkeypatch):
    """The first one to fail; a single process, or one without a store, always."""
    said = []
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    for size, address in (("2", "127.0.0.1"), ("2", "127.0.0.1"), ("1", "127.0.0.1"), ("2", None)):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("MASTER_ADDR", address) if address else monkeypatch.delenv("MASTER_ADDR")
        is_first_failure.cache_clear()  # as another process
        said.append((is_first_failure(), is_first_failure()))
    is_first_failure.cache_clear()
    assert said == [(True, True), (False, False), (True, True), (True, True)]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for key, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="nproc-per-node"):
        start_workers("cuda")
