"""A run directory has one reader: lines written again count once, torn lines are what the caller says, errors name."""

import json

import numpy as np
import pytest

from gdro_llm.config import UsageError
from gdro_llm.measuring.run_directory import RunDirectory, last_written, series

ROWS = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.25}]


def write(path, *rows, end="\n"):
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)


def test_what_is_absent_is_empty(tmp_path):
    """An empty directory, and none."""
    for path in (tmp_path, tmp_path / "nowhere"):
        run = RunDirectory(path)
        assert (run.config, run.metrics, run.timing, run.evaluations, run.samples) == ({}, [], [], [], [])


def test_files_are_read_when_they_are_asked_for(tmp_path):
    """A broken log does not keep anyone from the configuration."""
    (tmp_path / "config.json").write_text('{"seed": 3}')
    (tmp_path / "metrics.jsonl").write_text("broken\n")
    run = RunDirectory(tmp_path)
    assert run.config == {"seed": 3}
    with pytest.raises(UsageError, match=r"metrics\.jsonl, line 1: not JSON .*; repair or delete the line"):
        _ = run.metrics


@pytest.mark.parametrize("torn", ['{"step": 3, "rew', '{"step": 3, "reward": 1.0}'])
def test_a_torn_last_line_is_left_out_of_a_run_that_may_have_been_killed(tmp_path, torn):
    """Even when it is JSON as far as it goes; elsewhere a line that is none is an error."""
    write(tmp_path / "metrics.jsonl", *ROWS)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert RunDirectory(tmp_path, killed=True).metrics == ROWS
    if torn.endswith("}"):
        assert [row["step"] for row in RunDirectory(tmp_path).metrics] == [1, 2, 3]
    else:
        with pytest.raises(UsageError, match=r"metrics\.jsonl, line 3: not JSON"):
            _ = RunDirectory(tmp_path).metrics
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl, line 2: not JSON"):
        _ = RunDirectory(tmp_path, killed=True).metrics


def test_lines_that_a_resumed_run_wrote_again_count_once(tmp_path):
    """In metrics and timing, the later ones; evaluations of one step are several and all stay."""
    again = [*ROWS, {"step": 2, "reward": 0.75}, {"step": 3, "reward": 1.0}]
    for name in ("metrics", "timing", "evaluations"):
        write(tmp_path / f"{name}.jsonl", *again)
    run = RunDirectory(tmp_path)
    assert run.metrics == run.timing == last_written(again) == [ROWS[0], *again[2:]]
    assert run.evaluations == again


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluations", '{"step": 1}\n\n{"split": "test"}\n', r'evaluations\.jsonl, line 3: needs an integer "step"'),
        ("samples", "[]\n", r'samples\.jsonl, line 1: needs an integer "step"'),
        ("timing", '{"step": true}\n', r'timing\.jsonl, line 1: needs an integer "step"'),
        ("evaluations", '{"step": 1, "mean@8": "x"}\n', r"evaluations\.jsonl, line 1: .* numeric rates"),
        ("evaluations", '{"step": 1, "by_level": {"easy": {"mean@8": []}}}\n', r"line 1: .* numeric rates"),
    ],
)
def test_a_malformed_line_is_named_for_every_caller(tmp_path, name, content, message):
    """Whether the run may have been killed or not."""
    (tmp_path / f"{name}.jsonl").write_text(content)
    for killed in (False, True):
        with pytest.raises(UsageError, match=message):
            getattr(RunDirectory(tmp_path, killed=killed), name)


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("[]", "must be one JSON object")])
def test_a_malformed_configuration_is_named(tmp_path, content, message):
    """With the remedy."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=rf"config\.json: {message}.*; repair or delete the file"):
        _ = RunDirectory(tmp_path).config


def test_a_series_has_a_column_a_bin_and_a_gap_where_there_is_none(tmp_path):
    """Missing keys, None, and steps whose bins are all empty."""
    rows = [{"reward": 0.5, "bin_error": [0.25, None]}, {"reward": None}, {"bin_error": [None, 1]}]
    np.testing.assert_array_equal(series(rows, "reward", tmp_path), [0.5, np.nan, np.nan])
    np.testing.assert_array_equal(
        series(rows, "bin_error", tmp_path), [[0.25, np.nan], [np.nan, np.nan], [np.nan, 1.0]]
    )
