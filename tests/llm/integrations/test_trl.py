"""TRL's trainer under a controller: unchanged without a game; else whole groups, paired columns, exact totals."""

import json
import os
import re
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing

pytest.importorskip("trl", reason="the TRL adapter is tested where trl is installed: pip install 'gdro[trl]'")

import trl
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from gdro_core import GDROController, Plan, PublishedController, TokenBudget
from gdro_core.rollout_game import RolloutGDRO
from gdro_llm.config import UsageError
from gdro_llm.integrations.trl import STATE, GDROTrainer, add_prompt_ids, ragged_advantages
from gdro_llm.problems.public import content_hash

ROOT = Path(__file__).parents[3]
PROMPTS = [f"{a}{op}{b}=" for a, op, b in zip("12345678", "+*-%+*-%", "98765432", strict=True)]
os.environ["CI"] = "true"  # TRL sends no telemetry then


def answer(prompt: str) -> str:
    return prompt[::-1]


def reward(prompt: str, completion: str) -> float:
    """Mixed, and harder for some prompts than for others; a function of what it is given."""
    return float(zlib.crc32((prompt + completion).encode()) % 10 < 1 + PROMPTS.index(prompt))


def data(prompts=PROMPTS, **columns) -> Dataset:
    rows = {"prompt": list(prompts), "answer": [answer(p) for p in prompts], **columns}
    return add_prompt_ids(Dataset.from_dict(rows), source="test")


def controller(**settings) -> GDROController:
    return GDROController.joint_play(**{"mean_rollouts": 4, "min_rollouts": 2, "max_rollouts": 9, **settings})


class Recorder:
    """Keeps every loss and every generation batch of a trainer."""

    def __init__(self, *positional, **named):
        self.losses, self.batches, self.graded, self.observed = [], [], [], []
        super().__init__(*positional, **named)
        if isinstance(self, GDROTrainer):
            observe = self.controller.observe

            def record(plan, observation):
                self.observed.append((plan, observation))
                return observe(plan, observation)

            self.controller.observe = record

    def compute_loss(self, *positional, **named):
        loss = super().compute_loss(*positional, **named)
        self.losses.append(loss.item())
        return loss

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.batches.append({key: output[key].clone() for key in ("prompt_ids", "prompt_mask", "advantages")})
        return output


class Plain(Recorder, GRPOTrainer):
    pass


class Ours(Recorder, GDROTrainer):
    pass


def build(kind, model, folder, *, dataset=None, functions=None, settings=None, **named):
    """A trainer with batches of 4 prompts x 4 rollouts."""
    values = {
        "output_dir": str(folder),
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "max_completion_length": 3,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    graded: list = []

    def correct(prompts, completions, answer, prompt_id, **_):
        for prompt, expected, name in zip(prompts, answer, prompt_id, strict=True):
            assert expected == prompt[::-1], (prompt, expected)
            assert name == f"test/{content_hash(prompt)}"
        rewards = [reward(*pair) for pair in zip(prompts, completions, strict=True)]
        graded.extend(zip(prompt_id, rewards, strict=True))
        return rewards

    trainer = kind(
        str(model),
        correct if functions is None else functions,
        GRPOConfig(**{**values, **(settings or {})}),
        data() if dataset is None else dataset,
        processing_class=AutoTokenizer.from_pretrained(model),
        **named,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.graded = graded
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def assert_same(one, other):
    """To the bit: losses and weights."""
    assert one["losses"] == other["losses"]
    assert len(set(map(abs, one["losses"]))) > 1  # they did train
    assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())


def result(trainer) -> dict:
    """What a process tells its parent."""
    return {
        "losses": trainer.losses,
        "weights": weights(trainer),
        "batches": trainer.batches,
        "graded": trainer.graded,
        "observed": trainer.observed,
        "log": trainer.state.log_history,
        "table": list(trainer._logs["advantages"]),
        "state": trainer.controller.state_dict() if isinstance(trainer, GDROTrainer) else None,
    }


# ---------------------------------------------------------------------------------------------------- two processes

TWO = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}  # 5 prompts; the third lies on both


