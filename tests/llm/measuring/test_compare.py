"""`gdro compare`: statistics against slow references and under a null, a real comparison against its runs' files."""

import contextlib
import csv
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import literal
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_llm.cli import main
from gdro_llm.config import CONTROLLERS, Config, UsageError
from gdro_llm.intervals import nested_rows, paired_difference
from gdro_llm.measuring import compare, comparison
from gdro_llm.measuring.compare import METHODS, Method
from gdro_llm.measuring.comparison import analyse, outcomes, rollouts_to
from gdro_llm.measuring.run_directory import RunDirectory

paired = partial(paired_difference, resamples=500)

quick = settings(max_examples=30, deadline=None)
gains = st.floats(0.1, 10.0)
differences = st.lists(st.floats(-10.0, 10.0).map(lambda x: round(x, 3)), min_size=2, max_size=8)


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Enough for what is asserted, and fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "RESAMPLES", 500)
        yield


# ----------------------------------------------------------------------------------------------------------- methods


def test_a_method_is_a_name_and_settings():
    """Each of its own type; the label is the text as it was given."""
    text = "dapo+learning_rate=1e-3+minibatches=2+scale_rewards=false+loss=gspo+reward_noise=0.1"
    method = Method.parse(text)
    assert method.label == text
    assert method.settings == {
        "controller": "grpo",
        "refill": True,
        "learning_rate": 0.001,
        "minibatches": 2,
        "scale_rewards": False,
        "loss": "gspo",
        "reward_noise": 0.1,
    }
    assert [type(method.settings[key]) for key in ("learning_rate", "minibatches", "scale_rewards", "loss")] == [
        float,
        int,
        bool,
        str,
    ]
    assert "learning_rate" not in METHODS["dapo"], "parsing changes no method"


def test_every_method_is_a_valid_configuration_and_every_controller_a_method():
    """By its own name, too."""
    assert set(CONTROLLERS) < set(METHODS)
    for name in METHODS:
        assert Config(**Method.parse(name).settings).controller in CONTROLLERS
    for name in CONTROLLERS:
        assert METHODS[name].items() >= {"controller": name}.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppo", "no method 'ppo': choose among prompt, rollout, .*recommended, joint, "),
        ("", "no method ''"),
        ("grpo+", "'' must be SETTING=VALUE"),
        ("grpo+learning_rate", "'learning_rate' must be SETTING=VALUE; `gdro train --help` lists them"),
        ("grpo+learning_rat=1", "'learning_rat=1' must be"),
        ("grpo+preset=x", "'preset=x' must be"),
        ("grpo+seed=1", "seed must be the same for all methods"),
        ("grpo+model=x", "model must be the same for all methods"),
        ("grpo+data=../x.jsonl", "data must be the same"),
        ("grpo+test_problems=5", "test_problems must be the same"),
        ("grpo+eval_samples=4", "eval_samples must be the same"),
        ("grpo+validation_problems=4", "validation_problems must be the same"),
        ("grpo+max_new_tokens=4", "max_new_tokens must be the same"),
        ("grpo+minibatches=2.0", "'2.0' does not fit minibatches"),
        ("grpo+minibatches=", "'' does not fit minibatches"),
        ("grpo+learning_rate=fast", "'fast' does not fit learning_rate"),
        ("grpo+refill=yes", "'yes' does not fit refill"),
        ("grpo+refill=True", "'True' does not fit refill"),
    ],
)
def test_a_wrong_method_is_named(text, message):
    """Unknown names, settings without a value or of another type, and what all methods must share."""
    with pytest.raises(UsageError, match=message):
        Method.parse(text)


# -------------------------------------------------------------------------------------------------------- statistics


def all_resamples(models: list[int]):
    """Every bootstrap sample that can be drawn, with its probability."""
    groups = [[i for i, model in enumerate(models) if model == one] for one in sorted(set(models))]
    for drawn in itertools.product(groups, repeat=len(groups)):
        inner = [[list(x) for x in itertools.product(group, repeat=len(group))] for group in drawn]
        chance = len(groups) ** -len(groups) / math.prod(map(len, inner))
        for rows in itertools.product(*inner):
            yield chance, [row for part in rows for row in part]


