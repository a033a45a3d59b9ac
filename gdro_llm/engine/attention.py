"""Attention on a CPU: the fast way for each use, where transformers' own copies the keys and values of every group.

1. Without gradients torch's kernel reads keys and values that several heads share where they are: the same bits as from
   repeated ones, without the copies.
2. With gradients in bfloat16 torch's kernel makes no use of matrix units: products of all heads of a group together do,
   while a row of scores is short; longer rows go through the kernel in float32.
3. Other formats with gradients stay as transformers has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "gdro_cpu"
LONGEST = 512  # keys a query: up to here all scores are held


def use_cpu_attention(model: PreTrainedModel) -> None:
    """Make a model on a CPU attend by `cpu_attention`, if it attends by torch's kernel now."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, cpu_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def cpu_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa_attention_forward`: query (B, H, Q, D), key and value (B, G, S, D) -> (B, Q, H, D)."""
    differentiated = torch.is_grad_enabled() and query.requires_grad
    plain = attention_mask is None or attention_mask.dtype == torch.bool
    if not plain or others.get("position_bias") is not None or (differentiated and query.dtype != torch.bfloat16):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        return out, None
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and queries > 1:  # causal; the queries are the last ones
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if not differentiated or keys > LONGEST:
        compute = torch.float32 if differentiated else query.dtype
        q, k, v = query.to(compute), key.to(compute), value.to(compute)
        heads = scaled_dot_product_attention(q, k, v, attention_mask, scale=scaling, enable_gqa=True).to(query.dtype)
    else:
        heads = _by_products(query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5)
    return heads.transpose(1, 2).contiguous(), None


def _by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """The queries of all heads that share keys as rows of one product."""
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    rows = (batch, groups, heads // groups * queries)
    scores = ((query * scaling).reshape(*rows, width) @ key.transpose(-1, -2)).view(batch, groups, -1, queries, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-3), torch.finfo(scores.dtype).min)  # padding sees nothing
    probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (probabilities.view(*rows, keys) @ value).view(batch, heads, queries, width)
