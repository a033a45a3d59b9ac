"""What runs reached, as the report shows it: their evaluations of one split, before and after, in percent.

Rates are in percent and differences in percentage points, with one standard error over the problems of the evaluation.
The first of several runs is the baseline.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gdro_llm.config import UsageError
from gdro_llm.measuring.run_directory import Row, RunDirectory, last_written, series

NONE = "—"  # a cell without a value


@dataclass(frozen=True)
class Shown:
    """A run in a report: its directory, its name there, and its evaluations of the split that all runs have."""

    files: RunDirectory
    label: str
    evaluations: list[Row]

    def series(self, key: str) -> NDArray[np.float64]:
        """The values of `key` over the steps: (T,), or (T, B) for one a bin; NaN where there is none."""
        return series(self.files.metrics, key, self.files.place("metrics"))

    def timed(self, key: str) -> NDArray[np.float64]:
        """(T,) the values of `key` in the timing of the steps."""
        return series(self.files.timing, key, self.files.place("timing"))

    def evaluated(self, key: str) -> NDArray[np.float64]:
        """The values of `key` over the evaluations."""
        return series(self.evaluations, key, self.files.place("evaluations"))

    @property
    def before(self) -> Row:
        """The evaluation before training, empty if there is none."""
        return next((row for row in self.evaluations if row["step"] == 0), {})

    @property
    def after(self) -> Row:
        """The last evaluation after a training step, empty if there is none."""
        return next((row for row in reversed(self.evaluations) if row["step"] > 0), {})


def load(paths: Sequence[Path]) -> list[Shown]:
    """The runs of a report, the first the baseline, with the validation or else the test evaluations of all.

    Raises:
        UsageError: no run, one without a step, a malformed file, or no split that all runs have.
    """
    if not paths:
        raise UsageError("runs: no run directory given; give at least one")
    runs = [RunDirectory(path) for path in paths]
    for run in runs:
        if not run.metrics:
            place = run.place("metrics")
            raise UsageError(f"{place}: missing or empty; give a run directory with at least one step")
    splits = [{row.get("split", "") for row in run.evaluations} for run in runs if run.evaluations]
    shared = sorted(set.intersection(*splits)) if splits else [""]
    if not shared:
        raise UsageError(f"{runs[0].place('evaluations')}: no split that all runs have; evaluate them on the same one")
    split = "validation" if "validation" in shared else "test" if "test" in shared else shared[0]
    kept = [[row for row in run.evaluations if row.get("split", "") == split] for run in runs]
    return [Shown(run, label, last_written(rows)) for run, label, rows in zip(runs, _labels(paths), kept, strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """Directory names, with as many parents as make them unique, then a number."""
    parts = [path.resolve().parts for path in paths]
    for depth in (1, 2, 3):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, 1)]


def shared_metrics(runs: Sequence[Shown]) -> list[str]:
    """mean@k and pass@k, each at the largest k that all evaluations share."""
    keys = [{key for key in row if re.fullmatch(r"(mean|pass)@\d+", key)} for run in runs for row in run.evaluations]
    shared = sorted(set.intersection(*keys), key=lambda key: int(key[5:])) if keys else []
    if keys and not shared:
        files = ", ".join(str(run.files.place("evaluations")) for run in runs if run.evaluations)
        raise UsageError(f"{files}: no mean@k or pass@k with the same k in every line; evaluate again with one k")
    return sorted({key[:4]: key for key in shared}.values())


def with_exact(runs: Sequence[Shown], metrics: Sequence[str]) -> list[str]:
    """The metrics, then those that were also computed from the model's probabilities instead of sampled answers."""
    exact = [f"exact_{metric}" for metric in metrics]
    return [*metrics, *(key for key in exact if any(key in row for run in runs for row in run.evaluations))]


def part_names(runs: Sequence[Shown], kind: str) -> list[str]:
    """Levels or tasks, in the order of the files."""
    return list(dict.fromkeys(name for run in runs for row in run.evaluations for name in row.get(kind) or {}))


def part_of(evaluation: Row, kind: str, name: str) -> Row:
    """The results of a level or a task, or the whole evaluation when `kind` is empty."""
    return (evaluation.get(kind) or {}).get(name, {}) if kind else evaluation


def rate_of(part: Row, metric: str) -> tuple[float, float]:
    """Rate and standard error in percent, NaN where unknown."""
    value, error = part.get(metric), part.get(f"{metric}_se")
    return math.nan if value is None else 100 * value, math.nan if error is None else 100 * error


def difference(after: tuple[float, float], before: tuple[float, float]) -> tuple[float, float]:
    """Difference of two rates, with the standard error of independent ones."""
    return after[0] - before[0], math.hypot(after[1], before[1])


def split_of(runs: Sequence[Shown]) -> str:
    """The split that all evaluations are of."""
    return next((str(row.get("split", "evaluation")) for run in runs for row in run.evaluations), "evaluation")


def stages_of(runs: Sequence[Shown]) -> list[str]:
    """Stages of a step whose seconds some run has logged."""
    keys = dict.fromkeys(key for run in runs for row in run.files.timing for key in row)
    return [key for key in keys if key.endswith("_s") and not key.endswith("_per_s")]


def finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values that are neither infinite nor NaN."""
    return values[np.isfinite(values)]
