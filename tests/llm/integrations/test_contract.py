"""Every engine decides what the own loop decides, for the same ids, rewards and seed.

An engine is a function (folder, batches, configuration, case, fixtures) -> `Run`: it trains on `batches`, the problems
of each step in order, and grades by `Verdicts`. To add one, write that function and name it in `ENGINES`, with the
package it needs and how closely its advantages agree. Where the package is missing its cases are skipped: `make test`
compares the own loop with the library alone, `make test-trl` and `make test-verl` with TRL and verl.
"""

import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import literal
import numpy as np
import pytest

from gdro_core import GDROController
from gdro_core.controller import Plan
from gdro_llm.config import Config
from gdro_llm.problems.load import batch_indices, load_problems
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.rewards import Grader
from gdro_llm.training import trainer
from gdro_llm.training.losses import group_advantages, rollout_scale
from gdro_llm.training.tracking import flatten

STEPS = 6


@dataclass
class Case:
    """What the engines agree on."""

    controller: str
    scaled: bool
    seed: int
    rewards: str  # a key of EASE
    aggregation: str = "rollout"
    min_rollouts: int = 0  # the controller's own: 2 for joint play

    def __str__(self) -> str:
        scaled = "scaled" if self.scaled else "unscaled"
        return f"{self.controller}-{scaled}-{self.seed}-{self.rewards}-{self.aggregation}"


CASES = [
    Case("joint", True, 0, "mixed"),
    Case("joint", True, 1, "rare"),
    Case("joint", False, 2, "mixed", "prompt"),
    Case("joint-prompt", True, 0, "rare"),
    Case("joint-prompt", False, 1, "mixed"),
    Case("joint-rollout", True, 1, "mixed", "prompt"),
    Case("joint-rollout", False, 0, "rare"),
    Case("recommended", True, 0, "rare", "prompt"),
    Case("recommended", False, 1, "rare"),
    Case("recommended", True, 2, "mixed", "rollout", 2),
    Case("grpo", True, 0, "mixed"),
    Case("grpo", False, 1, "rare"),
]
EASE = {"mixed": lambda h: 1 + h % 9, "rare": lambda h: (0, 0, 1, 8)[h % 4]}  # a prompt's pass rate, in tenths


@dataclass
class Run:
    """What an engine decided."""

    plans: list[Plan]
    advantages: list[np.ndarray]  # (R,) of each step, in plan order, weights and all
    state: dict[str, Any]  # of the controller afterwards
    names: set[str]  # under which metrics were logged, without the adapters' "gdro/"


def verdict(case: Case, name: str, place: int) -> float:
    """Reward of the `place`-th rollout of a prompt in a run: of no other origin."""
    ease = EASE[case.rewards](zlib.crc32(name.encode()))
    return float(zlib.crc32(f"{name}/{place}/{case.seed}".encode()) % 10 < ease)


class Verdicts:
    """The rewards of a run, asked for in plan order."""

    def __init__(self, case: Case) -> None:
        self.case, self.places = case, Counter[str]()

    def __call__(self, names: Sequence[str]) -> list[float]:
        rewards = []
        for name in names:
            rewards.append(verdict(self.case, name, self.places[name]))
            self.places[name] += 1
        return rewards


class Record:
    """A controller that keeps its plans."""

    def __init__(self, controller: GDROController) -> None:
        self.controller, self.plans = controller, []
        plain = controller.observe

        def observe(plan: Plan, rewards: Any) -> dict[str, Any]:
            self.plans.append(plan)
            return plain(plan, rewards)

        controller.observe = observe  # type: ignore[method-assign]


def without_prefix(names: Iterable[str]) -> set[str]:
    """Names of an adapter's metrics, among those of its engine, as the own loop has them."""
    return {name.removeprefix("gdro/") for name in names if name.startswith("gdro/")}


