"""The training loop: plan -> sample -> grade -> observe -> update.

The controller decides each prompt's weight and number of rollouts before sampling; everything else is GRPO:

1. Advantages are centred (and scaled) within each prompt's group, whatever its size (Eq. 3), then multiplied by the
   prompt's weight (Eq. 16). The logged `reward` is never weighted; `weighted_reward` is.
2. The loss is the clipped surrogate averaged over the tokens of the batch: rollouts are weights too (F6), a prompt's
   pull grows by n_i w_n(p) (`gdro_core.gradient_weight`). With `aggregation="prompt"` a rollout counts n_bar / n_i
   (Eq. 7), which leaves w_n(p); with `preserve_objective` nothing is left.
3. Nothing random has a state: every draw is seeded by (seed, step), so a resumed run needs no generator saved.
4. Under torchrun every process runs this loop: it makes the same plan, samples, grades and trains the prompts assigned
   to it, and learns the rewards of all. The first process writes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gdro_core import PublishedController
from gdro_llm.config import Config, UsageError, printable
from gdro_llm.engine.memory import check_fits
from gdro_llm.engine.policy import device_type, load_policy, settled
from gdro_llm.engine.sampler import Sampler, make_sampler
from gdro_llm.engine.shapes import Shape, UnknownShape, shape_of
from gdro_llm.engine.workers import Workers, record_failures, start_workers, stop_workers
from gdro_llm.problems.load import hold_out, load_problems
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.prompting import drop_long_prompts, prompt_tokens, with_prompt_limit
from gdro_llm.problems.rewards import Grader
from gdro_llm.training.batch import Batch, Refill
from gdro_llm.training.best import BestWeights
from gdro_llm.training.checkpoint import (
    append,
    find_checkpoint,
    load_checkpoint,
    open_run,
    other_settings,
    read_config,
    save_checkpoint,
)
from gdro_llm.training.clock import Clock, trained_tokens
from gdro_llm.training.components import measure
from gdro_llm.training.evaluation import evaluate, no_exact_rates
from gdro_llm.training.gradient import sampler_gap
from gdro_llm.training.optimizer_state import load_optimizer_state, optimizer_state
from gdro_llm.training.planners import build_controller, candidates_of
from gdro_llm.training.rehearsal import rehearse
from gdro_llm.training.step import Collected, collect, summarise
from gdro_llm.training.stopping import Stopped, StopRequest, stop_requests
from gdro_llm.training.tracking import Tracker, import_trackers
from gdro_llm.training.update import build_optimizer, out_of_memory_advice, set_learning_rate, update

REPORT_EVERY = 60.0  # a report follows an evaluation, but not more often than this [s]


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    fresh: bool = False,
    report: Callable[[Path], object] | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Train one policy into the run directory `out`; see `gdro train --help`.

    `report` is called with `out` while the run goes on: after evaluations, at most once a minute, by the first process.
    A signal that `stop` notes ends the run after a step; without `stop`, signals are handled from the first step on.
    """
    with ExitStack() as cleanup, record_failures(), out_of_memory_advice(config, training=True):
        cleanup.callback(stop_workers)
        run = Run(config, out, cleanup, resume=resume, fresh=fresh, report=report)
        config, controller, workers = run.config, run.controller, run.workers
        run.rehearse()
        if run.progress["step"] == 0:
            run.evaluate()
            if run.validation_problems:
                run.evaluate_test("start")
        stop = stop or cleanup.enter_context(stop_requests())
        for step in run.steps():
            clock = Clock(run.policy.device)
            collected = collect(  # plan -> sample -> grade -> observe
                step, run.train_problems, controller, run.sampler, run.grader, config, workers, clock
            )
            plan, rollouts = collected.plan, collected.batch.rollouts
            with clock("measure"):  # what the gradient is made of, for controllers that learn it: every few steps
                measure(controller, run.policy, rollouts, collected.rewards_R, plan, config, step, workers)
            if step == run.first_step:
                run.check_sampler(step, sampler_gap(run.policy, rollouts, config, workers))
            with clock("update"):
                batch = run.refill.add(collected.batch) if config.refill else collected.batch
                losses_P, updated = run.update(step, batch)
            if isinstance(controller, PublishedController):  # its payoff is a by-product of the update
                controller.observe_losses(plan, losses_P)

            run.check_sampler(step, updated.get("sampler_gap", 0.0))
            sampled = summarise(collected.rewards_R, plan.owner, plan.weights, rollouts, workers)
            run.log(step, {**sampled, **collected.graded, **updated, **collected.observed}, clock, collected, batch)
            stopping = 0 if run.refill.waiting else run.agree(stop.received)  # groups that wait are not saved
            run.evaluate_and_save(step, stopping)
            if stopping and step + 1 < config.steps:
                raise Stopped(f"stopped after step {step + 1}, which is saved: --resume goes on", stopping)
        run.evaluate_best()


