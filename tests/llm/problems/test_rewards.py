"""Graders: what is right, what is nearly right, and completions that hang or kill the computer algebra."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pebble.pool.channel import WorkerChannel

from gdro_llm.config import Config, UsageError
from gdro_llm.problems import rewards as grading
from gdro_llm.problems.cells import cell_problems
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.rewards import (
    GRADERS,
    Grader,
    GradingError,
    answer_text,
    compare_boxed,
    last_boxed,
    verify_math,
)

SETS = {  # file: problems in the fast tests
    "math500": 25,
    "minerva_math": 25,
    "olympiadbench": 25,
    "math_train": 25,
    "dapo_math_en": 200,
    "gsm8k_train": 100,
    "gsm8k_test": 100,
    "aime24": 30,
    "aime25": 30,
    "amc23": 40,
}
needs_data = pytest.mark.skipif("GDRO_DATA_DIR" not in os.environ, reason="GDRO_DATA_DIR names no benchmark files")


def math_config(**overrides) -> Config:
    return Config(**{"grader": "math", "grade_workers": 1, "grade_seconds": 20.0, **overrides})


@pytest.fixture(scope="module")
def grader():
    with Grader(math_config()) as opened:
        yield opened


def gold(answer: str, name: str = "a") -> Problem:
    return Problem(name, "question", answer)


def test_an_answer_of_a_cell_is_graded_correct_and_its_neighbours_are_not():
    """All accepted completions and only those."""
    for problem in cell_problems("test", {"easy": 5, "middle": 5, "hard": 5}, seed=1):
        for text in problem.accepted:
            assert GRADERS["exact"](problem, text) == 1.0
            for wrong in (text + " ", text[:-1], text + "0", "", text + "<eos>", "?" + text):
                assert GRADERS["exact"](problem, wrong) == 0.0


def test_accepted_completions_stand_in_for_the_answer():
    """With grader exact, to the letter; their gold answer need not be one of them. Others read the answer alone."""
    problem = Problem("a", "3 + 4 =", "7", accepted=(" 7", " seven"))
    assert [GRADERS["exact"](problem, text) for text in (" 7", " seven", "7", " 7 ")] == [1, 1, 0, 0]
    assert [GRADERS["number"](problem, text) for text in (" 7", " seven", "7", "8")] == [1, 0, 1, 0]
    with Grader(Config()) as grader:
        grader.check_gold([problem])


TABLE = [  # grader, gold answer, right completions, wrong completions
    ("exact", "36", ["36"], ["36 ", " 36", "036", "36.0", "", "336", "3", "36\n"]),
    ("number", "36", ["36", " 36", "36.", "36\n\nQ: 1 + 1", "+36", "36.0", "036"], ["37", "-36", "36 apples", "x\n36"]),
    ("number", "36", [], ["", "\n", "36..", "3,6", "36,", ",36", "36.5", "3 6", "thirty-six", "36+0", "nan", "inf"]),
    ("number", "1234567", ["1234567", "1,234,567", "1,234,567.00"], ["1,23,4567", "1,234", "1 234 567", "12,34567"]),
    ("number", "-5", ["-5", "-5.", " -5.0"], ["5", "- 5", "--5", "−5"]),
    ("number", "0.5", ["0.5", "0.50"], [".5 or so", "1/2", "0,5", "5"]),
    ("number", "9007199254740993", ["9007199254740993"], ["9007199254740992", "9007199254740994"]),
    ("number", "12", ["12"], ["1,2", "١٢", "1e1", "12e0"]),
    ("number", "no number", [], ["no number", "", "0"]),
    (
        "math",
        r"\frac{1}{2}",
        [r"\boxed{0.5}", r"\boxed{\frac12}", r"\boxed{1/2}", r"so $\frac{2}{4}$", r"\boxed{\dfrac{1}{2}}"],
        [r"\boxed{2}", r"\boxed{}", "", r"\boxed{-\frac12}", r"\boxed{0.51}"],
    ),
    ("math", "36", [r"The answer is \boxed{36}", "36", r"\boxed{1}? No. So it is \boxed{36}."], ["63", r"\boxed{}"]),
    ("math", "36", [r"\boxed{36}. Or $\boxed{ 36 }$", r"\boxed{36\text{ cm}}", r"\boxed{\$36.00}"], [r"\boxed{3 6}"]),
    ("math", "36", [], [r"\boxed{36}? No. So it is \boxed{1}.", r"\boxed{36} or \boxed{1}", r"36. \boxed{1}"]),
    ("math", "36", [r"<think>\boxed{1}</think> 36"], [r"<think>\boxed{36}</think> 1", r"<think>\boxed{36}</think>"]),
    ("math", "36", [r"\boxed{36}" + 10_000 * " and so on"], [r"36 \boxed{1}" + 10_000 * " and so on"]),
    ("math", "x^2+1", [r"\boxed{1+x^2}", r"\boxed{y=x^2+1}"], [r"\boxed{x^2-1}", r"\boxed{x+1}", r"\boxed{-x^2-1}"]),
    ("math", "(3, 4)", [r"\boxed{(3,4)}", r"\boxed{\left( 3,4 \right)}"], [r"\boxed{(4,3)}", r"\boxed{3}"]),
    ("math", "[0, 1)", [r"\boxed{[0,1)}"], [r"\boxed{(0,1)}", r"\boxed{[0,1]}", r"\boxed{[0,2)}"]),
    ("math", "1, 2, 3", [r"\boxed{3,1,2}", r"\boxed{\{1,2,3\}}"], [r"\boxed{1,2}", r"\boxed{1,2,4}"]),
    ("math", r"\text{(B)}", [r"\boxed{B}", r"\boxed{\text{B}}", r"\boxed{(B)}"], [r"\boxed{C}", r"\boxed{A}"]),
    ("math", r"\text{Evelyn}", [r"\boxed{Evelyn}", r"\boxed{\text{Evelyn}}"], [r"\boxed{Alice}", r"\boxed{\text{E}}"]),
    ("math", r"10\%", [r"\boxed{10\%}", r"\boxed{0.1}"], [r"\boxed{11\%}", r"\boxed{0.2}"]),
    ("math", r"90^\circ", [r"\boxed{90}", r"\boxed{90^{\circ}}"], [r"\boxed{91^\circ}"]),
    ("math", "1,200", [r"\boxed{1200}", r"\boxed{1{,}200}", r"\boxed{1,200}"], [r"\boxed{1}", r"\boxed{12000}"]),
    # numbers that rounding to six decimals, or Euler's number in 4.5e33, would confuse
    ("math", "4.5e33", [r"\boxed{4.5\times 10^{33}}", r"\boxed{4.5e33}", r"$4.5 \cdot 10^{33}$"], [r"\boxed{4.5e34}"]),
    (
        "math",
        "1.2e-7",
        [r"\boxed{1.2 \times 10^{-7}}", r"\boxed{0.00000012}"],
        [r"\boxed{1e-7}", r"$1 \times 10^{-7}$"],
    ),
    ("math", ".0000012", ["$0.0000012$"], ["$0.000001$", r"\boxed{0.000001}"]),
    ("math", "0.333333", [r"\boxed{\frac{1}{3}}", r"\boxed{0.333333}"], [r"\boxed{0.3333}", r"\boxed{-\frac{1}{3}}"]),
    ("math", "12345678901234567890", [r"\boxed{12345678901234567890}"], [r"\boxed{12345678901234567891}"]),
    # formulas of which math-verify alone keeps the last number only
    ("math", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", [r"\boxed{\frac{E_1+2E_2}{3}}"], [r"\boxed{\frac{2}{3}}"]),
    ("math", r"2007 + \frac\pi 2", [r"\boxed{\frac{\pi}{2}+2007}"], [r"\boxed{2}", r"\boxed{2007}"]),
    ("math", "np.arcsin(10/13)", [r"\boxed{np.arcsin(10/13)}"], [r"\boxed{10/13}", r"\boxed{\frac{10}{13}}"]),
    ("math", "f(x)=a x, where $a>0$", [r"\boxed{f(x)=a x, where a>0}"], [r"\boxed{0}", r"\boxed{a x}"]),
    ("math", "I(0) e^{-t}\n", [r"\boxed{I(0) e^{-t}}"], [r"\boxed{I(0) e^{t}}", r"\boxed{0}"]),
]


@pytest.mark.parametrize(("name", "answer", "right", "wrong"), TABLE)
def test_graders(name, answer, right, wrong):
    """Right completions in their usual dress give 1.0, near misses 0.0, and nothing raises."""
    rewards = {text: GRADERS[name](gold(answer), text) for text in right + wrong}
    assert rewards == dict.fromkeys(right, 1.0) | dict.fromkeys(wrong, 0.0)
    assert all(type(value) is float for value in rewards.values())


def test_a_grader_in_workers_gives_what_its_function_gives(grader):
    """In order, for all the rows of the table at once."""
    rows = [(gold(answer), text) for name, answer, *texts in TABLE if name == "math" for part in texts for text in part]
    problems, texts = (list(part) for part in zip(*rows, strict=True))
    rewards = grader.grade(problems, texts)
    assert rewards.tolist() == [GRADERS["math"](problem, text) for problem, text in rows]
    assert rewards.dtype == float
    assert grader.grade([], []).shape == (0,)


NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.decimals(-1000, 1000, places=3).map(str),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda ab: f"\\frac{{{ab[0]}}}{{{ab[1]}}}"),
)


@given(NUMBERS, NUMBERS)
def test_the_short_cut_for_numbers_agrees_with_math_verify(answer, other):
    """Whatever is decided without the computer algebra is decided as by it."""
    for text in (f"\\boxed{{{answer}}}", f"\\boxed{{{other}}}"):
        verdict = compare_boxed(answer, text)
        assert verdict is None or verdict == verify_math(answer, text)


def test_the_last_box():
    """With or without braces; an unclosed one is none."""
    assert last_boxed(r"\boxed{1} and \boxed{\frac{1}{\{2\}}}.") == r"\frac{1}{\{2\}}"
    assert last_boxed(r"so $\boxed 5$") == "5"
    assert last_boxed(r"\fbox{x}") == "x"
    assert last_boxed(r"\boxed{1") is None


def burn(seconds: float) -> None:
    """Use so much CPU time, however long that takes."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def misbehave(answer: str, completion: str) -> float:
    """Stands in for a verifier that fails in every way; otherwise right if the completion is the answer."""
    deed, _, file = completion.partition(" ")
    if deed == "hang":
        burn(1e9)
    if deed == "abort":
        os.abort()
    if deed == "eat":
        return float(len(bytearray(64 * 2**30)))
    if deed == "raise":
        raise ZeroDivisionError("1/0")
    if deed == "sleep":
        time.sleep(1e9)
    if deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "stick":  # as a worker that is killed while it takes a task: no other worker gets one any more
        next(x for x in gc.get_objects() if isinstance(x, WorkerChannel)).mutex.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    if deed.startswith("once-") and not Path(file).exists():
        Path(file).touch()
        misbehave(answer, deed.removeprefix("once-"))
    if deed == "meet":  # files "mine:theirs": wait for the other one, then hang
        mine, theirs = map(Path, file.split(":"))
        mine.touch()
        while not theirs.exists():
            time.sleep(0.01)
        burn(1e9)
    return float(deed == answer or deed.startswith("once-"))


