r"""Adversaries of Prompt-GDRO: each answers the scores of the bins with a mixture q over them.

An adversary is its dials, frozen; what it remembers is a `Memory` that the game holds: running means of the payoffs for
the best responses, cumulated losses for `NoRegret`. To add one, derive from `Adversary` and write `respond`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from gdro_core._validate import Floats, Ints, check_state, floats, integer, number
from gdro_core.ambiguity import chi_square, cvar, entropic
from gdro_core.theory.bandits import Hedge


class Memory(Protocol):
    """What an adversary's scores are made of; `RunningMeans` and `CumulatedLosses` are the two kinds.

    >>> RunningMeans(num_bins=2, ema=0.12).scores
    array([0., 0.])
    """

    @property
    def scores(self) -> Floats:
        """(B,) what the adversary responds to."""

    def observe(self, size: Ints, means: Floats) -> None:
        """Take a batch: (B,) its prompts and their mean payoff in each bin (ignored where a bin has none)."""

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain lists and numbers."""

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; on ValueError nothing has changed."""


class RunningMeans:
    r"""Moving averages of the payoffs, bins present only (Eq. 12), debiased.

        S_b <- (1 - beta) S_b + beta l_b,     divided by the accumulated weight 1 - (1 - beta)^(visits of b)

    so that a bin starts at its first payoff. A bin never observed is interpolated linearly between its nearest observed
    neighbours (bins are ordered), so that its first prompts are not taken for average ones.

    >>> means = RunningMeans(num_bins=3, ema=0.5)
    >>> means.observe(np.array([2, 0, 1]), np.array([1.0, 0.0, 0.4]))
    >>> means.scores
    array([1. , 0.7, 0.4])
    """

    def __init__(self, num_bins: int, ema: float) -> None:
        self.num_bins = integer("num_bins", num_bins, 1)
        self.ema = number("ema", ema, 0.0, 1.0, open_low=True)
        self._sum, self._weight = np.zeros(self.num_bins), np.zeros(self.num_bins)

    @property
    def scores(self) -> Floats:
        """(B,) S_b; 0 before the first batch."""
        known = self._weight > 0
        if not known.any():
            return np.zeros(self.num_bins)
        bins = np.arange(self.num_bins)
        return np.interp(bins, bins[known], self._sum[known] / self._weight[known])

    def observe(self, size: Ints, means: Floats) -> None:
        """See `Memory.observe`."""
        present = size > 0
        self._sum[present] += self.ema * (means[present] - self._sum[present])
        self._weight[present] += self.ema * (1.0 - self._weight[present])

    def state_dict(self) -> dict[str, Any]:
        """See `Memory.state_dict`."""
        return {"sum": self._sum.tolist(), "weight": self._weight.tolist()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """See `Memory.load_state_dict`."""
        check_state("RunningMeans", saved, {}, ("sum", "weight"))
        total = floats("sum", saved["sum"], (self.num_bins,))
        weight = floats("weight", saved["weight"], (self.num_bins,), 0.0, 1.0)
        self._sum, self._weight = total.copy(), weight.copy()


class CumulatedLosses:
    r"""Losses summed over all rounds, each divided by the chance that its bin was in the batch.

    A bin is observed when the batch holds one of its prompts; for N prompts of share p_b that has probability
    o_b = 1 - (1 - p_b)^N, so that

        L_b <- L_b + 1{b present} (c - l_b) / (o_b + gamma),     c the greatest payoff,

    is unbiased at gamma = 0 but for the estimate of p_b (`Hedge` states both errors): a rare bin is not forgotten while
    it is absent. p_b is (1 + its prompts) / (B + all prompts) over all earlier batches: a moving share would take a bin
    that has just shown up for a common one. Where shares drift, o_b lags.

    >>> losses = CumulatedLosses(num_bins=2, step_size=1.0, implicit_exploration=0.0, greatest=1.0)
    >>> losses.observe(np.array([1, 0]), np.array([0.5, 0.0]))
    >>> losses.scores  # of bin 0 minus eta times (1 - .5) / o, o = 1/2 for one prompt
    array([-1.,  0.])
    """

    def __init__(self, num_bins: int, step_size: float, implicit_exploration: float, greatest: float) -> None:
        self._hedge = Hedge(num_bins, step_size)
        self._implicit, self._greatest = implicit_exploration, greatest
        self._drawn = np.zeros(num_bins)

    @property
    def scores(self) -> Floats:
        """(B,) -eta L_b, the greatest of them 0."""
        return self._hedge.log_weights

    def observe(self, size: Ints, means: Floats) -> None:
        """See `Memory.observe`; payoffs lie in [0, c]."""
        present = size > 0
        past = (1.0 + self._drawn[present]) / (size.size + self._drawn.sum())
        chance = -np.expm1(size.sum() * np.log1p(-np.minimum(past, 1.0 - 1e-16)))  # o_b
        losses = np.zeros(size.size)
        losses[present] = (self._greatest - means[present]) / (chance + self._implicit)
        self._hedge.update(losses)
        self._drawn += size

    def state_dict(self) -> dict[str, Any]:
        """See `Memory.state_dict`."""
        return {"drawn": self._drawn.tolist(), "hedge": self._hedge.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """See `Memory.load_state_dict`."""
        check_state("CumulatedLosses", saved, {}, ("drawn", "hedge"))
        drawn = floats("drawn", saved["drawn"], self._drawn.shape, 0.0)
        self._hedge.load_state_dict(saved["hedge"])
        self._drawn = drawn.copy()


class Adversary(ABC):
    """Which mixture of bins the learner should be weighed by.

    >>> Entropic(step_size=2.0).respond(np.array([0.0, 1.0]), np.array([0.5, 0.5])).round(3)
    array([0.119, 0.881])
    """

    cumulative: ClassVar[bool] = False  # scores are sums over rounds: needs bounded payoffs and the uniform reference

    @abstractmethod
    def respond(self, scores: Floats, reference: Floats) -> Floats:
        """(B,) q, from (B,) scores of the memory and the (B,) reference mixture r."""

    def memory(self, num_bins: int, ema: float, greatest: float) -> Memory:
        """A fresh memory for `num_bins` bins; `ema` is the game's, `greatest` the payoff's greatest value."""
        return RunningMeans(num_bins, ema)


@dataclass(frozen=True)
class Entropic(Adversary):
    r"""q_b ~ r_b e^{eta S_b}: the best response with a KL penalty (Eq. 14, Lemma 4.1; published).

    At fixed eta it cannot reach a vertex, and its regret against a fixed bin is linear (F4).

    Args:
        step_size: eta >= 0 [1 / payoff].

    >>> Entropic(2.0).respond(np.array([1.0, 0.0]), np.array([0.25, 0.75])).round(3)
    array([0.711, 0.289])
    """

    step_size: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", number("step_size", self.step_size, 0.0))

    def respond(self, scores: Floats, reference: Floats) -> Floats:
        """See `Adversary.respond`."""
        return entropic(scores, self.step_size, reference).q


@dataclass(frozen=True)
class CVaR(Adversary):
    r"""The worst fraction alpha of the reference: max q . S over q <= r / alpha (`ambiguity.cvar`).

    Args:
        alpha: tail fraction in (0, 1].

    >>> CVaR(0.5).respond(np.array([0.0, 1.0, 3.0, 2.0]), np.full(4, 0.25))
    array([0. , 0. , 0.5, 0.5])
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", number("alpha", self.alpha, 0.0, 1.0, open_low=True))

    def respond(self, scores: Floats, reference: Floats) -> Floats:
        """See `Adversary.respond`."""
        return cvar(scores, self.alpha, reference).q


