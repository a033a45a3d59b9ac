"""The report of one or several training runs: what changed, where along the difficulty axis, and at what cost.

`write_report` turns run directories into one self-contained HTML file and its figures, `summary_table` into text for
the terminal. The first of several runs is the baseline, and results are drawn against cumulative rollouts, so that no
method is credited for having sampled more. The same files always give the same bytes.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from gdro_llm.config import UsageError, printable

Row = dict[str, Any]  # one line of a .jsonl file

NONE = "—"  # a cell without a value
# Okabe and Ito: colour-blind safe.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"]
MARKERS = "os^DvPX"
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.labelsize": 8.5,
    "axes.edgecolor": "#888", "axes.labelcolor": "#444", "axes.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.color": "#444",
    "ytick.color": "#444", "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "text.parse_math": False,  # a "$" in the name of a run is a dollar
}  # fmt: skip
STEERING = {
    "weighted_reward": "reward as the adversary weighs it", "shadow_price": "shadow price μ [utility / rollout]",
    "lead_lag": "lead-lag [bins]", "unseen_share": "share of prompts not seen before",
}  # fmt: skip
GROUPS = {"all_wrong_share": "all wrong", "mixed_share": "mixed", "all_correct_share": "all correct"}
HEALTH = {
    "loss": "loss", "entropy": "entropy [nats / token]", "grad_norm": "gradient norm",
    "sampler_kl": "KL sampler to trainer [nats]", "clip_share": "share of clipped tokens",
    "completion_length": "completion length [tokens]", "truncated_share": "share of truncated answers",
    "learning_rate": "learning rate",
}  # fmt: skip
BINS = {
    "bin_share": "share of the batch's prompts", "bin_error": "error (1 − pass rate)",
    "bin_weight": "mean prompt weight", "bin_rollouts": "rollouts per prompt",
}  # fmt: skip
CSS = """
:root { color-scheme: light; }
body { max-width: 60rem; margin: 3rem auto; padding: 0 1.5rem; color: #1c1c1c; background: #fff;
       font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .3rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { margin: .3rem 0 .8rem; max-width: 46rem; } .lead { font-size: 1.15rem; }
.small, .meta { color: #5a5a5a; font-size: .85rem; }
ul.notes { border-left: 3px solid #E69F00; padding: .1rem 0 .1rem 1.6rem; max-width: 46rem; }
img { width: 100%; height: auto; display: block; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .6rem 0 1.2rem; }
th { text-align: right; font-weight: 600; border-bottom: 1.5px solid #444; vertical-align: bottom; }
td { text-align: right; white-space: nowrap; } th, td { padding: .2rem .9rem .2rem 0; }
th.t, td.t { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr.first td { border-top: 1px solid #ddd; } tr.differs td { background: #fff6dd; }
summary { cursor: pointer; color: #0072B2; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace;
      margin: 0; padding: .5rem .8rem; background: #f6f6f4; } pre.prompt { color: #5a5a5a; background: none; }
.sample { margin: 0 0 1.2rem; } .sample .meta { margin: 0; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } img, tr, .sample { break-inside: avoid; }
               h2, h3, h2 + p { break-after: avoid; } }
"""


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Run:
    """What one run directory holds, with the evaluations of a single split."""

    path: Path
    label: str
    config: Row
    metrics: list[Row]
    evaluations: list[Row]
    timing: list[Row]
    samples: list[Row]

    def series(self, key: str, file: str = "metrics") -> NDArray[np.float64]:
        """The values of `key` over the lines of a file: (T,), or (T, B) for one a bin; NaN where there is none."""
        values = [row.get(key) for row in getattr(self, file)]
        width = max((len(value) for value in values if isinstance(value, list)), default=0)
        if width:
            values = [[None] * width if value is None else value for value in values]
        place = self.path / f"{file}.jsonl"
        if bool(width) != key.startswith("bin_") and any(value is not None for value in values):
            form = "numbers, not lists" if width else "a list a line"
            raise ValueError(f"{place}: {key!r} must hold {form}; repair the lines where it does not")
        try:
            return np.array(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {key!r} must hold numbers, as many in every line; repair the others") from error

    @property
    def before(self) -> Row:
        """The evaluation before training, empty if there is none."""
        return next((row for row in self.evaluations if row["step"] == 0), {})

    @property
    def after(self) -> Row:
        """The last evaluation after a training step, empty if there is none."""
        return next((row for row in reversed(self.evaluations) if row["step"] > 0), {})


def _is_result(row: object) -> bool:
    """Whether the rates are numbers, in the whole and in every level and task."""
    if not isinstance(row, dict) or not all(isinstance(row[key], int | float | None) for key in row if "@" in key):
        return False
    parts = [row.get(kind) or {} for kind in ("by_level", "by_task")]
    return all(isinstance(part, dict) and all(map(_is_result, part.values())) for part in parts)


def _read(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); repair or delete the line") from error
            if not _is_result(row) or type(row.get("step")) is not int:
                raise ValueError(f'{path}, line {number}: needs an integer "step" and numeric rates; repair the line')
            rows.append(row)
    return rows


def _last_written(rows: list[Row]) -> list[Row]:
    """Drop the lines that a resumed run wrote again after its checkpoint."""
    kept: list[Row] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _labels(paths: Sequence[Path]) -> list[str]:
    """Directory names, with as many parents as make them unique, then a number."""
    parts = [path.resolve().parts for path in paths]
    for depth in (1, 2, 3):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, 1)]


def _load(paths: Sequence[Path]) -> list[Run]:
    if not paths:
        raise ValueError("runs: no run directory given; give at least one")
    runs = []
    for path, label in zip(paths, _labels(paths), strict=True):
        metrics = _last_written(_read(path / "metrics.jsonl"))
        if not metrics:
            raise ValueError(f"{path / 'metrics.jsonl'}: missing or empty; give a run directory with at least one step")
        config_path = path / "config.json"
        try:
            config = json.loads(config_path.read_bytes()) if config_path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{config_path}: not JSON ({error}); repair or delete the file") from error
        if not isinstance(config, dict):
            raise ValueError(f"{config_path}: must be one JSON object; repair or delete the file")
        evaluations, timing, samples = (_read(path / f"{file}.jsonl") for file in ("evaluations", "timing", "samples"))
        runs.append(Run(path, label, config, metrics, evaluations, _last_written(timing), samples))
    splits = [{row.get("split", "") for row in run.evaluations} for run in runs if run.evaluations]
    shared = sorted(set.intersection(*splits)) if splits else [""]
    if not shared:
        raise ValueError(
            f"{paths[0] / 'evaluations.jsonl'}: no split that all runs have; evaluate them on the same one"
        )
    split = "validation" if "validation" in shared else "test" if "test" in shared else shared[0]
    kept = [[row for row in run.evaluations if row.get("split", "") == split] for run in runs]
    return [replace(run, evaluations=_last_written(rows)) for run, rows in zip(runs, kept, strict=True)]


# ---------------------------------------------------------------------------------------------------------- results


def _metrics(runs: Sequence[Run]) -> list[str]:
    """mean@k and pass@k, each at the largest k that all evaluations share."""
    keys = [{key for key in row if re.fullmatch(r"(mean|pass)@\d+", key)} for run in runs for row in run.evaluations]
    shared = sorted(set.intersection(*keys), key=lambda key: int(key[5:])) if keys else []
    if keys and not shared:
        files = ", ".join(str(run.path / "evaluations.jsonl") for run in runs if run.evaluations)
        raise ValueError(f"{files}: no mean@k or pass@k with the same k in every line; evaluate again with one k")
    return sorted({key[:4]: key for key in shared}.values())


def _with_exact(runs: Sequence[Run], metrics: Sequence[str]) -> list[str]:
    """The metrics, then those that were also computed from the model's probabilities instead of sampled answers."""
    exact = [f"exact_{metric}" for metric in metrics]
    return [*metrics, *(key for key in exact if any(key in row for run in runs for row in run.evaluations))]


def _names(runs: Sequence[Run], kind: str) -> list[str]:
    """Levels or tasks, in the order of the files."""
    return list(dict.fromkeys(name for run in runs for row in run.evaluations for name in row.get(kind) or {}))


def _part(evaluation: Row, kind: str, name: str) -> Row:
    """The results of a level or a task, or the whole evaluation when `kind` is empty."""
    return (evaluation.get(kind) or {}).get(name, {}) if kind else evaluation


def _rate(part: Row, metric: str) -> tuple[float, float]:
    """Rate and standard error in percent, NaN where unknown."""
    value, error = part.get(metric), part.get(f"{metric}_se")
    return math.nan if value is None else 100 * value, math.nan if error is None else 100 * error


def _minus(after: tuple[float, float], before: tuple[float, float]) -> tuple[float, float]:
    return after[0] - before[0], math.hypot(after[1], before[1])


def _show(rate: tuple[float, float], sign: str = "") -> str:
    if math.isnan(rate[0]):
        return NONE
    return f"{rate[0]:{sign}.1f}" + ("" if math.isnan(rate[1]) else f" ± {rate[1]:.1f}")


def _result_header(runs: Sequence[Run], first: str) -> list[str]:
    header = [first, "run", "problems", "before, %", "after, %", "change, pp"]
    return header if len(runs) == 1 else [*header, f"vs {runs[0].label}, pp"]


def _result_rows(runs: Sequence[Run], metric: str, kind: str, name: str, title: str) -> list[list[str]]:
    """A row a run: before, after, their difference, and the difference to the first run."""
    rows: list[list[str]] = []
    for run in runs:
        parts = [_part(row, kind, name) for row in (run.before, run.after, runs[0].after)]
        before, after, baseline = (_rate(part, metric) for part in parts)
        problems = str(parts[1].get("problems", parts[0].get("problems", NONE)))
        gain = [] if len(runs) == 1 else ["" if run is runs[0] else _show(_minus(after, baseline), "+")]
        cells = [_show(before), _show(after), _show(_minus(after, before), "+"), *gain]
        rows.append(["" if rows else title, run.label, problems, *cells])
    return rows


def _training(run: Run) -> str:
    """What the run is and how far it went, in words."""
    steps, rollouts, reward = run.metrics[-1]["step"], run.metrics[-1].get("rollouts"), run.series("reward")
    width = max(1, len(reward) // 10)
    settings = [key for key in ("preset", "controller", "model", "data", "seed") if key in run.config]
    words = [f"{key} {run.config[key]}" for key in settings]
    words += [f"{steps:,} steps"] + ([] if rollouts is None else [f"{rollouts:,} rollouts"])
    if np.isfinite(first := reward[:width].mean()) and np.isfinite(last := reward[-width:].mean()):
        ends = f"means of the first and the last {width} steps" if width > 1 else "first and last step"
        words.append(f"training reward {first:.3f} → {last:.3f} ({ends})")
    return f"{run.label}: {', '.join(words)}"


def _split(runs: Sequence[Run]) -> str:
    return next((str(row.get("split", "evaluation")) for run in runs for row in run.evaluations), "evaluation")


def summary_table(runs: list[Path]) -> str:
    """The final table as aligned text: before and after by level, and the differences to the first run.

    Rates are in percent and differences in percentage points, with one standard error over the problems of the
    evaluation. Raises ValueError, naming the file, where a run directory is missing, empty or malformed.
    """
    loaded = _load(runs)
    lines = [printable(_training(run)) for run in loaded]
    rows = []
    for metric in _metrics(loaded):
        for kind, name in [("", "all"), *(("by_level", level) for level in _names(loaded, "by_level"))]:
            rows += _result_rows(loaded, metric, kind, name, f"{metric} {name}")
    if not rows:
        return "\n".join([*lines, "no evaluation yet"])
    table = [list(map(printable, row)) for row in (_result_header(loaded, _split(loaded)), *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = zip(row, "<<>>>>>", widths, strict=False)
        lines.append("  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- figures


def _look(index: int) -> Row:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": ("-", "--", ":", "-.")[index // len(COLOURS) % 4]}


def _figure(draw: Sequence[Callable[[Axes], None]], columns: int, height: float, x: str, runs: Sequence[Run]) -> Figure:
    """A grid with a panel for each function of `draw`, and a legend when there are several runs."""
    rows = -(-len(draw) // columns)
    figure = Figure(figsize=(9.6, height * rows + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for position, axis in enumerate(axes):
        if position >= len(draw):
            axis.remove()
            continue
        axis.margins(x=0.02)
        axis.yaxis.set_major_formatter("{x:g}")
        draw[position](axis)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        if position + columns >= len(draw):
            axis.set_xlabel("cumulative rollouts" if x == "rollouts" else "step")
    if len(runs) > 1:
        handles = [Line2D([], [], marker=MARKERS[i % 7], markersize=4, **_look(i)) for i in range(len(runs))]
        figure.legend(
            handles, [printable(run.label) for run in runs], loc="outside upper left", ncols=min(len(runs), 4)
        )
    return figure


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean over a twentieth of the run, of what is finite."""
    kernel, finite = np.ones(max(1, len(values) // 20) | 1), np.isfinite(values)
    count = np.convolve(finite, kernel, mode="same")
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    smooth = np.full(len(values), np.nan)
    np.divide(total, count, out=smooth, where=count > 0)
    return smooth


def _draw_series(axis: Axes, runs: Sequence[Run], key: str, x: str, title: str) -> None:
    for index, run in enumerate(runs):
        steps, values = run.series(x), run.series(key)
        axis.plot(steps, values, linewidth=0.8, alpha=0.25, **_look(index))
        axis.plot(steps, _smooth(values), linewidth=1.6, marker="." if len(values) < 10 else None, **_look(index))
    axis.set_title(title)


def _draw_rates(axis: Axes, runs: Sequence[Run], metric: str, kind: str, name: str, x: str) -> None:
    for index, run in enumerate(runs):
        rates = np.array([_rate(_part(row, kind, name), metric) for row in run.evaluations]).reshape(-1, 2)
        look = {**_look(index), "marker": MARKERS[index % 7], "markersize": 3.5, "linewidth": 1.4, "elinewidth": 0.8}
        axis.errorbar(run.series(x, "evaluations"), rates[:, 0], np.nan_to_num(rates[:, 1]), **look)
    axis.set_title(printable(f"{name}: {metric}, %"))  # matplotlib warns of a glyph by printing it


def _draw_map(axis: Axes, run: Run, runs: Sequence[Run], key: str) -> None:
    """Step by bin, hardest at the top; a colour means the same for all runs."""
    steps, values = run.series("step"), run.series(key)
    seen = np.concatenate([_finite(other.series(key).ravel()) for other in runs])
    bins = values.shape[1]
    names = [f"{100 * b / bins:.3g}–{100 * (b + 1) / bins:.3g}" for b in range(bins)]
    axis.set(title=BINS[key], ylabel="difficulty bin: % solved", facecolor="#dddddd")
    axis.grid(False)
    corners = np.append(steps - 0.5, steps[-1] + 0.5), np.arange(bins + 1) - 0.5
    norm = PowerNorm(0.5 if key == "bin_weight" else 1.0, seen.min(), seen.max())  # weights multiply: widen the small
    mesh = axis.pcolormesh(*corners, np.ma.masked_invalid(values.T), norm=norm, cmap="viridis")
    axis.invert_yaxis()
    every = -(-bins // 12)
    axis.set_yticks(range(0, bins, every), names[::every], fontsize=7)
    axis.figure.colorbar(mesh, ax=axis, pad=0.02, aspect=18, format="{x:g}").outline.set_visible(False)


def _draw_stages(axis: Axes, run: Run, stages: Sequence[str], legend: bool) -> None:
    seconds = [_smooth(np.nan_to_num(run.series(stage, "timing"))) for stage in stages]
    colours = matplotlib.colormaps["cividis"](np.linspace(0.1, 0.95, len(stages)))
    axis.stackplot(run.series("step", "timing"), seconds, colors=colours, labels=[stage[:-2] for stage in stages])
    axis.set(title=printable(run.label), ylabel="seconds")
    if legend:
        axis.figure.legend(loc="outside upper left", ncols=len(stages))


def _logged(runs: Sequence[Run], keys: Iterable[str]) -> list[str]:
    return [key for key in keys if any(_finite(run.series(key)).size for run in runs)]


def _overlay(runs: Sequence[Run], titles: Mapping[str, str], x: str, columns: int) -> Figure | None:
    """A panel a key that some run logged, all runs in each."""
    draw = [partial(_draw_series, runs=runs, key=key, x=x, title=titles[key]) for key in _logged(runs, titles)]
    return _figure(draw, min(columns, len(draw)), 1.9 if columns > 3 else 2.4, x, runs) if draw else None


def _progress(runs: Sequence[Run], metrics: Sequence[str], x: str) -> Figure | None:
    rewards = {"reward": "mean training reward, unweighted"}
    draw = [partial(_draw_series, runs=runs, key=key, x=x, title=rewards[key]) for key in _logged(runs, rewards)]
    draw += [partial(_draw_rates, runs=runs, metric=m, kind="", name=_split(runs), x=x) for m in metrics]
    return _figure(draw, len(draw), 2.7, x, runs) if draw else None


def _levels(runs: Sequence[Run], metrics: Sequence[str], x: str) -> Figure | None:
    panels = [(metric, level) for metric in metrics for level in _names(runs, "by_level")]
    draw = [partial(_draw_rates, runs=runs, metric=m, kind="by_level", name=level, x=x) for m, level in panels]
    return _figure(draw, len(draw) // len(metrics), 2.3, x, runs) if draw else None


def _maps(run: Run, runs: Sequence[Run]) -> Figure | None:
    keys = [key for key in BINS if np.unique(_finite(run.series(key))).size > 1]  # a constant needs no map
    draw = [partial(_draw_map, run=run, runs=runs, key=key) for key in keys]
    return _figure(draw, min(2, len(draw)), 2.5, "step", [run]) if draw else None


def _time(runs: Sequence[Run]) -> tuple[Figure | None, str]:
    """The stages of each step stacked, a panel a run, and a table of medians."""
    keys = dict.fromkeys(key for run in runs for row in run.timing for key in row)
    stages = [key for key in keys if key.endswith("_s") and not key.endswith("_per_s")]
    timed = [run for run in runs if run.timing]
    if not timed or not stages:
        return None, ""
    draw = [partial(_draw_stages, run=run, stages=stages, legend=run is timed[0]) for run in timed]
    columns = {key: (f"{key[:-2]}, s", 1, ".3f") for key in stages}
    columns |= {"controller_s": ("controllers, ms", 1000, ".2f"), "tokens_per_s": ("tokens / s", 1, ",.0f")}
    rows = []
    for run in timed:
        values = {key: _finite(run.series(key, "timing")) for key in columns}
        medians = {key: np.median(column) for key, column in values.items() if column.size}
        cells = {key: f"{medians[key] * columns[key][1]:{columns[key][2]}}" for key in medians}
        rows.append([run.label, *(cells.get(key, NONE) for key in columns)])
    table = _table(["run", *(title for title, _, _ in columns.values())], rows, 1)
    figure = _figure(draw, min(2, len(draw)), 2.4, "step", timed[:1])
    top = max(axis.get_ylim()[1] for axis in figure.axes)
    for axis in figure.axes:
        axis.set_ylim(0, top)  # one scale for all runs
    return figure, table


# ------------------------------------------------------------------------------------------------------------- page

ERRORS = """± is one standard error of a single run's evaluation, over its problems and sampled answers. A
        difference combines the two as if they were independent, which is usually too wide, since the problems are
        the same. It is no interval over training seeds: another seed may move a result by more, and only repeated
        runs can say by how much. A rate called exact_ is computed from the model's probabilities, without sampling."""
SECTIONS = {
    "progress": ("Progress", """Faint lines are single batches, strong lines a short running mean, bars one standard
        error. mean@k is the chance that a sampled answer is right, pass@k the chance that at least one of k is. The
        axis counts sampled answers: at equal height, the curve further left is the cheaper one."""),
    "levels": ("By level", """The same evaluation split by how hard the problems are, each panel on its own scale.
        Robust training is meant to lift the hard panels without lowering the easy ones."""),
    "groups": ("Groups that teach", """GRPO learns from the differences among one prompt's answers: a group that is
        all wrong or all correct gives no gradient, so rollouts are well spent on the mixed share only."""),
    "bins": ("Along the difficulty axis", """Each column is a step, each row a difficulty bin with the hardest at
        the top; grey is a bin without prompts. Prompts move down as the model learns. A weight above 1 counts a
        prompt for more than plain GRPO does; rollouts go where the controller expects them to teach, at the same
        mean."""),
    "controllers": ("What the controllers do", """The weighted reward lies below the plain one while the adversary
        finds weak bins. The shadow price is what one rollout more would be worth where it is worth
        most. Lead-lag is the mean bin under the weights minus under the data: below zero, training
        leans to harder prompts than it meets."""),
    "health": ("Training health", """Signs of trouble: entropy that collapses to zero, spikes of the gradient norm,
        a KL between sampler and trainer that leaves zero (stale weights), answers cut at the length limit."""),
    "time": ("Time", """Where the seconds of a step go, lightly smoothed; the table has the median step, and what
        the controllers add to it."""),
    "by_level": ("Results by level", "Before is step 0, after the last evaluation; one table a metric."),
    "by_task": ("Results by task", "The same by family of problems; with few problems in each, mind the errors."),
    "samples": ("Sample completions", """The first ones kept of the first and of the last step that kept any, not
        chosen: the prompt in grey, then the answer."""),
}  # fmt: skip


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int, differs: bool = False) -> str:
    """A table whose first `text` columns are words; a non-empty first cell opens a group of rows.

    `differs` marks the rows whose cells are not all equal, the first aside.
    """

    def line(tag: str, row: Sequence[str]) -> str:
        kind = "differs" if differs and len(set(row[1:])) > 1 else "first" if row[0] else "more"
        marks = [' class="t"'] * text + [""] * (len(row) - text)
        cells = [f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for mark, cell in zip(marks, row, strict=True)]
        return f'<tr class="{kind}">{"".join(cells)}</tr>'

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"


def _headline(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """What happened, in sentences."""
    sentences = []
    for metric in metrics:
        for run in runs[1:] or runs:
            reached, before, baseline = (_rate(row, metric) for row in (run.after, run.before, runs[0].after))
            change, (gain, error) = _minus(reached, before), _minus(reached, baseline)
            if len(runs) == 1 and not math.isnan(change[0]):
                span = f"from {before[0]:.1f} % to {reached[0]:.1f} %"
                sentences.append(f"{metric} went {span} ({_show(change, '+')} percentage points).")
            if len(runs) > 1 and not math.isnan(gain):
                side = f"{'above' if gain >= 0 else 'below'} {runs[0].label}"
                size = f" ({abs(gain) / error:.1f} standard errors)" if error > 0 else ""
                sentences.append(f"In {metric}, {run.label} ends {_show((abs(gain), error))} points {side}{size}.")
    return " ".join(sentences) or "No results to compare after training yet; the training reward is below."


def _notes(runs: Sequence[Run]) -> list[str]:
    """What the reader should know before trusting the figures."""
    notes = [f"{run.label} has no evaluation after training yet." for run in runs if not run.after]
    for run in runs:
        for key in ["reward", *HEALTH]:
            broken = sum(isinstance(row.get(key), float) and not math.isfinite(row[key]) for row in run.metrics)
            if broken:
                notes.append(f"{run.label}: {key} is not finite in {broken} of {len(run.metrics)} steps.")
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differing = [key for key in keys if any(run.config.get(key) != runs[0].config.get(key) for run in runs)]
    if differing:
        notes.append(f"The settings of the runs differ in {', '.join(differing)}: any of these may cause a difference.")
    ends = {run.label: run.after["rollouts"] for run in runs if "rollouts" in run.after}
    if ends and max(ends.values()) > 1.01 * min(ends.values()):
        spent = ", ".join(f"{label} {rollouts:,}" for label, rollouts in ends.items())
        notes.append(f"The last evaluations are not at equal rollouts ({spent}): compare the curves, not the ends.")
    return notes


def _config_table(runs: Sequence[Run]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [[key, *(json.dumps(run.config[key]) if key in run.config else NONE for run in runs)] for key in keys]
    return _table(["setting", *(run.label for run in runs)], rows, len(runs) + 1, differs=True)


def _samples(run: Run, count: int = 3, length: int = 1500) -> str:
    """A few completions of the first and of the last step that kept any."""
    steps = sorted({row["step"] for row in run.samples})
    blocks = [f"<h3>{html.escape(run.label)}</h3>"]
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
        for row in [row for row in run.samples if row["step"] == step][:count]:
            prompt, completion = (str(row.get(key, "")) for key in ("prompt", "completion"))
            cut = f" … ({len(completion) - length:,} more characters)" if len(completion) > length else ""
            meta = f"step {step} · {row.get('id', '')} · reward {row.get('reward', NONE)}"
            meta, prompt, completion = map(html.escape, (meta, prompt, completion[:length] + cut))
            blocks.append(f'<div class="sample"><p class="meta">{meta}</p><pre class="prompt">{prompt}</pre>')
            blocks.append(f"<pre>{completion}</pre></div>")
    return "".join(blocks) if steps else ""


def _page(runs: Sequence[Run], files: dict[str, bytes]) -> str:
    """The body of the page; the figures it shows go into `files`."""
    curves = _metrics(runs)
    metrics = _with_exact(runs, curves)
    x = "rollouts" if all("rollouts" in row for run in runs for row in run.metrics + run.evaluations) else "step"

    def image(name: str, alt: str, figure: Figure | None) -> str:
        if figure is None:
            return ""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})  # no version: the same bytes
        files[f"{name}.png"] = buffer.getvalue()
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'

    def tables(kind: str, metrics: Sequence[str]) -> str:
        names = _names(runs, kind)
        rows = {m: [row for name in names for row in _result_rows(runs, m, kind, name, name)] for m in metrics}
        return "".join(_table(_result_header(runs, m), rows[m], 2) for m in metrics if names)

    maps = [image(f"bins-{i}", f"Difficulty bins of {run.label}", _maps(run, runs)) for i, run in enumerate(runs, 1)]
    names = [f"<h3>{html.escape(run.label)}</h3>" if len(runs) > 1 else "" for run in runs]
    time_figure, time_table = _time(runs)
    bodies = {
        "progress": image("progress", "Training reward and evaluation", _progress(runs, curves, x)),
        "levels": image("levels", "Evaluation by level", _levels(runs, curves, x)),
        "groups": image("groups", "Shares of groups", _overlay(runs, GROUPS, x, 3)),
        "bins": "".join(name + figure for name, figure in zip(names, maps, strict=True) if figure),
        "controllers": image("controllers", "State of the controllers", _overlay(runs, STEERING, "step", 2)),
        "health": image("health", "Training health", _overlay(runs, HEALTH, "step", 4)),
        "time": image("time", "Seconds a step by stage", time_figure) + time_table,
        "by_level": tables("by_level", metrics),
        "by_task": tables("by_task", curves),
        "samples": "".join(map(_samples, runs)),
    }
    title = " against ".join(run.label for run in reversed(runs))
    overview = [row for metric in metrics for row in _result_rows(runs, metric, "", "", metric)]
    notes = [f"<li>{html.escape(note)}</li>" for note in _notes(runs)]
    head = [
        f'<p class="meta">Training report</p><h1>{html.escape(title)}</h1>',
        f'<p class="lead">{html.escape(_headline(runs, curves))}</p>',
        f'<ul class="notes">{"".join(notes)}</ul>' if notes else "",
        _table(_result_header(runs, _split(runs)), overview, 2) + f'<p class="small">{ERRORS}</p>' if overview else "",
        *(f'<p class="meta">{html.escape(_training(run))}</p>' for run in runs),
        f"<details><summary>Configuration</summary>{_config_table(runs)}</details>",
    ]
    sections = [f"<h2>{SECTIONS[key][0]}</h2><p>{SECTIONS[key][1]}</p>{body}" for key, body in bodies.items() if body]
    return "\n".join([*head, *sections])


def write_report(runs: list[Path], out: Path) -> Path:
    """Write `report.html`, one self-contained file, and its figures into `out`; return the path of the page.

    `runs` are run directories, the first the baseline. Whatever but metrics.jsonl may be absent: the report shows what
    is there. Raises ValueError, naming the file and the remedy, where a run is missing, empty or malformed, and
    UsageError where the report cannot be written.
    """
    loaded = _load(runs)
    files: dict[str, bytes] = {}
    with matplotlib.rc_context(STYLE):
        body = _page(loaded, files)
    title = html.escape(", ".join(run.label for run in loaded))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training report: {title}</title><style>{CSS}</style></head>
<body>{body}</body></html>
"""
    files["report.html"] = page.encode(errors="backslashreplace")  # a completion may hold half a surrogate pair
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = out / f".{name}.tmp"
            temporary.write_bytes(content)
            os.replace(temporary, out / name)  # at once: a reader never meets half a file
    except OSError as error:
        raise UsageError(
            f"cannot write the report into {out} ({error.strerror}); `gdro report` makes it again"
        ) from error
    return out / "report.html"