def child(rank: int, port: int, folder: Path, model: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    settings = TWO | {"save_strategy": "steps", "save_steps": 2}
    runs = {
        "plain": (Plain, TWO, {}),
        "uniform": (Ours, TWO, {"controller": GDROController.uniform(4)}),
        "ragged": (Ours, settings, {"controller": controller()}),
        "resumed": (Ours, settings, {"controller": controller()}),
    }
    results = {}
    for name, (kind, values, named) in runs.items():
        trainer = build(kind, model, folder / name, settings=values, **named)
        trainer.train(resume_from_checkpoint=str(folder / "ragged" / "checkpoint-2") if name == "resumed" else None)
        results[name] = result(trainer)
    made = controller()
    if rank:
        made.observe(made.plan(["test/other"]), [1, 0, 1, 0])
    with pytest.raises(UsageError, match="same on every process"):
        build(Ours, model, folder / "other", settings=TWO, controller=made).train()
    torch.save(results, folder / f"results-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_model) -> list[dict]:
    """What two gloo processes find, by rank."""
    folder = tmp_path_factory.mktemp("trl-two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(child, (port, folder, tiny_model), nprocs=2)
    return [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_model) -> dict:
    settings = {"max_steps": 8}
    trainer = build(Ours, tiny_model, tmp_path_factory.mktemp("trl-one"), settings=settings, controller=controller())
    trainer.train()
    return result(trainer)


def check_ragged(ranks: list[dict], tokenizer) -> None:
    """Rows follow the plan, rewards reach its prompts, advantages are those of ragged groups by hand."""
    ragged = 0  # groups of another size than n_bar that have a signal
    local = len(ranks[0]["batches"][0]["advantages"])
    for b, (plan, observation) in enumerate(ranks[0]["observed"]):
        names = [plan.ids[p] for p in plan.owner]
        assert plan.counts.sum() == len(names) == 4 * len(plan.ids)
        graded = [row for rank in ranks for row in rank["graded"][b * local : (b + 1) * local]]
        assert [name for name, _ in graded] == names
        rewards = np.array([value for _, value in graded])
        np.testing.assert_array_equal(
            observation.correct, [rewards[plan.owner == p].sum() for p in range(len(plan.ids))]
        )
        np.testing.assert_array_equal(observation.trials, plan.counts)
        rows = [rank["batches"][b] for rank in ranks]
        texts = [
            tokenizer.decode(ids[mask.bool()])
            for row in rows
            for ids, mask in zip(row["prompt_ids"], row["prompt_mask"], strict=True)
        ]
        assert [f"test/{content_hash(text)}" for text in texts] == names
        factor = plan.weights[plan.owner]
        unweighted = torch.cat([row["advantages"] for row in rows]).double().numpy() / factor
        for p, count in enumerate(plan.counts):
            if not count:
                continue
            group = rewards[plan.owner == p]
            ragged += count != 4 and np.ptp(group) > 0
            assert abs(unweighted[plan.owner == p].sum()) < 1e-5
            std = np.sqrt(((group - group.mean()) ** 2).sum() / count) * np.sqrt(4 / 3)
            expected = (group - group.mean()) / std if std else 0 * group
            np.testing.assert_allclose(unweighted[plan.owner == p], expected, atol=1e-5)
    assert ragged >= 2


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "num_iterations": 2, "loss_type": "grpo"},
        {"gradient_accumulation_steps": 2, "scale_rewards": "batch", "beta": 0.1, "per_device_train_batch_size": 8},
    ],
    ids=["default", "several-updates", "accumulation-kl"],
)
def test_without_a_game_the_losses_are_those_of_grpotrainer(tiny_model, tmp_path, settings):
    """Same seeds, same bits: of every micro-batch's loss and of all weights after training."""
    plain = build(Plain, tiny_model, tmp_path / "plain", settings=settings)
    plain.train()
    ours = build(Ours, tiny_model, tmp_path / "ours", settings=settings, controller=GDROController.uniform(4))
    ours.train()
    assert_same(result(plain), result(ours))
    assert ours.controller.state_dict()["step"] == len(ours.observed) > 0


def test_two_processes_without_a_game_are_grpotrainers(two):
    for rank in two:
        assert_same(rank["plain"], rank["uniform"])


def test_ragged_groups_are_whole_and_paired(one, tiny_model):
    check_ragged([one], AutoTokenizer.from_pretrained(tiny_model))
    np.testing.assert_allclose(one["table"], one["batches"][-1]["advantages"], rtol=1e-6)  # what TRL's table shows


