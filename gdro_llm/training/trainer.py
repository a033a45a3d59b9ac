"""The training loop: plan -> sample -> grade -> observe -> update.

The controller decides each prompt's weight and number of rollouts before sampling; everything else is GRPO:

1. Advantages are centred (and scaled) within each prompt's group, whatever its size (Eq. 3), then multiplied by the
   prompt's weight (Eq. 16). The logged `reward` is never weighted; `weighted_reward` is.
2. The loss is the clipped surrogate averaged over the tokens of the batch: rollouts are weights too (F6), a prompt's
   pull grows by n_i w_n(p) (`gdro_core.gradient_weight`). With `aggregation="prompt"` a rollout counts n_bar / n_i
   (Eq. 7), which leaves w_n(p); with `preserve_objective` nothing is left.
3. Nothing random has a state: every draw is seeded by (seed, step), so a resumed run needs no generator saved.
4. Under torchrun every process runs this loop: it makes the same plan, samples, grades and trains the prompts dealt to
   it, and learns the rewards of all. The first process writes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gdro_core import PublishedController
from gdro_llm.config import Config, UsageError, printable
from gdro_llm.engine.memory import check_fits
from gdro_llm.engine.policy import Policy, device_type, load_policy
from gdro_llm.engine.rollouts import Decoding, Rollouts, joined
from gdro_llm.engine.sampler import Sampler, make_sampler
from gdro_llm.engine.shapes import Shape, UnknownShape, mfu, shape_of
from gdro_llm.engine.workers import Workers, failures_noted, start_workers, stop_workers
from gdro_llm.measuring.report import write_report
from gdro_llm.problems.load import batch_indices, hold_out, load_problems
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.prompting import drop_long_prompts, prompt_tokens, room_for
from gdro_llm.problems.rewards import Grader
from gdro_llm.training.checkpoint import (
    append,
    best_folder,
    drop_best,
    find_checkpoint,
    load_checkpoint,
    open_run,
    other_settings,
    save_best,
    save_checkpoint,
)
from gdro_llm.training.evaluation import evaluate, has_exact_rates
from gdro_llm.training.losses import group_advantages, overlong_penalty, rollout_scale
from gdro_llm.training.optimizer_state import load_optimizer_state, optimizer_state
from gdro_llm.training.planners import CANDIDATES, build_controller
from gdro_llm.training.stopping import Stopped, StopRequest, stop_requests
from gdro_llm.training.tracking import Tracker, import_trackers
from gdro_llm.training.update import build_optimizer, out_of_memory_advice, sampler_gap, set_learning_rate, update

Batch = tuple[Rollouts, np.ndarray, np.ndarray, np.ndarray]  # and advantages, scales, whether included: (R,) each
REPORT_EVERY = 60.0  # the report is written anew after an evaluation, but not more often [s]


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    fresh: bool = False,
    report: bool = True,
    stop: StopRequest | None = None,
) -> None:
    """Train one policy into the run directory `out`, with a report if wanted; see `gdro train --help`.

    A signal that `stop` notes ends the run after a step; without `stop`, signals are handled from the first step on.
    """
    with ExitStack() as cleanup, failures_noted(), out_of_memory_advice(config, training=True):
        cleanup.callback(stop_workers)
        run = Run(config, out, cleanup, resume=resume, fresh=fresh, report=report)
        controller, policy, workers = run.controller, run.policy, run.workers
        decoding = Decoding(config.max_new_tokens, config.temperature)
        if run.progress["step"] == 0:
            run.evaluate()
            if run.validation_problems:
                run.evaluate_test("start")
        stop = stop or cleanup.enter_context(stop_requests())
        for step in run.steps():
            clock = Clock(policy.device)
            with clock("controller"):
                plan = controller.plan([problem.id for problem in candidates(run.pool, config, step)])
            problems = [run.train_problems[str(name)] for name in plan.ids]
            prompts = [prompt_tokens(policy.tokenizer, problem, config) for problem in problems]
            mine = workers.deal(plan.counts, config.minibatches)
            with clock("sync"):
                run.sampler.sync()
            with clock("sample"):
                seed = step_seed(config.seed, step)
                rollouts = run.sampler.sample(prompts, plan.counts, decoding, seed=seed, rows=mine)
                run.sampler.sleep()
            if step == run.first_step:
                run.check_sampler(step, sampler_gap(policy, rollouts, config, workers))
            with clock("grade"):
                rewards = run.grader.grade([problems[p] for p in rollouts.owner_R.tolist()], rollouts.texts)
                rewards = turned_round(rewards, mine, len(plan.owner), config, step)
                rewards_R = np.array(workers.collect(mine, rewards.tolist(), len(plan.owner)))
            with clock("controller"):
                observed = controller.observe(plan, rewards_R)
            with clock("update"):
                advantages, included = advantages_of(rewards, rollouts, config)
                scale = rollout_scale(plan.weights, plan.counts, rollouts.owner_R.cpu().numpy(), config.aggregation)
                batch: Batch | None = (rollouts, advantages, scale, included)
                if config.refill:
                    batch = run.refill(rollouts, advantages, scale)  # None until mixed groups fill a batch
                set_learning_rate(run.optimizer, config, step)
                try:
                    losses_P, updated = update_on(batch, policy, run.optimizer, config, workers)
                except FloatingPointError as error:
                    raise UsageError(f"step {step + 1}: {error}; {other_settings(out)}") from error
            if isinstance(controller, PublishedController):  # its payoff is a by-product of the update
                controller.observe_losses(plan, losses_P)

            run.check_sampler(step, updated.get("sampler_gap", 0.0))
            sampled = summarise(rewards_R, plan.owner, plan.weights, rollouts, workers)
            run.log(step, {**sampled, **updated, **observed}, clock, problems, rewards, rollouts, batch)
            stopping = 0 if run.waiting else run.agree(stop.received)  # what waits is not saved
            run.evaluate_and_save(step, stopping)
            if stopping and step + 1 < config.steps:
                raise Stopped(f"stopped after step {step + 1}, which is saved: --resume goes on", stopping)
        del policy
        run.evaluate_best()


class Run:
    """All that a run holds besides the step in progress: policy, engines, controller, data, logs."""

    def __init__(
        self, config: Config, out: Path, cleanup: ExitStack, *, resume: bool, fresh: bool, report: bool
    ) -> None:
        self.config, self.out, self.report = config, out, report
        self.controller = build_controller(config)
        self.workers = start_workers(device_type(config))
        if config.optimizer == "adamw8bit" and self.workers.size > 1:
            raise UsageError("optimizer 'adamw8bit' works in one process only; use adamw under torchrun")
        if device_type(config) == "cuda":
            say(self.workers, check_fits(config, torch.cuda.mem_get_info()[1], self.workers.size))
        train, self.test_problems = load_problems(config)
        train, self.validation_problems = hold_out(train, config)
        self._check_exact()
        found = find_checkpoint(out, config, resume=resume, fresh=fresh) if self.workers.rank == 0 else None
        checkpoint: Path | None = self.workers.gather(found)[0]
        self.policy = load_policy(config, checkpoint, self.workers)
        train = drop_long_prompts(self.policy.tokenizer, train, config)
        self.pool, self.train_problems = train, {problem.id: problem for problem in train}
        if config.controller == "mopps" and len(train) < CANDIDATES * config.batch_size:
            raise UsageError(
                f"batch_size must be at most a {CANDIDATES}th of the {len(train)} problems with controller 'mopps', "
                f"got {config.batch_size}"
            )
        self.grader = cleanup.enter_context(Grader(config))
        held_out = [*self.validation_problems, *self.test_problems]
        self.grader.check_gold([*train, *held_out])
        self.optimizer = build_optimizer(self.policy, config)
        self.sampler: Sampler = make_sampler(self.policy, room_for(self.policy.tokenizer, held_out, config))
        cleanup.callback(self.sampler.close)
        import_trackers(config)
        if self.workers.rank == 0:  # after all that can be refused: a mistake leaves nothing behind
            cleanup.enter_context(open_run(out, config, checkpoint, fresh=fresh))
        visits = config.steps * config.batch_size / len(train)
        if visits < 3 and config.controller != "grpo":
            say(
                self.workers,
                f"each of {len(train)} problems comes up {visits:.2g} times in this run, and the controller acts on a "
                "problem from its second time on: more steps or fewer train_problems give it more to act on",
            )
        self.progress = {"step": 0, "rollouts": 0, "tokens": 0}
        self.best: dict[str, Any] = {"step": 0, "rollouts": 0, "rate": -1.0}  # of the validation problems
        self.waiting: list[tuple[Rollouts, np.ndarray, np.ndarray]] = []  # mixed groups that do not fill a batch yet
        self._save_due = False
        if checkpoint is not None:
            moments, state = load_checkpoint(checkpoint)
            load_optimizer_state(self.optimizer, self._trained(), moments)
            self.controller.load_state_dict(state["controller"])
            self.progress, self.best = state["progress"], state["best"]
        self._saved_best = self.best["step"]  # of the last checkpoint
        self.first_step = self.progress["step"]
        self.tracker: Tracker | None = None
        if self.workers.rank == 0:
            self.tracker = Tracker(config, out, step=self.first_step)
            cleanup.callback(self.tracker.close)
        try:
            self.shape: Shape | None = shape_of(config.model)
        except UnknownShape:
            self.shape = None  # no estimate of the model FLOPs then
        self._reported = time.monotonic()
        self._bar = tqdm(
            total=config.steps,
            initial=self.first_step,
            desc=f"train {config.controller}",
            unit="step",
            disable=None if self.workers.rank == 0 else True,
        )
        cleanup.callback(self._bar.close)

    def steps(self) -> range:
        """The steps that are left."""
        return range(self.first_step, self.config.steps)

    def refill(self, rollouts: Rollouts, advantages_R: np.ndarray, scale_R: np.ndarray) -> Batch | None:
        """Keep the mixed groups; a batch once there are as many as a batch has prompts (what is over goes), or None."""
        owner_R = rollouts.owner_R.cpu().numpy()
        rows = np.flatnonzero(np.isin(owner_R, owner_R[advantages_R != 0]))
        self.waiting.append((rollouts.select(rows), advantages_R[rows], scale_R[rows]))
        parts, advantages, scales = zip(*self.waiting, strict=True)
        if sum(len(part.prompts) for part in parts) < self.config.batch_size:
            return None
        self.waiting = []
        whole = joined(parts)
        rows = np.flatnonzero(whole.owner_R.cpu().numpy() < self.config.batch_size)
        included = np.ones(len(rows), bool)
        return whole.select(rows), np.concatenate(advantages)[rows], np.concatenate(scales)[rows], included

    def _check_exact(self) -> None:
        """Refuse `eval_exact` before anything is loaded, where success probabilities cannot be computed."""
        config = self.config
        if config.eval_exact and not has_exact_rates([*self.validation_problems, *self.test_problems], config):
            raise UsageError("eval_exact needs data of cells, grader 'exact', no stop, and plain samples")
        if config.refill and self.workers.size > 1:
            raise UsageError("refill works in one process only")

    def agree(self, received: int | None) -> int:
        """The signal to stop that any process got, or 0."""
        return max(self.workers.gather(received or 0))

    def check_sampler(self, step: int, gap: float) -> None:
        """Stop when sampler and trainer are not the same policy: what is learnt then is wrong without a sign."""
        if gap <= self.config.max_sampler_gap:
            return
        raise UsageError(
            f"step {step + 1}: the log-probabilities of engine {self.config.engine!r} are {gap:.3g} off the trainer's "
            f"on average, more than max_sampler_gap = {self.config.max_sampler_gap:g}: stale weights, another "
            "temperature or number format. Try --engine hf, or with bfloat16 --importance-cap 2 and a larger "
            "--max-sampler-gap; nothing was saved of this step"
        )

    def log(
        self,
        step: int,
        metrics: dict[str, Any],
        clock: Clock,
        problems: list[Problem],
        rewards: np.ndarray,
        rollouts: Rollouts,
        batch: Batch | None,
    ) -> None:
        """A line to every log, the bar, the trackers."""
        sampled = int(self.workers.total(np.array([float(rollouts.mask_R_T.sum())]))[0])
        trained = np.zeros(2) if batch is None else trained_tokens(batch[0], batch[1], self.config)
        work = self.workers.total(trained)
        self.progress = {
            "step": step + 1,
            "rollouts": self.progress["rollouts"] + self.config.mean_rollouts * self.config.batch_size,
            "tokens": self.progress["tokens"] + sampled,
        }
        timing = clock.summary(sampled, work, self.shape, self.config, self.workers)
        if self.tracker is None:
            return
        append(self.out / "metrics.jsonl", {**self.progress, **metrics})
        append(self.out / "timing.jsonl", {"step": step + 1, **timing})
        first = int(rollouts.owner_R[0])
        sample = {
            "id": problems[first].id,
            "prompt": self.policy.tokenizer.decode(rollouts.prompts[first]),
            "completion": rollouts.texts[0],
            "reward": float(rewards[0]),
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
        if last or stopping or (self._save_due and not self.waiting):
            self._save_due = False
            moments = optimizer_state(self.optimizer, self._trained(), main=self.workers.rank == 0)
            if self.workers.rank == 0:
                state = {"progress": self.progress, "best": self.best, "controller": self.controller.state_dict()}
                save_checkpoint(self.out, step + 1, self.policy.save, moments, state)
                drop_best(self.out, {self.best["step"]})
                self._saved_best = self.best["step"]
            else:
                self.policy.save(self.out)  # takes part in gathering the weights, writes nothing
            self.workers.barrier()
        if due and self.report and self.tracker is not None and time.monotonic() - self._reported > REPORT_EVERY:
            write_report([self.out], self.out)
            self._reported = time.monotonic()

    def evaluate(self) -> None:
        """Evaluate on the problems for that, and keep the weights that are best on validation problems."""
        split, now = "validation" if self.validation_problems else "test", self.progress
        rate = self._evaluate(split, {"step": now["step"], "rollouts": now["rollouts"]})
        if split == "validation" and rate > self.best["rate"]:
            self.best = {"step": now["step"], "rollouts": now["rollouts"], "rate": rate}
            if self.workers.rank == 0:
                save_best(best_folder(self.out, now["step"]), self.policy.save)
                drop_best(self.out, {now["step"], self._saved_best})
            else:
                self.policy.save(self.out)  # takes part in gathering the weights, writes nothing
            self.workers.barrier()

    def evaluate_best(self) -> None:
        """Evaluate the best weights after the last step, in the room of the policy and its moments, which are saved."""
        if self.validation_problems:
            del self.optimizer, self.policy, self.sampler.policy
            gc.collect()
            best = best_folder(self.out, self.best["step"])
            self.sampler.policy = self.policy = load_policy(self.config, best, self.workers)
            self.evaluate_test("best")

    def evaluate_test(self, checkpoint: str) -> None:
        """Evaluate the weights that the sampler has on the test problems."""
        place = self.best if checkpoint == "best" else self.progress
        self._evaluate("test", {"step": place["step"], "rollouts": place["rollouts"], "checkpoint": checkpoint})

    def _evaluate(self, split: str, place: dict[str, Any]) -> float:
        """Evaluate the sampler's policy on a split and log one line; its pass@k."""
        config, step = self.config, place["step"]
        problems = self.validation_problems if split == "validation" else self.test_problems
        how = "exactly" if config.eval_exact else f"x {config.eval_samples} samples"
        say(self.workers, f"evaluating on {len(problems)} {split} problems {how} ...")
        self.sampler.sync()
        found = evaluate(self.sampler.policy, problems, config, self.sampler, self.grader, self.workers)
        self.sampler.sleep()
        k = config.eval_samples
        say(self.workers, f"step {step}: mean@{k} {found[f'mean@{k}']:.3f}, pass@{k} {found[f'pass@{k}']:.3f}")
        if self.tracker is not None:
            append(self.out / "evaluations.jsonl", {**place, "split": split, **found})
            scalars = {key: value for key, value in found.items() if isinstance(value, float)}
            self.tracker.log(step, {f"{split}{place.get('checkpoint', '')}": scalars})
        return float(found[f"pass@{k}"])

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.policy.model.named_parameters() if p.requires_grad]


