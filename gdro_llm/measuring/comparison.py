"""The results of a comparison: the numbers of each run, paired statistics of each method, and their files.

Everything is computed from run directories. An interval is a bootstrap over warm starts and over the seeds of each;
a difference counts as evidence only if the interval and an exact sign test agree, as `compare` explains.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gdro_llm.intervals import median_interval, paired_difference
from gdro_llm.measuring import tables
from gdro_llm.measuring.run_directory import RunDirectory
from gdro_llm.measuring.style import COLOURS, MARKERS, RUNS, image
from gdro_llm.training.checkpoint import write_file

TENTHS = 10  # groups of test problems, by success before training
RESAMPLES = 10_000


# ---------------------------------------------------------------------------------------------------------- one run


def outcomes(run: RunDirectory) -> dict[str, Any]:
    """Numbers of a complete run.

    Returns:
        values: in percent of the test problems mean@k and pass@k of the last weights, `best ...` of the best, `start
            ...` before training, `LEVEL ...` by level, `worst tenth mean@k` (the lowest of ten equal groups by success
            before training); in percent of the validation problems `validation ...` (last weights) and `curve ...`
            (average over the run); `mixed groups` [% of prompts], `WSE`, `Neyman` and `lead-lag` (`_proxies`), None
            for a method without;
        curve: rollouts, mean and pass of the validation problems, lists; k; rollouts; tokens of prompts and completions
            of all rollouts, None where an earlier version did not count them; seconds.
    """
    test = {row["checkpoint"]: row for row in run.evaluations if row["split"] == "test"}
    curve = [row for row in run.evaluations if row["split"] == "validation"]
    spent = [row["rollouts"] for row in curve]
    k = max(int(key.removeprefix("mean@")) for key in test["last"] if key.removeprefix("mean@").isdigit())
    start, last = (_chances(test[when], k) for when in ("start", "last"))
    tenths = np.array_split(sorted(start, key=lambda name: (start[name], name)), min(TENTHS, len(start)))
    worst = min((np.array([last[name] for name in part]) for part in tenths), key=lambda p: float(p.mean()))
    values: dict[str, float | None] = {}
    for rate in (f"mean@{k}", f"pass@{k}"):
        values[rate] = 100 * test["last"][rate]
        values |= {f"{when} {rate}": 100 * test[when][rate] for when in ("start", "best")}
        values |= {f"{level} {rate}": 100 * part[rate] for level, part in test["last"]["by_level"].items()}
        heights = np.array([row[rate] for row in curve])
        values[f"validation {rate}"] = 100 * curve[-1][rate]
        values[f"curve {rate}"] = 100 * float(np.trapezoid(heights, spent) / (spent[-1] - spent[0]))
    values[f"worst tenth mean@{k}"] = 100 * float(worst.mean())
    values["mixed groups"] = 100 * float(np.mean([row["mixed_share"] for row in run.metrics]))
    clock = [item for row in run.timing for item in row.items()]
    return {
        "values": {**values, **_proxies(run.metrics)},
        "curve": {
            "rollouts": spent,
            **{kind: [100 * row[f"{kind}@{k}"] for row in curve] for kind in ("mean", "pass")},
        },
        "k": k,
        "rollouts": run.metrics[-1]["rollouts"],
        "tokens": _tokens(run.metrics),
        "seconds": round(sum(x for key, x in clock if key.endswith("_s") and not key.endswith("per_s")), 1),
    }


def _tokens(metrics: Sequence[dict[str, Any]]) -> int | None:
    """Of all rollouts of a run: their numbers, from the running totals, times the mean tokens of each step."""
    if any("rollout_tokens" not in row for row in metrics):
        return None
    drawn = np.diff([0, *(row["rollouts"] for row in metrics)])
    return round(float(drawn @ np.array([row["rollout_tokens"] for row in metrics])))


def _chances(row: dict[str, Any], k: int) -> dict[str, float]:
    """Success of each problem by id: probabilities, or where these are unknown the share of its k samples."""
    return row["success"] if "success" in row else {name: count / k for name, count in row["correct"].items()}


def _proxies(metrics: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Averages over steps of the variance proxies sum_b share_b sigma_b / sqrt(n_b) (WSE, Eq. 33, F8) and sum_b share_b
    sigma_b^2 / n_b (Neyman), sigma_b^2 = error (1 - error) of a bin, and of the lead-lag (Eq. 32)."""
    wse, neyman = [], []
    for row in metrics:
        columns = zip(row["bin_share"], row["bin_error"], row["bin_rollouts"], strict=True)
        bins = [(s, e, n) for s, e, n in columns if s and e is not None]  # no error: all its prompts were passed over
        if bins:
            share, error, n = np.array(bins, dtype=np.float64).T
            variance = error * (1 - error) / n
            wse.append(float(share @ np.sqrt(variance)))
            neyman.append(float(share @ variance))
    lead = [row["lead_lag"] for row in metrics if row.get("lead_lag") is not None]
    return {
        "WSE": float(np.mean(wse)) if wse else None,
        "Neyman": float(np.mean(neyman)) if neyman else None,
        "lead-lag": float(np.mean(lead)) if lead else None,
    }


