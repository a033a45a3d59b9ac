"""A run is a function of its configuration: the same bytes again, also when it was killed anywhere and resumed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import literal
import numpy as np
import pytest

import gdro_llm.cli as cli
import gdro_llm.training.checkpoint as checkpoint
import gdro_llm.training.trainer as trainer
from gdro_llm.config import CONTROLLERS, Config, UsageError, load_preset
from gdro_llm.engine.transformers import HFSampler
from gdro_llm.problems.load import load_problems
from gdro_llm.problems.rewards import grade_exact
from gdro_llm.training.evaluation import draw_seed
from gdro_llm.training.trainer import train

LOGS = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")


def files(out: Path) -> dict[str, bytes]:
    """Everything in a run directory but the clock, the lock's note of who trained, and where transformers notes what a
    tokenizer was loaded from (which a manifest's digests repeat)."""
    left_out = ("timing.jsonl", ".lock", "tokenizer_config.json", "manifest.json")
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in left_out
    }


def assert_same_run(run: Path, expected: Path) -> None:
    got, want = files(run), files(expected)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name] == want[name], name
    assert [checkpoint.verify_checkpoint(path) for path in run.glob("checkpoint-*")] == ["", ""]


def assert_same_end(run: Path, expected: Path) -> None:
    """Equal logs, final weights, optimizer and controller: a stopped run has its last but one checkpoint elsewhere."""
    got, want = files(run), files(expected)
    last = max(path.name for path in expected.glob("checkpoint-*"))
    for name in [name for name in want if "/" not in name or name.startswith(last)]:
        assert got[name] == want[name], name


@pytest.fixture
def finished(run_config, tmp_path):
    """An uninterrupted run."""
    train(run_config(), tmp_path / "finished")
    return tmp_path / "finished"


