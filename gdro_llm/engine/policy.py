"""The language model: load it, hand its weights on, save it.

1. The weights that are trained are float32; with `dtype = "bfloat16"` everything is computed by a copy of them in
   bfloat16 (`Policy.working`), under torchrun by FSDP's casts. With adapters (LoRA) the frozen weights are kept in
   `dtype`, the adapters in float32, and there is no copy.
2. With adapters a saved policy is the merged model, for others, and the adapters, to go on training exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gdro_llm.config import Config, UsageError
from gdro_llm.engine.attention import use_cpu_attention
from gdro_llm.engine.precision import refresh, working_copy
from gdro_llm.engine.scoring import CHUNK, TokenLogprobs, positions, run_prompts
from gdro_llm.engine.shapes import EMBEDDED_MODEL
from gdro_llm.engine.tokenizations import Tokenizations
from gdro_llm.engine.workers import SINGLE_PROCESS, Workers, full, reshard, shard

ADAPTERS = "adapters.safetensors"  # beside the merged model in a folder of `Policy.save`


@dataclass
class Policy:
    """A causal language model with its tokenizer. Under torchrun its weights are sharded, see `workers`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: torch.Tensor  # token ids that end a completion
    temperature: float
    source: str = ""  # folder or hub name that `model` was loaded from (with adapters: their base)
    compute: torch.dtype = torch.float32
    start: TokenLogprobs | None = None  # frozen copy of the policy that training started from, if the KL needs one
    workers: Workers = SINGLE_PROCESS

    @cached_property
    def working(self) -> PreTrainedModel:
        """The model to run: `model`, or its copy in the format of compute."""
        if self.compute == torch.float32 or self.workers.size > 1 or any(_adapted(self.model)):
            return self.model
        return working_copy(self.model, self.compute)

    @cached_property
    def scorer(self) -> TokenLogprobs:
        """Log-probabilities under the policy."""
        return TokenLogprobs(self.working, self.temperature)

    def refresh(self) -> None:
        """Tell the copy what the weights are now; after every change of them."""
        if self.working is not self.model:
            refresh(self.working, self.model)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    @contextmanager
    def reference(self) -> Iterator[TokenLogprobs]:
        """The policy that training started from: the frozen copy, or the model with its adapters scaled to nothing."""
        if self.start is not None:
            yield self.start
            return
        adapted = [module for _, module in _adapted(self.model)]
        if not adapted:
            raise RuntimeError("this policy was loaded without a reference: kl_coef was 0")
        for module in adapted:
            module.set_scale("default", 0.0)
        try:
            yield self.scorer
        finally:
            for module in adapted:
                module.set_scale("default", 1.0)

    def named_weights(self, *, tied: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by its Hugging Face name, adapters merged, whole (gathered by all processes together), detached.

        Tied weights come once, or with `tied` under each of their names.
        Adapters are merged in float32 into a new tensor: the model is not touched.
        """
        layers = dict(_adapted(self.model))
        seen: set[int] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if ".lora_" in name or (id(tensor) in seen and not tied):
                continue
            seen.add(id(tensor))
            owner, _, last = name.rpartition(".base_layer.")
            weight = full(tensor.detach())
            if owner and last == "weight":
                layer = layers[owner]
                up, down = (full(part["default"].weight.detach()).float() for part in (layer.lora_B, layer.lora_A))
                weight = weight.float() + layer.scaling["default"] * (up @ down)
            yield name.replace(".base_layer.", "."), weight

    def save(self, folder: Path) -> None:
        """Write model (adapters merged) and tokenizer in Hugging Face format, and the adapters on their own beside it.

        All processes call it; the first one writes.
        """

        def mine(weights: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
            first = self.workers.rank == 0  # the others take part in the gathering and keep nothing
            return {name: weight.cpu().contiguous() for name, weight in weights if first}

        whole = mine(self.named_weights())
        adapters = mine((n, full(p.detach())) for n, p in self.model.named_parameters() if ".lora_" in n)
        if self.workers.rank == 0:
            self.model.save_pretrained(folder, state_dict=whole)
            self.tokenizer.save_pretrained(folder)
            if adapters:
                save_file(adapters, Path(folder) / ADAPTERS)


def _adapted(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Layers with adapters, by name."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def load_policy(config: Config, folder: Path | None = None, workers: Workers = SINGLE_PROCESS) -> Policy:
    """The policy of a configuration, or its later state in `folder`, in evaluation mode, frozen as configured.

    With several processes all of them call it, and each holds its share of the weights afterwards.
    """
    start: Path | str = EMBEDDED_MODEL if config.model == "embedded" else Path(config.model)
    source: Path | str = start if folder is None or config.lora_rank else folder
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device is 'cuda', but torch finds no GPU; use --device cpu or install a CUDA build of torch")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device(device_type(config))
    compute = getattr(torch, settled(config).dtype)
    model, tokenizer = _load(config, source, compute if config.lora_rank else torch.float32)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    stop_ids = torch.tensor(_stop_ids(config, model, tokenizer), device=device)
    if config.trainable_layers:
        _freeze(config, model)
    if config.lora_rank:
        _add_adapters(config, model, folder)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    reference = None
    if config.kl_coef and not config.lora_rank:  # also after a resumption: not `folder`
        frozen = _load(config, start, compute if workers.size == 1 else torch.float32)[0].requires_grad_(False)
        reference = TokenLogprobs(frozen if workers.size > 1 else nn.Module.to(frozen, device), config.temperature)
    policy = Policy(
        model, tokenizer, stop_ids, config.temperature, str(_model_source(source, config)), compute, reference, workers
    )
    if workers.size == 1:
        nn.Module.to(model, device)
    if device.type == "cpu":
        use_cpu_attention(model)
    for scorer in () if workers.size == 1 else (policy.scorer, reference):
        if scorer is not None:
            shard(scorer, decoder_layers(scorer.model), device, compute)
            row = torch.zeros(1, 2, dtype=torch.long, device=device)
            with torch.no_grad():  # the first pass settles that the scorer, and no part of it, is the root
                scorer(row, row[:, 0] + 1, row[:, :1], row[:, :1] + 1)
            reshard(scorer)
    return policy


def device_type(config: Config) -> str:
    """ "cuda" or "cpu"."""
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def settled(config: Config, saved: Mapping[str, Any] | None = None) -> Config:
    """The configuration with `dtype` "auto" settled: as a run that goes on has it, or else as suits this machine."""
    if config.dtype != "auto":
        return config
    fast = device_type(config) == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)
    return replace(config, dtype=(saved or {}).get("dtype", "bfloat16" if fast else "float32"))


def _model_source(source: Path | str, config: Config) -> Path | str:
    """The folder of the model, or else its hub name."""
    if (Path(source) / "config.json").is_file():
        return source
    if Path(source).exists() or config.model.startswith((".", "/", "~")):
        raise UsageError(f"model folder {str(source)!r} has no config.json; give a Hugging Face folder or a hub name")
    return config.model


def _load(config: Config, source: Path | str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model, on the CPU in evaluation mode, and tokenizer; a UsageError for what cannot be trained."""
    source = _model_source(source, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, padding_side="left", trust_remote_code=config.trust_remote_code
        )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,  # a pickle could run code
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "custom code" in str(error) and not config.trust_remote_code:
            raise UsageError(
                f"model {config.model!r} comes with code of its own; read it, then allow it with --trust-remote-code"
            ) from error
        raise UsageError(
            f"cannot load model {config.model!r} ({str(error).splitlines()[0]}); "
            "--model takes a folder with a causal language model and its tokenizer, or a hub name within reach"
        ) from error
    model, loading = loaded
    if loading["missing_keys"]:  # transformers would go on with random numbers
        raise UsageError(f"model {config.model!r} lacks weights, for example {min(loading['missing_keys'])}")
    if not tokenizer.encode("1", add_special_tokens=False):  # transformers makes an empty one up
        raise UsageError(f"model {config.model!r} has no tokenizer files")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of model {config.model!r} names no end token (eos_token)")
    model.eval()  # no dropout: ratios compare the policy with itself
    _refuse_other_heads(config, model)
    return model, tokenizer


def _refuse_other_heads(config: Config, model: PreTrainedModel) -> None:
    """Only models whose logits are the output layer of the last hidden state can be scored in chunks of tokens."""
    head = model.get_output_embeddings()
    if head is not None:
        ids = torch.arange(2)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            again = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        if again.shape == logits.shape and torch.allclose(again, logits, rtol=1e-6, atol=1e-6):
            return
    raise UsageError(
        f"model {config.model!r} ({type(model).__name__}) scales or caps its logits after the output layer, which "
        "is not supported; Llama-, Mistral- and Qwen-like models do not"
    )


def _stop_ids(config: Config, model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokenizer's end, every end of the generation configuration, every token that holds the stop text."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    stop = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
    if config.stop:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        holding = {i for i, text in enumerate(texts) if config.stop in text}
        if not holding:
            raise UsageError(f"stop must be held by some token of the model, got {config.stop!r}")
        stop |= holding
    return sorted(stop)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a decoder."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UsageError(
            f"trainable_layers and several processes need a decoder with blocks in `model.layers`, which "
            f"{type(model).__name__} has not; train all weights, or with lora_rank, in one process"
        )
    return layers


def _freeze(config: Config, model: PreTrainedModel) -> None:
    """All but the last blocks and the final norm."""
    blocks = decoder_layers(model)
    if config.trainable_layers > len(blocks):
        raise UsageError(f"trainable_layers must be at most {len(blocks)}, got {config.trainable_layers}")
    model.requires_grad_(False)
    blocks[-config.trainable_layers :].requires_grad_(True)
    model.base_model.norm.requires_grad_(True)


def _add_adapters(config: Config, model: PreTrainedModel, folder: Path | None) -> None:
    """Low-rank adapters in all linear layers but the output, in float32; everything else is frozen."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError("lora_rank needs peft: pip install peft") from error
    settings: dict[str, Any] = {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **settings), model)
    model.eval()
    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in adapters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if folder is None:
        return
    if not (folder / ADAPTERS).is_file():
        raise UsageError(f"{folder} holds no {ADAPTERS}: it was not written by a run with lora_rank")
    saved = load_file(folder / ADAPTERS)
    if saved.keys() != adapters.keys() or any(saved[name].shape != adapters[name].shape for name in saved):
        raise UsageError(f"{folder / ADAPTERS} does not fit the model and lora_rank {config.lora_rank}")
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(saved[name])


@dataclass
class Prefix:
    """Encoded prompts, or rows repeated from them."""

    cache: Any  # transformers' DynamicCache, rows as in mask_P_T
    mask_P_T: torch.Tensor  # 1 at tokens
    logits_P_V: torch.Tensor  # of the first completion token

    def select(self, rows: torch.Tensor) -> Prefix:
        """Rows of the prefix, repeated or reordered. The cache is changed in place: the old prefix is spent."""
        self.cache.batch_select_indices(rows)
        return Prefix(self.cache, self.mask_P_T[rows], self.logits_P_V[rows])


def encode(policy: Policy, prompts: list[list[int]]) -> Prefix:
    """Run the prompts, as token ids, through the model once."""
    out, mask = run_prompts(policy.working, prompts)
    return Prefix(out.past_key_values, mask, policy.working.get_output_embeddings()(out.last_hidden_state[:, -1]))


def completion_logprobs(
    policy: Policy, prompts: list[list[int]], owner_R: torch.Tensor, tokens_R_T: torch.Tensor, mask_R_T: torch.Tensor
) -> torch.Tensor:
    """(R, T) log-probabilities of completion tokens, every prompt encoded once; see `TokenLogprobs`."""
    return policy.scorer.shared(prompts, owner_R, tokens_R_T, mask_R_T)[0]


@torch.no_grad()
def success_probability(
    policy: Policy,
    prompts: list[list[int]],
    accepted: Sequence[Sequence[str]],
    *,
    max_new_tokens: int,
    temperature: float,
    rows: int,
) -> torch.Tensor:
    """Exact chance that a completion sampled from the whole distribution is an accepted text, (P,) float64.

    The sum over all token sequences that decode to one, by teacher forcing, see `sequence_logprobs`.

    Args:
        policy: the model.
        prompts: P prompts, as token ids.
        accepted: per prompt, every text that is graded correct.
        max_new_tokens: where sampling cuts completions off.
        temperature: of sampling.
        rows: sequences scored side by side.

    Raises:
        ValueError: of `Tokenizations`.
    """
    total_P = torch.zeros(len(prompts), dtype=torch.float64)
    sequences = accepted_sequences(policy, accepted, max_new_tokens)
    sequences.sort(key=lambda sequence: (len(prompts[sequence[0]]), sequence[0], len(sequence[1])))  # little padding
    for start in range(0, len(sequences), rows):
        chunk = sequences[start : start + rows]
        logprobs_S = sequence_logprobs(policy, prompts, chunk, max_new_tokens, temperature)
        total_P.index_add_(0, torch.tensor([p for p, _ in chunk]), logprobs_S.exp().cpu())
    return total_P


def tokenizations(policy: Policy) -> Tokenizations:
    """Which token sequences, without their stop token, decode to a text; raises its ValueError."""
    size = policy.model.get_output_embeddings().weight.shape[0]
    return Tokenizations(policy.tokenizer, size, policy.stop_ids.tolist())


def accepted_sequences(
    policy: Policy, accepted: Sequence[Sequence[str]], max_new_tokens: int
) -> list[tuple[int, list[int]]]:
    """Every sequence of tokens that decodes to an accepted text, each with the number of its prompt."""
    every = tokenizations(policy)
    return [
        (p, ids)
        for p, texts in enumerate(accepted)
        for text in dict.fromkeys(texts)
        for ids in every.of(text, max_new_tokens)
    ]


def sequence_logprobs(
    policy: Policy,
    prompts: list[list[int]],
    sequences: Sequence[tuple[int, list[int]]],
    max_new_tokens: int,
    temperature: float,
) -> torch.Tensor:
    """Log-probability that sampling yields each sequence, (S,) float64; gradients flow if they are enabled.

    A sequence of `max_new_tokens` is cut off; after a shorter one any stop token may follow. Every prompt is encoded
    once.

    Args:
        policy: the model.
        prompts: as token ids.
        sequences: S times the number of a prompt and tokens, without the stop token.
        max_new_tokens: length of the longest completion.
        temperature: of sampling.
    """
    device, lengths = policy.device, [len(ids) for _, ids in sequences]
    place = {p: i for i, p in enumerate(dict.fromkeys(p for p, _ in sequences))}
    owner_S = torch.tensor([place[p] for p, _ in sequences], device=device)
    end = -1  # in the place of the stop token
    padded = [[*ids, end] + [0] * (max(lengths) - len(ids)) for _, ids in sequences]
    tokens_S_T = torch.tensor(padded, device=device)
    drawn_S = torch.tensor([min(n + 1, max_new_tokens) for n in lengths], device=device)
    mask_S_T = (torch.arange(tokens_S_T.shape[1], device=device) < drawn_S[:, None]).long()
    out, mask_P_W = run_prompts(policy.working, [prompts[p] for p in place])
    hidden_S_T_H = out.last_hidden_state[owner_S, -1:]
    if max(lengths):
        out.past_key_values.batch_select_indices(owner_S)
        mask = torch.cat([mask_P_W[owner_S], mask_S_T[:, :-1]], dim=1)
        forced = policy.working.base_model(
            input_ids=tokens_S_T[:, :-1].clamp(min=0),
            attention_mask=mask,
            position_ids=positions(mask)[:, mask_P_W.shape[1] :],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        hidden_S_T_H = torch.cat([hidden_S_T_H, forced.last_hidden_state], dim=1)
    where = mask_S_T.bool()
    hidden_N_H, token_N, head = hidden_S_T_H[where], tokens_S_T[where], policy.working.get_output_embeddings()
    size = max(1, CHUNK // head.weight.shape[0])
    parts = []
    for hidden, token in zip(hidden_N_H.split(size), token_N.split(size), strict=True):
        logprobs = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
        of_token = logprobs.gather(-1, token.clamp(min=0)[:, None])[:, 0]
        parts.append(torch.where(token == end, logprobs[:, policy.stop_ids].logsumexp(-1), of_token))
    total_S = torch.zeros(len(sequences), dtype=torch.float64, device=device)
    return total_S.index_add(0, where.nonzero()[:, 0], torch.cat(parts).double())