def test_the_recommended_controller_passes_prompts_over(tiny_model, tmp_path):
    """They have no rows, the budget is spent on the others, and kappa stays the number that it was made with."""
    settings = {"max_steps": 12, "learning_rate": 1e-6}  # pass rates stay what they are
    made, fresh = (GDROController.recommended(4, max_rollouts=9, kappa=0.8) for _ in range(2))
    trainer = build(Ours, tiny_model, tmp_path, settings=settings, controller=made)
    trainer.train()
    check_ragged([result(trainer)], AutoTokenizer.from_pretrained(tiny_model))
    plans = [plan for plan, _ in trainer.observed]
    assert all(plan.counts.sum() == 16 for plan in plans)
    assert any((plan.counts == 0).any() for plan in plans)
    assert made.kappa is None
    assert made.components.state_dict() == fresh.components.state_dict()
    logged = [row for row in trainer.state.log_history if "gdro/reward" in row]
    assert len(logged) == 12
    assert not any("gdro/kappa" in row for row in logged)


def test_two_processes_share_ragged_groups(two, tiny_model):
    """A group may lie on both processes; both make the same plans and learn the same."""
    check_ragged([rank["ragged"] for rank in two], AutoTokenizer.from_pretrained(tiny_model))
    plans = [[plan for plan, _ in rank["ragged"]["observed"]] for rank in two]
    assert all(a.same(b) for a, b in zip(*plans, strict=True))
    assert two[0]["ragged"]["state"] == two[1]["ragged"]["state"]


def test_two_processes_resume_to_the_bit(two):
    for rank in two:
        whole, resumed = rank["ragged"], rank["resumed"]
        assert resumed["losses"] == whole["losses"][4:]
        assert resumed["state"] == whole["state"]
        assert all(torch.equal(w, resumed["weights"][name]) for name, w in whole["weights"].items())


def test_metrics_reach_the_log(one):
    """Bins, price and lead-lag as numbers, none where a bin is empty; prompts count once in gdro/reward."""
    for row, (plan, observation) in zip(one["log"][:-1], one["observed"], strict=True):
        assert row["gdro/unseen_share"] == (plan.bins < 0).mean()
        assert row["gdro/reward"] == pytest.approx((observation.correct / observation.trials).mean())
        same = np.isin(observation.correct, [0]) | (observation.correct == observation.trials)
        assert row["frac_reward_zero_std"] == pytest.approx(same[plan.owner].mean())
        logged = {key for key in row if key.startswith("gdro/bin_rollouts/")}
        assert logged == {f"gdro/bin_rollouts/bin{b:02d}" for b in plan.bins[plan.bins >= 0].tolist()}
        assert row["reward"] == pytest.approx(observation.correct.sum() / 16)  # TRL's: every rollout counts once


