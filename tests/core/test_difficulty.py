"""The classifier: arrays agree with a slow per-prompt reference; statistics are what their formulas say."""

from __future__ import annotations

import io
import json
from base64 import b64decode, b64encode
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import xlog1py, xlogy
from scipy.stats import beta, binom

from gdro_core import AnyOfN, OnlineDifficultyClassifier, PassAtK, PassRate, Statistic

EDGES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
MIXED_IDS = ["a", 1, ("aime", 3), None, 2.5, b"x", frozenset({1})]


class SlowPrompt:
    """One prompt in plain Python: posterior, window of visits, and a Schmitt trigger on each edge."""

    def __init__(self, classifier):
        self.of, self.bin = classifier, -1
        self.a = self.b = 0.0
        self.hits = deque(maxlen=getattr(classifier.statistic, "window", None))

    def observe(self, correct, trials):
        self.a = self.of.discount * self.a + correct
        self.b = self.of.discount * self.b + trials - correct
        self.hits.append(correct > 0)
        estimate, delta, edges = self.estimate(), self.of.hysteresis, list(self.of.edges)
        if self.bin < 0:
            self.bin = sum(edge <= estimate for edge in edges)
            return
        while self.bin < len(edges) and estimate - delta >= edges[self.bin]:
            self.bin += 1
        while self.bin > 0 and estimate + delta < edges[self.bin - 1]:
            self.bin -= 1

    def estimate(self):
        a, b = self.of.prior[0] + self.a, self.of.prior[1] + self.b
        if isinstance(self.of.statistic, AnyOfN):
            return sum(self.hits) / len(self.hits)
        if self.of.statistic == PassRate():
            return a / (a + b)
        none_right = 1.0
        for j in range(self.of.statistic.k):
            none_right *= (b + j) / (a + b + j)
        return 1.0 - none_right


@pytest.mark.parametrize("hysteresis", [0.0, 0.03])
@pytest.mark.parametrize("statistic", [PassRate, lambda: PassAtK(3), AnyOfN], ids=["PassRate", "PassAtK", "AnyOfN"])
@given(seed=st.integers(0, 2**32 - 1), discount=st.sampled_from([0.5, 0.9, 1.0]), window=st.integers(1, 5))
def test_agrees_with_a_slow_reference(statistic, hysteresis, seed, discount, window):
    """Bins and posteriors after every batch: mixed ids, partial credit, n = 0, any order, both directions of moves."""
    rng = np.random.default_rng(seed)
    classifier = OnlineDifficultyClassifier(
        EDGES,
        AnyOfN(window) if statistic is AnyOfN else statistic(),
        discount=discount,
        prior=(0.7, 1.3),
        hysteresis=hysteresis,
    )
    slow = {name: SlowPrompt(classifier) for name in MIXED_IDS}
    for _ in range(12):
        ids = [MIXED_IDS[i] for i in rng.permutation(len(MIXED_IDS))[: rng.integers(1, 6)]]
        trials = rng.integers(0, 9, len(ids))
        correct = trials * rng.choice([0.0, 0.25, 0.5, 1.0], len(ids))
        classifier.observe(ids, correct, trials)
        for name, c, n in zip(ids, correct, trials, strict=True):
            if n > 0:
                slow[name].observe(float(c), int(n))
        assert classifier.bins(MIXED_IDS).tolist() == [prompt.bin for prompt in slow.values()]
        a, b = classifier.posterior(MIXED_IDS)
        np.testing.assert_allclose(a, [0.7 + prompt.a for prompt in slow.values()], rtol=1e-12)
        np.testing.assert_allclose(b, [1.3 + prompt.b for prompt in slow.values()], rtol=1e-12)
        np.testing.assert_array_equal(classifier.pass_rate(MIXED_IDS), a / (a + b))


@pytest.mark.parametrize(
    ("hits", "bins"),
    [
        ([1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]),  # down: 1/2 is within δ of the edge, 1/3 is beyond
        ([0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]),  # up: 1/2 is on the edge, 2/3 is beyond
    ],
)
def test_hysteresis_holds_a_prompt_in_both_directions(hits, bins):
    """F5: a prompt moves to harder and to easier bins, each once its estimate passes the edge by δ = .1."""
    classifier = OnlineDifficultyClassifier([0.5], AnyOfN(), hysteresis=0.1)
    passed = []
    for hit in hits:
        classifier.observe(["x"], [hit], [4])
        passed += classifier.bins(["x"]).tolist()
    assert passed == bins


