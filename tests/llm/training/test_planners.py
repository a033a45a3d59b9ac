"""Peers and control experiments: what they share with the real controllers, and what they take away."""

from dataclasses import asdict

import numpy as np
import pytest

from gdro_core import HIT, MIXED, ChiSquare, CVaR, Entropic, GDROController, gradient_weight, signal
from gdro_llm.config import CONTROLLERS, Config, UsageError
from gdro_llm.training.planners import build_controller
from gdro_llm.training.step import flip_rewards

IDS = [f"p{i}" for i in range(64)]
P = np.linspace(0.02, 0.98, len(IDS))


def trained(*controllers: GDROController, steps: int = 6) -> list[GDROController]:
    """Controllers that saw the same rewards of the first one's plans, `steps` times."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        plan = controllers[0].plan(IDS)
        rewards = rng.random(len(plan.owner)) < P[plan.owner]
        for controller in controllers:
            controller.observe(plan, rewards)
    return list(controllers)


def build(name: str, **settings) -> GDROController:
    return build_controller(Config(controller=name, **settings))


def twin(name: str, **settings) -> tuple[GDROController, GDROController]:
    """A real controller and the one that takes something away from it, in the same state."""
    of = {"null": "recommended", "implicit-rollout": "joint-rollout"}.get(name, "joint")
    real, other = trained(build(of), build(name, **settings))
    return real, other


@pytest.mark.parametrize(("name", "followed", "most"), [("joint-null", P, -0.5), ("null", abs(P - 0.5), -0.25)])
def test_the_null_gives_the_same_pairs_to_random_prompts(name, followed, most):
    """The same (weight, count) pairs and total, permuted anew in every step: they do not depend on difficulty."""
    real, null = twin(name)
    rng, informed, permuted, orders = np.random.default_rng(1), [], [], set()
    for _ in range(60):
        plan, null_plan = real.plan(IDS), null.plan(IDS)
        assert (null_plan.ids, null_plan.price, null_plan.step) == (plan.ids, plan.price, plan.step)
        pairs, got = (sorted(zip(x.weights, x.counts, strict=True)) for x in (plan, null_plan))
        assert got == pairs
        assert null_plan.counts.sum() == 4 * len(IDS)
        assert name == "null" or null_plan.counts @ null_plan.weights == pytest.approx(len(plan.owner))
        for x, correlations in ((plan, informed), (null_plan, permuted)):
            correlations.append((np.corrcoef(x.counts, followed)[0, 1], np.corrcoef(x.weights, P)[0, 1]))
        orders.add(null_plan.counts.tobytes())
        rewards = rng.random(len(plan.owner)) < P[plan.owner]
        for controller in (real, null):  # of the real plan: their states stay the same
            controller.observe(plan, rewards)
    assert (np.mean(informed, axis=0) < most).all(), (
        "the real plan must follow difficulty for this test to mean anything"
    )
    assert (abs(np.mean(permuted, axis=0)) < 4 / np.sqrt(60 * len(IDS))).all()
    assert len(orders) > 50


@pytest.mark.parametrize("name", ["joint-null", "null"])
def test_the_same_step_is_permuted_the_same_way(name):
    """Planning draws from (seed, step) only."""
    (null,) = trained(build(name))
    assert null.plan(IDS).counts.tolist() == null.plan(IDS).counts.tolist()
    (other,) = trained(build(name, seed=1))
    assert null.plan(IDS).counts.tolist() != other.plan(IDS).counts.tolist()


@pytest.mark.parametrize("aggregation", ["rollout", "prompt"])
@pytest.mark.parametrize("name", ["implicit", "implicit-rollout"])
def test_rollouts_as_weights(name, aggregation):
    """Uniform counts; a prompt's weight is the plan's, times the factor that its counts would bring: n w_n, or w_n."""
    real, implicit = twin(name, aggregation=aggregation)
    plan, uniform = real.plan(IDS), implicit.plan(IDS)
    assert np.ptp(plan.counts) > 2, "the counts must be ragged for this test to mean anything"
    assert uniform.counts.tolist() == [4] * len(IDS)
    p = real.classifier.pass_rate(IDS)
    pulls = [w * gradient_weight([n], q)[0] for w, n, q in zip(plan.weights, plan.counts, p, strict=True)]
    if aggregation == "rollout":
        pulls = [n * pull for n, pull in zip(plan.counts, pulls, strict=True)]
    pulled = [w * gradient_weight([4], q)[0] for w, q in zip(uniform.weights, p, strict=True)]
    np.testing.assert_allclose(np.array(pulled) / np.sum(pulled), np.array(pulls) / np.sum(pulls), rtol=1e-12)
    assert uniform.weights.mean() == pytest.approx(1.0)
    assert (plan.weights == 1).all() == (name == "implicit-rollout")


def test_mopps_takes_the_quarter_of_the_candidates_whose_draws_are_nearest_to_one_half():
    """By a loop over the candidates; in their order, with n_bar rollouts and weight 1 each."""
    (mopps,) = trained(build("mopps"), steps=2)
    chosen = mopps.plan(IDS, budget=64)
    a, b = mopps.classifier.posterior(IDS)
    draws = np.random.default_rng([0, chosen.step, 1]).beta(a, b)
    kept = [i for i in range(64) if sum(abs(x - 0.5) < abs(draws[i] - 0.5) for x in draws) < 16]
    assert chosen.ids == tuple(IDS[i] for i in kept)
    assert len(chosen.ids) == 16
    assert set(chosen.counts) == {4}
    assert set(chosen.weights) == {1.0}


def test_mopps_learns_which_prompts_are_of_middling_difficulty():
    """Before it knows anything it takes any; then its prompts' true pass rates lie nearer to 1/2 than the others'."""
    distance = []
    mopps, rng = build("mopps"), np.random.default_rng(0)
    for _ in range(60):
        plan = mopps.plan(IDS, budget=64)
        p = np.array([P[IDS.index(name)] for name in plan.ids])
        distance.append(abs(p - 0.5).mean())
        mopps.observe(plan, rng.random(len(plan.owner)) < np.repeat(p, 4))
    average = abs(P - 0.5).mean()
    assert distance[0] == pytest.approx(average, abs=0.1)
    assert np.mean(distance[-20:]) < 0.6 * average


@pytest.mark.parametrize(
    ("name", "setting", "part", "attribute", "value"),
    [
        ("recommended", {"adversary": "cvar"}, "prompt", "adversary", CVaR(0.5)),
        ("recommended", {"adversary": "cvar", "cvar_alpha": 0.1}, "prompt", "adversary", CVaR(0.1)),
        ("null", {"adversary": "chi-square", "chi_square_rho": 2.0}, "prompt", "adversary", ChiSquare(2.0)),
        ("recommended", {"adversary_step": 1.0}, "prompt", "adversary", Entropic(1.0)),
        ("joint-prompt", {"adversary_step": 1.0}, "prompt", "adversary", Entropic(1.0)),
        ("null", {"adversary": "chi-square"}, "prompt", "adversary", ChiSquare(0.5)),
        ("implicit-rollout", {"utility": "mixed"}, "rollout", "utility", MIXED),
        ("joint-rollout", {"utility": "hit"}, "rollout", "utility", HIT),
        ("recommended", {"kappa": 2.0}, "rollout", "utility", signal(2.0)),
        ("recommended", {"verifier_error": 0.1}, "rollout", "utility", signal(0.5, 0.1)),
        ("null", {"kappa": 0.0, "verifier_error": 0.2}, "rollout", "utility", signal(0.0, 0.2)),
        ("recommended", {"min_rollouts": 2}, "rollout", "min_rollouts", 2),
        ("joint", {"min_rollouts": 3}, "rollout", "min_rollouts", 3),
        ("recommended", {"max_rollouts": 20}, "rollout", "max_rollouts", 20),
    ],
)
def test_settings_reach_the_games(name, setting, part, attribute, value):
    """Each key of the configuration becomes the object that it names."""
    assert getattr(getattr(build(name, **setting), part), attribute) == value
    assert getattr(getattr(build(name), part), attribute) != value


@pytest.mark.parametrize(
    ("names", "step", "fewest"),
    [
        (("recommended", "null"), 0.6, 0),
        (("joint", "joint-prompt", "joint-rollout", "joint-null", "implicit", "implicit-rollout"), 2.0, 2),
    ],
)
def test_zero_means_the_controllers_own_default(names, step, fewest):
    """The step of the adversary and the fewest rollouts, which joint play cannot have at 0."""
    for controller in map(build, names):
        assert controller.prompt is None or controller.prompt.adversary == Entropic(step)
        assert controller.rollout is None or controller.rollout.min_rollouts == fewest
    for name in names:  # so that they are no other configuration
        given = {"min_rollouts": fewest} | ({"adversary_step": step} if not name.endswith("rollout") else {})
        one, other = Config(controller=name), Config(controller=name, **given)
        assert one.conflicts(asdict(other)) == other.conflicts(asdict(one)) == {}
    for game in ("prompt", "rollout"):
        published = build(f"published-{game}", aggregation="prompt")
        assert published.rollout is None or published.rollout.min_rollouts == 2


def test_only_the_recommended_controller_and_its_null_learn_kappa():
    with_components = {name for name in CONTROLLERS if _has_components(name)}
    assert with_components == {"recommended", "null"}


def _has_components(name: str) -> bool:
    return getattr(build(name, aggregation="prompt"), "components", None) is not None


def test_a_weaker_adversary_spreads_weights_less():
    """The spread of the weights grows from nothing with adversary_step."""
    spread = [np.ptp(trained(build("joint", adversary_step=x))[0].plan(IDS).weights) for x in (1e-12, 1.0, 2.0)]
    assert spread[0] == pytest.approx(0.0, abs=1e-10)
    assert 0.1 < spread[1] < spread[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controller": "grpo", "adversary": "cvar"}, "adversary changes nothing with controller 'grpo'"),
        ({"controller": "mopps", "adversary_step": 1.0}, "adversary_step changes nothing with controller 'mopps'"),
        ({"controller": "published-prompt", "utility": "hit"}, "utility changes nothing with .*'published-prompt'"),
        ({"controller": "joint-prompt", "utility": "hit"}, "utility changes nothing with .*'joint-prompt'"),
        ({"controller": "recommended", "utility": "hit"}, "utility changes nothing with controller 'recommended'"),
        ({"controller": "null", "utility": "mixed"}, "utility changes nothing with controller 'null'"),
        ({"controller": "joint-rollout", "adversary": "cvar"}, "adversary changes nothing"),
        ({"controller": "joint", "kappa": 1.0}, "kappa changes nothing with controller 'joint'"),
        ({"controller": "joint-null", "verifier_error": 0.1}, "verifier_error changes nothing with .*'joint-null'"),
        ({"controller": "implicit", "measure_every": 0}, "measure_every changes nothing with controller 'implicit'"),
        ({"controller": "grpo", "candidates": 3}, "candidates changes nothing with controller 'grpo'"),
        ({"controller": "grpo", "budget": "tokens"}, "budget changes nothing with controller 'grpo'"),
        ({"controller": "null", "budget": "tokens"}, "budget changes nothing with controller 'null'"),
        ({"controller": "joint", "budget": "tokens"}, "budget changes nothing with controller 'joint'"),
        ({"budget": "seconds"}, "budget must be one of rollouts, tokens, got 'seconds'"),
        ({"controller": "mopps", "candidates": 3}, "candidates changes nothing with controller 'mopps'"),
        ({"controller": "published-prompt", "kappa": 1.0}, "kappa changes nothing with .*'published-prompt'"),
        ({"controller": "grpo", "utility": "hit", "kappa": 1.0, "candidates": 3}, "^candidates changes nothing"),
        ({"candidates": 3, "min_rollouts": 2}, "candidates above 1 need min_rollouts 0, .* got 3 with min_rollouts 2"),
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"kappa": -0.1}, "kappa must be at least 0.0, got -0.1"),
        ({"verifier_error": 0.495}, r"verifier_error must lie in \[0, 0.49\], got 0.495"),
        ({"measure_every": -1}, "measure_every must be at least 0, got -1"),
        ({"aggregation": "prompt", "preserve_objective": True}, "preserve_objective must be off .*'recommended'"),
        ({"controller": "implicit-rollout", "adversary_step": 1.0}, "adversary_step changes nothing"),
        ({"adversary": "cvar", "adversary_step": 1.0}, "adversary_step changes nothing with adversary 'cvar'"),
        ({"adversary": "hedge"}, "adversary must be one of"),
        ({"adversary_step": -1.0}, "adversary_step must be at least 0"),
        (
            {"controller": "null", "aggregation": "prompt", "preserve_objective": True},
            "preserve_objective must be off with controller 'null'",
        ),
        ({"refill": True, "kl_coef": 0.1}, "refill needs kl_coef 0"),
        ({"refill": True, "overlong": "mask"}, "refill needs .*overlong 'keep' or 'punish'"),
        ({"refill": True, "controller": "published-rollout"}, "refill needs .*no published controller"),
        ({"controller": "published-rollout"}, "'published-rollout' needs aggregation 'prompt', the mean of Eq. 7"),
        ({"reward_noise": 0.51}, r"reward_noise must lie in \[0, 0.5\]"),
        ({"reward_noise": -0.1}, r"reward_noise must lie in \[0, 0.5\]"),
        ({"validation_problems": -1}, "validation_problems must be at least 0"),
        (
            {"controller": "joint", "min_rollouts": 1, "aggregation": "prompt", "preserve_objective": True},
            "min_rollouts with preserve_objective",
        ),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings, message):
    """A key that a controller ignores would make two runs look different that are the same."""
    with pytest.raises(UsageError, match=message):
        build_controller(Config(**settings))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_reward_noise_turns_its_share_of_the_grades_round(share):
    """To 5 standard errors; a grade is either as it was or 1 minus it, also where it is a fraction."""
    grades = np.tile([0.0, 1.0, 0.25], 10_000)
    flipped = flip_rewards(grades, np.arange(len(grades)), len(grades), Config(reward_noise=share), step=3)
    wrong = flipped != grades
    assert (flipped[wrong] == 1 - grades[wrong]).all()
    for value in (0.0, 1.0, 0.25):
        assert abs(wrong[grades == value].mean() - share) < 5 * np.sqrt(share * (1 - share) / 10_000)


def test_reward_noise_belongs_to_seed_step_and_row():
    """Whichever rows a process holds, in whatever order; another step or seed turns others round; none turns none."""
    rng = np.random.default_rng(0)
    grades, config = (rng.random(500) < 0.5).astype(float), Config(reward_noise=0.3)
    whole = flip_rewards(grades, np.arange(500), 500, config, 7)
    order = rng.permutation(500)
    for rows in (order[:200], order[200:]):
        assert flip_rewards(grades[rows], rows, 500, config, 7).tolist() == whole[rows].tolist()
    for other, step in ((config, 8), (Config(reward_noise=0.3, seed=1), 7)):
        assert (flip_rewards(grades, np.arange(500), 500, other, step) != whole).any()
    assert flip_rewards(grades, np.arange(500), 500, Config(), 7).tolist() == grades.tolist()
