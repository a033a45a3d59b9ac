"""Each peer is its quoted rule on an example done by hand, meets its budget and repeats itself; the race is fair."""

from __future__ import annotations

from itertools import product
from math import exp, gamma, log, sqrt

import numpy as np
import pytest

from gdro_core import GDROController, Plan
from simulations import peers
from simulations.experiments import frontier as experiment
from simulations.peers import PEERS
from simulations.population import SkillPopulation, train
from simulations.race import Groups, own_stream, race
from simulations.testbeds import AdamLike, Learner, cells

MEAN, BATCH = 8, 20
ADAPTIVE = ("Reinforce-Ada", "GRESO", "DAPO refill", "VIGOR")


def small(seed=0, **options):
    return SkillPopulation(seed, prompts=60, held_out=20, learning_rate=0.05, **options)


def groups(*rewards, rows=None):
    """Groups of hand-written rewards."""
    flat = np.concatenate([np.asarray(r, dtype=float) for r in rewards])
    counts = np.array([len(r) for r in rewards])
    rows = np.arange(len(rewards)) if rows is None else np.asarray(rows)
    return Groups(rows, counts, np.ones(len(rewards)), flat, flat == 1)


def asked(ids, counts):
    """A plan with these rollouts and weights 1."""
    ids = list(ids)
    return Plan(tuple(ids), np.full(len(ids), -1), np.ones(len(ids)), np.asarray(counts), 0.0, 0)


def trained(name, *successes):
    """A peer that saw so many of 8 rollouts right on prompts 0, 1, ..."""
    peer = PEERS[name](small(), MEAN, np.random.default_rng(0))
    counts = np.full(len(successes), 8)
    rewards = np.concatenate([np.arange(8) < s for s in successes]).astype(float)
    peer.observe(asked(range(len(successes)), counts), rewards)
    return peer


@pytest.mark.parametrize("name", PEERS)
def test_a_race_repeats_itself_and_spends_the_budget(name):
    """The same seed, the same run; at least the total is spent, and less than one step more."""
    total = 6 * BATCH * MEAN
    runs = []
    for _ in range(2):
        population = small()
        runs.append(race(population, PEERS[name](population, MEAN, own_stream(3)), total, BATCH, seed=3))
    assert runs[0] == runs[1]
    spent = [row["rollouts"] for row in runs[0]]
    assert spent[-1] >= total > spent[-2]
    assert (np.diff(spent) > 0).all()
    if name not in ADAPTIVE:
        assert np.diff(spent).tolist() == [MEAN * BATCH] * 6


@pytest.mark.parametrize("name", [name for name in PEERS if name not in ADAPTIVE])
def test_plans_meet_the_exact_budget_inside_the_bounds(name):
    """After some steps: distinct prompts, counts in 2..24 of sum n_bar N, positive weights."""
    population = small()
    peer = PEERS[name](population, MEAN, np.random.default_rng(0))
    race(population, peer, 8 * BATCH * MEAN, BATCH, seed=1)
    ids = list(range(7, 7 + BATCH))
    plan = peer.plan(ids)
    assert len(set(plan.ids)) == BATCH
    assert plan.counts.sum() == MEAN * BATCH
    assert plan.counts.min() >= peers.LOW
    assert plan.counts.max() <= peers.HIGH
    assert (plan.weights > 0).all()


def test_uniform_has_the_same_run_here_and_in_train():
    """The race adds rounds, discards and refills; without them it is `population.train`."""
    one, other = small(), small()
    raced = race(one, PEERS["uniform"](one, MEAN, own_stream(2)), 5 * BATCH * MEAN, BATCH, seed=2)
    trained = train(other, GDROController.uniform(MEAN), 5, BATCH, MEAN, seed=2)
    assert [row["pass_at_8"] for row in raced[1:]] == [row["pass_at_8"] for row in trained]


def test_neyman_follows_the_square_root_of_the_variance():
    """Posterior means 1/2 and 1/18: √(p q) = .5 and .229, so 16 rollouts go 11 : 5; the oracle reads true rates."""
    assert trained("Neyman plug-in", 4, 0).plan([0, 1]).counts.tolist() == [11, 5]
    population = small()
    p = population.pass_rate[:20]
    counts = PEERS["Neyman oracle"](population, MEAN, np.random.default_rng(0)).plan(list(range(20))).counts
    law = np.sqrt(p * (1 - p))
    np.testing.assert_allclose(counts, np.clip(160 * law / law.sum(), 2, 24), atol=3)