@pytest.mark.parametrize("at", [2, 3])
def test_resuming_on_a_boundary_gives_the_same_bits(tiny_model, tmp_path, at):
    """After an epoch (of 2 steps), and in the middle of a later one: losses, weights and the controller's memory."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = build(Ours, tiny_model, tmp_path / "run", settings=settings, controller=controller())
    whole.train()
    rest = build(Ours, tiny_model, tmp_path / "rest", settings=settings, controller=controller())
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{at}"))
    assert_same({**result(whole), "losses": whole.losses[at:]}, result(rest))
    assert rest.controller.state_dict() == whole.controller.state_dict()
    for (plan, _), (other, _) in zip(whole.observed[at:], rest.observed, strict=True):
        assert plan.same(other)


def test_resuming_inside_a_generation_batch_is_refused(tiny_model, tmp_path):
    """`save_steps` there is refused at once; the checkpoint at the end of a run cannot be, and says what it is."""
    settings = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(UsageError, match="save_steps must be a multiple of 2, got 1"):
        build(Ours, tiny_model, tmp_path, settings=settings, controller=controller())
    settings |= {"save_steps": 2, "max_steps": 3}
    trainer = build(Ours, tiny_model, tmp_path, settings=settings, controller=controller())
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-2" / STATE).read_text())["left"] == 0
    again = build(Ours, tiny_model, tmp_path, settings=settings | {"max_steps": 4}, controller=controller())
    with pytest.raises(UsageError, match=r"checkpoint-3 lies inside one with 1 of"):
        again.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2" / STATE).unlink()
    with pytest.raises(UsageError, match="must name a checkpoint of GDROTrainer"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_another_controller_does_not_resume(tiny_model, tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    build(Ours, tiny_model, tmp_path, settings=settings, controller=controller()).train()
    other = build(Ours, tiny_model, tmp_path, settings=settings, controller=controller(seed=1))
    with pytest.raises(ValueError, match="seed"):
        other.train(resume_from_checkpoint=True)


class OwnSampler(Ours):
    def _get_train_sampler(self, dataset=None):
        return super()._get_train_sampler(dataset)


REFUSED = {
    "num_generations must be the controller's mean_rollouts = 4, got 8": {"settings": {"num_generations": 8}},
    "multi_objective_aggregation": {"settings": {"multi_objective_aggregation": "normalize_then_sum"}},
    "remove_unused_columns": {"settings": {"remove_unused_columns": True}},
    "eval_steps must be a multiple of 2": {
        "settings": {
            "per_device_train_batch_size": 8,
            "steps_per_generation": 2,
            "save_strategy": "best",
            "metric_for_best_model": "reward",
            "eval_strategy": "steps",
            "eval_steps": 3,
        }
    },
    "rollout_func": {"rollout_func": lambda prompts, trainer: {}},
    r"train_dataset needs a column 'prompt_id', got prompt: add_prompt_ids": {
        "dataset": Dataset.from_dict({"prompt": PROMPTS})
    },
    "published": {"controller": PublishedController(4)},
    "controller must have no budget of tokens": {
        "controller": GDROController.recommended(4, tokens=TokenBudget()),
    },
    "min_rollouts must be at least 2, or 0, got 1": {"controller": controller(min_rollouts=1)},
    "pilot must be 0, got 2: TRL draws": {"controller": GDROController.recommended(4, pilot=2)},
    "preserve_objective needs .* got prompt, none": {
        "controller": controller(preserve_objective=True),
        "settings": {"scale_rewards": "none"},
        "aggregation": "prompt",
    },
    "preserve_objective needs aggregation 'prompt'": {"controller": controller(preserve_objective=True)},
    "aggregation must be 'rollout' or 'prompt', got 'token'": {"aggregation": "token"},
    "must not override _get_train_sampler": {"kind": OwnSampler},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_loaded(message, tmp_path):
    changes = {"kind": Ours, "controller": controller(), **REFUSED[message]}
    config = {"output_dir": str(tmp_path), "num_generations": 4, "per_device_train_batch_size": 16, "save_steps": 4}
    config |= {"use_cpu": True, "bf16": False, "report_to": "none", **changes.pop("settings", {})}
    with pytest.raises(UsageError, match=message):
        changes.pop("kind")("no/model", None, GRPOConfig(**config), changes.pop("dataset", data()), **changes)


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


@pytest.mark.parametrize("loss", LOSSES)
def test_weighting_an_advantage_is_weighting_the_rows_loss(tiny_model, tmp_path, loss):
    """In TRL's own code, away from the old policy, where clips and masks act: loss(w A) = sum_r w_r loss_r(A_r)."""
    kept = []

    class Keep(Plain):
        def _compute_loss(self, model, inputs):
            kept.append(inputs)
            return super()._compute_loss(model, inputs)

    level = "sequence" if loss == "luspo" else "token"
    settings = {"max_steps": 1, "loss_type": loss, "importance_sampling_level": level}
    settings |= {"off_policy_mask_threshold": 0.1, "per_device_train_batch_size": 8}
    trainer = build(Keep, tiny_model, tmp_path, settings=settings)
    trainer.train()
    inputs = kept[0]
    generator = torch.Generator().manual_seed(0)
    shape = inputs["completion_mask"].shape
    with torch.no_grad():
        now, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            shape[1],
        )
        old = now - 0.4 * torch.randn(shape, generator=generator)
        advantages, weights = torch.randn(8, generator=generator), 0.1 + 3 * torch.rand(8, generator=generator)

        def value(advantages_R):
            changed = {"advantages": advantages_R, "old_per_token_logps": old}
            return GRPOTrainer._compute_loss(trainer, trainer.model, inputs | changed)

        rows = torch.stack([value(row) for row in torch.diag(advantages)])
        assert (rows != 0).sum() > 4
        torch.testing.assert_close(value(weights * advantages), (weights * rows).sum(), rtol=1e-5, atol=1e-6)


def test_args_are_required():
    with pytest.raises(UsageError, match="num_generations=4, got None"):
        GDROTrainer("no/model", None, train_dataset=data(), controller=controller())


