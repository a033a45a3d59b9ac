r"""Adversarial online learning over K arms: full information, bandit and partial feedback (theorems 4, 5 and 12).

A round is `probabilities` -> `sample` -> `update`. Bounds with their constants are in `gdro_core.theory.regret`;
`for_horizon` sets the step size that each needs. R replicates run side by side: arrays are (R, K), no loop runs over
replicates, and replicate r uses nothing but entry r of every argument and of `rng.random(R)`. Without replicates arrays
are (K,).

Feed losses: an adversary that earns a payoff g in [0, 1], as Prompt-GDRO does, passes 1 - g (or -g to `Hedge`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gdro_core._validate import Floats, Ints, check_state, floats, integer, integers, number
from gdro_core.theory.regret import tracking_complexity

_MAX = float(np.finfo(np.float64).max)


def _softmax(scores: Floats) -> Floats:
    """(K, R) columns of e^s / sum e^s; only max(s) is subtracted, so no finite score overflows."""
    weights: Floats = scores - scores.max(axis=0)
    np.exp(weights, out=weights)  # in place: fresh (K, R) arrays cost more than the arithmetic
    weights /= weights.sum(axis=0)
    return weights


def _mixed(current: Floats, share: float) -> Floats:
    """(1 - share) current + share / K, in place."""
    current *= 1.0 - share
    current += share / len(current)
    return current


class _Policy(ABC):
    """Scores of K arms (K, R), arms first so that every operation runs along contiguous replicates."""

    def __init__(self, num_arms: int, replicates: int | None, **settings: float) -> None:
        self.num_arms = integer("num_arms", num_arms, 2)
        self.replicates = None if replicates is None else integer("replicates", replicates, 1)
        self._settings = settings
        self._shape = () if self.replicates is None else (self.replicates,)
        self._columns = np.arange(self.replicates or 1)
        self._scores = np.zeros((self.num_arms, self._columns.size))
        self._rounds = 0
        self._cache: Floats | None = None

    @abstractmethod
    def _distribution(self) -> Floats:
        """(K, R) probabilities by the scores."""

    def _current(self) -> Floats:
        if self._cache is None:
            self._cache = self._distribution()
            self._cache.flags.writeable = False
        return self._cache

    @property
    def probabilities(self) -> Floats:
        """(K,) or (R, K), the mixture over arms of this round; read-only."""
        current = self._current()
        return current[:, 0] if self.replicates is None else current.T

    def sample(self, rng: np.random.Generator) -> int | Ints:
        """An arm, or (R,) arms, by inversion of the distribution function at `rng.random(R)`."""
        current = self._current()
        level = rng.random(self._columns.size) * current.sum(axis=0)  # so that rounding never picks an arm with p = 0
        cumulative, arms = current[0].copy(), np.zeros(self._columns.size, dtype=np.int64)
        for row in current[1:]:
            arms += level >= cumulative
            cumulative += row
        return int(arms[0]) if self.replicates is None else arms

    def _moved(self) -> None:
        self._rounds += 1
        self._cache = None

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain lists and numbers."""
        return {**self._identity(), "rounds": self._rounds, "scores": self._scores.T.tolist()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a policy with the same settings; on ValueError nothing has changed."""
        check_state(type(self).__name__, saved, self._identity(), ("rounds", "scores"))
        rounds = integer("rounds", saved["rounds"], 0)
        scores = floats("scores", saved["scores"], self._scores.T.shape)
        self._rounds, self._scores, self._cache = rounds, np.array(scores.T, order="C"), None

    def _identity(self) -> dict[str, Any]:
        name = {"version": 1, "algorithm": type(self).__name__}
        return {**name, "num_arms": self.num_arms, "replicates": self.replicates, **self._settings}


class Hedge(_Policy):
    r"""Exponential weights with full information, or with losses of some arms missing.

        p_i ~ e^{-eta L_i},     L <- L + l                                (Freund & Schapire 1997)

    Guarantees: for l in [0, 1] and eta = sqrt(8 ln K / T), regret <= sqrt(T ln K / 2) on every sequence
    (`regret.hedge_bound`); a range c scales both bound and 1 / eta by c. Any finite losses are accepted: scores
    saturate at the largest float instead of overflowing. Losses that arrive late are passed when they arrive: with a
    sum of delays D the regret is <= sqrt((T + 2 D) ln K / 2) (`regret.delayed_hedge_bound`).

    Missing arms: with `observed` and o_i = `observation_probability`, the chance given the past that arm i is observed,

        l^_i = 1{observed} l_i / o_i       unbiased       (Seldin et al. 2014, prediction with limited advice)

    whose expected regret is <= ln K / eta + (eta / 2) sum_t sum_i p_i / o_i (`regret.limited_advice_bound`).
    A bin of share s is in a batch of N independent prompts with o = 1 - (1 - s)^N. An estimate o' instead of o turns
    p_i / o_i into p_i o_i / o'_i^2 and adds at most 2 sum_t max_i |o_i / o'_i - 1| (bias) to the regret.

    >>> policy = Hedge(2, step_size=1.0)
    >>> policy.update([0.0, 1.0])
    >>> policy.probabilities.round(3)
    array([0.731, 0.269])
    """

    def __init__(self, num_arms: int, step_size: float, *, replicates: int | None = None) -> None:
        self.step_size = number("step_size", step_size, 0.0, open_low=True)
        super().__init__(num_arms, replicates, step_size=self.step_size)

    @classmethod
    def for_horizon(
        cls, num_arms: int, horizon: int, *, total_delay: float = 0.0, replicates: int | None = None
    ) -> Self:
        """Eta = sqrt(8 ln K / (T + 2 D)) for losses in [0, 1]."""
        k, t = integer("num_arms", num_arms, 2), integer("horizon", horizon, 1)
        step_size = np.sqrt(8.0 * np.log(k) / (t + 2.0 * number("total_delay", total_delay, 0.0)))
        return cls(k, float(step_size), replicates=replicates)

    @property
    def log_weights(self) -> Floats:
        """(K,) or (R, K), -eta L_i, the greatest of a row 0."""
        return self._scores[:, 0].copy() if self.replicates is None else self._scores.T.copy()

    def _distribution(self) -> Floats:
        return _softmax(self._scores)

    def update(
        self,
        losses: ArrayLike,
        *,
        observed: ArrayLike | None = None,
        observation_probability: ArrayLike | None = None,
    ) -> None:
        """Take a round's losses, all three (K,) or (R, K).

        Args:
            losses: finite; with `observed`, in [0, 1] where observed and ignored elsewhere (NaN will do).
            observed: which losses are known; None: all.
            observation_probability: in [0, 1], positive where observed.

        Raises:
            ValueError: another shape, a value outside these domains, or one of the last two without the other.
        """
        shape = (*self._shape, self.num_arms)
        if observed is None and observation_probability is None:
            estimates = floats("losses", losses, shape)
        elif observed is None or observation_probability is None:
            missing = "observed" if observed is None else "observation_probability"
            raise ValueError(f"observed and observation_probability must be given together, got no {missing}")
        else:
            seen = integers("observed", observed, shape, 0, 1) == 1
            chance = floats("observation_probability", observation_probability, shape, 0.0, 1.0)
            if (seen & (chance == 0.0)).any():
                raise ValueError("observation_probability must be positive where observed, got 0.0")
            known = np.asarray(losses, dtype=np.float64)
            if known.shape == shape:
                known = np.where(seen, known, 0.0)
            estimates = floats("losses", known, shape, 0.0, 1.0) / np.where(seen, chance, 1.0)
        with np.errstate(over="ignore"):  # a difference beyond the largest float saturates there
            fall = self.step_size * (estimates.T.reshape(self._scores.shape) - estimates.min(axis=-1))
            scores = np.maximum(self._scores - fall, -_MAX)
        self._scores = scores - scores.max(axis=0)
        self._moved()


class _Bandit(_Policy):
    """Feedback for the arm played alone; each child says how its scores move."""

    def update(self, arm: int | ArrayLike, loss: float | ArrayLike) -> None:
        """Take the loss in [0, 1] of the arm played; both scalars, or (R,).

        Raises:
            ValueError: a loss outside [0, 1], an arm outside 0..K-1 or one whose probability is 0 (below 1e-300).
        """
        arms = integers("arm", arm, self._shape, 0, self.num_arms - 1).reshape(-1)
        losses = floats("loss", loss, self._shape, 0.0, 1.0).reshape(-1)
        rows = arms * self._columns.size + self._columns  # positions in the flattened (K, R)
        chance = self._current().ravel()[rows]
        if chance.min() < 1e-300:  # so that 1 / p is finite
            raise ValueError(
                f"arm must be one that can be drawn, got {arms[chance.argmin()]} of probability {chance.min()}"
            )
        self._learn(rows, losses, chance)
        self._moved()

    @abstractmethod
    def _learn(self, rows: NDArray[np.int64], losses: Floats, chance: Floats) -> None:
        """Move `_scores` by (R,) losses of the arms at flat positions `rows`, played with probability `chance`."""

    def _distribution(self) -> Floats:
        return _softmax(self._scores)


class Exp3(_Bandit):
    r"""Exponential weights on importance-weighted losses (Lattimore & Szepesvari 2020, §11.3-11.4).

        p_i ~ e^{-eta L^_i},     L^_i <- L^_i + 1{i played} l_i / p_i

    Guarantees: E regret <= sqrt(2 T K ln K) against losses in [0, 1] fixed in advance, with eta = sqrt(2 ln K / (T K))
    (`regret.exp3_bound`, Thm 11.2). In expectation only: the variance of the regret is typically of order T^2 (Pogodin
    & Lattimore 2019); for a single run, or losses that react to the play, use `Exp3IX`.

    >>> policy = Exp3.for_horizon(num_arms=2, horizon=100)
    >>> policy.update(arm=0, loss=1.0)
    >>> policy.probabilities.round(3)
    array([0.458, 0.542])
    """

    def __init__(self, num_arms: int, step_size: float, *, replicates: int | None = None) -> None:
        self.step_size = number("step_size", step_size, 0.0, open_low=True)
        super().__init__(num_arms, replicates, step_size=self.step_size)

    @classmethod
    def for_horizon(cls, num_arms: int, horizon: int, *, replicates: int | None = None) -> Self:
        """Eta = sqrt(2 ln K / (T K))."""
        return cls(num_arms, _exp3_step_size(num_arms, horizon), replicates=replicates)

    def _learn(self, rows: NDArray[np.int64], losses: Floats, chance: Floats) -> None:
        self._scores.ravel()[rows] -= self.step_size * losses / chance


class Exp3IX(_Bandit):
    r"""Exp3 with implicit exploration (Kocak et al. 2014; Neu 2015).

        p_i ~ e^{-eta L^_i},     L^_i <- L^_i + 1{i played} l_i / (p_i + gamma)

    Guarantees: with eta = 2 gamma = sqrt(2 ln K / (K T)), `regret.exp3_ix_bound` holds with probability 1 - delta, for
    every delta at once and against an adversary that sees the past.

    >>> policy = Exp3IX(2, step_size=0.5, implicit_exploration=0.25)
    >>> policy.update(arm=0, loss=0.75)
    >>> policy.probabilities.round(3)
    array([0.378, 0.622])
    """

    def __init__(
        self, num_arms: int, step_size: float, implicit_exploration: float, *, replicates: int | None = None
    ) -> None:
        self.step_size = number("step_size", step_size, 0.0, open_low=True)
        self.implicit_exploration = number("implicit_exploration", implicit_exploration, 0.0)
        super().__init__(num_arms, replicates, step_size=self.step_size, implicit_exploration=self.implicit_exploration)

    @classmethod
    def for_horizon(cls, num_arms: int, horizon: int, *, replicates: int | None = None) -> Self:
        """Eta = 2 gamma = sqrt(2 ln K / (T K))."""
        step_size = _exp3_step_size(num_arms, horizon)
        return cls(num_arms, step_size, step_size / 2.0, replicates=replicates)

    def _learn(self, rows: NDArray[np.int64], losses: Floats, chance: Floats) -> None:
        self._scores.ravel()[rows] -= self.step_size * losses / (chance + self.implicit_exploration)


class Exp3P(_Bandit):
    r"""Exp3 with gains biased upwards and uniform exploration (Bubeck & Cesa-Bianchi 2012, §3.2).

        p = (1 - gamma) softmax(eta G^) + gamma / K,     G^_i <- G^_i + (1{i played} g_i + beta) / p_i,     g = 1 - l

    Guarantees: with `for_horizon`'s parameters, regret <= 5.15 sqrt(T K ln(K / delta)) with probability 1 - delta
    against an adversary that sees the past (`regret.exp3_p_bound`).

    >>> policy = Exp3P.for_horizon(num_arms=2, horizon=1000, delta=0.1)
    >>> round(policy.bias, 4), round(policy.step_size, 4), round(policy.exploration, 4)
    (0.0387, 0.0177, 0.0391)
    """

    def __init__(
        self, num_arms: int, step_size: float, bias: float, exploration: float, *, replicates: int | None = None
    ) -> None:
        self.step_size = number("step_size", step_size, 0.0, open_low=True)
        self.bias = number("bias", bias, 0.0)
        self.exploration = number("exploration", exploration, 0.0, 1.0, open_low=True)
        super().__init__(num_arms, replicates, step_size=self.step_size, bias=self.bias, exploration=self.exploration)

    @classmethod
    def for_horizon(cls, num_arms: int, horizon: int, delta: float, *, replicates: int | None = None) -> Self:
        """Beta = sqrt(ln(K / delta) / (T K)), eta = .95 sqrt(ln K / (T K)), gamma = 1.05 sqrt(K ln K / T) <= 1."""
        k, t = integer("num_arms", num_arms, 2), integer("horizon", horizon, 1)
        bias = np.sqrt(np.log(k / number("delta", delta, 0.0, 1.0, open_low=True)) / (t * k))
        exploration = 1.05 * np.sqrt(k * np.log(k) / t)
        if exploration > 1.0:
            raise ValueError(f"horizon must be at least 1.05^2 K ln K = {1.05**2 * k * np.log(k):g}, got {horizon!r}")
        step_size = 0.95 * np.sqrt(np.log(k) / (t * k))
        return cls(k, float(step_size), float(bias), float(exploration), replicates=replicates)

    def _distribution(self) -> Floats:
        return _mixed(_softmax(self._scores), self.exploration)

    def _learn(self, rows: NDArray[np.int64], losses: Floats, chance: Floats) -> None:
        self._scores += (self.step_size * self.bias) / self._current()
        self._scores.ravel()[rows] += self.step_size * (1.0 - losses) / chance


class Exp3S(_Bandit):
    r"""Exp3 that tracks: its weights are shared after every round (Auer et al. 2002, §8; Herbster & Warmuth 1998).

        w_i ~ p_i exp(-eta 1{i played} l_i / p_i),     p <- (1 - alpha) w + alpha / K

    Guarantees: E regret against every sequence of arms with at most S switches is <= `regret.exp3_s_bound`, about
    sqrt(2 T K (S ln(e K T / S) + ln K)), for losses in [0, 1] fixed in advance.

    Departs: losses and the share alone replace Auer et al.'s gains with uniform exploration gamma, which the proof for
    losses does not need; this improves their constant 2 sqrt(e - 1) to sqrt(2).

    >>> policy = Exp3S(2, step_size=0.5, share=0.1)
    >>> policy.update(arm=0, loss=1.0)
    >>> policy.probabilities.round(3)
    array([0.292, 0.708])
    """

    def __init__(self, num_arms: int, step_size: float, share: float, *, replicates: int | None = None) -> None:
        self.step_size = number("step_size", step_size, 0.0, open_low=True)
        self.share = number("share", share, 0.0, 1.0, open_low=True)
        super().__init__(num_arms, replicates, step_size=self.step_size, share=self.share)

    @classmethod
    def for_horizon(cls, num_arms: int, horizon: int, switches: int, *, replicates: int | None = None) -> Self:
        """Alpha = S / (T - 1) and eta = sqrt(2 C / (T K)), C of `regret.exp3_s_bound`; 1 <= S <= T - 1."""
        k, t, s = integer("num_arms", num_arms, 2), integer("horizon", horizon, 2), integer("switches", switches, 1)
        return cls(k, float(np.sqrt(2.0 * tracking_complexity(t, k, s) / (t * k))), s / (t - 1), replicates=replicates)

    def _learn(self, rows: NDArray[np.int64], losses: Floats, chance: Floats) -> None:
        weights = self._current().copy()
        weights.ravel()[rows] *= np.exp(-self.step_size * losses / chance)
        weights /= weights.sum(axis=0)
        self._scores = np.log(_mixed(weights, self.share))


class TsallisINF(_Bandit):
    r"""Follow the 1/2-Tsallis-regularised leader, anytime (Zimmert & Seldin 2021, Alg. 1, importance weighting).

        p = argmin <p, L^> - (4 / eta_t) sum_i sqrt(p_i),     eta_t = 2 / sqrt(t)
        L^_i <- L^_i + 1{i played} l_i / p_i
        p_i = 1 / (a_i + z)^2,     a_i = (eta_t / 2)(L^_i - min L^),     z in [1, sqrt(K)] such that sum p = 1

    Guarantees: for every T, E regret <= 4 sqrt(K T) + 1 (`regret.tsallis_inf_bound`), and O(sum_i ln T / Delta_i) when
    one arm is better than arm i by Delta_i > 0 in mean (their Thm 1).

    z is found by Newton steps on (sum p)^{-1/2} = 1: that function of z is concave and increasing (a power mean), so
    steps from z = 1 approach the root from below. Five reach rounding error for K <= 1000; their number is fixed, so
    that replicates stay independent bit by bit, and no warm start is needed or stored.

    >>> policy = TsallisINF(2)
    >>> policy.update(arm=0, loss=1.0)
    >>> policy.probabilities.round(3)
    array([0.159, 0.841])
    """

    def __init__(self, num_arms: int, *, replicates: int | None = None) -> None:
        super().__init__(num_arms, replicates)

    def _distribution(self) -> Floats:
        a = (self._scores - self._scores.min(axis=0)) / np.sqrt(self._rounds + 1.0)  # eta_t / 2 = 1 / sqrt(t)
        z = np.ones(self._columns.size)
        root, square = np.empty_like(a), np.empty_like(a)  # sqrt(p), p
        for step in range(6):
            np.add(a, z, out=root)
            np.divide(1.0, root, out=root)
            np.multiply(root, root, out=square)
            total = square.sum(axis=0)
            if step < 5:
                root *= square
                z += (np.sqrt(total) - 1.0) * total / root.sum(axis=0)
        return np.asarray(square / total)

    def _learn(self, rows: NDArray[np.int64], losses: Floats, chance: Floats) -> None:
        self._scores.ravel()[rows] += losses / chance


def _exp3_step_size(num_arms: int, horizon: int) -> float:
    """Eta = sqrt(2 ln K / (T K))."""
    k, t = integer("num_arms", num_arms, 2), integer("horizon", horizon, 1)
    return float(np.sqrt(2.0 * np.log(k) / (t * k)))
