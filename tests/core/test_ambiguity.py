"""The adversary's best responses: feasible, certified by their duals, equal to generic solvers (theorems 1 and 13)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from gdro_core.ambiguity import chi_square, cvar, entropic

SEEDS = st.integers(0, 2**32 - 1)
RESPONSES = [  # function, its parameter, the one that gives r, one that gives the maximum
    pytest.param(entropic, 1.7, 0.0, 1e9, id="entropic"),
    pytest.param(cvar, 0.4, 1.0, 1e-12, id="cvar"),
    pytest.param(chi_square, 0.6, 0.0, 1e9, id="chi_square"),
]


def instance(seed, *, ties=True, zeros=True):
    """Losses and a reference; often with ties and with bins that the reference leaves out."""
    rng = np.random.default_rng(seed)
    bins = int(rng.integers(1, 9))
    losses = rng.normal(size=bins) * 10.0 ** rng.uniform(-3, 3)
    if ties and rng.random() < 0.5:
        losses = np.round(losses / np.abs(losses).max() * 2)
    reference = rng.dirichlet(np.ones(bins))
    if zeros and bins > 1 and rng.random() < 0.5:
        reference[rng.integers(bins)] = 0.0
        reference /= reference.sum()
    return rng, losses, reference


def kl(q, r):
    used = q > 0
    return float(q[used] @ np.log(q[used] / r[used]))


def chi_square_distance(q, r):
    used = r > 0
    return 0.5 * float(r[used] @ (q[used] / r[used] - 1.0) ** 2)


def assert_distribution(q, reference):
    assert (q >= 0).all()
    assert q.sum() == pytest.approx(1.0, abs=1e-12)
    assert not q[reference == 0].any()


@given(SEEDS, st.floats(-3, 3))
def test_theorem_1_entropic_attains_its_value_and_both_bounds_of_lemma_4_1(seed, exponent):
    """q . L - KL/eta equals the log-sum-exp; V and the paper's H(q)/eta form lie within log(B)/eta of max L."""
    _, losses, reference = instance(seed)
    eta = 10.0**exponent / np.ptp([0.0, *losses])
    scale = np.abs(losses).max()
    for r in (reference, np.full(losses.size, 1 / losses.size)):
        q, value = entropic(losses, eta, r)
        assert_distribution(q, r)
        assert q @ losses - kl(q, r) / eta == pytest.approx(value, abs=1e-12 * (scale + 1 / eta))
        worst = losses[r > 0].max()
        price = np.log(1.0 / r[(losses == worst) & (r > 0)].max()) / eta
        assert max(r @ losses, worst - price) - 1e-12 * (scale + 1 / eta) <= value <= worst + 1e-12 * scale
    paper = q @ losses + -(q[q > 0] @ np.log(q[q > 0])) / eta  # r is uniform here
    slack, gap = 1e-12 * (scale + 1 / eta), np.log(losses.size) / eta
    assert paper == pytest.approx(value + gap, abs=slack)
    assert losses.max() - slack <= paper <= losses.max() + gap + slack


@given(SEEDS, st.floats(1e-3, 1.0))
def test_theorem_13_cvar_is_feasible_and_certified_by_its_dual(seed, alpha):
    """q <= r/alpha, and the value equals t + E(L - t)_+ / alpha at one of the losses: weak duality."""
    _, losses, reference = instance(seed)
    q, value = cvar(losses, alpha, reference)
    assert_distribution(q, reference)
    assert (q <= reference / alpha * (1 + 1e-9) + 1e-12).all()
    dual = min(t + reference @ np.maximum(losses - t, 0.0) / alpha for t in losses)
    assert q @ losses == pytest.approx(value, rel=1e-12, abs=1e-12 * np.abs(losses).max())
    assert value == pytest.approx(dual, rel=1e-9, abs=1e-9 * np.abs(losses).max())


