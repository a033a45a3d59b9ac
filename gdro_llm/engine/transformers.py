"""Sampling with transformers, from the very weights that are trained.

`HFSampler` encodes each prompt once, drops finished rows, and refills their places from the rows that wait. A token is
drawn by inverting the cumulative distribution at u[r, t], a uniform number of a counter-based generator with the key
(seed, r): the draws of row r do not depend on which other rows are sampled, beside it or in another process. (Batches
of another shape round differently, by about 1e-7 in float32, which changes a token as rarely as that.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from gdro_llm.config import Config, UsageError
from gdro_llm.engine.policy import Policy, encode
from gdro_llm.engine.rollouts import Decoding, Rollouts, decode_texts, planned_rows, position_limit
from gdro_llm.engine.scoring import positions
from gdro_llm.engine.workers import whole_weights

BLOCK = 512  # vocabulary entries whose probabilities are summed first


class HFSampler:
    """The policy's own model, `config.sample_rows` rows side by side."""

    def __init__(self, policy: Policy, config: Config) -> None:
        self.policy, self._slots = policy, config.sample_rows

    def sync(self) -> None:
        """Nothing to do: it samples from the trainer's weights."""

    def sleep(self) -> None:
        """Nothing to do: the key-value cache lives only while it samples."""

    def close(self) -> None:
        """Nothing to do."""

    def sample(
        self,
        prompts: list[list[int]],
        counts_P: np.ndarray,
        decoding: Decoding,
        *,
        seed: int,
        rows: Sequence[int] | np.ndarray | None = None,
    ) -> Rollouts:
        """See `Sampler.sample`."""
        with whole_weights(self.policy.scorer):
            return self._sample(prompts, counts_P, decoding, seed, rows)

    def _sample(
        self,
        prompts: list[list[int]],
        counts_P: np.ndarray,
        decoding: Decoding,
        seed: int,
        rows: Sequence[int] | np.ndarray | None,
    ) -> Rollouts:
        policy, device, steps = self.policy, self.policy.device, decoding.max_new_tokens
        numbers, owner = planned_rows(prompts, counts_P, rows, position_limit(policy), steps)
        tokens = torch.zeros(len(numbers), steps, dtype=torch.long, device=device)
        lengths = torch.zeros(len(numbers), dtype=torch.long, device=device)
        logprobs = torch.zeros(len(numbers), steps, device=device)
        truncated = torch.zeros(len(numbers), dtype=torch.bool, device=device)
        waiting, unfinished = 0, _Unfinished.empty(device)
        while waiting < len(numbers) or len(unfinished.row):
            # Refilling costs a pass over the new prompts and a copy of the cache: wait until half the places are free.
            if waiting < len(numbers) and len(unfinished.row) <= (self._slots // 2 if unfinished.can_join() else 0):
                new = np.arange(waiting, min(waiting + self._slots - len(unfinished.row), len(numbers)))
                waiting = new[-1] + 1
                unfinished.join(_start(policy, prompts, owner[new], new, uniforms(seed, numbers[new], steps)))
            distribution = log_distribution(unfinished.logits, decoding)
            u = unfinished.uniforms.gather(1, lengths[unfinished.row][:, None])[:, 0]
            token = invert_cdf(distribution.exp(), u)
            place = (unfinished.row, lengths[unfinished.row])
            tokens[place] = token
            logprobs[place] = distribution.gather(-1, token[:, None])[:, 0]
            lengths[unfinished.row] += 1
            going = ~torch.isin(token, policy.stop_ids)
            out_of_room = going & (lengths[unfinished.row] == steps)
            truncated[unfinished.row[out_of_room]] = True
            unfinished.keep((going & ~out_of_room).nonzero()[:, 0], token)
            if len(unfinished.row):
                unfinished.advance(policy)
        if not torch.isfinite(logprobs).all():
            raise UsageError(
                "the model's logits are not finite, so nothing can be sampled from it; "
                "go back to an earlier checkpoint and lower learning_rate, or use --dtype float32"
            )
        width = max(int(lengths.max()), 1) if len(numbers) else 1
        mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        tokens, logprobs = tokens[:, :width], logprobs[:, :width]
        texts = decode_texts(policy, tokens.tolist(), lengths.tolist(), truncated.tolist())
        return Rollouts(prompts, torch.from_numpy(owner).to(device), tokens, mask, logprobs, truncated, texts)


@dataclass
class _Unfinished:
    """Rows being written: `logits` are of each one's next token."""

    row: torch.Tensor  # (B,) place in the result
    uniforms: torch.Tensor  # (B, max_new_tokens)
    cache: Any  # transformers' DynamicCache, or None before the first row
    mask: torch.Tensor  # (B, W), 1 where the cache holds a token
    logits: torch.Tensor  # (B, V)
    token: torch.Tensor  # (B,), the last one drawn

    @classmethod
    def empty(cls, device: torch.device) -> _Unfinished:
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        return cls(nothing, nothing[:, None], None, nothing[:, None], nothing[:, None], nothing)

    def can_join(self) -> bool:
        """Whether rows of other lengths can join the batch: caches of sliding windows cannot be aligned."""
        return self.cache is None or all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def keep(self, places: torch.Tensor, token: torch.Tensor) -> None:
        """Go on with some rows only."""
        if len(places) < len(self.row):
            if len(places):
                self.cache.batch_select_indices(places)
            self.row, self.uniforms, self.mask = self.row[places], self.uniforms[places], self.mask[places]
        self.token = token[places]

    def advance(self, policy: Policy) -> None:
        """Run the last tokens through the model."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.logits = policy.working(
            input_ids=self.token[:, None],
            attention_mask=self.mask,
            position_ids=positions(self.mask)[:, -1:],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]

    def join(self, new: _Unfinished) -> None:
        """Add rows; both caches end at the same column, so the narrower one gets padding on the left."""
        if not len(self.row):
            self.__dict__.update(new.__dict__)
            return
        unused = int((self.mask.sum(0) == 0).int().argmin())  # columns on the left whose rows have all ended
        width = max(self.mask.shape[1] - unused, new.mask.shape[1])
        for mine, other in zip(self.cache.layers, new.cache.layers, strict=True):
            for name in ("keys", "values"):
                both = (getattr(mine, name)[:, :, unused:], getattr(other, name))
                setattr(mine, name, torch.cat([_pad_left(x, width - x.shape[2], dim=2) for x in both]))
        both = (self.mask[:, unused:], new.mask)
        self.mask = torch.cat([_pad_left(x, width - x.shape[1], dim=1) for x in both])
        self.row, self.uniforms = torch.cat([self.row, new.row]), torch.cat([self.uniforms, new.uniforms])
        self.logits = torch.cat([self.logits, new.logits])


def _pad_left(x: torch.Tensor, columns: int, dim: int) -> torch.Tensor:
    return torch.cat([x.new_zeros(*x.shape[:dim], columns, *x.shape[dim + 1 :]), x], dim=dim)


def _start(
    policy: Policy, prompts: list[list[int]], owner: np.ndarray, row: np.ndarray, uniforms_R_T: np.ndarray
) -> _Unfinished:
    """Encode the prompts of new rows, each once."""
    device = policy.device
    used, local = np.unique(owner, return_inverse=True)
    prefix = encode(policy, [prompts[p] for p in used]).select(torch.from_numpy(local).to(device))
    rows, numbers = torch.from_numpy(row).to(device), torch.from_numpy(uniforms_R_T).to(device)
    return _Unfinished(rows, numbers, prefix.cache, prefix.mask_P_T, prefix.logits_P_V, rows)


def uniforms(seed: int, numbers_R: np.ndarray, steps: int) -> np.ndarray:
    """u[r, t] in [0, 1), (R, steps) float64: a function of seed, the row's number and t."""
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([seed, r], np.uint64))).random(steps)
        for r in numbers_R.tolist()
    ]
    return np.stack(rows) if rows else np.zeros((0, steps))


