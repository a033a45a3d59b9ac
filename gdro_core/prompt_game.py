"""Prompt-GDRO: an adversary over difficulty bins that reweights prompts (§3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._old_states import prompt_game_2
from gdro_core._validate import Floats, check_state, choice, dials, floats, integer, integers, number
from gdro_core.adversaries import Adversary, Entropic


@dataclass(frozen=True)
class Payoff:
    """What the adversary earns on a prompt, from c correct of n rollouts.

    >>> LEARNABILITY.of([1, 4], [4, 4])
    array([1., 0.])
    """

    name: str  # in saved states and messages
    fewest: int  # fewest rollouts of a prompt that it needs
    greatest: float  # its greatest value; the least is 0
    formula: Callable[[Floats, Floats], Floats]  # (N,) c, (N,) n -> (N,)

    def of(self, correct: ArrayLike, trials: ArrayLike) -> Floats:
        """(N,) payoffs of c = `correct` of n = `trials` rollouts, (N,) each.

        Raises:
            ValueError: too few trials, or more correct than trials.
        """
        n = floats("trials", trials, (-1,), float(self.fewest))
        c = floats("correct", correct, n.shape, 0.0)
        if (c > n).any():
            raise ValueError(f"correct must be at most trials, got {c[c > n][0]} of {n[c > n][0]}")
        return self.formula(c, n)


# 1 - c/n in [0, 1], unbiased for 1 - p.
ERROR = Payoff("error", fewest=1, greatest=1.0, formula=lambda c, n: 1.0 - c / n)
# 4 c (n - c) / (n (n - 1)), unbiased for 4 p (1 - p); it reaches 2 at one success of two.
LEARNABILITY = Payoff("learnability", fewest=2, greatest=2.0, formula=lambda c, n: 4.0 * c * (n - c) / (n * (n - 1.0)))
PAYOFFS = {payoff.name: payoff for payoff in (ERROR, LEARNABILITY)}


def prompt_payoff(name: str, correct: ArrayLike, trials: ArrayLike) -> Floats:
    r"""`Payoff.of` by name: "error" or "learnability".

    The paper's own payoff, the prompt loss of Eq. 7, comes from the policy update (`PublishedPromptGDRO`).

    >>> prompt_payoff("error", [1, 4], [4, 4])
    array([0.75, 0.  ])
    """
    return PAYOFFS[choice("payoff", name, list(PAYOFFS))].of(correct, trials)


class PromptGDRO:
    r"""An adversary over difficulty bins; the learner meets it as weights on prompts.

        w_b = min(q_b / p_b, max_weight),    q = (1 - gamma) q* + gamma r      (Eq. 15)

    with p_b the running share of bin b among the prompts drawn, r a reference mixture, and q* the adversary's answer to
    its scores: for `Entropic`, `CVaR` and `ChiSquare` the best response to running means of the payoffs, for `NoRegret`
    exponential weights on losses cumulated over all rounds.

    With r = p the game is around the data: w_b = e^{eta S_b} / sum_j p_j e^{eta S_j} for the entropic adversary, and
    rare bins are not inflated. With `uniform_reference` bins count the same whatever their share, applied by importance
    q_b / p_b, so that the learner really optimises sum_b q_b L_b (F9). Either way a bin's weight depends on past
    batches only, never on what else is in the present one; its mean over prompts drawn with shares p is 1 while no
    weight is capped.

    Departs: the published game is `PublishedPromptGDRO`. Its weights e^{eta S_b} are unnormalised (Eq. 16), its scores
    clipped at an unnamed C (Eq. 14); payoffs here are bounded and need no clip.

    Args:
        num_bins: B.
        adversary: `Entropic`, `CVaR`, `ChiSquare`, `NoRegret` (`gdro_core.adversaries`), or one of your own.
        payoff: `ERROR`, `LEARNABILITY`, or a record of your own.
        ema: beta in (0, 1], of scores and shares.
        exploration: gamma in [0, 1].
        max_weight: cap on a weight, >= 1.
        uniform_reference: r is uniform over bins instead of their share; `NoRegret` needs it.

    >>> game = PromptGDRO(num_bins=2, adversary=Entropic(2.0))
    >>> game.observe([0, 1, 1, 1], payoff=[1.0, 0.0, 0.0, 0.0])
    >>> game.weights([0, 1, -1]).round(3)
    array([2.845, 0.385, 1.   ])
    """

    def __init__(
        self,
        num_bins: int,
        *,
        adversary: Adversary = Entropic(2.0),
        payoff: Payoff = ERROR,
        ema: float = 0.12,
        exploration: float = 0.0,
        max_weight: float = 15.0,
        uniform_reference: bool = False,
    ) -> None:
        self.num_bins = integer("num_bins", num_bins, 1)
        for name, value, kind in (("adversary", adversary, Adversary), ("payoff", payoff, Payoff)):
            if not isinstance(value, kind):
                example = "gdro_core.Entropic(2.0)" if kind is Adversary else "gdro_core.ERROR"
                raise ValueError(f"{name} must be an object such as {example}, got {value!r}")
        self.adversary, self.payoff = adversary, payoff
        self.ema = number("ema", ema, 0.0, 1.0, open_low=True)
        self.exploration = number("exploration", exploration, 0.0, 1.0)
        self.max_weight = number("max_weight", max_weight, 1.0)
        self.uniform_reference = bool(uniform_reference)
        if adversary.cumulative and not (self.uniform_reference and np.isfinite(payoff.greatest)):
            raise ValueError(
                f"{adversary} needs a bounded payoff and uniform_reference=True, got payoff {payoff.name!r} up to "
                f"{payoff.greatest} and uniform_reference={self.uniform_reference}"
            )
        self._memory = adversary.memory(self.num_bins, self.ema, payoff.greatest)
        self._share, self._share_weight = np.zeros(self.num_bins), 0.0
        self._mixture: Floats | None = None  # `probabilities`, kept until the next observation

    @property
    def scores(self) -> Floats:
        """(B,) what the adversary responds to: running mean payoffs, or log weights of `NoRegret`."""
        return self._memory.scores

    @property
    def share(self) -> Floats:
        """(B,) p_b > 0, running share of each bin among the prompts drawn; uniform before the first batch.

        Never 0 (at least about 1e-100), so that q_b / p_b is the weight of a bin whose first prompts arrive.
        """
        if self._share_weight == 0:
            return np.full(self.num_bins, 1.0 / self.num_bins)
        share = np.maximum(self._share / self._share_weight, 1e-100)
        return np.asarray(share / share.sum())

    @property
    def probabilities(self) -> Floats:
        """(B,) q_b, the adversary's mixture over bins (Eq. 15)."""
        if self._mixture is None:
            r = np.full(self.num_bins, 1.0 / self.num_bins) if self.uniform_reference else self.share
            play = self.adversary.respond(self.scores, r)
            self._mixture = np.asarray((1.0 - self.exploration) * play + self.exploration * r)
        return self._mixture.copy()

    @property
    def bin_weights(self) -> Floats:
        """(B,) w_b."""
        ratio = np.ones(self.num_bins) if self._share_weight == 0 else self.probabilities / self.share
        return np.minimum(np.maximum(ratio, 1e-300), self.max_weight)  # > 0, so that a batch of one bin can have mean 1

    def weights(self, bins: ArrayLike) -> Floats:
        """(N,) weight of each prompt by its bin; 1 for unseen prompts (bin −1)."""
        b = integers("bins", bins, (-1,), -1, self.num_bins - 1)
        return np.where(b >= 0, self.bin_weights[b], 1.0)

    def observe(self, bins: ArrayLike, payoff: ArrayLike) -> None:
        """Update scores and shares by one batch of prompts; unseen prompts (bin −1) count for neither.

        Args:
            bins: (N,) the bins that the batch was planned with.
            payoff: (N,) payoff of each prompt; in [0, its greatest value] for an adversary that cumulates.
        """
        b = integers("bins", bins, (-1,), -1, self.num_bins - 1)
        low, high = (0.0, self.payoff.greatest) if self.adversary.cumulative else (-np.inf, np.inf)
        gains = floats("payoff", payoff, b.shape, low, high)
        gains, b = gains[b >= 0], b[b >= 0]
        if b.size == 0:
            return
        size = np.bincount(b, minlength=self.num_bins)
        total = np.bincount(b, weights=gains, minlength=self.num_bins)
        self._share += self.ema * (size / b.size - self._share)
        self._share_weight += self.ema * (1.0 - self._share_weight)
        self._memory.observe(size, total / np.maximum(size, 1))
        self._mixture = None

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain lists and numbers."""
        memory = {"share": self._share.tolist(), "share_weight": float(self._share_weight)}
        return {**self._settings(), **memory, "memory": self._memory.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a game with the same settings; on ValueError nothing has changed."""
        if saved.get("version") == 2:
            saved = prompt_game_2(saved)
        check_state("PromptGDRO", saved, self._settings(), ("share", "share_weight", "memory"))
        share = floats("share", saved["share"], (self.num_bins,), 0.0, 1.0)
        share_weight = number("share_weight", saved["share_weight"], 0.0, 1.0)
        self._memory.load_state_dict(saved["memory"])
        self._share, self._share_weight, self._mixture = share.copy(), share_weight, None

    def _settings(self) -> dict[str, Any]:
        names = ("num_bins", "ema", "exploration", "max_weight", "uniform_reference")
        named = {name: getattr(self, name) for name in names}
        return {"version": 3, **named, "payoff": self.payoff.name, "adversary": dials(self.adversary)}