def test_a_completion_that_hangs_or_kills_its_worker_costs_that_sample_alone(capsys):
    """One zero and one line each, in bounded time; the others keep their rewards and places, then and later."""
    texts = ["yes", "hang", "no", "abort", "yes", "eat", "yes", "no", "yes\x1b[2J", "hang"]
    problems = [gold("yes", f"id{i}") for i in range(len(texts))]
    with Grader(math_config(grade_workers=2, grade_seconds=0.5), misbehave) as grader:
        start = time.perf_counter()
        assert grader.grade(problems, texts).tolist() == [1, 0, 0, 0, 1, 0, 1, 0, 0, 0]
        assert time.perf_counter() - start < 120, "a hang must end"  # 2 s on an idle machine
        assert grader.over_limit == 4
        lines = capsys.readouterr().out.splitlines()
        for line, (i, text, why) in zip(
            lines,
            [
                (1, "hang", "took over 0.5 s of CPU time (2 completions)"),
                (3, "abort", "crashed (SIGABRT)"),
                (5, "eat", "took over 4 GiB of memory"),
            ],
            strict=True,
        ):
            assert line == f"grading id{i} {why}, reward 0: {text!r}"
        assert grader.grade(problems[:2], ["no", "yes"]).tolist() == [0, 1]
        assert grader.over_limit == 0


