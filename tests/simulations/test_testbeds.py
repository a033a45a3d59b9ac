"""The testbeds do what they declare: unbiased gradients, own parts that help nobody else, and the declared kappa."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.special import expit, logit

from gdro_core import Plan, gradient_weight
from simulations import testbeds
from simulations.controls import GroupsOf
from simulations.experiments.frontier import TUNING
from simulations.peers import PEERS
from simulations.race import own_stream, race
from simulations.testbeds import AdamLike, Ground, Learner, Normalised, Plain, cells, ladder, skilled


class Recording(Plain):
    """Plain steps that remember the squared length of the gradient."""

    def scale(self, square):
        self.square = square
        return 1.0


def ground(p=(0.3, 0.6), prompts=1, loadings=((1.0, 0.5), (0.7, 0.0)), opposed=(False, False)):
    """Two prompts by hand."""
    return Ground(logit(np.asarray(p)), np.asarray(loadings), prompts, np.asarray(opposed))


def bed(steps=None, learning_rate=0.3, where=None, **options):
    return Learner(where or ground(), steps=steps or Recording(), learning_rate=learning_rate, **options)


def outcomes(n, p):
    """All results of n rollouts with their probabilities."""
    for hits in product([False, True], repeat=n):
        correct = np.array(hits)
        yield correct, np.where(correct, p, 1 - p).prod()


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_the_expected_step_is_the_weighted_gradient(n):
    """Exactly, over all outcomes: w_n(p) p (1 - p) times L for the skills and times tau² for the own logit."""
    shared, own = np.zeros(2), 0.0
    for correct, chance in outcomes(n, 0.3):
        one = bed(own=2.0)
        one.correct = correct
        one.update(np.array([0]), np.array([n]), correct.astype(float), np.array([1.5]))
        shared, own = shared + chance * one.theta, own + chance * one.learnt[0]
    pull = 0.3 * 1.5 * gradient_weight(np.array([n]), np.array([0.3]))[0] * 0.3 * 0.7
    np.testing.assert_allclose(shared, pull * np.array([1.0, 0.5]), rtol=1e-10)
    assert own == pytest.approx(2.0 * pull, rel=1e-10)


def test_the_length_counts_shared_own_and_noise():
    """By a loop over the rollouts of three prompts with explicit directions for own parts and for each one's noise."""
    rng = np.random.default_rng(0)
    where = Ground(rng.normal(0, 1, 4), rng.normal(0, 1, (4, 2)), 3, np.zeros(4, dtype=bool))
    one = bed(where=where, own=2.0, noise=5.0)
    rows, counts, weights = np.arange(3), np.array([4, 6, 3]), np.array([1.0, 0.5, 2.0])
    rate = one.pass_rate
    rewards = one.sample(rows, counts, rng)
    rewards[:] = one.correct = np.array([1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1])
    total = np.zeros(2 + 3 + 13)
    for j, i in enumerate(np.repeat(rows, counts)):
        group = rewards[np.repeat(rows, counts) == i]
        advantage = (rewards[j] - group.mean()) / group.std() if group.std() > 0 else 0.0
        score = one.correct[j] - rate[i]
        total[:2] += weights[i] * advantage * score * where.loadings[i] / 13
        total[2 + i] += weights[i] * advantage * score * np.sqrt(2.0) / 13
        total[5 + j] += weights[i] * advantage * np.sqrt(5.0) / 13
    one.update(rows, counts, rewards, weights)
    assert one.steps.square == pytest.approx(total @ total, rel=1e-10)
    np.testing.assert_allclose(one.theta, 0.3 * total[:2], rtol=1e-10)


def test_own_parts_move_no_held_out_prompt():
    """Without loadings a run teaches the training prompts and nobody else."""
    where = cells(0, prompts=60, held_out=30)
    alone = Ground(where.difficulty, np.zeros_like(where.loadings), 60, where.opposed)
    one = bed(AdamLike(), where=alone, own=3.0)
    before, held_out = one.pass_rate, one.held_out_pass_rate
    race(one, PEERS["uniform"](one, 4, own_stream(0)), 20 * 20 * 4, 20, seed=0)
    np.testing.assert_array_equal(one.held_out_pass_rate, held_out)
    assert one.pass_rate.mean() > before.mean() + 0.02


