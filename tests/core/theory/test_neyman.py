"""Adaptive Neyman allocation: regret against the best fixed allocation, and its rates (theorem 9)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdro_core import sqrt_allocation
from gdro_core.theory.neyman import ClipOGD, PlugInNeyman, neyman_regret

SEEDS = st.integers(0, 2**32 - 1)
REPLICATES = 200


@given(SEEDS)
def test_neyman_regret_is_measured_from_the_square_root_law(seed):
    """The best fixed p is Theorem 4.2's with v_b = sum_t y_t(b)^2: regret 0 there, positive elsewhere."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(2, 30, 4)) * rng.gamma(1.0, size=4)
    best = np.stack([sqrt_allocation((copy**2).sum(axis=0), 0.25) for copy in y])  # mean 1/4: sum 1
    np.testing.assert_allclose(neyman_regret(np.repeat(best[:, None], 30, axis=1), y), 0.0, atol=1e-6)
    other = rng.dirichlet(np.ones(4) * 5, size=2)
    assert (neyman_regret(np.repeat(other[:, None], 30, axis=1), y) > 0).all()


def coins(rng, horizon, scale):
    """i.i.d. outcomes (R, T, B), bounded away from 0."""
    return rng.uniform(0.5, 1.0, (REPLICATES, horizon, len(scale))) * scale


def play(design, y, rng):
    """(R,) Neyman regret of a design on outcomes (R, T, B)."""
    p, rows = np.empty_like(y), np.arange(REPLICATES)
    for t in range(y.shape[1]):
        if isinstance(design, ClipOGD):
            p[:, t] = np.stack([design.probability, 1.0 - design.probability], axis=1)
        else:
            p[:, t] = design.probabilities
        bin_ = (p[:, t].cumsum(axis=1)[:, :-1] <= rng.random((REPLICATES, 1))).sum(axis=1)
        design.update(bin_ == 0 if isinstance(design, ClipOGD) else bin_, y[rows, t, bin_])
    return neyman_regret(p, y)


def means(kind, horizons, scale):
    regrets = []
    for horizon in horizons:
        rng = np.random.default_rng(horizon)
        y = coins(rng, horizon, np.array(scale))
        bins = len(scale)
        design = ClipOGD(horizon, replicates=(REPLICATES,)) if kind == "clip" else None
        regrets.append(play(design or PlugInNeyman(bins, replicates=(REPLICATES,)), y, rng).mean())
    return np.array(regrets)


def test_theorem_9_clip_ogd_has_square_root_neyman_regret():
    """Õ(sqrt(T)) on i.i.d. outcomes: log-log slope about 1/2; far less than uniform sampling pays."""
    horizons = np.array([1000, 4000, 16000])
    regret = means("clip", horizons, [1.0, 0.25])
    slope = np.polyfit(np.log(horizons), np.log(regret), 1)[0]
    assert 0.3 < slope < 0.65  # no alarm at 5 other seeds
    y = coins(np.random.default_rng(0), 4000, np.array([1.0, 0.25]))
    assert regret[1] < 0.2 * neyman_regret(np.full(y.shape, 0.5), y).mean()


@pytest.mark.parametrize("scale", [[1.0, 0.25], [1.0, 0.7, 0.4, 0.1]])
def test_theorem_9_the_plug_in_has_logarithmic_neyman_regret(scale):
    """Õ(log T) on i.i.d. outcomes: as much per factor of four of the horizon, which is no power of it."""
    horizons = np.array([250, 1000, 4000, 16000])
    regret = means("plug-in", horizons, scale)
    steps = np.diff(regret)
    assert (steps > 0).all()
    assert steps[-1] < 1.5 * steps[0]
    assert np.polyfit(np.log(horizons), np.log(regret), 1)[0] < 0.3


