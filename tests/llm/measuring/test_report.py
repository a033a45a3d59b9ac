"""The report: it shows what the files hold, escapes it, is one file, and says clearly what is wrong with a run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from gdro_llm.config import UsageError
from gdro_llm.measuring.report import summary_table, write_report

BINS, STEPS = 4, 12
VOID = {"meta", "img", "br"}


def result(mean: float, problems: int = 100, k: int = 8) -> dict[str, Any]:
    return {
        "problems": problems,
        f"mean@{k}": mean,
        f"mean@{k}_se": 0.03,
        f"pass@{k}": mean + 0.2,
        f"pass@{k}_se": 0.04,
    }


def evaluation(step: int, mean: float, k: int = 8) -> dict[str, Any]:
    levels = {"easy": result(mean + 0.1, 60, k), "hard": result(mean - 0.1, 40, k)}
    where = {"step": step, "rollouts": 32 * step, "split": "test"}
    return {**where, **result(mean, k=k), "by_level": levels, "by_task": {"a<b": result(mean, 50, k)}}


def metrics(step: int, controllers: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "rollouts": 32 * step, "reward": 0.2 + 0.01 * step, "loss": -0.1 / step}
    line |= {"all_correct_share": 0.1, "all_wrong_share": 0.5, "mixed_share": 0.4, "entropy": 1.0, "sampler_kl": 1e-6}
    empty = step % BINS
    for key in ("bin_share", "bin_error", "bin_rollouts", *(["bin_weight"] if controllers else [])):
        line[key] = [None if bin == empty and key != "bin_share" else (bin + step) / 20 for bin in range(BINS)]
    if controllers:
        line |= {"shadow_price": 0.01 * step, "lead_lag": None if step < 3 else -0.2, "unseen_share": 1 / step}
    return line


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(path: Path, controllers: bool = True, steps: int = STEPS, final: float = 0.5) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"preset": "quickstart", "seed": 0}))
    write_lines(path / "metrics.jsonl", [metrics(step, controllers) for step in range(1, steps + 1)])
    write_lines(path / "evaluations.jsonl", [evaluation(0, 0.3), evaluation(steps, final)])
    stages = {"sample_s": 1.0, "update_s": 0.5, "controller_s": 0.00125, "tokens_per_s": 1000.0}
    write_lines(path / "timing.jsonl", [{"step": step, **stages} for step in range(1, steps + 1)])
    sample = {
        "step": 1,
        "id": "p<1>",
        "prompt": "1 + 1 < 3 & so?",
        "completion": "<script>x</script> &amp;",
        "reward": 1.0,
    }
    write_lines(path / "samples.jsonl", [sample])
    return path


def make_small_run(path: Path, **files: list[dict[str, Any]]) -> Path:
    """One step with a reward, and the given files: quick to draw."""
    path.mkdir(parents=True)
    for file, lines in ({"metrics": [{"step": 1, "rollouts": 32, "reward": 0.25}]} | files).items():
        write_lines(path / f"{file}.jsonl", lines)
    return path


class Page(HTMLParser):
    """Collects text, cells and addresses, and checks that every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.path = path
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def headings(self) -> list[str]:
        return re.findall("<h2>(.*?)</h2>", self.source)


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "grpo", controllers=False)


@pytest.fixture(scope="module")
def gdro(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "gdro", final=0.456)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, grpo):
    return Page(write_report([grpo], tmp_path_factory.mktemp("alone") / "out"))


@pytest.fixture(scope="module")
def both(tmp_path_factory, grpo, gdro):
    return Page(write_report([grpo, gdro], tmp_path_factory.mktemp("both") / "out"))


def test_the_report_is_one_self_contained_well_formed_file(both):
    assert both.addresses
    assert all(address.startswith("data:image/png;base64,") for address in both.addresses)
    assert "script" not in both.tags
    assert "http" not in both.source
    figures = {"progress", "levels", "groups", "bins-1", "bins-2", "controllers", "health", "time"}
    assert {file.name for file in both.path.parent.iterdir()} == {"report.html", *(f"{name}.png" for name in figures)}
    assert both.path.name == "report.html"
    assert len(both.headings) == 10


