"""Gradients of half groups: exact without a sketch, unbiased and close with one, the same whoever has the rows."""

import json
from functools import partial

import literal
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

import gdro_llm.training.components as components
from gdro_core import GDROController, Plan, VarianceComponents
from gdro_llm.config import Config
from gdro_llm.engine.policy import Policy, load_policy
from gdro_llm.engine.rollouts import Rollouts
from gdro_llm.training import trainer
from gdro_llm.training.trainer import train

half_gradients = partial(components.half_gradients, share=1.0)  # of all groups
COUNTS = np.array([4, 0, 5, 3, 9])  # of literal.PROMPTS: one without rollouts, one with too few
REWARDS = np.array([1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0.0])
PLAN = Plan(tuple("abcde"), np.zeros(5, int), np.ones(5), COUNTS, 0.0, 0)


@pytest.fixture
def rollouts(tiny) -> Rollouts:
    return literal.sample(tiny, literal.prompts(tiny), COUNTS, 6, seed=0, rows=100)


def by_autograd(policy: Policy, rollouts: Rollouts, names: tuple[str, ...]) -> dict[tuple[int, int], np.ndarray]:
    """The gradient of every half by automatic differentiation of one sequence at a time, flat, as in theory."""
    named = dict(policy.model.named_parameters())
    weights = [named[name].requires_grad_() for name in names]
    completions, exact = literal.rows(rollouts.tokens_R_T, rollouts.mask_R_T), {}
    for p in np.flatnonzero(COUNTS >= 4).tolist():
        rows = np.flatnonzero(PLAN.owner == p)
        for half, part in enumerate(np.split(rows, [len(rows) // 2])):
            total = 0.0
            for r in part:
                others = [REWARDS[o] for o in part if o != r]
                ids = rollouts.prompts[p]
                logits = policy.model(torch.tensor([ids + completions[r]]), use_cache=False).logits[0].double()
                logprobs = (logits[len(ids) - 1 : -1] / policy.temperature).log_softmax(-1)
                chosen = logprobs[torch.arange(len(completions[r])), torch.tensor(completions[r])].sum()
                flat = torch.cat([g.flatten() for g in torch.autograd.grad(chosen, weights)]).double()
                total = total + (REWARDS[r] - np.mean(others)) * flat.numpy() / len(part)
            exact[p, half] = total
    return exact


def without_sketch(monkeypatch) -> None:
    """Unit matrices in place of the random ones: the sketch is the gradient."""
    monkeypatch.setattr(components, "signs", lambda rows, columns, rng: np.eye(rows))


LAST = ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight")


@pytest.mark.parametrize(
    "settings", [{}, {"update_tokens": 1}, {"gradient_checkpointing": True}, {"trainable_layers": 1}], ids=str
)
def test_halves_are_the_gradients_by_automatic_differentiation(tiny_config, rollouts, monkeypatch, settings):
    """Of the last block's two matrices, one sequence at a time, to rounding; the rest of the answer by hand."""
    without_sketch(monkeypatch)
    config = tiny_config(temperature=0.7, **settings)
    policy = load_policy(config)
    halves = half_gradients(policy, rollouts, REWARDS, PLAN, config, step=3)
    assert sorted(halves.prompts_M.tolist()) == [0, 2, 4]
    exact = by_autograd(policy, rollouts, LAST)
    for m, p in enumerate(halves.prompts_M.tolist()):
        own = np.split(REWARDS[PLAN.owner == p], [COUNTS[p] // 2])
        assert halves.correct_M_2[m].tolist() == [half.sum() for half in own]
        assert halves.trials_M_2[m].tolist() == [len(half) for half in own]
        for half, gradient in enumerate((halves.first_M_D[m], halves.second_M_D[m])):
            scale = np.linalg.norm(exact[p, half])
            assert (scale > 0) == (np.ptp(own[half]) > 0)
            np.testing.assert_allclose(gradient, exact[p, half], atol=1e-5 * max(scale, 1e-3))
    assert not any(weight.grad is not None for weight in policy.model.parameters())
    assert torch.is_grad_enabled()


FAMILIES = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "mistral": MistralConfig,
    "gemma3": Gemma3TextConfig,  # norms behind the matrices, sliding windows
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(tiny, tiny_config, rollouts, monkeypatch, family):
    """The same for other decoders of transformers."""
    without_sketch(monkeypatch)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 16, "intermediate_size": 48, "vocab_size": len(tiny.tokenizer), "pad_token_id": 0}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**sizes), dtype=torch.float32).eval()
    policy = Policy(model, tiny.tokenizer, tiny.stop_ids, 1.0)
    halves = half_gradients(policy, rollouts, REWARDS, PLAN, tiny_config(), step=0)
    exact = by_autograd(policy, rollouts, LAST)
    for m, p in enumerate(halves.prompts_M.tolist()):
        for half, gradient in enumerate((halves.first_M_D[m], halves.second_M_D[m])):
            np.testing.assert_allclose(gradient, exact[p, half], atol=2e-5 * max(np.linalg.norm(exact[p, half]), 1e-3))


def test_adapters_are_measured_at_the_weights_beneath_them(tiny_config, rollouts, monkeypatch):
    pytest.importorskip("peft")
    without_sketch(monkeypatch)
    config = tiny_config(lora_rank=2)
    policy = load_policy(config)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if ".lora_B." in name:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    halves = half_gradients(policy, rollouts, REWARDS, PLAN, config, step=0)
    exact = by_autograd(policy, rollouts, tuple(name.replace(".weight", ".base_layer.weight") for name in LAST))
    for m, p in enumerate(halves.prompts_M.tolist()):
        np.testing.assert_allclose(halves.first_M_D[m], exact[p, 0], atol=1e-5 * max(np.linalg.norm(exact[p, 0]), 1e-3))


def products(halves: components.HalfGroups) -> np.ndarray:
    """(2M, 2M) inner products of all halves, in the order of the prompts."""
    order = np.argsort(halves.prompts_M)
    rows = np.concatenate([halves.first_M_D[order], halves.second_M_D[order]])
    return rows @ rows.T


def test_inner_products_of_sketches_are_unbiased_and_close(tiny, tiny_config, rollouts, monkeypatch):
    """Over 300 sketches of width 8 the mean is the product within 4.5 standard errors; one of width 2000 is near it."""
    config = tiny_config()
    with monkeypatch.context() as patch:
        without_sketch(patch)
        exact = products(half_gradients(tiny, rollouts, REWARDS, PLAN, config, step=0))
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    sketches = (half_gradients(tiny, rollouts, REWARDS, PLAN, config, step=s, width=8) for s in range(300))
    drawn = np.array([products(halves) for halves in sketches])
    error = drawn.std(axis=0) / np.sqrt(300)
    assert (abs(drawn.mean(axis=0) - exact) <= 4.5 * error + 1e-9).all()
    assert (drawn.std(axis=0) > 0.02 * scale).sum() > 10  # there is something to average
    near = products(half_gradients(tiny, rollouts, REWARDS, PLAN, config, step=0, width=2000))
    assert (abs(near - exact) <= 0.2 * scale + 1e-9).all()


def test_the_sketch_is_new_in_every_measurement_and_the_same_for_all_rows(tiny, tiny_config, rollouts):
    """By (seed, step); twice the same numbers."""
    config = tiny_config()
    one, again, other = (half_gradients(tiny, rollouts, REWARDS, PLAN, config, step=s).first_M_D for s in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(np.sort(one, axis=0), np.sort(other, axis=0))


def test_a_share_of_the_rollouts_is_run_and_no_prompt_is_chosen_by_its_rewards(tiny, tiny_config):
    """The answer holds the prompts of a random order up to the group that reaches it, those without a gradient too."""
    counts = np.full(5, 4)
    plan = Plan(tuple("abcde"), np.zeros(5, int), np.ones(5), counts, 0.0, 0)
    rewards = np.array([1, 0, 0, 0] * 2 + [1, 1, 1, 1] + [0, 0, 1, 1] + [0, 1, 0, 1.0])
    rollouts = literal.sample(tiny, literal.prompts(tiny), counts, 6, seed=0, rows=100)
    seen = set()
    for step in range(12):
        halves = half_gradients(tiny, rollouts, rewards, plan, tiny_config(), step=step, share=0.2)
        run = [(2, 2, 0, 0, 4)[p] for p in halves.prompts_M.tolist()]  # rollouts in halves with both outcomes
        assert sum(run[:-1]) < 4 <= sum(run)
        assert (halves.first_M_D.any(axis=1) | halves.second_M_D.any(axis=1)).tolist() == [n > 0 for n in run]
        seen.add(tuple(halves.prompts_M.tolist()))
    assert len(seen) > 4


def test_partial_credit_is_left_out_and_an_empty_answer_is_one(tiny, tiny_config, rollouts):
    partial = np.where(PLAN.owner == 2, 0.5, REWARDS)
    assert sorted(half_gradients(tiny, rollouts, partial, PLAN, tiny_config(), step=0).prompts_M.tolist()) == [0, 4]
    nothing = half_gradients(tiny, rollouts, np.full(len(REWARDS), 0.5), PLAN, tiny_config(), step=0)
    assert nothing.first_M_D.shape == nothing.second_M_D.shape == (0, 2 * components.WIDTH**2)
    assert nothing.correct_M_2.shape == (0, 2)


def learning(config: Config) -> GDROController:
    """A controller that learns components."""
    return GDROController.recommended(config.mean_rollouts, num_bins=config.num_bins, seed=config.seed)


def test_a_run_lets_its_controller_observe_every_few_steps(run_config, tmp_path, monkeypatch):
    """The groups of that step's plan, and what was learnt is saved; not where it is off, nor without components."""
    seen, observe = [], GDROController.observe_gradients

    def observe_gradients(self, plan, rows, first, second, correct, trials):
        assert (trials.sum(axis=1) == plan.counts[rows]).all()
        live = (correct > 0) & (correct < trials)
        assert (first.any(axis=1) == live[:, 0]).all()
        assert (second.any(axis=1) == live[:, 1]).all()
        seen.append((plan.step, int(live.sum())))
        observe(self, plan, rows, first, second, correct, trials)

    monkeypatch.setattr(GDROController, "observe_gradients", observe_gradients)
    monkeypatch.setattr(trainer, "build_controller", learning)
    train(run_config(measure_every=2), tmp_path / "on")
    assert [step for step, _ in seen] == [0, 1, 2, 4]  # at first until kappa is known, in vain
    assert sum(live for _, live in seen) > 0
    state = json.loads((tmp_path / "on" / "checkpoint-000006" / "state.json").read_text())
    assert np.sum(state["controller"]["components"]["pairs"]) > 0
    train(run_config(measure_every=0), tmp_path / "off")
    monkeypatch.setattr(trainer, "build_controller", lambda config: GDROController.uniform(config.mean_rollouts))
    train(run_config(measure_every=2, candidates=1), tmp_path / "uniform")
    assert len(seen) == 4
    assert all(row["measure_s"] >= 0 for row in literal.read_log(tmp_path / "uniform" / "timing.jsonl"))


def test_a_run_learns_kappa_and_logs_it(run_config, tmp_path, monkeypatch):
    """In time it is known, and then it decides; a run that does not measure never knows it."""
    monkeypatch.setattr(VarianceComponents, "useful", True)  # tiny runs do not get there
    train(run_config(measure_every=1, steps=10, eval_every=10, save_every=10), tmp_path / "with")
    train(run_config(measure_every=0), tmp_path / "without")
    rows, other = (literal.read_log(tmp_path / name / "metrics.jsonl") for name in ("with", "without"))
    assert rows[0].keys() >= {"kappa", "cosine", "group_size"}
    assert rows[-1]["kappa"] >= 0
    assert rows[-1]["cosine"] is not None
    assert {(row["kappa"], row["cosine"], row["group_size"]) for row in other} == {(None, None, None)}


@pytest.mark.parametrize("controller", ["grpo", "joint", "joint-null", "implicit", "mopps", "published-prompt"])
def test_controllers_without_components_are_not_measured(run_config, tmp_path, monkeypatch, controller):
    """No gradient of half a group is taken for them, and there is no kappa in their logs."""
    monkeypatch.setattr(components, "half_gradients", lambda *_: pytest.fail("measured"))
    train(run_config(controller=controller, steps=1), tmp_path)
    assert not {"kappa", "cosine", "group_size"} & literal.read_log(tmp_path / "metrics.jsonl")[0].keys()