@pytest.mark.parametrize("agreement", [0.0, 0.3])
def test_halves_measure_the_declared_components(monkeypatch, agreement):
    """20,000 groups of 7: means of both halves are v (L, own); products are v² (|L|² + tau²); the rest is the noise."""
    monkeypatch.setattr(testbeds, "MEASURED", 20_000)
    one = bed(own=2.0, noise=4.0, agreement=agreement)
    assert one.kappa == 0.5
    rng, rows, counts = np.random.default_rng(0), np.zeros(20_000, dtype=int), np.full(20_000, 7)
    halves = one.halves(rows, counts, one.sample(rows, counts, rng), rng)
    assert halves.trials.tolist() == [[3, 4]] * 20_000
    (taught,), (own,) = one.components(np.array([0]))
    rho = 1 / (1 + (agreement / 0.3) ** 2)
    np.testing.assert_allclose(taught, [rho, 0.5 * rho])
    assert taught @ taught + own == pytest.approx(1.25 + 2.0)  # what is not shared is idle, none is lost
    v = 0.3 * 0.7
    for half, size in ((halves.first, 3), (halves.second, 4)):
        np.testing.assert_allclose(half[:, :2].mean(axis=0), v * taught, rtol=0.03)  # 4.5 sigma
        noise = (half[:, 2:] ** 2).sum(axis=1).mean() - (half[:, 0] ** 2).mean() / taught[0] ** 2 * own
        assert noise == pytest.approx(4.0 * v / (size - 1), rel=0.03)
    product = (halves.first * halves.second).sum(axis=1).mean()
    assert product == pytest.approx(v**2 * (1.25 + 2.0), rel=0.04)


def test_halves_are_zero_where_a_half_is_not_mixed_and_leave_out_small_groups():
    """As `VarianceComponents` asks of its input."""
    one = bed(own=2.0)
    rows, counts = np.zeros(40, dtype=int), np.array([3, 4] * 20)
    rng = np.random.default_rng(0)
    halves = one.halves(rows, counts, one.sample(rows, counts, rng), rng)
    assert halves.places.tolist() == list(range(1, 40, 2))
    assert one.halves(rows[:2], np.array([3, 2]), np.ones(5), rng).first.shape == (0, 2 + testbeds.SKETCH)
    same = (halves.correct == 0) | (halves.correct == halves.trials)
    for half, gradients in enumerate((halves.first, halves.second)):
        np.testing.assert_array_equal(gradients.any(axis=1), ~same[:, half])


def test_own_directions_belong_to_prompts():
    """Two measurements of one prompt share its own direction; two prompts share none."""
    where = Ground(np.zeros(3), np.zeros((3, 1)), 2, np.zeros(3, dtype=bool))
    one, rng = bed(where=where, own=1.0, noise=1e-12), np.random.default_rng(0)
    rows, counts = np.array([0, 1]), np.array([40, 40])
    first, second = (one.halves(rows, counts, one.sample(rows, counts, rng), rng).first for _ in range(2))
    unit = [g / np.linalg.norm(g, axis=1, keepdims=True) for g in (first, second)]
    np.testing.assert_allclose((unit[0] * unit[1]).sum(axis=1), 1.0, atol=1e-6)
    assert abs(unit[0][0] @ unit[0][1]) < 0.5


def test_opposed_prompts_unteach_others_and_not_themselves():
    """Hits by a false route: the held-out prompt falls, the prompt's own logit rises."""
    one = bed(where=ground(p=(0.05, 0.6), opposed=(True, False)), own=9.0)
    one.correct = np.array([True, False, False, False])
    start = one.held_out_pass_rate[0]
    one.update(np.array([0]), np.array([4]), one.correct.astype(float), np.ones(1))
    assert one.held_out_pass_rate[0] < start
    assert one.pass_rate[0] > 0.05


def test_what_is_learnt_fades_by_its_share_each_step():
    """Without a gradient a step multiplies everything learnt by 1 - forgetting."""
    one = bed(own=1.0, forgetting=0.2)
    one.theta, one.learnt[0] = np.array([1.0, 2.0]), 3.0
    one.correct = np.array([True, True])
    one.update(np.array([0]), np.array([2]), np.ones(2), np.ones(1))
    np.testing.assert_allclose(one.theta, [0.8, 1.6])
    assert one.learnt[0] == pytest.approx(2.4)


def test_rules_for_steps():
    """Plain: 1. Normalised: length 1. Adam-like: of a constant length 1 from the first step on, then by the rms."""
    assert Plain().scale(4.0) == 1.0
    assert Normalised().scale(4.0) == 0.5
    adam = AdamLike(0.5)
    assert [adam.scale(4.0), adam.scale(4.0)] == pytest.approx([0.5, 0.5])
    assert adam.scale(1.0) == pytest.approx((0.5 * 4 * 0.75 / 0.875 + 0.5 / 0.875) ** -0.5)


