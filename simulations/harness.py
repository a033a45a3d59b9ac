"""How an experiment runs: seeds in fixed blocks, rows to one CSV, one figure, one verdict.

A module of `simulations.experiments` holds

    CLAIM: str                       one sentence that may turn out false
    SOURCE: str                      theorem, equation or flaw it belongs to
    COLUMNS: dict[str, str]          meaning and unit of every column of the CSV, in order
    SEEDS: int                       seeds of a full run
    BLOCK: int                       seeds simulated together, fixed so that the bytes do not depend on --jobs
    simulate(seeds, quick) -> rows   list of dicts for an array of seeds; `quick` is smaller in size, never in kind
    draw(rows) -> Figure             matplotlib Figure (object API), from the rows alone
    judge(rows) -> Verdict           whether the claim holds, with the numbers that say so

and, where it has more to say, tabulate(rows) -> str, Markdown for NAME.md, and NEEDS_DATA = True if it reads the folder
GDRO_DATA_DIR.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import os
import pkgutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from tqdm import tqdm

import gdro_core
import simulations
from gdro_llm import intervals
from gdro_llm.measuring.style import BASE, COLOURS, image
from simulations import experiments

Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds in an experiment, and why."""

    holds: bool
    text: str  # the numbers, for example "slope -0.51 ± 0.02"


def names() -> list[str]:
    """All experiments, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(experiments.__path__))


def load(name: str) -> ModuleType:
    """The module of an experiment."""
    if name not in names():
        raise ValueError(f"no experiment {name!r}; choose one of {', '.join(names())}")
    return importlib.import_module(f"simulations.experiments.{name}")


def lacks_data(name: str) -> bool:
    """Whether an experiment needs real data (NEEDS_DATA = True) and GDRO_DATA_DIR names no folder of it."""
    return bool(getattr(load(name), "NEEDS_DATA", False)) and not os.environ.get("GDRO_DATA_DIR")


def sources() -> list[Path]:
    """All files that decide a result: a block kept under other ones must not be mixed into it."""
    files = [path for package in (simulations, gdro_core) for path in sorted(Path(package.__path__[0]).rglob("*.py"))]
    return [*files, Path(intervals.__file__)]


def run(name: str, out: Path, *, seeds: int | None = None, jobs: int = 1, quick: bool = False) -> Verdict:
    """Run one experiment and write NAME.csv, .png, .pdf, .json (and .md if it tabulates) into `out`; the verdict.

    The same seeds give the same CSV bytes, whatever `jobs` is. Finished blocks of seeds are kept in `out/.unfinished`
    until the experiment is done, so that an interrupted run goes on from there (unless its code has changed).

    Raises:
        ValueError: an unknown name, fewer than 2 seeds, or a folder that cannot be written.
    """
    module = load(name)
    total = seeds if seeds is not None else max(2, module.SEEDS // 10) if quick else module.SEEDS
    if total < 2:
        raise ValueError(f"seeds must be at least 2, to tell an effect from noise, got {total}")
    blocks = [np.arange(start, min(start + module.BLOCK, total)) for start in range(0, total, module.BLOCK)]
    kept = out / ".unfinished"
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written, got {str(out)!r} ({error.strerror})") from error
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources())).hexdigest()
    files = [kept / f"{name}-{code[:16]}-{quick:d}-{block[0]}-{block[-1]}.json" for block in blocks]
    with ProcessPoolExecutor(max_workers=jobs) if jobs > 1 else _Here() as pool:
        parts = pool.map(_simulate, [name] * len(blocks), blocks, [quick] * len(blocks), files)
        rows = [row for part in tqdm(parts, total=len(blocks), desc=name, unit="block") for row in part]
    _write(out / f"{name}.csv", _as_csv(rows, list(module.COLUMNS)).encode())
    if hasattr(module, "tabulate"):
        _write(out / f"{name}.md", module.tabulate(rows).encode())
    verdict: Verdict = module.judge(rows)
    with matplotlib.rc_context(STYLE):
        figure = module.draw(rows)
        for kind in ("png", "pdf"):
            _write(out / f"{name}.{kind}", image(figure, kind))
    summary = {"claim": module.CLAIM, "source": module.SOURCE, "holds": verdict.holds, "verdict": verdict.text}
    summary |= {"seeds": total, "quick": quick, "columns": module.COLUMNS}
    _write(out / f"{name}.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    for file in kept.glob(f"{name}-*"):
        file.unlink()
    return verdict


def table(rows: list[Row], value: str, column: str = "horizon", **fixed: Any) -> tuple[np.ndarray, np.ndarray]:
    """(H,) sorted values of `column` and (seeds, H) `value` of the rows that match `fixed`."""
    chosen = [row for row in rows if all(row[key] == wanted for key, wanted in fixed.items())]
    x = np.unique([row[column] for row in chosen])
    return x, np.stack([[row[value] for row in chosen if row[column] == level] for level in x], axis=1)


STYLE: Any = {
    **BASE, "legend.fontsize": 8, "figure.constrained_layout.use": True, "axes.prop_cycle": cycler(color=COLOURS),
}  # fmt: skip


class _Here:
    """The interface of a pool in this process."""

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map: Callable[..., Any] = staticmethod(map)


def _simulate(name: str, seeds: np.ndarray, quick: bool, kept: Path) -> list[Row]:
    """Rows of a block, read back if an interrupted run has left them (JSON keeps every bit of a float)."""
    if kept.is_file():
        return list(json.loads(kept.read_bytes()))
    rows: list[Row] = load(name).simulate(seeds, quick)
    _write(kept, json.dumps(rows, default=_plain).encode())
    return list(json.loads(kept.read_bytes()))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"rows must hold numbers and texts, got {value!r}")


def _as_csv(rows: Sequence[Row], columns: list[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")  # refuses keys that are not documented
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.10g}" if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def _write(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_bytes(content)
    os.replace(scratch, path)
