"""Validation problems steer what is kept, test problems are used three times, and a resumed run forgets neither."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import literal
import numpy as np
import pytest
from test_run_directory import assert_same_run, die, die_at, fork_and_die

import gdro_llm.training.checkpoint as checkpoint
import gdro_llm.training.trainer as trainer
from gdro_llm.config import Config, UsageError
from gdro_llm.problems.load import hold_out, load_problems
from gdro_llm.training.trainer import train


@pytest.fixture
def config(run_config):
    """Four steps, evaluated after each, saved after every second one; the learning rate moves the rates."""
    return run_config(steps=4, eval_every=1, save_every=2, validation_problems=10, learning_rate=3e-3)


def rows_of(out: Path) -> tuple[list[dict], dict[str, dict]]:
    """Validation rows, and test rows by the checkpoint that they are of."""
    rows = literal.read_log(out / "evaluations.jsonl")
    tests = [row for row in rows if row["split"] == "test"]
    assert [row["checkpoint"] for row in tests] == ["start", "last", "best"]
    assert all("checkpoint" not in row for row in rows if row["split"] == "validation")
    return [row for row in rows if row["split"] == "validation"], {row["checkpoint"]: row for row in tests}


def rates(row: dict) -> dict:
    """What an evaluation found, without where."""
    return {key: value for key, value in row.items() if key not in ("checkpoint", "step", "rollouts", "split")}


def test_validation_is_looked_at_while_training_and_the_test_problems_at_both_ends(config, tmp_path):
    """Rows start, last and best, on the test problems alone; best is the first of the highest validation pass@k."""
    train(config, tmp_path)
    validation, test = rows_of(tmp_path)
    assert [row["step"] for row in validation] == [0, 1, 2, 3, 4]
    assert [row["rollouts"] for row in validation] == [0, 32, 64, 96, 128]
    chosen = max(validation, key=lambda row: row["pass@4"])
    places = {name: (row["step"], row["rollouts"]) for name, row in test.items()}
    assert places == {"start": (0, 0), "last": (4, 128), "best": (chosen["step"], chosen["rollouts"])}
    train_problems, test_problems = load_problems(config)
    train_problems, validation_problems = hold_out(train_problems, config)
    for evaluations, problems in ((validation, validation_problems), (test.values(), test_problems)):
        assert all(set(row["correct"]) == {problem.id for problem in problems} for row in evaluations)
    drawn = {row["id"] for row in literal.read_log(tmp_path / "samples.jsonl")}
    assert drawn <= {problem.id for problem in train_problems}


@pytest.mark.parametrize("step", [0, 2, 4])
def test_the_best_row_is_of_the_weights_of_its_step(config, tmp_path, monkeypatch, step):
    """A run that ends at the best step reports the same rates for its last weights; they are kept, alone."""
    measured = trainer.Run._evaluate

    def praised(self, split, place):
        rate = measured(self, split, place)
        return 2.0 if split == "validation" and place["step"] == step else rate

    monkeypatch.setattr(trainer.Run, "_evaluate", praised)
    train(config, tmp_path / "run")
    test = rows_of(tmp_path / "run")[1]
    assert test["best"]["step"] == step
    expected = test["start"]
    if step:
        train(replace(config, steps=step), tmp_path / "short")
        expected = rows_of(tmp_path / "short")[1]["last"]
        last = tmp_path / "short" / f"checkpoint-{step:06d}"
        (best,) = (tmp_path / "run").glob("best-*")
        assert best.name == f"best-{step:06d}"
        assert (best / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()
    assert rates(test["best"]) == rates(expected)
    assert rates(test["start"]) != rates(test["last"]), "training must change the rates for this to tell anything"
    assert (rates(test["best"]) == rates(test["last"])) == (step == 4)


def killed_between_the_renames_of_the_best_weights() -> None:
    rename, calls = Path.rename, []

    def dying(self, target):
        if self.name == ".best.tmp" and calls.append(1) is None and len(calls) == 4:  # after the first checkpoint
            die()
        return rename(self, target)

    Path.rename = dying


@pytest.mark.parametrize(
    "sabotage",
    [
        pytest.param(lambda: die_at(trainer, "append", 1), id="before-the-first-test"),
        pytest.param(lambda: die_at(trainer, "append", 12), id="after-the-first-checkpoint"),
        pytest.param(lambda: die_at(trainer, "append", 19), id="between-last-and-best"),
        pytest.param(lambda: die_at(trainer, "save_checkpoint", 1), id="before-the-last-checkpoint"),
        pytest.param(killed_between_the_renames_of_the_best_weights, id="while-the-best-weights-are-replaced"),
    ],
)
def test_a_killed_run_goes_on_with_the_same_best_weights(config, tmp_path, sabotage, monkeypatch):
    """Logs, checkpoints and best weights equal those of an uninterrupted run, and no scraps are left."""
    rising = trainer.Run._evaluate  # every validation is better than the one before: `best` is replaced each time

    def praised(self, split, place):
        rate = rising(self, split, place)
        return 1.0 + place["step"] if split == "validation" else rate

    monkeypatch.setattr(trainer.Run, "_evaluate", praised)
    train(config, tmp_path / "whole")
    assert fork_and_die(config, tmp_path / "killed", sabotage) == signal.SIGKILL
    train(config, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert {path.name for path in (tmp_path / "killed").glob(".*")} == {".lock"}


def test_best_weights_of_before_a_kill_stay_the_best(config, tmp_path, monkeypatch):
    """The checkpoint remembers how good they were: lower rates after it do not replace them."""
    measured = trainer.Run._evaluate

    def praised(self, split, place):
        rate = measured(self, split, place)
        return 2.0 if split == "validation" and place["step"] == 1 else rate

    monkeypatch.setattr(trainer.Run, "_evaluate", praised)
    train(config, tmp_path / "whole")
    assert fork_and_die(config, tmp_path / "killed", lambda: die_at(trainer, "append", 12)) == signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-000002").is_dir()
    train(config, tmp_path / "killed", resume=True)
    assert rows_of(tmp_path / "killed")[1]["best"]["step"] == 1
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_the_best_weights_of_a_checkpoint_outlive_those_of_steps_after_it(config, tmp_path, monkeypatch):
    """Step 3 is best, the process dies, and step 3 replayed is not (as rounding on a GPU may have it): step 2's are."""
    measured, best = trainer.Run._evaluate, [2]

    def praised(self, split, place):
        rate = measured(self, split, place)
        return float(place["step"] in best) * place["step"] if split == "validation" else rate

    monkeypatch.setattr(trainer.Run, "_evaluate", praised)

    def dies_at_step_4():
        best.append(3)
        die_at(trainer, "append", 14)

    assert fork_and_die(config, tmp_path / "run", dies_at_step_4) == signal.SIGKILL
    assert {path.name for path in (tmp_path / "run").glob("best-*")} == {"best-000002", "best-000003"}
    train(config, tmp_path / "run", resume=True)
    assert rows_of(tmp_path / "run")[1]["best"]["step"] == 2
    (kept,) = (tmp_path / "run").glob("best-*")
    at_2 = tmp_path / "run/checkpoint-000002/model.safetensors"
    assert (kept / "model.safetensors").read_bytes() == at_2.read_bytes()


