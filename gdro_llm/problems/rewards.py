r"""Is a completion correct? Graders take problems and the texts of completions and return 1.0 or 0.0.

`exact` and `number` compare texts and numbers. `math` accepts every mathematically equal form of the gold answer, in
three steps; the first step that decides counts:

1. What follows the last </think> is the answer; if it has a \boxed{}, the content of the last one.
2. The content of a single box is compared as text (spacing, \left, \text, dollar signs aside) and as a number.
3. Anything else goes to math-verify (LaTeX, sets, intervals, matrices, units, percent; without a box the last formula).
   Departs: numbers below .01 must also agree to four digits, since math-verify rounds to six decimals and takes 1.2e-7
   for 1e-7; "6.1e-7" is read as a power of ten, not as Euler's number.

Step 3 runs a computer algebra system on whatever a language model wrote: some completions take for ever or all memory.
It runs in worker processes, once for each distinct pair of gold answer and `answer_text` in a batch. An answer that
needs more than `grade_seconds` of CPU time or MEMORY_LIMIT, or crashes its worker, is wrong and counted. CPU time, so
that a busy machine changes no grade. Everything else that can go wrong (the far larger wall limit, which only a
starved machine or a grader that waits can reach; a worker that is killed; a broken pool; an exception) is no fault of
the answer: it is graded once more, alone, and then a `GradingError` ends the batch.

Linux only: macOS does not bound the address space, Windows has neither these timers nor a fork server.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

import numpy as np
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from gdro_llm.config import Config, UsageError, printable
from gdro_llm.problems.problem import Problem

MEMORY_LIMIT = 4 * 2**30  # address space of a worker [bytes]
WALL_FACTOR = 20  # wall limit over CPU limit
STARTING = 60.0  # a worker has started, or the pool is stuck [s]
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE)  # big numbers, deep nesting: of the answer
BEFORE_BOX, AFTER_BOX = 1000, 4000  # what math-verify sees of a long completion [characters]


def grade_exact(problem: Problem, completion: str) -> float:
    """The completion is one of the accepted ones (or the answer, where none are listed), to the letter."""
    return float(completion in problem.correct)


def grade_number(problem: Problem, completion: str) -> float:
    """The first line of the completion is the answer as a number, and nothing else but blanks, commas, a full stop."""
    lines = completion.strip().splitlines()
    return float(bool(lines) and _decimal(lines[0]) == _decimal(problem.answer) is not None)


def grade_math(problem: Problem, completion: str) -> float:
    r"""The answer is mathematically equal to the gold answer, in this process and without bounds on time or memory.

    Of several \boxed{} the last counts; where they are close together ("\boxed{1} or \boxed{2}") they are one set.
    """
    verdict = compare_boxed(problem.answer, completion)
    return verify_math(problem.answer, completion) if verdict is None else verdict


GRADERS: dict[str, Callable[[Problem, str], float]] = {
    "exact": grade_exact,
    "number": grade_number,
    "math": grade_math,
}


class GradingError(RuntimeError):
    """The machine could not grade a completion, twice; of the answer nothing is known."""


Question = tuple[str, str]  # gold answer, answer text


class Grader:
    """The grader of a configuration; a context manager, since "math" keeps worker processes.

    >>> with Grader(Config(grader="math", grade_workers=1)) as grader:
    ...     grader.grade([Problem("a", "1/2 + 1/4 = ?", "0.75")] * 2, [r"\\boxed{\\frac34}", r"\\boxed{\\frac43}"])
    array([1., 0.])
    """

    def __init__(self, config: Config, verify: Callable[[str, str], float] | None = None) -> None:
        """`verify(answer, text)` decides in the workers in place of `verify_math` (a module's function).

        What it raises, but for a MemoryError, is an error of the machine.
        """
        self._name, self._verify = config.grader, verify or verify_math
        self._cpu_seconds, self._wall_seconds = config.grade_seconds, WALL_FACTOR * config.grade_seconds
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun: they share the cores
        self._workers = config.grade_workers or max(1, len(os.sched_getaffinity(0)) // local_processes)
        self._pool = self._open_pool() if config.grader == "math" else None
        self.over_limit = 0  # completions of the last batch that are wrong because grading them broke a limit

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    def _open_pool(self) -> ProcessPool:
        # Not fork: the threads of torch and vLLM live in this process. The server imports sympy once for all.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["gdro_llm.problems.rewards", "math_verify"])
        return ProcessPool(self._workers, initializer=_prepare_worker, context=context)

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> np.ndarray:
        """Reward of each completion, (R,), in [0, 1], in bounded time; see `over_limit`.

        Args:
            problems: R problems, one a completion.
            texts: R completions.

        Raises:
            GradingError: the machine could not grade one of them.
        """
        if self._pool is None:
            grade = GRADERS[self._name]
            return np.array([grade(problem, text) for problem, text in zip(problems, texts, strict=True)], float)
        rewards_R = np.zeros(len(texts))
        rows: dict[Question, list[int]] = {}
        for r, (problem, text) in enumerate(zip(problems, texts, strict=True)):
            verdict = compare_boxed(problem.answer, text)
            if verdict is None:
                rows.setdefault((problem.answer, answer_text(text)), []).append(r)
            else:
                rewards_R[r] = verdict
        self.over_limit = 0
        outcomes = self._ask([*rows])
        for question, same in rows.items():
            outcome = outcomes[question]
            if isinstance(outcome, BaseException):
                outcome = self._ask([question])[question]  # alone, so that no neighbour takes its time or memory
            name, shown = problems[same[0]].id, ascii(texts[same[0]][:100])
            if isinstance(outcome, BaseException):
                raise GradingError(printable(f"grading {name} {self._fault(outcome)}: {shown}")) from outcome
            if isinstance(outcome, str):
                self.over_limit += len(same)
                times = f" ({len(same)} completions)" if len(same) > 1 else ""
                tqdm.write(printable(f"grading {name} {outcome}{times}, reward 0: {shown}"))
            else:
                rewards_R[same] = outcome
        return rewards_R

    def _ask(self, questions: list[Question]) -> dict[Question, float | str | BaseException]:
        """Of each question the verdict, the limit that the answer broke, or the machine's error."""
        assert self._pool is not None
        outcomes: dict[Question, float | str | BaseException] = {}
        limits = self._cpu_seconds, self._wall_seconds
        try:
            futures = [
                self._pool.schedule(_in_time, args=(self._verify, *limits, *question), timeout=self._wall_seconds)
                for question in questions
            ]
            for question, future in zip(questions, futures, strict=True):  # workers take them in this order
                error = future.exception(timeout=self._wall_seconds + STARTING)
                if isinstance(error, BrokenProcessPool):
                    raise error
                outcomes[question] = future.result() if error is None else self._limit(error) or error
        except (TimeoutError, RuntimeError) as error:  # the pool is stuck, or broken
            self._pool.stop()
            self._pool.join()
            self._pool = self._open_pool()
            lost = error if isinstance(error, TimeoutError) else BrokenProcessPool(str(error))
            outcomes = dict.fromkeys(questions, lost) | outcomes
        return outcomes

    def _limit(self, error: BaseException) -> str | None:
        """The limit that an answer broke, in words; None: the answer is not to blame."""
        ended = -error.exitcode if isinstance(error, ProcessExpired) else 0
        if ended == signal.SIGPROF:
            return f"took over {self._cpu_seconds:g} s of CPU time"
        if isinstance(error, MemoryError):
            return f"took over {MEMORY_LIMIT / 2**30:g} GiB of memory"
        return f"crashed ({signal.Signals(ended).name})" if ended in CRASHES else None

    def _fault(self, error: BaseException) -> str:
        """The machine's error, in words."""
        if isinstance(error, TimeoutError):
            return (
                f"took {self._wall_seconds:g} s and less than {self._cpu_seconds:g} s of CPU time: the grader waits, "
                "or the machine is overloaded"
            )
        if isinstance(error, BrokenProcessPool):
            return (
                "failed, because workers end before they grade anything; a script that grades must do so below "
                'if __name__ == "__main__":'
            )
        if isinstance(error, ProcessExpired):
            return f"ended its worker (exit code {error.exitcode}; -9: killed, often for want of memory)"
        return f"failed ({error!r})"

    def check_gold(self, problems: Sequence[Problem]) -> None:
        """Every gold answer, written as a model should, is correct; else a UsageError that names one which is not."""
        boxed, exact = self._name == "math", self._name == "exact"
        answers = [problem.correct[0] if exact else problem.answer for problem in problems]
        texts = [f"\\boxed{{{answer}}}" if boxed else answer for answer in answers]
        wrong = [
            problem
            for problem, text, reward in zip(problems, texts, self.grade(problems, texts), strict=True)
            if not reward or (boxed and _boxes(text) != [problem.answer])  # braces that do not match
        ]
        if wrong:
            raise UsageError(
                f"grader {self._name!r} does not take the gold answers of {len(wrong)} problems for correct, such as "
                f"{wrong[0].answer[:80]!r} of {wrong[0].id}; correct or remove them, or choose another grader"
            )


def compare_boxed(answer: str, completion: str) -> float | None:
    r"""Compare the content of the only \boxed{} near the end with the answer, as text and number; None: undecided.

    >>> compare_boxed("1200", r"so \boxed{1,200}."), compare_boxed("12", r"\boxed{13}"), compare_boxed("x", "x")
    (1.0, 0.0, None)
    """
    window = _window(completion)
    boxes = {_normal(content) for content in _boxes(window)}
    if len(boxes) != 1 or "" in boxes:
        return None
    (content,), gold = boxes, _normal(answer)
    if content == gold:
        return 1.0
    number, expected = _number(content), _number(gold)
    return None if number is None or expected is None else float(_agree(number, expected))


def verify_math(answer: str, completion: str) -> float:
    """math-verify's opinion; may take for ever, all memory, or the process."""
    from math_verify import verify

    gold, parsed = _parse_gold(answer), _parse(answer_text(completion))
    if not gold or not parsed or not verify(gold, parsed, timeout_seconds=None):
        return 0.0
    try:
        if all(getattr(value, "is_number", False) and value.is_finite for value in (gold[0], parsed[0])):
            a, b = gold[0].evalf(15), parsed[0].evalf(15)
            size = max(abs(a), abs(b))
            return float(not (size < 0.01 and abs(a - b) > 1e-4 * size))
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError):  # sympy's, about these numbers
        return 0.0
    return 1.0