def test_the_plug_in_recovers_from_a_bin_that_looked_certain():
    """A coin that first shows nothing: the floor keeps sampling it, and its share is found."""
    rng, design = np.random.default_rng(0), PlugInNeyman(2, replicates=(REPLICATES,))
    for t in range(4000):
        b = (rng.random(REPLICATES) < design.probabilities[:, 1]).astype(int)
        design.update(b, np.where(b == 0, 1.0, float(t >= 20) * (rng.random(REPLICATES) < 0.25)))
    assert abs(design.probabilities[:, 1].mean() - 1 / 3) < 0.05  # sqrt(1/4) : 1; no alarm at 5 other seeds


@given(SEEDS)
def test_clip_ogd_is_its_recursion(seed):
    """Algorithm 1 of Dai, Gradu and Harshaw, written out."""
    rng, horizon = np.random.default_rng(seed), 50
    design, p, slope = ClipOGD(horizon), 0.5, 0.0
    for t in range(1, horizon + 1):
        delta = t ** (-1 / np.sqrt(5 * np.log(horizon))) / 2
        p = min(max(p - slope / np.sqrt(horizon), delta), 1 - delta)
        assert design.probability == pytest.approx(p, rel=1e-12)
        treated, y = int(rng.random() < p), rng.normal()
        slope = y**2 * (-1 / p**3 if treated else 1 / (1 - p) ** 3)
        design.update(treated, y)


@given(st.floats(0.05, 0.95), st.floats(-2, 2), st.floats(-2, 2))
def test_the_slope_is_unbiased(p, treated, control):
    """Averaged over the coin, one step of Clip-OGD follows the derivative of y(1)^2 / p + y(0)^2 / (1 - p)."""
    moved = 0.0
    for z, y, chance in ((1, treated, p), (0, control, 1 - p)):
        design = ClipOGD(10**15)
        design._steps, design._probability = 10**60, np.array(p)  # an interval wide enough not to clip
        design.update(z, y)
        moved += chance * (design.probability - p) * np.sqrt(10**15)
    assert moved == pytest.approx(treated**2 / p**2 - control**2 / (1 - p) ** 2, abs=1e-3, rel=1e-3)


def test_designs_start_uniform_and_survive_silence():
    """Without outcomes, or with zeros only, the plug-in is uniform; an unseen bin counts as the largest."""
    design = PlugInNeyman(3)
    np.testing.assert_allclose(design.probabilities, 1 / 3)
    design.update(0, 0.0)
    np.testing.assert_allclose(design.probabilities, 1 / 3)
    design.update(1, 2.0)
    assert design.probabilities[2] == design.probabilities[1] > design.probabilities[0] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClipOGD(1), "horizon must be an integer >= 2, got 1"),
        (lambda: ClipOGD(10).update(2, 0.0), "treated must hold .*2"),
        (lambda: ClipOGD(10).update(1, np.nan), "outcome must hold .*nan"),
        (lambda: ClipOGD(10, replicates=(3,)).update([1, 0], [0.0, 0.0]), r"treated must have shape \(3,\)"),
        (lambda: PlugInNeyman(0), "num_bins must be an integer >= 1, got 0"),
        (lambda: PlugInNeyman(2).update(2, 0.0), "sampled must hold .*2"),
        (lambda: PlugInNeyman(2).update(1, np.inf), "outcome must hold .*inf"),
        (lambda: neyman_regret([0.5, 0.5], [1.0, 1.0]), r"outcomes must have the shape \(..., T, B\)"),
        (lambda: neyman_regret([[0.5, 0.5]], [[1.0]]), "outcomes must have the shape"),
        (lambda: neyman_regret([[0.5, 0.6]], [[1.0, 1.0]]), "probabilities must be positive with rows that sum to 1"),
        (lambda: neyman_regret([[1.0, 0.0]], [[1.0, 1.0]]), "probabilities must be positive"),
        (lambda: neyman_regret([[0.5, 0.5]], [[1.0, np.nan]]), "outcomes finite"),
    ],
)
def test_bad_input_is_refused(call, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        call()