def log_distribution(logits_B_V: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Log-probabilities, (B, V) float32, of the distribution that `decoding` draws from; -inf outside its support."""
    logprobs = torch.log_softmax(logits_B_V.float() / decoding.temperature, dim=-1)
    if decoding.top_p >= 1 and not 0 < decoding.top_k < logprobs.shape[-1]:
        return logprobs
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    if decoding.top_k:
        ordered[:, decoding.top_k :] = -torch.inf
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # probability of the likelier tokens
    before[:, 0] = -1.0  # one token is always left
    ordered = ordered.masked_fill(before >= decoding.top_p, -torch.inf)
    return torch.empty_like(logprobs).scatter_(-1, order, ordered).log_softmax(-1)


def invert_cdf(probs_B_V: torch.Tensor, u_B: torch.Tensor) -> torch.Tensor:
    """The token at quantile u in [0, 1) of each row's distribution, (B,); never one of probability 0.

    A float32 cumulative sum over 150,000 tokens is off by 1e-5 and on a GPU need not even be monotone. So probabilities
    are summed by blocks and then within the chosen block, in float64.
    """
    size = probs_B_V.shape[-1]
    blocks = torch.nn.functional.pad(probs_B_V, (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    target = u_B.double() * ends[:, -1]
    block = _first_beyond(sums, ends, target)
    inside = blocks[torch.arange(len(blocks), device=block.device), block].double()
    start = (ends - sums).gather(-1, block[:, None])[:, 0]
    token = block * BLOCK + _first_beyond(inside, inside.cumsum(-1), target - start)
    return token.clamp(max=size - 1)  # beyond it only where the probabilities are not finite


def _first_beyond(weights: torch.Tensor, ends: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """First place of positive weight whose cumulative sum exceeds the target; the last one if rounding leaves none."""
    positive = weights > 0
    beyond = positive & (ends > target[:, None])
    last = weights.shape[-1] - 1 - positive.flip(-1).int().argmax(-1)
    return torch.where(beyond.any(-1), beyond.int().argmax(-1), last)