@dataclass(frozen=True)
class ChiSquare(Adversary):
    r"""The worst mixture in a chi-square ball: max q . S over D(q || r) <= rho (`ambiguity.chi_square`).

    Args:
        rho: radius, >= 0.

    >>> ChiSquare(0.25).respond(np.array([0.0, 1.0, 2.0]), np.full(3, 1 / 3)).round(3)
    array([0.045, 0.333, 0.622])
    """

    rho: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", number("rho", self.rho, 0.0))

    def respond(self, scores: Floats, reference: Floats) -> Floats:
        """See `Adversary.respond`."""
        return chi_square(scores, self.rho, reference).q


@dataclass(frozen=True)
class NoRegret(Adversary):
    r"""q_b ~ e^{-eta L_b} on losses cumulated over all rounds (`CumulatedLosses`): no regret (theorem 4).

    Args:
        step_size: eta > 0; `Hedge.for_horizon(B, T).step_size` has the theorem's.
        implicit_exploration: divide by o_b + eta/2 instead of o_b, as EXP3-IX (Kocak et al. 2014; Neu 2015): a little
            bias for a bounded variance, and a bound with high probability.

    >>> NoRegret(step_size=1.0).respond(np.array([-1.0, 0.0]), np.array([0.5, 0.5])).round(3)
    array([0.269, 0.731])
    """

    step_size: float = 2.0
    implicit_exploration: bool = False
    cumulative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", number("step_size", self.step_size, 0.0, open_low=True))

    def respond(self, scores: Floats, reference: Floats) -> Floats:
        """Of scores -eta L; the game starts from the uniform reference."""
        weights = np.exp(scores - scores.max())
        return np.asarray(weights / weights.sum())

    def memory(self, num_bins: int, ema: float, greatest: float) -> CumulatedLosses:
        """See `Adversary.memory`; a moving average has no place here."""
        implicit = self.step_size / 2.0 if self.implicit_exploration else 0.0
        return CumulatedLosses(num_bins, self.step_size, implicit, greatest)
