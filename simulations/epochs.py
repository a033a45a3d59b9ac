"""Which prompts a step offers: epochs of permutations, by the seed alone, so that runs of planners are paired."""

from __future__ import annotations

import numpy as np

from gdro_core import Planner


class Epochs:
    """Batches of distinct prompts; every prompt once an epoch.

    Args:
        prompts: how many there are.
        size: prompts of a batch, at most all.
        rng: of the permutations.
    """

    def __init__(self, prompts: int, size: int, rng: np.random.Generator) -> None:
        self.prompts, self.size, self.rng = prompts, size, rng
        self.queue = np.zeros(0, dtype=np.int64)

    def draw(self) -> list[int]:
        """The next batch; the rest of an epoch goes first, and no prompt comes twice in a batch."""
        if self.queue.size < self.size:
            fresh = self.rng.permutation(self.prompts)
            waiting = np.zeros(self.prompts, dtype=bool)
            waiting[self.queue] = True
            again = waiting[fresh]
            self.queue = np.concatenate([self.queue, fresh[~again], fresh[again]])
        drawn, self.queue = self.queue[: self.size], self.queue[self.size :]
        return [int(i) for i in drawn]


def offered(planner: Planner, batch: int, prompts: int) -> int:
    """Prompts offered to a planner for a budget of n_bar x batch rollouts: its `candidates` (default 1) times batch."""
    return max(1, min(prompts, round(getattr(planner, "candidates", 1.0) * batch)))