def test_a_disk_that_does_not_take_the_best_weights_is_named(config, tmp_path, monkeypatch):
    """One line, and the part is removed; whatever else goes wrong there is raised as it is."""

    def full(folder):
        folder.mkdir()
        (folder / "part").write_text("x")
        raise Exception("No space left on device (os error 28)")

    with pytest.raises(UsageError, match=r"cannot write .*best-000001 .*os error 28.*make room"):
        checkpoint.save_best(tmp_path / "best-000001", full)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        checkpoint.save_best(tmp_path / "best-000001", lambda folder: 1 / 0)


@pytest.mark.parametrize(
    "data", ["cells", "cells-shared", "cells-light", "cells-heavy", "cells-dead", "cells-once", "ladder", "file"]
)
def test_training_validation_and_test_problems_are_disjoint(tiny_data, data):
    """As many as asked for, the same ones whatever the seed, no prompt in two of them."""
    sets = tiny_data if data == "file" else {"data": data}
    config = Config(**sets, batch_size=4, validation_problems=15)
    whole, test = load_problems(config)
    train, validation = hold_out(whole, config)
    assert len(validation) == 15
    prompts = [{problem.prompt for problem in part} for part in (train, validation, test)]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert len(train) == len(whole) - (15 if data in ("ladder", "file") else 0)
    assert hold_out(whole, replace(config, seed=5))[1] == validation
    assert hold_out(whole, replace(config, validation_problems=0)) == (whole, [])


