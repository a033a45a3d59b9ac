"""`gdro compare`: methods x seeds, paired, at equal total rollouts, with intervals and a sign test.

1. Runs of one seed share the warm start, the prompt order and the total number of rollouts, so that the difference of
   two methods is free of what the seed does to both. Seed s starts from model s mod M of M warm starts.
2. While a run trains, only validation problems are looked at. Results are of the test problems, for the last weights
   and for those that were best in validation pass@k.
3. An interval is a bootstrap over warm starts and over the seeds of each, of paired differences. Few seeds make it too
   short: a difference counts as evidence only if the interval and an exact sign test agree. The test takes seeds for
   independent. With 8 seeds over 4 warm starts the rule errs in at most 6 % of simulated nulls while effects of warm
   starts spread up to twice as much as those of seeds, and in 1 of 10 in the limit; as many warm starts as seeds are
   better (`test_under_the_null_evidence_is_rare`).
4. Everything is computed from the run directories; a run that is complete is never run again.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from textwrap import fill
from threading import Thread
from types import FrameType
from typing import Any, get_type_hints

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import binomtest
from tqdm import tqdm

from gdro_llm.config import CONTROLLERS, RESUMABLE, Config, UsageError
from gdro_llm.measuring.report import COLOURS, MARKERS, STYLE
from gdro_llm.problems.load import CELL_SETS
from gdro_llm.training.checkpoint import write_file
from gdro_llm.training.stopping import SIGNALS, Stopped, StopRequest, stop_requests

Floats = NDArray[np.float64]
Place = tuple[str, int]  # label of a method, seed

METHODS: dict[str, dict[str, Any]] = {
    "joint": {"controller": "recommended"},
    "prompt": {"controller": "recommended-prompt"},
    "rollout": {"controller": "recommended-rollout"},
    "dr-grpo": {"controller": "grpo", "loss": "dr_grpo", "scale_rewards": False},
    "dapo": {"controller": "grpo", "refill": True},
    **{name: {"controller": name} for name in CONTROLLERS},
    "published-rollout": {"controller": "published-rollout", "aggregation": "prompt"},  # Eq. 7
}
_SHARED = [field for field in fields(Config) if field.name.startswith("eval_") or field.metadata.get("group") == "data"]
SHARED = {"seed", "model", "max_new_tokens", "stop", *(field.name for field in _SHARED)} - {"reward_noise"}
TENTHS = 10  # groups of test problems, by success before training
RESAMPLES = 10_000
LEVEL = 0.05


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
        settings, types = dict(METHODS[name]), get_type_hints(Config)
        for change in changes:
            key, equals, value = change.partition("=")
            if key not in types or key == "preset" or not equals:
                raise UsageError(f"method {text!r}: {change!r} must be SETTING=VALUE; `gdro train --help` lists them")
            if key in SHARED:
                raise UsageError(f"method {text!r}: {key} must be the same for all methods")
            try:
                settings[key] = {"true": True, "false": False}[value] if types[key] is bool else types[key](value)
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
    found = {place: outcomes(folders[place]) for place in runs}
    started = {seed: seed % len(models) for seed in range(config.seed, config.seed + seeds)}
    result = analyse(found, [method.label for method in methods], started)
    shared = {key: value for key, value in asdict(config).items() if key != "model"}
    result = {"preset": config.preset, "config": shared, "models": [Path(model).name for model in models], **result}
    write(result, out)
    return result


def _train_all(
    left: Mapping[Place, Config], folders: Mapping[Place, Path], jobs: int, stop: StopRequest, *, fresh: bool
) -> Iterator[tuple[Place, BaseException | None]]:
    """Train, `jobs` side by side; each that is complete, or the error of the first that failed.

    After a signal no further run starts, and those in progress save and leave: it is handed on to their processes,
    which Ctrl-C reaches anyway. `fresh` gives every run a process of its own, which gives its GPU memory back.
    """
    queue, waiting, told = iter(left.items()), dict[Future[bool], Place](), False
    spawn, tasks = multiprocessing.get_context("spawn"), 1 if fresh else None
    with ProcessPoolExecutor(jobs, spawn, initializer=_begin_worker, max_tasks_per_child=tasks) as pool:
        while True:
            while len(waiting) < jobs and not stop.received and (following := next(queue, None)):
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a process that starts here begins with them blocked
                waiting[pool.submit(_train, following[1], folders[following[0]])] = following[0]
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            if not waiting:
                return
            if stop.received and not told:
                told = True
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


def _rows(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; a last one that a kill cut off is none."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.is_file() else []


def _is_complete(out: Path, config: Config) -> bool:
    """Whether a run has its result; one of another configuration is an error."""
    if not (out / "config.json").is_file():
        return False
    before, now = json.loads((out / "config.json").read_text(encoding="utf-8")), asdict(config)
    changed = [key for key in now if before.get(key) != now[key] and key not in RESUMABLE]
    if changed:
        raise UsageError(f"{out} was run with another {', '.join(changed)}; choose another --out")
    return any(row.get("checkpoint") == "best" for row in _rows(out / "evaluations.jsonl"))


# -------------------------------------------------------------------------------------------------- what a run gave


def outcomes(run: Path) -> dict[str, Any]:
    """Numbers of a complete run.

    Returns:
        values: in percent of the test problems mean@k and pass@k of the last weights, `best ...` of the best, `start
            ...` before training, `LEVEL ...` by level, `worst tenth mean@k` (the lowest of ten equal groups by success
            before training); in percent of the validation problems `validation ...` (last weights) and `curve ...`
            (average over the run); `mixed groups` [% of prompts], `WSE`, `Neyman` and `lead-lag` (`_proxies`), None
            for a method without;
        curve: rollouts, mean and pass of the validation problems, lists; k; rollouts; seconds.
    """
    evaluations, metrics = _rows(run / "evaluations.jsonl"), _rows(run / "metrics.jsonl")
    test = {row["checkpoint"]: row for row in evaluations if row["split"] == "test"}
    curve = [row for row in evaluations if row["split"] == "validation"]
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
    values["mixed groups"] = 100 * float(np.mean([row["mixed_share"] for row in metrics]))
    clock = [item for row in _rows(run / "timing.jsonl") for item in row.items()]
    return {
        "values": {**values, **_proxies(metrics)},
        "curve": {
            "rollouts": spent,
            **{kind: [100 * row[f"{kind}@{k}"] for row in curve] for kind in ("mean", "pass")},
        },
        "k": k,
        "rollouts": metrics[-1]["rollouts"],
        "seconds": round(sum(x for key, x in clock if key.endswith("_s") and not key.endswith("per_s")), 1),
    }


def _chances(row: dict[str, Any], k: int) -> dict[str, float]:
    """Success of each problem by id: probabilities, or where these are unknown the share of its k samples."""
    return row["success"] if "success" in row else {name: count / k for name, count in row["correct"].items()}


def _proxies(metrics: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Averages over steps of the variance proxies sum_b share_b sigma_b / sqrt(n_b) (WSE, Eq. 33, F8) and sum_b share_b
    sigma_b^2 / n_b (Neyman), sigma_b^2 = error (1 - error) of a bin, and of the lead-lag (Eq. 32)."""
    wse, neyman = [], []
    for row in metrics:
        bins = [(s, e, n) for s, e, n in zip(row["bin_share"], row["bin_error"], row["bin_rollouts"], strict=True) if s]
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
    """Rollouts until pass@k of the validation problems first is at `level`, between evaluations in a line; inf: never.

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


# --------------------------------------------------------------------------------------------- what the runs say of it


def analyse(
    found: Mapping[tuple[str, int], dict[str, Any]], labels: Sequence[str], starts: Mapping[int, int]
) -> dict[str, Any]:
    """Paired statistics of each method against the first.

    Args:
        found: `outcomes` by (label, seed).
        labels: methods, the baseline first.
        starts: the seeds, and which warm start each has.

    Returns:
        methods: by label, per value its mean over seeds and, but for the baseline, `difference`, `low`, `high` (95 %),
            `least` and `most` of a seed, `relative` [% of the baseline's mean], `wins`, `losses`, `p` (sign test) and
            `evidence`; `rollouts to baseline`, the median over seeds of rollouts until the baseline's last validation
            pass@k over the baseline's total, its interval, and in how many seeds it got there; `against`, by label of
            each other method, differences in mean@k and pass@k;
        runs: every run's values.
    """
    seeds, models = list(starts), list(starts.values())
    k = next(iter(found.values()))["k"]
    methods: dict[str, Any] = {}
    for label in labels:
        methods[label] = {}
        for value in found[label, seeds[0]]["values"]:
            here, there = ([found[name, seed]["values"].get(value) for seed in seeds] for name in (label, labels[0]))
            if any(x is None for x in here):
                continue
            entry: dict[str, Any] = {"mean": float(np.mean(here))}
            if label != labels[0] and not any(x is None for x in there):
                entry |= paired(np.array(here) - np.array(there), models)
                if base := float(np.mean(there)):
                    entry["relative"] = 100 * entry["difference"] / base
            methods[label][value] = entry
        goals = [found[labels[0], seed]["curve"]["pass"][-1] for seed in seeds]
        ratios = [
            rollouts_to(found[label, seed]["curve"], goal) / found[labels[0], seed]["rollouts"]
            for seed, goal in zip(seeds, goals, strict=True)
        ]
        methods[label]["rollouts to baseline"] = _median(ratios, models)
        methods[label]["against"] = {
            other: {
                rate: paired(
                    np.array([found[label, s]["values"][rate] - found[other, s]["values"][rate] for s in seeds]), models
                )
                for rate in (f"mean@{k}", f"pass@{k}")
            }
            for other in labels[1:]
            if other != label
        }
        methods[label]["seconds"] = {"mean": float(np.mean([found[label, seed]["seconds"] for seed in seeds]))}
    runs = [
        {"method": label, "seed": seed, "model": starts[seed], **found[label, seed]}
        for label in labels
        for seed in seeds
    ]
    return {"k": k, "seeds": len(seeds), "baseline": labels[0], "methods": methods, "runs": runs}


def paired(differences: Floats, models: Sequence[int]) -> dict[str, Any]:
    """Mean of paired differences, its bootstrap interval and an exact sign test.

    >>> paired(np.array([1.0, 2.0, 1.5, 1.2, 0.8, 2.2, 1.1, 1.4]), [0] * 8)["p"]
    0.0078125
    """
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    means = np.array([differences[rows].mean() for rows in _resamples(tuple(models), RESAMPLES)])
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return {
        "difference": float(differences.mean()),
        "low": float(low),
        "high": float(high),
        "least": float(differences.min()),
        "most": float(differences.max()),
        "wins": wins,
        "losses": losses,
        "p": p,
        "evidence": bool(p <= LEVEL and (low > 0 or high < 0)),
    }


def _median(ratios: Sequence[float], models: Sequence[int]) -> dict[str, Any]:
    """Median of numbers that may be infinite, which JSON calls null, and its interval."""
    x = np.array(ratios)
    medians = np.sort([np.median(x[rows]) for rows in _resamples(tuple(models), RESAMPLES)])
    low, high = (medians[round(q * (len(medians) - 1))] for q in (LEVEL / 2, 1 - LEVEL / 2))
    found = {"median": float(np.median(x)), "low": float(low), "high": float(high)}
    return {
        **{key: value if np.isfinite(value) else None for key, value in found.items()},
        "reached": int(np.isfinite(x).sum()),
    }


@cache
def _resamples(models: tuple[int, ...], number: int) -> list[NDArray[np.int64]]:
    """Rows of bootstrap samples: warm starts with replacement, then of each as many seeds as it has."""
    rng, found = np.random.default_rng(0), []
    groups = [np.flatnonzero(np.array(models) == model) for model in sorted(set(models))]
    for _ in range(number):
        drawn = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
        found.append(np.concatenate([group[rng.integers(len(group), size=len(group))] for group in drawn]))
    return found


# --------------------------------------------------------------------------------------------------------------- files


def write(result: dict[str, Any], out: Path) -> None:
    """comparison.json, .csv (a line a run), .md, .tex and .png."""
    write_file(out / "comparison.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    names = list(dict.fromkeys(name for run in result["runs"] for name in run["values"]))
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["method", "seed", "model", "rollouts", "seconds", *names])
    for run in result["runs"]:
        place = [run["method"], run["seed"], result["models"][run["model"]], run["rollouts"], run["seconds"]]
        table.writerow([*place, *(run["values"].get(name) for name in names)])
    write_file(out / "comparison.csv", buffer.getvalue())
    header, rows = _table(result)
    markdown = [f"| {' | '.join(row)} |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
    write_file(out / "comparison.md", "\n".join([_caption(result), "", *markdown, ""]))
    latex = [
        " & ".join(row).replace("%", r"\%").replace("_", r"\_").replace("×", r"$\times$") for row in (header, *rows)
    ]
    columns = "l" + "r" * (len(header) - 1)
    body = [f"% {_caption(result)}", rf"\begin{{tabular}}{{{columns}}}", r"\hline", *(f"{row} \\\\" for row in latex)]
    write_file(out / "comparison.tex", "\n".join([*body, r"\hline", r"\end{tabular}", ""]))
    with matplotlib.rc_context(STYLE):
        image = io.BytesIO()
        _figure(result).savefig(image, format="png", dpi=160, metadata={"Software": None})
    write_file(out / "comparison.png", image.getvalue())


def _caption(result: dict[str, Any]) -> str:
    starts, total = len(result["models"]), result["runs"][0]["rollouts"]
    return (
        f"{result['preset']}: {result['seeds']} seeds over {starts} warm start{'s' if starts > 1 else ''}, {total:,} "
        f"rollouts a run. Percent of test problems; in brackets the paired difference from {result['baseline']} in "
        "points with its 95 % bootstrap interval, and * where a sign test agrees (p <= .05): else no evidence of one."
    )


def _table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    k = result["k"]
    columns = {f"pass@{k}": "1", f"mean@{k}": "1", f"worst tenth mean@{k}": "1", f"best pass@{k}": "1"}
    columns |= {f"curve pass@{k}": "1", "mixed groups": "1"}
    header = ["method", *columns, "rollouts to baseline's pass [× its total]"]
    rows = []
    for label, values in result["methods"].items():
        cells = [_cell(values[name]) for name in columns]
        ratio = values["rollouts to baseline"]
        shown = [f"{ratio[key]:.2f}" if ratio[key] is not None else "never" for key in ("median", "low", "high")]
        rows.append([label, *cells, f"{shown[0]} [{shown[1]}, {shown[2]}]"])
    return header, rows


def _cell(entry: dict[str, Any]) -> str:
    if "difference" not in entry:
        return f"{entry['mean']:.1f}"
    mark = "*" if entry["evidence"] else ""
    return f"{entry['mean']:.1f} ({entry['difference']:+.1f} [{entry['low']:+.1f}, {entry['high']:+.1f}]{mark})"


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
            axis.plot(np.array(curves[0]["rollouts"]) / 1000, height, linewidth=1.2, label=label, **look)
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


def compare_preset(
    preset: str, methods: str, seeds: int, models: str, out: Path | None, jobs: int, overrides: Mapping[str, Any]
) -> None:
    """The command: fill in what a comparison needs, run it, print what it says."""
    from gdro_llm.config import load_preset

    settings = {**load_preset(preset), **overrides}
    if settings.get("data", "cells") in CELL_SETS:
        settings = {"validation_problems": 500, "eval_exact": True, "eval_every": 10, **settings}
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
