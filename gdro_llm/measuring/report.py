"""The report of one or several training runs: what changed, where along the difficulty axis, and at what cost.

`write_report` turns run directories into one self-contained HTML file and its figures, `summary_table` into text for
the terminal. The first of several runs is the baseline, and results are drawn against cumulative rollouts, so that no
method is credited for having sampled more. The same files always give the same bytes.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gdro_llm.config import UsageError, printable
from gdro_llm.measuring import figures, tables
from gdro_llm.measuring.results import (
    NONE,
    Shown,
    difference,
    finite,
    load,
    part_names,
    part_of,
    rate_of,
    shared_metrics,
    split_of,
    stages_of,
    with_exact,
)
from gdro_llm.measuring.style import RUNS, image

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
ERRORS = """± is one standard error of a single run's evaluation, over its problems and answers, where
        these are sampled. A difference combines the two as if they were independent, which is usually
        too wide, since the problems are
        the same. It is no interval over training seeds: another seed may move a result by more, and only repeated
        runs can say by how much. A rate called exact_ is computed from the model's probabilities, without sampling."""
SECTIONS = {
    "progress": ("Progress", """Faint lines are single batches, strong lines a short running mean, bars one standard
        error. mean@k is the chance that a sampled answer is right, pass@k the chance that at least one of k is. The
        axis counts sampled answers: at equal height, the curve further left is the cheaper one."""),
    "levels": ("By level", """The same evaluation split by how hard the problems are, each panel on its own scale.
        Robust training is meant to lift the hard panels without lowering the easy ones."""),
    "groups": ("Groups that teach", """GRPO learns from the differences among one prompt's answers: a group that is
        all wrong or all correct gives no gradient, so rollouts are well spent on the mixed share only. Groups are those
        of the prompts that were sampled; prompts are all that the controller was offered, by what it believes now."""),
    "bins": ("Along the difficulty axis", """Each column is a step, each row a difficulty bin with the hardest at
        the top; grey is a bin without prompts, or without rollouts. Prompts move down as the model learns. A weight
        above 1 counts a prompt for more than plain GRPO does; rollouts go where the controller expects them to teach,
        at the same mean."""),
    "controllers": ("What the controllers do", """The weighted reward lies below the plain one while the adversary
        finds weak bins. The shadow price is what one rollout more would be worth where it is worth
        most. Lead-lag is the mean bin under the weights minus under the data: below zero, training
leans to harder prompts than it meets. κ compares the part of a prompt's gradient that no other
        prompt learns from with the noise of one rollout: small κ is worth large groups on few prompts."""),
    "health": ("Training health", """Signs of trouble: entropy that collapses to zero, spikes of the gradient norm,
        a KL between sampler and trainer that leaves zero (stale weights), answers cut at the length limit."""),
    "time": ("Time", """Where the seconds of a step go, lightly smoothed; the table has the median step, and what
        the controllers add to it."""),
    "by_level": ("Results by level", "Before is step 0, after the last evaluation; one table a metric."),
    "by_task": ("Results by task", "The same by family of problems; with few problems in each, mind the errors."),
    "samples": ("Sample completions", """The first ones kept of the first and of the last step that kept any, not
        chosen: the prompt in grey, then the answer."""),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- results


def _show(rate: tuple[float, float], sign: str = "") -> str:
    if math.isnan(rate[0]):
        return NONE
    return f"{rate[0]:{sign}.1f}" + ("" if math.isnan(rate[1]) else f" ± {rate[1]:.1f}")


def _result_header(runs: Sequence[Shown], first: str) -> list[str]:
    header = [first, "run", "problems", "before, %", "after, %", "change, pp"]
    return header if len(runs) == 1 else [*header, f"vs {runs[0].label}, pp"]


def _result_rows(runs: Sequence[Shown], metric: str, kind: str, name: str, title: str) -> list[list[str]]:
    """A row a run: before, after, their difference, and the difference to the first run."""
    rows: list[list[str]] = []
    for run in runs:
        parts = [part_of(row, kind, name) for row in (run.before, run.after, runs[0].after)]
        before, after, baseline = (rate_of(part, metric) for part in parts)
        problems = str(parts[1].get("problems", parts[0].get("problems", NONE)))
        gain = [] if len(runs) == 1 else ["" if run is runs[0] else _show(difference(after, baseline), "+")]
        cells = [_show(before), _show(after), _show(difference(after, before), "+"), *gain]
        rows.append(["" if rows else title, run.label, problems, *cells])
    return rows


def _training(run: Shown) -> str:
    """What the run is and how far it went, in words."""
    config, last_row, reward = run.files.config, run.files.metrics[-1], run.series("reward")
    steps, rollouts = last_row["step"], last_row.get("rollouts")
    width = max(1, len(reward) // 10)
    settings = [key for key in ("preset", "controller", "model", "data", "seed") if key in config]
    words = [f"{key} {config[key]}" for key in settings]
    words += [f"{steps:,} steps"] + ([] if rollouts is None else [f"{rollouts:,} rollouts"])
    if np.isfinite(first := reward[:width].mean()) and np.isfinite(last := reward[-width:].mean()):
        ends = f"means of the first and the last {width} steps" if width > 1 else "first and last step"
        words.append(f"training reward {first:.3f} → {last:.3f} ({ends})")
    return f"{run.label}: {', '.join(words)}"


def summary_table(runs: list[Path]) -> str:
    """The final table as aligned text: before and after by level, and the differences to the first run.

    Rates are in percent and differences in percentage points, with one standard error over the problems of the
    evaluation. Raises UsageError, naming the file, where a run directory is missing, empty or malformed.
    """
    loaded = load(runs)
    lines = [printable(_training(run)) for run in loaded]
    rows = []
    for metric in shared_metrics(loaded):
        for kind, name in [("", "all"), *(("by_level", level) for level in part_names(loaded, "by_level"))]:
            rows += _result_rows(loaded, metric, kind, name, f"{metric} {name}")
    if not rows:
        return "\n".join([*lines, "no evaluation yet"])
    table = [list(map(printable, row)) for row in (_result_header(loaded, split_of(loaded)), *rows)]
    return "\n".join([*lines, tables.aligned(table, "<<" + ">" * (len(table[0]) - 2))])


# ------------------------------------------------------------------------------------------------------------- page


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


def _time_table(runs: Sequence[Shown]) -> str:
    """The median step: seconds by stage, and what the controllers add to it."""
    stages = stages_of(runs)
    if not stages:
        return ""
    columns = {key: (f"{key[:-2]}, s", 1, ".3f") for key in stages}
    columns |= {"controller_s": ("controllers, ms", 1000, ".2f"), "tokens_per_s": ("tokens / s", 1, ",.0f")}
    rows = []
    for run in runs:
        if run.files.timing:
            values = {key: finite(run.timed(key)) for key in columns}
            medians = {key: np.median(column) for key, column in values.items() if column.size}
            cells = {key: f"{medians[key] * columns[key][1]:{columns[key][2]}}" for key in medians}
            rows.append([run.label, *(cells.get(key, NONE) for key in columns)])
    return _table(["run", *(title for title, _, _ in columns.values())], rows, 1)


def _headline(runs: Sequence[Shown], metrics: Sequence[str]) -> str:
    """What happened, in sentences."""
    sentences = []
    for metric in metrics:
        for run in runs[1:] or runs:
            reached, before, baseline = (rate_of(row, metric) for row in (run.after, run.before, runs[0].after))
            change, (gain, error) = difference(reached, before), difference(reached, baseline)
            if len(runs) == 1 and not math.isnan(change[0]):
                span = f"from {before[0]:.1f} % to {reached[0]:.1f} %"
                sentences.append(f"{metric} went {span} ({_show(change, '+')} percentage points).")
            if len(runs) > 1 and not math.isnan(gain):
                side = f"{'above' if gain >= 0 else 'below'} {runs[0].label}"
                size = f" ({abs(gain) / error:.1f} standard errors)" if error > 0 else ""
                sentences.append(f"In {metric}, {run.label} ends {_show((abs(gain), error))} points {side}{size}.")
    return " ".join(sentences) or "No results to compare after training yet; the training reward is below."


def _notes(runs: Sequence[Shown]) -> list[str]:
    """What the reader should know before trusting the figures."""
    notes = [f"{run.label} has no evaluation after training yet." for run in runs if not run.after]
    for run in runs:
        for key in ["reward", *figures.HEALTH]:
            broken = sum(isinstance(row.get(key), float) and not math.isfinite(row[key]) for row in run.files.metrics)
            if broken:
                notes.append(f"{run.label}: {key} is not finite in {broken} of {len(run.files.metrics)} steps.")
    keys = dict.fromkeys(key for run in runs for key in run.files.config)
    baseline = runs[0].files.config
    differing = [key for key in keys if any(run.files.config.get(key) != baseline.get(key) for run in runs)]
    if differing:
        notes.append(f"The settings of the runs differ in {', '.join(differing)}: any of these may cause a difference.")
    ends = {run.label: run.after["rollouts"] for run in runs if "rollouts" in run.after}
    if ends and max(ends.values()) > 1.01 * min(ends.values()):
        spent = ", ".join(f"{label} {rollouts:,}" for label, rollouts in ends.items())
        notes.append(f"The last evaluations are not at equal rollouts ({spent}): compare the curves, not the ends.")
    return notes


def _config_table(runs: Sequence[Shown]) -> str:
    configs = [run.files.config for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [[key, *(json.dumps(config[key]) if key in config else NONE for config in configs)] for key in keys]
    return _table(["setting", *(run.label for run in runs)], rows, len(runs) + 1, differs=True)


def _samples(run: Shown, count: int = 3, length: int = 1500) -> str:
    """A few completions of the first and of the last step that kept any."""
    steps = sorted({row["step"] for row in run.files.samples})
    blocks = [f"<h3>{html.escape(run.label)}</h3>"]
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
        for row in [row for row in run.files.samples if row["step"] == step][:count]:
            prompt, completion = (str(row.get(key, "")) for key in ("prompt", "completion"))
            cut = f" … ({len(completion) - length:,} more characters)" if len(completion) > length else ""
            meta = f"step {step} · {row.get('id', '')} · reward {row.get('reward', NONE)}"
            meta, prompt, completion = map(html.escape, (meta, prompt, completion[:length] + cut))
            blocks.append(f'<div class="sample"><p class="meta">{meta}</p><pre class="prompt">{prompt}</pre>')
            blocks.append(f"<pre>{completion}</pre></div>")
    return "".join(blocks) if steps else ""


def _page(runs: Sequence[Shown], files: dict[str, bytes]) -> str:
    """The body of the page; the figures it shows go into `files`."""
    curves = shared_metrics(runs)
    metrics = with_exact(runs, curves)
    rows = [row for run in runs for row in [*run.files.metrics, *run.evaluations]]
    x = "rollouts" if all("rollouts" in row for row in rows) else "step"

    def shown(name: str, alt: str, figure: Figure | None) -> str:
        if figure is None:
            return ""
        files[f"{name}.png"] = image(figure)
        data = base64.b64encode(files[f"{name}.png"]).decode()
        return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'

    def results(kind: str, metrics: Sequence[str]) -> str:
        names = part_names(runs, kind)
        rows = {m: [row for name in names for row in _result_rows(runs, m, kind, name, name)] for m in metrics}
        return "".join(_table(_result_header(runs, m), rows[m], 2) for m in metrics if names)

    maps = [
        shown(f"bins-{i}", f"Difficulty bins of {run.label}", figures.maps(run, runs)) for i, run in enumerate(runs, 1)
    ]
    names = [f"<h3>{html.escape(run.label)}</h3>" if len(runs) > 1 else "" for run in runs]
    bodies = {
        "progress": shown("progress", "Training reward and evaluation", figures.progress(runs, curves, x)),
        "levels": shown("levels", "Evaluation by level", figures.levels(runs, curves, x)),
        "groups": shown("groups", "Shares of groups", figures.overlay(runs, figures.GROUPS, x, 3)),
        "bins": "".join(name + figure for name, figure in zip(names, maps, strict=True) if figure),
        "controllers": shown(
            "controllers", "State of the controllers", figures.overlay(runs, figures.STEERING, "step", 2)
        ),
        "health": shown("health", "Training health", figures.overlay(runs, figures.HEALTH, "step", 4)),
        "time": shown("time", "Seconds a step by stage", figures.time(runs)) + _time_table(runs),
        "by_level": results("by_level", metrics),
        "by_task": results("by_task", curves),
        "samples": "".join(map(_samples, runs)),
    }
    title = " against ".join(run.label for run in reversed(runs))
    overview = [row for metric in metrics for row in _result_rows(runs, metric, "", "", metric)]
    notes = [f"<li>{html.escape(note)}</li>" for note in _notes(runs)]
    head = [
        f'<p class="meta">Training report</p><h1>{html.escape(title)}</h1>',
        f'<p class="lead">{html.escape(_headline(runs, curves))}</p>',
        f'<ul class="notes">{"".join(notes)}</ul>' if notes else "",
        _table(_result_header(runs, split_of(runs)), overview, 2) + f'<p class="small">{ERRORS}</p>'
        if overview
        else "",
        *(f'<p class="meta">{html.escape(_training(run))}</p>' for run in runs),
        f"<details><summary>Configuration</summary>{_config_table(runs)}</details>",
    ]
    sections = [f"<h2>{SECTIONS[key][0]}</h2><p>{SECTIONS[key][1]}</p>{body}" for key, body in bodies.items() if body]
    return "\n".join([*head, *sections])


def write_report(runs: list[Path], out: Path) -> Path:
    """Write `report.html`, one self-contained file, and its figures into `out`; return the path of the page.

    `runs` are run directories, the first the baseline. Whatever but metrics.jsonl may be absent: the report shows what
    is present. Raises UsageError, naming the file and the remedy, where a run is missing, empty or malformed, or the
    report cannot be written.
    """
    loaded = load(runs)
    files: dict[str, bytes] = {}
    with matplotlib.rc_context(RUNS):
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