def test_vip_is_one_plus_a_share_of_the_rest():
    """1 + (16 - 2) .5 / .729 = 10.6 and 1 + 14 x .229 / .729 = 5.4."""
    assert trained("VIP", 4, 0).plan([0, 1]).counts.tolist() == [11, 5]


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [
        ("Knapsack RL", 1.0, 1.0, 0.5 * 0.125),
        ("HORA", 1.0, 1.0, 1 - 1 / 2 * 2 / 3),
        ("CoBA-RL", 1.0, 1.0, (1 - exp(-0.5)) * gamma(7) / gamma(3.5) ** 2 * 0.5**5),
    ],
)
def test_utility_of_two_rollouts(name, a, b, expected):
    """At p = 1/2: (1 - 1/4 - 1/4) / 8; 1 - (1/2)(2/3); (1 - e^{-2/4}) BetaPDF(1/2; 3.5, 3.5) at failure rate 1/2."""
    peer = PEERS[name](small(), MEAN, np.random.default_rng(0))
    assert peer.utility(np.array([a]), np.array([b]))[0, 0] == pytest.approx(expected)


def test_coba_turns_to_easy_prompts_when_it_fails():
    """Failure rate of the last batch: 1 - 2/16."""
    assert trained("CoBA-RL", 2, 0).failure == pytest.approx(14 / 16)
    peer = trained("CoBA-RL", 0, 0)
    easy, hard = peer.utility(np.array([8.0, 2.0]), np.array([2.0, 8.0]))[:, 5]
    assert easy > hard


def test_reinforce_ada_stops_at_half_and_half_and_keeps_the_rare_kind():
    """k = 8: four of each kind end the rounds; of 7 right and 9 wrong half each are kept, of 15 and 1 seven and one."""
    peer = PEERS["Reinforce-Ada"](small(), MEAN, np.random.default_rng(0))
    drawn = groups([1] * 4 + [0] * 4, [1] * 8, [0] * 6 + [1] * 2)
    assert peer.more(drawn, 1).tolist() == [0, 8, 8]
    assert peer.more(drawn, 4) is None
    kept = peer.keep(groups([1] * 7 + [0] * 9, [1] * 15 + [0], [0] * 32))
    assert kept.counts.tolist() == [8, 8, 8]
    assert kept.successes.tolist() == [4, 7, 0]


def test_dapo_keeps_mixed_groups():
    """Neither all right nor all wrong."""
    peer = PEERS["DAPO refill"](small(), MEAN, np.random.default_rng(0))
    kept = peer.keep(groups([1] * 8, [1, 0], [0] * 8, rows=[5, 6, 7]))
    assert (kept.rows.tolist(), kept.rewards.tolist()) == ([6], [1.0, 0.0])


def test_greso_skips_by_the_streak():
    """Streaks 0, 1, 3 and 20 stay with probability 1, 1/2, 1/8 and .01; a mixed group ends a streak."""
    peer = trained("GRESO", 0, 8, 4)
    assert peer.streak[:3].tolist() == [1, 1, 0]
    peer.streak[:4] = [0, 1, 3, 20]
    seen = np.bincount(np.concatenate([peer.plan([0, 1, 2, 3]).ids for _ in range(4000)]), minlength=4) / 4000
    np.testing.assert_allclose(seen, [1, 0.5, 0.125, 0.01], atol=0.03)  # 3.8 sigma: 1.5e-4 if the seed were new


def test_mopps_takes_prompts_near_one_half():
    """Posteriors made almost certain: the 20 prompts seen to be half right are taken, wherever they are in the pool."""
    peer = PEERS["MoPPS"](small(), MEAN, np.random.default_rng(0))
    successes = np.where(np.arange(60) % 3 == 0, 5000, 0)
    peer.memory.observe(list(range(60)), successes, np.full(60, 10000))
    plan = peer.plan(list(range(BATCH)))
    assert sorted(plan.ids) == list(range(0, 60, 3))


