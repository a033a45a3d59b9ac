"""The data flow: plans are pure, budgets and mean weights hold, states continue bit for bit, errors change nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdro_core import (
    LEARNABILITY,
    MIXED,
    Entropic,
    GDROController,
    Observation,
    OnlineDifficultyClassifier,
    PassAtK,
    Planner,
    PromptGDRO,
    PublishedController,
    RolloutGDRO,
)

IDS = [f"task/{i}" for i in range(40)]
PASS_RATE = np.linspace(0.02, 0.98, 40)


def joint_bins(seed=0):
    """Every option away from its default, with both games on bins."""
    return GDROController(
        OnlineDifficultyClassifier([0.2, 0.5, 0.8], PassAtK(2), hysteresis=0.02),
        PromptGDRO(4, payoff=LEARNABILITY, uniform_reference=True, exploration=0.1),
        RolloutGDRO(4, 2, 12, MIXED, per_bin=True),
        seed=seed,
    )


MAKERS = {
    "recommended": lambda seed=0: GDROController.recommended(4, seed=seed),
    "uniform": lambda seed=0: GDROController.uniform(4, seed=seed),
    "joint bins": joint_bins,
    **{
        f"{name} prompt={prompt} rollout={rollout}": (
            lambda seed=0, preset=preset, games={"prompt": prompt, "rollout": rollout}: preset(4, seed=seed, **games)
        )
        for name, preset in (("joint", GDROController.joint_play), ("published", PublishedController))
        for prompt in (True, False)
        for rollout in (True, False)
    },
}
every_controller = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def step(controller, rng, size=10):
    """One batch against prompts of fixed pass rates; returns plan, rewards and metrics."""
    rows = rng.permutation(40)[:size]
    plan = controller.plan([IDS[row] for row in rows])
    rewards = (rng.random(plan.counts.sum()) < PASS_RATE[rows][plan.owner]).astype(float)
    metrics = controller.observe(plan, rewards)
    if isinstance(controller, PublishedController):
        controller.observe_losses(plan, rng.normal(scale=0.3, size=size))
    return plan, rewards, metrics


def trained(make, steps=6):
    controller, rng = make(), np.random.default_rng(1)
    for _ in range(steps):
        step(controller, rng)
    return controller


def same(one, other):
    return (
        (one.ids, one.price, one.step) == (other.ids, other.price, other.step)
        and np.array_equal(one.bins, other.bins)
        and np.array_equal(one.weights, other.weights)
        and np.array_equal(one.counts, other.counts)
    )


@every_controller
def test_every_preset_holds_its_invariants_for_50_steps(make):
    """Exact budget, bounds, mean weight 1 over rollouts, unseen at the mean, finite JSON metrics that add up."""
    controller, rng = make(), np.random.default_rng(0)
    for t in range(50):
        plan, _, metrics = step(controller, rng)
        assert plan.step == t
        assert plan.counts.sum() == 4 * len(plan.ids)
        assert (((plan.counts >= 2) & (plan.counts <= 12)) | (plan.counts == 0)).all()
        assert (plan.counts[plan.bins < 0] == 4).all()
        assert (plan.weights > 0).all()
        if controller.prompt is None:
            assert (plan.weights == 1).all()
        elif isinstance(controller, PublishedController):  # Eq. 16, unnormalised
            assert (plan.weights[plan.bins < 0] == 1).all()
        elif controller.components is None:  # else over those expected to be mixed: test_recommended.py
            assert np.average(plan.weights, weights=plan.counts) == pytest.approx(1.0, rel=1e-12)
        if controller.rollout is None:
            assert (plan.counts == 4).all()
        assert plan.price >= 0
        assert sum(metrics["bin_share"]) + metrics["unseen_share"] == pytest.approx(1.0)
        json.dumps(metrics, allow_nan=False)


@every_controller
def test_plan_is_pure_and_equal_on_every_worker(make):
    """Planning twice gives the same plan and leaves the state alone; a worker with the same state plans the same."""
    controller, worker = trained(make), make()
    before = json.dumps(controller.state_dict())
    first, second = controller.plan(IDS[:10]), controller.plan(IDS[:10])
    assert same(first, second)
    assert json.dumps(controller.state_dict()) == before
    worker.load_state_dict(json.loads(before))
    assert same(worker.plan(IDS[:10]), first)


@every_controller
@pytest.mark.parametrize("after", [0, 1, 5])
def test_state_continues_bit_for_bit_through_json(make, after):
    """Ten more steps of the restored controller repeat the original's plans, metrics and state."""
    original, restored = trained(make, after), make()
    restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
    runs = [np.random.default_rng(2), np.random.default_rng(2)]
    for _ in range(10):
        (plan, _, metrics), (again, _, metrics_again) = map(step, (original, restored), runs)
        assert same(plan, again)
        assert metrics == metrics_again
    assert original.state_dict() == restored.state_dict()