def own_loop(config: Config, folder: Path, case: Case) -> Run:
    """`gdro train`, with the grades of `Verdicts`."""
    verdicts = Verdicts(case)
    advantages: list[np.ndarray] = []
    records: list[Record] = []
    update, build = trainer.update, trainer.build_controller

    def keep_advantages(policy, optimizer, batch, *others):
        advantages.append(batch.advantages_R * batch.scale_R)
        return update(policy, optimizer, batch, *others)

    def keep_controller(config: Config) -> GDROController:
        records.append(Record(build(config)))
        return records[-1].controller

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "update", keep_advantages)
        patch.setattr(trainer, "build_controller", keep_controller)
        patch.setattr(Grader, "check_gold", lambda self, problems: None)
        patch.setattr(Grader, "grade", lambda self, problems, texts: np.array(verdicts([p.id for p in problems])))
        trainer.train(config, folder)
    names = {name for row in literal.read_log(folder / "metrics.jsonl") for name in flatten(row)}
    return Run(records[0].plans, advantages, records[0].controller.state_dict(), names)


def library(folder: Path, batches: list[list[Problem]], config: Config, case: Case, fixtures: Any) -> Run:
    """`gdro_core` as the README uses it, and the objective's two factors."""
    record, verdicts, advantages = Record(trainer.build_controller(config)), Verdicts(case), []
    names: set[str] = set()
    for batch in batches:
        plan = record.controller.plan([problem.id for problem in batch])
        rewards = np.array(verdicts([plan.ids[p] for p in plan.owner]))
        scale_R = rollout_scale(plan.weights, plan.counts, plan.owner, config.aggregation)
        advantages.append(group_advantages(rewards, plan.owner, scale=case.scaled) * scale_R)
        names |= flatten(record.controller.observe(plan, rewards)).keys()
    return Run(record.plans, advantages, record.controller.state_dict(), names)


def with_trl(folder: Path, batches: list[list[Problem]], config: Config, case: Case, fixtures: Any) -> Run:
    """GDROTrainer of TRL, on the tiny model."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig

    from gdro_llm.integrations.trl import GDROTrainer

    verdicts = Verdicts(case)
    rows = [{"prompt": problem.prompt, "prompt_id": problem.id} for batch in batches for problem in batch]
    record = Record(trainer.build_controller(config))
    advantages: list[np.ndarray] = []
    names: set[str] = set()

    class Keep(GDROTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            advantages.append(output["advantages"].double().numpy())
            names.update(without_prefix(self._metrics["train"]))
            return output

    settings = GRPOConfig(
        output_dir=str(folder),
        num_generations=config.mean_rollouts,
        per_device_train_batch_size=config.mean_rollouts * config.batch_size,
        max_completion_length=config.max_new_tokens,
        scale_rewards=case.scaled,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        num_train_epochs=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    Keep(
        config.model,
        lambda prompt_id, **_: verdicts(prompt_id),
        settings,
        Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(config.model),
        controller=record.controller,
        aggregation=config.aggregation,
    ).train()
    return Run(record.plans, advantages, record.controller.state_dict(), names)


def with_verl(folder: Path, batches: list[list[Problem]], config: Config, case: Case, fixtures: Any) -> Run:
    """GDROTrainer of verl, in verl's own `fit`; tests/verl/on_cpu.py says what is replaced.

    verl does not say in which order the rollouts of a prompt are graded: `Verdicts` in any order within a group.
    """
    run = uuid.uuid4().hex
    rows = []
    for problem in (problem for batch in batches for problem in batch):
        source, index = problem.id.split("/", 1)
        verdicts = [verdict(case, problem.id, place) for place in range(STEPS * config.max_rollouts)]
        rows.append(
            {
                "data_source": source,
                "prompt": [{"role": "user", "content": problem.prompt}],
                "reward_model": {"style": "rule", "ground_truth": ""},
                "extra_info": {"index": index, "run": run, "verdicts": verdicts},
            }
        )
    settings = ("controller", "min_rollouts", "max_rollouts", "num_bins", "seed", "aggregation")
    settings += ("kappa", "verifier_error")
    overrides = {f"+gdro.{name}": getattr(config, name) for name in settings} | {
        "actor_rollout_ref.rollout.n": config.mean_rollouts,
        "algorithm.norm_adv_by_std_in_grpo": case.scaled,
        "data.shuffle": False,
        "data.train_batch_size": config.batch_size,
        "actor_rollout_ref.actor.ppo_mini_batch_size": config.batch_size,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": -1,
    }
    configure, fit = (fixtures.getfixturevalue(name) for name in ("configure", "fit"))
    done, log = fit(configure(*(f"{key}={value}" for key, value in overrides.items()), rows=rows))
    advantages = []
    for plan, submitted, (keys, tags, data) in zip(
        done.plans, done.submitted, done.actor_rollout_wg.trained, strict=True
    ):
        first, place_of = np.cumsum(plan.counts) - plan.counts, {uid: i for i, uid in enumerate(submitted)}
        of_rows = np.full(plan.owner.size, np.nan)
        for i, (key, tag) in enumerate(zip(keys, tags, strict=True)):
            uid, session, _ = key.split("_")
            if not tag.get("is_padding", False):
                of_rows[first[place_of[uid]] + int(session)] = data["advantages"][i][0]
        advantages.append(of_rows)
    names = {name for row in log for name in without_prefix(row)}
    return Run(done.plans, advantages, done.controller.state_dict(), names)


def n_minus_one(config: Config) -> float:
    """TRL's and verl's standard deviations of groups of n_bar have n - 1, the own loop's has n."""
    return float(np.sqrt((config.mean_rollouts - 1) / config.mean_rollouts))