@given(SEEDS, st.floats(-8, 4))
def test_theorem_13_chi_square_is_feasible_and_certified_by_its_dual(seed, exponent):
    """D(q || r) <= rho, with equality below the maximum, and no gap to t + sqrt((1 + 2 rho) E (L - t)_+^2)."""
    _, losses, reference = instance(seed)
    rho, scale = 10.0**exponent, np.abs(losses).max()
    q, value = chi_square(losses, rho, reference)
    assert_distribution(q, reference)
    assert chi_square_distance(q, reference) <= rho * (1 + 1e-9)
    worst = losses[reference > 0].max()
    assert q @ losses == pytest.approx(value, abs=1e-12 * scale)
    on_top = (losses == worst) & (reference > 0)
    if 1 / reference[on_top].sum() <= 1 + 2 * rho:
        np.testing.assert_allclose(q, np.where(on_top, reference, 0) / reference[on_top].sum(), atol=1e-12)
        assert value == worst
        return
    assert chi_square_distance(q, reference) == pytest.approx(rho, rel=1e-9)
    inside = q > 0
    # q/r is linear in L where positive: two points give the threshold t.
    ratio = q[inside] / reference[inside]
    hi, lo = np.argmax(losses[inside]), np.argmin(losses[inside])
    if ratio[hi] - ratio[lo] > 1e-6:
        t = losses[inside][hi] - ratio[hi] * np.ptp(losses[inside]) / (ratio[hi] - ratio[lo])
    else:  # rho so small that all bins are in: mean - t = std / sqrt(2 rho)
        mean = reference @ losses
        t = mean - np.sqrt(reference @ (losses - mean) ** 2 / (2 * rho))
    dual = t + np.sqrt((1 + 2 * rho) * (reference @ np.maximum(losses - t, 0.0) ** 2))
    assert value == pytest.approx(dual, abs=1e-8 * (scale + abs(t) * 1e-6))