def candidates(problems: list[Problem], config: Config, step: int) -> list[Problem]:
    """The problems of a step; for a planner that chooses, these and others."""
    rows = batch_indices(len(problems), config.batch_size, step, config.seed)
    if config.controller == "mopps":
        others = np.setdiff1d(np.arange(len(problems)), rows)
        order = np.random.default_rng([config.seed, step, 3]).permutation(others)
        rows = np.concatenate([rows, order[: (CANDIDATES - 1) * len(rows)]])
    return [problems[i] for i in rows]


def turned_round(rewards: np.ndarray, rows: np.ndarray, total: int, config: Config, step: int) -> np.ndarray:
    """Grades of some rows of the plan, a share `reward_noise` of them wrong: r becomes 1 - r."""
    if not config.reward_noise:
        return rewards
    wrong = np.random.default_rng([config.seed, step, 2]).random(total)[rows] < config.reward_noise
    return np.where(wrong, 1.0 - rewards, rewards)


def update_on(
    batch: Batch | None, policy: Policy, optimizer: torch.optim.Optimizer, config: Config, workers: Workers
) -> tuple[np.ndarray, dict[str, float]]:
    """`update`, or nothing where there is no batch yet."""
    if batch is None:
        return np.zeros(0), {}
    rollouts, advantages, scale, included = batch
    return update(policy, optimizer, rollouts, advantages, scale, config, workers, included)