def test_frontier_learning_scores_by_the_regret_of_a_group():
    """pass@8 - pass@1 under Beta(1, 1): 8/9 - 1/2; solved and hopeless prompts hardly count, and are hardly drawn."""
    peer = PEERS["Frontier Learning"](small(), MEAN, np.random.default_rng(0))
    assert peer.score(np.array([1.0]), np.array([1.0]))[0] == pytest.approx(8 / 9 - 1 / 2)
    rare, solved = peer.score(np.array([1.0, 1e4]), np.array([7.0, 1.0]))
    assert rare > 0.4 > 0.01 > solved > 0
    successes = np.where(np.arange(60) < 30, 2000, 10000)
    peer.memory.observe(list(range(60)), successes, np.full(60, 10000))
    assert np.mean([np.mean(np.asarray(peer.plan(list(range(BATCH))).ids) < 30) for _ in range(20)]) > 0.95


def test_insight_prefers_uncertain_middle_prompts():
    """Beta(1, 1): information ln 2 - 1/2 by hand; less evidence is worth more, an extreme mean less."""
    peer = PEERS["InSight"](small(), MEAN, np.random.default_rng(0))
    score = peer.score(np.array([1.0, 10.0, 1.0]), np.array([1.0, 10.0, 9.0]))
    assert score[0] == pytest.approx(8 * 0.25 * (log(2) - 0.5))
    assert score[0] > score[1] > 0
    assert score[0] > score[2] > 0


def test_fgrpo_and_bbg_weight_groups_by_what_is_missing():
    """Hits 1, 4 and 8 of 8: 1 - p̂; and the chance that five of the seven others all miss, 21, 0 and 0 of 21."""
    drawn = groups([1] + [0] * 7, [1] * 4 + [0] * 4, [1] * 8, [1, 1] + [0] * 6)
    for name, expected in (("F-GRPO", [7 / 8, 1 / 2, 0, 3 / 4]), ("BBG", [1, 0, 0, 6 / 21])):
        kept = PEERS[name](small(), MEAN, np.random.default_rng(0)).keep(drawn)
        np.testing.assert_allclose(kept.weights, expected, atol=1e-12)
        assert kept.counts.tolist() == [8] * 4


def test_vigor_gives_the_uncertain_half_as_much_again():
    """Four each, then eight more for two of four prompts: 32 = 8 x 4."""
    peer = PEERS["VIGOR"](small(), MEAN, np.random.default_rng(0))
    assert peer.plan([0, 1, 2, 3]).counts.tolist() == [4] * 4
    first = groups([1] * 4, [1, 1, 0, 0], [0] * 4, [1, 0, 0, 0])
    assert peer.more(first, 1).tolist() == [0, 8, 0, 8]
    assert peer.more(first, 2) is None


def test_sagawa_raises_groups_by_loss_and_size():
    """q_g exp(.05 (1 - mean reward + 1 / √n_g)) over the groups in the batch."""
    population = small()
    peer = PEERS["Sagawa"](population, MEAN, np.random.default_rng(0))
    groups_present = np.unique(population.group)
    hard, easy = (int(np.flatnonzero(population.group == g)[0]) for g in groups_present[[0, -1]])
    before = peer.q.copy()
    peer.observe(asked([hard, easy], [2, 2]), np.array([0.0, 0.0, 1.0, 0.0]))
    size = np.bincount(population.group)
    factor = np.ones(size.size)
    factor[groups_present[0]] = exp(0.05 * (1 + 1 / sqrt(size[groups_present[0]])))
    factor[groups_present[-1]] = exp(0.05 * (0.5 + 1 / sqrt(size[groups_present[-1]])))
    np.testing.assert_allclose(peer.q, before * factor / (before * factor).sum())
    assert peer.weights([hard, easy]).mean() == pytest.approx(1)


def test_mt_grpo_forgives_a_group_that_improves():
    """First loss 1 counts in full; then loss 1/2 after 1 is an improvement of 1/2, and nothing is added."""
    population = small()
    peer = PEERS["MT-GRPO"](population, MEAN, np.random.default_rng(0))
    one = asked([0], [2])
    g = population.group[0]
    odds = [peer.q[g] / (1 - peer.q[g])]
    for rewards in ([0.0, 0.0], [1.0, 0.0]):
        peer.observe(one, np.array(rewards))
        odds.append(peer.q[g] / (1 - peer.q[g]))
    assert odds[1] / odds[0] == pytest.approx(exp(0.05))
    assert odds[2] / odds[1] == pytest.approx(1)