@every_controller
@given(seed=st.integers(0, 2**32 - 1))
def test_bins_and_weights_are_looked_up_by_id(make, seed):
    """F5: a permuted batch has permuted bins and proportional weights; its counts are permuted where nothing ties."""
    controller = trained(make)
    order = np.random.default_rng(seed).permutation(10)
    plan, permuted = controller.plan(IDS[:10]), controller.plan([IDS[i] for i in order])
    np.testing.assert_array_equal(permuted.bins, plan.bins[order])
    ratio = permuted.weights / plan.weights[order]
    np.testing.assert_allclose(ratio, ratio[0])


def test_ratios_of_weights_do_not_depend_on_the_batch():
    """Two prompts keep their ratio whatever else is drawn with them."""
    controller = trained(MAKERS["joint prompt=True rollout=True"])
    ratios = [np.divide(*controller.plan([IDS[0], IDS[39], *IDS[1:n]]).weights[:2]) for n in (1, 5, 30)]
    np.testing.assert_allclose(ratios, ratios[0])
    assert ratios[0] > 1  # harder weighs more


def test_a_batch_of_one_light_bin_still_has_mean_weight_one():
    """Even where the adversary's weight would underflow."""
    controller = GDROController(
        OnlineDifficultyClassifier([0.5]), PromptGDRO(2, adversary=Entropic(1e4)), mean_rollouts=2
    )
    for _ in range(2):
        controller.observe(controller.plan(["hard", "easy"]), [0, 0, 1, 1])
    assert controller.plan(["easy"]).weights.tolist() == [1.0]


def test_joint_play_gives_rollouts_to_weighted_prompts():
    """F7: `joint` feeds ω into the rollout game; without it the counts are those of the rollout game alone."""
    pair = {}
    for joint in (True, False):
        controller = GDROController(
            OnlineDifficultyClassifier([0.5], prior=(1.0, 1.0)), PromptGDRO(2), RolloutGDRO(6, 1, 11), joint=joint
        )
        for _ in range(2):  # seen once, then judged once by their bins
            controller.observe(controller.plan(["hard", "easy"]), [1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0])
        pair[joint] = controller.plan(["hard", "easy"]).counts
    assert pair[False].tolist() == [6, 6]
    assert pair[True][0] > pair[True][1]


def test_metrics_by_hand():
    """Two bins and an unseen prompt: shares, errors, weights, rollouts, q, price and lead-lag (Eq. 32)."""
    controller = GDROController(
        OnlineDifficultyClassifier([0.5]), PromptGDRO(2, adversary=Entropic(1.0)), RolloutGDRO(4, 4, 4), seed=3
    )
    empty = controller.observe(controller.plan(["hard", "easy"]), [0, 0, 0, 0, 1, 1, 1, 1])
    assert empty["bin_error"] == empty["bin_rollouts"] == empty["bin_weight"] == [None, None]
    assert (empty["unseen_share"], empty["bin_share"], empty["lead_lag"]) == (1.0, [0.0, 0.0], None)

    plan = controller.plan(["hard", "easy"])
    assert plan.weights.tolist() == [1.0, 1.0]  # payoffs are learnt by the bin a plan was made with: none yet
    controller.observe(plan, [0, 0, 0, 1, 1, 1, 1, 1])
    plan = controller.plan(["hard", "new", "easy"])
    ratio = np.exp(0.75)  # payoffs .75 and 0, equal shares
    raw = np.array([2 * ratio / (1 + ratio), 1.0, 2 / (1 + ratio)])
    np.testing.assert_allclose(plan.weights, raw / raw.mean())
    metrics = controller.observe(plan, [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1, 1, 0])
    q = controller.prompt.probabilities
    assert metrics.pop("lead_lag") == pytest.approx(1 / (1 + ratio) - 0.5)
    np.testing.assert_allclose(metrics.pop("bin_weight"), plan.weights[[0, 2]])
    assert metrics == {
        "bin_share": [1 / 3, 1 / 3],
        "unseen_share": pytest.approx(1 / 3),
        "bin_error": [1.0, 0.25],
        "bin_rollouts": [4.0, 4.0],
        "wasted_share": pytest.approx(4 / 12),  # a group of four halves has more than one outcome
        "bin_probability": q.tolist(),
        "shadow_price": 0.0,
        # 1 of 12 rollouts right so far: unsolved; four halves: learnable; 11 of 12: solved
        **{"learnable_share": pytest.approx(1 / 3), "unsolved_share": pytest.approx(1 / 3)},
        "solved_share": pytest.approx(1 / 3),
    }
    assert set(GDROController.uniform(4).observe(plan, np.ones(12))) == {
        "bin_share",
        "unseen_share",
        "bin_error",
        "bin_rollouts",
        "wasted_share",
        "learnable_share",
        "solved_share",
        "unsolved_share",
    }