@given(st.floats(0.3, 20), st.floats(0.3, 20), st.integers(1, 16))
def test_pass_at_k_is_the_posterior_mean(a, b, k):
    """1 - prod (b + j)/(a + b + j) = E[1 - (1 - p)^k], p ~ Beta(a, b), by numerical integration; it decides the bin."""
    none_right = quad(lambda x: beta.cdf(x, a, b) * k * (1.0 - x) ** (k - 1), 0, 1, epsabs=1e-11, limit=200)[0]
    expected = 1.0 - none_right  # integration by parts: E f(p) = f(1) - int F f' with the distribution function F
    for offset, wanted in ((-1e-6, 1), (1e-6, 0)):
        edge = expected + offset
        if 0.0 < edge < 1.0:
            classifier = OnlineDifficultyClassifier([edge], PassAtK(k), prior=(a / 2, b / 2))
            classifier.observe(["x"], [a / 2], [a / 2 + b / 2])
            assert classifier.bins(["x"]).tolist() == [wanted]


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_expected_pass_rate_depends_on_n_by_shrinkage_only(p):
    """F10: at d = 1, E[estimate] - p = (a0 + b0)/(a0 + b0 + n) (prior mean - p), nothing as the prior vanishes.

    Any-of-n instead has expectation 1 - (1 - p)^n, which moves with n.
    """
    for n in (1, 2, 4, 12, 64):
        hits = np.arange(n + 1)
        chance = binom.pmf(hits, n, p)
        for a0, b0 in ((0.5, 0.5), (1.0, 3.0), (1e-9, 1e-9)):
            classifier = OnlineDifficultyClassifier(discount=1.0, prior=(a0, b0))
            classifier.observe(range(n + 1), hits, np.full(n + 1, n))
            bias = chance @ classifier.pass_rate(range(n + 1)) - p
            assert bias == pytest.approx((a0 + b0) / (a0 + b0 + n) * (a0 / (a0 + b0) - p), abs=1e-12)
        published = OnlineDifficultyClassifier([0.5], AnyOfN())
        published.observe(range(n + 1), hits, np.full(n + 1, n))
        assert chance @ published.bins(range(n + 1)) == pytest.approx(1 - (1 - p) ** n)


@pytest.mark.parametrize("window", [1, 63, 64, 65, 100, 130])
def test_the_window_holds_the_last_visits(window):
    """Any-of-n (Eq. 10): the share of hits among the last H visits, also when H takes several words of bits."""
    rng = np.random.default_rng(window)
    edges = np.arange(1, 2 * window, 2) / (2 * window)  # a bin for each number of hits once H visits are there
    classifier = OnlineDifficultyClassifier(edges, AnyOfN(window))
    visits = {name: deque(maxlen=window) for name in range(5)}
    for _ in range(3 * window + 5):
        ids = rng.permutation(5)[:3]
        hit = rng.random(3) < 0.6
        classifier.observe(ids, hit, [4, 4, 4])
        for name, solved in zip(ids, hit, strict=True):
            visits[int(name)].append(solved)
        for name, hits in visits.items():
            if hits:
                assert classifier.bins([name])[0] == np.digitize(sum(hits) / len(hits), edges)


def test_unseen_prompts_are_their_own_state():
    """Bin −1 and the prior, before and after others were seen; n = 0 does not make a prompt seen."""
    classifier = OnlineDifficultyClassifier(prior=(2.0, 6.0))
    for _ in range(2):
        assert classifier.bins(["new", "newer"]).tolist() == [-1, -1]
        assert classifier.pass_rate(["new"]).tolist() == [0.25]
        assert [part.tolist() for part in classifier.posterior(["new"])] == [[2.0], [6.0]]
        classifier.observe(["old", "new"], [1, 0], [1, 0])
    assert len(classifier) == 1
    assert classifier.bins([]).shape == (0,)


def test_grows_to_thousands_of_prompts_and_ignores_their_order():
    """Batches of new ids of uneven size keep every prompt's own posterior; a permuted batch gives the same bins."""
    rng = np.random.default_rng(0)
    one, other = OnlineDifficultyClassifier(), OnlineDifficultyClassifier()
    correct = rng.integers(0, 9, 5000)
    for rows in np.split(np.arange(5000), np.sort(rng.integers(1, 5000, 30))):
        if rows.size:
            shuffled = rng.permutation(rows)
            one.observe(rows.tolist(), correct[rows], np.full(rows.size, 8))
            other.observe(shuffled.tolist(), correct[shuffled], np.full(rows.size, 8))
    np.testing.assert_array_equal(one.posterior(range(5000))[0], 0.5 + correct)
    np.testing.assert_array_equal(one.bins(range(5000)), other.bins(range(5000)))
    assert len(one) == 5000


# Ids