TOWER = r"\boxed{9^{9^{9^{9}}}}"  # math-verify never ends


def test_an_endless_completion_costs_its_limit_once(capsys):
    """512 of them, each after other reasoning, take one limit; right answers among them keep their reward."""
    texts = [f"<think>{i}</think> Since $x = {i}$, it is {TOWER}." for i in range(512)]
    texts[100] = r"\boxed{\pi+\pi}"
    with Grader(math_config(grade_seconds=0.5)) as grader:
        start = time.perf_counter()
        rewards = grader.grade([gold(r"2\pi")] * 512, texts)
        assert time.perf_counter() - start < 60  # 256 s if each were graded
        assert rewards.tolist() == [float(i == 100) for i in range(512)]
        assert grader.over_limit == 511
        assert "(511 completions)" in capsys.readouterr().out
        assert grader.grade([gold(r"\pi+\pi"), gold("x")], [r"$2\pi$", "$2x$"]).tolist() == [1, 0]  # and goes on


def test_hanging_completions_share_the_workers(tmp_path):
    """Each waits for the other one to hang: one after the other, the first would wait for ever."""
    a, b = tmp_path / "a", tmp_path / "b"
    with Grader(math_config(grade_workers=2, grade_seconds=0.5), misbehave) as grader:
        assert grader.grade([gold("x")] * 3, [f"meet {a}:{b}", f"meet {b}:{a}", "x"]).tolist() == [0, 0, 1]
        assert grader.over_limit == 2


