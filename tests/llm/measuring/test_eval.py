"""`gdro eval` from end to end: its files agree with each other and come again; mistakes are one line."""

import json
import re
from pathlib import Path

import literal
import numpy as np
import pytest

from gdro_core import pass_at_k
from gdro_llm.cli import main
from gdro_llm.config import EVALUATION_KEYS, Config
from gdro_llm.engine.policy import load_policy
from gdro_llm.problems.load import load_problems
from gdro_llm.problems.prompting import BASE_TEMPLATE, CHAT_TEMPLATE
from gdro_llm.training.evaluation import tabulate
from gdro_llm.training.trainer import train

FILES = ["evaluation.json", "evaluation.md", "evaluation.png"]


@pytest.fixture
def two_sets(tiny_data, tmp_path):
    """Two files of problems that the tiny model solves at times, with levels and without."""
    rows = literal.read_log(Path(tiny_data["test_data"]))
    bare = [{key: row[key] for key in ("problem", "answer")} for row in rows[5:]]
    for name, part in (("levels", rows), ("bare", bare)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return [str(tmp_path / "levels.jsonl"), str(tmp_path / "bare.jsonl")]


@pytest.fixture
def gdro_eval(tiny_model, tmp_path, capsys):
    """Run the command with the tiny model into a folder; exit code, what it printed, and the folder."""

    def run(data, *flags, model=tiny_model, out="out", plain=True):
        settings = ["--grader", "exact", "--prompt-style", "plain", "--template", "{problem}"]
        settings += ["--max-new-tokens", "1", "--samples", "6"]
        command = ["eval", str(model), "--data", data, "--out", str(tmp_path / out)]
        capsys.readouterr()
        code = main([*command, *(["--threads", "1", "--device", "cpu", *settings] if plain else []), *flags])
        return code, capsys.readouterr(), tmp_path / out

    return run


def test_the_files_agree_with_each_other_and_come_again_byte_by_byte(gdro_eval, two_sets):
    """JSON from its own successes, the table and the figure from the JSON; a second run changes no byte."""
    code, printed, out = gdro_eval(",".join(two_sets))
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    before = {name: (out / name).read_bytes() for name in FILES}
    saved = json.loads(before["evaluation.json"])
    assert saved["config"]["eval_samples"] == 6
    assert saved["config"].keys() == set(EVALUATION_KEYS)
    assert saved["data"] == two_sets
    assert list(saved["benchmarks"]) == ["levels", "bare"]
    successes = []
    for part in saved["benchmarks"].values():
        correct = np.array([*part["correct"].values()])
        successes.append(correct)
        assert part["problems"] == len(correct)
        assert part["mean@6"] == pytest.approx(correct.mean() / 6)
        for k in (1, 2, 4, 6):
            assert part[f"pass@{k}"] == pytest.approx(pass_at_k(correct, 6, k).mean())
            assert part[f"pass@{k}_low"] < part[f"pass@{k}"] < part[f"pass@{k}_high"]
    assert saved["problems"] == 35
    assert saved["mean@6"] == pytest.approx(np.concatenate(successes).mean() / 6)
    levels, bare = saved["benchmarks"].values()
    assert list(levels["by_level"]) == ["level 1", "level 2"]
    assert "by_bin" not in levels
    assert sum(part["problems"] for part in bare["by_bin"].values()) == bare["problems"]
    assert all("mean@3" in part and "mean@6" not in part for part in bare["by_bin"].values())

    text = before["evaluation.md"].decode()
    assert text in printed.out
    for label, part in [*saved["benchmarks"].items(), ("all problems", saved)]:
        row = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        rates = [
            (part[name], part[f"{name}_low"], part[f"{name}_high"]) for name in ("mean@6", "pass@2", "pass@4", "pass@6")
        ]
        assert cells[1:6] == [
            f"{part['problems']}",
            *("{:.1f} [{:.1f}, {:.1f}]".format(*[100 * x for x in r]) for r in rates),
        ]
        assert cells[-1] == f"{100 * part['truncated_share']:.1f}"
    assert "By pass rate: the first half" in text
    assert before["evaluation.png"].startswith(b"\x89PNG")

    assert gdro_eval(",".join(two_sets))[0] == 0
    assert {name: (out / name).read_bytes() for name in FILES} == before


def test_a_set_has_the_same_numbers_alone_and_in_company(gdro_eval, two_sets):
    """Also when it comes second."""
    together = json.loads((gdro_eval(",".join(two_sets))[2] / "evaluation.json").read_text())
    alone = json.loads((gdro_eval(two_sets[1], out="alone")[2] / "evaluation.json").read_text())
    assert alone["benchmarks"]["bare"] == together["benchmarks"]["bare"]


def test_another_evaluation_is_not_overwritten(gdro_eval, two_sets):
    """Other settings, data or model: the difference is named, the files stay."""
    out = gdro_eval(two_sets[0])[2]
    before = (out / "evaluation.json").read_bytes()
    for data, flags, message in (
        (two_sets[0], ["--samples", "4"], "eval_samples 6 -> 4"),
        (two_sets[0], ["--temperature", "0.5", "--seed", "1"], "seed 0 -> 1, eval_temperature 1.0 -> 0.5"),
        (two_sets[1], [], r"data \['.*levels.jsonl'\] -> \['.*bare.jsonl'\]"),
    ):
        code, printed, _ = gdro_eval(data, *flags)
        assert code == 2
        assert re.search(rf"holds another evaluation \(.*{message}\); choose another --out\n$", printed.err)
    assert (out / "evaluation.json").read_bytes() == before


def test_a_run_directory_is_its_last_checkpoint_with_its_settings(gdro_eval, run_config, tmp_path):
    """The same numbers as from the checkpoint by hand, which are not those of the model it started from."""
    config = run_config(steps=4, learning_rate=0.05)
    train(config, tmp_path / "run")
    data = config.test_data
    code, _, out = gdro_eval(data, model=tmp_path / "run", plain=False)
    assert code == 0
    saved = json.loads((out / "evaluation.json").read_text())
    assert saved["checkpoint"] == "checkpoint-000004"
    assert saved["config"] == {key: getattr(config, key) for key in EVALUATION_KEYS}
    problems = load_problems(config)[1]
    expected = tabulate(
        literal.score(load_policy(config, tmp_path / "run" / "checkpoint-000004"), problems, config, "test")
    )
    assert saved["benchmarks"]["test"] == expected
    first = tabulate(literal.score(load_policy(config), problems, config, "test"))
    assert first["correct"] != expected["correct"]
    code, _, out = gdro_eval(data, "--samples", "2", model=tmp_path / "run", out="other", plain=False)
    assert json.loads((out / "evaluation.json").read_text())["config"]["eval_samples"] == 2


def test_the_try_out_of_a_newcomer(tmp_path, monkeypatch, capsys):
    """`gdro eval embedded --data cells` needs no other setting, has levels, and says where the files are."""
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "embedded", "--data", "cells", "--test-problems", "40", "--samples", "4"]) == 0
    text = capsys.readouterr().out
    assert all(level in text for level in ("easy", "middle", "hard", "runs/eval-embedded/evaluation.json"))
    saved = json.loads((tmp_path / "runs" / "eval-embedded" / "evaluation.json").read_text())["benchmarks"]["cells"]
    assert saved["problems"] == 40
    assert saved["by_level"]["easy"]["mean@4"] > saved["by_level"]["hard"]["mean@4"]