def test_the_verifier_errs_at_its_two_rates():
    """40,000 rollouts at fp .1 and fn .2."""
    one = bed(false_positive=0.1, false_negative=0.2)
    graded = one.sample(np.array([0]), np.array([40_000]), np.random.default_rng(0))
    assert graded[~one.correct].mean() == pytest.approx(0.1, abs=0.01)
    assert 1.0 - graded[one.correct].mean() == pytest.approx(0.2, abs=0.02)  # both 5 sigma


def test_grounds_have_the_tails_that_were_asked_for():
    """Dead prompts: half never solved, half in 1e-6..1e-4; opposed ones are reachable and start below .1."""
    where = cells(0, dead=0.4, opposed=0.5, prompts=3000, held_out=1000)
    p = expit(where.difficulty)
    assert (p < 1e-20).mean() == pytest.approx(0.2, abs=0.03)
    assert ((p > 0.9e-6) & (p < 1.1e-4)).mean() == pytest.approx(0.2, abs=0.03)
    assert where.opposed.any()
    assert (p[where.opposed] < 0.1).all()
    assert (p[where.opposed] > 1e-4).all()


def test_grounds_share_as_declared():
    """Cells of strong transfer are alike; the ladder's hard prompts have a negative common loading; traces are kept."""
    for transfer, low, high in ((0.05, 0.0, 0.15), (0.8, 0.75, 0.95)):
        unit = (where := cells(1, transfer=transfer, prompts=200)).loadings
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        assert low < (unit @ unit.T).mean() < high
        assert where.prompts == 200
    rungs = ladder(0)
    assert (rungs.loadings[rungs.difficulty < -4, 0] < 0).all()
    assert (rungs.loadings[rungs.difficulty > -1, 0] > 0).all()
    assert expit(rungs.difficulty).mean() == pytest.approx(0.23, abs=0.03)  # 540 problems of the real ladder: .228
    assert skilled(0, prompts=90).difficulty.size == 120


class LeavesOutEasy:
    """Eight rollouts each for the prompts at p = .05...55, what is left over for the first of them: a caricature."""

    def __init__(self, population, mean, batch):
        self.population, self.budget, self.step = population, mean * batch, 0

    def plan(self, ids, *, budget=None):
        rate = self.population.pass_rate[np.asarray(ids)]
        chosen = np.flatnonzero((rate > 0.05) & (rate < 0.55))
        counts = np.full(chosen.size, self.budget // chosen.size)
        counts[: self.budget - counts.sum()] += 1
        ids = tuple(np.asarray(ids)[chosen].tolist())
        return Plan(ids, np.full(chosen.size, -1), np.ones(chosen.size), counts, 0.0, self.step)

    def observe(self, plan, rewards):
        self.step += 1
        return {}


def test_a_pretrained_model_is_indifferent_to_group_size_and_needs_its_easy_prompts():
    """The order measured on SmolLM2-135M: sizes 2, 4 and 12 within a point, and easy prompts left out cost mean@8.

    Without the falling agreement they cost nothing; where kinds of prompts learn by themselves the same plan gains. So
    no single population can choose a rule.
    """
    pretrained, little = TUNING["like a pretrained model"], TUNING["little transfer, κ .05"]

    def agreeing(seed):
        one = pretrained.build(seed)
        one.agreement = 0.0
        return one

    gains = {}
    for name, setting, build in (
        ("pretrained", pretrained, pretrained.build),
        ("agreeing", pretrained, agreeing),
        ("little", little, little.build),
    ):
        ends = {kind: [] for kind in (4, 2, 12, "hard")}
        for seed in range(1000, 1006):
            for kind, end in ends.items():
                one = build(seed)
                plan = LeavesOutEasy(one, 4, setting.batch) if kind == "hard" else GroupsOf(kind, 4, setting.batch)
                total = setting.steps * setting.batch * 4
                end.append(race(one, plan, total, setting.batch, seed)[-1]["mean_at_8"])
        gains[name] = {kind: 100 * (np.mean(end) - np.mean(ends[4])) for kind, end in ends.items()}
    assert abs(gains["pretrained"][2]) < 1.0
    assert abs(gains["pretrained"][12]) < 1.0
    assert gains["pretrained"]["hard"] < -1.5
    assert gains["agreeing"]["hard"] > -0.5
    assert gains["little"]["hard"] > 3.0
    assert gains["little"][2] < -1.5
    assert gains["little"][12] > 0.5
