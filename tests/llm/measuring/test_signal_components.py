"""`gdro signal --components`: its numbers by hand from exact gradients, and the command."""

import json

import numpy as np
import pytest
import torch

import gdro_llm.measuring.components as measuring
import gdro_llm.training.components as training
from gdro_core import VarianceComponents, best_group_size
from gdro_llm.cli import main
from gdro_llm.config import Config, UsageError, load_preset
from gdro_llm.engine.transformers import HFSampler
from gdro_llm.problems.rewards import Grader

PARTS = ("common", "own", "noise", "cosine")


def test_the_components_are_those_of_exact_gradients(tmp_path, monkeypatch):
    """Unit matrices for sketches: by differentiating each half's weighted log-probability in one go."""
    kept = {}
    draw, grade = HFSampler.sample, Grader.grade
    monkeypatch.setattr(
        HFSampler, "sample", lambda *a, **k: kept.setdefault("rollouts", (a[0].policy, draw(*a, **k)))[1]
    )
    monkeypatch.setattr(Grader, "grade", lambda *a: kept.setdefault("rewards", grade(*a)))
    monkeypatch.setattr(training, "signs", lambda rows, columns, rng: np.eye(rows))
    config = Config(**load_preset("quickstart"))
    result = measuring.measure_components(config, prompts=24, rollouts=6, out=tmp_path)
    (policy, rollouts), rewards = kept["rollouts"], kept["rewards"].reshape(24, 2, 3)
    named = dict(policy.model.named_parameters())
    last = [named[f"model.layers.3.{name}.weight"] for name in ("self_attn.o_proj", "mlp.down_proj")]
    gradients = np.zeros((24, 2, sum(weight.numel() for weight in last)))
    for p, half in np.ndindex(24, 2):
        reward = rewards[p, half]
        rows = p * 6 + half * 3 + np.arange(3)
        advantages = torch.from_numpy((reward - reward.mean()) * 3 / 2 / 3).float()
        logprobs, _ = policy.scorer.plain(
            [rollouts.prompts[p]], torch.zeros(3, dtype=torch.long), rollouts.tokens_R_T[rows], rollouts.mask_R_T[rows]
        )
        flat = torch.autograd.grad((logprobs.sum(-1) * advantages).sum(), last)
        gradients[p, half] = torch.cat([g.flatten() for g in flat]).numpy() if np.ptp(reward) else 0.0
    expected = VarianceComponents(1)
    order = np.random.default_rng([config.seed, 0, 4]).permutation(24)
    first, second = gradients[order, 0], gradients[order, 1]
    expected.observe(np.zeros(24, int), first, second, rewards.sum(axis=2)[order], np.full((24, 2), 3))
    for name in PARTS:
        assert result["components"][name]["value"] == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-4), name
    rate = rewards.reshape(24, 6).mean(axis=1)
    assert result["reward"] == pytest.approx(rate.mean())
    assert sum(row["prompts"] for row in result["bins"]) == result["prompts"] == 24
    assert sum(row["prompts"] * row["pass_rate"] for row in result["bins"]) == pytest.approx(rate.sum())
    whole = sum(row["prompts"] * row["agreement"]["value"] for row in result["bins"]) / 24
    assert whole == pytest.approx(expected.agreement().value[0], rel=1e-3, abs=1e-4)


def test_the_command_says_which_groups_are_best(tmp_path, capsys):
    """On data without exact rates too; the sizes are theorem 17's at the ends of kappa's interval."""
    flags = ["--components", "--prompts", "30", "--rollouts", "8", "--data", "cells-shared", "--out", str(tmp_path)]
    assert main(["signal", "quickstart", *flags]) == 0
    result = json.loads((tmp_path / "components.json").read_text())
    kappa = result["components"]["kappa"]
    assert kappa["value"] > 0
    for row in result["bins"]:
        size, v = row["group_size"], row["pass_rate"] * (1 - row["pass_rate"])
        if v > 0:
            assert size["value"] == pytest.approx(float(best_group_size(kappa["value"], v)))
            assert size["low"] <= size["value"]
            assert size["high"] is None or size["high"] >= size["value"]
        else:
            assert size == {"value": None, "low": None, "high": None}
    text = capsys.readouterr().out
    assert (tmp_path / "components.md").read_text().strip() in text
    assert "κ = own / noise" in text
    assert "30 prompts × 8 rollouts" in text


@pytest.mark.parametrize("flags", [["--rollouts", "3"], ["--prompts", "1"]])
def test_too_little_to_measure_is_refused(tmp_path, capsys, flags):
    assert main(["signal", "quickstart", "--components", *flags, "--out", str(tmp_path / "out")]) == 2
    assert f"{flags[0]} must be at least" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_partial_credit_leaves_nothing_to_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(Grader, "grade", lambda self, problems, texts: np.full(len(texts), 0.5))
    with pytest.raises(UsageError, match="no prompt to measure"):
        measuring.measure_components(Config(**load_preset("quickstart")), 4, 4, tmp_path / "out")
