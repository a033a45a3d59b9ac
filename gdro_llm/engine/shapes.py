"""The shape of a model, read from its configuration, and what follows from it: parameters, arithmetic, MFU.

Arithmetic of the update, per token that goes forward and backward in a sequence of T tokens:

    6 N + 6 L H T    [floating-point operations]

N: parameters that multiply (all but the embedding's look-up; a tied head counts once), two operations forward and four
backward each. L H T: layers times heads times head size times length: scores and mixed values, a token seeing T / 2
others on average. With adapters of A parameters the frozen weights need no gradient of their own: 4 N + 6 A instead.
What gradient checkpointing computes again does not count, so MFU compares implementations rather than flattering them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdro_llm.config import UsageError

EMBEDDED_MODEL = Path(__file__).parents[1] / "assets" / "quickstart"


class UnknownShape(UsageError):
    """The model's shape is not known: no estimates of memory and MFU, though training may work."""


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family: grouped attention, gated MLP, RMSNorm. Names as in transformers' config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    qk_norm: bool = True  # Qwen3: an RMSNorm on each head's queries and keys
    qkv_bias: bool = False  # Qwen2

    @property
    def query_width(self) -> int:
        """Heads times their size."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Key-value heads times their size; values are as wide."""
        return self.num_key_value_heads * self.head_dim

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a block's matrices: query, key, value, output, gate, up, down."""
        d, q, k, f = self.hidden_size, self.query_width, self.key_width, self.intermediate_size
        return [(d, q), (d, k), (d, k), (q, d), (d, f), (d, f), (f, d)]

    @property
    def block_parameters(self) -> int:
        """Of one decoder block."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        biases = self.query_width + 2 * self.key_width if self.qkv_bias else 0
        return sum(inputs * outputs for inputs, outputs in self.linears) + norms + biases

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, and of the head where it is not tied to it."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.num_hidden_layers * self.block_parameters + self.embedding_parameters + self.hidden_size

    def adapter_parameters(self, rank: int) -> int:
        """Of low-rank adapters on every matrix of every block (peft's "all-linear")."""
        return self.num_hidden_layers * rank * sum(inputs + outputs for inputs, outputs in self.linears)


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> Shape:
    return Shape(hidden, intermediate, layers, heads, 8, 128, 151936, tied)


QWEN3 = {  # as on the hub; -Base models have the same shapes
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
}
_FAMILIES = {"qwen3": (True, False), "qwen2": (False, True), "llama": (False, False), "mistral": (False, False)}


def shape_of(model: str) -> Shape:
    """Shape of `config.model`: Qwen3 by name, a folder by its config.json, other hub names by the hub's config.json.

    Raises:
        UnknownShape: no config.json within reach, or of another architecture.
    """
    if (name := model.removesuffix("-Base")) in QWEN3:
        return QWEN3[name]
    path = (EMBEDDED_MODEL if model == "embedded" else Path(model)) / "config.json"
    if path.is_file():
        return _from_config(json.loads(path.read_text(encoding="utf-8")), model)
    from transformers import AutoConfig

    try:
        return _from_config(AutoConfig.from_pretrained(model, trust_remote_code=False).to_dict(), model)
    except (OSError, ValueError) as error:
        raise UnknownShape(
            f"the shape of model {model!r} is not known: no config.json within reach; give a folder or one of "
            f"{', '.join(QWEN3)}"
        ) from error


def _from_config(config: dict[str, Any], model: str) -> Shape:
    if config.get("model_type") not in _FAMILIES:
        raise UnknownShape(
            f"the shape of model {model!r} is not known: model_type must be one of {', '.join(_FAMILIES)}, "
            f"got {config.get('model_type')!r}"
        )
    qk_norm, qkv_bias = _FAMILIES[config["model_type"]]
    heads = config["num_attention_heads"]
    return Shape(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
    )


def flops_per_token(shape: Shape, length: float, *, lora_rank: int = 0) -> float:
    """Floating-point operations of the update per token, as defined above.

    Args:
        shape: the model's.
        length: tokens of the sequence, prompt included; the mean over *tokens* where sequences differ.
        lora_rank: of the adapters that are trained instead of the weights; 0: all weights are trained.
    """
    look_up = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    attention = 6 * shape.num_hidden_layers * shape.query_width * length
    multiplying = shape.parameters - look_up
    if lora_rank:
        return 4 * multiplying + 6 * shape.adapter_parameters(lora_rank) + attention
    return 6 * multiplying + attention


PEAK_FLOPS = (  # part of torch.cuda.get_device_name(): dense bfloat16 [operations/s], NVIDIA's data sheets; first match
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H200 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("B200", 2250e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a GPU by its name [operations/s]; None for one that is not listed."""
    return next((peak for part, peak in PEAK_FLOPS if part in device_name), None)


def mfu(
    shape: Shape, tokens: int, length: float, seconds: float, device_name: str, *, gpus: int = 1, lora_rank: int = 0
) -> float | None:
    """Model FLOPs utilisation of an update: arithmetic of its tokens over what the GPUs could have done meanwhile.

    Args:
        shape: the model's.
        tokens: that went forward and backward on all GPUs, prompts included, padding and left-out rows not.
        length: mean length of their sequences, over tokens.
        seconds: of the update.
        device_name: of `torch.cuda.get_device_name()`.
        gpus: that shared the update.
        lora_rank: as in `flops_per_token`.

    Returns:
        A share of 1; None where the GPU's peak is not known.
    """
    peak = peak_flops(device_name)
    return (
        None if peak is None else tokens * flops_per_token(shape, length, lora_rank=lora_rank) / (seconds * peak * gpus)
    )
