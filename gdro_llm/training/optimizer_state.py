"""What an optimizer remembers, by parameter name: what one process wrote can be read by several, and the other way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from gdro_llm.config import UsageError

_EIGHT_BIT_SHARDED = (
    "optimizer 'adamw8bit' has no checkpoints on several processes; use --optimizer adamw, or one process"
)
NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, main: bool = True
) -> dict[str, torch.Tensor]:
    """What the optimizer remembers of each parameter, whole and on the CPU: `<parameter>:<key>` -> tensor.

    All processes of a sharded model must call this; only the one with `main` gets the tensors.

    Raises:
        UsageError: 8-bit moments on several processes.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, DTensor):
                if type(value.to_local()) is not torch.Tensor:
                    raise UsageError(_EIGHT_BIT_SHARDED)
                value = value.full_tensor()
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"optimizer state {key!r} of {name} must be a tensor, got {type(value).__name__}")
            if type(value) is torch.Tensor:
                pieces = {f"{name}:{key}": value}
            else:  # torchao's 8-bit moments: codes, scale, qmap
                pieces = {
                    f"{name}:{key}:{piece}": getattr(value, piece) for piece in cast(Any, value).__tensor_flatten__()[0]
                }
            if main:
                tensors |= {full: piece.detach().cpu().contiguous() for full, piece in pieces.items()}
    return tensors


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, tensors: dict[str, torch.Tensor]
) -> None:
    """Give the optimizer what `optimizer_state` returned, sharded as its parameters are."""
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    saved: dict[str, dict[str, Any]] = {}
    for full, tensor in tensors.items():
        name, key, *piece = full.split(":")
        if piece:
            saved.setdefault(name, {}).setdefault(key, {})[piece[0]] = tensor
        else:
            saved.setdefault(name, {})[key] = tensor
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, parameter in parameters:
        for key, value in saved.pop(name, {}).items():
            if isinstance(value, dict):
                value = _eight_bit(value, key, parameter)
            elif value.ndim and value.shape != parameter.shape:
                raise UsageError(f"the checkpoint's {key} of {name} has shape {tuple(value.shape)}, the model another")
            elif value.ndim and isinstance(parameter, DTensor):
                value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            state.setdefault(index[parameter], {})[key] = value
    if saved:
        raise UsageError(f"the checkpoint has optimizer state of {min(saved)}, which this model does not train")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _eight_bit(pieces: dict[str, torch.Tensor], key: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """torchao's 8-bit moment from its pieces."""
    if isinstance(parameter, DTensor):
        raise UsageError(_EIGHT_BIT_SHARDED)
    from torchao.optim.subclass_8bit import OptimState8bit

    on_device = {piece: tensor.to(parameter.device) for piece, tensor in pieces.items()}
    return OptimState8bit(**on_device, signed=key == "exp_avg", dtype=parameter.dtype)
