r"""Best responses of the adversary: which mixture of bins, near a reference, makes the mean loss greatest.

    max_q  q . L  -  penalty or constraint on the distance of q from r,      q in the simplex

`entropic` is the paper's adversary (Lemma 4.1) with any reference, `cvar` and `chi_square` are the two classical
uncertainty sets of distributionally robust optimisation. Each is solved exactly: by a closed form, or by sorting.
The value V is convex and non-decreasing in L with V(a L + c) = a V(L) + c at a > 0 (`entropic`: at step size eta / a),
and q is a subgradient of it: where q is unique, dV/dL = q (Danskin), so the learner descends sum_b q_b grad L_b.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, check_entries, number


class BestResponse(NamedTuple):
    """A best response and what it is worth.

    >>> cvar([0.0, 1.0], alpha=0.5)
    BestResponse(q=array([0., 1.]), value=np.float64(1.0))
    """

    q: Floats  # (..., B) probabilities; 0 where the reference is 0
    value: Floats  # (...) optimal value of the problem solved [loss]


def entropic(losses: ArrayLike, step_size: float, reference: ArrayLike | None = None) -> BestResponse:
    r"""KL-penalised best response (Lemma 4.1, for any reference).

        max_q  q . L - KL(q || r) / eta   =   (1/eta) log sum_b r_b e^{eta L_b},     q_b proportional to r_b e^{eta L_b}

    Bounds, with b* a worst bin:  max(r . L, max L - log(1 / r_{b*}) / eta) <= V <= max L.
    At uniform r, KL(q || r) = log B - H(q), so the paper's max_q {q . L + H(q)/eta} = (1/eta) log sum_b e^{eta L_b} is
    V + log(B)/eta and lies in [max L, max L + log(B)/eta]: both are within log(B)/eta of the hard maximum, V from below
    and the paper's from above. V is non-decreasing in eta, from r . L at eta = 0 towards max L.

    Args:
        losses: (..., B) L_b.
        step_size: eta >= 0 [1 / loss].
        reference: (B,) or (..., B) r_b >= 0 with sum 1; uniform if None.

    Raises:
        ValueError: a bad argument.

    >>> q, value = entropic([0.0, 1.0], step_size=2.0)
    >>> q.round(3), value.round(3)
    (array([0.119, 0.881]), np.float64(0.717))
    """
    eta = number("step_size", step_size, 0.0)
    gap, r, top = _below_the_top(losses, reference)
    with np.errstate(over="ignore"):  # -inf: so far below the top that the bin gets nothing
        logits = 2.0 * (eta * gap)
    weight = r * np.exp(logits)
    total = weight.sum(axis=-1)
    surplus = (r * np.expm1(logits)).sum(axis=-1)  # total - 1 without cancellation: V stays exact at small eta
    log_mean = np.where(surplus > -0.5, np.log1p(np.maximum(surplus, -0.5)), np.log(total))
    flat = logits.min(axis=-1) >= -1e-16  # V - r.L <= eta spread^2 / 8: below rounding, and 0/0 at eta = 0
    tilted = 0.5 * top + np.divide(0.5 * log_mean, eta, out=np.zeros_like(log_mean), where=~flat)
    value = np.where(flat, 0.5 * top + (r * gap).sum(axis=-1), tilted)
    return BestResponse(weight / total[..., None], 2.0 * value)


def cvar(losses: ArrayLike, alpha: float, reference: ArrayLike | None = None) -> BestResponse:
    r"""Mean loss of the worst fraction alpha: conditional value at risk.

        max_q  q . L    s.t.   0 <= q_b <= r_b / alpha,   sum_b q_b = 1
          =  min_t  t + sum_b r_b (L_b - t)_+ / alpha                          (Rockafellar & Uryasev 2000)

    The worst bins are filled to r_b / alpha until the mass is spent. Bins that tie at the threshold share what is left
    in proportion to r, so that equal losses are treated equally. V is non-increasing in alpha, from max L (alpha at
    most the share of the worst bins) to r . L (alpha = 1).

    Args:
        losses: (..., B) L_b.
        alpha: fraction in (0, 1].
        reference: (B,) or (..., B) r_b >= 0 with sum 1; uniform if None.

    Raises:
        ValueError: a bad argument.

    >>> q, value = cvar([0.0, 1.0, 3.0, 2.0], alpha=0.375)
    >>> q.round(3), value.round(3)
    (array([0.   , 0.   , 0.667, 0.333]), np.float64(2.667))
    """
    tail = number("alpha", alpha, 0.0, 1.0, open_low=True)
    gap, r, top = _below_the_top(losses, reference)
    key = np.where(r > 0, gap, -np.inf)
    order = np.argsort(-key, axis=-1, kind="stable")
    filled = np.cumsum(np.take_along_axis(r, order, axis=-1), axis=-1)
    last = np.minimum((filled < tail).sum(axis=-1, keepdims=True), (r > 0).sum(axis=-1, keepdims=True) - 1)
    threshold = np.take_along_axis(key, np.take_along_axis(order, last, axis=-1), axis=-1)
    full, tied = np.where(key > threshold, r, 0.0), np.where(key == threshold, r, 0.0)
    left = np.maximum(tail - full.sum(axis=-1, keepdims=True), 0.0)
    q = (full + tied * (left / tied.sum(axis=-1, keepdims=True))) / tail
    return BestResponse(q, 2.0 * (0.5 * top + (q * gap).sum(axis=-1)))


def chi_square(losses: ArrayLike, rho: float, reference: ArrayLike | None = None) -> BestResponse:
    r"""Greatest mean loss within a chi-square ball around the reference; note the factor 1/2.

        max_q  q . L    s.t.   D(q || r) = 1/2 sum_b r_b (q_b / r_b - 1)^2 <= rho,   q >= 0,   sum_b q_b = 1
          =  min_t  t + sqrt((1 + 2 rho) sum_b r_b (L_b - t)_+^2)              (Duchi & Namkoong 2021)

    The optimum is q_b proportional to r_b (L_b - t)_+ . With the bins above t known, of mass A, mean m and variance s^2
    (under r, normalised by A), D = rho says m - t = s / sqrt((1 + 2 rho) A - 1); D grows with t, so sorting the losses
    finds those bins and no iteration is needed. While all bins stay above t, V = r . L + sqrt(2 rho) std_r(L).
    V is non-decreasing in rho, from r . L (rho = 0) to max L (rho >= (1/r* - 1)/2, r* the share of the worst bins: q is
    then r on those bins).

    Args:
        losses: (..., B) L_b.
        rho: radius in [0, 1e300].
        reference: (B,) or (..., B) r_b >= 0 with sum 1; uniform if None.

    Raises:
        ValueError: a bad argument.

    >>> q, value = chi_square([0.0, 1.0, 2.0], rho=0.25)
    >>> q.round(3), value.round(3)
    (array([0.045, 0.333, 0.622]), np.float64(1.577))
    """
    radius = 2.0 * number("rho", rho, 0.0, 1e300)
    gap, r, top = _below_the_top(losses, reference)
    order = np.argsort(np.where(r > 0, -gap, np.inf), axis=-1, kind="stable")
    share, level = np.take_along_axis(r, order, axis=-1), np.take_along_axis(gap, order, axis=-1)
    # Of the m highest bins, for m = 1..B: mass, mass of the others, mean and root of the summed squares about it
    # (updated as by Welford; sums of squares about 0 would cancel, and squares could underflow).
    mass = np.cumsum(share, axis=-1)
    others = np.zeros_like(mass)
    others[..., :-1] = np.cumsum(share[..., :0:-1], axis=-1)[..., ::-1]
    mean = np.cumsum(share * level, axis=-1) / mass
    step = np.zeros_like(mass)
    step[..., 1:] = np.sqrt(share[..., 1:] * (mass[..., :-1] / mass[..., 1:])) * np.abs(level[..., 1:] - mean[..., :-1])
    deviation = np.hypot.accumulate(step, axis=-1) / np.sqrt(mass)
    lower = np.full_like(mass, np.inf)  # m - t when t falls to the next level
    lower[..., :-1] = mean[..., :-1] - level[..., 1:]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        distance = np.where(lower > 0, ((deviation / lower) ** 2 + others) / mass, np.inf)  # 2 D there
        m = np.argmax(distance <= radius, axis=-1)[..., None]
        mass, others, mean, deviation = (np.take_along_axis(a, m, axis=-1) for a in (mass, others, mean, deviation))
        width = deviation / np.sqrt(np.maximum(radius * mass - others, 0.0))  # below 0 by rounding only
        tilt = np.where(deviation > 0, (level - mean) / width, 0.0)
    sorted_q = np.where(np.arange(level.shape[-1]) <= m, share * (1.0 + tilt) / mass, 0.0)
    q = np.empty_like(sorted_q)
    np.put_along_axis(q, order, np.maximum(sorted_q, 0.0), axis=-1)
    return BestResponse(q, 2.0 * (0.5 * top + (q * gap).sum(axis=-1)))


def _below_the_top(losses: ArrayLike, reference: ArrayLike | None) -> tuple[Floats, Floats, Floats]:
    """Half of L - max L <= 0 (halved, so that no difference overflows), r, and max L, over the bins with r > 0.

    Where r = 0 the first is 0: such a bin gets no mass whatever its loss.
    """
    loss = np.asarray(losses, dtype=np.float64)
    if loss.ndim == 0 or loss.shape[-1] == 0:
        raise ValueError(f"losses must have shape (..., B) with B >= 1, got {loss.shape}")
    check_entries("losses", loss)
    bins = loss.shape[-1]
    r = np.full(bins, 1.0 / bins) if reference is None else np.asarray(reference, dtype=np.float64)
    if r.shape not in ((bins,), loss.shape):
        raise ValueError(f"reference must have shape {(bins,)} or {loss.shape}, got {r.shape}")
    check_entries("reference", r, 0.0)
    total = r.sum(axis=-1, keepdims=True)
    if (np.abs(total - 1.0) > 1e-9).any():
        raise ValueError(f"reference must sum to 1, got {total[np.abs(total - 1.0) > 1e-9].flat[0]}")
    r = np.broadcast_to(r / total, loss.shape)
    top = np.where(r > 0, loss, -np.inf).max(axis=-1, keepdims=True)
    return np.where(r > 0, 0.5 * loss - 0.5 * top, 0.0), r, top[..., 0]
