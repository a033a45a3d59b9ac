"""What `gdro_sync` decides in verl's own `fit` over a real TransferQueue; on_cpu.py says what is replaced."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import verl
from on_cpu import OnCPU, configuration
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync
from verl.utils.config import omega_conf_to_dataclass

from gdro_core import GDROController, Observation
from gdro_llm.config import UsageError
from gdro_llm.integrations.verl import LOSSES, Pending, Settings, prompt_ids
from gdro_llm.training.losses import group_advantages, rollout_scale

JOINT = "+gdro.controller=joint"
STEPS = (JOINT, "trainer.total_training_steps=8", "+gdro.max_rollouts=8", "+gdro.seed=3")  # every prompt comes twice


def batches(trainer):
    """Of each step, its real rows in the plan's order: ids, owner_R, session_R, reward_R, return_R, advantage_R.

    `returns` are verl's advantages as it made them; `gdro_sync` multiplies `advantages` only.
    """
    for submitted, (keys, tags, data) in zip(trainer.submitted, trainer.actor_rollout_wg.trained, strict=True):
        uids = list(submitted)
        rows = []
        for i, (key, tag) in enumerate(zip(keys, tags, strict=True)):
            constant = [data[name][i] for name in ("returns", "advantages")]
            assert all(torch.equal(row, row[:1].expand_as(row)) for row in constant)  # of a rollout, over its tokens
            if tag.get("is_padding", False):
                assert not any(row.any() for row in constant)
                continue
            uid, session, _ = key.split("_")
            name = f"{data['data_source'][i]}/{data['extra_info'][i]['index']}"
            assert submitted[uid] == name  # rows are those of the prompt that was planned
            values = [float(row[0]) for row in constant]
            rows.append((uids.index(uid), int(session), float(data["rm_scores"][i].sum()), *values))
        rows.sort()
        owner, sessions, rewards, returns, advantages = (np.array(column) for column in zip(*rows, strict=True))
        yield list(submitted.values()), owner.astype(int), sessions.astype(int), rewards, returns, advantages


@pytest.fixture(scope="module")
def run(fit, folder, tmp_path_factory):
    """A run of eight steps, with what it logged."""
    return fit(configuration(folder, tmp_path_factory.mktemp("run"), *STEPS))


def test_logs_rewards_without_weights(run):
    trainer, log = run
    for row, (_, owner, _, rewards, *_) in zip(log, batches(trainer), strict=True):
        means = np.bincount(owner, weights=rewards) / np.bincount(owner)
        assert row["gdro/reward"] == pytest.approx(means.mean())
        assert row["gdro/rollouts"] == 16
        assert row["gdro/missing_rollouts"] == 0
        assert row["training/global_step"] > 0  # among verl's own
    assert any("gdro/bin_rollouts/bin05" in row or "gdro/bin_rollouts/bin07" in row for row in log)
    assert {"gdro/shadow_price", "gdro/unseen_share", "gdro/mixed_share"} <= log[-1].keys()


def test_resumed_run_goes_on_as_the_uninterrupted_one(run, fit, configure):
    """State after a resume is what was saved, and step 7 plans the same prompts with the same counts."""
    trainer, _ = run
    folder = f"{trainer.config.trainer.default_local_dir}/global_step_6"
    resume = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder}")
    config = configure(*STEPS, *resume, "trainer.total_training_steps=7")
    config.data.train_files = trainer.config.data.train_files
    again, _ = fit(config)
    (_, *before), (_, *after) = list(batches(trainer))[6][:3], next(batches(again))[:3]
    assert trainer.submitted[6].keys() != again.submitted[0].keys()
    assert list(trainer.submitted[6].values()) == list(again.submitted[0].values())
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert again.global_steps == 8  # the next one
    assert again.actor_rollout_wg.loaded == [f"{folder}/actor"]


def test_resuming_refuses_checkpoints_of_other_runs(run, configure, fit, tmp_path):
    trainer, _ = run
    folder = tmp_path / "global_step_6"
    resume = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder}")
    folder.mkdir()
    with pytest.raises(UsageError, match=r"must hold gdro_controller\.json.*resume_mode=disable"):
        fit(configure(*STEPS, *resume))
    (folder / "gdro_controller.json").write_text(json.dumps(trainer.controller.state_dict()))
    with pytest.raises(UsageError, match=r"gdro_controller\.json is of other settings: .*seed"):
        fit(configure(JOINT, "+gdro.seed=4", *resume))


def test_failed_rollouts_are_no_zeros(fit, configure):
    """A controller learns from the rollouts that came back; the only survivor of a group is not trained on."""
    trainer, log = fit(configure(*STEPS, often=(1, 9, 13), once=(2, 3, 4, 5, 6)))
    controller = GDROController.joint_play(4, 2, 8, seed=3)
    lone = gone = some = 0
    for ids, owner, sessions, rewards, _, advantages in batches(trainer):
        plan = controller.plan(ids)
        came = np.bincount(owner, minlength=4)
        rows = (np.cumsum(plan.counts) - plan.counts)[owner] + sessions
        own = rollout_scale(plan.weights, plan.counts, owner, "rollout") * group_advantages(rewards, owner, scale=True)
        np.testing.assert_allclose(advantages, own * np.sqrt(3 / 4), atol=1e-5)  # so 0 for one that is alone
        lone, gone = lone + (came == 1).sum(), gone + (came == 0).sum()
        some += ((came > 1) & (came < plan.counts) & (np.bincount(owner, abs(advantages), minlength=4) > 0)).sum()
        controller.observe(plan, Observation.of(plan, rewards, rows))
    assert (lone, gone) == (3, 3)
    assert some > 0  # of one in several, with a signal, the deviation is of those that came
    assert trainer.controller.state_dict() == controller.state_dict()
    assert any(tag.get("is_padding") for _, tags, _ in trainer.actor_rollout_wg.trained for tag in tags)
    assert sum(row["gdro/missing_rollouts"] for row in log) == sum(16 - row["gdro/rollouts"] for row in log) > 0


def test_rewards_outside_zero_and_one_are_observed_by_another_metric(fit, configure):
    """Rewards of -1 and 1, as verl's own for DAPO: refused with the remedy, which works."""
    with pytest.raises(UsageError, match=r"gdro\.metric=reward: .*\[0, 1\].*gdro\.metric=acc"):
        fit(configure(wrong=-1))
    with pytest.raises(UsageError, match=r"gdro\.metric must be 'reward' or .*score, acc.*, got 'points'"):
        fit(configure("+gdro.metric=points", wrong=-1))
    trainer, _ = fit(configure(JOINT, "+gdro.metric=acc", "trainer.total_training_steps=1", wrong=-1))
    controller = GDROController.joint_play(4)
    ((ids, _owner, _sessions, rewards, *_),) = batches(trainer)
    controller.observe(controller.plan(ids), (rewards + 1) / 2)
    assert trainer.controller.state_dict() == controller.state_dict()


