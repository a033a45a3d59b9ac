"""Seconds a step and peak memory of TRL's GRPOTrainer on the work of tests/bench_loop.py: one line of JSON.

`make bench-trl` runs this file in an environment of its own. Same model, weights, prompts in the same order, grader,
optimizer and learning rate; 128 prompts x 4, at most 14 new tokens, generation by transformers, one update, no KL. TRL
spends nothing on logs, checkpoints or progress bars here, and the first steps are left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gdro_llm.config import Config, load_preset
from gdro_llm.engine.policy import EMBEDDED_MODEL
from gdro_llm.problems.load import batch_indices, load_problems
from gdro_llm.problems.rewards import grade_exact

WARM_UP = 2


class StepTimes(TrainerCallback):
    """Seconds of every step, from its begin to the end of its update."""

    def __init__(self) -> None:
        self.wall: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.wall.append(time.perf_counter() - self._begin)


def main() -> None:
    """Train a few steps and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = Config(**load_preset("quickstart"))
    problems, _ = load_problems(config)
    order = [i for step in range(arguments.steps) for i in batch_indices(len(problems), config.batch_size, step, 0)]
    rows = Dataset.from_list([{"prompt": problems[i].prompt, "number": int(i)} for i in order])
    rewards: list[float] = []

    def correct(completions: list[str], number: list[int], **_: object) -> list[float]:
        graded = [grade_exact(problems[i], text) for i, text in zip(number, completions, strict=True)]
        rewards.append(statistics.mean(graded))
        return graded

    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=config.batch_size * config.mean_rollouts,
            num_generations=config.mean_rollouts,
            max_completion_length=config.max_new_tokens,
            shuffle_dataset=False,
            temperature=config.temperature,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=config.warmup_steps,
            adam_beta2=config.adam_beta2,
            weight_decay=config.weight_decay,
            max_grad_norm=config.grad_clip,
            loss_type=config.loss,
            epsilon=config.clip_low,
            epsilon_high=config.clip_high,
            beta=config.kl_coef,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32),
            correct,
            settings,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(EMBEDDED_MODEL),
            callbacks=[times],
        )
        trainer.train()
    result = {
        "loop": "trl GRPOTrainer",
        "threads": torch.get_num_threads(),
        "step_s": round(statistics.mean(times.wall[WARM_UP:]), 3),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
        "reward": round(statistics.mean(rewards), 3),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