@pytest.mark.parametrize("seed", range(30))
def test_theorem_13_cvar_agrees_with_a_linear_program(seed):
    rng, losses, reference = instance(seed)
    alpha = rng.uniform(0.05, 1.0)
    optimum = linprog(-losses, A_eq=np.ones((1, losses.size)), b_eq=[1.0], bounds=[(0.0, b / alpha) for b in reference])
    assert cvar(losses, alpha, reference).value == pytest.approx(-optimum.fun, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("name", ["entropic", "chi_square"])
def test_theorem_13_smooth_responses_agree_with_slsqp(name, seed):
    """A generic constrained solver, started at the reference, finds the same point and nothing better."""
    rng = np.random.default_rng(seed)
    bins = int(rng.integers(2, 7))
    losses, reference = rng.normal(size=bins), rng.dirichlet(np.full(bins, 2.0))
    total = {"type": "eq", "fun": lambda q: q.sum() - 1.0}
    if name == "entropic":
        eta = rng.uniform(0.1, 5.0)
        ours = entropic(losses, eta, reference)

        def cost(q):
            q = np.maximum(q, 1e-15)
            return -(q @ losses - q @ np.log(q / reference) / eta)

        rules = [total]
    else:
        rho = rng.uniform(0.02, 1.5)
        ours = chi_square(losses, rho, reference)

        def cost(q):
            return -q @ losses

        rules = [total, {"type": "ineq", "fun": lambda q: rho - chi_square_distance(q, reference)}]
    options = {"ftol": 1e-12, "maxiter": 1000}
    optimum = minimize(cost, reference, method="SLSQP", bounds=[(0, 1)] * bins, constraints=rules, options=options)
    assert ours.value == pytest.approx(-optimum.fun, abs=1e-6)
    np.testing.assert_allclose(ours.q, optimum.x, atol=2e-3)


@pytest.mark.parametrize(("respond", "parameter", "to_reference", "to_maximum"), RESPONSES)
@given(seed=SEEDS)
def test_theorem_13_limits_are_the_reference_and_the_maximum(respond, parameter, to_reference, to_maximum, seed):
    """Theorem 13: eta -> 0, alpha -> 1, rho -> 0 give r; the other end gives max L over the bins that r allows."""
    _, losses, reference = instance(seed)
    scale = np.abs(losses).max() + 1e-300
    near, value = respond(losses, to_reference, reference)
    np.testing.assert_allclose(near, reference, atol=1e-12)
    assert value == pytest.approx(reference @ losses, abs=1e-12 * scale)
    if respond is not entropic:
        assert respond(losses, to_maximum, reference).value == pytest.approx(
            losses[reference > 0].max(), abs=1e-14 * scale
        )
    else:
        top = losses[reference > 0].max()
        loose = np.log(1 / reference[losses == top].max()) / to_maximum if reference[losses == top].any() else np.inf
        assert respond(losses, to_maximum, reference).value == pytest.approx(top, abs=loose + 1e-12 * scale)


@pytest.mark.parametrize(("respond", "parameter", "to_reference", "to_maximum"), RESPONSES)
@given(seed=SEEDS)
def test_theorem_1_the_gradient_of_the_value_is_q(respond, parameter, to_reference, to_maximum, seed):
    """dV/dL = q (Eq. 25-26 of the paper for the entropic one), by central differences; losses without ties."""
    _, losses, reference = instance(seed, ties=False)
    losses = losses / np.abs(losses).max()
    if losses.size > 1 and np.diff(np.sort(losses)).min() < 1e-3:
        return
    step = 1e-6
    slopes = [
        (respond(losses + bump, parameter, reference).value - respond(losses - bump, parameter, reference).value)
        / (2 * step)
        for bump in step * np.eye(losses.size)
    ]
    # chi_square: q changes by up to 1e3 (1 / the least gap between losses) times the step.
    tolerance = 1e-4 if respond is chi_square else 1e-6
    np.testing.assert_allclose(slopes, respond(losses, parameter, reference).q, atol=tolerance)


@pytest.mark.parametrize(("respond", "parameter", "to_reference", "to_maximum"), RESPONSES)
@given(seed=SEEDS, shift=st.floats(-100, 100), exponent=st.floats(-6, 6))
def test_shift_scale_and_order_of_bins(respond, parameter, to_reference, to_maximum, seed, shift, exponent):
    """V(a L + c) = a V(L) + c with the same q (entropic: at eta/a); permuting the bins permutes q."""
    rng, losses, reference = instance(seed)
    losses = losses / (np.abs(losses).max() + 1e-300)
    scale = 10.0**exponent
    q, value = respond(losses, parameter, reference)
    moved = respond(scale * losses + shift, parameter / scale if respond is entropic else parameter, reference)
    if np.unique(scale * losses + shift).size == np.unique(losses).size:  # rounding has not made or broken ties
        rounding = 1e-13 * (1 + abs(shift) / scale)
        np.testing.assert_allclose(
            moved.q, q, atol=1e3 * rounding / min(1.0, np.min(np.diff(np.unique(losses)), initial=1.0))
        )
        assert moved.value == pytest.approx(scale * value + shift, abs=scale * rounding * 100)
    order = rng.permutation(losses.size)
    again = respond(losses[order], parameter, reference[order])
    np.testing.assert_allclose(again.q, q[order], atol=1e-12)
    np.testing.assert_allclose(again.value, value, atol=1e-12)


@pytest.mark.parametrize(("respond", "parameter", "to_reference", "to_maximum"), RESPONSES)
@given(seed=SEEDS)
def test_value_grows_with_the_losses_and_with_the_adversary(respond, parameter, to_reference, to_maximum, seed):
    """Raising one loss never lowers V; a stronger adversary (eta, rho up; alpha down) never gets less."""
    rng, losses, reference = instance(seed)
    slack = 1e-12 * np.abs(losses).max()
    higher = losses + rng.exponential(size=losses.size) * (rng.random(losses.size) < 0.5)
    assert respond(higher, parameter, reference).value >= respond(losses, parameter, reference).value - slack
    grid = np.geomspace(1e-6, 1.0, 13) if respond is cvar else np.geomspace(1e-18, 1e4, 45)
    values = [float(respond(losses, x, reference).value) for x in (grid[::-1] if respond is cvar else grid)]
    assert np.diff(values).min() >= -slack
    assert reference @ losses - slack <= values[0]
    assert values[-1] <= losses[reference > 0].max() + slack


@pytest.mark.parametrize(("respond", "parameter", "to_reference", "to_maximum"), RESPONSES)
@given(seed=SEEDS)
def test_equal_losses_are_treated_equally(respond, parameter, to_reference, to_maximum, seed):
    """Bins that tie have the same q/r, so splitting a bin in two changes nothing; all equal gives r."""
    rng, losses, reference = instance(seed, zeros=False)
    split, cut = rng.integers(losses.size), rng.uniform(0.1, 0.9)
    finer = np.append(reference, cut * reference[split])
    finer[split] *= 1 - cut
    q, value = respond(losses, parameter, reference)
    q_finer, value_finer = respond(np.append(losses, losses[split]), parameter, finer)
    np.testing.assert_allclose(q_finer[:-1], q * np.where(np.arange(losses.size) == split, 1 - cut, 1.0), atol=1e-12)
    assert value_finer == pytest.approx(value, abs=1e-12 * np.abs(losses).max())
    level = respond(np.full(losses.size, 3.0), parameter, reference)
    np.testing.assert_allclose(level.q, reference, atol=1e-12)
    assert level.value == pytest.approx(3.0, abs=1e-12)


@pytest.mark.parametrize(("respond", "parameter", "to_reference", "to_maximum"), RESPONSES)
def test_extreme_losses_and_references(respond, parameter, to_reference, to_maximum):
    """No overflow, NaN or warning from 1e-300 to the largest float, nor where the reference spans 300 orders."""
    largest = np.finfo(float).max
    for losses in (
        [1e300, 0.0, -1e300],
        [largest, -largest, 0.0],
        [0.0, 0.0, 0.0],
        [1e-300, 0.0, 2e-300],
        [1.0, 1e-200, 0.0],
    ):
        for r in (None, [0.0, 0.5, 0.5], [1e-300, 0.5, 0.5], [0.5, 1e-12, 0.5 - 1e-12]):
            for strength in (to_reference, parameter, to_maximum):
                q, value = respond(losses, strength, r)
                assert_distribution(q, np.ones(3) if r is None else np.array(r))
                assert np.isfinite(value)
                assert min(losses) <= value <= max(losses)
    assert respond([1e300, 0.0], parameter, [0.0, 1.0]).value == 0.0
    assert respond([5.0], parameter).value == 5.0


def test_entropic_value_is_exact_at_small_step_sizes():
    """V = r . L + eta Var_r(L)/2 to first order, resolved down to eta spread = 1e-9."""
    for eta in (1e-4, 1e-7, 1e-9):
        assert entropic([-1.0, 0.0, 1.0], eta).value == pytest.approx(eta / 3, rel=1e-6)


def test_a_rare_far_bin_does_not_drown_the_others():
    """chi_square: among [0, -1, -1 - 1e-10] at r = [1e-20, 1/2, 1/2] and small rho the pair is told apart exactly."""
    r = np.array([1e-20, 0.5, 0.5])
    q, _ = chi_square([0.0, -1.0, -1.0 - 1e-10], 1e-24, r)
    assert chi_square_distance(q, r) == pytest.approx(1e-24, rel=1e-3)


def test_leading_axes_are_independent_problems():
    """(2, 3, B) losses against one reference, and against one reference each."""
    rng = np.random.default_rng(0)
    losses, references = rng.normal(size=(2, 3, 5)), rng.dirichlet(np.ones(5), size=(2, 3))
    for respond, parameter in ((entropic, 2.0), (cvar, 0.3), (chi_square, 0.5)):
        for reference in (None, references[0, 0], references):
            q, value = respond(losses, parameter, reference)
            assert (q.shape, value.shape) == ((2, 3, 5), (2, 3))
            for at in np.ndindex(2, 3):
                one = respond(losses[at], parameter, references[at] if reference is references else reference)
                np.testing.assert_allclose(q[at], one.q, atol=1e-15)
                np.testing.assert_allclose(value[at], one.value, atol=1e-15)


@pytest.mark.parametrize(("respond", "parameter", "to_reference", "to_maximum"), RESPONSES)
@pytest.mark.parametrize(
    ("losses", "reference", "message"),
    [
        (1.0, None, r"losses must have shape \(\.\.\., B\) with B >= 1, got \(\)"),
        ([], None, r"losses must have shape .*\(0,\)"),
        ([1.0, np.nan], None, "losses must hold finite numbers, got nan"),
        ([1.0, np.inf], None, "losses must hold finite numbers, got inf"),
        ([1.0, 2.0], [1.0], r"reference must have shape \(2,\) or \(2,\), got \(1,\)"),
        ([1.0, 2.0], [1.5, -0.5], "reference must hold .*-0.5"),
        ([1.0, 2.0], [0.5, 0.4], "reference must sum to 1, got 0.9"),
        ([1.0, 2.0], [np.nan, 1.0], "reference must hold .*nan"),
    ],
)
def test_bad_losses_and_references_are_refused(
    respond, parameter, to_reference, to_maximum, losses, reference, message
):
    with pytest.raises(ValueError, match=message):
        respond(losses, parameter, reference)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropic([1.0], -1.0), "step_size must lie in .*-1.0"),
        (lambda: entropic([1.0], np.inf), "step_size must lie in .*inf"),
        (lambda: cvar([1.0], 0.0), r"alpha must lie in \(0, 1\], got 0.0"),
        (lambda: cvar([1.0], 1.1), "alpha must lie in .*1.1"),
        (lambda: chi_square([1.0], -0.1), "rho must lie in .*-0.1"),
        (lambda: chi_square([1.0], np.nan), "rho must lie in .*nan"),
    ],
)
def test_bad_parameters_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