def test_owner_maps_flat_rows_to_prompts():
    """Rewards arrive in plan order: prompt i owns counts[i] consecutive rows."""
    controller = trained(MAKERS["joint prompt=True rollout=True"])
    plan = controller.plan(IDS[:10])
    assert len(set(plan.counts)) > 1
    np.testing.assert_array_equal(np.bincount(plan.owner), plan.counts)
    assert (np.diff(plan.owner) >= 0).all()


def test_joint_play_leans_to_hard_prompts():
    """After 60 steps the hardest fifth has more weight and the uncertain middle more rollouts than the easiest."""
    controller = trained(MAKERS["joint prompt=True rollout=True"], 60)
    plan = controller.plan(IDS)
    assert plan.weights[:8].mean() > 1 > plan.weights[-8:].mean()
    assert plan.counts[12:20].mean() > 4 > plan.counts[-8:].mean()
    _, _, metrics = step(controller, np.random.default_rng(0))
    assert metrics["lead_lag"] < 0


BAD_CALLS = [
    (lambda c, plan: c.plan([]), "ids must hold at least one id"),
    (lambda c, plan: c.plan(["x", "y", "x"]), "ids must be unique within a batch, got 'x' twice"),
    (lambda c, plan: c.observe(plan, np.ones(39)), r"rewards must have shape \(40,\).*\(39,\)"),
    (lambda c, plan: c.observe(plan, np.ones((10, 4))), "rewards must have shape"),
    (lambda c, plan: c.observe(plan, [np.nan] + [1.0] * 39), r"rewards must hold finite numbers in \[0, 1\], got nan"),
    (lambda c, plan: c.observe(plan, [1.5] + [1.0] * 39), "rewards must hold .*1.5"),
    (lambda c, plan: c.observe(plan, [-1.0] + [1.0] * 39), "rewards must hold .*-1"),
    (lambda c, plan: c.plan("task"), "ids must be a sequence of ids, got the single string 'task'"),
    (lambda c, plan: c.observe(plan, Observation.of(c.plan(IDS[:9]), np.ones(36))), "observation of this plan"),
    (lambda c, plan: Observation.of(plan, [1.0], rows=[40]), "rows must hold .*40"),
    (lambda c, plan: Observation.of(plan, [1.0, 1.0], rows=[3, 3]), "rows must be distinct"),
    (lambda c, plan: Observation.of(plan, [1.0, 1.0], rows=[3]), r"rewards must have shape \(1,\).*\(2,\)"),
    (lambda c, plan: Observation.of(plan, np.ones(40)).merge(Observation.of(plan, [1], [0])), "too many of 'task/"),
    (
        lambda c, plan: Observation.of(plan, [1], [0]).merge(Observation.of(c.plan(IDS[1:11]), [1], [1])),
        "observations must be of one plan",
    ),
]


@every_controller
@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_input_changes_nothing(make, call, message):
    """Errors name argument, rule and value; the controller is as it was."""
    controller = trained(make)
    plan, before = controller.plan(IDS[:10]), controller.state_dict()
    with pytest.raises(ValueError, match=message):
        call(controller, plan)
    assert controller.state_dict() == before


