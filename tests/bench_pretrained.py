"""Seconds, memory and share of the machine's matrix rate of the training loop on a pretrained model: a line of JSON.

`make bench-pretrained MODEL=...` runs this file, and `tests/bench_trl.py` on the same work: `smollm2-arith` (16 prompts
x 4, at most 8 new tokens) with all weights trained by plain GRPO, on one thread or on a GPU. The steps are of a `gdro
train` in a process of its own; evaluation is none of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from bench_work import Step, batches, matrix_rate, report, train_alone
from transformers import AutoTokenizer

from gdro_llm.config import Config, load_preset
from gdro_llm.engine.policy import device_type
from gdro_llm.measuring.run_directory import RunDirectory
from gdro_llm.problems.prompting import prompt_tokens

PRESET, WARM_UP = "smollm2-arith", 1
WORK = {"trainable_layers": 0, "controller": "grpo", "threads": 1}


def main() -> None:
    """Train a few steps and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a hub name or a folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=5, help=f"{WARM_UP} of them to warm up [%(default)s]")
    arguments = parser.parse_args()
    config = Config(**load_preset(PRESET) | WORK | vars(arguments))
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    torch.set_num_threads(config.threads)
    rate = matrix_rate(config.dtype, torch.device(device_type(config)))
    with tempfile.TemporaryDirectory() as folder:
        options = WORK | vars(arguments) | {"eval_samples": 1, "test_problems": 8, "eval_every": config.steps}
        flags = {name.replace("_", "-"): value for name, value in options.items()}
        peak_rss = train_alone(PRESET, Path(folder) / "run", flags)
        run = RunDirectory(Path(folder) / "run")
        rows = list(zip(batches(config, config.steps), run.metrics, run.timing, strict=True))[WARM_UP:]
    steps = [
        Step(
            prompts=len(problems),
            prompt_tokens=statistics.mean(len(prompt_tokens(tokenizer, problem, config)) for problem in problems),
            rollouts=len(problems) * config.mean_rollouts,
            new_tokens=metrics["completion_length"],
            mixed=metrics["mixed_share"],
            reward=metrics["reward"],
            seconds={stage: timing[f"{stage}_s"] for stage in timing["cpu_seconds"]},
            cpu_seconds=timing["cpu_seconds"],
        )
        for problems, metrics, timing in rows
    ]
    peak_gpu_gb = max(timing.get("peak_memory_gb", 0.0) for _, _, timing in rows)
    result = report("gdro grpo", config, steps, rate, peak_rss=peak_rss, peak_gpu_gb=peak_gpu_gb)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
