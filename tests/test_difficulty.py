"""The classifier: arrays agree with a slow per-prompt reference; statistics are what their formulas say."""

from __future__ import annotations

import json
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta, binom

from gdro_core import OnlineDifficultyClassifier

EDGES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
MIXED_IDS = ["a", 1, ("aime", 3), None, 2.5, b"x", frozenset({1})]


class SlowPrompt:
    """One prompt in plain Python: posterior, window of visits, and a Schmitt trigger on each edge."""

    def __init__(self, classifier):
        self.of, self.bin = classifier, -1
        self.a = self.b = 0.0
        self.hits = deque(maxlen=classifier.window)

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
        if self.of.statistic == "any":
            return sum(self.hits) / len(self.hits)
        if self.of.statistic == "pass_rate":
            return a / (a + b)
        none_right = 1.0
        for j in range(self.of.k):
            none_right *= (b + j) / (a + b + j)
        return 1.0 - none_right


@pytest.mark.parametrize("hysteresis", [0.0, 0.03])
@pytest.mark.parametrize("statistic", ["pass_rate", "pass@k", "any"])
@given(seed=st.integers(0, 2**32 - 1), discount=st.sampled_from([0.5, 0.9, 1.0]), window=st.integers(1, 5))
def test_agrees_with_a_slow_reference(statistic, hysteresis, seed, discount, window):
    """Bins and posteriors after every batch: mixed ids, partial credit, n = 0, any order, both directions of moves."""
    rng = np.random.default_rng(seed)
    classifier = OnlineDifficultyClassifier(
        EDGES, statistic, k=3, discount=discount, prior=(0.7, 1.3), window=window, hysteresis=hysteresis
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
    classifier = OnlineDifficultyClassifier([0.5], "any", hysteresis=0.1)
    found = []
    for hit in hits:
        classifier.observe(["x"], [hit], [4])
        found += classifier.bins(["x"]).tolist()
    assert found == bins


@given(st.floats(0.3, 20), st.floats(0.3, 20), st.integers(1, 16))
def test_pass_at_k_is_the_posterior_mean(a, b, k):
    """1 - prod (b + j)/(a + b + j) = E[1 - (1 - p)^k], p ~ Beta(a, b), by numerical integration; it decides the bin."""
    none_right = quad(lambda x: beta.cdf(x, a, b) * k * (1.0 - x) ** (k - 1), 0, 1, epsabs=1e-11, limit=200)[0]
    expected = 1.0 - none_right  # integration by parts: E f(p) = f(1) - int F f' with the distribution function F
    for offset, wanted in ((-1e-6, 1), (1e-6, 0)):
        edge = expected + offset
        if 0.0 < edge < 1.0:
            classifier = OnlineDifficultyClassifier([edge], "pass@k", k=k, prior=(a / 2, b / 2))
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
        published = OnlineDifficultyClassifier([0.5], "any")
        published.observe(range(n + 1), hits, np.full(n + 1, n))
        assert chance @ published.bins(range(n + 1)) == pytest.approx(1 - (1 - p) ** n)


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


@pytest.mark.parametrize("statistic", ["pass_rate", "pass@k", "any"])
def test_state_round_trips_through_json(statistic):
    """A restored classifier continues bit for bit, also from before the first observation."""
    rng = np.random.default_rng(0)

    def batch():
        return rng.permutation(40)[:9].tolist(), rng.integers(0, 5, 9), np.full(9, 4)

    original = OnlineDifficultyClassifier(EDGES, statistic, window=4, hysteresis=0.03)
    for _ in range(10):
        restored = OnlineDifficultyClassifier(EDGES, statistic, window=4, hysteresis=0.03)
        restored.load_state_dict(json.loads(json.dumps(original.state_dict())))
        visit = batch()
        original.observe(*visit)
        restored.observe(*visit)
        assert restored.state_dict() == original.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version = 2"),
        ({"edges": [0.5]}, "edges = .0.5."),
        ({"statistic": "any"}, "statistic = 'any'"),
        ({"discount": 0.9}, "discount = 0.9"),
        ({"hysteresis": 0.01}, "hysteresis = 0.01"),
        ({"ids": ["x", "x"]}, "ids must be unique .*'x'"),
        ({"ids": ["x"]}, "successes must have shape"),
        ({"successes": [1.0, np.nan]}, "successes must hold .*nan"),
        ({"failures": [-1.0, 0.0]}, "failures must hold .*-1"),
        ({"bin": [0, 10]}, "bin must hold .*10"),
        ({"bin": [0, 0.5]}, "bin must hold integers, got 0.5"),
        ({"history": [[1]]}, "history must have shape"),
        ({"history": [[1], [300]]}, "history must have shape"),
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


@pytest.mark.parametrize("history", [[[1, 300]], [[1, 1, 1]], [[1], [1]], [[1, -2]], [[0.5, 1]]])
def test_a_damaged_history_is_refused(history):
    """Any-of-n histories hold −1, 0 or 1 in `window` columns."""
    classifier = OnlineDifficultyClassifier(EDGES, "any", window=2)
    classifier.observe(["x"], [1], [4])
    with pytest.raises(ValueError, match="history must"):
        classifier.load_state_dict({**classifier.state_dict(), "history": history})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edges": [0.0, 0.5]}, "edges must increase strictly"),
        ({"edges": [0.5, 0.5]}, "edges must increase strictly"),
        ({"edges": [0.5, 1.5]}, "edges must hold .*1.5"),
        ({"edges": np.linspace(0, 1, 40001)[1:-1]}, "edges must hold at most 32766 values, got 39999"),
        ({"statistic": "mean"}, "statistic must be one of .*'mean'"),
        ({"k": 0}, "k must be an integer >= 1, got 0"),
        ({"discount": 0.0}, r"discount must lie in \(0, 1\], got 0.0"),
        ({"discount": 1.1}, "discount must lie in .*1.1"),
        ({"prior": (0.0, 1.0)}, r"prior\[0\] must lie in"),
        ({"prior": (1.0, np.inf)}, r"prior\[1\] must lie in .*inf"),
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"hysteresis": -0.1}, "hysteresis must lie in .*-0.1"),
        ({"edges": [0.2, 0.9], "hysteresis": 0.05}, "hysteresis must be below half the narrowest bin .0.05., got 0.05"),
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
