"""Group distributionally robust controllers for reinforcement learning with verifiable rewards.

Theory first, numpy and scipy only. The paper's equations and theorems are cited as in arXiv 2601.19280; F1-F10 are its
flaws and what this library does about each (see the README).
"""

from gdro_core.allocation import exact_budget_allocation, greedy_allocation, sqrt_allocation
from gdro_core.controller import GDROController, Plan
from gdro_core.difficulty import OnlineDifficultyClassifier
from gdro_core.estimators import pass_at_k
from gdro_core.price import ShadowPrice
from gdro_core.prompt_game import PromptGDRO, prompt_payoff
from gdro_core.rollout_game import RolloutGDRO, rollout_utility

__all__ = [
    "GDROController",
    "OnlineDifficultyClassifier",
    "Plan",
    "PromptGDRO",
    "RolloutGDRO",
    "ShadowPrice",
    "exact_budget_allocation",
    "greedy_allocation",
    "pass_at_k",
    "prompt_payoff",
    "rollout_utility",
    "sqrt_allocation",
]