@lru_cache(maxsize=10_000)
def _parse_gold(answer: str) -> Any:
    return _parse(f"\\boxed{{{_without_dollars(answer).strip()}}}")


def _parse(text: str) -> Any:
    r"""What math-verify reads. In a box only LaTeX: where it fails, math-verify would go on with the last number."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = (LatexExtractionConfig(),) if "\\boxed" in text else (LatexExtractionConfig(), ExprExtractionConfig())
    return parse(_readable(text), targets, parsing_timeout=None)  # alarms work in main threads only


def _in_time(
    verify: Callable[[str, str], float], cpu_seconds: float, wall_seconds: float, answer: str, text: str
) -> float:
    """A task of a worker, which the kernel ends: at the CPU limit, and after the wall limit if the parent is dead."""
    for timer, sign, seconds in (
        (signal.ITIMER_PROF, signal.SIGPROF, cpu_seconds),
        (signal.ITIMER_REAL, signal.SIGALRM, wall_seconds + 1.0),
    ):
        signal.signal(sign, signal.SIG_DFL)  # no handler of Python's: it would wait for a long multiplication
        signal.setitimer(timer, seconds)
    try:
        return verify(answer, text)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _prepare_worker() -> None:
    """Bound the memory, silence the libraries, and parse once, which takes half a second the first time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them too: the trainer decides
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    verify_math("\\frac{1}{2}", "\\boxed{\\sqrt{2}}")