@pytest.mark.parametrize("models", [[0, 0, 0], [0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 0, 1, 0], [0, 0, 0, 1]])
def test_resamples_have_the_law_of_warm_starts_then_seeds(models):
    """The distribution of their means and medians, against all that there are (Kolmogorov's distance, level 1e-4)."""
    values = [0.3, -1.1, 2.7, 5.9, -0.2]
    drawn = [[values[row] for row in rows] for rows in nested_rows(tuple(models), 4000)]
    for statistic in (statistics.fmean, statistics.median):
        chances: dict[float, float] = {}
        for chance, rows in all_resamples(models):
            value = round(statistic([values[row] for row in rows]), 9)
            chances[value] = chances.get(value, 0.0) + chance
        assert sum(chances.values()) == pytest.approx(1.0)
        points = sorted(chances)
        expected = np.cumsum([chances[point] for point in points])
        observed = np.searchsorted(np.sort([statistic(x) for x in drawn]), np.array(points) + 1e-9) / len(drawn)
        assert np.max(np.abs(observed - expected)) < 2.23 / np.sqrt(4000)


@quick
@given(differences, st.integers(1, 4))
def test_paired_by_hand(values, starts):
    """Quantiles of the resamples' means, wins and losses, and the sign test by counting outcomes of a coin."""
    models = [i % starts for i in range(len(values))]
    result = paired(np.array(values), models)
    means = sorted(sum(values[i] for i in rows) / len(rows) for rows in nested_rows(tuple(models), 500))
    for key, level in (("low", 0.025), ("high", 0.975)):
        place = level * (len(means) - 1)
        below = int(place)
        by_hand = means[below] + (place - below) * (means[below + 1] - means[below])
        assert result[key] == pytest.approx(by_hand, abs=1e-9)
    assert result["difference"] == pytest.approx(sum(values) / len(values), abs=1e-9)
    wins, losses = sum(x > 0 for x in values), sum(x < 0 for x in values)
    assert (result["wins"], result["losses"]) == (wins, losses)
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n
    assert result["p"] == pytest.approx(min(1.0, 2 * tail))
    assert result["evidence"] == (result["p"] <= 0.05 and (result["low"] > 0 or result["high"] < 0))


@quick
@given(differences, st.integers(1, 4))
def test_the_sign_of_all_differences_turns_everything_round(values, starts):
    """And the interval holds the mean where warm starts have as many seeds each."""
    models = [i % starts for i in range(len(values))]
    one, other = paired(np.array(values), models), paired(-np.array(values), models)
    assert other["difference"] == -one["difference"]
    assert (other["low"], other["high"]) == pytest.approx((-one["high"], -one["low"]), abs=1e-9)
    assert (other["wins"], other["losses"], other["p"]) == (one["losses"], one["wins"], one["p"])
    assert other["evidence"] == one["evidence"]
    if len(values) % starts == 0:
        assert one["low"] - 1e-9 <= one["difference"] <= one["high"] + 1e-9


@quick
@given(gains, st.integers(2, 9))
def test_equal_differences_have_no_width(gain, seeds):
    """Whatever the warm starts; and no difference at all is no evidence of one."""
    result = paired(np.full(seeds, gain), [i % 2 for i in range(seeds)])
    assert [result[key] for key in ("low", "difference", "high")] == pytest.approx([gain] * 3)
    assert result["evidence"] == (seeds >= 6)
    none = paired(np.zeros(seeds), [0] * seeds)
    assert none == {
        "difference": 0,
        "low": 0,
        "high": 0,
        "least": 0,
        "most": 0,
        "wins": 0,
        "losses": 0,
        "p": 1.0,
        "evidence": False,
    }


