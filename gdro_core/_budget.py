"""What every rollout game does with a batch, whatever it plays."""

from __future__ import annotations

import numpy as np

from gdro_core._validate import Floats, Ints, integer, number


def checked_bounds(what: str, mean: float, low: int, high: int, fewest: int) -> tuple[float, int, int]:
    """n_bar, n_min and n_max, if fewest <= n_min <= n_bar <= n_max."""
    least = integer(f"min_rollouts{what}", low, fewest)
    most = integer("max_rollouts", high, 1)
    if most < least:
        raise ValueError(f"max_rollouts must be at least min_rollouts = {low}, got {high}")
    return number("mean_rollouts", mean, least, most), least, most


def split_budget(bins: Ints, mean_rollouts: float) -> tuple[Ints, Ints, int]:
    """Prompts never seen (bin −1) get n_bar; the others share what is left.

    Returns:
        counts: (N,) n_bar rounded for all, so that unseen prompts spend n_bar each on average.
        seen: rows of the other prompts.
        budget: their rollouts.
    """
    total = round(mean_rollouts * bins.size)
    if abs(mean_rollouts * bins.size - total) > 1e-9 * total:  # 1.15 x 100 is 114.99999999999999
        raise ValueError(f"mean_rollouts x batch size must be an integer, got {mean_rollouts} x {bins.size}")
    counts = np.full(bins.shape, int(mean_rollouts), dtype=np.int64)
    new, seen = np.flatnonzero(bins < 0), np.flatnonzero(bins >= 0)
    spent_on_new = round(mean_rollouts * new.size)
    counts[new[: spent_on_new - int(counts[new].sum())]] += 1  # n_bar that is not whole: some get one more
    return counts, seen, total - spent_on_new


def played_arms(bins: Ints, counts: Ints, losses: Floats) -> tuple[Ints, Ints, Ints, Floats]:
    """The bins present, and of each its prompts, its count and its mean loss, in a batch with one count a bin."""
    members = {int(b): bins == b for b in np.unique(bins[bins >= 0])}
    for b, rows in members.items():
        if np.ptp(counts[rows]):
            raise ValueError(f"counts must be the same for all prompts of bin {b}, got {counts[rows].tolist()}")
    present = np.array(list(members), dtype=np.int64)
    size = np.array([rows.sum() for rows in members.values()], dtype=np.int64)
    played = np.array([counts[rows][0] for rows in members.values()], dtype=np.int64)
    return present, size, played, np.array([losses[rows].mean() for rows in members.values()])