def advantages_of(rewards_R: np.ndarray, rollouts: Rollouts, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Advantages, and which rollouts count: truncated ones may be left out, or lose reward as they near the limit.

    The controllers see rewards without the punishment. `rollouts` holds whole prompts.
    """
    included = np.ones(len(rewards_R), dtype=bool)
    if config.overlong == "mask":
        included = ~rollouts.truncated_R.cpu().numpy()
    elif config.overlong == "punish":
        lengths_R = rollouts.mask_R_T.sum(-1).cpu().numpy()
        rewards_R = rewards_R + overlong_penalty(lengths_R, config.max_new_tokens, config.overlong_buffer)
    owner_R = rollouts.owner_R.cpu().numpy()
    return group_advantages(rewards_R, owner_R, scale=config.scale_rewards, included_R=included), included


def summarise(
    rewards_R: np.ndarray, owner_R: np.ndarray, weights_P: np.ndarray, rollouts: Rollouts, workers: Workers
) -> dict[str, float]:
    """What came back from sampling and grading: rewards of all rollouts, the rest from this process' own `rollouts`."""
    mean_P = np.bincount(owner_R, weights=rewards_R) / np.bincount(owner_R)
    mask, logprobs = rollouts.mask_R_T, rollouts.logprobs_R_T
    sums = [mask.sum(), -logprobs.double().sum(), rollouts.truncated_R.sum()]
    tokens, surprise, truncated = workers.total(np.array([float(x) for x in sums]))
    return {
        "reward": float(mean_P.mean()),  # every prompt counts once, however many rollouts it got
        "weighted_reward": float(np.average(mean_P, weights=weights_P)),
        "all_correct_share": float((mean_P == 1).mean()),
        "all_wrong_share": float((mean_P == 0).mean()),
        "mixed_share": float(((mean_P > 0) & (mean_P < 1)).mean()),
        "entropy": float(surprise / tokens),  # of the sampled tokens, unbiased [nats]
        "completion_length": float(tokens / len(rewards_R)),
        "truncated_share": float(truncated / len(rewards_R)),
    }


def trained_tokens(rollouts: Rollouts, advantages_R: np.ndarray, config: Config) -> np.ndarray:
    """Sum and sum of squares of the lengths (prompt and completion) of the rows in the backward passes, (2,)."""
    length_P = np.array([len(ids) for ids in rollouts.prompts])
    length_R = length_P[rollouts.owner_R.cpu().numpy()] + rollouts.mask_R_T.sum(-1).cpu().numpy()
    length = length_R[(advantages_R != 0) | bool(config.kl_coef)].astype(float)
    return config.passes * np.array([length.sum(), (length**2).sum()])


def say(workers: Workers, text: str) -> None:
    """A line on the terminal, from the first process."""
    if workers.rank == 0:
        tqdm.write(printable(text))


def step_seed(seed: int, step: int) -> int:
    """Seed of a step's draws."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


class Clock:
    """Seconds spent in each stage of a step."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start = time.perf_counter()
        yield
        if self._cuda:
            torch.cuda.synchronize()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def summary(
        self, sampled: int, work: np.ndarray, shape: Shape | None, config: Config, workers: Workers
    ) -> dict[str, float]:
        """`<stage>_s`, tokens a second (of the step; sampled; trained); on GPUs model FLOPs utilisation and memory.

        Args:
            sampled: tokens drawn by all processes.
            work: of `trained_tokens`, over all processes.
            shape: of the model, if known.
            config: of the run.
            workers: the processes.
        """
        found = {f"{stage}_s": round(value, 6) for stage, value in self._seconds.items()}
        found["tokens_per_s"] = round(sampled / sum(self._seconds.values()), 1)
        found["sampled_tokens_per_s"] = round(sampled / self._seconds["sample"], 1)
        found["trained_tokens_per_s"] = round(work[0] / self._seconds["update"], 1)
        if self._cuda:
            found["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
            if shape is not None and work[0]:
                used = mfu(
                    shape,
                    int(work[0]),
                    work[1] / work[0],
                    self._seconds["update"],
                    torch.cuda.get_device_name(),
                    gpus=workers.size,
                    lora_rank=config.lora_rank,
                )
                if used is not None:
                    found["update_mfu"] = round(used, 4)
        return found