def test_graded_once_for_each_gold_answer_and_text(tmp_path):
    """The same text is another question for another gold answer; the order of the rows does not matter."""
    log = tmp_path / "log"
    rows = [("2x", "$x+x$"), ("3x", "$x+x$"), ("2x", "$x+x$"), ("2x", "$3x$"), ("3x", "$3x$"), ("3x", "$x+x$")]
    with Grader(math_config(grade_workers=2), partial(noted, str(log))) as grader:
        rewards = grader.grade([gold(answer) for answer, _ in rows], [text for _, text in rows])
    assert rewards.tolist() == [1, 0, 1, 0, 1, 0]
    assert sorted(log.read_text().splitlines()) == sorted(f"{a} {t}" for a, t in set(rows))


def noted(log: str, answer: str, text: str) -> float:
    """`verify_math`, with a line in a file."""
    with open(log, "a") as file:
        file.write(f"{answer} {text}\n")
    return verify_math(answer, text)


def slow_but_right(answer: str, text: str) -> float:
    """0.4 s of CPU time on the machine's first core; the wall time that took is noted in a file."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    start = time.monotonic()
    burn(0.4)
    Path(text).write_text(str(time.monotonic() - start))
    return 1.0


HOG = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"


def test_a_busy_machine_turns_no_right_answer_wrong(tmp_path):
    """An answer that needs more wall time than its limit, for a crowd on its core, is right within its CPU time."""
    hogs = [subprocess.Popen([sys.executable, "-c", HOG]) for _ in range(3)]
    try:
        with Grader(math_config(grade_seconds=0.8), slow_but_right) as grader:
            assert grader.grade([gold("x")], [str(tmp_path / "time")]).tolist() == [1]
            assert grader.over_limit == 0
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert float((tmp_path / "time").read_text()) > 0.9, "the machine was not busy enough for a test"


def test_an_error_of_the_machine_is_no_wrong_answer(tmp_path):
    """Graded once more, it changes nothing; the second time it is an error, and the next batch is graded."""
    with Grader(math_config(grade_seconds=0.05), misbehave) as grader:
        texts = ["x", *(f"once-{deed} {tmp_path / deed}" for deed in ("raise", "die", "sleep")), "y", "hang"]
        assert grader.grade([gold("x")] * 6, texts).tolist() == [1, 1, 1, 1, 0, 0]
        assert grader.over_limit == 1
        for text, why in [
            ("raise", r"grading a failed \(ZeroDivisionError\('1/0'\)\): 'raise'"),
            ("die", r"grading a ended its worker \(exit code -9;"),
            ("sleep", r"grading a took 1 s and less than 0.05 s of CPU time: the grader waits"),
        ]:
            with pytest.raises(GradingError, match=why):
                grader.grade([gold("x")] * 2, ["x", text])
            assert grader.grade([gold("x")], ["x"]).tolist() == [1]


@pytest.mark.slow
def test_a_pool_that_is_stuck_is_opened_anew(tmp_path, monkeypatch):
    """Its workers wait for a lock that nobody returns; no answer is wrong for it."""
    with Grader(math_config(grade_seconds=0.1), misbehave) as grader:
        assert grader.grade([gold("x")], ["x"]).tolist() == [1]
        monkeypatch.setattr(grading, "STARTING", 15.0)
        texts = ["x", f"once-stick {tmp_path / 'done'}", "y", "x "]
        assert grader.grade([gold("x")] * 4, texts).tolist() == [1, 1, 0, 1]


def test_a_script_without_a_main_guard_gets_no_wrong_rewards(tmp_path):
    """Its workers start it anew and end; right answers must not become 0."""
    script = tmp_path / "script.py"
    script.write_text(ORPHAN.replace('if __name__ == "__main__":', "if True:"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "GradingError: grading a failed, because workers end before they grade" in done.stderr
    assert 'if __name__ == "__main__":' in done.stderr


def test_what_a_grader_reads_is_the_box_where_there_is_one():
    """Where boxes are several, none or open, or what follows may change the meaning, it reads all near the end."""
    assert answer_text(r"<think>\boxed{1}</think> As $y=1$, $\boxed { \frac{x}{\{2\}} }$; done.") == (
        r"\boxed{ \frac{x}{\{2\}} }"
    )
    for text in (
        r"\boxed{1} or \boxed{2}",
        r"\fbox{1} \boxed{2}",
        "12",
        r"\boxed{ }",
        r"\boxed{1",
        r"$\boxed{10}$ %, not 10 or \{10\} or {10}",
        r"\boxed{10} percent",
        r"\boxed{x}. The final answer is $y$. I hope it is correct.",
    ):
        assert answer_text(text) == text
    assert GRADERS["math"](gold("x+1"), r"$x+1$, or \boxed{\frac{}}") == 0.0


@pytest.mark.parametrize("answer", [answer for name, answer, *_ in TABLE if name == "math"])
def test_math_verify_takes_the_box_alone_for_the_whole(answer, monkeypatch):
    """What `answer_text` leaves out changes no verdict."""
    contents = dict.fromkeys([answer, *(other for name, other, *_ in TABLE if name == "math")][:12])
    texts = [
        around.replace("%s", content)
        for content in contents
        for around in ("Since $y=2$, it is $\\boxed{%s}$.", "**Final Answer**\n\\[ t = \\boxed{%s} \\] with $t > 7$")
    ]
    assert all(len(answer_text(text)) < len(text) for text in texts)
    alone = [verify_math(answer, text) for text in texts]
    monkeypatch.setattr(grading, "answer_text", lambda text: text)
    assert alone == [verify_math(answer, text) for text in texts]


def test_a_logged_completion_cannot_write_control_codes(capsys):
    """It is escaped and cut at 100 characters."""
    evil = "\x1b[2J\r\u202e" + "x" * 500 + "\\boxed{9^{9^{9^{9}}}}"
    with Grader(math_config(grade_seconds=0.5)) as grader:
        assert grader.grade([gold("12", "\x1b[2J")], [evil]).tolist() == [0.0]
    out = capsys.readouterr().out
    assert out.startswith(r"grading \x1b[2J ")
    assert out.endswith("reward 0: " + ascii(evil[:100]) + "\n")


BOMBS = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{\prod_{n=1}^{10^9} n}",
    r"\boxed{" + r"\frac{1}{" * 400 + "2" + "}" * 400 + "}",
    r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    r"\boxed{" * 2000,
    "$" * 5000,
    "1," * 5000,
    "\\boxed{" + "1" * 100_000 + "}",
    "\\boxed{1" + " " * 100_000 + "2}",
    "\x00\ud7ff\\boxed{\x00}",
]


def test_completions_that_break_computer_algebra_are_wrong_in_bounded_time(grader, capsys):
    """Towers of powers, endless products, deep nesting, long digits: zero, and the next completion is graded."""
    with Grader(math_config(grade_workers=2, grade_seconds=0.7)) as quick:
        start = time.perf_counter()
        texts = [text for bomb in BOMBS for text in (bomb, r"\boxed{\pi+\pi}")]
        rewards = quick.grade([gold(r"2\pi")] * len(texts), texts)
        assert time.perf_counter() - start < 20
    assert rewards.tolist() == [0.0, 1.0] * len(BOMBS)
    assert len(capsys.readouterr().out.splitlines()) <= len(BOMBS)


ORPHAN = """
from gdro_llm.config import Config
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.rewards import Grader
if __name__ == "__main__":
    with Grader(Config(grader="math", grade_workers=1, grade_seconds=0.5)) as grader:
        grader.grade([Problem("a", "q", "\\\\pi")] * 2, ["\\\\boxed{y}"] * 2)
        print("ready", flush=True)
        grader.grade([Problem("a", "q", "\\\\pi")], ["\\\\boxed{9^{9^{9^{9}}}}"])
