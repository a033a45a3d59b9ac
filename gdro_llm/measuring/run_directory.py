"""What `gdro train` leaves in a run directory, read in one way.

config.json is one JSON object. metrics.jsonl and timing.jsonl have a line a step, evaluations.jsonl a line for each
evaluated split, samples.jsonl a line for each completion that was kept. Every line is a JSON object with an integer
"step", whose rates ("mean@8") are numbers. Whatever is absent is empty; what is malformed is an error that names the
file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdro_llm.config import UsageError, named_as_now

Row = dict[str, Any]  # one line of a .jsonl file


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run, each read when it is first asked for.

    Raises:
        UsageError: from every property, where a file is malformed.
    """

    path: Path
    killed: bool = False  # the run may have been: a last line without its end is left out, else it is an error

    @cached_property
    def config(self) -> Row:
        """The resolved configuration, see `named_as_now`."""
        path = self.path / "config.json"
        return named_as_now(read_object(path)) if path.is_file() else {}

    @cached_property
    def metrics(self) -> list[Row]:
        """A line a step, without those that a resumed run wrote again."""
        return last_written(self._rows("metrics"))

    @cached_property
    def timing(self) -> list[Row]:
        """Seconds a stage: a line a step, without those that a resumed run wrote again."""
        return last_written(self._rows("timing"))

    @cached_property
    def evaluations(self) -> list[Row]:
        """All evaluations, of all splits."""
        return self._rows("evaluations")

    @cached_property
    def samples(self) -> list[Row]:
        """The completions that were kept."""
        return self._rows("samples")

    def place(self, name: str) -> Path:
        """The path of one of the logs, for errors about it."""
        return self.path / f"{name}.jsonl"

    def _rows(self, name: str) -> list[Row]:
        path, rows = self.place(name), []
        content = path.read_bytes() if path.is_file() else b""
        if self.killed:
            content = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UsageError(f"{path}, line {number}: not JSON ({error}); repair or delete the line") from error
                if not _is_result(row) or type(row.get("step")) is not int:
                    raise UsageError(
                        f'{path}, line {number}: needs an integer "step" and numeric rates; repair the line'
                    )
                rows.append(row)
        return rows


def read_object(path: Path) -> Row:
    """The JSON object that a file holds.

    Raises:
        UsageError: the file holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error}); repair or delete the file") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must be one JSON object; repair or delete the file")
    return content


def last_written(rows: Sequence[Row]) -> list[Row]:
    """Drop the lines that a resumed run wrote again after its checkpoint.

    >>> last_written([{"step": 1, "reward": 0.5}, {"step": 2}, {"step": 1}])
    [{'step': 1}]
    """
    kept: list[Row] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def series(rows: Sequence[Row], key: str, place: Path) -> NDArray[np.float64]:
    """The values of `key` over the rows of the file `place`: (T,), or (T, B) for one a bin; NaN where there is none.

    Raises:
        UsageError: values that are no numbers, or lists of unequal length.
    """
    values = [row.get(key) for row in rows]
    width = max((len(value) for value in values if isinstance(value, list)), default=0)
    if width:
        values = [[None] * width if value is None else value for value in values]
    if bool(width) != key.startswith("bin_") and any(value is not None for value in values):
        form = "numbers, not lists" if width else "a list a line"
        raise UsageError(f"{place}: {key!r} must hold {form}; repair the lines where it does not")
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{place}: {key!r} must hold numbers, as many in every line; repair the others") from error


def _is_result(row: object) -> bool:
    """Whether the rates are numbers, in the whole and in every level and task."""
    if not isinstance(row, dict) or not all(isinstance(row[key], int | float | None) for key in row if "@" in key):
        return False
    parts = [row.get(kind) or {} for kind in ("by_level", "by_task")]
    return all(isinstance(part, dict) and all(map(_is_result, part.values())) for part in parts)