# Package, engine, and relative tolerance of the advantages with and without a game: without one TRL and verl keep their
# own float32 ones, with 1e-4 and 1e-6 beside the deviation.
ENGINES = {
    "library": ("gdro_core", library, 0.0, 0.0),
    "trl": ("trl", with_trl, 1e-6, 1e-3),
    "verl": ("transfer_queue", with_verl, 1e-5, 1e-5),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_decide_what_the_own_loop_decides(engine, case, run_config, tmp_path, request):
    """Ids, bins, weights, counts and price of every plan; weights times advantages; the memory after all steps; and
    the names of what is logged, bin by bin (verl also counts rollouts that it lost; the own loop its tokens)."""
    package, run, rtol, rtol_without_a_game = ENGINES[engine]
    pytest.importorskip(package)
    rhythm = {"steps": STEPS, "eval_every": STEPS, "save_every": STEPS, "eval_samples": 1}
    # Three epochs, so that all prompts of the later ones are known.
    settings = {"controller": case.controller, "scale_rewards": case.scaled, "aggregation": case.aggregation}
    settings["min_rollouts"] = case.min_rollouts
    if case.controller == "recommended":  # the others do not measure kappa
        settings |= {"measure_every": 0, "kappa": 0.8, "verifier_error": 0.05, "candidates": 1}
    config = run_config(**settings, seed=case.seed, batch_size=20, **rhythm)
    problems, _ = load_problems(config)
    batches = [
        [problems[i] for i in batch_indices(len(problems), config.batch_size, step, config.seed)]
        for step in range(STEPS)
    ]
    own = own_loop(config, tmp_path / "own", case)
    other = run(tmp_path, batches, config, case, request)
    assert len(own.plans) == len(other.plans) == len(own.advantages) == len(other.advantages) == STEPS
    factor = n_minus_one(config) if case.scaled and engine != "library" else 1.0
    for plan, expected, advantages, expected_advantages in zip(
        other.plans, own.plans, other.advantages, own.advantages, strict=True
    ):
        assert plan.same(expected)
        np.testing.assert_array_equal(plan.bins, expected.bins)
        np.testing.assert_array_equal(plan.weights, expected.weights)
        assert plan.price == expected.price
        if engine == "verl":  # in any order within a group
            advantages, expected_advantages = (
                values[np.lexsort((values, plan.owner))] for values in (advantages, expected_advantages)
            )
        tolerance = rtol_without_a_game if case.controller == "grpo" else rtol
        np.testing.assert_allclose(advantages, expected_advantages * factor, rtol=tolerance, atol=1e-7)
    passing = case.controller == "recommended" and case.min_rollouts == 0
    assert any((plan.counts == 0).any() for plan in own.plans) == passing
    assert other.state == own.state
    assert other.names - {"missing_rollouts"} <= own.names
    by_bin = {name for name in own.names if "/" in name and not name.startswith("bin_tokens")}
    assert {name for name in other.names if "/" in name} == by_bin
    assert any(name.startswith("bin_error/bin") for name in other.names)
    games = case.controller.partition("-")[2] if case.controller != "grpo" else "none"
    assert any(len(set(plan.counts.tolist())) > 1 for plan in own.plans) == (games in ("", "rollout"))
    assert any(np.ptp(plan.weights) > 0.1 for plan in own.plans) == (games in ("", "prompt"))
