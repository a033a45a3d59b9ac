"""Every experiment runs, documents its columns, judges itself and gives the same bytes for the same seeds."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from gdro_llm.intervals import mean_interval, slope
from simulations import harness
from simulations.__main__ import main

EXPERIMENTS = harness.names()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_quick_run_writes_documented_rows_a_figure_and_a_verdict(name, tmp_path):
    """CSV columns are the documented ones, numbers are finite, PNG, PDF and verdict are there; twice the same bytes."""
    if harness.lacks_data(name):
        pytest.skip("GDRO_DATA_DIR names no folder of traces")
    verdict = harness.run(name, tmp_path / "a", quick=True, seeds=2)
    columns = harness.load(name).COLUMNS
    with (tmp_path / "a" / f"{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(columns)
    assert len({row["seed"] for row in rows}) == 2
    assert not any(value in ("nan", "inf", "-inf") for row in rows for value in row.values())
    found = json.loads((tmp_path / "a" / f"{name}.json").read_text())
    assert (found["holds"], found["verdict"], found["seeds"]) == (verdict.holds, verdict.text, 2)
    assert (tmp_path / "a" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "a" / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
    harness.run(name, tmp_path / "b", quick=True, seeds=2)
    written = {path.name for path in (tmp_path / "a").iterdir() if path.is_file()}
    tabulates = hasattr(harness.load(name), "tabulate")
    assert written == {f"{name}.{suffix}" for suffix in ("csv", "png", "pdf", "json", *["md"] * tabulates)}
    for file in written:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_number_of_processes_changes_no_byte(tmp_path):
    """Seeds come in fixed blocks."""
    for jobs in (1, 2):
        harness.run("square_root_law", tmp_path / str(jobs), seeds=120, jobs=jobs)
    assert (tmp_path / "1" / "square_root_law.csv").read_bytes() == (
        tmp_path / "2" / "square_root_law.csv"
    ).read_bytes()


def test_an_interrupted_run_goes_on_from_the_finished_seeds(tmp_path, monkeypatch):
    """Blocks done before the stop are read back, not simulated again; the CSV has the bytes of an undisturbed run."""
    harness.run("square_root_law", tmp_path / "whole", seeds=120)
    module = harness.load("square_root_law")
    simulate, done = module.simulate, []

    def stops_at_the_second_block(seeds, quick):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(int(seeds[0]))
        return simulate(seeds, quick)

    monkeypatch.setattr(module, "simulate", stops_at_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        harness.run("square_root_law", tmp_path / "parts", seeds=120)
    again = []
    monkeypatch.setattr(
        module, "simulate", lambda seeds, quick: (again.append(int(seeds[0])), simulate(seeds, quick))[1]
    )
    harness.run("square_root_law", tmp_path / "parts", seeds=120)
    assert (done, again) == ([0], [50, 100])
    found = [(tmp_path / folder / "square_root_law.csv").read_bytes() for folder in ("whole", "parts")]
    assert found[0] == found[1]
    assert not list((tmp_path / "parts" / ".unfinished").iterdir())


def test_paired_interval_covers_the_mean_difference_about_95_times_in_100():
    """Bootstrap over 50 paired differences, 400 repetitions.

    At 94 % (bootstrap of 50), s.e. 1.2 %: false alarm 6e-4 if the seed were new.
    """
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        _, low, high = mean_interval(rng.normal(1.0, 2.0, 50), resamples=400)
        covered += low <= 1.0 <= high
    assert 0.90 < covered / 400 < 0.98


def test_slope_of_a_power_law():
    """y = 3 x^-0.5 has log-log slope -0.5."""
    x = np.array([1.0, 10.0, 100.0])
    assert slope(x, 3 * x**-0.5) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "no experiment 'nothing'; choose one of"),
        (["run", "square_root_law", "--seeds", "1"], "seeds must be at least 2"),
        (["draw"], "invalid choice: 'draw'"),
        (["run", "square_root_law", "--out", "README.md/x"], "out must be a folder that can be written"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    """Exit code 2, the argument and the remedy, no traceback."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_every_flaw_has_an_experiment():
    """F1 to F10 of the method each stand in a SOURCE, as whole words: F10 is not F1."""
    named = {word for name in EXPERIMENTS for word in re.findall(r"\bF\d+\b", harness.load(name).SOURCE)}
    assert {f"F{k}" for k in range(1, 11)} <= named


def test_list_names_every_experiment_with_its_claim(capsys):
    """`list` is the table of contents, with the theorem, equation or flaw of each."""
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(EXPERIMENTS, lines, strict=True):
        assert all(told in line for told in (name, harness.load(name).CLAIM, harness.load(name).SOURCE))


def test_an_experiment_needs_no_torch():
    """Intervals, tables and plot style are shared with the training loop, and need neither it nor its models."""
    code = "import sys, simulations.harness as h; [h.load(name) for name in h.names()]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "gdro_llm.intervals" in modules
    assert modules & {"torch", "transformers", "gdro_llm.training", "gdro_llm.engine"} == set()


def test_a_kept_block_is_of_the_present_code_of_the_core_too():
    """A change of either package makes unfinished blocks another run's."""
    names = {"/".join(path.parts[-2:]) for path in harness.sources()}
    assert {
        "gdro_llm/intervals.py",
        "gdro_core/controller.py",
        "gdro_core/difficulty.py",
        "simulations/population.py",
    } <= names
    assert "experiments/tuning.py" in names