def _window(completion: str) -> str:
    """The part of a completion that holds its answer; texts of any length are graded in bounded work."""
    text = completion.rpartition("</think>")[2]
    box = text.rfind("\\boxed")
    return text[max(0, box - BEFORE_BOX) : box + AFTER_BOX] if box >= 0 else text[-AFTER_BOX:]


def answer_text(completion: str) -> str:
    r"""What math-verify gets to read of a completion: the box, if there is one alone and closed, else all near the end.

    What follows the box is kept where math-verify could heed it ("%", "final answer").

    >>> answer_text(r"<think>Is it 3?</think> Hence, \boxed{x + 2}."), answer_text("<think>3?</think> 2x")
    ('\\boxed{x + 2}', ' 2x')
    """
    window = _window(completion)
    boxes = _boxes(window)
    if len(boxes) != 1 or not boxes[0].strip() or len(re.findall(r"\\f?box", window)) != 1:
        return window
    after = window[window.index(f"{{{boxes[0]}}}", window.index("\\boxed")) + len(boxes[0]) + 2 :]
    return window if re.search("%|percent|pct|final answer|I hope", after, re.IGNORECASE) else f"\\boxed{{{boxes[0]}}}"


def _boxes(text: str) -> list[str]:
    r"""Contents of all \boxed{...}; one that is never closed is left out."""
    contents = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[match.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                contents.append(text[match.end() : match.end() + brace.start()])
                break
    return contents


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} or \boxed x.

    >>> last_boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    braced = _boxes(text.replace("\\fbox", "\\boxed"))
    if braced:
        return braced[-1]
    bare = re.findall(r"\\boxed\s+([^\s$]+)", text)
    return bare[-1] if bare else None


