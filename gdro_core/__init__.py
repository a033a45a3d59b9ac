"""Group distributionally robust controllers for reinforcement learning with verifiable rewards.

Theory first, numpy and scipy only. The paper's equations and theorems are cited as in arXiv 2601.19280; F1-F10 are its
flaws and what this library does about each (see the README).

All public names are listed here; each module is one idea and opens with the problem it solves.
"""

from gdro_core.advantages import staged_advantages
from gdro_core.adversaries import (
    Adversary,
    ChiSquare,
    CumulatedLosses,
    CVaR,
    Entropic,
    Memory,
    NoRegret,
    RunningMeans,
)
from gdro_core.agreement import guarded_share
from gdro_core.allocation import frontier_allocation, greedy_allocation, sqrt_allocation, token_allocation
from gdro_core.ambiguity import BestResponse, chi_square, cvar, entropic
from gdro_core.components import Estimate, VarianceComponents, ratio_interval
from gdro_core.controller import GDROController, Observation, Plan, Planner
from gdro_core.costs import TokenBudget, TokenCosts
from gdro_core.difficulty import OnlineDifficultyClassifier, PassAtK, PassRate, Statistic, equal_edges
from gdro_core.grpo import decoupling_price, gradient_variance, gradient_weight, mixed_group_probability
from gdro_core.prior import LearntPrior
from gdro_core.prompt_game import ERROR, LEARNABILITY, Payoff, PromptGDRO, prompt_payoff
from gdro_core.published import AnyOfN, PublishedController, PublishedPromptGDRO, PublishedRolloutGDRO
from gdro_core.rollout_game import RolloutGDRO
from gdro_core.selection import nearest_to_half
from gdro_core.theory.bandits import Exp3, Exp3IX, Exp3P, Exp3S, Hedge, TsallisINF
from gdro_core.theory.estimators import (
    MeanAtK,
    catoni_mean,
    deviation_bound,
    mean_at_k,
    median_of_means,
    pass_at_k,
    truncated_mean,
)
from gdro_core.theory.exact_play import ExactPlay
from gdro_core.theory.frontier import (
    best_group_size,
    frontier_utility,
    frontier_weight,
    group_efficiency,
    group_size_gain,
    purity,
    step_cosine,
)
from gdro_core.theory.giving_up import failure_e_value, failures_to_give_up
from gdro_core.theory.neyman import ClipOGD, PlugInNeyman, neyman_regret
from gdro_core.theory.paths import (
    allocation_marginals,
    exact_budget_allocation,
    path_learning_rate,
    path_regret_bound,
    sample_budget_allocation,
)
from gdro_core.theory.price import ShadowPrice, hard_budget_regret_bound, violation_bound
from gdro_core.theory.regret import (
    best_in_hindsight,
    delayed_hedge_bound,
    duality_gap,
    duality_gap_bound,
    exp3_bound,
    exp3_ix_bound,
    exp3_p_bound,
    exp3_s_bound,
    gdro_full_information_bound,
    gdro_one_sample_bound,
    hedge_bound,
    limited_advice_bound,
    tracking_complexity,
    tsallis_inf_bound,
)
from gdro_core.theory.two_stage import (
    TwoStage,
    best_two_stage,
    pilot_gain,
    pooled_bias,
    staged_efficiency,
    staged_weight,
)
from gdro_core.utilities import HIT, MIXED, SIGNAL, UTILITIES, VARIANCE, Utility, rollout_utility, signal

__all__ = [
    "ERROR",
    "HIT",
    "LEARNABILITY",
    "MIXED",
    "SIGNAL",
    "UTILITIES",
    "VARIANCE",
    "Adversary",
    "AnyOfN",
    "BestResponse",
    "CVaR",
    "ChiSquare",
    "ClipOGD",
    "CumulatedLosses",
    "Entropic",
    "Estimate",
    "ExactPlay",
    "Exp3",
    "Exp3IX",
    "Exp3P",
    "Exp3S",
    "GDROController",
    "Hedge",
    "LearntPrior",
    "MeanAtK",
    "Memory",
    "NoRegret",
    "Observation",
    "OnlineDifficultyClassifier",
    "PassAtK",
    "PassRate",
    "Payoff",
    "Plan",
    "Planner",
    "PlugInNeyman",
    "PromptGDRO",
    "PublishedController",
    "PublishedPromptGDRO",
    "PublishedRolloutGDRO",
    "RolloutGDRO",
    "RunningMeans",
    "ShadowPrice",
    "Statistic",
    "TokenBudget",
    "TokenCosts",
    "TsallisINF",
    "TwoStage",
    "Utility",
    "VarianceComponents",
    "allocation_marginals",
    "best_group_size",
    "best_in_hindsight",
    "best_two_stage",
    "catoni_mean",
    "chi_square",
    "cvar",
    "decoupling_price",
    "delayed_hedge_bound",
    "deviation_bound",
    "duality_gap",
    "duality_gap_bound",
    "entropic",
    "equal_edges",
    "exact_budget_allocation",
    "exp3_bound",
    "exp3_ix_bound",
    "exp3_p_bound",
    "exp3_s_bound",
    "failure_e_value",
    "failures_to_give_up",
    "frontier_allocation",
    "frontier_utility",
    "frontier_weight",
    "gdro_full_information_bound",
    "gdro_one_sample_bound",
    "gradient_variance",
    "gradient_weight",
    "greedy_allocation",
    "group_efficiency",
    "group_size_gain",
    "guarded_share",
    "hard_budget_regret_bound",
    "hedge_bound",
    "limited_advice_bound",
    "mean_at_k",
    "median_of_means",
    "mixed_group_probability",
    "nearest_to_half",
    "neyman_regret",
    "pass_at_k",
    "path_learning_rate",
    "path_regret_bound",
    "pilot_gain",
    "pooled_bias",
    "prompt_payoff",
    "purity",
    "ratio_interval",
    "rollout_utility",
    "sample_budget_allocation",
    "signal",
    "sqrt_allocation",
    "staged_advantages",
    "staged_efficiency",
    "staged_weight",
    "step_cosine",
    "token_allocation",
    "tracking_complexity",
    "truncated_mean",
    "tsallis_inf_bound",
    "violation_bound",
]