class Tensor:
    """Anything that becomes an array, such as a torch tensor."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


def as_given(draw, number):
    """One whole number as its many equal ids."""
    kinds = [int, float, np.int64, np.int16, np.float64, Fraction] + ([bool] if number in (0, 1) else [])
    return draw(st.sampled_from(kinds))(number)


@given(st.data())
def test_equal_ids_are_one_prompt(data):
    """As in a dict, 3, np.int64(3), 3.0 and an entry 3 of any array are one prompt, True is 1, and "3" is another;
    whatever came first, and in any mixture of batches that are arrays, lists of integers or lists of anything."""
    draw, classifier, counts = data.draw, OnlineDifficultyClassifier(discount=1.0), {}
    numbers = st.lists(st.integers(-3, 6), unique=True, max_size=6)
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from([np.int64, np.int8, np.uint64, float, Tensor, list, "given", "mixed", bool]))
        batch = draw(numbers)
        if kind == "given":
            ids = keys = [as_given(draw, number) for number in batch]
        elif kind == "mixed":
            ids = keys = [*batch, *draw(st.sampled_from([[], ["3", None], [("a", 3)], [2**63, 2**70], [2.5]]))]
        else:
            batch = [number % 2 for number in batch[:1]] if kind is bool else batch
            keys = [abs(number) for number in batch] if kind is np.uint64 else batch
            keys = list(dict.fromkeys(keys))
            ids = kind(keys) if kind in (Tensor, list) else np.array(keys, dtype=kind)
        assert classifier.bins(ids).tolist() == [-1 if key not in counts else 9 for key in keys]
        if keys and draw(st.booleans()):
            seen = draw(st.lists(st.integers(0, 2), min_size=len(keys), max_size=len(keys)))
            classifier.observe(ids, [30 * n for n in seen], [30 * n for n in seen])
            for key, n in zip(keys, seen, strict=True):
                if n:
                    counts[key] = counts.get(key, 0) + 30 * n
        assert len(classifier) == len(counts)
        assert (classifier.posterior(ids)[0] - 0.5).tolist() == [counts.get(key, 0) for key in keys]
    everyone = [*range(-3, 7), "3", None, ("a", 3), 2**63, 2**70, 2.5]
    assert (classifier.posterior(everyone)[0] - 0.5).tolist() == [counts.get(key, 0) for key in everyone]


def test_integer_arrays_agree_with_a_dict():
    """Hundreds of uneven batches of old and new keys from all of int64, and keys nobody observed."""
    rng = np.random.default_rng(0)
    pool = np.unique(np.concatenate([rng.integers(-(2**63), 2**63 - 1, 3000), rng.integers(-50, 50, 60)]))
    pool = np.concatenate([[-(2**63), 2**63 - 1], pool[1:-1]])
    classifier, counts = OnlineDifficultyClassifier(discount=1.0), dict.fromkeys(pool.tolist(), 0)
    for size in rng.geometric(0.02, 200):
        ids = rng.permutation(pool[: 10 * (len(classifier) + 5)])[:size]
        before = classifier.posterior(ids)[0]
        np.testing.assert_array_equal(before, [0.5 + counts[key] for key in ids.tolist()])
        classifier.observe(ids, np.ones(ids.size), np.ones(ids.size))
        for key in ids.tolist():
            counts[key] += 1
    everyone = rng.permutation(pool)
    np.testing.assert_array_equal(classifier.posterior(everyone)[0], [0.5 + counts[key] for key in everyone.tolist()])
    np.testing.assert_array_equal(classifier.bins(everyone) >= 0, [counts[key] > 0 for key in everyone.tolist()])
    assert 0 < len(classifier) < pool.size


def test_a_batch_may_be_changed_by_its_owner_between_calls():
    """A lookup is by what the batch holds now: lists and arrays changed in place, and prompts observed since."""
    for ids, other in ((["x", "y"], "z"), (np.array([1, 2]), 3)):
        classifier = OnlineDifficultyClassifier(discount=1.0)
        assert classifier.bins(ids).tolist() == [-1, -1]
        classifier.observe(ids, [1, 0], [1, 0])
        assert classifier.posterior(ids)[0].tolist() == [1.5, 0.5]
        assert classifier.bins(ids)[1] == -1
        ids[0] = other
        assert classifier.posterior(ids)[0].tolist() == [0.5, 0.5]
        classifier.observe(ids, [0, 0], [0, 9])
        assert classifier.posterior(ids)[1].tolist() == [0.5, 9.5]
        assert len(classifier) == 2
    classifier = OnlineDifficultyClassifier()
    mixed = [1, "x"]
    assert classifier.bins(mixed).tolist() == [-1, -1]
    classifier.observe(np.array([1]), [4], [4])
    assert classifier.bins(mixed).tolist() == [9, -1]


def test_integers_beyond_int64_are_ids_of_their_own():
    """They do not wrap around, as array entries or as Python integers."""
    large = np.array([2**63, 2**64 - 1], dtype=np.uint64)
    classifier = OnlineDifficultyClassifier()
    classifier.observe(np.array([-(2**63), -1]), [1, 0], [1, 1])
    assert classifier.bins(large).tolist() == [-1, -1]
    classifier.observe(large, [0, 1], [1, 1])
    assert classifier.bins([-(2**63), -1, 2**63, 2**64 - 1, 2**64 + 5]).tolist() == [7, 2, 2, 7, -1]


def test_questions_and_refused_batches_leave_the_state_as_it_was():
    """Also where the ids asked for are of another type than the ones observed."""
    for names in ([1, 2], ["x", "y"], [("a", 1), 2]):
        classifier = OnlineDifficultyClassifier()
        classifier.observe(names, [1, 0], [1, 1])
        before = classifier.state_dict()
        for ids in ([3], ["z"], [None, 1.0], np.array([7])):
            classifier.bins(ids)
            classifier.posterior(ids)
            with pytest.raises(ValueError, match="correct must be at most trials"):
                classifier.observe(ids, [2] * len(ids), [1] * len(ids))
            assert classifier.state_dict() == before


@pytest.mark.parametrize("statistic", [PassRate(), PassAtK(8), AnyOfN()], ids=str)
def test_memory_is_at_most_40_bytes_a_prompt(statistic):
    """Streams of new prompts, spare rows included; the published window of 100 too."""
    classifier = OnlineDifficultyClassifier(statistic=statistic)
    for start in range(0, 30_000, 300):
        classifier.observe(np.arange(start, start + 300), np.ones(300), np.ones(300))
        assert start == 0 or classifier.nbytes <= 40 * len(classifier)
    assert classifier.nbytes >= 18 * len(classifier)


@pytest.mark.slow
def test_a_million_prompts():
    """Batches of 65,536 in random order over two epochs: every posterior is right, and the state round-trips."""
    rng = np.random.default_rng(0)
    ids, correct = rng.permutation(1_000_000) * 7919 - 10**9, rng.integers(0, 5, 1_000_000)
    classifier = OnlineDifficultyClassifier(discount=1.0)
    for _ in range(2):
        order = rng.permutation(ids.size)
        for rows in np.split(order, range(65_536, ids.size, 65_536)):
            classifier.observe(ids[rows], correct[rows], np.full(rows.size, 4))
    np.testing.assert_array_equal(classifier.posterior(ids)[0], 0.5 + 2 * correct)
    np.testing.assert_array_equal(classifier.bins(ids), np.digitize((0.5 + 2 * correct) / 9, EDGES))
    assert (classifier.bins(ids + 1) == -1).all()
    restored = OnlineDifficultyClassifier(discount=1.0)
    restored.load_state_dict(classifier.state_dict())
    np.testing.assert_array_equal(restored.bins(ids), classifier.bins(ids))


# Theorem 11


def log_mixture_ratio(p, correct, wrong, prior):
    """log M_n at each p, by numerical integration over the mixture instead of the closed form."""
    top = correct / (correct + wrong)

    def log_likelihood(t):
        return xlogy(correct, t) + xlog1py(wrong, -t)

    scaled = quad(lambda t: np.exp(log_likelihood(t) - log_likelihood(top)) * beta.pdf(t, *prior), 0, 1, points=[top])
    return np.log(scaled[0]) + log_likelihood(top) - log_likelihood(p)


@given(
    first=st.sampled_from([(0, 1), (1, 1), (1, 2), (1, 3), (2, 3)]),
    correct=st.integers(0, 40),
    wrong=st.integers(0, 40),
    credit=st.sampled_from([0.0, 0.25]),
    prior=st.sampled_from([(1.0, 1.0), (2.0, 1.5), (4.0, 9.0)]),
)
def test_a_bin_is_left_when_its_best_value_is_rejected(first, correct, wrong, credit, prior):
    """The threshold is 1/δ exactly: with M the least M_n over the bin (on a grid, by integration), a classifier with
    δ = 1/M leaves the bin and one with δ just below stays; a bin that holds c/n has M <= 1 and is never left."""
    edges = np.array([0.3, 0.4, 0.55, 0.8])
    total, failed = first[0] + correct + credit, first[1] - first[0] + wrong
    start = np.digitize((prior[0] + first[0]) / (sum(prior) + first[1]), edges)
    low, high = np.r_[0.0, edges, 1.0][[start, start + 1]]
    grid = np.clip([*np.linspace(low, high, 41), total / (total + failed)], low, high)
    least = log_mixture_ratio(grid, total, failed, prior).min()
    for shift, leaves in ((1e-6, True), (-1e-6, False)):
        error = np.exp(-least) * (1 + shift)
        error, leaves = (error, leaves) if 0 < error < 1 else (0.999, False)
        classifier = OnlineDifficultyClassifier(edges, discount=1.0, prior=prior, confidence=error)
        classifier.observe(["x"], [first[0]], [first[1]])
        if classifier.bins(["x"])[0] != start or correct + wrong == 0:
            continue
        classifier.observe(["x"], [correct + credit], [correct + credit + wrong])
        estimate = np.digitize((prior[0] + total) / (sum(prior) + total + failed), edges)
        assert classifier.bins(["x"])[0] == (estimate if leaves else start)
        assert not leaves or estimate != start


@pytest.mark.parametrize("error", [0.2, 0.05, 0.01])
@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_theorem_11_the_chance_of_leaving_a_right_bin_is_the_one_asked_for(p, error):
    """Theorem 11: of 20,000 stationary prompts in a vanishing bin at p, watched over 800,000 rollouts, a share of at
    most δ ever leaves; more than δ/2 does, as Ville's inequality is nearly tight, so no smaller threshold would do."""
    rng = np.random.default_rng(0)
    prompts = np.arange(20_000)
    classifier = OnlineDifficultyClassifier([p - 1e-7, p + 1e-7], discount=1.0, prior=(p, 1 - p), confidence=error)
    classifier.observe(
        prompts, np.full(prompts.size, p * 1e-9), np.full(prompts.size, 1e-9)
    )  # into the bin, nearly free
    assert (classifier.bins(prompts) == 1).all()
    left = np.zeros(prompts.size, dtype=bool)
    for visit in range(140):
        n = max(1, int(1.1**visit / 8))
        classifier.observe(prompts, rng.binomial(n, p, prompts.size), np.full(prompts.size, n))
        left |= classifier.bins(prompts) != 1
    # above: 3 sigma, 1e-3 if the seed were new and Ville's inequality tight; below: more than 3 sigma
    assert 0.5 * error < left.mean() < error + 3 * np.sqrt(error / prompts.size)