_FORMATTING = (  # layout of an answer, without meaning
    (r"(?<!\\)\$", ""),
    (r"\\(?:left|right)(?![a-zA-Z])", ""),
    (r"\\[!,;: ]|~", " "),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1"),
    (r"\{,\}", ","),
    (r"(?<!\d)\s+|\s+(?!\d)", ""),  # a blank between two digits may mean something
    (r"(?<=.)\.$", ""),
    (r"^\((\w)\)$", r"\1"),
)


def _normal(answer: str) -> str:
    answer = answer.strip()
    for pattern, replacement in _FORMATTING:
        answer = re.sub(pattern, replacement, answer)
    return answer


def _without_dollars(answer: str) -> str:
    return re.sub(r"(?<!\\)\$", "", answer)


def _readable(text: str) -> str:
    r"""Notations that math-verify misreads: 6.1e-7 and E_1 (Euler's number), \frac\pi2."""
    text = re.sub(r"(?<![\w\\.])(-?\d+(?:\.\d+)?)[eE]\+?(-?\d{1,3})(?![\w.]*\w)", r"\1 \\times 10^{\2}", text)
    text = re.sub(r"\\frac\s*\\pi\s*(\d)", r"\\frac{\\pi}{\1}", text)
    for letter, other in (("E", "Xi"), ("e", "xi"), (r"\\gamma", "Upsilon")):
        text = re.sub(rf"(?<![a-zA-Z\\]){letter}(?=\s*_)", rf"\\{other}", text)
    return text


_DIGITS = r"(?:\d{1,60}|\d{1,3}(?:,\d{3}){1,20})"  # bounded, so that nothing here takes long


def _decimal(text: str) -> Fraction | None:
    """A number as people write it: sign, digits, thousands by commas, decimals; a full stop at its end."""
    match = re.fullmatch(rf"([+-]?{_DIGITS}(?:\.\d{{1,60}})?)\.?", text.strip(), re.ASCII)
    return Fraction(match[1].replace(",", "")) if match else None


def _number(text: str) -> Fraction | None:
    r"""A number in normal form: decimal, 1/2, \frac{1}{2}, \frac12, 6.1e-7, 6.1\times10^{-7}."""
    ratio = re.fullmatch(
        rf"([+-]?)(?:\\frac\{{({_DIGITS})\}}\{{({_DIGITS})\}}|\\frac(\d)(\d)|({_DIGITS})/({_DIGITS}))", text, re.ASCII
    )
    if ratio:
        top, bottom = (int(part.replace(",", "")) for part in ratio.groups()[1:] if part)
        return None if bottom == 0 else Fraction(-top if ratio[1] == "-" else top, bottom)
    power = re.fullmatch(r"(.+?)(?:[eE]\+?(-?\d{1,3})|\\(?:times|cdot)10\^(?:\{(-?\d{1,3})\}|(\d)))", text, re.ASCII)
    value = _decimal("0" + text if text.startswith(".") else power[1] if power else text)
    return value * Fraction(10) ** int(power[2] or power[3] or power[4]) if power and value is not None else value


def _agree(a: Fraction, b: Fraction) -> bool:
    """Equal, or equal in six decimals and four digits when one of them is a fraction that may have been rounded."""
    if a == b or (a.denominator == b.denominator == 1):
        return a == b
    return round(a, 6) == round(b, 6) and abs(a - b) <= max(abs(a), abs(b)) / 10_000