@quick
@given(st.lists(gains, min_size=5, max_size=5), st.lists(gains, min_size=8, max_size=8), st.booleans())
def test_five_seeds_are_never_evidence_and_eight_of_eight_always(five, eight, worse):
    """An exact sign test of five cannot reach .05; p of eight is 1/128."""
    sign = -1 if worse else 1
    assert not paired(sign * np.array(five), [0] * 5)["evidence"]
    result = paired(sign * np.array(eight), [0, 1, 2, 3] * 2)
    assert result["evidence"]
    assert result["p"] == 2 / 2**8
    assert not paired(sign * np.array([*eight[:7], -eight[7] / 100]), [0] * 8)["evidence"], "seven of eight: p = .07"


@pytest.mark.parametrize(
    ("spread", "most"), [(0.0, 0.02), (1.0, 0.05), (100.0, 0.19)], ids=["none", "as-seeds", "warm-starts-alone"]
)
def test_under_the_null_evidence_is_rare(spread, most):
    """4 warm starts x 2 seeds: in at most 5 % of comparisons while warm starts differ no more than seeds; where they
    alone differ, in 1/8, when all four fall on one side. The interval alone would err at least twice as often."""
    rng = np.random.default_rng(0)
    models = [0, 1, 2, 3] * 2
    results = [
        paired_difference(spread * rng.normal(size=4)[models] + rng.normal(size=8), models, resamples=200)
        for _ in range(400)
    ]
    evidence = np.mean([x["evidence"] for x in results])
    alone = np.mean([x["low"] > 0 or x["high"] < 0 for x in results])
    assert evidence <= most
    assert alone > 2 * evidence or spread > 1
    assert alone > 0.05, "else the sign test would not be needed"


def test_a_real_difference_is_found():
    """Two standard deviations of a seed's noise: nearly always with eight seeds."""
    rng = np.random.default_rng(0)
    results = [paired(2 + rng.normal(size=8), [0, 1, 2, 3] * 2) for _ in range(50)]
    assert np.mean([x["evidence"] for x in results]) > 0.75


@quick
@given(st.lists(st.one_of(st.integers(1, 9).map(float), st.just(math.inf)), min_size=2, max_size=8))
def test_medians_may_be_never(ratios):
    """Quantiles of the resamples' medians; JSON has no infinity, so that never is null."""
    models = [i % 2 for i in range(len(ratios))]
    result = comparison._median(ratios, models)
    medians = sorted(statistics.median(ratios[i] for i in rows) for rows in nested_rows(tuple(models), 500))
    by_hand = {
        "median": statistics.median(ratios),
        "low": medians[round(0.025 * 499)],
        "high": medians[round(0.975 * 499)],
    }
    for key, value in by_hand.items():
        assert result[key] == (None if math.isinf(value) else value)
    assert result["reached"] == sum(x < math.inf for x in ratios)
    json.dumps(result, allow_nan=False)


@quick
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 20), st.integers(1, 50))
def test_rollouts_to_a_level(heights, level, every):
    """The first of many points along the curve at which it is as high; never, if it is at none."""
    spent = [every * i for i in range(len(heights))]
    reached = rollouts_to({"rollouts": spent, "pass": [float(h) for h in heights]}, level)
    steps = 840 * (len(heights) - 1) + 1
    grid = np.linspace(0, spent[-1], steps)
    high = np.flatnonzero(np.interp(grid, spent, heights) >= level - 1e-9)
    if not high.size:
        assert reached == math.inf
        return
    spacing = every / 840
    assert reached == pytest.approx(grid[high[0]], abs=spacing + 1e-9)
    assert np.interp(reached, spent, heights) >= level - 1e-9


# ------------------------------------------------------------------------------------------------ from a run's files