def rollouts_to(curve: Mapping[str, list[float]], level: float) -> float:
    """Rollouts until the validation pass@k first is at `level`, interpolated between evaluations; inf: never.

    >>> rollouts_to({"rollouts": [0, 100, 200], "pass": [40.0, 50.0, 70.0]}, level=60.0)
    150.0
    """
    x, y = curve["rollouts"], curve["pass"]
    for i, height in enumerate(y):
        if height >= level:
            if i == 0:
                return float(x[0])
            return x[i - 1] + (x[i] - x[i - 1]) * (level - y[i - 1]) / (height - y[i - 1])
    return float("inf")


# --------------------------------------------------------------------------------------------------- paired statistics


def analyse(
    by_run: Mapping[tuple[str, int], dict[str, Any]], labels: Sequence[str], starts: Mapping[int, int]
) -> dict[str, Any]:
    """Paired statistics of each method against the first.

    Args:
        by_run: `outcomes` by (label, seed).
        labels: methods, the baseline first.
        starts: the seeds, and which warm start each has.

    Returns:
        methods: by label, per value its mean over seeds and, but for the baseline, `difference`, `low`, `high` (95 %),
            `least` and `most` of a seed, `relative` [% of the baseline's mean], `wins`, `losses`, `p` (sign test) and
            `evidence`; `rollouts to baseline`, the median over seeds of rollouts until the baseline's last validation
            pass@k over the baseline's total, its interval, and the number of seeds that reached it; `against`, by label
            of each other method, differences in mean@k and pass@k; `tokens` (mean None where a run lacks them) and
            `seconds`;
        runs: every run's values.
    """
    seeds, models = list(starts), list(starts.values())
    compared = partial(paired_difference, groups=models, resamples=RESAMPLES)
    k = next(iter(by_run.values()))["k"]
    methods: dict[str, Any] = {}
    for label in labels:
        methods[label] = {}
        for value in by_run[label, seeds[0]]["values"]:
            mine, base = ([by_run[name, seed]["values"].get(value) for seed in seeds] for name in (label, labels[0]))
            if any(x is None for x in mine):
                continue
            entry: dict[str, Any] = {"mean": float(np.mean(mine))}
            if label != labels[0] and not any(x is None for x in base):
                entry |= compared(np.array(mine) - np.array(base))
                if scale := float(np.mean(base)):
                    entry["relative"] = 100 * entry["difference"] / scale
            methods[label][value] = entry
        goals = [by_run[labels[0], seed]["curve"]["pass"][-1] for seed in seeds]
        ratios = [
            rollouts_to(by_run[label, seed]["curve"], goal) / by_run[labels[0], seed]["rollouts"]
            for seed, goal in zip(seeds, goals, strict=True)
        ]
        methods[label]["rollouts to baseline"] = _median(ratios, models)
        methods[label]["against"] = {
            other: {
                rate: compared(
                    np.array([by_run[label, s]["values"][rate] - by_run[other, s]["values"][rate] for s in seeds])
                )
                for rate in (f"mean@{k}", f"pass@{k}")
            }
            for other in labels[1:]
            if other != label
        }
        for price in ("tokens", "seconds"):
            paid = [by_run[label, seed].get(price) for seed in seeds]
            methods[label][price] = {"mean": None if None in paid else float(np.mean(np.array(paid, dtype=float)))}
    runs = [
        {"method": label, "seed": seed, "model": starts[seed], **by_run[label, seed]}
        for label in labels
        for seed in seeds
    ]
    return {"k": k, "seeds": len(seeds), "baseline": labels[0], "methods": methods, "runs": runs}


def _median(ratios: Sequence[float], models: Sequence[int]) -> dict[str, Any]:
    """Median of numbers that may be infinite, which JSON calls null, its interval, and how many are finite."""
    ends = dict(zip(("median", "low", "high"), median_interval(ratios, models, resamples=RESAMPLES), strict=True))
    return {
        **{key: value if np.isfinite(value) else None for key, value in ends.items()},
        "reached": int(np.isfinite(ratios).sum()),
    }


# --------------------------------------------------------------------------------------------------------------- files


