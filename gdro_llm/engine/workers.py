"""Several processes under torchrun: what each one samples and trains, what they exchange, sharded weights.

Every process runs the same program: it draws the same plan, samples and grades the prompts assigned to it, gets
the rewards of all others, and so has the same controller. Only rows are divided, by whole prompts, and weights, by
FSDP2 (`fully_shard`): each decoder layer is gathered when it is used, gradients are reduced in float32.

Sampling has no lockstep (a process stops when its rows have ended), so the weights are gathered once around it
(`whole_weights`) in the format of compute, 2 bytes a parameter with bfloat16, and freed again. The forward passes
are then those of training, and there is no second copy to keep in step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gdro_llm.config import UsageError

GROUP_TIMEOUT = timedelta(hours=4)  # the others wait while the first process writes; torchrun ends them sooner


@dataclass(frozen=True)
class Workers:
    """The processes of a run and this one's rank; every process calls all methods, in the same order."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """The small Python object of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum of an array over the processes, in float64, the same bits everywhere."""
        return np.sum(self.gather(np.asarray(values, np.float64)), axis=0)

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier()

    def assign(self, counts_P: np.ndarray, parts: int = 1) -> np.ndarray:
        """Rows of the plan that this process samples and trains, ascending; the processes' rows are a partition."""
        return self.rows(self.divide(counts_P, parts), counts_P)

    def divide(self, counts_P: np.ndarray, parts: int = 1) -> np.ndarray:
        """The process of each prompt, (P,).

        Whole prompts are assigned, the largest first, each to the process with the fewest rows so far, separately in
        each of `parts` consecutive parts of the prompts with rows (the mini-batches, see `split_prompts`), so that all
        are busy in every one.
        """
        process_P = np.zeros(len(counts_P), int)
        for part in split_prompts(counts_P > 0, parts):
            load = np.zeros(self.size, int)
            for p in part[np.argsort(-counts_P[part], kind="stable")]:
                process_P[p] = np.argmin(load)
                load[process_P[p]] += counts_P[p]
        return process_P

    def rows(self, process_P: np.ndarray, counts_P: np.ndarray) -> np.ndarray:
        """Rows of a plan, ascending, of the prompts of this process."""
        return np.flatnonzero(np.repeat(process_P, counts_P) == self.rank)

    def collect(self, rows: np.ndarray, values: Any, total: int) -> list[Any]:
        """One value for each of all `total` rows of the plan, from every process' own `rows`."""
        collected: list[Any] = [None] * total
        for their_rows, their_values in self.gather((rows.tolist(), list(values))):
            for row, value in zip(their_rows, their_values, strict=True):
                collected[row] = value
        return collected


SINGLE_PROCESS = Workers()


def split_prompts(drawn_P: np.ndarray, parts: int) -> list[np.ndarray]:
    """The prompts that have rollouts, in consecutive parts, equal but for one prompt.

    >>> split_prompts(np.array([True, False, True, True, True]), 2)
    [array([0, 2]), array([3, 4])]
    """
    return np.array_split(np.flatnonzero(drawn_P), parts)


def start_workers(device: str) -> Workers:
    """This process among those that torchrun started; a single one without torchrun.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL; one GPU a process).
    """
    if "WORLD_SIZE" not in os.environ:
        return Workers()
    rank, size, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if size == 1:
        return Workers()
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"torchrun started a process {local}, but this machine has {torch.cuda.device_count()} GPUs; "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=GROUP_TIMEOUT)
    return Workers(rank, size)


def stop_workers() -> None:
    """Leave the group that `start_workers` made; an engine's own group (vLLM has one in every process) is not ours."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_initialized():
        dist.destroy_process_group()


@cache
def is_first_failure() -> bool:
    """Record that this process fails; whether no other process of this torchrun failed before it.

    The first one says why; the others fail because of it. Call it where something fails, while the process group still
    exists: when the group ends, the others fail, too.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:  # torchrun's own store
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=5)
        store = TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        return store.add(f"gdro/failed/{attempt}", 1) == 1
    except (dist.DistError, KeyError):  # no store to ask: a second message is better than none
        return True


@contextmanager
def record_failures() -> Iterator[None]:
    """Call `is_first_failure` as soon as something fails: its answer is kept."""
    try:
        yield
    except BaseException:
        is_first_failure()
        raise


def shard(root: nn.Module, layers: nn.ModuleList, device: torch.device, compute: torch.dtype) -> None:
    """Divide the weights of `layers`, and of what else `root` holds, over all processes, in place.

    Weights and gradients stay float32; the forward and backward pass run in `compute`.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=None if compute == torch.float32 else compute, reduce_dtype=torch.float32
    )
    blocks = [fully_shard(layer, mesh=mesh, mp_policy=precision) for layer in layers]
    whole = fully_shard(root, mesh=mesh, mp_policy=precision)
    # By itself FSDP gathers ahead what ran before in the last forward pass, with or without gradients. Processes that
    # sample or measure other rows would then gather other blocks, and wait for each other for ever.
    before: list[Any] = [blocks[0], *blocks]
    for block, previous in zip([*blocks, whole], before, strict=True):
        block.set_modules_to_backward_prefetch([previous])


def reshard(root: nn.Module) -> None:
    """Free the root's gathered weights after a forward pass that no backward pass follows: it would wait for one."""
    if isinstance(root, FSDPModule):
        root.reshard()


@contextmanager
def whole_weights(root: nn.Module) -> Iterator[None]:
    """Every process holds all weights (in the format of compute) and runs `root`'s parts alone.

    Gradients are off; where they are switched on, those of weights must not be asked for: they would stay here.
    """
    sharded = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not root, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor, gathered from its shards by all processes together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
