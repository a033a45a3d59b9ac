"""Rollouts: what an engine is asked for (`Decoding`, rows of the plan) and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gdro_llm.config import UsageError
from gdro_llm.engine.policy import Policy


@dataclass
class Rollouts:
    """Completions in plan order: row r belongs to prompt `owner_R[r]`."""

    prompts: list[list[int]]  # token ids; none for prompts that were passed over
    owner_R: torch.Tensor
    tokens_R_T: torch.Tensor  # padded on the right; the stop token is included
    mask_R_T: torch.Tensor  # 1 at tokens
    logprobs_R_T: torch.Tensor  # of the sampled tokens under the distribution they were drawn from; padding holds 0
    truncated_R: torch.Tensor  # no stop token within max_new_tokens
    texts: list[str]  # without the stop token

    @property
    def cost_R(self) -> np.ndarray:
        """(R,) tokens of prompt and completion: what training passes over (`gdro_core.costs`)."""
        length_P = np.array([len(ids) for ids in self.prompts], dtype=np.int64)
        return np.asarray(length_P[self.owner_R.cpu().numpy()] + self.mask_R_T.sum(-1).cpu().numpy(), dtype=np.int64)

    def select(self, rows: np.ndarray) -> Rollouts:
        """Some rows; prompts are numbered anew."""
        kept = torch.from_numpy(rows).to(self.owner_R.device)
        used, owner = self.owner_R[kept].unique(return_inverse=True)
        tensors = (self.tokens_R_T[kept], self.mask_R_T[kept], self.logprobs_R_T[kept], self.truncated_R[kept])
        return Rollouts([self.prompts[p] for p in used.tolist()], owner, *tensors, [self.texts[r] for r in rows])


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Rollouts of several batches, one after the other."""
    first = np.cumsum([0, *(len(part.prompts) for part in parts[:-1])]).tolist()
    width = max(part.tokens_R_T.shape[1] for part in parts)

    def stacked(name: str) -> torch.Tensor:
        tables = [getattr(part, name) for part in parts]
        return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in tables])

    return Rollouts(
        [prompt for part in parts for prompt in part.prompts],
        torch.cat([part.owner_R + start for part, start in zip(parts, first, strict=True)]),
        stacked("tokens_R_T"),
        stacked("mask_R_T"),
        stacked("logprobs_R_T"),
        torch.cat([part.truncated_R for part in parts]),
        [text for part in parts for text in part.texts],
    )


def interleaved(first: Rollouts, second: Rollouts) -> Rollouts:
    """Rollouts of the same prompts, drawn one after the other: prompt after prompt, the first ones first."""
    both = joined([first, second])
    owner = both.owner_R % len(first.prompts)
    order = owner.argsort(stable=True)
    tensors = (both.tokens_R_T[order], both.mask_R_T[order], both.logprobs_R_T[order], both.truncated_R[order])
    return Rollouts(first.prompts, owner[order], *tensors, [both.texts[r] for r in order.tolist()])


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn: softmax(logits / temperature), cut to the top_k likeliest and then to the nucleus."""

    max_new_tokens: int
    temperature: float
    top_p: float = 1.0  # the fewest likeliest tokens whose probabilities reach this; 1: all
    top_k: int = 0  # 0: all


def planned_rows(
    prompts: list[list[int]],
    counts_P: np.ndarray,
    rows: Sequence[int] | np.ndarray | None,
    limit: int | None,
    max_new_tokens: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and prompts of the rows to draw, (R,) each, after the checks that both engines share."""
    owner = np.repeat(np.arange(len(prompts)), counts_P)
    chosen = np.arange(owner.size) if rows is None else np.asarray(rows, dtype=int)
    for p in np.unique(owner[chosen]):
        if not prompts[p]:
            raise UsageError(f"prompt {p} has no tokens; template and problem must give at least one")
        if limit is not None and len(prompts[p]) + max_new_tokens > limit:
            raise UsageError(
                f"prompt of {len(prompts[p])} tokens plus max_new_tokens = {max_new_tokens} exceeds the {limit} "
                "positions at hand; lower max_new_tokens or max_prompt_tokens"
            )
    return chosen, owner[chosen]


def position_limit(policy: Policy) -> int | None:
    """Longest sequence that the model was made for, where its configuration says so."""
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def decode_texts(policy: Policy, tokens: list[list[int]], lengths: list[int], truncated: list[bool]) -> list[str]:
    """Text of each completion, byte for byte, without the stop token."""
    kept = [row[: n if cut else n - 1] for row, n, cut in zip(tokens, lengths, truncated, strict=True)]
    if not kept:  # transformers would answer with one empty text
        return []
    return policy.tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