def write(result: dict[str, Any], out: Path) -> None:
    """comparison.json, .csv (a line a run), .md, .tex and .png."""
    write_file(out / "comparison.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    names = list(dict.fromkeys(name for run in result["runs"] for name in run["values"]))
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(["method", "seed", "model", "rollouts", "tokens", "seconds", *names])
    for run in result["runs"]:
        place = [run["method"], run["seed"], result["models"][run["model"]]]
        place += [run["rollouts"], run.get("tokens"), run["seconds"]]
        lines.writerow([*place, *(run["values"].get(name) for name in names)])
    write_file(out / "comparison.csv", buffer.getvalue())
    table, caption = _table(result), _caption(result)
    sides = "<" + ">" * (len(table[0]) - 1)
    write_file(out / "comparison.md", f"{caption}\n\n{tables.markdown(table, sides)}\n")
    write_file(out / "comparison.tex", f"{tables.latex(table, sides, caption)}\n")
    with matplotlib.rc_context(RUNS):
        write_file(out / "comparison.png", image(_figure(result)))


def _caption(result: dict[str, Any]) -> str:
    starts, base, total = len(result["models"]), result["baseline"], result["runs"][0]["rollouts"]
    others = any(run["rollouts"] != total for run in result["runs"])  # with budget=tokens
    return (
        f"{result['preset']}: {result['seeds']} seeds over {starts} warm start{'s' if starts > 1 else ''}, {total:,} "
        f"rollouts a run{f' of {base}' if others else ''}. Percent of test problems; in brackets the paired "
        f"difference from {base} in points with its 95 % bootstrap interval, and * where a sign test "
        "agrees (p <= .05): else no evidence of one. Tokens (prompts and completions) and seconds are means of a run."
    )


def _table(result: dict[str, Any]) -> list[list[str]]:
    """The header, then a row a method."""
    k = result["k"]
    columns = [f"pass@{k}", f"mean@{k}", f"worst tenth mean@{k}", f"best pass@{k}", f"curve pass@{k}", "mixed groups"]
    rows = [["method", *columns, "rollouts to baseline's pass [× its total]", "tokens", "seconds"]]
    for label, values in result["methods"].items():
        cells = [_cell(values[name]) for name in columns]
        ratio = values["rollouts to baseline"]
        shown = [f"{ratio[key]:.2f}" if ratio[key] is not None else "never" for key in ("median", "low", "high")]
        paid = [values[price]["mean"] for price in ("tokens", "seconds")]
        cells += [f"{shown[0]} [{shown[1]}, {shown[2]}]", *("–" if x is None else f"{x:,.0f}" for x in paid)]
        rows.append([label, *cells])
    return rows


def _cell(entry: dict[str, Any]) -> str:
    if "difference" not in entry:
        return f"{entry['mean']:.1f}"
    mark = "*" if entry["evidence"] else ""
    difference = tables.with_interval(entry["difference"], entry["low"], entry["high"], "+.1f")
    return f"{entry['mean']:.1f} ({difference}{mark})"


def verdicts(result: dict[str, Any]) -> list[str]:
    """A line a method: does it differ from the baseline in pass@k of the last weights?"""
    name, lines = f"pass@{result['k']}", []
    for label, values in result["methods"].items():
        if label != result["baseline"]:
            entry = values[name]
            interval = f"{entry['difference']:+.1f} points [{entry['low']:+.1f}, {entry['high']:+.1f}]"
            sign = f"{entry['wins']} of {result['seeds']} seeds above, p = {entry['p']:.3g}"
            word = ("better" if entry["difference"] > 0 else "worse") if entry["evidence"] else "no evidence"
            lines.append(f"{label:28} {word:12} {name} {interval}; {sign}")
    return lines


def _figure(result: dict[str, Any]) -> Figure:
    """Learning curves, and paired differences with their intervals; the labels of the differences name the curves."""
    k, labels = result["k"], list(result["methods"])
    looks = [
        {"color": COLOURS[i % 7], "marker": MARKERS[(i + i // 7) % 7], "markersize": 4} for i in range(len(labels))
    ]
    looks[0] = {"color": "black", "marker": "", "linestyle": "--"}
    figure = Figure(figsize=(11, max(3.2, 0.28 * len(labels) + 1.0)), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1.3, 1.3, 1, 1])
    for axis, kind in zip(axes[:2], ("mean", "pass"), strict=True):
        for label, look in reversed([*zip(labels, looks, strict=True)]):
            curves = [run["curve"] for run in result["runs"] if run["method"] == label]
            height = np.mean([curve[kind] for curve in curves], axis=0)
            spent = np.mean([curve["rollouts"] for curve in curves], axis=0)  # the same, but with budget=tokens
            axis.plot(spent / 1000, height, linewidth=1.2, label=label, **look)
        axis.set_title(f"{kind}@{k}, validation [%]")
        axis.set_xlabel("rollouts [thousands]")
    axes[0].legend(handles=axes[0].lines[-1:], loc="lower right")
    for axis, name in zip(axes[2:], (f"mean@{k}", f"pass@{k}"), strict=True):
        for i, (label, look) in enumerate([*zip(labels, looks, strict=True)][1:], start=1):
            entry = result["methods"][label][name]
            axis.plot([entry["low"], entry["high"]], [i, i], color=look["color"], linewidth=1.5)
            face = look["color"] if entry["evidence"] else "white"
            axis.plot(entry["difference"], i, **{**look, "markersize": 7}, markerfacecolor=face)
        axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
        names = [fill(label.replace("+", " +"), 30) if axis is axes[2] else "" for label in labels[1:]]
        axis.set_yticks(range(1, len(labels)), names, fontsize=7)
        axis.set_ylim(len(labels) - 0.5, 0.5)
        axis.set_title(f"{name}, test [points]")
        axis.set_xlabel(f"minus {result['baseline']}; filled: evidence", fontsize=7.5)
    return figure
