"""States that earlier versions wrote (`states/`) are read, and the next batches are the ones that they planned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gdro_core import (
    HIT,
    LEARNABILITY,
    MIXED,
    ChiSquare,
    CVaR,
    ExactPlay,
    GDROController,
    NoRegret,
    OnlineDifficultyClassifier,
    PromptGDRO,
    PublishedController,
    RolloutGDRO,
)

SAVED, SAVED_2, SAVED_3 = (
    json.loads((Path(__file__).parent / "states" / f"version_{version}.json").read_text()) for version in (1, 2, 3)
)


def own(prompt=None, rollout=None, **options):
    mean = {"mean_rollouts": 4} if rollout is None else {}
    return GDROController(OnlineDifficultyClassifier([0.25, 0.5, 0.75]), prompt, rollout, **mean, **options)


def no_regret(implicit=False, **options):
    adversary = NoRegret(0.5, implicit_exploration=implicit)
    return PromptGDRO(4, adversary=adversary, uniform_reference=True, **options)


RECOMMENDED = GDROController.joint_play
BUILD = {
    "uniform": lambda: GDROController.uniform(4, seed=3),
    "recommended": lambda: RECOMMENDED(4, seed=3),
    "recommended, prompt only": lambda: RECOMMENDED(4, rollout=False, seed=3),
    "recommended, rollout only": lambda: RECOMMENDED(4, prompt=False, seed=3),
    "cvar": lambda: RECOMMENDED(4, adversary=CVaR(0.5), utility=MIXED, seed=1),
    "chi-square": lambda: RECOMMENDED(4, adversary=ChiSquare(0.5), utility=HIT, seed=1),
    "hedge": lambda: own(no_regret(), RolloutGDRO(4, 2, 12)),
    "exp3-ix, learnability": lambda: own(no_regret(True, payoff=LEARNABILITY, exploration=0.1)),
    "bins, mixed": lambda: own(
        PromptGDRO(4, payoff=LEARNABILITY, uniform_reference=True), RolloutGDRO(4, 2, 12, MIXED, per_bin=True)
    ),
    "null": lambda: own(None, RolloutGDRO(4, 2, 12, permute=True), seed=7),
    "preserved": lambda: RECOMMENDED(4, preserve_objective=True, seed=2),
    "not joint": lambda: own(PromptGDRO(4), RolloutGDRO(4, 2, 12), joint=False),
    "published prompt": lambda: PublishedController(4, seed=3),
    "published rollout": lambda: PublishedController(4, prompt=False, rollout=True, seed=3),
    "published both": lambda: PublishedController(4, rollout=True, seed=3),
}


def test_every_saved_state_is_read():
    """None is left out of the tests below."""
    assert BUILD.keys() == SAVED["controllers"].keys()


def assert_continues(controller, saved) -> None:
    """From a saved state, through the batches that followed it then."""
    controller.load_state_dict(saved["state"])
    for batch in saved["after"]:
        plan = controller.plan(batch["ids"])
        assert plan.counts.tolist() == batch["counts"]
        assert plan.weights.tolist() == batch["weights"]
        controller.observe(plan, batch["rewards"])


@pytest.mark.parametrize("name", BUILD)
def test_a_state_of_version_1_continues_bit_for_bit(name):
    """Counts and weights of the three batches after it, with the same rewards and losses; saved again it is of now."""
    controller, saved = BUILD[name](), SAVED["controllers"][name]
    controller.load_state_dict(saved["state"])
    for batch in saved["after"]:
        plan = controller.plan(batch["ids"])
        assert plan.counts.tolist() == batch["counts"]
        assert plan.weights.tolist() == batch["weights"]
        if isinstance(controller, PublishedController):
            controller.observe_losses(plan, batch["losses"])
        controller.observe(plan, batch["rewards"])
    again = BUILD[name]()
    again.load_state_dict(controller.state_dict())
    assert again.state_dict() == controller.state_dict()
    assert controller.state_dict()["version"] == again.state_dict()["version"] > 1


BUILD_2 = {
    "uniform": BUILD["uniform"],
    "recommended": BUILD["recommended"],
    "hit": lambda: RECOMMENDED(4, 1, 12, prompt=False, utility=HIT, num_bins=5, seed=1),
}


@pytest.mark.parametrize("name", SAVED_2["controllers"])
def test_a_state_of_version_2_continues_bit_for_bit(name):
    """Counts and weights of the three batches after it: no components, and prompts without rollouts do not fade."""
    assert_continues(BUILD_2[name](), SAVED_2["controllers"][name])


BUILD_3 = {
    "uniform": BUILD["uniform"],
    "joint": BUILD["recommended"],
    "recommended": lambda: GDROController.recommended(4, seed=3),
}


@pytest.mark.parametrize("name", SAVED_3["controllers"])
def test_a_state_of_version_3_continues_bit_for_bit(name):
    """Counts and weights of the three batches after it: the prior was fixed."""
    assert_continues(BUILD_3[name](), SAVED_3["controllers"][name])


def test_the_bandit_of_version_1_continues_bit_for_bit():
    """Its class was `RolloutGDRO` with feedback "bandit"."""
    game, saved = ExactPlay(3, 4, 2, 8), SAVED["bandit"]
    game.load_state_dict(saved["state"])
    rng = np.random.default_rng()
    rng.bit_generator.state = saved["rng"]
    bins = np.array([0, 0, 1, 1, 2, 2])
    for batch in saved["after"]:
        counts = game.counts(bins, rng=rng)
        assert counts.tolist() == batch["counts"]
        game.observe(bins, counts, batch["losses"])


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("recommended, prompt only", "published prompt", "joint = False"),
        ("published prompt", "recommended, prompt only", "statistic = .*'PassRate'"),
        ("recommended", "recommended, prompt only", "mean_rollouts = 4, this one needs None"),
        ("recommended", "cvar", "seed = 1"),
        ("cvar", "chi-square", "rollout = .*'hit'"),
        ("hedge", "not joint", "joint = False"),
        ("published rollout", "null", "seed = 7"),
    ],
)
def test_a_state_of_version_1_of_another_controller_is_refused(name, other, message):
    """Nothing has changed after the error."""
    controller = BUILD[name]()
    before = controller.state_dict()
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict(SAVED["controllers"][other]["state"])
    assert controller.state_dict() == before


@pytest.mark.parametrize(
    ("name", "part", "lost"),
    [
        *(("recommended", None, key) for key in ("seed", "joint", "mean_rollouts", "step", "classifier", "rollout")),
        *(("recommended", "prompt", key) for key in ("adversary", "step_size", "score", "score_weight", "share")),
        *(("recommended", "rollout", key) for key in ("utility", "granularity", "permute", "max_rollouts")),
        *(("hedge", "prompt", key) for key in ("drawn", "hedge", "reference", "weighting")),
        *(("published both", "prompt", key) for key in ("score", "share_normalised", "max_weight")),
        *(("published both", "rollout", key) for key in ("scores", "price", "ema", "feedback")),
    ],
)
def test_what_a_state_of_version_1_lacks_is_named(name, part, lost):
    """Nothing has changed after the error."""
    broken = json.loads(json.dumps(SAVED["controllers"][name]["state"]))
    del (broken if part is None else broken[part])[lost]
    controller = BUILD[name]()
    before = controller.state_dict()
    with pytest.raises(ValueError, match=f"lacks '{lost}'"):
        controller.load_state_dict(broken)
    assert controller.state_dict() == before