def test_advantages_that_are_not_scaled_get_the_weights_alone(fit, configure):
    """Dr.GRPO: no standard deviation to be undone; aggregation=prompt undoes the number of rollouts."""
    trainer, _ = fit(configure(*STEPS, "algorithm.norm_adv_by_std_in_grpo=False", "+gdro.aggregation=prompt"))
    controller = GDROController.joint_play(4, 2, 8, seed=3)
    for ids, owner, _, rewards, returns, advantages in batches(trainer):
        plan = controller.plan(ids)
        np.testing.assert_allclose(advantages, returns * (plan.weights * 4 / plan.counts)[owner], rtol=1e-6)
        np.testing.assert_allclose(returns, group_advantages(rewards, owner, scale=False), atol=1e-6)
        controller.observe(plan, rewards)


def test_grpo_is_verls_own(fit, configure):
    trainer, _ = fit(configure("+gdro.controller=grpo", "trainer.total_training_steps=5"))
    for _, owner, _, _, returns, advantages in batches(trainer):
        assert np.bincount(owner).tolist() == [4, 4, 4, 4]
        np.testing.assert_array_equal(advantages, returns)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (lambda row: {}, "got 'easy' and"),
        (lambda row: {"index": None if row < 8 else row}, "got 'easy' and"),
        (lambda row: {"index": 5}, "got '(easy|hard)/5' twice"),
    ],
)
def test_prompts_without_an_index_of_their_own_are_refused(fit, configure, index, message):
    """verl numbers them all 0: the controller would take them for one prompt."""
    with pytest.raises(UsageError, match=f"extra_info.index.*{message}"):
        fit(configure(index=index))


def test_ids_are_sources_and_indices():
    assert prompt_ids(["a", "b"], [{"index": 0}, {"index": 0}]) == ["a/0", "b/0"]
    for sources, infos in ((None, [{"index": 0}]), (["a"], None), ([None], [{"index": 0}]), (["a"], [None])):
        with pytest.raises(UsageError, match=r"data_source and extra_info\.index"):
            prompt_ids(sources, infos)


