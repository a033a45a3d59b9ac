"""The figures of a report: curves over cumulative rollouts, maps over the difficulty axis, stacks of seconds.

A function draws one figure, of all runs or of one, and returns None where no run has logged what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from gdro_llm.config import printable
from gdro_llm.measuring.results import Shown, finite, part_names, part_of, rate_of, split_of, stages_of
from gdro_llm.measuring.run_directory import Row
from gdro_llm.measuring.style import COLOURS, MARKERS

STEERING = {
    "weighted_reward": "reward as the adversary weighs it", "shadow_price": "shadow price μ [utility / rollout]",
    "lead_lag": "lead-lag [bins]", "tokens_excess": "tokens over the uniform plans', less 1",
    "unseen_share": "share of prompts not seen before",
    "kappa": "κ: a prompt's own gradient over noise", "cosine": "cosine between prompts' gradients",
}  # fmt: skip
GROUPS = {
    "all_wrong_share": "groups: all wrong", "mixed_share": "groups: mixed", "all_correct_share": "groups: all correct",
    "unsolved_share": "prompts: hardly ever solved", "learnable_share": "prompts: solved sometimes",
    "solved_share": "prompts: nearly always solved", "wasted_share": "rollouts without a gradient",
    "passed_over_share": "prompts without rollouts", "wasted_tokens_share": "tokens without a gradient",
}  # fmt: skip
HEALTH = {
    "loss": "loss", "entropy": "entropy [nats / token]", "grad_norm": "gradient norm",
    "sampler_kl": "KL sampler to trainer [nats]", "clip_share": "share of clipped tokens",
    "completion_length": "completion length [tokens]", "truncated_share": "share of truncated answers",
    "learning_rate": "learning rate", "grade_limit_share": "share of answers that broke the grader's limits",
}  # fmt: skip
BINS = {
    "bin_share": "share of the batch's prompts", "bin_error": "error (1 − pass rate)",
    "bin_weight": "mean prompt weight", "bin_rollouts": "rollouts per prompt",
    "bin_tokens": "tokens per rollout, with the prompt",
}  # fmt: skip


def _look(index: int) -> Row:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": ("-", "--", ":", "-.")[index // len(COLOURS) % 4]}


def _figure(
    draw: Sequence[Callable[[Axes], None]], columns: int, height: float, x: str, runs: Sequence[Shown]
) -> Figure:
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


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean over a twentieth of the run, of what is finite."""
    kernel, finite = np.ones(max(1, len(values) // 20) | 1), np.isfinite(values)
    count = np.convolve(finite, kernel, mode="same")
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    smooth = np.full(len(values), np.nan)
    np.divide(total, count, out=smooth, where=count > 0)
    return smooth


def _draw_series(axis: Axes, runs: Sequence[Shown], key: str, x: str, title: str) -> None:
    for index, run in enumerate(runs):
        steps, values = run.series(x), run.series(key)
        axis.plot(steps, values, linewidth=0.8, alpha=0.25, **_look(index))
        axis.plot(steps, _smooth(values), linewidth=1.6, marker="." if len(values) < 10 else None, **_look(index))
    axis.set_title(title)


def _draw_rates(axis: Axes, runs: Sequence[Shown], metric: str, kind: str, name: str, x: str) -> None:
    for index, run in enumerate(runs):
        rates = np.array([rate_of(part_of(row, kind, name), metric) for row in run.evaluations]).reshape(-1, 2)
        look = {**_look(index), "marker": MARKERS[index % 7], "markersize": 3.5, "linewidth": 1.4, "elinewidth": 0.8}
        axis.errorbar(run.evaluated(x), rates[:, 0], np.nan_to_num(rates[:, 1]), **look)
    axis.set_title(printable(f"{name}: {metric}, %"))  # matplotlib warns of a glyph by printing it


def _draw_map(axis: Axes, run: Shown, runs: Sequence[Shown], key: str) -> None:
    """Step by bin, hardest at the top; a colour means the same for all runs."""
    steps, values = run.series("step"), run.series(key)
    seen = np.concatenate([finite(other.series(key).ravel()) for other in runs])
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


def _draw_stages(axis: Axes, run: Shown, stages: Sequence[str], legend: bool) -> None:
    seconds = [_smooth(np.nan_to_num(run.timed(stage))) for stage in stages]
    colours = matplotlib.colormaps["cividis"](np.linspace(0.1, 0.95, len(stages)))
    axis.stackplot(run.timed("step"), seconds, colors=colours, labels=[stage[:-2] for stage in stages])
    axis.set(title=printable(run.label), ylabel="seconds")
    if legend:
        axis.figure.legend(loc="outside upper left", ncols=len(stages))


def _logged(runs: Sequence[Shown], keys: Iterable[str]) -> list[str]:
    return [key for key in keys if any(finite(run.series(key)).size for run in runs)]


def overlay(runs: Sequence[Shown], titles: Mapping[str, str], x: str, columns: int) -> Figure | None:
    """A panel a key that some run logged, all runs in each."""
    draw = [partial(_draw_series, runs=runs, key=key, x=x, title=titles[key]) for key in _logged(runs, titles)]
    return _figure(draw, min(columns, len(draw)), 1.9 if columns > 3 else 2.4, x, runs) if draw else None


def progress(runs: Sequence[Shown], metrics: Sequence[str], x: str) -> Figure | None:
    """The training reward and the evaluations over all problems."""
    rewards = {"reward": "mean training reward, unweighted"}
    draw = [partial(_draw_series, runs=runs, key=key, x=x, title=rewards[key]) for key in _logged(runs, rewards)]
    draw += [partial(_draw_rates, runs=runs, metric=m, kind="", name=split_of(runs), x=x) for m in metrics]
    return _figure(draw, len(draw), 2.7, x, runs) if draw else None


def levels(runs: Sequence[Shown], metrics: Sequence[str], x: str) -> Figure | None:
    """The evaluations, a panel a level and metric."""
    panels = [(metric, level) for metric in metrics for level in part_names(runs, "by_level")]
    draw = [partial(_draw_rates, runs=runs, metric=m, kind="by_level", name=level, x=x) for m, level in panels]
    return _figure(draw, len(draw) // len(metrics), 2.3, x, runs) if draw else None


def maps(run: Shown, runs: Sequence[Shown]) -> Figure | None:
    """What happened in the difficulty bins of a run, on the colour scales of all runs."""
    keys = [key for key in BINS if np.unique(finite(run.series(key))).size > 1]  # a constant needs no map
    draw = [partial(_draw_map, run=run, runs=runs, key=key) for key in keys]
    return _figure(draw, min(2, len(draw)), 2.5, "step", [run]) if draw else None


def time(runs: Sequence[Shown]) -> Figure | None:
    """The stages of each step stacked, a panel a run."""
    timed, stages = [run for run in runs if run.files.timing], stages_of(runs)
    if not stages:
        return None
    draw = [partial(_draw_stages, run=run, stages=stages, legend=run is timed[0]) for run in timed]
    figure = _figure(draw, min(2, len(draw)), 2.4, "step", timed[:1])
    top = max(axis.get_ylim()[1] for axis in figure.axes)
    for axis in figure.axes:
        axis.set_ylim(0, top)  # one scale for all runs
    return figure
