"""How hard a prompt is for the present policy: online difficulty bins, looked up by prompt id (§3.1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gdro_core._old_states import classifier_2, classifier_3, classifier_4
from gdro_core._rows import RowIndex, repeats, where
from gdro_core._validate import (
    Floats,
    Ints,
    check_entries,
    check_state,
    check_unique,
    dials,
    floats,
    integer,
    number,
)
from gdro_core.prior import START, LearntPrior

Arrays = dict[str, NDArray[Any]]  # a row a prompt


def equal_edges(num_bins: int) -> Floats:
    """(B - 1,) interior edges of B bins of equal width.

    >>> equal_edges(4)
    array([0.25, 0.5 , 0.75])
    """
    bins = integer("num_bins", num_bins, 1)
    return np.arange(1, bins) / bins  # 3 / 10 is 0.3, as one writes it and as posterior means round


class Statistic(ABC):
    """What prompts are binned by: an estimate in [0, 1] of how often the policy solves them.

    A statistic is its dials, frozen. To add one, derive from this class as a frozen dataclass and write `estimate`; one
    that remembers more than the posterior brings arrays of its own (`PublishedController`'s `AnyOfN` does).

    >>> PassAtK(2).estimate(np.array([1.0]), np.array([1.0]), {})  # 1 - E[(1 - p)^2] for p ~ Beta(1, 1)
    array([0.66666667])
    """

    @abstractmethod
    def estimate(self, a: Floats, b: Floats, memory: Arrays) -> Floats:
        """(N,) estimates, from the (N,) parameters of the Beta posteriors and the rows of the statistic's arrays."""

    def arrays(self, rows: int) -> Arrays:
        """Arrays besides the posterior's, for so many unseen prompts."""
        return {}

    def observe(self, memory: Arrays, rows: Ints, correct: Floats) -> None:  # noqa: B027  # most have no arrays
        """Update the statistic's arrays at the (N,) rows of a batch, of which so many rollouts were correct."""

    def check(self, memory: Arrays) -> None:  # noqa: B027
        """Raise ValueError where loaded arrays contradict each other."""


@dataclass(frozen=True)
class PassRate(Statistic):
    """Posterior mean of the pass rate p.

    >>> PassRate().estimate(np.array([3.0]), np.array([1.0]), {})
    array([0.75])
    """

    def estimate(self, a: Floats, b: Floats, memory: Arrays) -> Floats:
        """See `Statistic.estimate`."""
        return a / (a + b)


@dataclass(frozen=True)
class PassAtK(Statistic):
    """Posterior mean of pass@k, 1 - E[(1 - p)^k] = 1 - prod_{j<k} (b + j) / (a + b + j).

    >>> PassAtK(1).estimate(np.array([3.0]), np.array([1.0]), {})
    array([0.75])
    """

    k: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", integer("k", self.k, 1))

    def estimate(self, a: Floats, b: Floats, memory: Arrays) -> Floats:
        """See `Statistic.estimate`."""
        none_right = np.ones(a.size)
        for j in range(self.k):
            none_right *= (b + j) / (a + b + j)
        return 1.0 - none_right


class OnlineDifficultyClassifier:
    r"""Bins of prompts by a running estimate of how often the policy solves them; bin 0 is the hardest.

    Each prompt carries a discounted Beta posterior of its pass rate,

        a <- d a + c,   b <- d b + (n - c),   p ~ Beta(a_0 + a, b_0 + b)

    and is binned by `statistic`:

    - `PassRate()` (default): posterior mean of p. It estimates p whatever n is, so allocation does not feed back
      as it does with any-of-n (F10); what is left is shrinkage to the prior: at d = 1, after n rollouts, a bias of
      (a_0 + b_0) / (a_0 + b_0 + n) (prior mean - p).
    - `PassAtK(k)`: posterior mean of 1 - (1 - p)^k.

    Departs: the paper bins by the moving share of visits with any correct rollout (Eq. 10), `published.AnyOfN`.

    Bin edges are 0 = a_0 < edges < a_B = 1; bin j holds [a_j, a_{j+1}) (Eq. 11). With `hysteresis` δ a prompt leaves
    its bin only when its estimate passes an edge by δ, in either direction. A prompt never observed is in bin −1.

    With `confidence` δ the first bin is the estimate's, and a prompt leaves its bin, for the estimate's, only when a
    confidence sequence excludes the whole bin: Robbins' method of mixtures, here the prior-posterior ratio of
    Waudby-Smith and Ramdas (2020, arXiv 2006.04347). With c of n rollouts correct so far and Β the Beta function,

        C_n = {p : M_n(p) < 1/δ},   M_n(p) = Β(a_0 + c, b_0 + n - c) / Β(a_0, b_0) / (p^c (1 - p)^(n-c))

    Theorem 11. Let each reward lie in [0, 1] with mean p given all before it (n may depend on the past). With
    probability at least 1 - δ per prompt, at all times at once: p is in C_n; the prompt leaves no bin whose closed
    interval holds p, and any other only in the direction of p; its bin lies within sqrt(2 log(2 sqrt(n) / δ) / n) of p
    (for prior (1/2, 1/2) and rewards 0 or 1). As n grows without bound it almost surely settles where p is.
    Proof. x -> (t/p)^x ((1-t)/(1-p))^(1-x) is convex, so its mean is at most that of its chord over [0, 1], which is 1:
    M_n(p), a mixture over t, is a supermartingale from 1, and Ville gives P(sup_n M_n(p) >= 1/δ) <= δ. log M_n is
    convex in p with its minimum at c/n, so C_n is an interval, and a bin is excluded iff M_n >= 1/δ at its point
    nearest to c/n. With f(t) = t^-c (1-t)^-(n-c), convex, and the posterior mean m, M_n(m) = f(m) / E[f | data] <= 1
    (Jensen): the estimate is never excluded, so a move ends in a bin that meets C_n, on p's side of the one left. The
    width is by Krichevsky and Trofimov's M_n(p) >= exp(n kl(c/n, p)) / (2 sqrt(n)) and Pinsker. At last M_n(p) -> 0
    (law of the iterated logarithm), while M_n -> inf uniformly outside of any neighbourhood of p.
    The chance of ever being in a wrong bin cannot be held below δ, but by leaving prompts near an edge unbinned.

    Args:
        edges: (B - 1,) interior edges, strictly increasing in (0, 1).
        statistic: `PassRate()`, `PassAtK(k)`, or one of your own.
        discount: d in (0, 1], weight of the past at each visit; 1 keeps everything.
        prior: (a_0, b_0) > 0, or a `LearntPrior` of this classifier alone: the posterior of a prompt, and its bin, then
            move with the others' improvement since its last visit. Two numbers with `confidence`.
        hysteresis: δ >= 0, smaller than half of the narrowest bin.
        confidence: δ in (0, 1), chance of error per prompt, or None. Needs `PassRate()` (the bins of pass@k are those
            of p with edges 1 - (1 - edge)^(1/k)), hysteresis 0 and, as C_n needs undiscounted counts, discount 1: it
            is for a policy that does not change, or changes slowly.
        idle_discount: in (0, 1], weight of the past when a prompt is passed over (n = 0): below 1 doubt about it grows
            until it is tried again. Must be 1 with `confidence`.

    Ids are any hashable, unique in a batch; equal ids are one prompt, as in a dict (3, np.int64(3), 3.0). An array of
    integers is looked up without a Python loop; the first id of another type moves all of them into a dict for good.

    Memory: struct of arrays, 18 bytes a prompt (22 with a learnt prior) and what the statistic adds, at most a tenth of
    it spare, besides the ids: 16 bytes an integer, or a dict.

    >>> classifier = OnlineDifficultyClassifier(edges=[0.25, 0.75])
    >>> classifier.observe(["easy", "hard"], correct=[8, 0], trials=[8, 8])
    >>> classifier.bins(["easy", "hard", "new"])
    array([ 2,  0, -1])
    """

    def __init__(
        self,
        edges: ArrayLike = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        statistic: Statistic = PassRate(),
        *,
        discount: float = 0.8,
        prior: tuple[float, float] | LearntPrior = (0.5, 0.5),
        hysteresis: float = 0.0,
        confidence: float | None = None,
        idle_discount: float = 1.0,
    ) -> None:
        self.edges = floats("edges", edges, (-1,), 0.0, 1.0)
        self._bounds = np.concatenate([[0.0], self.edges, [1.0]])
        narrowest = np.diff(self._bounds).min()
        if narrowest <= 0:
            raise ValueError(f"edges must increase strictly inside (0, 1), got {self.edges.tolist()}")
        if self.edges.size > 32766:
            raise ValueError(f"edges must hold at most 32766 values, got {self.edges.size}")
        if not isinstance(statistic, Statistic):
            raise ValueError(f"statistic must be an object such as gdro_core.PassRate(), got {statistic!r}")
        self.statistic = statistic
        self.discount = number("discount", discount, 0.0, 1.0, open_low=True)
        self.learnt = prior if isinstance(prior, LearntPrior) else None
        first, second = START if isinstance(prior, LearntPrior) else prior
        self._fixed = number("prior[0]", first, 0.0, open_low=True), number("prior[1]", second, 0.0, open_low=True)
        self.hysteresis = number("hysteresis", hysteresis, 0.0)
        if self.hysteresis > 0 and self.hysteresis >= narrowest / 2:
            raise ValueError(f"hysteresis must be below half the narrowest bin ({narrowest / 2:g}), got {hysteresis!r}")
        if confidence is not None and not 0 < confidence < 1:
            raise ValueError(f"confidence must lie in (0, 1) or be None, got {confidence!r}")
        self.confidence = None if confidence is None else float(confidence)
        self.idle_discount = number("idle_discount", idle_discount, 0.0, 1.0, open_low=True)
        needs = {"statistic": PassRate(), "discount": 1.0, "hysteresis": 0.0, "idle_discount": 1.0}
        for name, needed in needs.items():
            if confidence is not None and getattr(self, name) != needed:
                raise ValueError(f"{name} must be {needed!r} with confidence, got {getattr(self, name)!r}")
        if confidence is not None and self.learnt is not None:
            raise ValueError(f"prior must be two numbers with confidence, got {prior!r}")
        self._index = RowIndex()
        self._memory = self._unseen(1)

    @property
    def prior(self) -> tuple[float, float]:
        """(a_0, b_0), as learnt so far with a `LearntPrior`."""
        return self._fixed if self.learnt is None else self.learnt.parameters

    @property
    def num_bins(self) -> int:
        """B, the number of bins (the unseen state −1 not counted)."""
        return self.edges.size + 1

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, spare rows included; the ids are not."""
        return sum(array.nbytes for array in self._memory.values())

    def __len__(self) -> int:
        """Number of prompts observed so far."""
        return self._index.size

    def bins(self, ids: Sequence[Hashable] | NDArray[Any]) -> Ints:
        """(N,) bin of each prompt, 0 (hardest) to B − 1; −1 if never observed."""
        rows = self._index.find(ids)[1]
        if self.learnt is None:
            return self._memory["bin"][rows].astype(np.int64)
        return np.where(rows < 0, -1, self._rebin(rows))

    def posterior(self, ids: Sequence[Hashable] | NDArray[Any]) -> tuple[Floats, Floats]:
        """(N,) and (N,): parameters of each prompt's Beta posterior; the prior's if never observed."""
        return self._posterior(self._index.find(ids)[1])

    def pass_rate(self, ids: Sequence[Hashable] | NDArray[Any]) -> Floats:
        """(N,) posterior mean of each prompt's pass rate, in (0, 1)."""
        a, b = self.posterior(ids)
        return a / (a + b)

    def observe(self, ids: Sequence[Hashable] | NDArray[Any], correct: ArrayLike, trials: ArrayLike) -> None:
        """Count c correct among n rollouts of each prompt; at n = 0 what is known of it fades by `idle_discount`.

        Args:
            ids: N unique ids.
            correct: (N,) c in [0, n]; fractions are partial credit.
            trials: (N,) n >= 0.

        Raises:
            ValueError: naming the argument; nothing has changed then.
        """
        names, rows = self._index.find(ids)
        if not len(names) or repeats(rows[rows >= 0]) or repeats(where(names, rows < 0)):
            check_unique(names if isinstance(names, list) else names.tolist())
        n = floats("trials", trials, (len(names),), 0.0)
        c = floats("correct", correct, (len(names),), 0.0)
        if (c > n).any():
            raise ValueError(f"correct must be at most trials, got {c[c > n][0]} of {n[c > n][0]}")
        graded = n > 0
        idle = rows[~graded & (rows >= 0)]
        self._grow(len(self) + int(np.count_nonzero(graded & (rows < 0))))
        rows, c, n = self._index.add(names, rows, graded)[graded], c[graded], n[graded]
        memory = self._memory
        if self.learnt is not None:
            self._learn(self.learnt, rows, c, n)
        memory["successes"][rows] = self.discount * memory["successes"][rows] + c
        memory["failures"][rows] = self.discount * memory["failures"][rows] + (n - c)
        self.statistic.observe(memory, rows, c)
        if self.idle_discount < 1.0 and idle.size:
            for name in ("successes", "failures"):
                memory[name][idle] *= self.idle_discount
            rows = np.concatenate([rows, idle])
        memory["bin"][rows] = self._rebin(rows)

    def _learn(self, learnt: LearntPrior, rows: Ints, c: Floats, n: Floats) -> None:
        """Tell the prior of graded prompts, and bring what is known of them to the present."""
        memory, (a, b), age = self._memory, self._posterior(rows), self._age(learnt, rows)
        counts = learnt.moved(memory["successes"][rows], memory["failures"][rows], age)
        memory["successes"][rows], memory["failures"][rows] = counts
        learnt.observe(a, b, age, c, n, age == 0.0)
        memory["visited"][rows] = learnt.step

    def _age(self, learnt: LearntPrior, rows: Ints) -> Floats:
        """Steps from a prompt's last visit to the next that is observed; 0 if never observed."""
        bins, visited = self._memory["bin"][rows], self._memory["visited"][rows]
        return np.where(bins < 0, 0.0, learnt.step + 1.0 - visited)

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as numbers, strings and lists, for JSON and `torch.load(weights_only=True)`.

        Arrays, and ids that are all integers, are base64 of little-endian bytes in the order of first observation.

        Raises:
            ValueError: an id is not a str, number, bool or None, nor a tuple of such.
        """
        ids = self._index.ids()
        arrays = {name: _packed(array[: len(self)]) for name, array in self._memory.items()}
        names = list(_plain(ids)) if isinstance(ids, list) else _packed(ids)
        learnt = None if self.learnt is None else self.learnt.state_dict()
        return {**self._settings(), "learnt": learnt, "ids": names, **arrays}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue bit for bit from `state_dict()` of a classifier with the same settings.

        With a learnt prior also from one without, as if all its prompts were visited last now.

        Raises:
            ValueError: other settings or version, a missing key, a damaged array; nothing has changed then.
        """
        for version, newer in ((2, classifier_2), (3, classifier_3), (4, classifier_4)):
            if saved.get("version") == version:
                saved = newer(saved)
        check_state("OnlineDifficultyClassifier", saved, self._settings(), ("learnt",))
        learnt, past = None if self.learnt is None else LearntPrior(), saved["learnt"]
        if past is not None:
            if learnt is None:
                raise ValueError("state of OnlineDifficultyClassifier has a learnt prior, this one does not")
            learnt.load_state_dict(past)
        lacking = {"visited"} if past is None else set()
        kept = [name for name in self._memory if name not in lacking]
        check_state("OnlineDifficultyClassifier", saved, {}, ("ids", *kept))
        plain = _plain(saved["ids"])
        ids = list(plain) if isinstance(plain, tuple) else _unpacked("ids", plain, np.dtype(np.int64), (-1,))
        index = RowIndex()
        names, rows = index.find(ids)
        if repeats(names):
            check_unique(names if isinstance(names, list) else names.tolist())
        index.add(names, rows, rows < 0)
        size = index.size
        memory = self._unseen(size + 1)
        for name in kept:
            array = memory[name]
            array[:size] = _unpacked(name, saved[name], array.dtype, (size, *array.shape[1:]))
        check_entries("successes", memory["successes"], 0.0)
        check_entries("failures", memory["failures"], 0.0)
        check_entries("bin", memory["bin"][:size].astype(np.float64), 0, self.num_bins - 1)
        if learnt is not None:
            check_entries("visited", memory["visited"][:size].astype(np.float64), 0, learnt.step)
        self.statistic.check({name: array[:size] for name, array in memory.items()})
        self._index, self._memory, self.learnt = index, memory, learnt

    def _settings(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in ("discount", "hysteresis", "confidence", "idle_discount")}
        shape = {"edges": self.edges.tolist(), "prior": list(self._fixed), "statistic": dials(self.statistic)}
        return {"version": 5, **shape, **settings}

    def _unseen(self, rows: int) -> Arrays:
        """Arrays of unseen prompts. The last one is never updated: row −1 reads it."""
        bins = np.full(rows, -1, dtype=np.int16)
        visited = {} if self.learnt is None else {"visited": np.zeros(rows, dtype=np.int32)}  # step of the last visit
        counts = {"successes": np.zeros(rows), "failures": np.zeros(rows)}
        return {**counts, "bin": bins, **visited, **self.statistic.arrays(rows)}

    def _grow(self, size: int) -> None:
        rows = self._memory["bin"].size
        if size >= rows:
            for array in self._memory.values():  # in place, by a tenth: no second copy, little to spare
                array.resize((max(size + 1, rows + rows // 10), *array.shape[1:]), refcheck=False)
            self._memory["bin"][rows:] = -1

    def _posterior(self, rows: Ints) -> tuple[Floats, Floats]:
        prior = self.prior
        a, b = prior[0] + self._memory["successes"][rows], prior[1] + self._memory["failures"][rows]
        return (a, b) if self.learnt is None else self.learnt.moved(a, b, self._age(self.learnt, rows))

    def _estimate(self, rows: Ints) -> Floats:
        own = {name: self._memory[name][rows] for name in self.statistic.arrays(0)}
        return self.statistic.estimate(*self._posterior(rows), own)

    def _rebin(self, rows: Ints) -> Ints:
        estimate, present = self._estimate(rows), self._memory["bin"][rows].astype(np.int64)
        free = self.edges.searchsorted(estimate, side="right")
        if self.confidence is not None:
            return np.where((present < 0) | self._excluded(rows, present), free, present)
        if self.hysteresis == 0:
            return free
        up = self.edges.searchsorted(estimate - self.hysteresis, side="right")
        down = self.edges.searchsorted(estimate + self.hysteresis, side="right")
        return np.where(present < 0, free, np.clip(present, up, down))

    def _excluded(self, rows: Ints, bins: Ints) -> NDArray[np.bool_]:
        """Whether M_n(p) >= 1/δ throughout the bin: at its point nearest to c/n, where M_n is least."""
        from scipy.special import betaln, xlog1py, xlogy

        c, wrong = self._memory["successes"][rows], self._memory["failures"][rows]
        nearest = np.minimum(np.maximum(c / (c + wrong), self._bounds[bins]), self._bounds[bins + 1])
        log_mixture = betaln(self.prior[0] + c, self.prior[1] + wrong) - betaln(*self.prior)
        log_m = log_mixture - xlogy(c, nearest) - xlog1py(wrong, -nearest)
        return np.asarray(log_m >= -np.log(self.confidence or 1.0))


def _plain(name: Any) -> Any:
    """An id that JSON keeps; JSON turned tuples into lists."""
    if isinstance(name, np.generic):
        name = name.item()
    if isinstance(name, list | tuple):
        return tuple(map(_plain, name))
    if type(name) not in (str, int, float, bool, type(None)):
        raise ValueError(f"ids must be strings, numbers, None or tuples of them to be saved, got {name!r}")
    return name


def _packed(array: NDArray[Any]) -> str:
    return b64encode(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()).decode()


def _unpacked(name: str, text: str, kind: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return np.frombuffer(b64decode(text, validate=True), dtype=kind.newbyteorder("<")).reshape(shape)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be base64 of {kind}, shape {shape}, got {str(text)[:40]!r}: {error}") from None