@pytest.mark.parametrize("credit", [False, True])
@pytest.mark.parametrize("error", [0.2, 0.05])
def test_stationary_prompts_move_towards_their_pass_rate_and_settle_there(error, credit):
    """Theorem 11 for p everywhere, on edges and next to them, counts that depend on the past, rewards 0/1 or partial:
    at most a share δ of prompts ever leaves a bin that holds p, leaves a wrong one away from p, or is further from p
    than sqrt(2 log(2 sqrt(n) / δ) / n); in the end all but those next to an edge are in a bin that holds p."""
    rng = np.random.default_rng(1)
    near = np.ravel([[edge - 0.01, edge, edge + 0.01] for edge in EDGES])
    p = np.concatenate([np.linspace(0.0, 1.0, 3000), np.repeat(near, 100)])
    prompts, bounds = np.arange(p.size), np.r_[0.0, EDGES, 1.0]
    classifier = OnlineDifficultyClassifier(EDGES, discount=1.0, confidence=error)
    failed, moved = np.zeros(p.size, dtype=bool), np.zeros(p.size, dtype=np.int64)
    before, total = np.full(p.size, -1), np.zeros(p.size)
    for visit in range(130):
        rate = classifier.pass_rate(prompts)
        n = (2 + rng.integers(0, 3, p.size) + 8 * (np.abs(rate - 0.5) < 0.3)) * int(1 + 1.08**visit / 4)
        if credit:  # one half for sure and one half by chance: mean p where p lies in [1/4, 3/4], else by chance alone
            inner = np.abs(p - 0.5) <= 0.25
            correct = np.where(inner, n / 4 + rng.binomial(n, np.where(inner, 2 * p - 0.5, 0)) / 2, rng.binomial(n, p))
        else:
            correct = rng.binomial(n, p)
        classifier.observe(prompts, correct, n)
        total += n
        now = classifier.bins(prompts)
        change = (before >= 0) & (now != before)
        held = (bounds[before] <= p) & (p <= bounds[before + 1])
        towards = np.where(now > before, p > bounds[before + 1], p < bounds[before])
        distance = np.maximum(np.maximum(bounds[now] - p, p - bounds[now + 1]), 0)
        failed |= (change & held) | (change & ~towards)
        failed |= distance > np.sqrt(2 * np.log(2 * np.sqrt(total) / error) / total) if not credit else False
        moved, before = moved + change, now
    right = (bounds[now] <= p) & (p <= bounds[now + 1])
    assert failed.mean() < error
    assert moved.mean() > 0.2, "prompts must move for this to tell anything"
    clear = np.abs(p[:, None] - bounds[1:-1]).min(axis=1) > 0.008
    assert right[clear].mean() > 0.999
    assert right.mean() > 0.95


