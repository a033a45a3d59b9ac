r"""The warm start of the testbeds: a tiny Qwen3 that has the skills and rarely uses them. ``gdro warm-start cells``
remakes the shipped weights; other testbeds, sizes and seeds are those of `gdro compare`.

    min_theta  E [ -log pi_theta(completion | prompt) ]    over ``cells.warm_start_example``

The hidden matrices follow Muon, the embeddings and the norms AdamW; the learning rate is constant, then falls linearly
to zero. A second, shorter pass starts again at half the rate. On one machine the weights depend on the seed alone (one
thread: the order of every sum is fixed).
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from gdro_llm.engine.policy import Policy, success_probability
from gdro_llm.problems.cells import (
    FORCE,
    LEVELS,
    MAX_COMPLETION_LENGTH,
    MAX_PROMPT_LENGTH,
    TESTBEDS,
    Cell,
    cell_problems,
    character_tokenizer,
    warm_start_example,
)
from gdro_llm.problems.problem import Problem

IGNORED = -100  # label of the positions that carry no loss
CELL_WEIGHTS = {"easy": 1.0, "middle": 1.3, "hard": 1.6}  # how often the warm start visits a cell


@dataclass(frozen=True)
class Size:
    """A tiny Qwen3, whose feed-forward layers are three times as wide as the residual stream."""

    width: int
    layers: int
    heads: int
    compute: torch.dtype = torch.bfloat16  # of matrix products in the warm start
    attention: str = "sdpa"  # in the warm start


SIZES = {  # 857k, 3.42M and 11.5M parameters
    "0.9M": Size(128, 4, 4, torch.float32),
    "3M": Size(256, 4, 4),
    "12M": Size(384, 6, 6, attention="eager"),  # a third faster on a CPU in bfloat16
}


def tiny_qwen3(tokenizer: PreTrainedTokenizerFast, seed: int, size: Size = SIZES["0.9M"]) -> Qwen3ForCausalLM:
    """Qwen3 of a size (tied embeddings, float32), initialised for Muon."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.width // size.heads,
        intermediate_size=3 * size.width,
        max_position_embeddings=MAX_PROMPT_LENGTH + MAX_COMPLETION_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                std = weight.shape[1] ** -0.5 * (0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
                weight.normal_(0.0, 0.05 if "embed_tokens" in name else std, generator=generator)
        # The embeddings are small as inputs and tied to the output: the last norm carries the scale of the logits.
        model.model.norm.weight.fill_(4.0)
    # Plain samples of pi_theta: no truncation of the distribution, so that sampled and exact success rates agree.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_COMPLETION_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def pad_right(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [pairs, length] of prompt + completion + end.

    Padded on the right, so that positions start at zero on the first character and the causal mask alone hides the
    padding; the labels ignore the prompt and the padding.
    """
    prompts = tokenizer([prompt for prompt, _ in pairs]).input_ids
    completions = tokenizer([completion for _, completion in pairs]).input_ids
    length = max(len(p) + len(c) + 1 for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(pairs), length), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), length), IGNORED)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion) + 1
        ids[row, :end] = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    return ids, labels


def level_table(policy: Policy, problems: Sequence[Problem]) -> str:
    """Exact mean@8, pass@8 and the skill (success when "!" demands the scratch work) by level, as text."""

    def success(prompts: list[str], accepted: list[tuple[str, ...]]) -> np.ndarray:
        ids = [policy.tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
        longest = MAX_COMPLETION_LENGTH
        return success_probability(policy, ids, accepted, max_new_tokens=longest, temperature=1.0, rows=512).numpy()

    p = success([x.prompt for x in problems], [x.accepted for x in problems])
    forced = success([x.prompt[:-1] + FORCE for x in problems], [x.accepted[1:] for x in problems])
    has_skill = np.array([len(x.accepted) > 1 for x in problems])
    lines = [f"{'level':8}{'problems':>9}{'mean@8':>9}{'pass@8':>9}{'skill(!)':>9}"]
    for level in (*LEVELS, "all"):
        rows = np.array([level in (x.level, "all") for x in problems])
        skill = f"{forced[rows & has_skill].mean():9.3f}" if (rows & has_skill).any() else f"{'-':>9}"
        lines.append(f"{level:8}{rows.sum():9d}{p[rows].mean():9.3f}{(1 - (1 - p[rows]) ** 8).mean():9.3f}{skill}")
    return "\n".join(lines)


def _train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    cells: tuple[Cell, ...],
    rng: random.Random,
    steps: int,
    batch: int,
    rate: float,
    compute: torch.dtype,
    description: str,
) -> None:
    """Muon at .02 ``rate`` and AdamW at .003 ``rate``: 60 steps up, constant, then down to zero over the last half."""
    named = dict(model.named_parameters())
    hidden = [p for name, p in named.items() if p.dim() == 2 and "embed_tokens" not in name]
    others = [p for name, p in named.items() if p.dim() != 2 or "embed_tokens" in name]
    optimizers = (
        torch.optim.Muon(hidden, lr=0.02 * rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.003 * rate, betas=(0.9, 0.95), weight_decay=0.0),
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, (t + 1) / 60) * min(1.0, 2 * (1 - t / steps)))
        for o in optimizers
    ]
    weights = [CELL_WEIGHTS[cell.level] for cell in cells]
    progress = tqdm(range(steps), desc=description, unit="step")
    for _ in progress:
        drawn = rng.choices(cells, weights, k=batch)
        ids, labels = pad_right(tokenizer, [warm_start_example(rng, cell) for cell in drawn])
        with torch.autocast("cpu", compute, enabled=compute is not torch.float32):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def _save_atomically(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Write into a temporary sibling, then rename: ``out_dir`` never holds half a checkpoint."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if out_dir.exists():
            out_dir.rename(old)
        new.rename(out_dir)


def warm_start(
    out_dir: Path,
    seed: int = 1,
    *,
    testbed: str = "cells",
    size: str = "0.9M",
    steps: int = 1300,
    fine_tune_steps: int = 300,
    batch: int = 128,
) -> None:
    """Train the tiny model, save it (weights, configuration, tokenizer) and print its exact profile on the test split.

    The defaults make the shipped weights, in six to nine minutes on one core. ``out_dir`` is replaced in one rename.

    Raises:
        ValueError: ``steps``, ``fine_tune_steps`` or ``batch`` below 1.
    """
    for name, value in (("steps", steps), ("fine_tune_steps", fine_tune_steps), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    torch.set_num_threads(1)
    tokenizer = character_tokenizer()
    model = tiny_qwen3(tokenizer, seed, SIZES[size])
    model.set_attn_implementation(SIZES[size].attention)
    rng, cells = random.Random(seed), TESTBEDS[testbed]
    _train(model, tokenizer, cells, rng, steps, batch, 1.0, SIZES[size].compute, "warm start")
    _train(model, tokenizer, cells, rng, fine_tune_steps, batch, 0.5, SIZES[size].compute, "fine-tune")
    model.eval()
    _save_atomically(model, tokenizer, out_dir)
    policy = Policy(model, tokenizer, stop_ids=torch.tensor([tokenizer.eos_token_id]), temperature=1.0, source="")
    print(level_table(policy, cell_problems("test", dict.fromkeys(LEVELS, 40), seed=8, cells=cells)))
