"""Weights that are not to cost mean reward: how far a step may move from uniform weights (theorem 19).

Rare right answers may be lucky, and a gradient that helps them may oppose the rest. Difficulty alone cannot see that;
the agreement of a bin's gradient with the gradient of mean reward can.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import floats, number


def guarded_share(
    agreement: ArrayLike, share: ArrayLike, weights: ArrayLike, alpha: float, *, radius: ArrayLike = 0.0
) -> float:
    r"""Largest share of wanted weights, the rest uniform, that keeps the gain of mean reward (theorem 19).

    Weights (1 - m) + m w_b change mean reward, to first order, by sum_b p_b ((1 - m) + m w_b) a_b. The share m is the
    largest in [0, 1] for which this is at least (1 - alpha) times that of uniform weights, sum_b p_b a_b, for every
    agreement within `radius` of the one given. Without a radius and for S_0 >= 0, with S_1 = sum_b p_b w_b a_b:

        m = 1 if S_1 >= (1 - alpha) S_0,     else alpha S_0 / (S_0 - S_1)

    If no share keeps that much, as where uniform weights themselves do not surely gain, m = 0. With intervals that
    cover all agreements at once with probability 1 - delta, so does the guarantee of every m > 0.

    Args:
        agreement: (B,) a_b = <g_b, g>: gradient of the bin against that of mean reward.
        share: (B,) p_b >= 0 of the prompts, sum 1.
        weights: (B,) w_b >= 0; scaled so that their step is not longer than that of uniform weights, the guarantee
            holds for normalised steps too.
        alpha: in [0, 1], the part of uniform's gain that may be given away.
        radius: scalar or (B,) >= 0, half-widths of intervals around `agreement`.

    Raises:
        ValueError: a bad argument.

    >>> guarded_share([1.0, -0.5], [0.5, 0.5], [0.5, 1.5], alpha=0.2)  # S_0 = .25, S_1 = -.125
    0.13333333333333333
    >>> guarded_share([1.0, -0.5], [0.5, 0.5], [0.5, 1.5], alpha=0.2, radius=0.1)
    0.07999999999999999
    """
    a = floats("agreement", agreement, (-1,))
    p = floats("share", share, a.shape, 0.0)
    if abs(p.sum() - 1.0) > 1e-9:
        raise ValueError(f"share must sum to 1, got {p.sum()}")
    w = floats("weights", weights, a.shape, 0.0)
    slack = number("alpha", alpha, 0.0, 1.0)
    width = floats("radius", np.full(a.shape, radius) if np.ndim(radius) == 0 else radius, a.shape, 0.0)
    falling = w < 1.0
    kinks = slack / (1.0 - w[falling])  # where the factor of a bin, alpha + m (w_b - 1), turns negative
    shares = np.unique(np.concatenate([[0.0, 1.0], kinks[kinks < 1.0]]))
    factor = p * (slack + shares[:, None] * (w - 1.0))
    surplus = factor @ a - np.abs(factor) @ width  # concave and piecewise linear between `shares`
    kept = np.flatnonzero(surplus >= 0.0)
    if kept.size == 0:
        return 0.0
    last = int(kept[-1])
    if last == shares.size - 1:
        return 1.0
    above, below = surplus[last], surplus[last + 1]
    return float(shares[last] + (shares[last + 1] - shares[last]) * above / (above - below))
