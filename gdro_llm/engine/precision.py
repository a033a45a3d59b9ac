"""The number format of compute: a copy of the weights that samples, scores and is differentiated.

The optimizer moves float32 weights. Everything else reads a copy of them in the format of compute, which is cast once
after each step of the optimizer: no product casts a weight. Gradients of the copy are added to the float32 weights'
`grad` in float32, parameter by parameter, as soon as a backward pass has them. It is what FSDP does with its
`MixedPrecisionPolicy`, for one process. Buffers (rotary frequencies) keep their format.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def working_copy(model: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """`model` with its weights in `compute`; tied ones stay tied. Backward passes of it end in `model`'s gradients."""
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().to(compute), weight.requires_grad) for weight in model.parameters()
    }
    for weight in model.parameters():
        if weight.requires_grad:
            memo[id(weight)].register_post_accumulate_grad_hook(partial(_hand_over, weight))
    return copy.deepcopy(model, memo)


@torch.no_grad()
def refresh(working: PreTrainedModel, model: PreTrainedModel) -> None:
    """Cast the weights of `model` into its working copy, as they are now."""
    for mine, weight in zip(working.parameters(), model.parameters(), strict=True):
        if weight.requires_grad:
            mine.copy_(weight)


def _hand_over(weight: nn.Parameter, mine: torch.Tensor) -> None:
    gradient, mine.grad = mine.grad, None
    assert gradient is not None
    weight.grad = gradient.to(weight.dtype) if weight.grad is None else weight.grad.add_(gradient)
