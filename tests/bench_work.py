"""What the benches share: the work of a step, its arithmetic, the matrix rate of the machine, and one form of report.

Seconds mean little on another machine, so the arithmetic that a step needs is put beside what the machine's matrix
units could have done in the same time: "of_peak", a share of 1. It compares implementations rather than flattering
them: what is computed again, for padding, or for rollouts without advantage (no gradient) does not count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdro_llm.config import Config
from gdro_llm.engine.policy import device_type
from gdro_llm.engine.shapes import Shape, shape_of
from gdro_llm.problems.load import batch_indices, hold_out, load_problems
from gdro_llm.problems.problem import Problem


@dataclass(frozen=True)
class Step:
    """What one step did, and what it took. Lengths are means: groups trained on are taken to be as long as others."""

    prompts: int
    prompt_tokens: float
    rollouts: int
    new_tokens: float  # of a completion, with the token that ends it
    mixed: float  # share of the prompts whose rewards differ, which have a gradient
    reward: float
    seconds: Mapping[str, float]  # by stage
    cpu_seconds: Mapping[str, float]

    @property
    def sampled(self) -> float:
        """Tokens drawn."""
        return self.rollouts * self.new_tokens

    @property
    def trained(self) -> float:
        """Tokens of the rows that have a gradient, prompts included."""
        return self.mixed * self.rollouts * (self.prompt_tokens + self.new_tokens)

    def sample_operations(self, shape: Shape) -> float:
        """Every prompt once, every drawn token but the last; the output layer where a distribution is drawn from."""
        fed = self.rollouts * (self.new_tokens - 1)
        return self._forward(shape, self.prompts, self.rollouts, self.prompts + fed)

    def update_operations(self, shape: Shape) -> float:
        """Forward and (twice that) backward of mixed groups: every prompt once, the output layer at drawn tokens."""
        prompts, rollouts = self.mixed * self.prompts, self.mixed * self.rollouts
        return 3 * self._forward(shape, prompts, rollouts, rollouts * self.new_tokens)

    def _forward(self, shape: Shape, prompts: float, rollouts: float, read: float) -> float:
        """Floating-point operations of the matrices, of attention (a token sees those before it), of the head."""
        fed = self.new_tokens - 1
        tokens = prompts * self.prompt_tokens + rollouts * fed
        seen = prompts * self.prompt_tokens**2 / 2 + rollouts * fed * (self.prompt_tokens + fed / 2)
        block = sum(inputs * outputs for inputs, outputs in shape.linears)
        layers = shape.num_hidden_layers * (2 * block * tokens + 4 * shape.query_width * seen)
        return layers + 2 * shape.vocab_size * shape.hidden_size * read


def matrix_rate(dtype: str, device: torch.device) -> float:
    """Floating-point operations a second of the product of two large matrices [1/s], the best of several tries.

    A second is one of CPU time (on one thread), on a GPU of the wall.
    """
    cuda = device.type == "cuda"
    size, clock = (8192, time.perf_counter) if cuda else (2048, time.process_time)
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = clock()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return 2 * size**3 / best


def batches(config: Config, steps: int) -> list[list[Problem]]:
    """The problems of each step, in the order in which plain GRPO trains on them."""
    problems, _ = hold_out(load_problems(config)[0], config)
    return [
        [problems[i] for i in batch_indices(len(problems), config.batch_size, step, config.seed)]
        for step in range(steps)
    ]


def train_alone(preset: str, out: Path, options: Mapping[str, object]) -> int:
    """`gdro train` in a process of its own; the largest resident memory of the process [bytes]."""
    flags = [text for name, value in {**options, "out": out}.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "gdro_llm.cli", "train", preset, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options["threads"])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"failed: {' '.join(command)}"
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(
    loop: str, config: Config, steps: Sequence[Step], rate: float, *, peak_rss: int, peak_gpu_gb: float = 0.0
) -> dict[str, Any]:
    """Means over steps: seconds by the wall (`_s`) and of CPU time (`_cpu_s`), memory, tokens a second, share of peak.

    Args:
        loop: whose steps they are.
        config: of the work.
        steps: those that count, the warm-up left out.
        rate: of `matrix_rate`; with it `of_peak` and tokens a second are of CPU time, on a GPU of the wall.
        peak_rss: largest resident memory of the process [bytes].
        peak_gpu_gb: largest memory on the GPU [GB].
    """
    cuda, shape, count = device_type(config) == "cuda", shape_of(config.model), len(steps)
    wall = {stage: sum(step.seconds[stage] for step in steps) for stage in steps[0].seconds}
    cpu = {stage: sum(step.cpu_seconds[stage] for step in steps) for stage in steps[0].cpu_seconds}
    seconds = wall if cuda else cpu
    tokens = {"sample": sum(step.sampled for step in steps), "update": sum(step.trained for step in steps)}
    work = {
        "sample": sum(step.sample_operations(shape) for step in steps),
        "update": sum(step.update_operations(shape) for step in steps),
    }
    stages: dict[str, dict[str, float]] = {}
    for stage in wall:
        stages[stage] = {"s": round(wall[stage] / count, 4), "cpu_s": round(cpu[stage] / count, 4)}
        if stage in work:
            stages[stage]["tokens_per_s"] = round(tokens[stage] / seconds[stage], 1)
            stages[stage]["of_peak"] = round(work[stage] / (seconds[stage] * rate), 4)
    return {
        "loop": loop,
        "dtype": config.dtype,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": config.threads,
        "step_s": round(sum(wall.values()) / count, 3),
        "step_cpu_s": round(sum(cpu.values()) / count, 3),
        "of_peak": round(sum(work.values()) / (sum(seconds.values()) * rate), 4),
        "matrix_gflops": round(rate / 1e9, 1),
        "peak_rss_mb": round(peak_rss / 1e6),
        **({"peak_gpu_gb": peak_gpu_gb} if cuda else {}),
        "reward": round(sum(step.reward for step in steps) / count, 3),
        "mixed": round(sum(step.mixed for step in steps) / count, 3),
        "new_tokens": round(sum(step.new_tokens for step in steps) / count, 2),
        "stages": stages,
    }
