"""Sample `counts_P[i]` completions of prompt i: the interface of all engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gdro_llm.config import Config
from gdro_llm.engine.policy import Policy
from gdro_llm.engine.rollouts import Decoding, Rollouts
from gdro_llm.engine.transformers import HFSampler


class Sampler(Protocol):
    """An engine that draws completions from the policy."""

    policy: Policy

    def sample(
        self,
        prompts: list[list[int]],
        counts_P: np.ndarray,
        decoding: Decoding,
        *,
        seed: int,
        rows: Sequence[int] | np.ndarray | None = None,
    ) -> Rollouts:
        """Draw `counts_P[i]` >= 0 completions of prompt i.

        Args:
            prompts: P prompts, as token ids.
            counts_P: (P,) completions of each: the plan, whose rows are numbered prompt by prompt.
            decoding: how.
            seed: >= 0; with the row's number it decides the row's draws.
            rows: rows of the plan to draw, in this order; None draws all. The others' draws are untouched.

        Raises:
            UsageError: a prompt is empty or too long for the model, or the logits are not finite.
        """

    def sync(self) -> None:
        """Take the policy's present weights."""

    def sleep(self) -> None:
        """Give the memory back until the next `sync` or `sample`."""

    def close(self) -> None:
        """End the engine."""


def make_sampler(policy: Policy, config: Config) -> Sampler:
    """The engine that `config.engine` names."""
    if config.engine == "hf":
        return HFSampler(policy, config)
    from gdro_llm.engine.vllm import VLLMSampler  # takes seconds to import

    return VLLMSampler(policy, config)