def test_a_foreign_plan_is_refused_without_a_trace():
    """A plan with finer bins, or with two counts in one bin, fails in a game before any part has learnt."""
    coarse, published = GDROController.joint_play(4, num_bins=5), PublishedController(4, rollout=True)
    for controller, change, call in (
        (coarse, {"bins": np.array([0, 1, 4, 5])}, lambda plan: coarse.observe(plan, np.ones(16))),
        (
            published,
            {"bins": np.array([0, 0, 1, 1]), "counts": np.array([4, 4, 3, 5])},
            lambda plan: published.observe_losses(plan, np.ones(4)),
        ),
    ):
        plan, before = replace(controller.plan(IDS[:4]), **change), controller.state_dict()
        with pytest.raises(ValueError, match=r"bins must hold .*5|counts must be the same .* bin 1"):
            call(plan)
        assert controller.state_dict() == before


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 7, "version = 7"),
        (["seed"], 1, "seed = 1"),
        (["joint"], False, "joint = False"),
        (["mean_rollouts"], 8, "mean_rollouts = 8"),
        (["step"], -1, "step must be an integer >= 0, got -1"),
        (["prompt"], None, "lacks prompt"),
        (["classifier", "edges"], [0.5], "edges"),
        (["prompt", "memory", "sum"], [1.0], "sum must have shape"),
        (["rollout", "max_rollouts"], 13, "rollout = .*13"),
        (["rollout"], None, "rollout = None"),
    ],
)
def test_state_of_another_controller_is_refused(path, value, message):
    """Whichever part refuses, no part has changed."""
    make = joint_bins
    controller, other = trained(make, 3), json.loads(json.dumps(trained(make, 9).state_dict()))
    before, inner = controller.state_dict(), other
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict(other)
    assert controller.state_dict() == before


