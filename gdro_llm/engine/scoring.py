"""Log-probabilities of completions: what the update differentiates, and what the tests of exactness sum.

1. Logits of all tokens never exist together: the last hidden states go through the output layer in chunks, and each
   chunk is computed again in the backward pass.
2. Rows are scored whole (`plain`: prompt + completion), or every prompt is encoded once and its key-value cache
   shared by its rollouts, with gradients flowing through it (`shared`): for long prompts with short answers that saves
   most of the work. FSDP needs all of a forward pass in one call of the module, which `plain` is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

CHUNK = 2**27  # largest number of logits that exist at once: half a GB in float32


class TokenLogprobs(nn.Module):
    """Log-probability of completion tokens under a causal language model, and the entropy of their distributions.

    Every method takes P prompts as token ids and R completions (owner_R: row of its prompt; tokens_R_T, padded on the
    right; mask_R_T: 1 at completion tokens) and returns

        logprobs_R_T: float32, of softmax(logits / temperature); gradients flow if they are enabled; padding holds 0.
        entropy_R_T: of the whole distribution that the token was drawn from [nats]; without gradient; padding holds 0.
    """

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def plain(
        self, prompts: list[list[int]], owner_R: torch.Tensor, tokens_R_T: torch.Tensor, mask_R_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every row on its own, prompt and completion, padded on the right: causal attention needs no mask."""
        owner, lengths = owner_R.tolist(), mask_R_T.sum(-1).tolist()
        rows = np.zeros((len(owner), max(len(prompts[p]) + n for p, n in zip(owner, lengths, strict=True))), np.int64)
        for row, p, n, tokens in zip(rows, owner, lengths, tokens_R_T.cpu().numpy(), strict=True):
            row[: len(prompts[p])] = prompts[p]
            row[len(prompts[p]) : len(prompts[p]) + n] = tokens[:n]
        first = torch.tensor([len(prompts[p]) for p in owner], device=tokens_R_T.device)
        return self(torch.from_numpy(rows).to(tokens_R_T.device), first, tokens_R_T, mask_R_T)

    def forward(
        self, rows_R_S: torch.Tensor, first_R: torch.Tensor, tokens_R_T: torch.Tensor, mask_R_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`plain`'s second half: whole rows, and where in them the completions start. All that FSDP needs to see."""
        with self._layers_as_configured():
            hidden_R_S_H = self.model.base_model(input_ids=rows_R_S, use_cache=False).last_hidden_state
            row, t = mask_R_T.nonzero(as_tuple=True)
            return self.read(hidden_R_S_H[row, first_R[row] - 1 + t], tokens_R_T, mask_R_T)

    def shared(
        self, prompts: list[list[int]], owner_R: torch.Tensor, tokens_R_T: torch.Tensor, mask_R_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every prompt once, then the completions on its cache."""
        out, mask_P_T = run_prompts(self.model, prompts)
        cache, mask = out.past_key_values, mask_P_T[owner_R]
        hidden_R_T_H = out.last_hidden_state[owner_R, -1:]
        if tokens_R_T.shape[1] > 1:
            cache.batch_select_indices(owner_R)
            mask = torch.cat([mask, mask_R_T[:, :-1].to(mask.dtype)], dim=1)
            out = self.model.base_model(
                input_ids=tokens_R_T[:, :-1],
                attention_mask=mask,
                position_ids=positions(mask)[:, mask_P_T.shape[1] :],
                past_key_values=cache,
                use_cache=True,
            )
            hidden_R_T_H = torch.cat([hidden_R_T_H, out.last_hidden_state], dim=1)
        return self.read(hidden_R_T_H[mask_R_T.bool()], tokens_R_T, mask_R_T)

    def read(
        self, hidden_N_H: torch.Tensor, tokens_R_T: torch.Tensor, mask_R_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states that predict the tokens of the mask, through the output layer.

        In chunks, that are computed again in the backward pass if there are several.
        """
        where = mask_R_T.bool()
        targets_N = tokens_R_T[where]
        size = max(1, CHUNK // self.model.get_output_embeddings().weight.shape[0])
        if len(targets_N) <= size:
            logprobs_N, entropy_N = self._read_chunk(hidden_N_H, targets_N)
        else:
            parts = [
                checkpoint(self._read_chunk, hidden, targets, use_reentrant=False, preserve_rng_state=False)
                for hidden, targets in zip(hidden_N_H.split(size), targets_N.split(size), strict=True)
            ]
            logprobs_N, entropy_N = (torch.cat(column) for column in zip(*parts, strict=True))
        zeros = torch.zeros(tokens_R_T.shape, device=tokens_R_T.device)
        return zeros.masked_scatter(where, logprobs_N), zeros.masked_scatter(where, entropy_N)

    def _read_chunk(self, hidden_N_H: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_N_V = torch.log_softmax(self.model.get_output_embeddings()(hidden_N_H).float() / self.temperature, -1)
        with torch.no_grad():
            entropy_N = -torch.linalg.vecdot(logprobs_N_V.exp(), logprobs_N_V)
        return logprobs_N_V.gather(-1, targets_N[:, None])[:, 0], entropy_N

    @contextmanager
    def _layers_as_configured(self) -> Iterator[None]:
        """Layers checkpoint their activations only in training mode, which nothing else must be in (dropout)."""
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            layer.training = torch.is_grad_enabled()  # of the layer itself, not of its parts
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False


def run_prompts(model: PreTrainedModel, prompts: list[list[int]]) -> tuple[Any, torch.Tensor]:
    """Hidden states and cache of prompts padded on the left, and the mask of their tokens."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    out = model.base_model(input_ids=tokens, attention_mask=mask, position_ids=positions(mask), use_cache=True)
    return out, mask


def positions(mask_R_T: torch.Tensor) -> torch.Tensor:
    """Position of each token: 0 at the first one that is not padding."""
    return (mask_R_T.cumsum(-1) - 1).clamp(min=0)
