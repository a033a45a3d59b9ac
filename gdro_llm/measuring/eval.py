"""`gdro eval`: any model on any sets, with the settings of its run; leaves evaluation.json, .md and .png."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gdro_llm.config import EVALUATION_KEYS, OPTIONS, Config, UsageError, load_preset, printable
from gdro_llm.engine.policy import load_policy
from gdro_llm.engine.sampler import make_sampler
from gdro_llm.measuring import tables
from gdro_llm.measuring.run_directory import RunDirectory, read_object
from gdro_llm.measuring.style import RUNS, image
from gdro_llm.problems.load import CELL_SETS, load_problems, read_set
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.prompting import BASE_TEMPLATE, CHAT_TEMPLATE, with_prompt_limit
from gdro_llm.problems.rewards import Grader
from gdro_llm.training.checkpoint import find_checkpoint, write_file
from gdro_llm.training.evaluation import Scores, by_own_pass_rate, rates_of, score, tabulate
from gdro_llm.training.update import out_of_memory_advice

PRESET_OF = {
    **dict.fromkeys(CELL_SETS, "quickstart"),
    "ladder": "smollm2-arith",
}  # embedded data: the settings of their preset
BENCHMARK = {"grader": "math", "prompt_style": "chat", "max_new_tokens": 4096, "eval_samples": 16}
TEMPLATES = {"chat": CHAT_TEMPLATE, "plain": BASE_TEMPLATE}
NOTES = """\
In percent, with 95 % intervals over problems (BCa bootstrap; none where all problems have the same value). mean@n: an
answer is right; pass@k: at least one of k is, estimated without bias from n. cut: answers stopped by the length limit.
"""
HALVES = """\
By pass rate: the first half of a problem's answers chooses its bin, the numbers are those of the other half. With the
same answers for both, lucky problems would pass for easy ones and unlucky ones for hard ones.
"""


def evaluate_model(model: str, data: str, out: Path | None, **overrides: object) -> None:
    """Evaluate, write the three files into `out`, print the table; see `gdro eval --help`."""
    names = [name.strip() for name in data.split(",")]
    labels = [Path(name).stem if Path(name).suffix else name for name in names]
    if not all(labels) or len(set(labels)) < len(labels):
        raise UsageError(f"--data must name sets, separated by commas, no name twice, got {data!r}")
    config, checkpoint = _settings(model, names, overrides)
    out = out or Path("runs") / f"eval-{Path(model).resolve().name}"
    head: dict[str, Any] = {
        "model": model,
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "data": names,
        "config": {key: asdict(config)[key] for key in EVALUATION_KEYS},
    }
    _refuse_another(out, head)
    problems = [_held_out(name, config) for name in names]
    policy = load_policy(config, checkpoint)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {out} ({error.strerror}); choose another --out") from error
    if not os.access(out, os.W_OK):  # now, not after hours of sampling
        raise UsageError(f"cannot write into {out}; choose another --out")

    every = [problem for part in problems for problem in part]
    sampling = with_prompt_limit(policy.tokenizer, every, config)
    with Grader(config) as grader, out_of_memory_advice(config), closing(make_sampler(policy, sampling)) as sampler:
        grader.check_gold(every)
        scores = {
            label: score(policy, part, config, sampler, grader, name=label)
            for label, part in zip(labels, problems, strict=True)
        }
    benchmarks = {}
    for label, of_set in scores.items():
        benchmarks[label] = tabulate(of_set)
        if not benchmarks[label]["by_level"]:
            benchmarks[label]["by_bin"] = by_own_pass_rate(of_set)
    result = {**head, **rates_of(_together(list(scores.values()))), "benchmarks": benchmarks}
    text = _markdown(result)
    write_file(out / "evaluation.json", json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_file(out / "evaluation.md", text)
    write_file(out / "evaluation.png", _figure(benchmarks))
    print(f"{text}\nevaluation: {out / 'evaluation.json'}, .md, .png")


def _settings(model: str, names: Sequence[str], overrides: dict[str, Any]) -> tuple[Config, Path | None]:
    """Configuration and checkpoint: those of a run directory; else what suits the data, for the model as it is."""
    of_run = RunDirectory(Path(model)).config
    if {"controller", "mean_rollouts"} <= of_run.keys():
        if unknown := of_run.keys() - OPTIONS.keys():
            path = Path(model) / "config.json"
            raise UsageError(f"{path} has the unknown key {min(unknown)!r}: a run of another version of gdro")
        trained = Config(**of_run)
        checkpoint = find_checkpoint(Path(model), trained, resume=True, fresh=False)
        if checkpoint is None:
            raise UsageError(
                f"{model} holds no checkpoint; a run of gdro train has its first after step {trained.save_every}, and "
                "gdro compare keeps none"
            )
        return replace(trained, **overrides), checkpoint
    kinds = {PRESET_OF.get(name, "") for name in names}
    if len(kinds) > 1:
        raise UsageError(f"--data {','.join(names)}: embedded data has settings of its own; evaluate it by itself")
    kind = kinds.pop()
    style = overrides.get("prompt_style", BENCHMARK["prompt_style"])
    settings = load_preset(kind) if kind else {**BENCHMARK, "template": TEMPLATES[style]}
    return Config(**{**settings, "model": model, "trainable_layers": 0, **overrides}), None


def _held_out(name: str, config: Config) -> list[Problem]:
    """The test problems of one set, at most `test_problems` of them."""
    if name in PRESET_OF:
        return load_problems(replace(config, data=name, batch_size=1, minibatches=1))[1]
    problems = read_set(name, "test")
    if len(problems) <= config.test_problems:
        return problems
    chosen = np.random.default_rng(0).choice(len(problems), config.test_problems, replace=False)
    return [problems[i] for i in sorted(chosen)]


def _refuse_another(out: Path, head: dict[str, Any]) -> None:
    """The same evaluation gives the same files again; another one must not replace them."""
    path = out / "evaluation.json"
    if not path.is_file():
        return
    before, now = ({**side, **side.get("config", {})} for side in (read_object(path), head))
    changed = [f"{key} {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]
    changed = [text for text in changed if not text.startswith("config ")]
    if changed:
        raise UsageError(f"{out} holds another evaluation ({', '.join(changed)}); choose another --out")


def _together(parts: Sequence[Scores]) -> Scores:
    """The problems of all sets; exact rates only where all have them."""
    exact = [part.exact_P for part in parts if part.exact_P is not None]
    return Scores(
        tuple(problem for part in parts for problem in part.problems),
        np.concatenate([part.correct_P_N for part in parts]),
        np.concatenate([part.length_P_N for part in parts]),
        np.concatenate([part.truncated_P_N for part in parts]),
        np.concatenate(exact) if len(exact) == len(parts) else None,
    )


# ------------------------------------------------------------------------------------------------------ presentation


def _markdown(result: dict[str, Any]) -> str:
    """The tables, readable in a terminal too, and the settings."""
    benchmarks = result["benchmarks"]
    rows = dict(benchmarks)
    if len(benchmarks) > 1:
        rows["all problems"] = result
    where = "" if result["checkpoint"] is None else f", {result['checkpoint']}"
    blocks = [f"# {_safe(result['model'])}{where}\n", _table("benchmark", rows), NOTES]
    for label, part in benchmarks.items():
        if parts := _parts(part):
            blocks += [f"## {_safe(label)}\n", _table("level" if part["by_level"] else "pass rate", parts)]
    if any("by_bin" in part for part in benchmarks.values()):
        blocks.append(HALVES)
    settings = ", ".join(f"{key} {value!r}" for key, value in result["config"].items() if key != "model")
    return "\n".join([*blocks, f"Settings: {settings}.\n"])


def _parts(part: dict[str, Any]) -> dict[str, Any]:
    return part["by_level"] or part["by_bin"]


def _rates(part: dict[str, Any], kind: str) -> dict[str, str]:
    """k as text, and the name of the rate."""
    names = [name for name in part if name.startswith(f"{kind}@") and name[5:].isdigit()]
    return {name[5:]: name for name in names}


def _table(first: str, rows: dict[str, Any]) -> str:
    """One row a part: mean@n, pass@k for k > 1 (pass@1 is mean@n), the share of answers cut off."""
    some = next(iter(rows.values()))
    names = [*_rates(some, "mean").values(), *(name for k, name in _rates(some, "pass").items() if k != "1")]
    lines = [[first, "problems", *names, "tokens", "cut"]]
    for label, part in rows.items():
        rates = [_show(part, name) for name in names]
        tokens, cut = f"{part['completion_length']:,.1f}", f"{100 * part['truncated_share']:.1f}"
        lines.append([_safe(label), f"{part['problems']:,}", *rates, tokens, cut])
    return tables.aligned_markdown(lines, "<" + ">" * (len(lines[0]) - 1)) + "\n"


def _show(part: dict[str, Any], name: str) -> str:
    rate, low, high = part[name], part[f"{name}_low"], part[f"{name}_high"]
    return f"{100 * rate:.1f}" if low is None else tables.with_interval(100 * rate, 100 * low, 100 * high, ".1f")


def _safe(text: str) -> str:
    """Names come from data files: no control character reaches the terminal, no bar splits a table."""
    return printable(text).replace("|", "\\|")


def _figure(benchmarks: dict[str, Any]) -> bytes:
    """pass@k against k, a panel a benchmark: all its problems in black, its levels or bins in colour."""
    columns = min(3, len(benchmarks))
    lines = -(-len(benchmarks) // columns)
    with matplotlib.rc_context(RUNS):
        figure = Figure(figsize=(max(4.8, 3.4 * columns), 3.2 * lines), layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
        for axis, (label, whole) in zip(axes, benchmarks.items(), strict=False):
            parts = _parts(whole)
            parts = parts if len(parts) > 1 else {}  # one part is all
            colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(parts)))
            for (name, part), colour in zip(parts.items(), colours, strict=True):
                _draw_curve(axis, part, _safe(name), color=tuple(colour), linewidth=1.2, marker=".")
            _draw_curve(axis, whole, "all", color="black", linewidth=2.0, marker="o", markersize=4)
            ks = [int(k) for k in _rates(whole, "pass")]
            axis.set_xscale("log", base=2)
            axis.set_xticks(ks, [str(k) for k in ks])
            axis.set_title(f"{_safe(label)}: {whole['problems']:,} problems")
            axis.set(xlabel="answers to a problem, k", ylim=(-2, 102))
            title = "" if not parts else "level" if whole["by_level"] else "pass rate (half of the answers)"
            place = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.2), "ncols": 3}
            axis.legend(fontsize=7, title=title, title_fontsize=7, alignment="left", **place)
        for axis in axes[len(benchmarks) :]:
            axis.remove()
        for axis in axes[::columns]:
            axis.set_ylabel("pass@k, %")
        return image(figure)


def _draw_curve(axis: Axes, part: dict[str, Any], name: str, **look: Any) -> None:
    """A curve with its intervals as a band."""
    rates = _rates(part, "pass")
    ks = [int(k) for k in rates]
    axis.plot(ks, [100 * part[rate] for rate in rates.values()], label=name, **look)
    ends = [[part[f"{rate}_{end}"] for rate in rates.values()] for end in ("low", "high")]
    low, high = 100 * np.array(ends, dtype=np.float64)  # NaN where there is none: a gap in the band
    axis.fill_between(ks, low, high, color=look["color"], alpha=0.15, linewidth=0)
