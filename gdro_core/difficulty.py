"""How hard a prompt is for the present policy: online difficulty bins, looked up by prompt id (§3.1)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gdro_core._validate import Floats, Ints, choice, floats, integer, integers, number, state, unique_ids

STATISTICS = ("pass_rate", "pass@k", "any")


class OnlineDifficultyClassifier:
    r"""Bins of prompts by a running estimate of how often the policy solves them; bin 0 is the hardest.

    Each prompt carries a discounted Beta posterior of its pass rate,

        a <- d a + c,   b <- d b + (n - c),   p ~ Beta(a_0 + a, b_0 + b)

    and is binned by `statistic`:

    - `"pass_rate"` (default): posterior mean of p. It estimates p whatever n is, so allocation does not feed back
      as it does with any-of-n (F10); what is left is shrinkage to the prior: at d = 1, after n rollouts, a bias of
      (a_0 + b_0) / (a_0 + b_0 + n) (prior mean - p).
      Departs: the paper bins by the moving pass@k of Eq. 10.
    - `"pass@k"`: posterior mean of 1 - (1 - p)^k = 1 - prod_{j<k} (b + j) / (a + b + j).
    - `"any"` (published, Eq. 10): share of the last `window` visits with any correct rollout.

    Bin edges are 0 = a_0 < edges < a_B = 1; bin j holds [a_j, a_{j+1}) (Eq. 11). With `hysteresis` δ a prompt leaves
    its bin only when its estimate passes an edge by δ, in either direction. A prompt never observed is in bin −1.

    Args:
        edges: (B - 1,) interior edges, strictly increasing in (0, 1).
        statistic: see above.
        k: of pass@k; used by `"pass@k"` only.
        discount: d in (0, 1], weight of the past at each visit; 1 keeps everything.
        prior: (a_0, b_0) > 0.
        window: H visits, used by `"any"` only.
        hysteresis: δ >= 0, smaller than half of the narrowest bin.

    Memory: struct of arrays, 18 bytes a prompt (and H more for `"any"`) besides the map from ids.

    >>> classifier = OnlineDifficultyClassifier(edges=[0.25, 0.75])
    >>> classifier.observe(["easy", "hard"], correct=[8, 0], trials=[8, 8])
    >>> classifier.bins(["easy", "hard", "new"])
    array([ 2,  0, -1])
    """

    def __init__(
        self,
        edges: ArrayLike = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        statistic: str = "pass_rate",
        *,
        k: int = 8,
        discount: float = 0.5,
        prior: tuple[float, float] = (0.5, 0.5),
        window: int = 100,
        hysteresis: float = 0.0,
    ) -> None:
        self.edges = floats("edges", edges, (-1,), 0.0, 1.0)
        bounds = np.concatenate([[0.0], self.edges, [1.0]])
        if (np.diff(bounds) <= 0).any():
            raise ValueError(f"edges must increase strictly inside (0, 1), got {self.edges.tolist()}")
        if self.edges.size > 32766:
            raise ValueError(f"edges must hold at most 32766 values, got {self.edges.size}")
        self.statistic = choice("statistic", statistic, STATISTICS)
        self.k = integer("k", k, 1)
        self.discount = number("discount", discount, 0.0, 1.0, open_low=True)
        self.prior = (
            number("prior[0]", prior[0], 0.0, open_low=True),
            number("prior[1]", prior[1], 0.0, open_low=True),
        )
        self.window = integer("window", window, 1)
        self.hysteresis = number("hysteresis", hysteresis, 0.0)
        if self.hysteresis > 0 and self.hysteresis >= np.diff(bounds).min() / 2:
            raise ValueError(
                f"hysteresis must be below half the narrowest bin ({np.diff(bounds).min() / 2:g}), got {hysteresis!r}"
            )
        self._row: dict[Hashable, int] = {}
        self._successes, self._failures, self._bin, self._history = self._arrays(0)

    @property
    def num_bins(self) -> int:
        """B, the number of bins (the unseen state −1 not counted)."""
        return self.edges.size + 1

    def __len__(self) -> int:
        """Number of prompts observed so far."""
        return len(self._row)

    def bins(self, ids: Sequence[Hashable]) -> Ints:
        """(N,) bin of each prompt, 0 (hardest) to B − 1; −1 if never observed."""
        rows = self._rows(ids)
        return np.where(rows >= 0, self._bin[rows], -1).astype(np.int64) if len(self) else rows

    def posterior(self, ids: Sequence[Hashable]) -> tuple[Floats, Floats]:
        """(N,) and (N,): parameters of each prompt's Beta posterior; the prior's if never observed."""
        rows = self._rows(ids)
        if not len(self):
            return np.full(rows.shape, self.prior[0]), np.full(rows.shape, self.prior[1])
        seen = rows >= 0
        return (
            self.prior[0] + np.where(seen, self._successes[rows], 0.0),
            self.prior[1] + np.where(seen, self._failures[rows], 0.0),
        )

    def pass_rate(self, ids: Sequence[Hashable]) -> Floats:
        """(N,) posterior mean of each prompt's pass rate, in (0, 1)."""
        a, b = self.posterior(ids)
        return a / (a + b)

    def observe(self, ids: Sequence[Hashable], correct: ArrayLike, trials: ArrayLike) -> None:
        """Count c correct among n rollouts of each prompt. A prompt with n = 0 tells nothing and is passed over.

        Args:
            ids: N unique ids.
            correct: (N,) c in [0, n]; fractions are partial credit.
            trials: (N,) n >= 0.

        Raises:
            ValueError: naming the argument; nothing has changed then.
        """
        names = unique_ids(ids)
        n = floats("trials", trials, (len(names),), 0.0)
        c = floats("correct", correct, (len(names),), 0.0)
        if (c > n).any():
            raise ValueError(f"correct must be at most trials, got {c[c > n][0]} of {n[c > n][0]}")
        told = n > 0
        names, c, n = [name for name, keep in zip(names, told, strict=True) if keep], c[told], n[told]
        for name in names:
            self._row.setdefault(name, len(self._row))
        self._grow(len(self._row))
        rows = self._rows(names)
        self._successes[rows] = self.discount * self._successes[rows] + c
        self._failures[rows] = self.discount * self._failures[rows] + (n - c)
        if self.statistic == "any":
            self._history[rows] = np.roll(self._history[rows], 1, axis=1)
            self._history[rows, 0] = c > 0
        estimate = self._estimate(rows)
        present = self._bin[rows]
        up = np.digitize(estimate - self.hysteresis, self.edges)
        down = np.digitize(estimate + self.hysteresis, self.edges)
        moved = np.where(up > present, up, np.where(down < present, down, present))
        self._bin[rows] = np.where(present < 0, np.digitize(estimate, self.edges), moved)

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain lists and numbers (JSON- and torch-serialisable if the ids are)."""
        size = len(self)
        return {
            **self._settings(),
            "ids": list(self._row),
            "successes": self._successes[:size].tolist(),
            "failures": self._failures[:size].tolist(),
            "bin": self._bin[:size].tolist(),
            "history": self._history[:size].tolist(),
        }

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a classifier with the same settings; on ValueError nothing has changed."""
        state("OnlineDifficultyClassifier", found, self._settings())
        ids = unique_ids(found["ids"]) if found["ids"] else []
        size = len(ids)
        successes = floats("successes", found["successes"], (size,), 0.0)
        failures = floats("failures", found["failures"], (size,), 0.0)
        bins = integers("bin", found["bin"], (size,), 0, self.num_bins - 1)
        width = self._arrays(0)[3].shape[1]
        history = integers("history", found["history"] if size else np.empty((0, width)), (size, width), -1, 1)
        self._row = {name: row for row, name in enumerate(ids)}
        self._successes, self._failures, self._bin, self._history = self._arrays(size)
        self._successes[:], self._failures[:], self._bin[:], self._history[:] = successes, failures, bins, history

    def _settings(self) -> dict[str, Any]:
        return {
            "version": 1,
            "edges": self.edges.tolist(),
            "statistic": self.statistic,
            "k": self.k,
            "discount": self.discount,
            "prior": list(self.prior),
            "window": self.window,
            "hysteresis": self.hysteresis,
        }

    def _arrays(self, size: int) -> tuple[Floats, Floats, NDArray[np.int16], NDArray[np.int8]]:
        history = np.full((size, self.window if self.statistic == "any" else 0), -1, dtype=np.int8)  # -1: no visit
        return np.zeros(size), np.zeros(size), np.full(size, -1, dtype=np.int16), history

    def _grow(self, size: int) -> None:
        if size > self._bin.size:
            extra = self._arrays(max(size, 2 * self._bin.size) - self._bin.size)
            self._successes = np.concatenate([self._successes, extra[0]])
            self._failures = np.concatenate([self._failures, extra[1]])
            self._bin = np.concatenate([self._bin, extra[2]])
            self._history = np.concatenate([self._history, extra[3]])

    def _rows(self, ids: Sequence[Hashable]) -> Ints:
        return np.fromiter(map(self._row.get, ids, repeat(-1)), dtype=np.int64, count=len(ids))

    def _estimate(self, rows: Ints) -> Floats:
        if self.statistic == "any":
            visits = self._history[rows]
            return np.asarray((visits == 1).sum(axis=1) / (visits >= 0).sum(axis=1), dtype=np.float64)
        a, b = self.prior[0] + self._successes[rows], self.prior[1] + self._failures[rows]
        if self.statistic == "pass@k":
            tries = np.arange(self.k)
            return np.asarray(1.0 - ((b[:, None] + tries) / ((a + b)[:, None] + tries)).prod(axis=1))
        return a / (a + b)
