"""Seconds a step and peak memory of TRL's GRPOTrainer on the work of the other benches: one line of JSON.

`make bench-trl` (the work of `tests/bench_loop.py`) and `make bench-pretrained` (of `tests/bench_pretrained.py`) run
this file in an environment of its own. Same model, weights, prompts in the same order, counts, ends of completions,
grader, optimizer and learning rate; generation by transformers, one update, no KL; bfloat16 is TRL's own: autocast over
float32 weights. TRL spends nothing on logs, checkpoints or progress bars here, and the first steps are left out. Of its
step, generation is "sample", the reward function "grade", and all the rest "update".
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
from contextlib import ExitStack
from typing import Any

import torch
from bench_work import Step, batches, matrix_rate, report
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gdro_llm.config import Config, load_preset
from gdro_llm.engine.policy import EMBEDDED_MODEL, device_type, load_policy
from gdro_llm.problems.prompting import prompt_tokens
from gdro_llm.problems.rewards import Grader
from gdro_llm.training.clock import Clock

WARM_UP = {"quickstart": 2, "smollm2-arith": 1}  # steps


class TimedTrainer(GRPOTrainer):
    """A trainer whose generation is timed."""

    clock: Clock

    def _generate(self, prompts: list) -> Any:
        with self.clock("sample"):
            return super()._generate(prompts)


class Steps(TrainerCallback):
    """What each step did and took, from its begin to the end of its update."""

    def __init__(self, config: Config, prompt_tokens: list[float]) -> None:
        self.config, self.prompt_tokens = config, prompt_tokens  # mean length of each step's prompts
        self.done: list[Step] = []
        self.peak_gpu_gb = 0.0
        self.trainer: TimedTrainer
        self.lengths: list[int] = []
        self.rewards: list[float] = []
        self._step = ExitStack()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock = self.trainer.clock = Clock(torch.device(device_type(self.config)))
        self._step.enter_context(self.clock("update"))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._step.close()
        for seconds in (self.clock.seconds, self.clock.cpu_seconds):
            seconds["update"] -= seconds["sample"] + seconds["grade"]
        if device_type(self.config) == "cuda":
            self.peak_gpu_gb = max(self.peak_gpu_gb, torch.cuda.max_memory_allocated() / 1e9)
        size = self.config.mean_rollouts
        groups = [self.rewards[i : i + size] for i in range(0, len(self.rewards), size)]
        self.done.append(
            Step(
                prompts=len(groups),
                prompt_tokens=self.prompt_tokens[len(self.done)],
                rollouts=len(self.rewards),
                new_tokens=statistics.mean(self.lengths),
                mixed=statistics.mean(len(set(group)) > 1 for group in groups),
                reward=statistics.mean(self.rewards),
                seconds=self.clock.seconds,
                cpu_seconds=self.clock.cpu_seconds,
            )
        )


def main() -> None:
    """Train a few steps and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=WARM_UP)
    parser.add_argument("--model", help="a hub name or a folder [the preset's]")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="[%(default)s]")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="[%(default)s]")
    parser.add_argument("--steps", type=int, required=True, help="those that warm up included")
    parser.add_argument("--threads", type=int, default=1, help="[%(default)s]")
    arguments = parser.parse_args()
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    config = Config(**load_preset(arguments.preset) | {"trainable_layers": 0, "controller": "grpo"} | given)
    torch.set_num_threads(config.threads)
    rate = matrix_rate(config.dtype, torch.device(device_type(config)))
    stop_ids = load_policy(config).stop_ids.tolist()
    source = EMBEDDED_MODEL if config.model == "embedded" else config.model
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
    )
    model.generation_config.eos_token_id = stop_ids  # TRL reads it there
    order = batches(config, config.steps)
    problems = [problem for batch in order for problem in batch]
    rows = Dataset.from_list([{"prompt": problem.prompt, "number": i} for i, problem in enumerate(problems)])
    steps = Steps(
        config,
        [statistics.mean(len(prompt_tokens(tokenizer, problem, config)) for problem in batch) for batch in order],
    )
    grader = Grader(config)

    def correct(completions: list[str], completion_ids: list[list[int]], number: list[int], **_: object) -> list[float]:
        with steps.clock("grade"):
            texts = [text.split(config.stop)[0] if config.stop else text for text in completions]
            steps.rewards = grader.grade([problems[i] for i in number], texts).tolist()
        steps.lengths = [len(ids) for ids in completion_ids]
        return steps.rewards

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=config.steps,
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
            bf16=config.dtype == "bfloat16",
            use_cpu=device_type(config) == "cpu",
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        steps.trainer = TimedTrainer(
            model, correct, settings, train_dataset=rows, processing_class=tokenizer, callbacks=[steps]
        )
        steps.trainer.train()
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    counted = steps.done[WARM_UP[arguments.preset] :]
    result = report("trl GRPOTrainer", config, counted, rate, peak_rss=peak_rss, peak_gpu_gb=steps.peak_gpu_gb)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
