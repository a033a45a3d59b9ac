"""The agreement guard: what moving away from uniform weights may cost in mean reward (theorem 19)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdro_core import guarded_share

SEEDS = st.integers(0, 2**32 - 1)


def instance(rng):
    """Agreements with a positive mean, shares, weights of mean 1, alpha."""
    bins = int(rng.integers(1, 9))
    share, agreement = rng.dirichlet(np.ones(bins)), rng.normal(0.3, 1, bins)
    weights = rng.exponential(size=bins)
    return agreement, share, weights / (share @ weights), float(rng.choice([0.0, 0.1, 0.5, 1.0]))


def change(m, agreement, share, weights):
    """First-order change of mean reward of the mixture."""
    return float(share @ ((1 - m + m * weights) * agreement))


@given(SEEDS)
def test_theorem_19_the_share_is_the_stated_one_and_the_largest(seed):
    """For S_0 >= 0: 1 or alpha S_0 / (S_0 - S_1); the gain is kept, and more would not keep it."""
    agreement, share, weights, alpha = instance(np.random.default_rng(seed))
    uniform, wanted = change(0, agreement, share, weights), change(1, agreement, share, weights)
    m = guarded_share(agreement, share, weights, alpha)
    if uniform < 0:
        assert m == (1.0 if wanted >= (1 - alpha) * uniform else 0.0)
        return
    stated = 1.0 if wanted >= (1 - alpha) * uniform else alpha * uniform / (uniform - wanted)
    assert m == pytest.approx(stated, abs=1e-9)
    assert change(m, agreement, share, weights) >= (1 - alpha) * uniform - 1e-12
    if m < 1:
        assert change(min(m + 0.01, 1), agreement, share, weights) < (1 - alpha) * uniform


@given(SEEDS)
def test_theorem_19_holds_for_every_agreement_within_the_intervals(seed):
    """Wherever the share is above 0; at the worst corner of the box it is kept with equality or the share is 1."""
    rng = np.random.default_rng(seed)
    agreement, share, weights, alpha = instance(rng)
    radius = rng.exponential(0.2, share.size)
    m = guarded_share(agreement, share, weights, alpha, radius=radius)
    if m == 0:
        return
    factor = share * (alpha + m * (weights - 1))
    corner = agreement - radius * np.sign(factor)
    for truth in (corner, *(agreement + radius * rng.uniform(-1, 1, (20, share.size)))):
        assert change(m, truth, share, weights) >= (1 - alpha) * change(0, truth, share, weights) - 1e-12
    if m < 1:
        kept = change(m, corner, share, weights) - (1 - alpha) * change(0, corner, share, weights)
        assert kept == pytest.approx(0.0, abs=1e-12)
    assert guarded_share(agreement, share, weights, alpha, radius=2 * radius) <= m
    assert m <= guarded_share(agreement, share, weights, alpha) or change(0, agreement, share, weights) < 0


@given(SEEDS)
def test_theorem_19_normalised_steps_if_the_wanted_step_is_not_longer(seed):
    """With |G_1| <= |G_0| the mixture's gain over its length is at least (1 - alpha) of uniform's over its own."""
    rng = np.random.default_rng(seed)
    bins = int(rng.integers(2, 7))
    gradients, share = rng.normal(0.3, 1, (bins, 5)), rng.dirichlet(np.ones(bins))
    mean, weights, alpha = share @ gradients, rng.exponential(size=bins), 0.3
    lengths = [np.linalg.norm(share * w @ gradients) for w in (1.0, weights)]
    weights *= lengths[0] / lengths[1]
    m = guarded_share(gradients @ mean, share, weights, alpha)
    step = share * (1 - m + m * weights) @ gradients
    assert step @ mean / np.linalg.norm(step) >= (1 - alpha) * np.linalg.norm(mean) - 1e-9


@pytest.mark.parametrize(
    ("agreement", "weights", "alpha", "radius", "expected"),
    [
        ([1.0, -0.5], [0.5, 1.5], 0.0, 0.0, 0.0),  # nothing may be given away
        ([1.0, -0.5], [1.5, 0.5], 0.0, 0.0, 1.0),  # the wanted weights gain more
        ([1.0, -0.5], [0.5, 1.5], 1.0, 0.0, 2 / 3),  # all of it may
        ([0.0, 0.0], [0.5, 1.5], 0.1, 0.0, 1.0),  # nothing gains, nothing is lost
        ([-1.0, -1.0], [0.5, 1.5], 0.1, 0.0, 0.0),  # uniform loses, and no mixture is better
        ([-1.0, 0.5], [0.5, 1.5], 0.1, 0.0, 1.0),  # uniform loses, the wanted weights do not
        ([1.0, 1.0], [0.5, 1.5], 0.1, 1.0, 0.2),  # just so much that alpha + m (w_b - 1) >= 0
        ([1.0, 1.0], [0.5, 1.5], 0.1, 1.1, 0.0),  # uniform is not known to gain
        ([1.0, 1.0], [1.0, 1.0], 0.1, 0.5, 1.0),  # uniform weights are wanted
    ],
)
def test_the_share_at_the_edges(agreement, weights, alpha, radius, expected):
    """Two bins of one share each."""
    share = guarded_share(agreement, [0.5, 0.5], weights, alpha, radius=radius)
    assert share == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agreement": [np.nan, 1.0]}, "agreement must hold .*nan"),
        ({"share": [0.5]}, "share must have shape"),
        ({"share": [0.5, 0.6]}, "share must sum to 1, got 1.1"),
        ({"weights": [-1.0, 1.0]}, "weights must hold .*-1"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"radius": -0.1}, "radius must hold .*-0.1"),
        ({"radius": [0.1]}, "radius must have shape"),
    ],
)
def test_bad_input_is_refused(change, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        guarded_share(**{"agreement": [1.0, 0.5], "share": [0.5, 0.5], "weights": [1.0, 1.0], "alpha": 0.1, **change})
