"""`gdro compare`: methods x seeds, paired, at equal total rollouts or tokens, with intervals and a sign test.

1. Runs of one seed share the warm start, the prompt order and the total number of rollouts, so that the difference of
   two methods is free of the seed's effect on both. Seed s starts from model s mod M of M warm starts. A method with
   `budget=tokens` has other numbers of rollouts, which cost what its own uniform plans would. Tokens and seconds of
   every method are reported.
2. While a run trains, only validation problems are used. Results are of the test problems, for the last weights and
   for those that were best in validation pass@k.
3. An interval is a bootstrap over warm starts and over the seeds of each, of paired differences. Few seeds make it too
   short: a difference counts as evidence only if the interval and an exact sign test agree. The test assumes that seeds
   are independent. With 8 seeds over 4 warm starts the rule errs in at most 6 % of simulated nulls while effects of
   warm starts spread up to twice as much as those of seeds, and in 1 of 10 in the limit; as many warm starts as seeds
   are better (`test_under_the_null_evidence_is_rare`).
4. Everything is computed from the run directories; a run that is complete is never run again.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

from tqdm import tqdm

from gdro_llm.config import CONTROLLERS, SHARED, TYPES, Config, UsageError
from gdro_llm.measuring.comparison import analyse, outcomes, verdicts, write
from gdro_llm.measuring.run_directory import RunDirectory
from gdro_llm.problems.load import CELL_SETS
from gdro_llm.training.stopping import SIGNALS, Stopped, StopRequest, stop_requests

Place = tuple[str, int]  # label of a method, seed

METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"controller": "joint-prompt"},
    "rollout": {"controller": "joint-rollout"},
    "dr-grpo": {"controller": "grpo", "loss": "dr_grpo", "scale_rewards": False},
    "dapo": {"controller": "grpo", "refill": True},
    **{name: {"controller": name} for name in CONTROLLERS},
    "published-rollout": {"controller": "published-rollout", "aggregation": "prompt"},  # Eq. 7
}


@dataclass(frozen=True)
class Method:
    """A way to train: its label and what it changes in the preset."""

    label: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Method:
        """`NAME+key=value+...`: a name of `METHODS`, then settings of `Config`.

        >>> Method.parse("grpo+learning_rate=1e-3").settings
        {'controller': 'grpo', 'learning_rate': 0.001}
        """
        name, *changes = text.split("+")
        if name not in METHODS:
            raise UsageError(f"no method {name!r}: choose among {', '.join(METHODS)}")
        settings = dict(METHODS[name])
        for change in changes:
            key, equals, value = change.partition("=")
            if key not in TYPES or key == "preset" or not equals:
                raise UsageError(f"method {text!r}: {change!r} must be SETTING=VALUE; `gdro train --help` lists them")
            if key in SHARED:
                raise UsageError(f"method {text!r}: {key} must be the same for all methods")
            try:
                settings[key] = {"true": True, "false": False}[value] if TYPES[key] is bool else TYPES[key](value)
            except (KeyError, ValueError) as error:
                raise UsageError(f"method {text!r}: {value!r} does not fit {key}") from error
        return cls(text, settings)


def compare(
    config: Config, methods: Sequence[Method], seeds: int, models: Sequence[str], out: Path, jobs: int
) -> dict[str, Any]:
    """Train what is missing, `jobs` runs side by side, and write the comparison; returns what comparison.json holds.

    Raises:
        UsageError: fewer than two seeds or one method, methods that spend other totals, a run directory of another
            configuration, or a run that failed.
    """
    if len({method.label for method in methods}) < len(methods) or len(methods) < 2:
        raise UsageError("methods must name two different ones or more; the first is the baseline")
    if seeds < 2:
        raise UsageError(f"seeds must be at least 2 for an interval, got {seeds}")
    runs = {
        (method.label, seed): replace(config, seed=seed, model=models[seed % len(models)], **method.settings)
        for seed in range(config.seed, config.seed + seeds)
        for method in methods
    }
    if len({run.steps * run.batch_size * run.mean_rollouts for run in runs.values()}) > 1:
        raise UsageError("methods must spend the same: steps x batch_size x mean_rollouts differs")
    folders = {place: out / "runs" / place[0] / str(place[1]) for place in runs}
    left = {place: run for place, run in runs.items() if not _is_complete(folders[place], run)}
    for place in runs.keys() - left.keys():
        _drop_weights(folders[place])  # of a run that was killed after its result
    bar = tqdm(total=len(runs), initial=len(runs) - len(left), desc="compare", unit="run")
    with bar, stop_requests() as stop:
        for (label, seed), error in _train_all(left, folders, jobs, stop, fresh=_has_gpu(config)):
            if error is not None:
                log = _log(folders[label, seed])
                raise UsageError(f"{label}, seed {seed}: {error} (log: {log}); the same command goes on") from error
            bar.set_postfix_str(f"{label}, seed {seed}")
            bar.update()
    if stop.received:
        raise Stopped(f"stopped with {bar.n} of {len(runs)} runs complete; the same command goes on", stop.received)
    by_run = {place: outcomes(RunDirectory(folders[place], killed=True)) for place in runs}
    started = {seed: seed % len(models) for seed in range(config.seed, config.seed + seeds)}
    result = analyse(by_run, [method.label for method in methods], started)
    shared = {key: value for key, value in asdict(config).items() if key != "model"}
    result = {"preset": config.preset, "config": shared, "models": [Path(model).name for model in models], **result}
    write(result, out)
    return result


def _train_all(
    left: Mapping[Place, Config], folders: Mapping[Place, Path], jobs: int, stop: StopRequest, *, fresh: bool
) -> Iterator[tuple[Place, BaseException | None]]:
    """Train, `jobs` side by side; each that is complete, or the error of the first that failed.

    After a signal no further run starts; those in progress get the signal, too, save and end. `fresh` gives every run
    its own process, which frees the GPU memory at its end.
    """
    queue, waiting, passed_on = iter(left.items()), dict[Future[bool], Place](), False
    spawn, tasks = multiprocessing.get_context("spawn"), 1 if fresh else None
    with ProcessPoolExecutor(jobs, spawn, initializer=_begin_worker, max_tasks_per_child=tasks) as pool:
        while True:
            while len(waiting) < jobs and not stop.received and (following := next(queue, None)):
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a process that starts here begins with them blocked
                waiting[pool.submit(_train, following[1], folders[following[0]])] = following[0]
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            if not waiting:
                return
            if stop.received and not passed_on:
                passed_on = True
                for child in multiprocessing.active_children():
                    child.terminate()
            for future in wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED).done:
                place, error = waiting.pop(future), future.exception()
                if error is not None:
                    yield place, error
                elif future.result():
                    yield place, None


_asked = StopRequest()  # of a process of the pool, from its start to its end


def _begin_worker() -> None:
    """No signal ends a process, which would break the pool; all end with `gdro compare`, which their runs survive."""

    def note(number: int, frame: FrameType | None) -> None:
        _asked.received = number

    for number in SIGNALS:
        signal.signal(number, note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def _train(config: Config, out: Path) -> bool:
    """One run, in a process of the pool: whether it is complete (it was not stopped).

    What it prints goes to a log beside it; its weights are dropped at the end.
    """
    from transformers.utils import logging

    from gdro_llm.training.trainer import train

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _log(out).open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            if _asked.received:
                return False
            train(config, out, resume=True, stop=_asked)
        except Stopped:
            return False
    _drop_weights(out)
    return True


def _log(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def _drop_weights(out: Path) -> None:
    for weights in (*out.glob("checkpoint-*"), *out.glob("best-*")):
        shutil.rmtree(weights)


def _is_complete(out: Path, config: Config) -> bool:
    """Whether a run has its result; one of another configuration is an error."""
    if not (out / "config.json").is_file():
        return False
    run = RunDirectory(out, killed=True)
    if changed := config.conflicts(run.config):
        raise UsageError(f"{out} was run with another {', '.join(changed)}; choose another --out")
    return any(row.get("checkpoint") == "best" for row in run.evaluations)


def compare_preset(
    preset: str, methods: str, seeds: int, models: str, out: Path | None, jobs: int, overrides: Mapping[str, Any]
) -> None:
    """The command: fill in what a comparison needs, run it, print its result."""
    from gdro_llm.config import load_preset

    settings = {**load_preset(preset), **overrides}
    if settings.get("data", "cells") in CELL_SETS:
        settings = {"validation_problems": 500, "eval_every": 10, **settings}
    config = Config(**{"validation_problems": 200, **settings, "save_every": settings.get("save_every", 40)})
    if not config.validation_problems:
        raise UsageError("validation_problems must be above 0: the test problems choose nothing here")
    starts = [model for model in models.split(",") if model] or [config.model]
    if jobs < 0:
        raise UsageError(f"jobs must be at least 0 (one on a GPU, else one a core), got {jobs}")
    jobs = jobs or (1 if _has_gpu(config) else max(1, len(os.sched_getaffinity(0))))
    config = replace(config, threads=config.threads or 1) if jobs > 1 else config
    out = out or Path("runs") / f"compare-{config.preset}"
    result = compare(config, [Method.parse(text) for text in methods.split(",")], seeds, starts, out, jobs)
    print((out / "comparison.md").read_text(encoding="utf-8"))
    print("\n".join(verdicts(result)))
    print(f"\nfiles: {out}/comparison.json, .csv, .md, .tex, .png; runs in {out}/runs")


def _has_gpu(config: Config) -> bool:
    import torch

    return config.device != "cpu" and torch.cuda.is_available()