def write_run(folder: Path, *, exact: bool, rng: np.random.Generator) -> dict:
    """Files of a made-up run; what they are made of."""
    folder.mkdir()
    tests = {when: rng.random(23).round(3) if exact else rng.integers(1, 5, 23) for when in ("start", "last", "best")}
    rows = [
        {"step": s, "rollouts": 10 * s, "split": "validation", "mean@4": 0.1 + s / 10, "pass@4": 0.5 + s**2 / 100}
        for s in (0, 2, 3)
    ]
    for when, numbers in tests.items():
        named = {f"p{i:02d}": x for i, x in enumerate(numbers.tolist())}
        part = {"mean@4": float(np.mean(numbers)) / (1 if exact else 4), "pass@4": 0.9, "pass@1": 0.2}
        rows.append(
            {
                **{"step": 3, "rollouts": 30, "split": "test", "checkpoint": when, "by_level": {"easy": part}},
                **{**part, "success" if exact else "correct": named},
            }
        )
    metrics = [
        {
            **{"step": 1, "rollouts": 10, "mixed_share": 0.5, "bin_share": [0, 0], "bin_error": [None] * 2},
            **{"bin_rollouts": [None] * 2},
        },
        {
            **{"step": 2, "rollouts": 20, "mixed_share": 0.25, "bin_share": [0.5, 0.25], "bin_error": [0.2, 0.5]},
            **{"bin_rollouts": [4.0, 8.0], "lead_lag": -0.5},
        },
        {
            **{"step": 3, "rollouts": 30, "mixed_share": 0.75, "bin_share": [0.0, 1.0], "bin_error": [None, 0.9]},
            **{"bin_rollouts": [None, 2.0], "lead_lag": -0.25},
        },
    ]
    timing = [{"step": 1, "sample_s": 1.5, "update_s": 0.25, "tokens_per_s": 99.0}, {"step": 2, "sample_s": 1.0}]
    for name, lines in (("evaluations", rows), ("metrics", metrics), ("timing", timing)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return tests


@pytest.mark.parametrize("exact", [True, False])
def test_numbers_of_a_run_by_hand(tmp_path, exact):
    """In percent of the problems, also where success is known from samples only."""
    tests = write_run(tmp_path / "run", exact=exact, rng=np.random.default_rng(0))
    result = outcomes(RunDirectory(tmp_path / "run"))
    values, scale = result["values"], 100 if exact else 25
    for when, prefix in (("start", "start "), ("best", "best "), ("last", ""), ("last", "easy ")):
        assert values[f"{prefix}mean@4"] == pytest.approx(scale * tests[when].mean())
        assert values[f"{prefix}pass@4"] == pytest.approx(90)
    order = sorted(range(23), key=lambda i: (tests["start"][i], i))
    tenths = [order[0:3], order[3:6], order[6:9], *(order[9 + 2 * i : 11 + 2 * i] for i in range(7))]
    assert sorted(i for tenth in tenths for i in tenth) == list(range(23))
    worst = min(np.mean([tests["last"][i] for i in tenth]) for tenth in tenths)
    assert values["worst tenth mean@4"] == pytest.approx(scale * worst)
    assert values["validation mean@4"] == pytest.approx(40)
    assert values["validation pass@4"] == pytest.approx(59)
    assert values["curve mean@4"] == pytest.approx(100 * (0.2 * 20 + 0.35 * 10) / 30)
    assert values["mixed groups"] == pytest.approx(50)
    wse = [0.5 * math.sqrt(0.2 * 0.8 / 4) + 0.25 * math.sqrt(0.25 / 8), math.sqrt(0.9 * 0.1 / 2)]
    neyman = [0.5 * 0.2 * 0.8 / 4 + 0.25 * 0.25 / 8, 0.9 * 0.1 / 2]
    assert [values["WSE"], values["Neyman"], values["lead-lag"]] == pytest.approx(
        [sum(wse) / 2, sum(neyman) / 2, -0.375]
    )
    assert result["curve"]["rollouts"] == [0, 20, 30]
    assert result["curve"]["pass"] == pytest.approx([50, 54, 59])
    assert (result["k"], result["rollouts"], result["seconds"]) == (4, 30, 2.8)


def test_a_value_that_a_method_has_not_is_left_out():
    """lead-lag of grpo is none: the others' is shown without a difference; and shares of a baseline of 0 are not."""

    def run(passed, lead):
        curve = {"rollouts": [0, 10], "pass": [0.0, passed], "mean": [0.0, passed]}
        values = {"mean@2": passed, "pass@2": passed, "zero": 0.0, "lead-lag": lead}
        return {"values": values, "curve": curve, "k": 2, "rollouts": 10, "seconds": 1.0}

    runs = {("a", s): run(10.0 + s, None) for s in (0, 1)} | {("b", s): run(20.0 + s, -1.0) for s in (0, 1)}
    result = analyse(runs, ["a", "b"], {0: 0, 1: 0})
    assert "lead-lag" not in result["methods"]["a"]
    assert result["methods"]["b"]["lead-lag"] == {"mean": -1.0}
    assert result["methods"]["b"]["pass@2"]["relative"] == pytest.approx(100 * 10 / 10.5)
    assert "relative" not in result["methods"]["b"]["zero"]
    assert result["methods"]["b"]["rollouts to baseline"]["median"] == pytest.approx((10 / 20 + 11 / 21) / 2)
    assert result["methods"]["a"]["rollouts to baseline"]["median"] == 1.0


def test_tokens_of_runs_that_did_not_count_them_are_unknown():
    """Runs of an earlier version stay readable: a dash for their tokens; other methods have theirs."""
    rows = [{"rollouts": 10, "rollout_tokens": 30.0}, {"rollouts": 30, "rollout_tokens": 20.0}]
    assert comparison._tokens(rows) == 10 * 30 + 20 * 20
    assert comparison._tokens([rows[0], {"rollouts": 30}]) is None
    curve = {"rollouts": [0, 10], "pass": [0.0, 1.0], "mean": [0.0, 1.0]}
    names = ("mean@2", "pass@2", "worst tenth mean@2", "best pass@2", "curve pass@2", "mixed groups")
    run = {"values": dict.fromkeys(names, 1.0), "curve": curve, "k": 2, "rollouts": 10, "seconds": 1.0}
    runs = {("old", s): run for s in (0, 1)} | {("new", s): run | {"tokens": 1000 + s, "rollouts": 12} for s in (0, 1)}
    result = {"preset": "p", "models": ["m"], **analyse(runs, ["old", "new"], {0: 0, 1: 0})}
    assert [result["methods"][label]["tokens"]["mean"] for label in ("old", "new")] == [None, 1000.5]
    assert [row[-2:] for row in comparison._table(result)] == [["tokens", "seconds"], ["–", "1"], ["1,000", "1"]]
    assert "10 rollouts a run of old. Percent" in comparison._caption(result)


def test_a_line_that_a_kill_cut_off_is_no_result(tmp_path):
    """The run is not complete then, and goes on."""
    config = Config()
    assert not compare._is_complete(tmp_path, config)
    (tmp_path / "config.json").write_text(config.to_json())
    assert not compare._is_complete(tmp_path, config)
    line = json.dumps({"step": 3, "split": "test", "checkpoint": "best"})
    (tmp_path / "evaluations.jsonl").write_text(f'{{"split": "validation", "step": 0}}\n{line[:-5]}')
    assert not compare._is_complete(tmp_path, config)
    (tmp_path / "evaluations.jsonl").write_text(f'{{"split": "validation", "step": 0}}\n{line}\n')
    assert compare._is_complete(tmp_path, config)


# -------------------------------------------------------------------------------------------------- a real comparison

SIZE = "--steps 3 --batch-size 16 --eval-every 1 --validation-problems 25 --test-problems 50 --device cpu --seeds 2"
JOINT = "joint+learning_rate=3e-3"  # in three steps no prompt comes twice: the games alone would change nothing
LABELS = ["grpo", JOINT, "dapo", "mopps"]
FILES = [f"comparison.{kind}" for kind in ("json", "csv", "md", "tex", "png")]


def command(out: Path, *flags: str, methods=LABELS) -> list[str]:
    return ["compare", "quickstart", *SIZE.split(), "--methods", ",".join(methods), "--out", str(out), *flags]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """A comparison by the command, one run after the other."""
    out = tmp_path_factory.mktemp("compare") / "out"
    assert main(command(out, "--jobs", "1")) == 0
    return out


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def without_seconds(out: Path) -> dict[str, object]:
    """The files of a comparison but for the time that runs took, which no two have in common."""
    result = json.loads((out / "comparison.json").read_text())
    for part in (*result["runs"], *result["methods"].values()):
        del part["seconds"]
    table = [[x for i, x in enumerate(row) if i != 5] for row in csv.reader(lines_of(out / "comparison.csv"))]
    ends = re.compile(r"[|&][^|&]*(?:\||\\\\)$")  # the last column
    texts = {name: [ends.split(line)[0] for line in lines_of(out / name)] for name in FILES[2:4]}
    return {"json": result, "csv": table, **texts, "png": (out / FILES[4]).read_bytes()}


def logs(out: Path) -> dict[str, bytes]:
    """What the runs wrote, but for the clock."""
    names = ("config.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.name in names}


def test_a_comparison_leaves_its_files_and_runs_without_weights(compared):
    """Table, one CSV line a run, figure, and for each run its configuration, logs and what it printed."""
    assert all((compared / name).stat().st_size > 0 for name in FILES)
    places = sorted(str(path.relative_to(compared / "runs")) for path in (compared / "runs").glob("*/*"))
    assert places == sorted(f"{label}/{seed}{end}" for label in LABELS for seed in (0, 1) for end in ("", ".log"))
    assert not list(compared.rglob("*.safetensors"))
    table = list(csv.DictReader(lines_of(compared / "comparison.csv")))
    assert [(row["method"], row["seed"]) for row in table] == [(label, seed) for label in LABELS for seed in "01"]
    lines = lines_of(compared / "comparison.md")
    assert lines[0].startswith("quickstart: 2 seeds over 1 warm start, 192 rollouts a run. Percent")
    assert lines[2].endswith("| tokens | seconds |")
    assert [line.split(" | ")[0] for line in lines[4:]] == [f"| {label}" for label in LABELS]


def test_runs_of_a_seed_share_warm_start_prompts_and_total(compared):
    """The same evaluations before training; the same total; prompts of a step in the same order where all are used."""
    for seed in "01":
        evaluations = [literal.read_log(compared / "runs" / label / seed / "evaluations.jsonl") for label in LABELS]
        assert all(rows[:2] == evaluations[0][:2] for rows in evaluations)
        assert [row.get("checkpoint") for row in evaluations[0]] == [None, "start", None, None, None, "last", "best"]
        samples = [literal.read_log(compared / "runs" / label / seed / "samples.jsonl") for label in LABELS[:3]]
        assert all([row["id"] for row in rows] == [row["id"] for row in samples[0]] for rows in samples)
        for label in LABELS:
            assert literal.read_log(compared / "runs" / label / seed / "metrics.jsonl")[-1]["rollouts"] == 3 * 16 * 4
    first, second = (literal.read_log(compared / "runs/grpo" / seed / "samples.jsonl") for seed in "01")
    assert [row["id"] for row in first] != [row["id"] for row in second]


def test_the_numbers_are_those_of_the_runs(compared):
    """Means, differences and the table, computed by hand from the runs' evaluations."""
    result = json.loads((compared / "comparison.json").read_text())
    assert (result["baseline"], result["k"], result["seeds"], result["preset"]) == ("grpo", 8, 2, "quickstart")
    assert result["config"]["eval_exact"] is None
    assert "model" not in result["config"]  # `models` names them, without the folders of one machine
    assert result["config"]["validation_problems"] == 25
    rows = {
        label: [literal.read_log(compared / "runs" / label / seed / "evaluations.jsonl") for seed in "01"]
        for label in LABELS
    }
    test = {
        (label, when): [next(row for row in run if row.get("checkpoint") == when) for run in rows[label]]
        for label in LABELS
        for when in ("start", "last", "best")
    }
    assert len(test["grpo", "last"][0]["success"]) == 50, "exact by default"
    for label in LABELS:
        entry = result["methods"][label]
        for rate in ("mean@8", "pass@8"):
            for prefix, when in (("", "last"), ("best ", "best"), ("start ", "start")):
                mine, base = ([100 * row[rate] for row in test[name, when]] for name in (label, "grpo"))
                assert entry[prefix + rate]["mean"] == pytest.approx(sum(mine) / 2)
                if label != "grpo":
                    gap = [x - y for x, y in zip(mine, base, strict=True)]
                    assert entry[prefix + rate]["difference"] == pytest.approx(sum(gap) / 2)
                    assert entry[prefix + rate]["wins"] == sum(x > 0 for x in gap)
                    assert when == "start" or any(gap), "methods must differ for this to tell anything"
                    assert not entry[prefix + rate]["evidence"], "two seeds are no evidence"
            curves = [[row[rate] for row in run if row["split"] == "validation"] for run in rows[label]]
            area = [100 * (c[0] / 2 + c[1] + c[2] + c[3] / 2) / 3 for c in curves]
            assert entry[f"curve {rate}"]["mean"] == pytest.approx(sum(area) / 2)
        assert ("difference" in entry["pass@8"]) == (label != "grpo")
        steps = [literal.read_log(compared / "runs" / label / seed / "metrics.jsonl") for seed in "01"]
        paid = [sum(64 * row["rollout_tokens"] for row in run) for run in steps]
        assert entry["tokens"]["mean"] == pytest.approx(sum(paid) / 2)
        assert all(row["rollout_tokens"] > row["completion_length"] for run in steps for row in run), "and the prompt"
        line = next(x for x in lines_of(compared / "comparison.md") if x.startswith(f"| {label} "))
        assert line.split(" | ")[1].startswith(f"{entry['pass@8']['mean']:.1f}")
    for when in ("last", "best"):
        for row in test[JOINT, when]:
            p = np.array([*row["success"].values()])
            assert row["mean@8"] == pytest.approx(p.mean())
            assert row["pass@8"] == pytest.approx((1 - (1 - p) ** 8).mean())


def test_a_second_call_trains_nothing_and_writes_the_same_bytes(compared, monkeypatch, capsys):
    """Nor does it touch a run."""
    before = {name: (compared / name).read_bytes() for name in FILES}
    times = {path: path.stat().st_mtime_ns for path in (compared / "runs").rglob("*")}

    def none(*args):
        raise AssertionError("a complete comparison needs no process")

    monkeypatch.setattr(compare.ProcessPoolExecutor, "submit", none)
    capsys.readouterr()
    assert main(command(compared)) == 0
    assert {name: (compared / name).read_bytes() for name in FILES} == before
    assert {path: path.stat().st_mtime_ns for path in (compared / "runs").rglob("*")} == times
    said = capsys.readouterr().out
    assert (compared / "comparison.md").read_text() in said
    assert said.count(" no evidence  pass@8 ") == 3


def test_a_comparison_goes_on_where_it_was_killed(compared, tmp_path):
    """A run is missing, one ended before its last line, one after it with its weights there, and two processes do the
    rest: the same files as without all this."""
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    shutil.rmtree(out / "runs" / JOINT / "1")
    log = out / "runs/grpo/0/evaluations.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    (out / "runs/grpo/1/best-000012").mkdir()
    (out / "runs/grpo/1/best-000012/model.safetensors").write_text("left over")
    for name in FILES:
        (out / name).unlink()
    assert main(command(out, "--jobs", "2")) == 0
    assert without_seconds(out) == without_seconds(compared)
    assert logs(out) == logs(compared)
    assert not list(out.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("flags", "methods", "message"),
    [
        ([], ["grpo"], "methods must name two different ones"),
        ([], ["grpo", "grpo"], "methods must name two different ones"),
        ([], ["grpo", "ppo"], "no method 'ppo'"),
        (["--seeds", "1"], ["grpo", "joint"], "seeds must be at least 2 for an interval, got 1"),
        ([], ["grpo", "joint+mean_rollouts=5"], "methods must spend the same"),
        ([], ["grpo", "joint+steps=4"], "methods must spend the same"),
        (["--validation-problems", "0"], ["grpo", "joint"], "validation_problems must be above 0"),
        (["--learning-rate", "0.5"], ["grpo", JOINT], "was run with another learning_rate; choose another --out"),
        (["--test-problems", "49"], ["grpo", JOINT], "was run with another test_problems"),
        (["--jobs", "-1"], ["grpo", "joint"], "jobs must be at least 0 (one on a GPU, else one a core), got -1"),
        (["--models", "elsewhere"], ["grpo", JOINT], "was run with another model"),
        (["--adversary", "cvar"], ["grpo", "joint"], "adversary changes nothing with controller 'grpo'"),
    ],
)
def test_a_comparison_that_would_mean_nothing_is_refused(compared, capsys, flags, methods, message):
    """In one line, and nothing has changed."""
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("*")}
    capsys.readouterr()
    assert main(command(compared, *flags, methods=methods)) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("gdro: error: ")
    assert message in error
    assert {path: path.stat().st_mtime_ns for path in compared.rglob("*")} == before


def test_a_run_that_fails_is_named_with_its_log(tmp_path, capsys):
    """And no other one is begun after it."""
    methods = ["grpo+max_sampler_gap=1e-30", "joint"]
    assert main(command(tmp_path / "out", "--jobs", "1", methods=methods)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    log = tmp_path / "out" / "runs" / methods[0] / "0.log"
    assert said.startswith(f"gdro: error: {methods[0]}, seed 0: step 1: the log-probabilities of engine")
    assert said.endswith(f"(log: {log}); the same command goes on")
    assert "evaluating on 50 test problems exactly" in log.read_text()
    assert {path.name for path in (tmp_path / "out/runs").glob("*/*")} == {"0", "0.log"}
    assert not (tmp_path / "out/comparison.json").exists()


def test_no_signal_ends_a_process_of_the_pool(tmp_path):
    """An idle one that died would break the pool under the others; asked to stop, it begins no run."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=compare._begin_worker) as pool:
        worker = pool.submit(os.getpid).result(60)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
            assert pool.submit(os.getpid).result(60) == worker
        assert pool.submit(compare._train, Config(), tmp_path / "out/run").result(60) is False
    assert not (tmp_path / "out/run").exists()


def running(process: int) -> bool:
    """Whether a process is there and not a zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc for processes")
@pytest.mark.parametrize(
    ("number", "all_of_them"),
    [
        (signal.SIGKILL, False),
        (signal.SIGINT, True),
        (signal.SIGINT, False),
        (signal.SIGTERM, True),
        (signal.SIGTERM, False),
    ],
)
def test_a_comparison_that_is_stopped_leaves_no_process_and_goes_on(compared, tmp_path, number, all_of_them):
    """Killed alone; asked to stop, alone or (Ctrl-C in a terminal) with all its processes: two of four runs begun."""
    arguments = command(tmp_path / "out", "--jobs", "2", methods=LABELS[:2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "gdro_llm.cli", *arguments, "--steps", "300", "--eval-every", "300"],
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    log = tmp_path / "out/runs/grpo/0/metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.is_file() and log.stat().st_size):
        assert process.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    worker = int((log.parent / ".lock").read_text().split()[0])
    (os.killpg if all_of_them else os.kill)(process.pid, number)
    code = process.wait(120)
    assert code == (-9 if number == signal.SIGKILL else 128 + number), (tmp_path / "said").read_text()
    while running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert {path.name for path in (tmp_path / "out/runs").glob("*/*") if path.is_dir()} == {"0"}
    assert bool(list(log.parent.glob("checkpoint-*"))) == (number != signal.SIGKILL), "asked to stop, it saves"
