"""A stage's seconds by the wall and of CPU time are different things, and the report shows the stages alone."""

import time
from types import SimpleNamespace

import numpy as np
import torch

from gdro_llm.config import Config
from gdro_llm.engine.workers import SINGLE_PROCESS
from gdro_llm.measuring.results import stages_of
from gdro_llm.training.clock import Clock


def timing():
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock("sample"):
            time.sleep(0.05)
    with clock("update"):
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
    return clock.summary(10, np.array([20.0, 400.0]), None, Config(), SINGLE_PROCESS)


def test_waiting_takes_no_cpu_time_and_work_does():
    row = timing()
    assert row["sample_s"] >= 0.1 > 2 * row["cpu_seconds"]["sample"]
    assert row["update_s"] >= row["cpu_seconds"]["update"] - 1e-3 >= 0.049
    assert row["sampled_tokens_per_s"] <= 100


def test_readers_of_stages_do_not_see_cpu_time():
    run = SimpleNamespace(files=SimpleNamespace(timing=[timing()]))
    assert stages_of([run]) == ["sample_s", "update_s"]
