"""Trackers show the numbers of a run, under the same names, and continue them on resume."""

import sys
import time

import pytest

from gdro_llm.config import Config, UsageError
from gdro_llm.training.tracking import RUN_ID, Tracker, flatten

METRICS = {
    "reward": 0.5,
    "tokens": 7,
    "bin_error": [0.25, None, 1.0],
    "note": "text",
    "bad": float("nan"),
    "none": None,
}
NUMBERS = {"reward": 0.5, "tokens": 7.0, "bin_error/bin00": 0.25, "bin_error/bin02": 1.0}


def events(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_only_finite_numbers_are_tracked_and_bins_keep_their_place():
    """A bin without prompts leaves a gap and does not move the others; nested mappings are joined."""
    assert flatten(METRICS) == NUMBERS
    assert flatten({"time": {"sample": 1, "inner": {"x": 2.5}}}) == {"time/sample": 1.0, "time/inner/x": 2.5}
    assert list(flatten({"b": list(range(11))}))[-1] == "b/bin10"
    assert flatten({"inf": float("inf"), "yes": True}) == {"yes": 1.0}


def test_nothing_is_written_without_log_to(tmp_path):
    """The default."""
    tracker = Tracker(Config(), tmp_path)
    tracker.log(1, METRICS)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_what_was_logged(tmp_path):
    """Read back from the event file."""
    tracker = Tracker(Config(log_to="tensorboard"), tmp_path)
    tracker.log(1, METRICS)
    tracker.log(2, {"reward": 0.75})
    tracker.close()
    logged = events(tmp_path / "tensorboard")
    assert logged.pop("reward") == [(1, 0.5), (2, 0.75)]
    assert logged == {name: [(1, value)] for name, value in NUMBERS.items() if name != "reward"}


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path):
    """A run that reached step 4 and resumes from step 2 shows each step once, the later value of each."""
    config = Config(log_to="tensorboard")
    first = Tracker(config, tmp_path)
    for step in range(1, 5):
        first.log(step, {"reward": 0.0})
    first.close()
    second = Tracker(config, tmp_path, step=2)
    for step in range(3, 5):
        second.log(step, {"reward": 1.0})
    second.close()
    assert events(tmp_path / "tensorboard") == {"reward": [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0)]}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_install_line(name, tmp_path, monkeypatch):
    """And nothing is left behind."""
    for module in [module for module in sys.modules if name in module.split(".")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    with pytest.raises(UsageError, match=f"log_to {name} needs the package {name}: pip install {name}"):
        Tracker(Config(log_to=name), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wandb_continues_the_same_run_offline(tmp_path, monkeypatch):
    """One id for both halves, kept in the run directory; the numbers are in the run's file."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for step in (0, 2):
        tracker = Tracker(Config(log_to="wandb", seed=5), tmp_path, step=step)
        ids.append(tracker._wandb.id)
        tracker.log(step + 1, METRICS)
        assert dict(tracker._wandb.summary) | {"step": step + 1} == dict(tracker._wandb.summary)
        assert tracker._wandb.config["seed"] == 5
        tracker.close()
    assert ids[0] == ids[1] == (tmp_path / RUN_ID).read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
    assert len(files) == 2
    for name in NUMBERS:
        deadline = time.monotonic() + 20  # W&B's own process writes the last records a moment later
        while not all(name.encode() in path.read_bytes() for path in files):
            assert time.monotonic() < deadline, f"{name} is not in {files}"
            time.sleep(0.1)