def test_a_part_of_the_training_problems(tiny_data):
    """The same ones whatever the seed, without a change of the validation problems; at least a batch of them."""
    config = Config(**tiny_data, batch_size=4, validation_problems=15)
    whole, _ = load_problems(config)
    everything, validation = hold_out(whole, config)
    part, beside = hold_out(whole, replace(config, train_problems=7))
    assert len(part) == 7
    assert beside == validation
    assert [problem for problem in everything if problem in part] == part
    assert hold_out(whole, replace(config, train_problems=7, seed=5)) == (part, beside)
    assert hold_out(whole, replace(config, train_problems=10**6)) == (everything, validation)
    with pytest.raises(UsageError, match=r"train_problems must be 0 \(all\) or at least batch_size = 4, got 3"):
        replace(config, train_problems=3)


@pytest.mark.parametrize(
    ("controller", "steps", "said"), [("recommended", 2, True), ("recommended", 3, False), ("grpo", 2, False)]
)
def test_a_run_that_is_short_for_its_controller_says_so(run_config, tmp_path, capsys, controller, steps, said):
    """Two batches of the same eight problems; with three there is enough to act on, and GRPO does not act."""
    train(run_config(steps=steps, controller=controller, train_problems=8), tmp_path)
    line = "each of 8 problems is drawn 2 times in this run, and the controller acts on a problem from its second"
    assert (line in capsys.readouterr().out) == said


def test_tails_hold_more_or_fewer_hard_problems():
    """Of the same cells, with the same easy and middle problems, and the same test problems."""
    sets = {name: load_problems(Config(data=name)) for name in ("cells", "cells-light", "cells-heavy")}
    shares = {}
    for name, (training, test) in sets.items():
        shares[name] = round(100 * np.mean([problem.level == "hard" for problem in training]))
        assert [p for p in training if p.level != "hard"] == [p for p in sets["cells"][0] if p.level != "hard"]
        assert test == sets["cells"][1]
    assert shares == {"cells": 22, "cells-light": 40, "cells-heavy": 10}


def test_dead_cells_have_problems_that_nobody_can_solve():
    """40 % of the training problems of every level, the same prompts; validation and test problems are as they were."""
    (whole, test), (training, test_of_dead) = (load_problems(Config(data=name)) for name in ("cells", "cells-dead"))
    assert test_of_dead == test
    assert [problem.id for problem in training] == [problem.id for problem in whole]
    for level in ("easy", "middle", "hard"):
        dead = [len(problem.answer) > Config.max_new_tokens for problem in training if problem.level == level]
        assert 0.33 < np.mean(dead) < 0.47
    changed = [problem for problem, before in zip(training, whole, strict=True) if problem != before]
    assert all(problem.accepted == (problem.answer,) for problem in changed)
    assert len(changed) == sum(len(problem.answer) > Config.max_new_tokens for problem in training)


def test_too_many_validation_problems_are_refused(tiny_data):
    """A batch must be left to train on; the cells have 500, which are all that one gets."""
    config = Config(**tiny_data, batch_size=8)
    train, _ = load_problems(config)
    most = replace(config, validation_problems=len(train) - 8)
    assert len(hold_out(train, most)[0]) == 8
    with pytest.raises(UsageError, match=f"validation_problems must leave a batch of the {len(train)} problems"):
        hold_out(train, replace(config, validation_problems=len(train) - 7))
    cells = Config(validation_problems=10_000)
    assert len(hold_out(load_problems(cells)[0], cells)[1]) == 500