def test_a_run_without_controllers_shows_no_state_of_controllers(alone, both):
    assert set(both.headings) - set(alone.headings) == {"What the controllers do"}


def test_text_of_the_run_is_escaped(tmp_path, both):
    assert {"<script>x</script> &amp;", "1 + 1 < 3 & so?", "a<b"} <= set(both.texts)
    runs = [make_small_run(tmp_path / name) for name in ("a<b>&$x$", "_$y")]  # also into the legend of a figure
    assert "_$y against a<b>&$x$" in Page(write_report(runs, tmp_path / "out")).texts


def test_half_a_surrogate_pair_in_a_completion_does_not_stop_the_report(tmp_path):
    run = make_small_run(tmp_path / "run", samples=[{"step": 1, "completion": "broken \ud83d emoji"}])
    assert "broken \\ud83d emoji" in Page(write_report([run], tmp_path / "out")).texts


def test_tables_hold_the_numbers_of_the_files(grpo, gdro, both):
    rows = [re.split(r"\s{2,}", line.strip()) for line in summary_table([grpo, gdro]).splitlines()]
    assert ["test", "run", "problems", "before, %", "after, %", "change, pp", "vs grpo, pp"] in rows
    assert ["mean@8 all", "grpo", "100", "30.0 ± 3.0", "50.0 ± 3.0", "+20.0 ± 4.2"] in rows
    assert ["gdro", "100", "30.0 ± 3.0", "45.6 ± 3.0", "+15.6 ± 4.2", "-4.4 ± 4.2"] in rows
    assert ["pass@8 hard", "grpo", "40", "40.0 ± 4.0", "60.0 ± 4.0", "+20.0 ± 5.7"] in rows
    assert {"45.6 ± 3.0", "+15.6 ± 4.2", "-4.4 ± 4.2", "1.25"} <= set(both.texts)  # 1.25 ms of controllers
    assert "In mean@8, gdro ends 4.4 ± 4.2 points below grpo (1.0 standard errors)." in "".join(both.texts)
    assert "It is no interval over training seeds" in " ".join("".join(both.texts).split())


def test_k_is_read_from_the_keys_and_the_largest_common_one_is_shown(tmp_path):
    lines = [
        evaluation(0, 0.3, k=2) | result(0.3, k=4),
        evaluation(STEPS, 0.5, k=2) | result(0.5, k=4) | result(0.6, k=16),
    ]
    text = summary_table([make_small_run(tmp_path / "run", evaluations=lines)])
    assert "mean@4 all" in text
    assert "mean@2" not in text
    assert "mean@16" not in text


def test_exact_rates_are_shown_where_they_are_known(tmp_path):
    lines = [{"step": step, "mean@8": mean, "exact_mean@8": mean + 0.0123} for step, mean in [(0, 0.3), (1, 0.5)]]
    run = make_small_run(tmp_path / "run", evaluations=lines)
    assert {"exact_mean@8", "31.2", "51.2", "+20.0"} <= set(Page(write_report([run], tmp_path / "out")).texts)


def test_a_run_with_one_step_and_nothing_else_still_gives_a_report(tmp_path):
    run = make_small_run(tmp_path / "run")
    assert Page(write_report([run], tmp_path / "out")).headings == ["Progress"]
    assert "no evaluation yet" in summary_table([run])


def test_a_run_with_every_bin_empty_and_non_finite_values_says_so(tmp_path):
    lines = [{"step": step, "bin_error": [None] * BINS, "loss": float("nan")} for step in (1, 2, 3)]
    page = Page(write_report([make_small_run(tmp_path / "run", metrics=lines)], tmp_path / "out"))
    assert "run: loss is not finite in 3 of 3 steps." in page.texts
    assert page.headings == []


