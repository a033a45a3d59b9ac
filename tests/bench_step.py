"""Time and memory of full training steps of a random-weight model: `python tests/bench_step.py --model qwen3-1.7b`.

Builds the architecture with random weights in a temporary folder, so nothing is downloaded, and runs real steps on
random prompts: controller, sampler, update. Rewards are coin flips of each prompt's own chance, so that most groups
have a signal. A random model hardly ever ends by itself: every completion has the greatest length, the worst case.
Prints one line of JSON: seconds by phase, tokens a second, MFU of the update, the controller's share of the step, peak
memory by phase on CUDA beside the estimate of `gdro_llm.engine.memory`. The first step warms up and is left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from gdro_llm.config import Config
from gdro_llm.engine.memory import estimate
from gdro_llm.engine.policy import load_policy
from gdro_llm.engine.rollouts import Decoding
from gdro_llm.engine.sampler import make_sampler
from gdro_llm.engine.shapes import QWEN3, Shape, flops_per_token, mfu
from gdro_llm.training.batch import Batch
from gdro_llm.training.losses import group_advantages, rollout_scale
from gdro_llm.training.planners import build_controller
from gdro_llm.training.update import build_optimizer, update

SHAPES = {name.removeprefix("Qwen/").lower(): shape for name, shape in QWEN3.items()}
SHAPES["tiny"] = Shape(64, 192, 2, 4, 2, 16, 512, tie_word_embeddings=True)


def write_model(shape: Shape, folder: Path, seed: int) -> None:
    """A random-weight model of a shape, with a tokenizer that has a word for every id."""
    torch.manual_seed(seed)
    keys = {key: value for key, value in vars(shape).items() if key not in ("qk_norm", "qkv_bias")}
    end = shape.vocab_size - 1
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(Qwen3Config(**keys, eos_token_id=end, max_position_embeddings=32768))
    model.to(torch.bfloat16).save_pretrained(folder)
    words = {str(i): i for i in range(end)} | {"<end>": end}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


class Clock:
    """Seconds and peak memory by phase, the GPU's queue emptied at both ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what happens inside to a phase."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
            self.peak[phase] = max(self.peak[phase], torch.cuda.max_memory_allocated() / 1e9)
        self.seconds[phase] += time.perf_counter() - start


def bench(arguments: argparse.Namespace) -> dict[str, object]:
    """Run the steps; the report."""
    shape, rng = SHAPES[arguments.model], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        write_model(shape, Path(folder), seed=0)
        config = Config(
            model=folder,
            controller=arguments.controller,
            batch_size=arguments.prompts,
            mean_rollouts=arguments.rollouts,
            max_rollouts=max(12, arguments.rollouts),
            max_prompt_tokens=arguments.prompt_tokens,
            max_new_tokens=arguments.new_tokens,
            dtype=arguments.dtype,
            gradient_checkpointing=arguments.checkpointing,
            optimizer=arguments.optimizer,
            engine=arguments.engine,
            sample_rows=arguments.sample_rows,
            update_tokens=arguments.update_tokens,
            learning_rate=1e-6,
            warmup_steps=0,
        )
        policy = load_policy(config)
        controller, sampler = build_controller(config), make_sampler(policy, config)
        optimizer = build_optimizer(policy, config)
        ids = [f"p{i}" for i in range(4 * arguments.prompts)]
        chance = dict(zip(ids, rng.uniform(0.05, 0.95, len(ids)), strict=True))
        prompts = {key: rng.integers(0, shape.vocab_size - 1, arguments.prompt_tokens).tolist() for key in ids}
        clock, sampled, trained, square = Clock(), 0, 0, 0.0
        for step in range(arguments.steps + 1):
            if step == 1:
                clock, sampled, trained, square = Clock(), 0, 0, 0.0  # the step before warmed up
            batch = rng.choice(ids, arguments.prompts, replace=False).tolist()
            with clock("controller"):
                plan = controller.plan(batch)
            with clock("sample"):
                sampler.sync()
                rollouts = sampler.sample(
                    [prompts[key] for key in batch],
                    plan.counts,
                    Decoding(config.max_new_tokens, config.temperature),
                    seed=step,
                )
                sampler.sleep()
            rewards = (rng.random(len(plan.owner)) < [chance[batch[p]] for p in plan.owner]).astype(float)
            with clock("controller"):
                controller.observe(plan, rewards)
            with clock("update"):
                advantages = group_advantages(rewards, plan.owner, scale=True)
                scale = rollout_scale(plan.weights, plan.counts, plan.owner, config.aggregation)
                included = np.ones(len(rewards), bool)
                update(policy, optimizer, Batch(rollouts, advantages, scale, included), config)
                optimizer.zero_grad()
            lengths = rollouts.mask_R_T.sum(-1).cpu().numpy()
            rows = (arguments.prompt_tokens + lengths)[advantages != 0]  # the others are left out of the update
            sampled, trained, square = sampled + int(lengths.sum()), trained + int(rows.sum()), square + (rows**2).sum()
    seconds = dict(clock.seconds)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    length = float(square) / trained
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80e9
    expected = estimate(config, total, shape=shape).phases
    return {
        "device": device,
        **{key: value for key, value in vars(arguments).items() if key != "steps"},
        "seconds_a_step": {phase: round(value / arguments.steps, 5) for phase, value in seconds.items()},
        "sampled_tokens_per_second": round(sampled / seconds["sample"]),
        "trained_tokens_per_second": round(trained / seconds["update"]),
        "update_tflops_per_second": round(trained * flops_per_token(shape, length) / seconds["update"] / 1e12, 3),
        "update_mfu": mfu(shape, trained, length, seconds["update"], device),
        "controller_share": round(seconds["controller"] / sum(seconds.values()), 6),
        "peak_gb": {phase: round(value, 2) for phase, value in clock.peak.items()},
        "estimated_gb": {phase: round(value / 1e9, 2) for phase, value in expected.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-0.6b", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one of warm-up [%(default)s]")
    parser.add_argument("--controller", default="recommended", help="[%(default)s]")
    parser.add_argument("--prompts", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--rollouts", type=int, default=4, help="mean a prompt [%(default)s]")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=768, help="[%(default)s]")
    parser.add_argument("--sample-rows", type=int, default=256, help="[%(default)s]")
    parser.add_argument("--update-tokens", type=int, default=16384, help="[%(default)s]")
    parser.add_argument("--dtype", default="bfloat16", help="[%(default)s]")
    parser.add_argument("--optimizer", default="adamw", help="[%(default)s]")
    parser.add_argument("--engine", default="hf", help="[%(default)s]")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    print(json.dumps(bench(parser.parse_args())))


if __name__ == "__main__":
    main()
