"""A run killed after a checkpoint and resumed equals an uninterrupted one bit for bit, with the update's options."""

import json
import signal
from dataclasses import replace

import literal
import numpy as np
import pytest
from safetensors.torch import load_file
from test_run_directory import assert_same_run, die_at, fork_and_die

import gdro_llm.training.trainer as trainer
from gdro_llm.cli import main
from gdro_llm.config import UsageError
from gdro_llm.measuring.run_directory import RunDirectory
from gdro_llm.training.trainer import train

CASES = {
    "reference": {"kl_coef": 0.1, "passes": 2, "minibatches": 2, "importance_cap": 2.0, "trainable_layers": 1},
    "adapters": {"lora_rank": 2, "kl_coef": 0.1, "weight_decay": 0.1, "warmup_steps": 4},
    "bfloat16": {"dtype": "bfloat16", "importance_cap": 2.0, "max_sampler_gap": 1.0, "gradient_checkpointing": True},
    "bfloat16-adapters": {"dtype": "bfloat16", "lora_rank": 2, "max_sampler_gap": 1.0},
    "masked": {
        "loss": "gspo",
        "overlong": "mask",
        "model": "embedded",
        "data": "cells",
        "test_data": "",
        "max_new_tokens": 4,
    },
    "punished": {"loss": "dr_grpo", "overlong": "punish", "overlong_buffer": 2, "max_new_tokens": 3},
    "tokens": {"budget": "tokens", "candidates": 1, "kl_coef": 0.1, "minibatches": 2, "train_problems": 16},
    "preserved": {
        "controller": "joint",
        "loss": "cispo",
        "aggregation": "prompt",
        "preserve_objective": True,
        "minibatches": 4,
    },
}
FAST = ("reference", "adapters", "bfloat16-adapters")


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in FAST)]
)
def test_a_killed_run_equals_an_uninterrupted_one(run_config, tmp_path, name):
    """Logs, weights, adapters, moments and controller; steps 3 and 4 are drawn, scored and trained anew."""
    config = run_config(steps=4, eval_every=4, save_every=2, test_problems=5, **CASES[name])
    train(config, tmp_path / "whole")
    rows = literal.read_log(tmp_path / "whole" / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 for row in rows[2:]), "the steps after the kill must train for this to count"
    first, last = (tmp_path / "whole" / f"checkpoint-00000{n}" / "model.safetensors" for n in (2, 4))
    assert any(
        not np.array_equal(a, b) for a, b in zip(load_file(first).values(), load_file(last).values(), strict=True)
    )
    killed = tmp_path / "killed"
    assert fork_and_die(config, killed, lambda: die_at(trainer, "append", 7)) == signal.SIGKILL
    assert (killed / "checkpoint-000002").is_dir()
    train(config, killed, resume=True)
    assert_same_run(killed, tmp_path / "whole")


def test_a_run_of_a_version_without_some_keys_goes_on_and_is_evaluated(run_config, tmp_path, capsys):
    """Its config.json lacks them, and they have their defaults; with another value the run does not go on."""
    config = run_config(steps=4, eval_every=4)
    train(config, tmp_path / "whole")
    run = tmp_path / "run"
    assert fork_and_die(config, run, lambda: die_at(trainer, "append", 7)) == signal.SIGKILL
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    for key in ("cvar_alpha", "chi_square_rho", "thinking", "log_to"):
        del settings[key]
    (run / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(
        UsageError, match=r"another configuration \(adversary 'entropic' -> 'cvar', cvar_alpha 0.5 -> 0.3"
    ):
        train(replace(config, adversary="cvar", cvar_alpha=0.3), run, resume=True)
    assert main(["eval", str(run), "--data", config.test_data, "--out", str(tmp_path / "eval")]) == 0
    capsys.readouterr()
    train(config, run, resume=True)
    assert_same_run(run, tmp_path / "whole")
    assert (run / "config.json").read_text(encoding="utf-8") == config.to_json()


def test_a_run_of_a_version_in_which_recommended_was_joint_play_goes_on(run_config, tmp_path, capsys):
    """As `joint`, to the bit; as today's recommended controller it is refused, and both are named."""
    config = run_config(controller="joint", steps=4, eval_every=4)
    train(config, tmp_path / "whole")
    run = tmp_path / "run"
    assert fork_and_die(config, run, lambda: die_at(trainer, "append", 7)) == signal.SIGKILL
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    settings |= {"controller": "recommended", "min_rollouts": 2, "adversary_step": 2.0}
    for key in ("candidates", "kappa", "measure_every", "verifier_error"):
        del settings[key]
    (run / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert RunDirectory(run, killed=True).config["controller"] == "joint"
    with pytest.raises(
        UsageError, match=r"another configuration \(controller 'joint' -> 'recommended', min_rollouts 2 -> 0"
    ):
        train(run_config(steps=4, eval_every=4), run, resume=True)
    assert main(["eval", str(run), "--data", config.test_data, "--out", str(tmp_path / "eval")]) == 0
    capsys.readouterr()
    train(config, run, resume=True)
    assert_same_run(run, tmp_path / "whole")
    assert (run / "config.json").read_text(encoding="utf-8") == config.to_json()
