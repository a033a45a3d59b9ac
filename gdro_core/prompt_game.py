"""Prompt-GDRO: an adversary over difficulty bins that reweights prompts (§3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import Floats, choice, floats, integer, integers, number, state

PAYOFFS = ("error", "learnability", "surrogate")


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
    r"""Entropic adversary over bins; the learner meets it as weights on prompts.

        S_b <- (1 - beta) S_b + beta l_b          l_b: mean payoff of the bin's prompts; bins present only (Eq. 12)
        q_b  = (1 - gamma) r_b e^{eta S_b} / sum_j r_j e^{eta S_j} + gamma r_b      (Eq. 14-15; Lemma 4.1, reference r)
        w_b  = min(q_b / p_b, max_weight)         p_b = running share of bin b among the prompts drawn

    With r = p (`reference="share"`) the weight is e^{eta S_b} / sum_j p_j e^{eta S_j}: the adversary of the
    KL-regularised game around the data distribution, where rare bins are not inflated. With `reference="uniform"` it is
    the paper's entropy-regularised adversary over bins, applied by importance q_b / p_b, so that the learner really
    optimises sum_b q_b L_b (F9). Either way a bin's weight depends on past batches only, never on what else is in
    the present one; its mean over prompts drawn with shares p is 1 while no weight is capped. S is debiased by its
    accumulated weight, so a bin starts at its first payoff; a bin never observed is interpolated linearly between its
    nearest observed neighbours (bins are ordered), so that its first prompts are not taken for average ones.

    With `weighting="published"`: w_b = min(e^{eta S_b}, max_weight) unnormalised (Eq. 16), S_0 = 0 without debiasing,
    r uniform; `share_normalised` divides l_b by the bin's share in the batch, floored at 0.01.

    Departs: Eq. 14 clips S at an unnamed C; payoffs of `error` and `learnability` need no clip, so only the published
    weighting clips, at C = 1.

    Args:
        num_bins: B.
        payoff: `"error"`, `"learnability"` (`prompt_payoff`) or `"surrogate"` (Eq. 7, blind to difficulty: F1).
        step_size: eta >= 0; 0 gives weights r_b / p_b.
        ema: beta in (0, 1].
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
        step_size: float = 2.0,
        ema: float = 0.12,
        exploration: float = 0.0,
        max_weight: float = 15.0,
        reference: str = "share",
        weighting: str = "importance",
        share_normalised: bool = False,
    ) -> None:
        self.num_bins = integer("num_bins", num_bins, 1)
        self.payoff = choice("payoff", payoff, PAYOFFS)
        self.step_size = number("step_size", step_size, 0.0)
        self.ema = number("ema", ema, 0.0, 1.0, open_low=True)
        self.exploration = number("exploration", exploration, 0.0, 1.0)
        self.max_weight = number("max_weight", max_weight, 1.0)
        self.reference = choice("reference", reference, ("share", "uniform"))
        self.weighting = choice("weighting", weighting, ("importance", "published"))
        self.share_normalised = bool(share_normalised)
        if self.weighting == "importance" and self.share_normalised:
            raise ValueError('share_normalised must be False unless weighting is "published", got True')
        if self.weighting == "published" and self.reference != "uniform":
            raise ValueError(f'reference must be "uniform" with weighting "published", got {self.reference!r}')
        self._score, self._score_weight = np.zeros(self.num_bins), np.zeros(self.num_bins)
        self._share, self._share_weight = np.zeros(self.num_bins), 0.0

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
        """(B,) p_b, running share of each bin among the prompts drawn; uniform before the first batch."""
        if self._share_weight == 0:
            return np.full(self.num_bins, 1.0 / self.num_bins)
        return self._share / self._share_weight

    @property
    def probabilities(self) -> Floats:
        """(B,) q_b, the adversary's mixture over bins (Eq. 15)."""
        with np.errstate(divide="ignore"):  # log 0 = -inf: a bin without share has no mass under reference "share"
            log_reference = np.log(
                self.share if self.reference == "share" else np.full(self.num_bins, 1 / self.num_bins)
            )
        logits = self.step_size * self.scores + log_reference
        tilted = np.exp(logits - np.logaddexp.reduce(logits))
        return np.asarray((1.0 - self.exploration) * tilted + self.exploration * np.exp(log_reference))

    @property
    def bin_weights(self) -> Floats:
        """(B,) w_b."""
        if self.weighting == "published":
            ratio = np.exp(np.minimum(self.step_size * self.scores, 700.0))  # e^700 is still finite; the cap is below
        elif self._share_weight == 0:
            ratio = np.ones(self.num_bins)
        elif self.reference == "share":
            with np.errstate(divide="ignore"):
                log_mean = np.logaddexp.reduce(self.step_size * self.scores + np.log(self.share))
            ratio = np.exp(np.minimum(self.step_size * self.scores - log_mean, 700.0))
            ratio = (1.0 - self.exploration) * ratio + self.exploration
        else:
            q, p = self.probabilities, self.share
            with np.errstate(over="ignore"):
                ratio = np.divide(q, p, out=np.full_like(q, np.inf), where=p > 0)  # a bin never drawn is capped
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
        gains = floats("payoff", payoff, b.shape)
        gains, b = gains[b >= 0], b[b >= 0]
        if b.size == 0:
            return
        size = np.bincount(b, minlength=self.num_bins)
        there = size > 0
        mean = np.bincount(b, weights=gains, minlength=self.num_bins)[there] / size[there]
        share = size / b.size
        if self.share_normalised:
            mean = mean / np.maximum(share[there], 0.01)
        self._score[there] += self.ema * (mean - self._score[there])
        self._score_weight[there] += self.ema * (1.0 - self._score_weight[there])
        self._share += self.ema * (share - self._share)
        self._share_weight += self.ema * (1.0 - self._share_weight)

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain lists and numbers."""
        return {
            **self._settings(),
            "score": self._score.tolist(),
            "score_weight": self._score_weight.tolist(),
            "share": self._share.tolist(),
            "share_weight": float(self._share_weight),
        }

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a game with the same settings; on ValueError nothing has changed."""
        state("PromptGDRO", found, self._settings())
        shape = (self.num_bins,)
        score = floats("score", found["score"], shape)
        score_weight = floats("score_weight", found["score_weight"], shape, 0.0, 1.0)
        share = floats("share", found["share"], shape, 0.0, 1.0)
        share_weight = number("share_weight", found["share_weight"], 0.0, 1.0)
        self._score, self._score_weight = score.copy(), score_weight.copy()
        self._share, self._share_weight = share.copy(), share_weight

    def _settings(self) -> dict[str, Any]:
        names = ("num_bins", "payoff", "step_size", "ema", "exploration", "max_weight", "reference", "weighting")
        return {"version": 1, **{name: getattr(self, name) for name in (*names, "share_normalised")}}
