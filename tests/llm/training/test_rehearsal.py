"""The largest micro-batch before the first step: it changes nothing, and no real one is larger."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gdro_llm.engine.policy import load_policy
from gdro_llm.training import rehearsal
from gdro_llm.training.gradient import BatchLoss
from gdro_llm.training.rehearsal import rehearse
from gdro_llm.training.update import build_optimizer, update
from tests.llm.training.test_update import record, sampled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rehearsal_changes_nothing(tiny_config, dtype):
    """Weights, gradients and moments: an update after it is the update without it, to the bit."""
    config = tiny_config(dtype=dtype, update_tokens=64)
    after = []
    for rehearsed in (False, True):
        policy = load_policy(config)
        optimizer = build_optimizer(policy, config)
        if rehearsed:
            rehearse(policy, optimizer, 7, config)
            assert not optimizer.state
            assert all(weight.grad is None for weight in policy.model.parameters())
        rollouts, advantages = sampled(policy)
        update(policy, optimizer, record(rollouts, advantages, np.ones(len(advantages))), config)
        after.append([weight.detach().clone() for weight in policy.model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*after, strict=True))


def test_it_runs_as_many_tokens_as_a_micro_batch_may_have(tiny_config, monkeypatch):
    """And at least one row of the greatest length, in one pass, also with several mini-batches."""
    seen = []

    class Watched(BatchLoss):
        def gradient(self, minibatch):
            seen.append((self.rows, minibatch.micro_batches))
            return super().gradient(minibatch)

    monkeypatch.setattr(rehearsal, "BatchLoss", Watched)
    for update_tokens, rows in ((5, 1), (13, 1), (26, 2), (64, 4)):
        config = tiny_config(update_tokens=update_tokens, batch_size=8, minibatches=4)
        policy = load_policy(config)
        rehearse(policy, build_optimizer(policy, config), 7, config)
        (drawn, micro_batches) = seen.pop()
        assert not seen
        assert [len(part) for part in micro_batches] == [rows]
        assert np.all([len(ids) == 7 for ids in drawn.prompts])
        assert drawn.mask_R_T.sum() == rows * config.max_new_tokens
        assert not drawn.shared
