"""The arithmetic behind "of_peak" is that of the update's MFU where nothing is shared and nothing left out."""

from dataclasses import replace

import pytest
from bench_work import Step

from gdro_llm.engine.shapes import QWEN3, flops_per_token

STEP = Step(
    prompts=1, prompt_tokens=1, rollouts=1, new_tokens=500, mixed=1.0, reward=0.5, seconds={}, cpu_seconds={}
)  # 500 tokens go in, and a token is drawn after each


@pytest.mark.parametrize("name", QWEN3)
def test_one_rollout_of_a_short_prompt_costs_what_mfu_counts(name):
    """MFU counts the parameters of the norms too, which are below a thousandth."""
    shape = QWEN3[name]
    assert STEP.update_operations(shape) == pytest.approx(500 * flops_per_token(shape, 500), rel=1e-3)
    assert STEP.sample_operations(shape) == pytest.approx(STEP.update_operations(shape) / 3)


def test_a_prompt_counts_once_and_groups_without_gradient_do_not_count():
    """Four rollouts of a long prompt cost little more than one; half as many groups with a gradient cost half."""
    shape = QWEN3["Qwen/Qwen3-0.6B"]
    shared = replace(STEP, prompts=2, rollouts=8, prompt_tokens=1000, new_tokens=2)
    alone = replace(shared, prompts=8)
    assert shared.update_operations(shape) < 0.3 * alone.update_operations(shape)
    assert replace(shared, mixed=0.5).update_operations(shape) == shared.update_operations(shape) / 2
    assert replace(shared, mixed=0.0).sample_operations(shape) == shared.sample_operations(shape)