def test_state_with_a_part_too_many_or_another_budget_is_refused():
    """A prompt game's state does not fit a controller without one, nor one budget another."""
    with pytest.raises(ValueError, match="has prompt"):
        GDROController.joint_play(4, prompt=False).load_state_dict(GDROController.joint_play(4).state_dict())
    with pytest.raises(ValueError, match="mean_rollouts = 4, this one needs 8"):
        GDROController.uniform(8).load_state_dict(GDROController.uniform(4).state_dict())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GDROController(OnlineDifficultyClassifier()), "exactly one of rollout and mean_rollouts .*None"),
        (
            lambda: GDROController(OnlineDifficultyClassifier(), rollout=RolloutGDRO(4, 2, 6), mean_rollouts=4),
            "exactly one of rollout and mean_rollouts .*4",
        ),
        (
            lambda: GDROController(OnlineDifficultyClassifier(), PromptGDRO(9), mean_rollouts=4),
            "prompt.num_bins .*10.* 9",
        ),
        (lambda: GDROController.uniform(0), "mean_rollouts must be an integer >= 1, got 0"),
        (lambda: GDROController.uniform(4, seed=-1), "seed must be an integer >= 0, got -1"),
        (lambda: GDROController.uniform(4, num_bins=0), "num_bins must be an integer >= 1, got 0"),
        (lambda: GDROController.joint_play(4, 6, 5), "max_rollouts must be at least min_rollouts = 6, got 5"),
        (lambda: GDROController.joint_play(13), r"mean_rollouts must lie in \[2, 12\], got 13"),
        (
            lambda: GDROController(
                OnlineDifficultyClassifier(), PromptGDRO(10, payoff=LEARNABILITY), RolloutGDRO(4, 1, 6)
            ),
            "min_rollouts with payoff 'learnability' must lie in .*1",
        ),
        (
            lambda: GDROController(OnlineDifficultyClassifier(), PromptGDRO(10, payoff=LEARNABILITY), mean_rollouts=1),
            "min_rollouts with payoff 'learnability' must lie in .*1",
        ),
    ],
)
def test_construction_refuses(build, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        build()


@every_controller
@given(seed=st.integers(0, 2**32 - 1), workers=st.integers(1, 5))
def test_theorem_12_parts_merge_in_any_order_into_what_one_worker_sees(make, seed, workers):
    """Merging is commutative and associative, and a merged batch teaches exactly what the whole batch teaches."""
    rng = np.random.default_rng(seed)
    whole, merged = trained(make, steps=2), trained(make, steps=2)
    plan = whole.plan(IDS[:12])
    rewards = rng.integers(0, 2, plan.counts.sum()).astype(float)
    worker = rng.integers(0, workers, rewards.size)  # some may hold nothing
    parts = [Observation.of(plan, rewards[worker == w], np.flatnonzero(worker == w)) for w in range(workers)]
    left = reduce(Observation.merge, parts)
    order = rng.permutation(workers)
    right = reduce(lambda later, earlier: parts[earlier].merge(later), order[1:], parts[order[0]])
    for observation in (left, right):
        np.testing.assert_array_equal(observation.correct, Observation.of(plan, rewards).correct)
        np.testing.assert_array_equal(observation.trials, plan.counts)
    assert merged.observe(merged.plan(IDS[:12]), right) == whole.observe(plan, rewards)
    assert merged.state_dict() == whole.state_dict()


def test_theorem_12_a_part_of_a_batch_teaches_about_its_prompts_alone():
    """Prompts without a graded rollout stay as they were; the others count the rollouts that came."""
    controller = GDROController.joint_play(4)
    plan = controller.plan(["a", "b"])
    metrics = controller.observe(plan, Observation.of(plan, [1, 0, 1], rows=[0, 1, 2]))
    assert controller.classifier.posterior(["a"]) == (2.5, 1.5)
    assert controller.classifier.bins(["a", "b"]).tolist() == [6, -1]
    assert metrics["unseen_share"] == 1.0


def test_theorem_12_late_observations_leave_the_same_difficulty():
    """Plans made before earlier batches came back are observed as if they had been made in turn."""
    late, prompt = GDROController.uniform(4), GDROController.uniform(4)
    batches = [IDS[:8], IDS[8:16], IDS[:8]]
    rewards = np.random.default_rng(0).integers(0, 2, (3, 32)).astype(float)
    plans = [late.plan(ids) for ids in batches]
    for ids, plan, reward in zip(batches, plans, rewards, strict=True):
        late.observe(plan, reward)
        prompt.observe(prompt.plan(ids), reward)
    assert late.state_dict() == prompt.state_dict()


@every_controller
def test_state_survives_torch_and_json_and_lacking_keys_are_refused(make, tmp_path):
    """torch.load(weights_only=True) and json keep all that a bit-identical continuation needs; no key may lack."""
    torch = pytest.importorskip("torch")
    controller = trained(make)
    saved = controller.state_dict()
    torch.save(saved, tmp_path / "state.pt")
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), json.loads(json.dumps(saved))):
        restored = make()
        restored.load_state_dict(state)
        assert step(restored, np.random.default_rng(5))[2] == step(make_again(make, saved), np.random.default_rng(5))[2]
        assert restored.classifier.state_dict() == make_again(make, restored.state_dict()).classifier.state_dict()
    parts = {name: part for name, part in saved.items() if isinstance(part, dict)}
    for keys, part in [((), saved), *(((name,), part) for name, part in parts.items())]:
        for lost in part:
            broken = json.loads(json.dumps(saved))
            inner = broken
            for key in keys:
                inner = inner[key]
            del inner[lost]
            with pytest.raises(ValueError, match=rf"{lost}"):
                controller.load_state_dict(broken)
            assert controller.state_dict() == saved


def make_again(make, saved):
    controller = make()
    controller.load_state_dict(saved)
    return controller


@pytest.mark.parametrize("games", [{"rollout": False}, {"prompt": False}], ids=["prompt", "rollout"])
def test_metrics_of_a_single_game(games):
    """With one game alone weights, price and lead-lag are there; q_b only with the prompt game."""
    controller, rng = GDROController.joint_play(4, **games), np.random.default_rng(3)
    for _ in range(4):
        plan, _, metrics = step(controller, rng, size=30)
    seen = plan.bins >= 0
    assert ("bin_probability" in metrics) == ("prompt" not in games)
    assert metrics["shadow_price"] == plan.price
    assert (plan.price > 0) == ("rollout" not in games)
    assert metrics["lead_lag"] == pytest.approx(
        np.average(plan.bins[seen], weights=plan.weights[seen]) - plan.bins[seen].mean()
    )
    for b, weight in enumerate(metrics["bin_weight"]):
        members = plan.weights[plan.bins == b]
        assert weight == (pytest.approx(members.mean()) if members.size else None)
    if "prompt" in games:
        assert {w for w in metrics["bin_weight"] if w is not None} == {1.0}


def test_every_controller_is_a_planner():
    """The protocol that the training loop and the simulations ask for."""
    for make in MAKERS.values():
        planner: Planner = make()
        plan = planner.plan(IDS[:3])
        assert isinstance(planner.observe(plan, np.ones(12)), dict)