def values(*of):
    """A reward function that cycles through some values."""

    def function(completions, **_):
        return [of[i % len(of)] for i in range(len(completions))]

    return function


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("must lie in \\[0, 1\\] for the controller, got -1", {"functions": values(-1.0, 1.0)}),
        ("one number for each of 16 rollouts", {"to_unit": lambda r: r[:4, 0]}),
        ("one of two values with preserve_objective", {"functions": values(0.0, 0.5, 1.0), "preserve": True}),
        ("'test/[0-9a-f]+' twice", {"dataset": lambda: data().select([0, 1, 2, 0])}),
        ("texts or whole numbers, got None in a row", {"dataset": lambda: data().map(lambda _: {"prompt_id": None})}),
    ],
)
def test_what_shows_in_a_step_is_refused_there_and_changes_nothing(tiny_model, tmp_path, message, changes):
    made = controller(preserve_objective="preserve" in changes)
    changes["aggregation"] = "prompt" if changes.pop("preserve", False) else "rollout"
    before = made.state_dict()
    dataset = changes.pop("dataset", data)()
    trainer = build(Ours, tiny_model, tmp_path, controller=made, dataset=dataset, **changes)
    with pytest.raises((UsageError, ValueError), match=message):  # the second from gdro_core
        trainer.train()
    assert made.state_dict() == before


def test_rows_that_are_not_in_groups_are_refused(tiny_model, tmp_path):
    """Another sampler, by whatever way it came in."""
    trainer = build(Ours, tiny_model, tmp_path, controller=controller())
    trainer.model.train()
    with pytest.raises(UsageError, match="each prompt on num_generations = 4 successive rows"):
        trainer._generate_and_score_completions([dict(row) for row in data().select(range(4))] * 4)


def test_several_functions_need_to_unit(tiny_model, tmp_path):
    with pytest.raises(UsageError, match="which of the 2 reward functions"):
        build(Ours, tiny_model, tmp_path, functions=[values(0.0), values(1.0)], controller=controller())


def test_to_unit_tells_the_controller_and_nothing_else(tiny_model, tmp_path):
    """±1 mapped; a second function moves the policy and not the controller; None is neither graded nor observed."""
    first = [-1.0, 1.0, 1.0, None] * 4
    second = [0.0, 0.0, 2.0, None] * 4
    trainer = build(
        Ours,
        tiny_model,
        tmp_path,
        functions=[values(*first), values(*second)],
        settings={"max_steps": 1, "reward_weights": [0.5, 1.0]},
        controller=controller(),
        to_unit=lambda r: (r[:, 0] + 1) / 2,
    )
    trainer.train()
    [(plan, observation)] = trainer.observed
    np.testing.assert_array_equal(plan.counts, 4)
    np.testing.assert_array_equal(observation.correct, 2)
    np.testing.assert_array_equal(observation.trials, 3)
    total = np.array([-0.5, 0.5, 2.5])
    expected = np.append((total - total.mean()) / total.std() * np.sqrt(3 / 4), 0.0)
    np.testing.assert_allclose(trainer.batches[0]["advantages"], np.tile(expected, 4), atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_groups_have_the_advantages_of_trl(tiny_model, tmp_path, scale):
    """Those that TRL computes itself for n_bar rollouts each; up to its 1e-4 beside the deviation."""
    trainer = build(
        Ours,
        tiny_model,
        tmp_path,
        settings={"max_steps": 1, "scale_rewards": scale},
        controller=GDROController.uniform(4),
    )
    trainer.train()
    [(plan, _)] = trainer.observed
    rewards = np.array([value for _, value in trainer.graded])
    advantages = ragged_advantages(rewards, plan, scale)
    np.testing.assert_allclose(advantages, trainer.batches[0]["advantages"], rtol=1e-3, atol=1e-6)
    assert advantages.any()


def test_rows_are_generated_one_by_one_when_groups_are_ragged(tiny_model, tmp_path, monkeypatch):
    """vLLM's server takes every num_generations-th prompt. Equal groups keep n_bar; evaluation keeps its own."""
    asked = []
    generate = GRPOTrainer._generate_single_turn

    def record(self, prompt_ids, images, fields, num_generations, **named):
        asked.append(num_generations)
        return generate(self, prompt_ids, images, fields, num_generations, **named)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", record)
    evaluated = Dataset.from_dict({"prompt": PROMPTS[:2], "answer": [answer(p) for p in PROMPTS[:2]]})
    trainer = build(
        Ours,
        tiny_model,
        tmp_path,
        functions=values(*[0.0] * 4, *[1.0, 0.0] * 2, *[1.0] * 4, 0.0, 0.0, 0.0, 1.0),
        eval_dataset=evaluated,
        settings={"per_device_eval_batch_size": 4, "num_generations_eval": 2},
        controller=controller(),
    )
    trainer.train()
    assert asked == [4 if (plan.counts == 4).all() else 1 for plan, _ in trainer.observed]
    assert {1, 4} <= set(asked)
    before = trainer.controller.state_dict()
    asked.clear()
    assert "eval_reward" in trainer.evaluate()  # without ids, and without the controller
    assert set(asked) == {2}
    assert trainer.controller.state_dict() == before


def test_an_untested_version_is_named(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.warns(UserWarning, match=r"tested with 1\.16\.0, this is 1\.17\.0"):
        build(Ours, tiny_model, tmp_path, controller=controller())


def test_prompt_ids_are_of_source_and_content():
    """A text has the id that the own loop gives it in a file; order does not matter; a conversation has one, too."""
    ids = data()["prompt_id"]
    assert list(ids) == [f"test/{content_hash(p)}" for p in PROMPTS]
    assert list(data(PROMPTS[::-1])["prompt_id"]) == list(ids)[::-1]
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in "ab"]})
    one, two = add_prompt_ids(chats, source="chat")["prompt_id"]
    assert one != two
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": PROMPTS[0]}]))
    assert next(iter(add_prompt_ids(stream, source="test")))["prompt_id"] == ids[0]
    repeated = Dataset.from_dict({"prompt": ["a", "b", "a"], "variant": [1, 1, 2]})
    with pytest.raises(UsageError, match="rows 0 and 2 are the same in prompt"):
        add_prompt_ids(repeated, source="x")
    assert len(set(add_prompt_ids(repeated, source="x", columns=("prompt", "variant"))["prompt_id"])) == 3
    with pytest.raises(UsageError, match="already"):
        add_prompt_ids(data(), source="x")
    with pytest.raises(UsageError, match="among the dataset's"):
        add_prompt_ids(repeated, source="x", columns=("text",))


