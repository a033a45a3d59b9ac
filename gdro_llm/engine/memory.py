"""GPU memory of a run, estimated from the model's shape before anything is loaded: `gdro plan-memory`.

Bytes on each of N GPUs (sharded by FSDP2 where N > 1), in the three phases of a step:

    sample     weights, moments, reference stay; vLLM takes its share of the GPU, or the hf engine its key-value cache
    backward   weights, gradients, moments, reference; casts, activations and a chunk of logits of one micro-batch
    step       weights, gradients, moments, reference; temporaries of the optimizer

What it takes for granted of the loop: weights, gradients and AdamW's moments are float32 (4 + 4 + 8 bytes a parameter;
adamw8bit 2 and its scales), except that the frozen weights under adapters are in `dtype`; AdamW is fused; gradients are
dropped before sampling; vLLM sleeps while the update runs and torch's cache is emptied before it wakes; in one process
a copy of the weights in bfloat16 computes (`precision`); logits exist in chunks of `CHUNK` elements. Saved activations
are counted for a padded micro-batch; `tests/llm/engine/test_memory.py` compares them with what torch saves. Gigabytes
are 1e9 bytes: an "80 GB" card has 85, and the difference is a margin for `--gpu-memory 80`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gdro_llm.config import Config, UsageError
from gdro_llm.engine.shapes import Shape, UnknownShape, shape_of

CHUNK = 2**27  # logits that exist at once
CONTEXT = 1.5e9  # CUDA context, cuBLAS and NCCL buffers
SLACK = 0.05  # torch's allocator: share of what it hands out that fragments
VLLM_WORK = 2e9  # vLLM's own activations and CUDA graphs, inside its share
VLLM_ASLEEP = 1.5e9  # what a sleeping vLLM keeps
PHASES = ("sample", "backward", "step")


@dataclass(frozen=True)
class Estimate:
    """Bytes by item and phase on each GPU."""

    items: dict[str, tuple[float, float, float]]  # sample, backward, step
    gpu_bytes: float
    vllm_lacks: float  # bytes that vLLM's share is short of for one sequence of full length
    sequences: int  # of full length that fit in the key-value cache at once

    @property
    def phases(self) -> dict[str, float]:
        """Bytes by phase."""
        return dict(zip(PHASES, (sum(column) for column in zip(*self.items.values(), strict=True)), strict=True))

    @property
    def peak(self) -> float:
        """Most bytes at once."""
        return max(self.phases.values())

    @property
    def shortage(self) -> float:
        """Bytes that are missing; 0 where the run fits."""
        return max(self.peak - self.gpu_bytes, self.vllm_lacks, 0.0)


def trained_parameters(config: Config, shape: Shape) -> int:
    """How many parameters have gradients and moments."""
    if config.lora_rank:
        return shape.adapter_parameters(config.lora_rank)
    if config.trainable_layers:
        return config.trainable_layers * shape.block_parameters + shape.hidden_size
    return shape.parameters


def saved_per_token(config: Config, shape: Shape) -> int:
    """Bytes that one block saves per token for its backward pass (counted in transformers' Qwen3 with SDPA)."""
    d, q, k, f = shape.hidden_size, shape.query_width, shape.key_width, shape.intermediate_size
    bf16 = _bytes(config) == 2  # norms and softmax compute in float32 all the same
    saved = 16 * d + 14 * q + 8 * k + 8 * f if bf16 else 24 * d + 24 * q + 16 * k + 16 * f
    if config.lora_rank:  # adapters save their input once more, and what lies between their matrices
        saved += (2 if bf16 else 4) * sum(inputs + config.lora_rank for inputs, _ in shape.linears)
    return saved


def _bytes(config: Config) -> int:
    """Of a number in the format of compute, on a GPU."""
    return 4 if config.dtype == "float32" else 2


def activation_bytes(config: Config, shape: Shape) -> float:
    """Activations of a micro-batch at their peak: all blocks', or with checkpointing their inputs and one block's."""
    row = config.max_prompt_tokens + config.max_new_tokens
    tokens = max(config.update_tokens, row)  # a micro-batch has at least one row
    c, d = _bytes(config), shape.hidden_size
    blocks = config.trainable_layers or shape.num_hidden_layers
    saved = saved_per_token(config, shape)
    kept = blocks * c * d + saved if config.gradient_checkpointing else blocks * saved
    in_flight = 2 * c * shape.intermediate_size + 8 * d  # gradients between two products
    around = 16 * d  # embedding's output, final norm
    return tokens * (kept + in_flight + around + 3 * row)  # the mask: a bool and a cast of it per pair


def estimate(config: Config, gpu_bytes: float, gpus: int = 1, shape: Shape | None = None) -> Estimate:
    """Memory of a run on each of `gpus` GPUs of `gpu_bytes` bytes.

    Raises:
        UnknownShape: of the model.
    """
    shape = shape or shape_of(config.model)
    c = _bytes(config)
    lora, trained = bool(config.lora_rank), trained_parameters(config, shape)
    everything = trained == shape.parameters
    head = shape.vocab_size * shape.hidden_size
    row = config.max_prompt_tokens + config.max_new_tokens
    items: dict[str, tuple[float, float, float]] = {}

    weights = (c * shape.parameters + 4 * trained if lora else 4 * shape.parameters) / gpus
    items["weights"] = (weights, weights, weights)
    items["gradients"] = (0.0, 4 * trained / gpus, 4 * trained / gpus)
    moments = (8 if config.optimizer == "adamw" else 2 * (1 + 4 / 256)) * trained / gpus  # a float32 per 256 bytes
    items["moments"] = (moments, moments, moments)
    if config.kl_coef and not lora:  # with adapters the reference is the model without them
        reference = (c if gpus == 1 else 4) * shape.parameters / gpus
        items["reference"] = (reference, reference, reference)

    whole = c * (2 * shape.block_parameters + shape.embedding_parameters)  # two blocks on their way, and the root
    if gpus > 1:
        reduced = (c + 4) * max(shape.block_parameters, shape.embedding_parameters) if everything else 0
        casts, sampler_casts = whole + reduced, whole
    else:
        casts = sampler_casts = 0
        copy = 0 if c == 4 or lora else c * shape.parameters
        items["copy of the weights that computes"] = (copy, copy, copy)

    cache_row = 2 * shape.num_hidden_layers * shape.key_width * c * row
    if config.engine == "vllm":
        share = config.vllm_memory * gpu_bytes
        cache = share - c * shape.parameters - VLLM_WORK
        pushed = 4 * head if gpus > 1 or lora else 0  # one weight at a time, whole and merged
        items["vLLM (asleep outside of sampling)"] = (share, VLLM_ASLEEP, VLLM_ASLEEP)
        items["weights on their way to vLLM"] = (pushed, 0.0, 0.0)
        sequences, lacks = max(0, int(cache // cache_row)), max(0.0, cache_row - cache)
    else:
        rows = config.sample_rows
        items["key-value cache"] = (rows * cache_row * (1 + 1 / shape.num_hidden_layers), 0.0, 0.0)
        items["logits of the sampler"] = (rows * shape.vocab_size * (c + 12.0), 0.0, 0.0)
        sequences, lacks = rows, 0.0

    items["casts and gathered weights"] = (0.0 if config.engine == "vllm" else sampler_casts, casts, 0.0)
    items["activations"] = (0.0, activation_bytes(config, shape), 0.0)
    chunk = min(CHUNK, max(config.update_tokens, row) * shape.vocab_size)
    items["logits"] = (0.0, chunk * (c + 12.0) + (head * (c + 4.0) if everything else 0.0), 0.0)
    temporaries = 0.0 if config.optimizer == "adamw" else 4.0 * min(head, trained)  # one weight's moments
    items["temporaries of the optimizer"] = (0.0, 0.0, temporaries)
    torch_bytes = [sum(v[i] for name, v in items.items() if not name.startswith("vLLM")) for i in range(3)]
    overhead = [CONTEXT + SLACK * size for size in torch_bytes]
    items["CUDA context, fragments"] = (overhead[0], overhead[1], overhead[2])
    return Estimate(items, gpu_bytes, lacks, sequences)


def summary(needs: Estimate, gpus: int) -> str:
    """One line: each phase in GB a GPU."""
    phases = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in needs.phases.items())
    return f"{phases} GB on {gpus} x {needs.gpu_bytes / 1e9:.0f} GB, {needs.sequences} full-length sequences at once"


def table(config: Config, gpu_bytes: float, gpus: int = 1) -> str:
    """Items by phase as text."""
    shape = shape_of(config.model)
    needs = estimate(config, gpu_bytes, gpus, shape)
    rows = [*needs.items.items(), ("in all", tuple(needs.phases.values()))]
    lines = [
        f"{config.model}: {shape.parameters:,} parameters, {trained_parameters(config, shape):,} trained",
        f"{f'GB on each of {gpus} x {gpu_bytes / 1e9:.0f} GB':34s}" + "".join(f"{name:>10s}" for name in PHASES),
        *(f"{name:34s}" + "".join(f"{size / 1e9:10.1f}" for size in sizes) for name, sizes in rows),
        f"key-value cache: {needs.sequences} sequences of {config.max_prompt_tokens + config.max_new_tokens} tokens",
    ]
    return "\n".join(lines)


def check_fits(config: Config, gpu_bytes: float, gpus: int = 1) -> str:
    """The summary of a run that fits; one of a model whose shape is not known says so.

    Raises:
        UsageError: it does not fit; names what is short and changes that make it fit, cheapest first.
    """
    try:
        needs = estimate(config, gpu_bytes, gpus)
    except UnknownShape as error:
        return f"memory is not estimated: {error}"
    if not needs.shortage:
        return summary(needs, gpus)
    causes = [
        f"{name} needs {size / 1e9:.1f} GB of {gpu_bytes / 1e9:.1f} GB"
        for name, size in needs.phases.items()
        if size > gpu_bytes
    ]
    if needs.vllm_lacks:
        causes.append(
            f"vLLM's {config.vllm_memory:g} of {gpu_bytes / 1e9:.1f} GB is {needs.vllm_lacks / 1e9:.1f} GB short of "
            "its weights and one sequence"
        )
    raise UsageError(
        f"{config.model} does not fit on {gpus} GPU{'s' * (gpus > 1)}: {'; '.join(causes)}. "
        f"{remedies(config, gpu_bytes, gpus)}"
    )


def remedies(config: Config, gpu_bytes: float, gpus: int = 1) -> str:
    """Changes of the configuration that fit: any one that does alone, cheapest first; else the fewest together."""
    start = (config, gpus)
    alone = []
    for ladder in _ladders(config, gpus):
        fits = next((change for change in ladder if not _shortage(start, [change], gpu_bytes)), None)
        alone += [fits] if fits else []
    if alone:
        return f"Any one of these makes it fit: {', '.join(map(_flag, alone))}"
    chosen: list[dict[str, Any]] = []
    for ladder in _ladders(config, gpus):  # each as far as it helps, until it fits
        best = min(ladder, key=lambda change: _shortage(start, [*chosen, change], gpu_bytes))
        if _shortage(start, [*chosen, best], gpu_bytes) < _shortage(start, chosen, gpu_bytes):
            chosen.append(best)
        if not _shortage(start, chosen, gpu_bytes):
            for change in chosen.copy():  # without those that later ones made needless
                rest = [other for other in chosen if other is not change]
                chosen = chosen if _shortage(start, rest, gpu_bytes) else rest
            return f"These together make it fit: {', '.join(map(_flag, chosen))}"
    return "No change of the settings makes it fit: take a smaller model or a larger GPU"


def _ladders(config: Config, gpus: int) -> Iterator[list[dict[str, Any]]]:
    """Kinds of changes, cheapest first; within a kind, smallest first."""
    if not config.gradient_checkpointing:
        yield [{"gradient_checkpointing": True}]
    row = config.max_prompt_tokens + config.max_new_tokens
    halves = [config.update_tokens >> i for i in range(1, 20)]
    if fewer := [{"update_tokens": n} for n in halves if n >= row]:
        yield fewer
    if config.engine == "vllm":
        shares = [i / 20 for i in range(18, 1, -1)]
        lower, higher = [s for s in shares if s < config.vllm_memory], [s for s in shares if s > config.vllm_memory]
        yield [{"vllm_memory": s} for s in (*lower, *reversed(higher))]
    elif config.sample_rows > 1:
        yield [{"sample_rows": config.sample_rows >> i} for i in range(1, config.sample_rows.bit_length())]
    if config.optimizer == "adamw":
        yield [{"optimizer": "adamw8bit"}]
    if config.kl_coef and not config.lora_rank:
        yield [{"kl_coef": 0.0}]
    if not config.lora_rank and not config.trainable_layers:
        yield [{"lora_rank": 32}]
    yield [{"gpus": gpus << i} for i in range(1, 7)]


def _shortage(start: tuple[Config, int], changes: list[dict[str, Any]], gpu_bytes: float) -> float:
    together = {key: value for change in changes for key, value in change.items()}
    gpus = together.pop("gpus", start[1])
    return estimate(replace(start[0], **together), gpu_bytes, gpus).shortage


def _flag(change: dict[str, Any]) -> str:
    ((key, value),) = change.items()
    flag = f"--{key.replace('_', '-')}"
    return f"{value} GPUs" if key == "gpus" else flag if value is True else f"{flag} {value}"
