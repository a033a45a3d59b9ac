"""The shadow price of a rollout: dual ascent on the mean budget, and what it guarantees (theorem 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from gdro_core._validate import check_state, integer, number


@dataclass
class ShadowPrice:
    r"""Projected dual ascent on the mean-rollout constraint (Eq. 21).

        mu <- max(mu + alpha (n_realised - n_bar), 0)

    Since each step moves mu by at least alpha (n_realised - n_bar), the average violation telescopes:
    (1/T) sum_t (n_t - n_bar) <= (mu_T - mu_0) / (alpha T) (`violation_bound`). With prompts that choose n_t by the
    price and a hard stop at the end of the budget it is dual mirror descent (`hard_budget_regret_bound`).

    Departs: projected on [0, inf), so that compute is never subsidised; Eq. 21 has no projection.

    Note that an allocation that meets the budget exactly, as §3.3's dynamic program does, leaves mu where it is: the
    price moves only for a demand that may miss the budget, such as n_b(mu) = sqrt(v_b / mu) of Eq. 31.

    >>> price = ShadowPrice(target=4.0, step_size=0.05)
    >>> round(price.update(6.0), 3), price.update(0.0)
    (0.1, 0.0)
    >>> price.mean_violation, round(price.highest, 3)
    (-1.0, 0.1)
    """

    target: float  # n_bar [rollouts / prompt]
    step_size: float  # alpha_mu [utility prompt^2 / rollout^2]
    price: float = 0.0  # mu [utility / rollout]
    updates: int = field(default=0, init=False)  # T
    mean_violation: float = field(default=0.0, init=False)  # (1/T) sum_t (n_t - n_bar) [rollouts / prompt]
    highest: float = field(default=0.0, init=False)  # max_t mu_t [utility / rollout]

    def __post_init__(self) -> None:
        self.target = number("target", self.target, 0.0, open_low=True)
        self.step_size = number("step_size", self.step_size, 0.0, open_low=True)
        self.price = self.highest = number("price", self.price, 0.0)

    def update(self, realised: float) -> float:
        """Move mu by one observation of the mean rollouts per prompt; the new price."""
        violation = number("realised", realised, 0.0) - self.target
        self.price = max(self.price + self.step_size * violation, 0.0)
        self.updates += 1
        self.mean_violation += (violation - self.mean_violation) / self.updates
        self.highest = max(self.highest, self.price)
        return self.price

    def state_dict(self) -> dict[str, Any]:
        """Everything a continuation needs, as plain numbers."""
        names = ("target", "step_size", "price", "updates", "mean_violation", "highest")
        return {"version": 1, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a price with the same settings; on ValueError nothing has changed."""
        settings = {"version": 1, "target": self.target, "step_size": self.step_size}
        check_state("ShadowPrice", saved, settings, ("price", "updates", "mean_violation", "highest"))
        price = number("price", saved["price"], 0.0)
        updates = integer("updates", saved["updates"], 0)
        mean_violation = number("mean_violation", saved["mean_violation"], -self.target)
        highest = number("highest", saved["highest"], 0.0)
        self.price, self.updates, self.mean_violation, self.highest = price, updates, mean_violation, highest


def violation_bound(horizon: int, step_size: float, price_range: float, *, noise: float = 0.0) -> float:
    r"""Average violation of the budget after T steps of dual ascent (theorem 7).

        (1/T) sum_t (n_t - n_bar)  <=  (price range) / (alpha T) + noise / sqrt(T)

    Without noise it holds on every path with range = mu_T - mu_0, by telescoping. Let m be a price from which on the
    demand is at most n_bar, and mu_0 <= m. If that is sure at every step, mu_t <= m + alpha (n_max - n_bar): range =
    m + alpha (n_max - n_bar) - mu_0, noise 0. If it is so on average only, E[n_t | past] <= n_bar when mu_t >= m, then
    with G^2 >= E[(n_t - n_bar)^2 | past] the mean of (mu_t - m)_+^2 grows by at most alpha^2 G^2 a step, so
    E mu_T <= m + alpha G sqrt(T): the bound holds in expectation with range = m - mu_0, noise = G. Either is
    O(1 / sqrt(T)) for alpha ∝ 1 / sqrt(T).

    Args:
        horizon: T.
        step_size: alpha.
        price_range: see above [utility / rollout].
        noise: G >= 0 [rollouts / prompt].

    >>> violation_bound(100, 0.05, 2.0, noise=3.0)
    0.7
    """
    steps = integer("horizon", horizon, 1)
    alpha = number("step_size", step_size, 0.0, open_low=True)
    return number("price_range", price_range, 0.0) / (alpha * steps) + number("noise", noise, 0.0) / sqrt(steps)


def hard_budget_regret_bound(
    horizon: int, step_size: float, *, target: float, max_reward: float, max_cost: float, price: float = 0.0
) -> float:
    r"""Regret of buying at the shadow price until a hard budget n_bar T is spent, against hindsight (theorem 7).

        E[OPT] - E[reward]  <=  C_1 + C_2 eta T + C_3 / eta,
        C_1 = f c / n_bar,   C_2 = max(n_bar, c - n_bar)^2 / 2,   C_3 = max(mu_0, f / n_bar - mu_0)^2 / 2

    Requests (f_t, c_t) are i.i.d. with rewards in [0, f], costs in [0, c] and a null action (0, 0); step t takes
    argmax_x f_t(x) - mu_t c_t(x) if the budget left allows it, then `ShadowPrice.update(cost)` with step eta. OPT knows
    all requests. Balseiro, Lu and Mirrokni (2020; Operations Research 2023, arXiv 2011.10124), with the mirror map
    mu^2 / 2; the constants are derived anew, as one dimension is sharper:

    Let tau be the last step at which c is still affordable. Up to tau, f_t(x_t) = f_t^*(mu_t) + mu_t c_t(x_t) with
    f^*(mu) = max_x f(x) - mu c(x). In expectation this is D(mu_t) - mu_t (n_bar - c_t(x_t)), with
    D(mu) = E f^*(mu) + mu n_bar convex and T D(mu) >= E OPT. Hence regret <= E[sum_{t<=tau} mu_t g_t + (T - tau) f],
    g_t = n_bar - c_t(x_t). Projected descent gives sum mu_t g_t <= sum mu g_t + (mu - mu_0)^2 / (2 eta) + eta T G^2 / 2
    with |g| <= G = max(n_bar, c - n_bar). If tau = T take mu = 0. Otherwise sum_{t<=tau} c_t >= n_bar T - c, and
    mu = f / n_bar makes mu sum g_t <= f (tau - T) + f c / n_bar, which pays for (T - tau) f.

    The best eta = sqrt(C_3 / (C_2 T)) gives O(sqrt(T)).

    Args:
        horizon: T.
        step_size: eta.
        target: n_bar, budget per step.
        max_reward: f.
        max_cost: c >= n_bar.
        price: mu_0.

    >>> hard_budget_regret_bound(100, 0.05, target=4.0, max_reward=1.0, max_cost=12.0)  # 3 + 32 x 5 + .03125 / .05
    163.625
    """
    steps = integer("horizon", horizon, 1)
    eta = number("step_size", step_size, 0.0, open_low=True)
    mean = number("target", target, 0.0, open_low=True)
    reward, cost = number("max_reward", max_reward, 0.0), number("max_cost", max_cost, mean)
    start = number("price", price, 0.0)
    slope, reach = max(mean, cost - mean), max(start, reward / mean - start)
    return reward * cost / mean + eta * steps * slope**2 / 2.0 + reach**2 / (2.0 * eta)
