r"""What theory promises: regret bounds with explicit constants, and the two quantities that they bound.

The regret of play against losses l_t in [0, 1] over T rounds and K arms is sum_t <p_t, l_t> - min_i sum_t l_{t,i}; "E"
is over the algorithm's draws. Each bound names the step size it needs (`for_horizon` of the policies in
`gdro_core.theory.bandits`) and its source; where the constant was derived here, the derivation is in the docstring.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._validate import floats, integer, number


def hedge_bound(horizon: int, num_arms: int) -> float:
    r"""Sqrt(T ln K / 2), Hedge with eta = sqrt(8 ln K / T), on every sequence (Cesa-Bianchi & Lugosi 2006, Thm 2.2).

    >>> round(hedge_bound(200, 10), 3)
    15.174
    """
    return delayed_hedge_bound(horizon, num_arms, 0.0)


def delayed_hedge_bound(horizon: int, num_arms: int, total_delay: float) -> float:
    r"""Sqrt((T + 2 D) ln K / 2), Hedge with eta = sqrt(8 ln K / (T + 2 D)) and a sum of delays D (theorem 12).

    Losses of round t with delay d_t are first used in round t + d_t + 1; D = sum_t d_t, in any pattern. Derived here:
    let p*_t be the play without delays, of regret <= ln K / eta + eta T / 8. Each loss vector g missing in round t
    tilts p_t towards p*_t by softmax, along which <p, l_t> moves at the rate -eta Cov_p(g, l_t), at most eta / 4 since
    both lie in [0, 1]. The number of missing vectors, summed over rounds, is at most D, so the regret grows by at most
    eta D / 4: ln K / eta + eta (T + 2 D) / 8, minimised at the given eta. (Rate sqrt(D ln K): Joulani et al. 2016,
    Quanrud & Khashabi 2015.)

    >>> round(delayed_hedge_bound(200, 10, total_delay=600), 3)
    40.147
    """
    t, log_k = _rounds_and_log_arms(horizon, num_arms)
    return float(np.sqrt((t + 2.0 * number("total_delay", total_delay, 0.0)) * log_k / 2.0))


def limited_advice_bound(num_arms: int, observation_probability: ArrayLike) -> float:
    r"""Sqrt(2 ln K sum_t 1 / o_t), E regret of Hedge when each arm's loss is observed with probability >= o_t.

    Hedge on l^ = 1{observed} l / o with eta = sqrt(2 ln K / sum_t 1 / o_t), losses fixed in advance and o_t known.
    Proof: e^{-x} <= 1 - x + x^2 / 2 for x >= 0 gives ln K / eta + (eta / 2) sum_t E <p_t, l^_t^2>, and E l^_{t,i}^2 <=
    1 / o_t. With r_t of K arms drawn uniformly o_t = r_t / K, and the bound over T is (1 / T) sqrt(2 sum_t (K / r_t)
    ln K): the rate of Bai et al. 2025 (arXiv 2505.15212), who have it with high probability and adaptive losses, other
    constant. One arm drawn uniformly is the case o = 1 / K (Seldin et al. 2014 for a fixed number).

    Args:
        num_arms: K.
        observation_probability: (T,) o_t in (0, 1].

    >>> round(limited_advice_bound(10, np.full(200, 0.2)), 3)
    67.861
    """
    chance = floats("observation_probability", observation_probability, (-1,), 0.0, 1.0)
    if (chance == 0.0).any():
        raise ValueError("observation_probability must be positive, got 0.0")
    return float(np.sqrt(2.0 * np.log(integer("num_arms", num_arms, 2)) * (1.0 / chance).sum()))


def exp3_bound(horizon: int, num_arms: int) -> float:
    r"""Sqrt(2 T K ln K), E regret of Exp3 with eta = sqrt(2 ln K / (T K)), losses fixed in advance.

    Lattimore & Szepesvari 2020, Thm 11.2. With losses instead of their gains the proof is that of
    `limited_advice_bound` with o_{t,i} = p_{t,i}: E <p_t, l^_t^2> = sum_i l_{t,i}^2 <= K.

    >>> round(exp3_bound(200, 10), 3)
    95.971
    """
    t, log_k = _rounds_and_log_arms(horizon, num_arms)
    return float(np.sqrt(2.0 * t * num_arms * log_k))


def exp3_ix_bound(horizon: int, num_arms: int, delta: float) -> float:
    r"""2 sqrt(2 K T ln K) + (sqrt(K T / (2 ln K)) + 1) ln(2 / delta), with probability 1 - delta.

    Regret sum_t l_{t,I_t} - min_i sum_t l_{t,i} of Exp3-IX with eta = 2 gamma = sqrt(2 ln K / (K T)), which knows no
    delta, against an adversary that sees the past. Neu 2015, Thm 1, is usually quoted with sqrt(2 K T / ln K) before
    ln(2 / delta); his proof gives half of that: as in `exp3_bound`, and since <p_t, l^_t> = l_{t,I_t} - gamma sum_i
    l^_{t,i} and <p_t, l^_t^2> <= sum_i l^_{t,i},

        sum_t (l_{t,I_t} - l^_{t,j}) <= ln K / eta + (eta / 2 + gamma) sum_{t,i} l^_{t,i},

    and by his Lemma 1 each of: sum_t (l^_{t,j} - l_{t,j}) <= ln(2 K / delta) / (2 gamma) for all j, and
    sum_{t,i} (l^_{t,i} - l_{t,i}) <= ln(2 / delta) / (2 gamma), fails with probability <= delta / 2. Together
    R <= 2 ln K / eta + eta K T + (1 / eta + 1) ln(2 / delta).

    >>> round(exp3_ix_bound(200, 10, 0.1), 3)
    257.367
    """
    t, log_k = _rounds_and_log_arms(horizon, num_arms)
    level = np.log(2.0 / number("delta", delta, 0.0, 1.0, open_low=True))
    return float(2.0 * np.sqrt(2.0 * num_arms * t * log_k) + (np.sqrt(num_arms * t / (2.0 * log_k)) + 1.0) * level)


def exp3_p_bound(horizon: int, num_arms: int, delta: float) -> float:
    r"""5.15 sqrt(T K ln(K / delta)), with probability 1 - delta, Exp3.P with `Exp3P.for_horizon`'s parameters.

    Bubeck & Cesa-Bianchi 2012, Thm 3.2 (Eq. 3.10 of arXiv 1204.5721v2), against an adversary that sees the past.
    Checked: their proof needs gamma <= 1/2 and (1 + beta) K eta <= gamma, and gives beta T K + gamma T + (1 + beta)
    eta K T + ln(K / delta) / beta + ln K / eta. Where 5.15 sqrt(T K ln(K / delta)) < T (else the bound is trivial)
    beta <= 0.1 and gamma <= 0.21, so (1 + beta) K eta <= 1.045 sqrt(K ln K / T) <= gamma and the sum is <= (2 + 1.05 +
    1.045 + 1 / 0.95) sqrt(T K ln(K / delta)) <= 5.148 sqrt(T K ln(K / delta)).

    >>> round(exp3_p_bound(200, 10, 0.1), 3)
    494.248
    """
    t, _ = _rounds_and_log_arms(horizon, num_arms)
    level = np.log(num_arms / number("delta", delta, 0.0, 1.0, open_low=True))
    return float(5.15 * np.sqrt(t * num_arms * level))


def tracking_complexity(horizon: int, num_arms: int, switches: int) -> float:
    r"""C = (S + 1) ln K + (T - 1) h(S / (T - 1)), h the binary entropy in nats: what naming the sequence costs.

    At most (S + 1) ln K + S ln(e (T - 1) / S).

    >>> round(tracking_complexity(101, 2, 0), 4), round(tracking_complexity(101, 2, 10), 2)
    (0.6931, 40.13)
    """
    t, log_k = _rounds_and_log_arms(horizon, num_arms)
    s = integer("switches", switches, 0)
    if s > t - 1:
        raise ValueError(f"switches must be at most horizon - 1 = {t - 1}, got {switches!r}")
    entropy = sum(n * np.log((t - 1) / n) for n in (s, t - 1 - s) if n > 0)
    return float((s + 1) * log_k + entropy)


def exp3_s_bound(horizon: int, num_arms: int, switches: int) -> float:
    r"""Sqrt(2 T K C), C = `tracking_complexity`: E regret of Exp3.S against every sequence of arms with <= S switches.

    With alpha = S / (T - 1), eta = sqrt(2 C / (T K)), losses fixed in advance; S = 0 is Exp3's bound. Derived here
    (the fixed-share argument of Herbster & Warmuth 1998): for Z_t = <p_t, e^{-eta l^_t}> and w_{t+1,i} = p_{t,i}
    e^{-eta l^_{t,i}} / Z_t, a sequence (i_t) has

        sum_t -ln Z_t = eta sum_t l^_{t,i_t} + sum_t (ln w_{t+1,i_t} - ln p_{t,i_t}),

    and, as p_{t+1,i} >= (1 - alpha) w_{t+1,i} and p_{t+1,i} >= alpha / K, the last sum is at most ln K + S ln(K /
    alpha) + (T - 1 - S) ln(1 / (1 - alpha)) = C, while -ln Z_t >= eta <p_t, l^_t> - (eta^2 / 2) <p_t, l^_t^2> as in
    `exp3_bound`. So E R <= C / eta + eta T K / 2. A comparator with fewer switches costs no more as long as S / (T -
    1) <= K / (K + 1), where staying costs less than switching. Auer et al. 2002, Cor. 8.3, for gains with uniform
    exploration: 2 sqrt(e - 1) sqrt(K T (S' ln(K T) + e)), S' = S + 1.

    >>> round(exp3_s_bound(200, 10, 3), 1), exp3_s_bound(200, 10, 0) == exp3_bound(200, 10)
    (314.8, True)
    """
    complexity = tracking_complexity(horizon, num_arms, switches)
    return float(np.sqrt(2.0 * horizon * num_arms * complexity))


def tsallis_inf_bound(horizon: int, num_arms: int) -> float:
    r"""4 sqrt(K T) + 1, E regret of Tsallis-INF with eta_t = 2 / sqrt(t), at every T (Zimmert & Seldin 2021, Thm 1).

    Checked: with Psi(p) = -4 sum sqrt(p_i), the leader's penalty is <= (max Psi - min Psi) / eta_T = 2 (sqrt(K) - 1)
    sqrt(T); since l^ >= 0 the stability of round t is <= (eta_t / 2) sum_i p_i^{3/2} E l^_i^2 <= (eta_t / 2) sum_i
    sqrt(p_i) <= sqrt(K / t), and sum_t 1 / sqrt(t) <= 2 sqrt(T). Together even 4 sqrt(K T) - 2 sqrt(T).

    >>> round(tsallis_inf_bound(200, 10), 3)
    179.885
    """
    t, _ = _rounds_and_log_arms(horizon, num_arms)
    return float(4.0 * np.sqrt(num_arms * t) + 1.0)


def gdro_full_information_bound(horizon: int, num_groups: int, diameter: float, gradient_norm: float) -> float:
    r"""(2 D G + sqrt(2 ln m)) / sqrt(T), E duality gap of averaged play, one sample of each group a round (theorem 5).

        min_theta max_q sum_i q_i L_i(theta),     L_i = E l(theta; z_i) convex, l in [0, 1], |grad l| <= G
        theta, in a set of diameter D: projected gradient steps D / (G sqrt(T)) on sum_i q_i l(.; z_i); q: Hedge on -l

    The game of Zhang et al. 2023, Alg. 1, with separate step sizes. Derived here: T gap <= Regret_theta + Regret_q
    (Eq. 27) for the mean losses. Gradient descent on the sampled losses has regret <= D G sqrt(T); passing to means
    costs max_u <sum_t xi_t, u - u_1> <= D |sum_t xi_t|, at most D G sqrt(T) in mean, as the noise xi_t of the gradient
    has mean 0 given the past and E |xi_t|^2 <= G^2. Hedge has sqrt(T ln m / 2), and passing to means costs E max_i
    sum_t (L_i - l_i) <= sqrt(T ln m / 2), each term being sub-Gaussian of variance proxy 1/4 (Hoeffding). Without
    noise both costs vanish.

    >>> round(gdro_full_information_bound(10_000, 10, diameter=2.0, gradient_norm=1.0), 4)
    0.0615
    """
    t, log_m = _rounds_and_log_arms(horizon, num_groups, "num_groups")
    return float((_learner(diameter, gradient_norm) + np.sqrt(2.0 * log_m)) / np.sqrt(t))


def gdro_one_sample_bound(horizon: int, num_groups: int, diameter: float, gradient_norm: float) -> float:
    r"""E duality gap of averaged play when one group i ~ q is sampled a round (Zhang et al. 2023, Alg. 2; theorem 5).

        [2 D G sqrt(T) + sqrt(T ln m / 2) + 2 sqrt(2 m T ln m) + (1 + ln 2)(sqrt(m T / (2 ln m)) + 1)] / T

    As `gdro_full_information_bound`, with gradient grad l(theta; z_i) and Exp3-IX on 1 - l in place of Hedge. Derived
    here: the gradient still has mean sum_i q_i grad L_i and norm <= G; `exp3_ix_bound` holds for every delta at once,
    and P(R > A + B ln(2 / delta)) <= delta integrates to E R <= A + B (1 + ln 2). Plain Exp3 would not do: its bound
    is for losses fixed in advance, and these depend on theta, hence on past draws.

    >>> round(gdro_one_sample_bound(10_000, 10, diameter=2.0, gradient_norm=1.0), 4)
    0.2116
    """
    t, log_m = _rounds_and_log_arms(horizon, num_groups, "num_groups")
    adversary = exp3_ix_bound(t, num_groups, np.exp(-1.0))  # ln(2 / delta) = 1 + ln 2
    return float((_learner(diameter, gradient_norm) * np.sqrt(t) + np.sqrt(t * log_m / 2.0) + adversary) / t)


def best_in_hindsight(losses: ArrayLike, switches: int = 0) -> float:
    r"""Least total loss of a sequence of arms with at most S switches; S = 0: of one arm.

        min { sum_t l_{t,i_t} : #{t : i_t != i_{t+1}} <= S }          by dynamic programming, O(T K S)

    Args:
        losses: (T, K), finite.
        switches: S >= 0.

    >>> best_in_hindsight([[0.0, 1.0], [0.0, 1.0], [1.0, 0.5]])
    1.0
    >>> best_in_hindsight([[0.0, 1.0], [0.0, 1.0], [1.0, 0.5]], switches=1)
    0.5
    """
    table = floats("losses", losses, (-1, -1))
    if table.shape[1] == 0:
        raise ValueError(f"losses must have at least one arm, got shape {table.shape}")
    s = integer("switches", switches, 0)
    if s == 0:
        return float(table.sum(axis=0).min())
    best = np.zeros((s + 1, table.shape[1]))  # by switches used and present arm
    for row in table:
        best[1:] = np.minimum(best[1:], best[:-1].min(axis=1, keepdims=True))
        best += row
    return float(best.min())


def duality_gap(best_adversary: float, best_learner: float) -> float:
    r"""max_q L(theta_bar, q) - min_theta L(theta, q_bar) >= 0 of averaged play: 0 exactly at a saddle point.

    It bounds the worst-group excess: max_i L_i(theta_bar) - min_theta max_i L_i(theta) <= gap. For L convex in theta
    and linear in q, gap <= (Regret_theta + Regret_q) / T (Eq. 27 of the paper).

    Args:
        best_adversary: max_q L(theta_bar, q) = max_i L_i(theta_bar).
        best_learner: min_theta sum_i q_bar_i L_i(theta).

    Raises:
        ValueError: a gap below -1e-9 of the values' size, which weak duality excludes.

    >>> duality_gap(0.75, 0.5)
    0.25
    """
    high, low = number("best_adversary", best_adversary, -np.inf), number("best_learner", best_learner, -np.inf)
    if high - low < -1e-9 * max(abs(high), abs(low), 1.0):
        raise ValueError(f"best_adversary must be at least best_learner = {best_learner!r}, got {best_adversary!r}")
    return max(high - low, 0.0)


def duality_gap_bound(regret_learner: float, regret_adversary: float, horizon: int) -> float:
    r"""(Regret_theta + Regret_q) / T, Eq. 27: what the gap of averaged play cannot exceed, on every run.

    >>> duality_gap_bound(3.0, 2.0, 100)
    0.05
    """
    total = number("regret_learner", regret_learner, -np.inf) + number("regret_adversary", regret_adversary, -np.inf)
    return total / integer("horizon", horizon, 1)


def _rounds_and_log_arms(horizon: int, num_arms: int, name: str = "num_arms") -> tuple[int, float]:
    return integer("horizon", horizon, 1), float(np.log(integer(name, num_arms, 2)))


def _learner(diameter: float, gradient_norm: float) -> float:
    """2 D G: regret of gradient descent and the cost of its noise, per sqrt(T)."""
    return 2.0 * number("diameter", diameter, 0.0) * number("gradient_norm", gradient_norm, 0.0)