def test_sec_and_dump_score_categories_by_their_advantages():
    """Half right: mean |A| = 1. SEC goes half way; DUMP adds √(2 ln 2 / 2) after a visit, √(2 ln 2) before."""
    sec, dump = (PEERS[name](small(), MEAN, np.random.default_rng(0)) for name in ("SEC", "DUMP"))
    plan = asked([0], [2])
    for peer in (sec, dump):
        peer.observe(plan, np.array([1.0, 0.0]))
    c = int(sec.category[0])
    assert sec.value[c] == pytest.approx(0.5)
    assert sec.preference()[c] == pytest.approx(0.5 / 0.4)
    logits = dump.preference()
    assert logits[c] == pytest.approx((1 + sqrt(log(2))) / 0.1)
    assert logits[c - 1] == pytest.approx(sqrt(2 * log(2)) / 0.1)


def test_further_rollouts_are_sorted_to_their_prompts():
    """Groups stay prompt after prompt when a round is added."""
    both = groups([1, 1], [0]).with_more(groups([0], [1, 1]))
    assert both.counts.tolist() == [3, 3]
    assert both.rewards.tolist() == [1, 1, 0, 0, 1, 1]


def test_the_verdict_needs_pass_at_8_above_and_mean_at_8_not_below_uniform_everywhere():
    """By hand: constant differences; told kappa, the best size of the tuning part and the best peer stand beside."""

    def rows(solved, mean):
        table = []
        for part, seed in product(("tuning", "report"), range(3)):
            for population in experiment.REPORT:
                for rule in experiment.RULES if part == "report" else ("uniform", *experiment.GROUPS):
                    gain = {"uniform": (0, 0), "recommended": (solved, mean), "MoPPS": (3, 1), "groups of 8": (2, 2)}
                    a, b = gain.get(rule, (-1, -1))
                    base = 0.4 + 0.1 * seed
                    labels = {"seed": seed, "part": part, "population": population, "rule": rule}
                    table.append(labels | {"pass_at_8": base + a / 100, "mean_at_8": base + b / 100})
        return table

    good = experiment.judge(rows(1.0, -0.1))
    assert good.holds
    entry = "κ .5: +1.00 [+1.00, +1.00] pass@8, -0.10 [-0.10, -0.10] mean@8 (told κ -1.00, -1.00; "
    entry += "η = 1 -1.00, -1.00; best groups +2.00; "
    assert entry + "best peer MoPPS +3.00, +1.00)" in good.text
    for bad in (rows(0.0, 0.0), rows(1.0, -0.3)):
        verdict = experiment.judge(bad)
        assert not verdict.holds
        assert verdict.text.count("FAILS") == len(experiment.REPORT)
    assert "| +2.00 [+2.00, +2.00], groups of 8 |" in experiment.tabulate(rows(1.0, 0.0))


def test_ar3po_goes_on_until_the_first_right_answer():
    """Rounds of n_bar / 2 for prompts never solved, four at most."""
    peer, seen = peers.AR3PO(small(), MEAN, own_stream(0)), groups([0, 0, 0, 0], [1, 0, 0, 0])
    assert peer.counts(np.arange(2)).tolist() == [4, 4]
    assert peer.more(seen, 1).tolist() == [4, 0]
    assert peer.more(seen, 4) is None
    assert peer.more(groups([1, 1, 1, 1]), 1) is None


def test_pilot_commit_spends_the_rest_on_mixed_prompts():
    """Of three pilots of 4 one is mixed: it gets the rest of 24, and is trained on alone."""
    peer, seen = peers.PilotCommit(small(), MEAN, own_stream(0)), groups([0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1])
    assert peer.counts(np.arange(2)).tolist() == [4, 4]
    assert peer.more(seen, 1).tolist() == [0, 12, 0]
    assert peer.more(seen, 2) is None
    assert peer.keep(seen).rows.tolist() == [1]


def test_a_controller_with_a_pilot_spends_the_budget_in_a_race():
    """Steps of two stages while prompts are new, of one stage afterwards."""
    learner = Learner(cells(0, prompts=64, held_out=40), steps=AdamLike(), learning_rate=0.2)
    controller = GDROController.recommended(8, 0, 24, pilot=4)
    run = race(learner, controller, 6 * 16 * 8, 16, seed=1)
    assert [row["rollouts"] for row in run] == [16 * 8 * t for t in range(7)]
    assert len(controller.classifier) == 64