def test_lines_that_a_resumed_run_wrote_again_count_once(tmp_path):
    lines = [metrics(step, True) for step in range(1, STEPS + 1)]
    lost = [metrics(step, True) | {"reward": 0.9} for step in (1, 2, 3)]
    once = make_small_run(tmp_path / "a" / "run", metrics=lines)
    twice = make_small_run(tmp_path / "b" / "run", metrics=lost + lines)
    assert summary_table([once]) == summary_table([twice])


def test_runs_of_one_name_get_their_parents_in_the_label(tmp_path):
    lines = [evaluation(0, 0.3), evaluation(1, 0.5)]
    runs = [make_small_run(tmp_path / method / "seed0", evaluations=lines) for method in ("grpo", "gdro")]
    assert "vs grpo/seed0, pp" in summary_table(runs)
    assert "seed0 (2)" in summary_table([runs[0], runs[0]])


def test_unequal_rollouts_and_differing_settings_are_pointed_out(tmp_path):
    runs = []
    for seed, rollouts in enumerate((384, 192)):
        lines = [{"step": 9, "rollouts": rollouts, "mean@8": 0.5}]
        runs.append(make_small_run(tmp_path / f"run{seed}", evaluations=lines))
        (runs[-1] / "config.json").write_text(json.dumps({"preset": "quickstart", "seed": seed}))
    text = "".join(Page(write_report(runs, tmp_path / "out")).texts)
    assert "not at equal rollouts (run0 384, run1 192)" in text
    assert "differ in seed:" in text


def test_the_same_runs_give_the_same_bytes(tmp_path, grpo, alone):
    again = write_report([grpo], tmp_path / "out").parent
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in alone.path.parent.iterdir()
    }


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", "", r"metrics\.jsonl: missing or empty"),
        ("metrics.jsonl", '{"step": 1}\n{"step": 2', r"metrics\.jsonl, line 2: not JSON .* repair or delete"),
        ("metrics.jsonl", '{"step": 1}\n\n[]\n', r"metrics\.jsonl, line 3: needs an integer \"step\""),
        ("metrics.jsonl", '{"step": 1, "reward": "high"}\n', r"metrics\.jsonl: 'reward' must hold numbers"),
        ("metrics.jsonl", '{"step": 1, "reward": [0.5]}\n', r"metrics\.jsonl: 'reward' must hold numbers"),
        (
            "metrics.jsonl",
            '{"step": 1, "bin_share": [1]}\n{"step": 2, "bin_share": [1, 2]}\n',
            r"'bin_share' must hold",
        ),
        ("evaluations.jsonl", '{"step": 0, "mean@8": "x"}\n', r"evaluations\.jsonl, line 1: .* numeric rates"),
        (
            "evaluations.jsonl",
            '{"step": 0, "by_level": {"easy": 1}}\n',
            r"evaluations\.jsonl, line 1: .* numeric rates",
        ),
        ("evaluations.jsonl", '{"step": 0, "mean@8": 0.1}\n{"step": 5, "mean@4": 0.1}\n', r"with the same k"),
        ("config.json", "{", r"config\.json: not JSON"),
        ("config.json", "[]", r"config\.json: must be one JSON object"),
        ("samples.jsonl", "\xff", r"samples\.jsonl, line 1: not JSON"),
    ],
)
def test_a_malformed_file_is_named_with_the_remedy(tmp_path, file, content, message):
    run = make_small_run(tmp_path / "run")
    (run / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=message):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_run_and_no_run_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere/metrics\.jsonl: missing or empty"):
        summary_table([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="no run directory given"):
        write_report([], tmp_path)


def test_runs_without_a_common_split_are_refused(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    write_lines(runs[1] / "evaluations.jsonl", [evaluation(0, 0.3) | {"split": "train"}])
    with pytest.raises(UsageError, match=r"evaluations\.jsonl: no split"):
        summary_table(runs)