def test_a_run_leaves_what_it_promises(run_config, finished):
    """Configuration, one metrics line a step, evaluations before, during and after, the last two checkpoints."""
    assert json.loads((finished / "config.json").read_text()) == json.loads(run_config().to_json())
    assert [row["step"] for row in literal.read_log(finished / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in literal.read_log(finished / "samples.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in literal.read_log(finished / "timing.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in literal.read_log(finished / "evaluations.jsonl")] == [0, 3, 6]
    assert sorted(p.name for p in finished.iterdir() if p.is_dir()) == ["checkpoint-000004", "checkpoint-000006"]
    assert [path.name for path in finished.glob(".*")] == [".lock"]
    rows = literal.read_log(finished / "metrics.jsonl")
    assert any(row["mixed_share"] > 0 for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows), "the run must have moved the weights for the tests below to count"


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(run_config, finished, tmp_path):
    """Logs, weights, optimizer and controller."""
    train(run_config(), tmp_path / "again")
    assert_same_run(tmp_path / "again", finished)
    train(run_config(seed=1), tmp_path / "other")
    assert (tmp_path / "other" / "metrics.jsonl").read_bytes() != (finished / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_every_controller_runs_within_its_budget_and_resumes_exactly(run_config, tmp_path, controller):
    """Counts add up to mean_rollouts x batch_size in every step; stopping after a checkpoint changes nothing."""
    aggregation = "prompt" if controller == "published-rollout" else "rollout"
    config = run_config(
        controller=controller, aggregation=aggregation, steps=4, save_every=2, minibatches=2, mean_rollouts=4
    )
    train(config, tmp_path / "whole")
    rows = literal.read_log(tmp_path / "whole" / "metrics.jsonl")
    assert np.diff([0] + [row["rollouts"] for row in rows]).tolist() == [4 * 8] * 4
    for row in rows:
        counted = [(s, n) for s, n in zip(row["bin_share"], row["bin_rollouts"], strict=True) if n is not None]
        fewest = 0 if controller in ("recommended", "null") else 2  # they pass prompts over
        assert all(fewest <= n <= 12 for _, n in counted)
    stopped = tmp_path / "stopped"
    assert fork_and_die(config, stopped, lambda: die_at(trainer, "append", 7)) == signal.SIGKILL
    assert literal.read_log(stopped / "metrics.jsonl")[-1]["step"] >= 2
    train(config, stopped, resume=True)
    assert_same_run(stopped, tmp_path / "whole")


def test_every_step_draws_afresh(run_config, tmp_path, monkeypatch):
    """No step repeats another one's seed, and all follow the seed of the run."""
    seeds, draw = [], HFSampler.sample
    monkeypatch.setattr(
        HFSampler, "sample", lambda *args, seed, **kwargs: (seeds.append(seed), draw(*args, seed=seed, **kwargs))[1]
    )
    for seed in (0, 1):
        train(run_config(seed=seed), tmp_path / str(seed))
    evaluations = {draw_seed(seed, "", 0) for seed in (0, 1)}
    training = [seed for seed in seeds if seed not in evaluations]
    assert len(set(training)) == len(training) == 12


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(module, name: str, call: int, first=lambda *args: None) -> None:
    """The `call`-th call (0, 1, ...) of module.name does `first` with its arguments, then kills the process."""
    original, calls = getattr(module, name), iter(range(10**9))

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            first(*args)
            die()
        return original(*args, **kwargs)

    setattr(module, name, wrapped)


def fork_and_die(config, out: Path, sabotage=lambda: None, after: float | None = None, resume: bool = True) -> int:
    """Train in a child that is killed by its sabotage or `after` seconds; the signal that ended it (0: none)."""
    child = os.fork()
    if child == 0:
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- the child ends here
            sabotage()
            train(config, out, resume=resume)
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def half_a_line(path, row) -> None:
    """A log line cut off inside a character of several bytes."""
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "completion": "' + "é".encode()[:1])


def half_a_file(_, path) -> None:
    Path(path).write_bytes(b"half")


def one_file(folder, *_) -> None:
    """Delete one file of a folder, as rmtree does first."""
    next(path for path in sorted(Path(folder).rglob("*")) if path.is_file()).unlink()


@pytest.mark.parametrize(
    "sabotage",
    [
        pytest.param(lambda: die_at(checkpoint.os, "replace", 0), id="before-config.json"),
        pytest.param(lambda: die_at(trainer, "append", 0), id="before-the-first-evaluation"),
        pytest.param(lambda: die_at(trainer, "append", 2), id="before-any-checkpoint"),
        pytest.param(lambda: die_at(trainer, "append", 7, half_a_line), id="half-a-line"),
        pytest.param(lambda: die_at(trainer, "append", 8), id="between-two-logs"),
        pytest.param(lambda: die_at(checkpoint, "save_file", 0, half_a_file), id="first-checkpoint-half-written"),
        pytest.param(lambda: die_at(checkpoint, "save_file", 1, half_a_file), id="second-checkpoint-half-written"),
        pytest.param(lambda: die_at(checkpoint.os, "replace", 2), id="before-a-checkpoint-is-renamed"),
        pytest.param(lambda: die_at(checkpoint, "_checkpoints", 2), id="after-a-checkpoint-is-renamed"),
        pytest.param(lambda: die_at(trainer, "save_checkpoint", 2), id="before-the-last-checkpoint"),
    ],
)
def test_a_run_killed_at_a_bad_moment_and_resumed_equals_an_uninterrupted_one(run_config, finished, tmp_path, sabotage):
    """Bit for bit: logs, weights, optimizer, controller, and no scraps left."""
    out = tmp_path / "killed"
    assert fork_and_die(run_config(), out, sabotage) == signal.SIGKILL
    train(run_config(), out, resume=True)
    assert_same_run(out, finished)


def test_a_kill_before_the_old_checkpoint_is_dropped_leaves_no_third_one(run_config, finished, tmp_path):
    """Also after the last step, when no later save would drop it."""
    out = tmp_path / "killed"

    def sabotage() -> None:
        rotate = checkpoint._rotate
        checkpoint._rotate = lambda folder: die() if (folder / "checkpoint-000006").exists() else rotate(folder)

    assert fork_and_die(run_config(), out, sabotage) == signal.SIGKILL
    assert len(list(out.glob("checkpoint-*"))) == 3
    train(run_config(), out, resume=True)
    assert_same_run(out, finished)


def test_a_kill_while_an_old_checkpoint_is_deleted_is_survived(run_config, finished, tmp_path):
    """The half-deleted checkpoint is neither taken for a damaged one nor left behind."""

    def sabotage() -> None:
        whole = checkpoint.shutil.rmtree

        def rmtree(folder, *args, **kwargs):
            if Path(folder).name == ".checkpoint-000002.tmp" and not kwargs:
                one_file(folder)
                die()
            whole(folder, *args, **kwargs)

        checkpoint.shutil.rmtree = rmtree

    out = tmp_path / "killed"
    assert fork_and_die(run_config(), out, sabotage) == signal.SIGKILL
    assert sorted(p.name for p in out.glob("*checkpoint-*")) == [
        ".checkpoint-000002.tmp",
        "checkpoint-000004",
        "checkpoint-000006",
    ]
    train(run_config(), out, resume=True)
    assert_same_run(out, finished)


@pytest.mark.parametrize(
    ("wanted", "wanted_inside"), [(6, 1), pytest.param(40, 10, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_run_killed_again_and_again_equals_an_uninterrupted_one(run_config, tmp_path, wanted, wanted_inside):
    """SIGKILLs at random moments, some of them inside a save (of every step, slowed down), each resumed until the run
    is done."""
    config = run_config(steps=8, save_every=2)
    train(config, tmp_path / "whole")

    def slow_disk() -> None:
        flush = checkpoint._flush
        checkpoint._flush = lambda path: (time.sleep(0.001), flush(path))

    start = time.perf_counter()
    assert fork_and_die(config, tmp_path / "clock", slow_disk) == 0
    seconds = time.perf_counter() - start
    rng = np.random.default_rng(0)
    kills = inside = runs = 0
    while kills < wanted or inside < wanted_inside:
        out, runs = tmp_path / f"killed-{runs}", runs + 1
        while fork_and_die(config, out, slow_disk, after=rng.uniform(0.0, 0.6) * seconds) == signal.SIGKILL:
            kills += 1
            inside += any(out.glob(".checkpoint-*.tmp"))
        assert_same_run(out, tmp_path / "whole")
    print(f"{kills} kills, {inside} inside a save, {runs} runs")


def command_line(config, tmp_path) -> list[str]:
    """Arguments of `gdro train` for a configuration; the run directory is tmp_path/command."""
    preset = tmp_path / "mine.toml"
    values = {key: value for key, value in json.loads(config.to_json()).items() if key != "preset" and value != ""}
    preset.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in values.items()), encoding="utf-8")
    return ["train", str(preset), "--out", str(tmp_path / "command")]


def wait_for(condition, child_is_alive=lambda: True) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited half a minute"
        assert child_is_alive(), "the child ended early"
        time.sleep(0.002)


@pytest.fixture
def fork_command():
    """`gdro ARGUMENTS` in a child (a fork spares the seconds of importing torch); its process id."""
    children = []

    def start(arguments: list[str], stderr: Path, sabotage=lambda: None) -> int:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                sys.stderr = stderr.open("w", buffering=1)
                sabotage()
                code = cli.main(arguments)
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
        return child

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_asked_to_stop_saves_says_so_and_goes_on_as_if_it_had_not_been(
    run_config, tmp_path, fork_command, number
):
    """Ctrl-C and SIGTERM: exit code 130 or 143 after a whole step; resumed, it equals the uninterrupted run."""
    config = run_config(steps=30, save_every=100, eval_every=5)
    train(config, tmp_path / "whole")
    arguments, out = command_line(config, tmp_path), tmp_path / "command"
    child = fork_command(arguments, tmp_path / "stderr")
    log = out / "metrics.jsonl"
    wait_for(lambda: log.is_file() and log.stat().st_size > 0)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    steps = literal.read_log(log)[-1]["step"]
    assert 0 < steps < 30
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{steps:06d}"]
    assert f"gdro: stopped after step {steps}, which is saved: --resume goes on\n" in (tmp_path / "stderr").read_text()
    train(trainer_config(arguments), out, resume=True)
    (out / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())  # they name their preset
    assert_same_end(out, tmp_path / "whole")


def trainer_config(arguments: list[str]) -> Config:
    return Config(**load_preset(arguments[1]))


def test_a_second_ctrl_c_leaves_at_once(run_config, tmp_path, fork_command):
    """Without waiting for a step that takes a minute; nothing is lost that was saved."""

    def endless_second_step() -> None:
        draw, calls = HFSampler.sample, iter(range(10**9))

        def sample(*args, **kwargs):
            if next(calls) == 2:  # after the evaluation and the first step
                (tmp_path / "sampling").touch()
                time.sleep(600)
            return draw(*args, **kwargs)

        HFSampler.sample = sample

    child = fork_command(command_line(run_config(save_every=1), tmp_path), tmp_path / "stderr", endless_second_step)
    wait_for((tmp_path / "sampling").exists)
    os.kill(child, signal.SIGINT)
    wait_for(lambda: "again: at once" in (tmp_path / "stderr").read_text())
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT
    assert checkpoint.verify_checkpoint(tmp_path / "command" / "checkpoint-000001") == ""


def test_a_run_leaves_the_signal_handlers_as_they_were(run_config, tmp_path, monkeypatch):
    """Also when it fails; and in another thread, where none can be set, it runs all the same."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []
    summarise = trainer.summarise
    spied = lambda *args: (seen.append(signal.getsignal(signal.SIGINT)), summarise(*args))[1]  # noqa: E731
    monkeypatch.setattr(trainer, "summarise", spied)
    train(run_config(steps=1), tmp_path / "run")
    assert seen[0] is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.setattr(trainer, "summarise", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(run_config(), tmp_path / "fails")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.setattr(trainer, "summarise", summarise)
    thread = threading.Thread(target=train, args=(run_config(), tmp_path / "thread"))
    thread.start()
    thread.join()
    assert checkpoint.verify_checkpoint(tmp_path / "thread" / "checkpoint-000006") == ""


@pytest.mark.slow
def test_the_command_stopped_killed_and_resumed_equals_an_uninterrupted_one(run_config, tmp_path):
    """`python -m gdro_llm.cli train` in its own process: Ctrl-C, then SIGKILL, each resumed; and a report."""
    config = run_config(steps=60, save_every=7, eval_every=20)
    train(config, tmp_path / "whole")
    arguments, out = command_line(config, tmp_path), tmp_path / "command"
    command = [sys.executable, "-m", "gdro_llm.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    log, steps = out / "metrics.jsonl", 0
    for extra, number, code in ([], signal.SIGINT, 130), (["--resume"], signal.SIGKILL, -9):
        process = subprocess.Popen(
            [*command, *extra], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(
            lambda steps=steps: log.is_file() and log.read_bytes().count(b"\n") > steps + 5,
            lambda process=process: process.poll() is None,
        )
        process.send_signal(number)
        assert process.wait() == code
        steps = log.read_bytes().count(b"\n")
        assert steps < 60
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").is_file()
    (out / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())  # they name their preset
    assert_same_end(out, tmp_path / "whole")


def test_resuming_a_finished_run_leaves_it_as_it_is(run_config, finished):
    """Not a byte changes."""
    before = files(finished)
    train(run_config(), finished, resume=True)
    assert files(finished) == before


def test_resume_without_a_run_starts_one(run_config, finished, tmp_path):
    """Also in an empty folder, so that one command serves a job that is restarted."""
    (tmp_path / "empty").mkdir()
    train(run_config(), tmp_path / "empty", resume=True)
    assert_same_run(tmp_path / "empty", finished)


def test_a_run_is_neither_overwritten_nor_continued_by_accident(run_config, finished, tmp_path, tiny_model):
    """Without a flag, with another configuration, in a folder that is no run, in a file: refused, nothing touched."""
    before = files(finished)
    with pytest.raises(UsageError, match="--resume continues it, --fresh"):
        train(run_config(), finished)
    with pytest.raises(UsageError, match=r"seed 0 -> 5.*choose another --out"):
        train(run_config(seed=5), finished, resume=True)
    assert files(finished) == before
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("all my work")
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)  # has a config.json, too
    for folder in (other, model, other / "chapter.txt"):
        for flags in ({}, {"resume": True}, {"fresh": True}):
            with pytest.raises(UsageError, match="not a run directory"):
                train(run_config(), folder, **flags)
    assert files(model) == files(tiny_model)
    assert (other / "chapter.txt").read_text() == "all my work"


def test_fresh_starts_over(run_config, finished, tmp_path):
    """Under another configuration, too; nothing of the earlier run stays."""
    (finished / "report.html").write_text("old")
    train(run_config(seed=5), finished, fresh=True)
    train(run_config(seed=5), tmp_path / "five")
    assert_same_run(finished, tmp_path / "five")


def test_a_mistake_leaves_no_run_directory_and_deletes_none(run_config, finished, tmp_path):
    """A model that cannot be loaded is found out before --out is touched, also with --fresh."""
    wrong = {"model": str(tmp_path / "nothing")}
    with pytest.raises(UsageError):
        train(run_config(**wrong), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    before = files(finished)
    with pytest.raises(UsageError):
        train(run_config(**wrong), finished, fresh=True)
    assert files(finished) == before


def test_logged_texts_may_hold_any_character(run_config, tmp_path):
    """Line separators of Unicode inside a text end no line when a log is cut back, and what is no number is refused."""
    log = tmp_path / "samples.jsonl"
    rows = [{"step": i, "completion": "a\u2028b\x85c\x0cd\re\nf"} for i in (1, 2, 3)]
    for row in rows[:2]:
        checkpoint.append(log, row)
    length = log.stat().st_size
    checkpoint.append(log, rows[2])
    checkpoint._cut(log, length)
    assert literal.read_log(log) == rows[:2]
    with pytest.raises(UsageError, match=r"step 3: loss = nan: not a number to log; lower --learning-rate"):
        checkpoint.append(log, {"step": 3, "loss": float("nan")})
    assert literal.read_log(log) == rows[:2]


def test_the_logged_sample_has_its_own_prompt_and_reward(run_config, finished):
    """Grading a logged completion against the problem of its id gives the logged reward."""
    problems = {problem.id: problem for problem in load_problems(run_config())[0]}
    rows = literal.read_log(finished / "samples.jsonl")
    for row in rows:
        assert row["prompt"] == problems[row["id"]].prompt
        assert row["reward"] == grade_exact(problems[row["id"]], row["completion"])


@pytest.mark.parametrize(("pause", "reports"), [(-1.0, 3), (60.0, 0)])
def test_a_report_follows_evaluations_but_not_too_often(run_config, tmp_path, monkeypatch, pause, reports):
    """It gets the run directory, whose logs hold the evaluation already; without one the run writes none."""
    monkeypatch.setattr(trainer, "REPORT_EVERY", pause)
    steps = []

    def report(out):
        assert out == tmp_path / "run"
        steps.append(literal.read_log(out / "evaluations.jsonl")[-1]["step"])

    config = run_config(steps=5, eval_every=2, save_every=5)
    train(config, tmp_path / "run", report=report)
    assert steps == [2, 4, 5][:reports]
    train(config, tmp_path / "quiet")
    assert not list((tmp_path / "quiet").glob("report*"))
