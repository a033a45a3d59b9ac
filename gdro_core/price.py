"""The shadow price of a rollout: dual ascent on the mean budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gdro_core._validate import number, state


@dataclass
class ShadowPrice:
    r"""Projected dual ascent on the mean-rollout constraint (Eq. 21).

        mu <- max(mu + alpha (n_realised - n_bar), 0)

    Since each step moves mu by at least alpha (n_realised - n_bar), the average violation telescopes:
    (1/T) sum_t (n_t - n_bar) <= (mu_T - mu_0) / (alpha T) (theory test 7).

    Departs: projected on [0, inf), so that compute is never subsidised; Eq. 21 has no projection.

    Note that an allocation that meets the budget exactly, as §3.3's dynamic program does, leaves mu where it is: the
    price moves only for a demand that may miss the budget, such as n_b(mu) = sqrt(v_b / mu) of Eq. 31.

    >>> price = ShadowPrice(target=4.0, step_size=0.05)
    >>> round(price.update(6.0), 3), price.update(0.0)
    (0.1, 0.0)
    """

    target: float  # n_bar [rollouts / prompt]
    step_size: float  # alpha_mu [utility prompt^2 / rollout^2]
    price: float = 0.0  # mu [utility / rollout]

    def __post_init__(self) -> None:
        self.target = number("target", self.target, 0.0, open_low=True)
        self.step_size = number("step_size", self.step_size, 0.0, open_low=True)
        self.price = number("price", self.price, 0.0)

    def update(self, realised: float) -> float:
        """Move mu by one observation of the mean rollouts per prompt; the new price."""
        self.price = max(self.price + self.step_size * (number("realised", realised, 0.0) - self.target), 0.0)
        return self.price

    def state_dict(self) -> dict[str, Any]:
        """Everything a continuation needs, as plain numbers."""
        return {"version": 1, "target": self.target, "step_size": self.step_size, "price": self.price}

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a price with the same settings."""
        state("ShadowPrice", found, {"version": 1, "target": self.target, "step_size": self.step_size})
        self.price = number("price", found["price"], 0.0)
