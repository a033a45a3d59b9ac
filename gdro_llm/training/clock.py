"""Seconds of each stage of a step, by the wall and of CPU time, tokens a second, MFU: a line of `timing.jsonl`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gdro_llm.config import Config
from gdro_llm.engine.shapes import Shape, mfu
from gdro_llm.engine.workers import Workers
from gdro_llm.training.batch import Batch


def trained_tokens(batch: Batch, config: Config) -> np.ndarray:
    """Sum and sum of squares of the lengths (prompt and completion) of the rows in the backward passes, (2,)."""
    length = batch.rollouts.cost_R[(batch.advantages_R != 0) | bool(config.kl_coef)].astype(float)
    return config.passes * np.array([length.sum(), (length**2).sum()])


class Clock:
    """Seconds spent in each stage of a step.

    Attributes:
        seconds: by the wall, of each stage.
        cpu_seconds: of CPU time of all threads of this process, not of the grader's.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_seconds: dict[str, float] = defaultdict(float)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds[stage] += time.perf_counter() - start
        self.cpu_seconds[stage] += time.process_time() - cpu_start

    def summary(
        self, sampled: int, work: np.ndarray, shape: Shape | None, config: Config, workers: Workers
    ) -> dict[str, Any]:
        """`<stage>_s`, `cpu_seconds` by stage, tokens a second (of the step; sampled; trained); on GPUs MFU and memory.

        Args:
            sampled: tokens drawn by all processes.
            work: of `trained_tokens`, over all processes.
            shape: of the model, if known.
            config: of the run.
            workers: the processes.
        """
        row: dict[str, Any] = {f"{stage}_s": round(value, 6) for stage, value in self.seconds.items()}
        row["cpu_seconds"] = {stage: round(value, 6) for stage, value in self.cpu_seconds.items()}
        row["tokens_per_s"] = round(sampled / sum(self.seconds.values()), 1)
        row["sampled_tokens_per_s"] = round(sampled / self.seconds["sample"], 1)
        row["trained_tokens_per_s"] = round(work[0] / self.seconds["update"], 1)
        if self._cuda:
            row["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
            if shape is not None and work[0]:
                used = mfu(
                    shape,
                    int(work[0]),
                    work[1] / work[0],
                    self.seconds["update"],
                    torch.cuda.get_device_name(),
                    gpus=workers.size,
                    lora_rank=config.lora_rank,
                )
                if used is not None:
                    row["update_mfu"] = round(used, 4)
        return row
