"""When a prompt that is never solved may be given up: evidence that holds whenever one looks (theorem 20)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, check_entries, check_whole, integer


def failure_e_value(failures: ArrayLike, p0: float, successes: ArrayLike = 0) -> Floats:
    r"""Evidence against a pass rate of p0 or more after some failures and successes: an e-value (theorem 20).

        e = (1 / p0) int_0^p0 (q / p0)^K ((1 - q) / (1 - p0))^F dq,       K successes, F failures
          = [1 - (1 - p0)^(F + 1)] / ((F + 1) p0 (1 - p0)^F)              after no success

    If the pass rate, given the past, is never below p0 (it may drift above), e is a supermartingale from 1: the chance
    that it ever reaches 1 / delta is at most delta, whatever the rule by which one stops (Ville). After no success at
    all (1 - p0)^-F is larger and as valid: see `failures_to_give_up`.

    Args:
        failures: F >= 0, integers; broadcast against successes.
        p0: in (0, 1), the least pass rate that is worth rollouts.
        successes: K >= 0, integers.

    Returns:
        float64 array of the common shape; infinite beyond the range of floats.

    Raises:
        ValueError: a bad argument.

    >>> failure_e_value([0, 20, 70, 70], 1 / 16, [0, 0, 0, 1]).round(2)
    array([ 1.  ,  2.06, 20.44,  4.33])
    """
    f, k = np.broadcast_arrays(np.asarray(failures, dtype=np.float64), np.asarray(successes, dtype=np.float64))
    for name, count in (("failures", f), ("successes", k)):
        check_entries(name, count, 0.0, 2**20)
        check_whole(name, count)
    odds = _rate("p0", p0) / (1.0 - p0)
    # e = sum_j P(X = K + 1 + j) / ((K + 1) P(X = K + 1)), X ~ Binomial(F + K + 1, p0): positive terms only
    term = 1.0 / (k + 1.0)
    total = term.copy()
    with np.errstate(over="ignore"):
        for i in range(1, int(f.max(initial=0)) + 1):
            term = term * (np.maximum(f + 1.0 - i, 0.0) / (k + 1.0 + i) * odds)
            total += term
    return np.asarray(total)[()]


def failures_to_give_up(p0: float, delta: float, successes: int = 0) -> int:
    r"""Least number of failures at which `failure_e_value` reaches 1 / delta (theorem 20).

    Giving up there, and at the numbers of other counts of successes, gives up a prompt of pass rate p0 or more with
    probability at most delta in all. If prompts with a success are never given up, fewer failures are enough for the
    same delta: log(delta) / log(1 - p0), 47 instead of 70 at p0 = 1/16 and delta = .05.

    Args:
        p0: in (0, 1), the least pass rate that is worth rollouts.
        delta: in (0, 1).
        successes: K >= 0.

    Raises:
        ValueError: a bad argument.

    >>> failures_to_give_up(1 / 16, 0.05), failures_to_give_up(1 / 16, 0.05, successes=1)
    (70, 106)
    """
    wanted, solved = 1.0 / _rate("delta", delta), integer("successes", successes, 0)
    high = 1
    while failure_e_value(high, p0, solved) < wanted:
        high *= 2
    return int((failure_e_value(np.arange(high + 1), p0, solved) >= wanted).argmax())


def _rate(name: str, value: float) -> float:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie in (0, 1), got {value!r}")
    return float(value)
