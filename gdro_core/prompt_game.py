"""Prompt-GDRO: an adversary over difficulty bins that reweights prompts (§3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, choice, floats, integer, integers, number, state
from gdro_core.ambiguity import chi_square, cvar, entropic
from gdro_core.theory.bandits import Hedge

PAYOFFS = ("error", "learnability", "surrogate")
GREATEST = {"error": 1.0, "learnability": 2.0}  # learnability reaches 2 at one success of two
ADVERSARIES = ("entropic", "cvar", "chi-square", "hedge", "exp3-ix")


def prompt_payoff(name: str, correct: ArrayLike, trials: ArrayLike) -> Floats:
    r"""What the adversary earns on a prompt, from c correct of n rollouts.

    - `"error"`: 1 - c/n in [0, 1], unbiased for 1 - p.
    - `"learnability"`: 4 c (n - c) / (n (n - 1)), unbiased for 4 p (1 - p); needs n >= 2.

    The paper's own payoff (`"surrogate"`, the prompt loss of Eq. 7) comes from the policy update, not from here.

    Returns:
        (N,) payoffs.

    >>> prompt_payoff("error", [1, 4], [4, 4])
    array([0.75, 0.  ])
    >>> prompt_payoff("learnability", [1, 4], [4, 4])
    array([1., 0.])
    """
    choice("payoff", name, PAYOFFS[:2])
    n = floats("trials", trials, (-1,), 1.0 if name == "error" else 2.0)
    c = floats("correct", correct, n.shape, 0.0)
    if (c > n).any():
        raise ValueError(f"correct must be at most trials, got {c[c > n][0]} of {n[c > n][0]}")
    return 1.0 - c / n if name == "error" else 4.0 * c * (n - c) / (n * (n - 1.0))


class PromptGDRO:
    r"""An adversary over difficulty bins; the learner meets it as weights on prompts.

        w_b = min(q_b / p_b, max_weight),    q = (1 - gamma) q* + gamma r      (Eq. 15)

    with p_b the running share of bin b among the prompts drawn, r a reference mixture, and q* the adversary's play,

    - `"entropic"` (published): q*_b ~ r_b e^{eta S_b} (Eq. 14, Lemma 4.1), the best response to the score
      S_b <- (1 - beta) S_b + beta l_b of the mean payoff l_b of the bin's prompts (Eq. 12), bins present only. At fixed
      eta q* cannot reach a vertex, and its regret against a fixed bin is linear (F4).
    - `"cvar"`: q <= r / alpha, `"chi-square"`: D(q || r) <= rho; best responses to the same score (module
      `ambiguity`).
    - `"hedge"`: q*_b ~ e^{-eta L_b} on losses cumulated over all rounds, no-regret (theorem 4). A bin is observed when
      the batch holds one of its N prompts, which has probability o_b = 1 - (1 - p_b)^N, so that

          L_b <- L_b + 1{b present} (c - l_b) / o_b,     c the greatest payoff,

      is unbiased but for the estimate of p_b (`Hedge` states both errors): a rare bin is not forgotten while absent.
      This p_b is (1 + its prompts) / (B + all prompts) over all earlier batches: a moving share would take a bin that
      has just shown up for a common one. Where shares drift, o_b lags.
    - `"exp3-ix"`: the same with o_b + eta/2, implicit exploration (Kocak et al. 2014; Neu 2015): a little bias for a
      bounded variance, and a bound with high probability.

    With r = p (`reference="share"`) the game is around the data: w_b = e^{eta S_b} / sum_j p_j e^{eta S_j} for the
    entropic adversary, and rare bins are not inflated. With `reference="uniform"` bins count the same whatever their
    share, applied by importance q_b / p_b, so that the learner really optimises sum_b q_b L_b (F9). Either way a bin's
    weight depends on past batches only, never on what else is in the present one; its mean over prompts drawn with
    shares p is 1 while no weight is capped.

    S is debiased by its accumulated weight, so a bin starts at its first payoff; a bin never observed is interpolated
    linearly between its nearest observed neighbours (bins are ordered), so that its first prompts are not taken for
    average ones.

    With `weighting="published"`: w_b = min(e^{eta S_b}, max_weight) unnormalised (Eq. 16), S_0 = 0 without debiasing,
    r uniform; `share_normalised` divides l_b by the bin's share in the batch, floored at 0.01.

    Departs: Eq. 14 clips S at an unnamed C; payoffs of `error` and `learnability` need no clip, so only the published
    weighting clips, at C = 1.

    Args:
        num_bins: B.
        payoff: `"error"`, `"learnability"` (`prompt_payoff`) or `"surrogate"` (Eq. 7, blind to difficulty: F1).
        adversary: see above; `"hedge"` and `"exp3-ix"` need a bounded payoff and the uniform reference.
        step_size: eta >= 0, > 0 for `"hedge"` and `"exp3-ix"`; `Hedge.for_horizon(B, T).step_size` has the theorem's.
        alpha: tail fraction of `"cvar"` in (0, 1].
        rho: radius of `"chi-square"`, >= 0.
        ema: beta in (0, 1], of scores and shares.
        exploration: gamma in [0, 1].
        max_weight: cap on a weight, >= 1.
        reference: `"share"` or `"uniform"`.
        weighting: `"importance"` or `"published"`.
        share_normalised: see above; published weighting only.

    >>> game = PromptGDRO(num_bins=2, step_size=2.0)
    >>> game.observe([0, 1, 1, 1], payoff=[1.0, 0.0, 0.0, 0.0])
    >>> game.weights([0, 1, -1]).round(3)
    array([2.845, 0.385, 1.   ])
    """

    def __init__(
        self,
        num_bins: int,
        *,
        payoff: str = "error",
        adversary: str = "entropic",
        step_size: float = 2.0,
        alpha: float = 0.5,
        rho: float = 0.5,
        ema: float = 0.12,
        exploration: float = 0.0,
        max_weight: float = 15.0,
        reference: str = "share",
        weighting: str = "importance",
        share_normalised: bool = False,
    ) -> None:
        self.num_bins = integer("num_bins", num_bins, 1)
        self.payoff = choice("payoff", payoff, PAYOFFS)
        self.adversary = choice("adversary", adversary, ADVERSARIES)
        self.step_size = number("step_size", step_size, 0.0)
        self.alpha = number("alpha", alpha, 0.0, 1.0, open_low=True)
        self.rho = number("rho", rho, 0.0)
        self.ema = number("ema", ema, 0.0, 1.0, open_low=True)
        self.exploration = number("exploration", exploration, 0.0, 1.0)
        self.max_weight = number("max_weight", max_weight, 1.0)
        self.reference = choice("reference", reference, ("share", "uniform"))
        self.weighting = choice("weighting", weighting, ("importance", "published"))
        self.share_normalised = bool(share_normalised)
        if self.weighting == "importance" and self.share_normalised:
            raise ValueError('share_normalised must be False unless weighting is "published", got True')
        if self.weighting == "published" and (self.reference, self.adversary) != ("uniform", "entropic"):
            raise ValueError(
                'reference and adversary must be "uniform" and "entropic" with weighting "published", '
                f"got {self.reference!r} and {self.adversary!r}"
            )
        self._hedge: Hedge | None = None
        if self.adversary in ("hedge", "exp3-ix"):
            if self.payoff == "surrogate" or self.reference != "uniform":
                raise ValueError(
                    f'adversary "{self.adversary}" needs payoff "error" or "learnability" and reference "uniform", '
                    f"got {self.payoff!r} and {self.reference!r}"
                )
            self._hedge = Hedge(self.num_bins, self.step_size)
        self._score, self._score_weight = np.zeros(self.num_bins), np.zeros(self.num_bins)
        self._share, self._share_weight = np.zeros(self.num_bins), 0.0
        self._drawn = np.zeros(self.num_bins)

    @property
    def scores(self) -> Floats:
        """(B,) S_b."""
        if self.weighting == "published":
            return np.clip(self._score, -1.0, 1.0)
        known = self._score_weight > 0
        if not known.any():
            return np.zeros(self.num_bins)
        bins = np.arange(self.num_bins)
        return np.interp(bins, bins[known], self._score[known] / self._score_weight[known])

    @property
    def share(self) -> Floats:
        """(B,) p_b > 0, running share of each bin among the prompts drawn; uniform before the first batch.

        Never 0 (at least about 1e-100), so that q_b / p_b tells the weight of a bin whose first prompts arrive.
        """
        if self._share_weight == 0:
            return np.full(self.num_bins, 1.0 / self.num_bins)
        share = np.maximum(self._share / self._share_weight, 1e-100)
        return np.asarray(share / share.sum())

    @property
    def probabilities(self) -> Floats:
        """(B,) q_b, the adversary's mixture over bins (Eq. 15)."""
        r = self.share if self.reference == "share" else np.full(self.num_bins, 1.0 / self.num_bins)
        if self._hedge is not None:
            play = self._hedge.probabilities
        elif self.adversary == "cvar":
            play = cvar(self.scores, self.alpha, r).q
        elif self.adversary == "chi-square":
            play = chi_square(self.scores, self.rho, r).q
        else:
            play = entropic(self.scores, self.step_size, r).q
        return np.asarray((1.0 - self.exploration) * play + self.exploration * r)

    @property
    def bin_weights(self) -> Floats:
        """(B,) w_b."""
        if self.weighting == "published":
            ratio = np.exp(np.minimum(self.step_size * self.scores, 700.0))  # e^700 is still finite; the cap is below
        elif self._share_weight == 0:
            ratio = np.ones(self.num_bins)
        else:
            ratio = self.probabilities / self.share
        return np.asarray(np.clip(ratio, 1e-300, self.max_weight))  # > 0, so that a batch of one bin can have mean 1

    def weights(self, bins: ArrayLike) -> Floats:
        """(N,) weight of each prompt by its bin; 1 for unseen prompts (bin −1)."""
        b = integers("bins", bins, (-1,), -1, self.num_bins - 1)
        return np.where(b >= 0, self.bin_weights[b], 1.0)

    def observe(self, bins: ArrayLike, payoff: ArrayLike) -> None:
        """Update scores and shares by one batch of prompts; unseen prompts (bin −1) count for neither.

        Args:
            bins: (N,) the bins that the batch was planned with.
            payoff: (N,) payoff of each prompt, from `prompt_payoff` or the update's prompt losses.
        """
        b = integers("bins", bins, (-1,), -1, self.num_bins - 1)
        low, greatest = (-np.inf, np.inf) if self._hedge is None else (0.0, GREATEST[self.payoff])
        gains = floats("payoff", payoff, b.shape, low, greatest)
        gains, b = gains[b >= 0], b[b >= 0]
        if b.size == 0:
            return
        size = np.bincount(b, minlength=self.num_bins)
        there = size > 0
        mean = np.bincount(b, weights=gains, minlength=self.num_bins)[there] / size[there]
        share = size / b.size
        self._share += self.ema * (share - self._share)
        self._share_weight += self.ema * (1.0 - self._share_weight)
        if self._hedge is not None:
            past = (1.0 + self._drawn[there]) / (self.num_bins + self._drawn.sum())
            chance = -np.expm1(b.size * np.log1p(-np.minimum(past, 1.0 - 1e-16)))  # o_b
            implicit = self.step_size / 2.0 if self.adversary == "exp3-ix" else 0.0
            losses = np.zeros(self.num_bins)
            losses[there] = (greatest - mean) / (chance + implicit)
            self._hedge.update(losses)
        self._drawn += size
        if self.share_normalised:
            mean = mean / np.maximum(share[there], 0.01)
        self._score[there] += self.ema * (mean - self._score[there])
        self._score_weight[there] += self.ema * (1.0 - self._score_weight[there])

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain lists and numbers."""
        return {
            **self._settings(),
            "score": self._score.tolist(),
            "score_weight": self._score_weight.tolist(),
            "share": self._share.tolist(),
            "share_weight": float(self._share_weight),
            "drawn": self._drawn.tolist(),
            "hedge": None if self._hedge is None else self._hedge.state_dict(),
        }

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a game with the same settings; on ValueError nothing has changed."""
        memory = ("score", "score_weight", "share", "share_weight", "drawn", "hedge")
        state("PromptGDRO", found, self._settings(), memory)
        shape = (self.num_bins,)
        score = floats("score", found["score"], shape)
        score_weight = floats("score_weight", found["score_weight"], shape, 0.0, 1.0)
        share = floats("share", found["share"], shape, 0.0, 1.0)
        share_weight = number("share_weight", found["share_weight"], 0.0, 1.0)
        drawn = floats("drawn", found["drawn"], shape, 0.0)
        if self._hedge is not None:
            self._hedge.load_state_dict(found["hedge"])
        self._score, self._score_weight = score.copy(), score_weight.copy()
        self._share, self._share_weight, self._drawn = share.copy(), share_weight, drawn.copy()

    def _settings(self) -> dict[str, Any]:
        names = ("num_bins", "payoff", "adversary", "step_size", "alpha", "rho", "ema", "exploration", "max_weight")
        return {
            "version": 2,
            **{name: getattr(self, name) for name in (*names, "reference", "weighting", "share_normalised")},
        }