def test_names_from_files_neither_steer_the_terminal_nor_break_the_table(gdro_eval, two_sets, tmp_path):
    """Escape sequences and bars in levels are shown, not obeyed."""
    rows = literal.read_log(Path(two_sets[0]))
    for i, row in enumerate(rows):
        row["level"] = f"\x1b[31ma|b\n{i % 2}"
    (tmp_path / "levels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, printed, _ = gdro_eval(two_sets[0])
    assert code == 0
    assert "\x1b" not in printed.out
    assert r"| \x1b[31ma\|b\n0 |" in printed.out


def test_without_a_run_the_settings_suit_the_data(monkeypatch, tmp_path, two_sets, tiny_model):
    """Those of the preset for embedded data; math, chat and 16 long answers for other sets; flags before both."""
    configs = []

    def stop_here(config, checkpoint):
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("gdro_llm.measuring.eval.load_policy", stop_here)
    monkeypatch.chdir(tmp_path)
    for data, flags in (
        ("cells", []),
        ("cells-shared", []),
        ("ladder", []),
        (two_sets[0], []),
        (two_sets[0], ["--grader", "number", "--prompt-style", "plain"]),
    ):
        assert main(["eval", str(tiny_model), "--data", data, *flags]) == 130
    cells, shared, ladder, plain, changed = configs
    assert shared == cells
    assert (cells.grader, cells.max_new_tokens, cells.eval_samples, cells.threads) == ("exact", 14, 8, 1)
    assert (ladder.grader, ladder.stop, ladder.trainable_layers) == ("exact", "\n", 0)
    assert (plain.grader, plain.prompt_style, plain.max_new_tokens, plain.eval_samples) == ("math", "chat", 4096, 16)
    assert (plain.template, changed.template) == (CHAT_TEMPLATE, BASE_TEMPLATE)
    assert (changed.grader, changed.max_new_tokens) == ("number", 4096)
    assert {config.model for config in configs} == {str(tiny_model)}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("data", "flags", "message"),
    [
        ("", [], r"--data must name sets, separated by commas, no name twice, got ''"),
        ("cells,", [], r"--data must name sets.*got 'cells,'"),
        ("cells,cells", [], r"no name twice, got 'cells,cells'"),
        ("cells,ladder", [], r"embedded data has settings of its own; evaluate it by itself"),
        ("nothing-like-it", [], r"no data file or set 'nothing-like-it'"),
        ("cells", ["--samples", "0"], r"eval_samples must be at least 1, got 0"),
        ("cells", ["--temperature", "0"], r"eval_temperature must be above 0, got 0.0"),
        ("cells", ["--top-p", "nan"], r"eval_top_p must be a finite number, got nan"),
        ("cells", ["--template", "x"], r"template must contain \{problem\}"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(gdro_eval, data, flags, message):
    """It names the thing and the remedy."""
    code, printed, out = gdro_eval(data, *flags, plain=False)
    assert code == 2
    assert re.search(message, printed.err)
    assert printed.err.startswith("gdro: error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not out.exists()


def test_models_and_folders_that_cannot_be_used_are_named(gdro_eval, tmp_path, run_config):
    """No such folder, a run without a checkpoint, a run of another version, an --out that is a file or not ours."""
    assert "no config.json" in gdro_eval("cells", model=tmp_path)[1].err
    (tmp_path / "run").mkdir()
    config = json.loads(run_config().to_json())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert (
        "holds no checkpoint; a run of gdro train has its first after step 2"
        in gdro_eval("cells", model=tmp_path / "run")[1].err
    )
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "extra": 1}))
    assert "unknown key 'extra'" in gdro_eval("cells", model=tmp_path / "run")[1].err
    (tmp_path / "run" / "config.json").write_text("{")
    assert "not JSON" in gdro_eval("cells", model=tmp_path / "run")[1].err
    (tmp_path / "file").write_text("x")
    assert "cannot make the folder" in gdro_eval("cells", out="file")[1].err
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "evaluation.json").write_text("[]")
    assert "must be one JSON object" in gdro_eval("cells", out="used")[1].err


def test_the_help_teaches_by_examples_and_names_every_option(capsys):
    """The eval_ keys in their short form too; no key of training."""
    assert main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("  gdro eval ") >= 2
    for key in EVALUATION_KEYS:
        assert key == "model" or f"--{key.replace('_', '-')}" in text
    for option in ("--samples", "--temperature", "--top-p", "--top-k", "--data", "--out"):
        assert re.search(rf"{option}[, ]", text)
    assert "learning-rate" not in text
    assert "[default" not in text.replace("[default: (runs/", "")
    assert set(EVALUATION_KEYS) <= set(Config.__dataclass_fields__)
