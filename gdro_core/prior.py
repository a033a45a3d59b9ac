r"""What is known of a prompt before it is sampled: what first visits of others showed, and how much all have improved.

Pass rates of prompts at their first visit are taken for draws from Beta(a_0, b_0), and with each step of training the
logit of every prompt is taken to rise by the same `rate`. Both are estimated as the run goes, from two numbers and
their information each, so that a step costs the same however many prompts are known.

(a_0, b_0) is the mode of the beta-binomial likelihood of the prompts' first visits, an older one counting less, found
by one proximal Fisher scoring a step (proofs, "The learnt prior"). The likelihood does not ask why a prompt got n
rollouts, so counts may depend on its own first outcomes; moments of c / n would be biased then.

With (a, b) a prompt's posterior, of mean p, s steps after its last visit, and c of n right now, E c = n expit(logit p +
s rate) up to the spread of p. `rate` is the solution of the score equation of this logistic model with an offset, each
prompt weighted by binomial over beta-binomial variance, (a + b + 1) / (a + b + n).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import fsum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdro_core._validate import Floats, check_state, floats, integer, number

START = (0.5, 0.5)  # (a_0, b_0) before the first batch, with standard deviation 1 of its logarithms
_MEMORY = 5000.0  # first visits, after which an older one counts 1 / e
_KEEP = 0.95  # of the information about the rate, at each step
_RIDGE = 50.0  # binomial variance [rollouts^2] that holds the rate where it is
_LOW, _HIGH = np.log(0.02), np.log(50.0)
_ROUNDS = 4


class LearntPrior:
    """The Beta prior of unseen prompts, and the common improvement per step, learnt from a run.

    Give it to `OnlineDifficultyClassifier(prior=LearntPrior())`, which then tells it what it observes. Nothing depends
    on the order of the prompts within a batch, to the bit.

    What it rests on: prompts come to their first visit in random order; one rate for all, so that prompts that nothing
    can teach are overestimated by it; a rate that changes slowly over a prompt's absence.

    >>> prior = LearntPrior()
    >>> prior.parameters, prior.rate
    ((0.5, 0.5), 0.0)
    >>> half, correct = np.full(4, 0.5), np.array([0.0, 0.0, 1.0, 0.0])
    >>> prior.observe(half, half, age=np.zeros(4), correct=correct, trials=np.full(4, 8.0), new=np.full(4, True))
    >>> a, b = prior.parameters
    >>> a / (a + b) < 0.3
    True
    """

    def __init__(self) -> None:
        self.step = 0  # calls to `observe`
        self.rate = 0.0  # [logit / step]
        self._log = np.log(START)  # (2,) log a_0, log b_0
        self._information = np.eye(2)  # of self._log
        self._rate_information = 0.0

    @property
    def parameters(self) -> tuple[float, float]:
        """(a_0, b_0) of a prompt's first visit."""
        a, b = np.exp(self._log)
        return float(a), float(b)

    def moved(self, a: Floats, b: Floats, age: Floats) -> tuple[Floats, Floats]:
        """(N,) and (N,): counts or Beta parameters `age` steps later, of logit mean higher by age x rate, same sum."""
        risen = a * np.exp(np.clip(age * self.rate, -30.0, 30.0))
        scale = (a + b) / np.maximum(risen + b, np.finfo(float).tiny)
        return scale * risen, scale * b

    def observe(
        self, a: Floats, b: Floats, age: Floats, correct: Floats, trials: Floats, new: NDArray[np.bool_]
    ) -> None:
        """Learn from the graded prompts of one step.

        Args:
            a, b: (N,) parameters of the posteriors that the step was predicted with (`moved`).
            age: (N,) steps since the prompt's last visit.
            correct: (N,) c in [0, n].
            trials: (N,) n > 0.
            new: (N,) whether this is the prompt's first visit.
        """
        if new.any():
            self._learn_parameters(correct[new], trials[new])
        old = ~new
        if old.any():
            self._learn_rate(a[old], b[old], age[old], correct[old], trials[old])
        self.step += 1

    def _learn_parameters(self, correct: Floats, trials: Floats) -> None:
        kinds, times = np.unique(correct + 1j * trials, return_counts=True)  # sorted: no order within the batch is left
        c, n = kinds.real, kinds.imag
        known = self._information * np.exp(-correct.size / _MEMORY)
        log = self._log
        for _ in range(_ROUNDS):
            scores = _scores(log, c, n)
            weighted = scores * times
            step = np.linalg.solve(known + weighted @ scores.T, weighted.sum(axis=1) - known @ (log - self._log))
            log = np.clip(log + step / max(1.0, float(np.abs(step).max())), _LOW, _HIGH)
        scores = _scores(log, c, n)
        self._log, self._information = log, known + (scores * times) @ scores.T

    def _learn_rate(self, a: Floats, b: Floats, age: Floats, correct: Floats, trials: Floats) -> None:
        p = a / (a + b)
        weighted = age * (a + b + 1.0) / (a + b + trials)
        score = fsum(weighted * (correct - trials * p))  # fsum: exact, so the order within the batch does not matter
        self._rate_information = _KEEP * self._rate_information + fsum(weighted * age * trials * p * (1.0 - p))
        self.rate += score / (self._rate_information + _RIDGE * fsum(age**2) / age.size)

    def state_dict(self) -> dict[str, Any]:
        """All memory as numbers and lists."""
        return {
            "version": 1,
            "step": self.step,
            "rate": self.rate,
            "log": self._log.tolist(),
            "information": self._information.tolist(),
            "rate_information": self._rate_information,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue bit for bit from `state_dict()`.

        Raises:
            ValueError: another version, a missing key, a damaged array; nothing has changed then.
        """
        check_state("LearntPrior", saved, {"version": 1}, ("step", "rate", "log", "information", "rate_information"))
        step, rate = integer("step", saved["step"], 0), float(floats("rate", saved["rate"], ()))
        log = floats("log", saved["log"], (2,), _LOW, _HIGH)
        information = floats("information", saved["information"], (2, 2))
        self._rate_information = number("rate_information", saved["rate_information"], 0.0)
        self.step, self.rate, self._log, self._information = step, rate, log, information


def _scores(log: Floats, c: Floats, n: Floats) -> Floats:
    """(2, K) derivatives of the beta-binomial log likelihood of K counts by log a_0 and log b_0."""
    from scipy.special import digamma  # not at import: `import gdro_core` loads numpy only

    a, b = np.exp(log)
    total = digamma(a + b) - digamma(a + b + n)
    return np.stack([a * (digamma(a + c) - digamma(a) + total), b * (digamma(b + n - c) - digamma(b) + total)])
