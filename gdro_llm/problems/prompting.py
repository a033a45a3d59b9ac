r"""From a problem to the tokens that the policy continues.

`prompt_style` "plain" is the template unchanged, for base models: after the tokenizer's tokens for a start (BOS) and
without those for an end. "chat" is the template as the user's turn of the tokenizer's chat template, with the opening
of the assistant's turn; `thinking` decides whether that lets the model think first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gdro_llm.config import Config, UsageError
from gdro_llm.problems.problem import Problem

# Templates that ask for what grader "math" looks for first.
CHAT_TEMPLATE = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
BASE_TEMPLATE = (
    "Below is a problem and its solution, step by step, with the final answer within \\boxed{}.\n\n"
    "Problem: {problem}\n\nSolution:"
)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, problem: Problem, config: Config) -> list[int]:
    """Token ids of a problem's prompt. Of the template only {problem} is replaced: other braces are LaTeX."""
    text = config.template.replace("{problem}", problem.prompt)
    if config.prompt_style == "chat":
        if tokenizer.chat_template is None:
            raise UsageError(
                f"prompt_style 'chat' needs a chat template, and the tokenizer of {config.model!r} has none; "
                "use --prompt-style plain (for a base model), or a chat model"
            )
        turn = [{"role": "user", "content": text}]
        ids: Any = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, enable_thinking=config.thinking, tokenize=True, return_dict=False
        )
        return list(ids)
    try:
        encoded = tokenizer(text, return_special_tokens_mask=True)
    except Exception as error:  # re-raised, all of them: tokenizers raises no other kind
        if "[UNK]" not in str(error):
            raise
        raise UsageError(
            f"model {config.model!r} has no tokens for some characters of {problem.id!r} ({text[:60]!r}); "
            "--model takes a language model, --data what the model can read"
        ) from error
    length = len(encoded["input_ids"])
    while length and encoded["special_tokens_mask"][length - 1]:  # added at the end, not written in the text
        length -= 1
    return list(encoded["input_ids"][:length])


def with_prompt_limit(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], config: Config) -> Config:
    """The configuration with `max_prompt_tokens` raised to the longest prompt of these problems: none is left out."""
    longest = max(len(prompt_tokens(tokenizer, problem, config)) for problem in problems)
    return replace(config, max_prompt_tokens=max(longest, config.max_prompt_tokens))


def drop_long_prompts(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], config: Config) -> list[Problem]:
    """Problems whose prompts have at most `max_prompt_tokens` tokens; the others are counted in a line of the log."""
    limit = config.max_prompt_tokens
    kept = [problem for problem in problems if len(prompt_tokens(tokenizer, problem, config)) <= limit]
    if len(kept) < config.batch_size:
        raise UsageError(
            f"only {len(kept)} of {len(problems)} problems have prompts of at most max_prompt_tokens = {limit} tokens, "
            f"fewer than batch_size = {config.batch_size}; raise the one or lower the other"
        )
    if len(kept) < len(problems):
        tqdm.write(f"{len(problems) - len(kept)} of {len(problems)} problems left out: prompts over {limit} tokens")
    return kept
