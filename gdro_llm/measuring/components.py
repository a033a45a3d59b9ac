r"""`gdro signal --components`: what the policy gradient is made of, and the group size that follows, at a fixed policy.

Every one of some training problems gets the same number of rollouts; halves of its group give gradients of the last
block (`gdro_llm.training.components`), whose inner products `gdro_core.VarianceComponents` takes apart. With kappa the
group of most progress per rollout follows from p (1 - p) (theorem 17). Bins are those of the pass rate in these very
rollouts: the estimates are unbiased given the rewards. No exact rates are needed, so any data will
do; answers with partial credit are left out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from gdro_core import Plan, VarianceComponents, best_group_size
from gdro_llm.config import Config, UsageError
from gdro_llm.engine.policy import load_policy
from gdro_llm.engine.rollouts import Decoding
from gdro_llm.engine.transformers import HFSampler
from gdro_llm.measuring import tables
from gdro_llm.problems.load import hold_out, load_problems
from gdro_llm.problems.prompting import drop_long_prompts, prompt_tokens
from gdro_llm.problems.rewards import Grader
from gdro_llm.training.checkpoint import write_file
from gdro_llm.training.components import FEWEST, half_gradients
from gdro_llm.training.step import step_seed

MOST = 1e9  # stands for an infinite kappa
WIDTH = 128  # of the sketch: one serves all groups here, and its error does not average out
PARTS = ("common", "own", "noise", "kappa", "cosine")


def measure_components(config: Config, prompts: int, rollouts: int, out: Path) -> dict[str, Any]:
    """Components at the policy of `config`, with 90 % intervals; writes components.json and components.md.

    Args:
        config: model, data, sampling; `num_bins` for the rows by pass rate.
        prompts: training problems that are sampled, at random by `seed`; all if there are fewer.
        rollouts: of each.
        out: folder to write.

    Raises:
        UsageError: fewer than 4 rollouts or 2 prompts, or none whose rewards are all 0 or 1.
    """
    for name, value, least in (("--rollouts", rollouts, FEWEST), ("--prompts", prompts, 2)):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    policy = load_policy(config)
    problems = drop_long_prompts(policy.tokenizer, hold_out(load_problems(config)[0], config)[0], config)
    rows = np.random.default_rng([config.seed, 6]).permutation(len(problems))[:prompts]
    chosen = [problems[i] for i in rows]
    counts = np.full(len(chosen), rollouts)
    decoding = Decoding(config.max_new_tokens, config.temperature)
    ids = [prompt_tokens(policy.tokenizer, problem, config) for problem in chosen]
    drawn = HFSampler(policy, config).sample(ids, counts, decoding, seed=step_seed(config.seed, 0))
    with Grader(config) as grader:
        rewards = grader.grade([chosen[p] for p in drawn.owner_R.tolist()], drawn.texts)
    plan = Plan(
        tuple(problem.id for problem in chosen), -np.ones(len(chosen), int), np.ones(len(chosen)), counts, 0.0, 0
    )
    halves = half_gradients(policy, drawn, rewards, plan, config, 0, share=1.0, width=WIDTH)
    if not len(halves.prompts_M):
        raise UsageError("no prompt to measure: rewards must be 0 or 1, and prompts of at least 2 tokens")
    rate = rewards.reshape(len(chosen), rollouts).mean(axis=1)[halves.prompts_M]
    bins = np.minimum((rate * config.num_bins).astype(int), config.num_bins - 1)
    components = VarianceComponents(config.num_bins)
    components.observe(bins, halves.first_M_D, halves.second_M_D, halves.correct_M_2, halves.trials_M_2)
    named = replace(config, model=Path(config.model).name)  # not where it lies
    result = {
        "config": asdict(named),
        "prompts": len(bins),
        "with_gradient": int((halves.first_M_D.any(axis=1) | halves.second_M_D.any(axis=1)).sum()),
        "rollouts": rollouts,
        "reward": float(rewards.mean()),
        "useful": components.useful,
        "components": {name: _entry(*components.estimates()[name]) for name in PARTS},
        "bins": _by_bin(components, bins, rate),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "components.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_file(out / "components.md", table(result) + "\n")
    return result


def _by_bin(components: VarianceComponents, bins: np.ndarray, rate: np.ndarray) -> list[dict[str, Any]]:
    """Of each bin with prompts: pass rate, agreement with all, and the group size that kappa implies, with its ends."""
    agreement, rows = components.agreement(), []
    ends = (components.kappa, *reversed(components.interval()))  # the largest kappa has the smallest group
    for b in np.unique(bins).tolist():
        p = float(rate[bins == b].mean())
        sizes = [np.nan if kappa is None else float(best_group_size(min(kappa, MOST), p * (1.0 - p))) for kappa in ends]
        rows.append(
            {
                "bin": b,
                "prompts": int((bins == b).sum()),
                "pass_rate": p,
                "agreement": _entry(*(column[b] for column in agreement)),
                "group_size": _entry(*sizes),
            }
        )
    return rows


def _entry(value: float, low: float, high: float) -> dict[str, float | None]:
    """JSON has no infinite numbers: None."""
    ends = zip(("value", "low", "high"), (value, low, high), strict=True)
    return {name: float(x) if np.isfinite(x) else None for name, x in ends}


def _cell(entry: dict[str, float | None], form: str) -> str:
    shown = {name: "?" if x is None else format(x, form) for name, x in entry.items()}
    return "{value} [{low}, {high}]".format(**shown)


def table(result: dict[str, Any]) -> str:
    """Markdown: the components, and a row a bin; "?" is unknown or without end."""
    names = {"kappa": "κ = own / noise", "cosine": "cosine of two prompts"}
    parts = [["part", "value [90 %]"]]
    parts += [[names.get(name, name), _cell(entry, ".3g")] for name, entry in result["components"].items()]
    rows = [["pass rate", "prompts", "mean", "agreement [90 %]", "best group size [90 %]"]]
    width = 1.0 / result["config"]["num_bins"]
    for row in result["bins"]:
        edges = f"{row['bin'] * width:.2g}–{(row['bin'] + 1) * width:.2g}"
        cells = [_cell(row["agreement"], ".3g"), _cell(row["group_size"], ".1f")]
        rows.append([edges, str(row["prompts"]), f"{row['pass_rate']:.3f}", *cells])
    head = (
        f"{result['prompts']} prompts × {result['rollouts']} rollouts, {result['with_gradient']} with a gradient, mean "
        f"reward {result['reward']:.3f}; κ is {'' if result['useful'] else 'not '}known well enough to plan by."
    )
    return "\n\n".join([head, tables.markdown(parts, "<>"), tables.markdown(rows, "<" + ">" * 4)])