def test_exact_evaluation_is_refused_where_probabilities_are_not_known(run_config, tmp_path):
    """Before anything is written; and where evaluation does not sample from the whole distribution."""
    for wrong in ({"grader": "number"}, {"model": "embedded", "data": "cells", "test_data": "", "eval_top_k": 5}):
        with pytest.raises(UsageError, match="eval_exact must be off: "):
            train(run_config(eval_exact=True, **wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluation_is_exact_where_it_can_be_unless_told_otherwise(run_config, tmp_path):
    """What was decided is in config.json; a nucleus has to be sampled."""
    for name, build, exact in (
        ("exact", {"eval_exact": None}, True),
        ("sampled", {}, False),
        ("nucleus", {"eval_exact": None, "eval_top_p": 0.9}, False),
    ):
        train(run_config(steps=1, **build), tmp_path / name)
        rows = literal.read_log(tmp_path / name / "evaluations.jsonl")
        assert all(("success" in row, "correct" in row) == (exact, not exact) for row in rows)
        assert all({"mean@4", "pass@4"} <= row.keys() for row in rows)
        assert json.loads((tmp_path / name / "config.json").read_text())["eval_exact"] is exact


@pytest.mark.parametrize("before", [True, False, None])
def test_a_resumed_run_is_evaluated_as_it_began(run_config, tmp_path, before):
    """With `eval_exact` unset, also where the run began before there was such a setting (None here): by samples."""
    train(run_config(steps=6, eval_exact=bool(before)), tmp_path)
    for folder in tmp_path.glob("checkpoint-000006"):
        shutil.rmtree(folder)
    saved = json.loads((tmp_path / "config.json").read_text())
    if before is None:
        del saved["eval_exact"]
        (tmp_path / "config.json").write_text(json.dumps(saved))
    first = literal.read_log(tmp_path / "evaluations.jsonl")
    with pytest.raises(UsageError, match=f"eval_exact {before} -> {not before}"):
        train(run_config(steps=6, eval_exact=not before), tmp_path, resume=True)
    train(run_config(steps=6, eval_exact=None), tmp_path, resume=True)
    assert literal.read_log(tmp_path / "evaluations.jsonl") == first
    assert ("success" in first[-1]) is bool(before)
    assert json.loads((tmp_path / "config.json").read_text())["eval_exact"] is bool(before)


def test_mopps_needs_four_candidates_a_prompt(run_config, tmp_path):
    """Fewer would make smaller batches, and spend less than the other controllers."""
    with pytest.raises(UsageError, match=r"at most a 4th of the 40 problems with controller 'mopps', got 11"):
        train(run_config(controller="mopps", batch_size=11), tmp_path / "run")
    train(run_config(controller="mopps", batch_size=10, steps=2), tmp_path / "run")
    state = json.loads((tmp_path / "run" / "checkpoint-000002" / "state.json").read_text())
    assert state["progress"]["rollouts"] == 80
    assert 10 <= len(state["controller"]["classifier"]["ids"]) <= 20


def test_reward_noise_reaches_what_is_learnt_and_not_what_is_evaluated(run_config, tmp_path):
    """With every second grade flipped the training reward is a half, and the first evaluation is as without."""
    train(run_config(steps=4, learning_rate=1e-9), tmp_path / "clean")
    train(run_config(steps=4, learning_rate=1e-9, reward_noise=0.5), tmp_path / "noisy")
    clean, noisy = (
        np.mean([row["reward"] for row in literal.read_log(tmp_path / name / "metrics.jsonl")])
        for name in ("clean", "noisy")
    )
    assert abs(noisy - 0.5) < 5 * 0.5 / np.sqrt(128)
    assert abs(clean - 0.5) > 0.25, "the clean rewards must be elsewhere for this to tell anything"
    first, other = (literal.read_log(tmp_path / name / "evaluations.jsonl")[0] for name in ("clean", "noisy"))
    assert first == other
