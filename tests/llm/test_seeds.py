"""Paired differences over seeds are what the runs' files say."""

import json

import pytest

from gdro_llm.config import UsageError
from gdro_llm.seeds import paired_table


def write(folder, name, rate, rollouts=512):
    (folder / name).mkdir()
    row = {"step": 8, "rollouts": rollouts, "exact_mean@8": rate, "by_level": {"hard": {"exact_mean@8": rate / 2}}}
    early = json.dumps({**row, "step": 0, "exact_mean@8": 0.9})
    (folder / name / "evaluations.jsonl").write_text(f"{early}\n{json.dumps(row)}\n")


def test_mean_and_error_of_the_differences_of_the_last_evaluations(tmp_path):
    """Gains of 10 and 20 points: 15.0 ± 5.0, and half of both on the hard level; a seed with one run is left out."""
    for name, rate in (("0-grpo", 0.1), ("0-recommended", 0.2), ("1-grpo", 0.3), ("1-recommended", 0.5), ("2-grpo", 0)):
        write(tmp_path, name, rate)
    lines = paired_table(tmp_path).splitlines()
    assert "seeds 0, 1," in lines[0]
    assert lines[1].split() == ["exact_mean@8", "all", "+15.0", "±", "5.0"]
    assert lines[2].split() == ["exact_mean@8", "hard", "+7.5", "±", "2.5"]


def test_unpaired_runs_are_refused(tmp_path):
    """One seed is no interval, and other totals are no comparison."""
    write(tmp_path, "0-grpo", 0.1)
    write(tmp_path, "0-recommended", 0.2)
    with pytest.raises(UsageError, match="two seeds or more"):
        paired_table(tmp_path)
    write(tmp_path, "1-grpo", 0.1)
    write(tmp_path, "1-recommended", 0.2, rollouts=1024)
    with pytest.raises(UsageError, match="seed 1: the runs spent 512 and 1024 rollouts"):
        paired_table(tmp_path)