def test_uid_with_an_underscore_is_refused(configure):
    """verl cuts keys at it."""
    trainer = OnCPU(configure())
    trainer._init_tokenizer()
    trainer._init_dataloader()
    trainer.global_steps = 1
    batch = trainer._next_train_batch()
    batch["uid"] = type(batch.get("uid")).from_list([f"prompt_{i}" for i in range(4)])
    with pytest.raises(RuntimeError, match="uid must not contain '_'"):
        trainer._submit_batch_to_rollout(batch)


def test_reward_of_a_rollout_with_several_outputs_is_its_last():
    plan = GDROController.uniform(2).plan(["a", "b"])
    pending = Pending(plan, {"u": 0, "v": 1})
    owner, rollout, last = pending.locate(["v_1_0", "u_0_1", "u_0_0", "v_1_1", "v_0_0"])
    assert owner.tolist() == [1, 0, 0, 1, 1]
    assert rollout.tolist() == [3, 0, 0, 3, 2]
    assert last.tolist() == [False, True, False, True, True]
    for scaled in (False, True):  # of prompt a one rollout failed
        assert pending.factors(owner, rollout, "prompt", scaled=scaled).tolist() == [1, 0, 0, 1, 1]
    for unknown in ("w_0_0", "u_2_0"):
        with pytest.raises(RuntimeError, match=f"{unknown}.*was not planned"):
            pending.locate([unknown])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.adv_estimator=rloo", "algorithm.adv_estimator must be grpo"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov", "loss_mode must be one of vanilla.*clip_cov"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=kl_cov", "loss_mode must be one of"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=dro", "loss_mode must be one of"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=my_own", "loss_mode must be one of"),
        ("algorithm.filter_groups.enable=True", "filter_groups.enable must be False"),
        ("trainer.v1.sampler.sync_refill_failed_groups=True", "sync_refill_failed_groups must be False"),
        ("+trainer.v1.sync.parameter_sync_step=2", "parameter_sync_step must be 1"),
        ("trainer.v1.sampler.custom_sampler.path=my.py", "custom_sampler must be left out"),
        ("distillation.enabled=True", "distillation.enabled must be False"),
        ("skip.rollout_tq.enable=True", "skip.rollout_tq.enable must be False"),
        ("+gdro.min_rollouts=1", "2 <= gdro.min_rollouts .* gdro.min_rollouts 0, got 1, 4 and 12"),
        ("+gdro.min_rollouts=-1", "got -1, 4 and 12"),
        ("+gdro.min_rollouts=5", "got 5, 4 and 12"),
        ("+gdro.max_rollouts=3", "got 0, 4 and 3"),
        ("actor_rollout_ref.rollout.n=1", "got 0, 1 and 12"),
        ("+gdro.kappa=-1", "gdro: kappa must lie in .*, got -1"),
        ("+gdro.verifier_error=0.5", r"gdro.verifier_error must lie in \[0, 0.49\], got 0.5"),
        ("+gdro.controler=grpo", "gdro.controler: Key 'controler'.*; the keys are controller, min_rollouts"),
        ("+gdro.max_rollouts=many", "gdro.max_rollouts: .*'many'.*the keys are"),
        ("+gdro.controller=published-prompt", "gdro.controller must be one of grpo, recommended"),
        ("+gdro.aggregation=token", "gdro.aggregation must be one of rollout, prompt, got 'token'"),
        ("+gdro.num_bins=0", "gdro: num_bins must"),
    ],
)
def test_refuses(configure, override, message):
    with pytest.raises(UsageError, match=message):
        OnCPU(configure(override))


def test_an_untested_version_is_named(configure, monkeypatch):
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    with pytest.warns(UserWarning, match=r"tested with 0\.9\.1, this is 0\.10\.0"):
        OnCPU(configure())


def test_other_processes_see_verls_own_mode(configure):
    config = configure()
    trainer = OnCPU(config)
    assert config.trainer.v1.trainer_mode == "sync"
    assert not isinstance(trainer.replay_buffer, ReplayBufferAsync)


