"""What every rollout game does with a batch, whatever it plays."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, Ints, floats, integer, integers, number


def checked_bounds(what: str, mean: float, low: int, high: int, fewest: int) -> tuple[float, int, int]:
    """n_bar, n_min and n_max, if fewest <= n_min <= n_bar <= n_max."""
    least = integer(f"min_rollouts{what}", low, fewest)
    most = integer("max_rollouts", high, 1)
    if most < least:
        raise ValueError(f"max_rollouts must be at least min_rollouts = {low}, got {high}")
    return number("mean_rollouts", mean, least, most), least, most


def split_budget(bins: Ints, mean_rollouts: float, budget: int | None = None) -> tuple[Ints, Ints, int]:
    """Prompts of the batch that were never seen (bin −1) get n_bar; the others share what is left.

    Args:
        bins: (N,).
        mean_rollouts: n_bar.
        budget: rollouts in all, if not n_bar N; the first budget / n_bar prompts are then the batch, and the others
            are candidates, of which those never seen get nothing.

    Returns:
        counts: (N,) n_bar rounded for unseen prompts, so that they spend n_bar each on average; 0 for others.
        seen: rows of the prompts that share the rest.
        rest: their rollouts.
    """
    total = round(mean_rollouts * bins.size) if budget is None else budget
    if budget is None and abs(mean_rollouts * bins.size - total) > 1e-9 * total:  # 1.15 x 100 is 114.99999999999999
        raise ValueError(f"mean_rollouts x batch size must be an integer, got {mean_rollouts} x {bins.size}")
    batch = bins.size if budget is None else min(bins.size, int(total / mean_rollouts + 1e-9))
    counts = np.zeros(bins.shape, dtype=np.int64)
    new, seen = np.flatnonzero(bins[:batch] < 0), np.flatnonzero(bins >= 0)
    new_total = round(mean_rollouts * new.size) if seen.size else total
    counts[new] = int(mean_rollouts)
    counts[new[: new_total - int(counts.sum())]] += 1  # n_bar that is not whole: some get one more
    return counts, seen, total - new_total


class CountsPerBin(ABC):
    """One count for all prompts of a bin, under the exact budget, chosen by a score of each count n_min..n_max.

    Args:
        num_bins: B.
        mean_rollouts: n_bar; n_bar N must be an integer.
        min_rollouts: n_min >= 1.
        max_rollouts: n_max; n_min <= n_bar <= n_max.
    """

    def __init__(self, num_bins: int, mean_rollouts: float, min_rollouts: int, max_rollouts: int) -> None:
        self.num_bins = integer("num_bins", num_bins, 1)
        bounds = checked_bounds("", mean_rollouts, min_rollouts, max_rollouts, fewest=1)
        self.mean_rollouts, self.min_rollouts, self.max_rollouts = bounds
        self._scores = np.zeros((self.num_bins, self.arms.size))

    @property
    def arms(self) -> Ints:
        """(A,) the counts n_min, ..., n_max."""
        return np.arange(self.min_rollouts, self.max_rollouts + 1)

    @property
    def arm_probabilities(self) -> Floats:
        """(B, A) p_b(n)."""
        return np.asarray(np.exp(self._log_arm_probabilities))

    @property
    @abstractmethod
    def _log_arm_probabilities(self) -> Floats:
        """(B, A) log p_b(n), by the scores."""

    @abstractmethod
    def _choose(self, log_p: Floats, size: Ints, budget: int, rng: np.random.Generator | None) -> Ints:
        """The counts of the bins present, by (bins, A) log probabilities and their numbers of prompts."""

    def counts(self, bins: ArrayLike, *, rng: np.random.Generator | None = None) -> Ints:
        """Rollouts of each prompt of a batch.

        Args:
            bins: (N,) in −1..B − 1; prompts never seen (−1) get n_bar.
            rng: draws, or breaks ties at random.

        Returns:
            (N,) integers in n_min..n_max with sum n_bar N.

        Raises:
            ValueError: n_bar N is no integer, no choice per bin meets the budget, or no rng to draw with.
        """
        group = integers("bins", bins, (-1,), -1, self.num_bins - 1)
        counts, seen, budget = split_budget(group, self.mean_rollouts)
        if seen.size:
            present, member, size = np.unique(group[seen], return_inverse=True, return_counts=True)
            counts[seen] = self._choose(self._log_arm_probabilities[present], size, budget, rng)[member]
        return counts

    def _played(
        self, bins: ArrayLike, counts: ArrayLike, losses: ArrayLike
    ) -> tuple[Ints, tuple[Ints, Ints], Ints, Floats]:
        """Of a batch with one count a bin: all counts, the played entries of the scores, prompts and mean loss there.

        Raises:
            ValueError: a bad argument, or prompts of a bin with different counts.
        """
        group = integers("bins", bins, (-1,), -1, self.num_bins - 1)
        n = integers("counts", counts, group.shape, self.min_rollouts, self.max_rollouts)
        loss = floats("losses", losses, group.shape)
        members = {int(b): group == b for b in np.unique(group[group >= 0])}
        for b, rows in members.items():
            if np.ptp(n[rows]):
                raise ValueError(f"counts must be the same for all prompts of bin {b}, got {n[rows].tolist()}")
        present = np.array(list(members), dtype=np.int64)
        played = np.array([n[rows][0] for rows in members.values()], dtype=np.int64)
        size = np.array([rows.sum() for rows in members.values()], dtype=np.int64)
        mean_loss = np.array([loss[rows].mean() for rows in members.values()])
        return n, (present, played - self.min_rollouts), size, mean_loss
