"""Tokens in the loop: counted with the prompt, of all processes, for every controller; a budget of them is kept to."""

import json

import literal
import numpy as np
import pytest
import torch

from gdro_core import Observation
from gdro_llm.engine.rollouts import Rollouts
from gdro_llm.training.planners import build_controller
from gdro_llm.training.trainer import train


def test_a_rollout_costs_its_prompt_and_its_completion():
    """As training passes over them: the prompt's tokens with every rollout, the stop token, no padding."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    owner = torch.tensor([0, 0, 2])
    rollouts = Rollouts([[5, 6], [], [7, 8, 9, 9]], owner, mask, mask, mask.float(), mask[:, 0] > 1, ["", "", ""])
    assert rollouts.cost_R.tolist() == [2 + 3, 2 + 1, 4 + 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"controller": "grpo"},
        {"budget": "tokens", "candidates": 1},
        {"budget": "tokens", "candidates": 2, "pilot": 2, "mean_rollouts": 8, "learnt_prior": True},
    ],
)
def test_a_run_logs_its_tokens_and_keeps_to_its_budget(run_config, tmp_path, settings, monkeypatch):
    """The metrics are those of what was observed; what was spent is the sum of all; the state is in the checkpoint."""
    config = run_config(**settings, max_new_tokens=3)
    seen, of = [], Observation.of.__func__

    def spied(cls, plan, rewards, rows=None, *, tokens=None):
        seen.append((plan, np.array(tokens)))
        return of(cls, plan, rewards, rows, tokens=tokens)

    monkeypatch.setattr(Observation, "of", classmethod(spied))
    train(config, tmp_path / "run")
    seen = [(plan, tokens) for plan, tokens in seen if tokens.ndim]  # replan looks at rewards alone
    rows = literal.read_log(tmp_path / "run" / "metrics.jsonl")
    assert len(seen) == len(rows) == 6
    for (plan, tokens), row in zip(seen, rows, strict=True):
        assert tokens.size == plan.counts.sum()
        assert tokens.mean() == pytest.approx(row["rollout_tokens"])
        assert tokens.mean() > row["completion_length"]
        assert 0 <= row["wasted_tokens_share"] <= 1
        assert len(row["bin_tokens"]) == config.num_bins
    assert rows[-1]["rollouts"] == sum(tokens.size for _, tokens in seen)
    if config.budget == "tokens":
        controller = build_controller(config)
        controller.load_state_dict(
            json.loads((tmp_path / "run" / "checkpoint-000006" / "state.json").read_text())["controller"]
        )
        assert controller.tokens.spent == sum(tokens.sum() for _, tokens in seen)
        assert rows[-1]["tokens_excess"] == pytest.approx(controller.tokens.excess)
        assert abs(controller.tokens.excess) < 0.05
        most = 1.5 * config.mean_rollouts * config.batch_size
        assert all(plan.counts.sum() <= most for plan, _ in seen)
    else:
        assert "tokens_excess" not in rows[-1]