"""


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    """SIGKILL in the middle of an endless completion: nothing is left a few seconds later."""
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        time.sleep(0.3)
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(signal.SIGKILL)
    assert len(children) >= 2
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_workers_ignore_an_interrupt(grader):
    """Ctrl-C goes to all processes of a terminal; the parent decides when to stop."""
    grader.grade([gold("x")], ["$y$"])
    for process in psutil.Process().children(recursive=True):
        if process.status() != psutil.STATUS_ZOMBIE:
            process.send_signal(signal.SIGINT)
    assert grader.grade([gold("2x")], ["$x+x$"]).tolist() == [1.0]


def test_gold_answers_are_checked(grader):
    """A gold answer that no completion can match is named, with its problem; whole numbers take no time."""
    fine = ["12", "", r"\frac{1}{2}", r"\text{even}", "[0,1)", "3 \\text{ cm}"]
    grader.check_gold([gold(answer) for answer in fine if answer])
    with pytest.raises(UsageError, match=r"gold answers of 1 problems .*frac\{1.* of bad; "):
        grader.check_gold([gold("12"), gold(r"\frac{1}{", "bad"), gold("13")])
    start = time.perf_counter()
    grader.check_gold([gold(str(i)) for i in range(14_000)])
    assert time.perf_counter() - start < 5
    with Grader(Config(grader="number")) as numbers:
        numbers.check_gold([gold("12")])
        with pytest.raises(UsageError, match=r"grader 'number' .*'x' of bad"):
            numbers.check_gold([gold("12"), gold("x", "bad")])


def test_a_batch_is_graded_in_seconds(grader):
    """1,024 completions: mostly numbers in boxes, a fifth that need the computer algebra, on one worker."""
    answers = ["36", r"\frac{3}{4}", r"2\sqrt{3}", "x^2+1", "17"]
    forms = [r"so \boxed{36}", r"\boxed{0.75}", r"\boxed{\sqrt{12}}", r"\boxed{1+x^2}", "\\boxed{18}"]
    rows = np.arange(1024) % 5
    start = time.perf_counter()
    rewards = grader.grade([gold(answers[i]) for i in rows], ["Thus " * 2000 + forms[i] for i in rows])
    assert time.perf_counter() - start < 10
    assert rewards.tolist() == [float(i != 4) for i in rows]


def benchmark(name: str, count: int | None) -> list[Problem]:
    text = (Path(os.environ["GDRO_DATA_DIR"]) / f"{name}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    distinct = list({row["answer"]: Problem(row["id"], row["problem"], row["answer"]) for row in rows}.values())
    return distinct if count is None else random.Random(0).sample(distinct, min(count, len(distinct)))


NO_FORMULA = {"np.arcsin(10/13)", "MR=SRMC", "SRAC=LRAC", "SRMC=LRMC"}  # right in a box only


def in_formats(answer: str) -> list[str]:
    plain = answer.replace("\\$", "USD").replace("$", "").replace("USD", "\\$").strip()
    formula = answer not in NO_FORMULA and " where " not in answer
    return [
        f"We add both sides, so the answer is \\boxed{{{answer}}}.",
        f"Therefore, the answer is ${plain}$." if formula else f"$\\boxed{{{plain}}}$",
        f"<think>Is it \\boxed{{31337}}?</think>\n\n**Answer**\n\\[ \\boxed{{ {plain} }} \\]",
    ]


def near_misses(answer: str, other: str) -> list[str]:
    wrong = [f"\\boxed{{{other}}}", "\\boxed{31337}", "\\boxed{}", "\\boxed{\\text{no}}"]
    try:
        value = Fraction(answer.replace(",", ""))
    except ValueError:
        return wrong
    shown = [value + 1, -value] if abs(value) < 10**12 else []  # above, one more is the same in floating point
    if "e" in answer.lower() or "." in answer:
        shown.append(value * Fraction(101, 100))
    return wrong + [
        f"\\boxed{{{float(v)!r}}}" if v.denominator > 1 else f"The answer is ${v}$." for v in shown if v != value
    ]


def assert_gold_is_right_and_near_misses_wrong(grader, problems):
    rows = [(p, text, 1.0) for p in problems for text in in_formats(p.answer)]
    rows += [
        (p, text, 0.0)
        for p, other in zip(problems, problems[1:] + problems[:1], strict=True)
        for text in near_misses(p.answer, other.answer)
        if p.answer not in text
    ]
    rewards = grader.grade([p for p, _, _ in rows], [text for _, text, _ in rows])
    failed = [(p.answer, text) for (p, text, right), reward in zip(rows, rewards, strict=True) if reward != right]
    assert not failed, failed[:10]
    grader.check_gold(problems)


@needs_data
@pytest.mark.parametrize("name", SETS)
def test_gold_answers_of_benchmarks_grade_as_correct(grader, name):
    """In several formats; the next problem's answer, one more, the negative, an empty box and words are wrong."""
    assert_gold_is_right_and_near_misses_wrong(grader, benchmark(name, SETS[name]))


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", SETS)
def test_all_gold_answers_of_benchmarks_grade_as_correct(grader, name):
    """The same with every distinct answer of every set."""
    assert_gold_is_right_and_near_misses_wrong(grader, benchmark(name, None))
