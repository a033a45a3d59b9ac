"""Seconds a step and peak memory of the whole training loop; `make bench` runs this file. Nothing here is asserted.

The embedded model (Qwen3, 4 layers of width 128, characters), 128 prompts x 4 rollouts, at most 14 new tokens, one
update a step, on the CPU. A round is one `gdro train` in a process of its own. Times are seconds a step, not of the
round: plan, sample, grade, observe and update as timing.jsonl has them, without the steps that warm up. A line with the
peak memory of the process follows. `tests/bench_trl.py` measures TRL on the same work.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_work import train_alone

STEPS, WARM_UP, ROUNDS = 14, 2, 3
STAGES = ("controller_s", "sync_s", "sample_s", "grade_s", "update_s")


class StepClock:
    """A timer for pytest-benchmark that stands still except for the mean step of the runs reported to it."""

    now = 0.0  # [s]

    def __call__(self) -> float:
        return self.now

    def report(self, run: Path) -> None:
        """Go on by the mean step of a run."""
        lines = (run / "timing.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [sum(json.loads(line)[stage] for stage in STAGES) for line in lines[WARM_UP:]]
        self.now += sum(steps) / len(steps)


clock = StepClock()


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("controller", ["grpo", "recommended"])
def test_training_step(benchmark, capsys, tmp_path, controller, threads):
    """A step of 512 rollouts."""
    memory = []
    options = {
        "controller": controller, "threads": threads, "steps": STEPS, "eval-every": STEPS, "save-every": STEPS,
        "test-problems": 25, "minibatches": 1, "device": "cpu",  # as `bench_trl.py` does
    }  # fmt: skip

    def one_run():
        run = tmp_path / str(len(memory))
        memory.append(train_alone("quickstart", run, options))
        clock.report(run)

    benchmark.pedantic(one_run, rounds=ROUNDS)
    result = {
        "loop": f"gdro {controller}",
        "threads": threads,
        "step_s": round(benchmark.stats["median"], 3),
        "peak_rss_mb": round(max(memory) / 1e6),
    }
    benchmark.extra_info.update(result)
    with capsys.disabled():
        print(json.dumps(result))
