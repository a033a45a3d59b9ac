"""Rewards, prompts and ids belong together in ragged groups: tasks whose answer gives its prompt away."""

import json
from base64 import b64decode

import literal
import numpy as np
import pytest

import gdro_llm.training.trainer as trainer
from gdro_llm.engine.policy import EMBEDDED_MODEL, load_policy
from gdro_llm.engine.workers import SINGLE_PROCESS
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.rewards import GRADERS
from gdro_llm.training.trainer import summarise, train

DIGITS = [f"{i:04d}" for i in range(1234, 10000, 271)]  # no two with the same reversal


@pytest.fixture
def cold(embedded, run_config):
    """The shipped model at a temperature where it reverses four digits nearly always."""
    return load_policy(run_config(model="embedded", temperature=0.05, max_new_tokens=14))


def test_completions_belong_to_the_prompts_of_their_rows(cold):
    """With the right owners nearly all are correct, with owners shifted by one prompt none."""
    problems = [Problem(f"r/{d}", f"r{d}=", d[::-1]) for d in DIGITS]
    counts = np.random.default_rng(0).integers(0, 7, len(problems))
    owner = np.repeat(np.arange(len(problems)), counts)
    rollouts = literal.sample(cold, literal.prompts(cold, [p.prompt for p in problems]), counts, 14, seed=0, rows=17)
    exact = GRADERS["exact"]
    right = [exact(problems[p], text) for p, text in zip(owner, rollouts.texts, strict=True)]
    shifted = [exact(problems[(p + 1) % len(problems)], text) for p, text in zip(owner, rollouts.texts, strict=True)]
    assert np.mean(right) > 0.9
    assert np.mean(shifted) == 0.0


@pytest.mark.parametrize("controller", ["recommended", "published-rollout"])
def test_the_controller_credits_each_id_with_its_own_rewards(cold, run_config, tmp_path, monkeypatch, controller):
    """A third of the problems ask for a wrong answer: after a run with ragged counts their ids have pass rate 0, the
    others nearly 1, and each id has as many rollouts as the plans gave it."""
    rows = [{"id": f"id{i}", "problem": f"r{d}=", "answer": d[::-1] if i % 3 else d} for i, d in enumerate(DIGITS)]
    for name, part in (("train", rows[:24]), ("test", rows[24:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = run_config(
        model="embedded",
        temperature=0.05,
        max_new_tokens=14,
        data=str(tmp_path / "train.jsonl"),
        test_data=str(tmp_path / "test.jsonl"),
        learning_rate=1e-9,
        controller=controller,
        aggregation="prompt",
        steps=9,
        save_every=9,
    )
    plans, build = [], trainer.build_controller

    def spied(config):
        controller = build(config)
        observe = controller.observe
        controller.observe = lambda plan, rewards: (plans.append(plan), observe(plan, rewards))[1]
        return controller

    monkeypatch.setattr(trainer, "build_controller", spied)
    train(config, tmp_path / "run")
    state = json.loads((tmp_path / "run" / "checkpoint-000009" / "state.json").read_text())["controller"]["classifier"]
    assert len(state["ids"]) == 24
    counted = [np.frombuffer(b64decode(state[key]), "<f8") for key in ("successes", "failures")]
    for name, right, wrong in zip(state["ids"], *counted, strict=True):
        rate = right / (right + wrong)
        assert rate > 0.7 if int(name[2:]) % 3 else rate == 0, name
    assert any(np.ptp(plan.counts) > 0 for plan in plans), "the counts must be ragged for this to tell anything"
    assert all(plan.counts.sum() == config.mean_rollouts * config.batch_size for plan in plans)


def test_summary_of_a_step(tiny):
    """reward: every prompt counts once; weighted_reward: by weight; shares of all right, all wrong and mixed prompts;
    entropy and length over tokens, truncation over rollouts."""
    counts, weights = np.array([2, 4, 3]), np.array([1.0, 0.5, 2.0])
    owner = np.repeat(np.arange(3), counts)
    rollouts = literal.sample(tiny, literal.prompts(tiny, ["12+3=", "r5=", "7*8="]), counts, 6, seed=0, rows=100)
    metrics = summarise(np.array([1, 1, 0, 0, 1, 0, 0, 0, 0.0]), owner, weights, rollouts, SINGLE_PROCESS)
    assert metrics["reward"] == pytest.approx((1 + 0.25 + 0) / 3)
    assert metrics["weighted_reward"] == pytest.approx((1 + 0.5 * 0.25) / 3.5)
    assert [metrics[f"{name}_share"] for name in ("all_correct", "all_wrong", "mixed")] == pytest.approx([1 / 3] * 3)
    tokens = int(rollouts.mask_R_T.sum())
    assert metrics["entropy"] == pytest.approx(-float(rollouts.logprobs_R_T.sum()) / tokens, rel=1e-5)
    assert metrics["completion_length"] == pytest.approx(tokens / 9)
    assert metrics["truncated_share"] == pytest.approx(float(rollouts.truncated_R.float().mean()))


def test_the_shipped_model_is_where_the_package_says():
    """`--model embedded` needs no download."""
    if not EMBEDDED_MODEL.is_dir():
        pytest.skip("the shipped model is not there yet")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in EMBEDDED_MODEL.iterdir()}