def test_the_estimate_moves_often_where_the_sequence_does_not():
    """What confidence is for: at p = .48, next to an edge, bins by the bare estimate change ten times as often."""
    rng = np.random.default_rng(0)
    both = [OnlineDifficultyClassifier(EDGES, discount=1.0, confidence=error) for error in (None, 0.05)]
    moves, prompts = [0, 0], np.arange(300)
    for _ in range(150):
        correct = rng.binomial(4, 0.48, prompts.size)
        for which, classifier in enumerate(both):
            before = classifier.bins(prompts)
            classifier.observe(prompts, correct, np.full(prompts.size, 4))
            moves[which] += int((classifier.bins(prompts) != before).sum())
    assert moves[0] - prompts.size > 10 * (moves[1] - prompts.size)


# State


def batches(rng, names):
    while True:
        rows = rng.permutation(len(names))[:9]
        yield [names[row] for row in rows], rng.integers(0, 5, 9), np.full(9, 4)


OPTIONS = {
    "pass_rate": {"hysteresis": 0.03},
    "pass@k": {"statistic": PassAtK(3)},
    "any": {"statistic": AnyOfN(70), "hysteresis": 0.03},
    "confidence": {"confidence": 0.1, "discount": 1.0},
}
NAMES = {
    "integers": list(range(-5, 35)),
    "strings": [f"aime/{row} ∑" for row in range(40)],
    "mixed": [
        "a",
        1,
        2.5,
        None,
        ("aime", (3, "x")),
        2**70,
        np.str_("b"),
        np.float64(7.5),
        ("np", np.int64(1)),
        *"cdefg",
    ],
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("options", OPTIONS)
def test_state_round_trips_through_json(options, names):
    """A restored classifier continues bit for bit, also from before the first observation; tuples come back as such."""
    visits = batches(np.random.default_rng(0), NAMES[names])
    original = OnlineDifficultyClassifier(EDGES, **OPTIONS[options])
    for _ in range(10):
        restored = OnlineDifficultyClassifier(EDGES, **OPTIONS[options])
        restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
        visit = next(visits)
        original.observe(*visit)
        restored.observe(*visit)
        assert restored.state_dict() == original.state_dict()
        assert restored.bins(NAMES[names]).tolist() == original.bins(NAMES[names]).tolist()


@pytest.mark.parametrize("names", NAMES)
def test_state_round_trips_through_torch(names):
    """`torch.load(weights_only=True)`, its default, takes the state."""
    torch = pytest.importorskip("torch")
    classifier = OnlineDifficultyClassifier(EDGES, AnyOfN())
    classifier.observe(*next(batches(np.random.default_rng(0), NAMES[names])))
    file = io.BytesIO()
    torch.save(classifier.state_dict(), file)
    file.seek(0)
    restored = OnlineDifficultyClassifier(EDGES, AnyOfN())
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.state_dict() == classifier.state_dict()


@pytest.mark.parametrize("name", [b"x", frozenset({1}), ("a", b"x"), 1j])
def test_ids_that_json_cannot_keep_are_refused_when_saved(name):
    """The message names the id; in memory it is welcome."""
    classifier = OnlineDifficultyClassifier()
    classifier.observe(["a", name], [1, 1], [1, 1])
    assert classifier.bins([name]).tolist() == [7]
    with pytest.raises(ValueError, match="ids must be strings, numbers, None or tuples of them to be saved, got"):
        classifier.state_dict()


def test_state_is_compact():
    """18 bytes a prompt and 8 an integer id (36 with any-of-100), times 4/3 for base64, whatever came before."""
    for statistic, size in ((PassRate(), 26), (AnyOfN(), 44)):
        classifier = OnlineDifficultyClassifier(statistic=statistic)
        classifier.observe(range(3000), np.ones(3000), np.ones(3000))
        assert len(json.dumps(classifier.state_dict())) < 3000 * size * 4 / 3 + 1000


def packed(kind, *values):
    return b64encode(np.array(values, dtype=kind).tobytes()).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version = 1"),
        ({"edges": [0.5]}, "edges = .0.5."),
        ({"statistic": {"name": "AnyOfN", "window": 100}}, "statistic = .*'AnyOfN'"),
        ({"discount": 0.9}, "discount = 0.9"),
        ({"hysteresis": 0.01}, "hysteresis = 0.01"),
        ({"confidence": 0.1}, "confidence = 0.1"),
        ({"ids": ["x", "x"]}, "ids must be unique .*'x'"),
        ({"ids": packed("<i8", 7, 7)}, "ids must be unique .*7"),
        ({"ids": ["x"]}, r"successes must be base64 of float64, shape \(1,\)"),
        ({"ids": "x"}, "ids must be base64 of int64.*'x'"),
        ({"ids": None}, "ids must be base64 of int64.*None"),
        ({"ids": [{"x": 1}, "y"]}, "ids must be strings, .*'x': 1"),
        ({"successes": [1.0, 0.0]}, "successes must be base64 .*1.0, 0.0"),
        ({"successes": packed("<f8", 1.0, np.nan)}, "successes must hold .*nan"),
        ({"successes": packed("<f8", 1.0)}, "successes must be base64 .*shape .2,"),
        ({"failures": packed("<f8", -1.0, 0.0)}, "failures must hold .*-1"),
        ({"failures": packed("<f4", 1.0, 0.0, 1.0)}, "failures must be base64 of float64"),
        ({"bin": packed("<i2", 0, 10)}, "bin must hold .*10"),
        ({"bin": packed("<i2", 0, -1)}, "bin must hold .*-1"),
        ({"bin": packed("<i2", 0) + "é"}, "bin must be base64"),
    ],
)
def test_state_of_another_shape_is_refused(change, message):
    """Nothing has changed after the error."""
    classifier = OnlineDifficultyClassifier(EDGES)
    classifier.observe(["x", "y"], [1, 0], [4, 4])
    before = classifier.state_dict()
    with pytest.raises(ValueError, match=message):
        classifier.load_state_dict({**before, **change})
    assert classifier.state_dict() == before