def test_groups_without_a_signal_or_a_verdict_have_no_advantage():
    plan = Plan(("a", "b", "c"), np.full(3, -1), np.ones(3), np.array([2, 3, 4]), 0.0, 0)
    rewards = np.array([1, 1, np.nan, np.nan, np.nan, 0, 1, np.nan, 1.0])
    assert not ragged_advantages(rewards, plan, "batch")[:5].any()
    advantages = ragged_advantages(rewards, plan, "none")
    np.testing.assert_allclose(advantages, [0, 0, 0, 0, 0, -2 / 3, 1 / 3, 0, 1 / 3])


def test_only_the_rollout_game_moves_counts():
    """What the refusals rely on: n_bar is the rollout game's where there is one."""
    assert RolloutGDRO(4, 2, 8).mean_rollouts == controller().rollout.mean_rollouts == 4
    assert GDROController.uniform(4).state_dict()["mean_rollouts"] == 4


def test_example_runs_as_it_stands(tmp_path):
    """Its log: prompts move to other numbers of rollouts, and the tiny Qwen3 learns."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    script = [sys.executable, "-W", "default", str(ROOT / "examples" / "trl_gdro.py")]
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    saved = tmp_path / "runs" / "trl" / "checkpoint-30"
    log = [row for row in json.loads((saved / "trainer_state.json").read_text())["log_history"] if "reward" in row]
    assert len(log) == 6
    assert log[-1]["gdro/reward"] > log[0]["gdro/reward"]
    assert len({value for key, value in log[-1].items() if key.startswith("gdro/bin_rollouts/")}) > 1
    assert json.loads((saved / STATE).read_text())["controller"]["step"] == 30


def test_readme_snippet_runs(tiny_model, tmp_path):
    (snippet,) = re.findall(r"```python\n([^`]*integrations\.trl[^`]*)```", (ROOT / "README.md").read_text())
    args = GRPOConfig(
        output_dir=str(tmp_path),
        num_generations=4,
        per_device_train_batch_size=16,
        max_completion_length=3,
        max_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    names = {"model": str(tiny_model), "reward": values(0.0, 1.0), "args": args}
    exec(snippet, names | {"dataset": Dataset.from_dict({"prompt": PROMPTS})}, made := {})
    made["trainer"].train()
    assert made["trainer"].controller.state_dict()["step"] == 1
