"""Estimates from samples: pass@k without bias."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, integer, integers


def pass_at_k(correct: ArrayLike, trials: ArrayLike, k: int) -> Floats:
    r"""Unbiased estimate of 1 - (1 - p)^k from c successes in n trials (theory test 14; Chen et al. 2021).

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{j<k} (n - c - j)_+ / (n - j)

    Args:
        correct: c, integers in [0, n]; any shape.
        trials: n, integers, broadcast against `correct`.
        k: samples a solver may draw, 1 <= k <= every n (there is no unbiased estimate from fewer trials).

    Returns:
        float64 array of the common shape.

    Raises:
        ValueError: k < 1, k > some n, or c outside [0, n].

    >>> pass_at_k([0, 1, 2, 8], 8, 2).round(4)
    array([0.    , 0.25  , 0.4643, 1.    ])
    """
    k = integer("k", k, 1)
    c, n = np.broadcast_arrays(np.asarray(correct, dtype=np.float64), np.asarray(trials, dtype=np.float64))
    integers("trials", n.ravel(), (-1,), 0, 2**53)
    integers("correct", c.ravel(), (-1,), 0, 2**53)
    if (n < k).any():
        raise ValueError(f"trials must be at least k = {k}, got {n.min():g}")
    if (c > n).any():
        raise ValueError(f"correct must be at most trials, got {c[c > n].flat[0]:g} of {n[c > n].flat[0]:g}")
    j = np.arange(k, dtype=np.float64)
    failed = np.maximum(n[..., None] - c[..., None] - j, 0.0) / (n[..., None] - j)
    return np.asarray(1.0 - failed.prod(axis=-1))