@pytest.mark.parametrize("statistic", [PassRate(), AnyOfN()], ids=str)
def test_a_state_that_lacks_a_key_is_refused(statistic):
    """Each key of a state is needed, and the message names it."""
    classifier = OnlineDifficultyClassifier(EDGES, statistic)
    classifier.observe(["x", "y"], [1, 0], [4, 4])
    before = classifier.state_dict()
    for key in before.keys() - {"confidence"}:  # None, as when it is absent
        with pytest.raises(ValueError, match=f"{key}"):
            classifier.load_state_dict({name: value for name, value in before.items() if name != key})
    assert classifier.state_dict() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visits": packed("<u2", 0)}, "visits must hold .*0"),
        ({"visits": packed("<u2", 71)}, "visits must hold .*71"),
        ({"visits": packed("<u2", 2), "hits": packed("<u8", 0b100, 0)}, "hits must be 0 .*0x4 in word 0"),
        ({"visits": packed("<u2", 64), "hits": packed("<u8", 2**64 - 1, 1)}, "hits must be 0 .*0x1 in word 1"),
        ({"visits": packed("<u2", 70), "hits": packed("<u8", 0, 2**6)}, "hits must be 0 .*0x40 in word 1"),
        ({"hits": packed("<u8", 1)}, r"hits must be base64 of uint64, shape \(1, 2\)"),
    ],
)
def test_a_damaged_window_is_refused(change, message):
    """Any-of-n holds 1 to H visits, and a hit only where there was a visit."""
    classifier = OnlineDifficultyClassifier(EDGES, AnyOfN(70))
    classifier.observe(["x"], [1], [4])
    before = classifier.state_dict()
    with pytest.raises(ValueError, match=message):
        classifier.load_state_dict({**before, **change})
    assert classifier.state_dict() == before