class Run:
    """All that a run holds besides the step in progress: policy, engines, controller, data, logs."""

    def __init__(
        self,
        config: Config,
        out: Path,
        cleanup: ExitStack,
        *,
        resume: bool,
        fresh: bool,
        report: Callable[[Path], object] | None,
    ) -> None:
        self.workers = start_workers(device_type(config))
        saved = read_config(out) if resume and self.workers.rank == 0 else None
        self.config = config = self.workers.gather(settled(config, saved))[0]
        self.out, self.report = out, report
        self.controller = build_controller(config)
        self._check_machine()
        self._load_problems()
        checkpoint = self._find_checkpoint(resume=resume, fresh=fresh)
        self.policy = load_policy(config, checkpoint, self.workers)
        self._drop_long_prompts()
        held_out = [*self.validation_problems, *self.test_problems]
        self.config = config = self._decide_evaluation(held_out, checkpoint)
        self.grader = cleanup.enter_context(Grader(config))
        self.grader.check_gold([*self.train_problems, *held_out])
        self.optimizer = build_optimizer(self.policy, config)
        self.sampler: Sampler = make_sampler(self.policy, with_prompt_limit(self.policy.tokenizer, held_out, config))
        cleanup.callback(self.sampler.close)
        import_trackers(config)
        if self.workers.rank == 0:  # after all checks: a mistake leaves no files behind
            cleanup.enter_context(open_run(out, config, checkpoint, fresh=fresh))
        self._warn_if_problems_are_rarely_drawn()
        self.progress = {"step": 0, "rollouts": 0, "tokens": 0}
        self.best = BestWeights(out, self.workers)
        self.refill = Refill(config.batch_size)
        self._save_due = False
        if checkpoint is not None:
            self._restore(checkpoint)
        self.first_step = self.progress["step"]
        self.tracker = self._open_tracker(cleanup)
        self.shape = known_shape(config)
        self._reported = time.monotonic()
        self._bar = tqdm(
            total=config.steps,
            initial=self.first_step,
            desc=f"train {config.controller}",
            unit="step",
            disable=None if self.workers.rank == 0 else True,
        )
        cleanup.callback(self._bar.close)

    def _check_machine(self) -> None:
        """A UsageError for what several processes cannot do, and for what the GPU cannot hold."""
        config = self.config
        if config.optimizer == "adamw8bit" and self.workers.size > 1:
            raise UsageError("optimizer 'adamw8bit' works in one process only; use adamw under torchrun")
        if config.refill and self.workers.size > 1:
            raise UsageError("refill works in one process only")
        if device_type(config) == "cuda":
            say(self.workers, check_fits(config, torch.cuda.mem_get_info()[1], self.workers.size))

    def _load_problems(self) -> None:
        """Training, validation and test problems."""
        config = self.config
        train, self.test_problems = load_problems(config)
        self.train_problems, self.validation_problems = hold_out(train, config)

    def _find_checkpoint(self, *, resume: bool, fresh: bool) -> Path | None:
        """The checkpoint that the first process goes on from, for all."""
        mine = find_checkpoint(self.out, self.config, resume=resume, fresh=fresh) if self.workers.rank == 0 else None
        first: Path | None = self.workers.gather(mine)[0]
        return first

    def _decide_evaluation(self, held_out: list[Problem], checkpoint: Path | None) -> Config:
        """The configuration with `eval_exact` decided: as the run began, or else where probabilities are known."""
        config = self.config
        if config.eval_exact is None and checkpoint is not None:
            config = replace(config, eval_exact=(read_config(self.out) or {}).get("eval_exact", False))
        reason = no_exact_rates(self.policy, held_out, config)
        if config.eval_exact and reason:
            raise UsageError(f"eval_exact must be off: {reason}")
        return replace(config, eval_exact=not reason) if config.eval_exact is None else config

    def _drop_long_prompts(self) -> None:
        """Leave out training problems with long prompts; enough must be left for a planner that chooses."""
        config = self.config
        self.train_problems = drop_long_prompts(self.policy.tokenizer, self.train_problems, config)
        if config.controller == "mopps" and len(self.train_problems) < candidates_of(config) * config.batch_size:
            raise UsageError(
                f"batch_size must be at most a {candidates_of(config)}th of the {len(self.train_problems)} problems "
                f"with controller 'mopps', got {config.batch_size}"
            )

    def _warn_if_problems_are_rarely_drawn(self) -> None:
        """A line where problems are drawn too rarely for the controller to act on them."""
        config, size = self.config, len(self.train_problems)
        times = config.steps * config.batch_size / size
        if times < 3 and config.controller != "grpo" and not config.pilot:
            or_pilot = "; --pilot 2 acts from the first time on" if config.controller == "recommended" else ""
            say(
                self.workers,
                f"each of {size} problems is drawn {times:.2g} times in this run, and the controller acts on a "
                f"problem from its second time on: more steps or fewer train_problems give it more to act on{or_pilot}",
            )

    def _restore(self, checkpoint: Path) -> None:
        """Load all that a checkpoint holds besides the weights."""
        moments, state = load_checkpoint(checkpoint)
        load_optimizer_state(self.optimizer, self._trained(), moments)
        self.controller.load_state_dict(state["controller"])
        self.best.load_state_dict(state["best"])
        self.progress = state["progress"]

    def _open_tracker(self, cleanup: ExitStack) -> Tracker | None:
        """Of the first process."""
        if self.workers.rank != 0:
            return None
        tracker = Tracker(self.config, self.out, step=self.first_step)
        cleanup.callback(tracker.close)
        return tracker

    def rehearse(self) -> None:
        """On a GPU, try the largest micro-batch: running out of memory comes now or never."""
        if self.policy.device.type == "cuda":
            self.sampler.sleep()
            prompts = (prompt_tokens(self.policy.tokenizer, problem, self.config) for problem in self.train_problems)
            rehearse(self.policy, self.optimizer, max(map(len, prompts)), self.config, self.workers)

    def steps(self) -> range:
        """The steps that are left."""
        return range(self.first_step, self.config.steps)

    def update(self, step: int, batch: Batch | None) -> tuple[np.ndarray, dict[str, float]]:
        """`update` at the step's learning rate; nothing where there is no batch yet."""
        set_learning_rate(self.optimizer, self.config, step)
        if batch is None:
            return np.zeros(0), {}
        try:
            return update(self.policy, self.optimizer, batch, self.config, self.workers)
        except FloatingPointError as error:
            raise UsageError(f"step {step + 1}: {error}; {other_settings(self.out)}") from error

    def agree(self, received: int | None) -> int:
        """The signal to stop that any process got, or 0."""
        return max(self.workers.gather(received or 0))

    def check_sampler(self, step: int, gap: float) -> None:
        """Stop when sampler and trainer are not the same policy: else updates are wrong without any sign of it."""
        most = self.config.max_sampler_gap or (0.1 if self.policy.compute == torch.bfloat16 else 0.01)
        if gap <= most:
            return
        raise UsageError(
            f"step {step + 1}: the log-probabilities of engine {self.config.engine!r} are {gap:.3g} off the trainer's "
            f"on average, more than max_sampler_gap = {most:g}: stale weights, another "
            "temperature or number format. Try --engine hf, or with bfloat16 --importance-cap 2 and a larger "
            "--max-sampler-gap; nothing was saved of this step"
        )

    def log(self, step: int, metrics: dict[str, Any], clock: Clock, collected: Collected, batch: Batch | None) -> None:
        """A line to every log, the bar, the trackers."""
        rollouts = collected.batch.rollouts
        sampled = int(self.workers.total(np.array([float(rollouts.mask_R_T.sum())]))[0])
        work = self.workers.total(np.zeros(2) if batch is None else trained_tokens(batch, self.config))
        self.progress = {
            "step": step + 1,
            "rollouts": self.progress["rollouts"] + len(collected.plan.owner),
            "tokens": self.progress["tokens"] + sampled,
        }
        timing = clock.summary(sampled, work, self.shape, self.config, self.workers)
        if self.tracker is None:
            return
        append(self.out / "metrics.jsonl", {**self.progress, **metrics})
        append(self.out / "timing.jsonl", {"step": step + 1, **timing})
        first = int(rollouts.owner_R[0])
        sample = {
            "id": collected.problems[first].id,
            "prompt": self.policy.tokenizer.decode(rollouts.prompts[first]),
            "completion": rollouts.texts[0],
            "reward": float(collected.own_rewards[0]),
        }
        append(self.out / "samples.jsonl", {"step": step + 1, **sample})
        self.tracker.log(step + 1, {**metrics, "timing": timing})
        self._bar.set_postfix(reward=f"{metrics['reward']:.3f}", mixed=f"{metrics['mixed_share']:.2f}")
        self._bar.update()

    def evaluate_and_save(self, step: int, stopping: int) -> None:
        """What is due after a step."""
        config, last = self.config, step + 1 == self.config.steps
        due = last or (step + 1) % config.eval_every == 0
        if due:
            self.evaluate()
        if last and self.validation_problems:
            self.evaluate_test("last")
        self._save_due |= (step + 1) % config.save_every == 0
        if last or stopping or (self._save_due and not self.refill.waiting):
            self._save_due = False
            self._save(step + 1)
        late = time.monotonic() - self._reported > REPORT_EVERY
        if due and self.report is not None and self.workers.rank == 0 and late:
            self.report(self.out)
            self._reported = time.monotonic()

    def _save(self, steps: int) -> None:
        """A checkpoint; all processes take part in gathering weights and moments."""
        moments = optimizer_state(self.optimizer, self._trained(), main=self.workers.rank == 0)
        if self.workers.rank == 0:
            state = {
                "progress": self.progress,
                "best": self.best.state_dict(),
                "controller": self.controller.state_dict(),
            }
            save_checkpoint(self.out, steps, self.policy.save, moments, state)
            self.best.checkpoint_saved()
        else:
            self.policy.save(self.out)  # writes nothing
        self.workers.barrier()

    def evaluate(self) -> None:
        """Evaluate on the problems for that, and keep the weights that are best on validation problems."""
        split = "validation" if self.validation_problems else "test"
        place = {"step": self.progress["step"], "rollouts": self.progress["rollouts"]}
        rate = self._evaluate(split, place)
        if split == "validation":
            self.best.offer(rate, **place, write_model=self.policy.save)

    def evaluate_best(self) -> None:
        """Evaluate the best weights after the last step, in the memory of policy and moments: both are saved."""
        if self.validation_problems:
            del self.optimizer, self.policy, self.sampler.policy
            gc.collect()
            self.sampler.policy = self.policy = load_policy(self.config, self.best.folder, self.workers)
            self.evaluate_test("best")

    def evaluate_test(self, checkpoint: str) -> None:
        """Evaluate the weights that the sampler has on the test problems."""
        place = self.best.state_dict() if checkpoint == "best" else self.progress
        self._evaluate("test", {"step": place["step"], "rollouts": place["rollouts"], "checkpoint": checkpoint})

    def _evaluate(self, split: str, place: dict[str, Any]) -> float:
        """Evaluate the sampler's policy on a split and log one line; its pass@k."""
        config, step = self.config, place["step"]
        problems = self.validation_problems if split == "validation" else self.test_problems
        how = "exactly" if config.eval_exact else f"x {config.eval_samples} samples"
        say(self.workers, f"evaluating on {len(problems)} {split} problems {how} ...")
        self.sampler.sync()
        result = evaluate(self.sampler.policy, problems, config, self.sampler, self.grader, self.workers)
        self.sampler.sleep()
        k = config.eval_samples
        say(self.workers, f"step {step}: mean@{k} {result[f'mean@{k}']:.3f}, pass@{k} {result[f'pass@{k}']:.3f}")
        if self.tracker is not None:
            append(self.out / "evaluations.jsonl", {**place, "split": split, **result})
            scalars = {key: value for key, value in result.items() if isinstance(value, float)}
            self.tracker.log(step, {f"{split}{place.get('checkpoint', '')}": scalars})
        return float(result[f"pass@{k}"])

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.policy.model.named_parameters() if p.requires_grad]


def known_shape(config: Config) -> Shape | None:
    """The shape of the model; None where it is unknown, and its FLOPs are not estimated."""
    try:
        return shape_of(config.model)
    except UnknownShape:
        return None


def say(workers: Workers, text: str) -> None:
    """A line on the terminal, from the first process."""
    if workers.rank == 0:
        tqdm.write(printable(text))