def test_settings_say_which_games_are_played(configure):
    def games(name):
        controller = Settings.of(configure(f"+gdro.controller={name}")).build(4)
        return controller.prompt is not None, controller.rollout is not None

    assert [games(name) for name in ("joint", "joint-prompt", "joint-rollout", "recommended", "grpo")] == [
        (True, True),
        (True, False),
        (False, True),
        (True, True),
        (False, False),
    ]


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        ((), GDROController.recommended(4)),
        (("+gdro.min_rollouts=2", "+gdro.max_rollouts=9"), GDROController.recommended(4, 2, 9)),
        (("+gdro.kappa=2", "+gdro.verifier_error=0.1"), GDROController.recommended(4, kappa=2.0, error=0.1)),
        ((JOINT,), GDROController.joint_play(4)),
        ((JOINT, "+gdro.min_rollouts=3"), GDROController.joint_play(4, 3)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_settings_reach_the_controller(configure, overrides, same):
    """No fewest rollouts are each controller's own: none for the recommended one, two in joint play."""
    built = Settings.of(configure(*overrides)).build(4)
    assert built.state_dict() == same.state_dict()


def test_prompts_that_are_passed_over_are_not_sampled(fit, configure):
    """The recommended controller in verl: the budget is spent, the plans are those of the library, kappa is fixed."""
    trainer, log = fit(configure("trainer.total_training_steps=12", "+gdro.max_rollouts=8", "+gdro.seed=3"))
    controller = GDROController.recommended(4, max_rollouts=8, seed=3)
    passed = 0
    for ids, owner, _, rewards, _, advantages in batches(trainer):
        plan = controller.plan(ids)
        assert np.bincount(owner, minlength=4).tolist() == plan.counts.tolist()
        own = rollout_scale(plan.weights, plan.counts, owner, "rollout") * group_advantages(rewards, owner, scale=True)
        np.testing.assert_allclose(advantages, own * np.sqrt(3 / 4), atol=1e-5)
        passed += (plan.counts == 0).sum()
        controller.observe(plan, rewards)
    assert passed > 0
    assert trainer.controller.state_dict() == controller.state_dict()
    assert all(row["gdro/rollouts"] == 16 for row in log)
    assert not any("gdro/kappa" in row for row in log)


@pytest.mark.parametrize("name", sorted(core_algos.POLICY_LOSS_REGISTRY))
def test_losses_that_are_taken_are_linear_in_the_advantage(configure, name):
    """loss(w A) = w loss(A) for rows' own w > 0, in verl's own code: so for LOSSES, and for no other loss of verl."""
    config = configure()
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    extra = {"clip_cov_ratio": 0.2, "kl_cov_ratio": 0.2, "dro_beta": 0.1, "loss_mode": name}
    for key, value in extra.items():
        object.__setattr__(actor.policy_loss, key, value)
    object.__setattr__(actor.policy_loss, "rollout_correction", {"loss_type": "reinforce"})
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(6, 7, generator=generator)
    new = (old + 0.5 * torch.randn(6, 7, generator=generator)).requires_grad_()
    mask = torch.ones(6, 7)
    advantage = torch.randn(6, 1, generator=generator).expand(6, 7)

    def gradient(weight):
        torch.manual_seed(1)  # clip_cov draws
        loss, _ = core_algos.get_policy_loss_fn(name)(
            old_log_prob=old,
            log_prob=new,
            advantages=weight * advantage,
            response_mask=mask,
            loss_agg_mode="token-mean",
            config=actor,
        )
        return torch.autograd.grad(loss, new)[0]

    weight = torch.tensor([[0.3], [1.0], [2.0], [5.0], [0.1], [1.5]])
    linear = torch.allclose(gradient(weight), weight * gradient(torch.ones(6, 1)), atol=1e-6)
    assert linear == (name in LOSSES)


def test_readme_command_is_accepted(configure):
    """Its settings exist in verl, or under `gdro`; test_example.py runs the example."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (command,) = re.findall(r"-m verl\.trainer\.main_ppo (.*?) \.\.\.", text, re.DOTALL)
    trainer = OnCPU(configure(*command.replace("\\\n", " ").split()))
    assert (trainer.controller.rollout.mean_rollouts, trainer.controller.rollout.max_rollouts) == (8, 24)


@pytest.mark.parametrize("way", ["variable", "entry point"])
def test_registers_itself(way):
    """In a fresh process, as verl's own main does: by VERL_USE_EXTERNAL_MODULES, or because gdro is installed."""
    variable = {"VERL_USE_EXTERNAL_MODULES": "gdro_llm.integrations.verl", "VERL_USE_EXTERNAL_PLUGINS": "none"}
    program = "import verl; from verl.trainer.ppo.v1 import get_trainer_cls; print(get_trainer_cls('gdro_sync'))"
    env = os.environ | (variable if way == "variable" else {"VERL_USE_EXTERNAL_MODULES": ""})
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert "gdro_llm.integrations.verl.GDROTrainer" in done.stdout, done.stderr