def test_arrays_are_saved_as_little_endian_bytes():
    """The layout, so that a state can be read without this package."""
    classifier = OnlineDifficultyClassifier([0.5], AnyOfN(70), discount=1.0)
    classifier.observe(np.array([7, -2]), [4, 0], [4, 3])
    classifier.observe(np.array([-2]), [1], [3])
    saved = classifier.state_dict()
    read = {"ids": "<i8", "successes": "<f8", "failures": "<f8", "bin": "<i2", "visits": "<u2", "hits": "<u8"}
    assert {name: np.frombuffer(b64decode(saved[name]), dtype=kind).tolist() for name, kind in read.items()} == {
        "ids": [7, -2],
        "successes": [4.0, 1.0],
        "failures": [0.0, 5.0],
        "bin": [1, 1],
        "visits": [1, 2],
        "hits": [1, 0, 1, 0],
    }


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edges": [0.0, 0.5]}, "edges must increase strictly"),
        ({"edges": [0.5, 0.5]}, "edges must increase strictly"),
        ({"edges": [0.5, 1.5]}, "edges must hold .*1.5"),
        ({"edges": np.linspace(0, 1, 40001)[1:-1]}, "edges must hold at most 32766 values, got 39999"),
        ({"statistic": "mean"}, r"statistic must be an object such as gdro_core.PassRate\(\), got 'mean'"),
        ({"discount": 0.0}, r"discount must lie in \(0, 1\], got 0.0"),
        ({"discount": 1.1}, "discount must lie in .*1.1"),
        ({"prior": (0.0, 1.0)}, r"prior\[0\] must lie in"),
        ({"prior": (1.0, np.inf)}, r"prior\[1\] must lie in .*inf"),
        ({"hysteresis": -0.1}, "hysteresis must lie in .*-0.1"),
        ({"edges": [0.2, 0.9], "hysteresis": 0.05}, "hysteresis must be below half the narrowest bin .0.05., got 0.05"),
        ({"confidence": 0.0, "discount": 1.0}, r"confidence must lie in \(0, 1\) or be None, got 0.0"),
        ({"confidence": 1.0, "discount": 1.0}, "confidence must lie in .*1.0"),
        ({"confidence": np.nan, "discount": 1.0}, "confidence must lie in .*nan"),
        ({"confidence": 0.1}, "discount must be 1.0 with confidence, got 0.8"),
        (
            {"confidence": 0.1, "discount": 1, "statistic": AnyOfN()},
            r"statistic must be PassRate\(\) with .*got AnyOfN",
        ),
        ({"confidence": 0.1, "discount": 1, "hysteresis": 0.01}, "hysteresis must be 0.0 with confidence, got 0.01"),
    ],
)
def test_construction_refuses(options, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        OnlineDifficultyClassifier(**options)


@pytest.mark.parametrize(
    ("ids", "correct", "trials", "message"),
    [
        ([], [], [], "ids must hold at least one id"),
        (np.array([], dtype=int), [], [], "ids must hold at least one id"),
        (np.array([3, 1, 3]), [0, 0, 0], [1, 1, 1], "ids must be unique within a batch, got 3 twice"),
        ([1, "x", True], [0, 0, 0], [1, 1, 1], "ids must be unique within a batch, got True twice"),
        ([1, True], [0, 0], [1, 1], "ids must be unique within a batch, got True twice"),
        (["y", "x", "y"], [0, 0, 0], [1, 0, 0], "ids must be unique within a batch, got 'y' twice"),
        ("x", [1], [1], "ids must be a sequence of ids, got the single string 'x'"),
        (np.array([[1]]), [[1]], [[1]], r"ids must have shape \(N,\), got \(1, 1\)"),
        (["x", "y", "x"], [0, 0, 0], [1, 1, 1], "ids must be unique within a batch, got 'x' twice"),
        (["x"], [1, 1], [1, 1], "trials must have shape"),
        (["x", "y"], [1], [1, 1], "correct must have shape"),
        (["x"], [2], [1], "correct must be at most trials, got 2.0 of 1.0"),
        (["x"], [-1], [1], "correct must hold .*-1"),
        (["x"], [np.nan], [1], "correct must hold .*nan"),
        (["x"], [0], [np.inf], "trials must hold .*inf"),
    ],
)
def test_observe_refuses(ids, correct, trials, message):
    """Errors name argument, rule and value, and the classifier is as it was."""
    classifier = OnlineDifficultyClassifier()
    classifier.observe(["x"], [1], [2])
    before = classifier.state_dict()
    with pytest.raises(ValueError, match=message):
        classifier.observe(ids, correct, trials)
    assert classifier.state_dict() == before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PassAtK(0), "k must be an integer >= 1, got 0"),
        (lambda: AnyOfN(0), r"window must lie in \[1, 65535\], got 0"),
        (lambda: AnyOfN(65536), r"window must lie in \[1, 65535\], got 65536"),
        (lambda: AnyOfN(1.5), "window must be an integer >= 1, got 1.5"),
    ],
)
def test_a_statistic_refuses(build, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        build()


def test_a_statistic_of_your_own_needs_no_other_edit():
    """The share of batches that were solved in full, with an array of its own: one object, saved and loaded as well."""

    @dataclass(frozen=True)
    class SolvedLast(Statistic):
        def arrays(self, rows):
            return {"solved": np.zeros(rows)}

        def observe(self, memory, rows, correct):
            memory["solved"][rows] = correct >= 4

        def estimate(self, a, b, memory):
            return memory["solved"]

    classifier = OnlineDifficultyClassifier([0.5], SolvedLast())
    classifier.observe(["a", "b"], [4, 3], [4, 4])
    assert classifier.bins(["a", "b"]).tolist() == [1, 0]
    again = OnlineDifficultyClassifier([0.5], SolvedLast())
    again.load_state_dict(json.loads(json.dumps(classifier.state_dict())))
    again.observe(["b"], [4], [4])
    assert again.bins(["a", "b"]).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"statistic = .*'SolvedLast'"):
        OnlineDifficultyClassifier([0.5]).load_state_dict(classifier.state_dict())
