"""Which of several candidate prompts are worth a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Ints, floats, integer


def nearest_to_half(a: ArrayLike, b: ArrayLike, size: int, rng: np.random.Generator) -> Ints:
    """Rows of the candidates whose drawn pass rates p ~ Beta(a, b) are nearest to 1/2: MoPPS (arXiv 2507.04632).

    Drawing p instead of taking its mean is Thompson sampling: uncertain prompts are tried.

    Args:
        a: (M,) > 0, posterior successes of the candidates.
        b: (M,) > 0, posterior failures.
        size: how many to choose, at most M.
        rng: draws.

    Returns:
        (size,) rows, the nearest first; the earlier row where two are equally near.

    >>> nearest_to_half([500.0, 900.0, 100.0], [500.0, 100.0, 900.0], 1, np.random.default_rng(0))
    array([0])
    """
    alpha = floats("a", a, (-1,), 0.0)
    draws = rng.beta(alpha, floats("b", b, alpha.shape, 0.0))
    wanted = integer("size", size, 0)
    if wanted > alpha.size:
        raise ValueError(f"size must be at most the {alpha.size} candidates, got {wanted}")
    return np.argsort(np.abs(draws - 0.5), kind="stable")[:wanted]
