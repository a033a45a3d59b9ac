"""Saved states of earlier versions, as the present version writes them.

Version 1 of the controller (with version 2 of the prompt game and version 1 of the rollout game) held all variants in
the same two classes, told apart by texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdro_core._validate import check_state

State = dict[str, Any]


def controller_1(saved: Mapping[str, Any]) -> State:
    """Of `GDROController`: the rollout game's settings, which have no memory, move into the controller's."""
    check_state("GDROController", saved, {}, ("rollout",))
    rollout = saved["rollout"]
    return {**saved, "version": 2, "rollout": None if rollout is None else rollout_game_1(rollout)}


def controller_2(saved: Mapping[str, Any]) -> State:
    """Of `GDROController`: it had no variance components."""
    return {**saved, "version": 3, "components": None}


def controller_3(saved: Mapping[str, Any]) -> State:
    """Of `GDROController`: it had no pilot."""
    return {**saved, "version": 4, "pilot": 0}


def controller_4(saved: Mapping[str, Any]) -> State:
    """Of `GDROController`: kappa was used only while its interval was narrow, and so follows from it."""
    return {**saved, "version": 5, "kappa": None}


def controller_5(saved: Mapping[str, Any]) -> State:
    """Of `GDROController`: it had no budget of tokens."""
    return {**saved, "version": 6, "tokens": None}


def classifier_4(saved: Mapping[str, Any]) -> State:
    """Of `OnlineDifficultyClassifier`: the prior was fixed."""
    return {**saved, "version": 5, "learnt": None}


def classifier_3(saved: Mapping[str, Any]) -> State:
    """Of `OnlineDifficultyClassifier`: prompts without rollouts kept all that was known."""
    return {**saved, "version": 4, "idle_discount": 1.0}


def classifier_2(saved: Mapping[str, Any]) -> State:
    """Of `OnlineDifficultyClassifier`: the statistic becomes an object with its own dial."""
    check_state("OnlineDifficultyClassifier", saved, {}, ("statistic", "k", "window"))
    statistics: dict[str, State] = {
        "pass_rate": {"name": "PassRate"},
        "pass@k": {"name": "PassAtK", "k": saved["k"]},
        "any": {"name": "AnyOfN", "window": saved["window"]},
    }
    return {**saved, "version": 3, "statistic": statistics[saved["statistic"]]}


def rollout_game_1(saved: Mapping[str, Any]) -> State:
    """Of `RolloutGDRO`: its settings; scores, rounds and price belonged to the games on losses."""
    kept = ("mean_rollouts", "min_rollouts", "max_rollouts", "utility", "permute")
    check_state("RolloutGDRO", saved, {}, (*kept, "granularity"))
    return {**{name: saved[name] for name in kept}, "per_bin": saved["granularity"] == "bin"}


def prompt_game_2(saved: Mapping[str, Any]) -> State:
    """Of `PromptGDRO`: the adversary and its memory become parts of their own."""
    kept = ("num_bins", "payoff", "ema", "exploration", "max_weight", "share", "share_weight")
    check_state("PromptGDRO", saved, {"weighting": "importance"}, (*kept, "adversary", "step_size", "alpha", "rho"))
    check_state("PromptGDRO", saved, {}, ("reference", "score", "score_weight", "drawn", "hedge"))
    step_size = saved["step_size"]
    adversaries: dict[str, State] = {
        "entropic": {"name": "Entropic", "step_size": step_size},
        "cvar": {"name": "CVaR", "alpha": saved["alpha"]},
        "chi-square": {"name": "ChiSquare", "rho": saved["rho"]},
        "hedge": {"name": "NoRegret", "step_size": step_size, "implicit_exploration": False},
        "exp3-ix": {"name": "NoRegret", "step_size": step_size, "implicit_exploration": True},
    }
    adversary = adversaries[saved["adversary"]]
    memory = {"sum": saved["score"], "weight": saved["score_weight"]}
    if adversary["name"] == "NoRegret":
        memory = {"drawn": saved["drawn"], "hedge": saved["hedge"]}
    uniform = saved["reference"] == "uniform"
    named = {name: saved[name] for name in kept}
    return {"version": 3, **named, "uniform_reference": uniform, "adversary": adversary, "memory": memory}


def published_prompt_2(saved: Mapping[str, Any]) -> State:
    """Of `PublishedPromptGDRO`, then a `PromptGDRO` with weighting "published"."""
    kept = ("num_bins", "step_size", "ema", "exploration", "max_weight", "share_normalised")
    check_state("PublishedPromptGDRO", saved, {"weighting": "published"}, (*kept, "score"))
    return {"version": 3, **{name: saved[name] for name in kept}, "scores": saved["score"]}


def published_rollout_1(saved: Mapping[str, Any]) -> State:
    """Of `PublishedRolloutGDRO`, then a `RolloutGDRO` with feedback "published"."""
    kept = ("num_bins", "mean_rollouts", "min_rollouts", "max_rollouts", "step_size", "exploration", "ema", "scores")
    check_state("PublishedRolloutGDRO", saved, {"feedback": "published"}, (*kept, "price"))
    return {"version": 2, **{name: saved[name] for name in kept}, "price": saved["price"]}


def exact_play_1(saved: Mapping[str, Any]) -> State:
    """Of `ExactPlay`, then a `RolloutGDRO` with feedback "bandit"; its price never moved."""
    kept = ("num_bins", "mean_rollouts", "min_rollouts", "max_rollouts", "step_size", "loss_bound", "scores", "rounds")
    check_state("ExactPlay", saved, {"feedback": "bandit"}, kept)
    return {"version": 2, **{name: saved[name] for name in kept}}


def published_controller_1(saved: Mapping[str, Any]) -> State:
    """Of `PublishedController`, then a `GDROController` with published games."""
    kept = ("seed", "mean_rollouts", "step", "classifier", "prompt", "rollout")
    check_state("PublishedController", saved, {}, kept)
    kept_values = {name: saved[name] for name in kept}
    if kept_values["rollout"] is not None and kept_values["mean_rollouts"] is None:
        kept_values["mean_rollouts"] = saved["rollout"].get("mean_rollouts")
    return {"version": 2, **kept_values}
