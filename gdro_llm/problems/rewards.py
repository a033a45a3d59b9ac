r"""Is a completion correct? Graders take problems and the texts of completions and return 1.0 or 0.0.

`exact` and `number` compare texts and numbers. `math` accepts every mathematically equal form of the gold answer, in
three steps; the first step that decides counts:

1. What follows the last </think> is the answer; if it has a \boxed{}, the content of the last one.
2. The content of a single box is compared as text (spacing, \left, \text, dollar signs aside) and as a number.
3. Anything else goes to math-verify (LaTeX, sets, intervals, matrices, units, percent; without a box the last formula).
   Departs: numbers below .01 must also agree to four digits, since math-verify rounds to six decimals and takes 1.2e-7
   for 1e-7; "6.1e-7" is read as a power of ten, not as Euler's number.

Step 3 runs a computer algebra system on whatever a language model wrote: some completions take for ever or all memory.
It runs in worker processes, and a completion that hangs or kills its worker costs that one sample a zero.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError
from fractions import Fraction
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

import numpy as np
from pebble import ProcessPool
from tqdm import tqdm

from gdro_llm.config import Config, UsageError, printable
from gdro_llm.problems.problem import Problem

MEMORY_LIMIT = 4 * 2**30  # address space of a worker [bytes]
BEFORE_BOX, AFTER_BOX = 1000, 4000  # what math-verify sees of a long completion [characters]


def grade_exact(problem: Problem, completion: str) -> float:
    """The completion is one of the accepted ones (or the answer, where none are listed), to the letter."""
    return float(completion in (problem.accepted or (problem.answer,)))


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


class Grader:
    """The grader of a configuration; a context manager, since "math" keeps worker processes.

    >>> with Grader(Config(grader="math", grade_workers=1)) as grader:
    ...     grader.grade([Problem("a", "1/2 + 1/4 = ?", "0.75")] * 2, [r"\\boxed{\\frac34}", r"\\boxed{\\frac43}"])
    array([1., 0.])
    """

    def __init__(self, config: Config, verify: Callable[[str, str], float] | None = None) -> None:
        """`verify(answer, completion)` decides in the workers in place of `verify_math` (a module's function)."""
        self._name, self._seconds, self._verify = config.grader, config.grade_seconds, verify or verify_math
        self._pool: ProcessPool | None = None
        if config.grader == "math":
            local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun: they share the cores
            workers = config.grade_workers or max(1, len(os.sched_getaffinity(0)) // local_processes)
            # Not fork: the threads of torch and vLLM live in this process. The server imports sympy once for all.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["gdro_llm.problems.rewards", "math_verify"])
            self._pool = ProcessPool(workers, initializer=_prepare_worker, context=context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> np.ndarray:
        """Reward of each completion, (R,), in [0, 1], in bounded time.

        Args:
            problems: R problems, one a completion.
            texts: R completions.
        """
        if self._pool is None:
            grade = GRADERS[self._name]
            return np.array([grade(problem, text) for problem, text in zip(problems, texts, strict=True)], float)
        rewards_R = np.zeros(len(texts))
        waiting: dict[int, Any] = {}
        for r, (problem, text) in enumerate(zip(problems, texts, strict=True)):
            verdict = compare_boxed(problem.answer, text)
            if verdict is not None:
                rewards_R[r] = verdict
            else:  # what a worker would not look at need not travel
                arguments = (self._verify, self._seconds, problem.answer, _window(text))
                waiting[r] = self._pool.schedule(_in_time, args=arguments, timeout=self._seconds)
        for r, future in waiting.items():
            error = future.exception()
            if error is None:
                rewards_R[r] = future.result()
            else:  # the completion is to blame: every worker has graded something before its first task
                late = isinstance(error, TimeoutError) or getattr(error, "exitcode", None) == -signal.SIGALRM
                what = f"took over {self._seconds:g} s" if late else f"failed ({error!r})"
                tqdm.write(printable(f"grading {problems[r].id} {what}, reward 0: {texts[r][:100]!a}"))
        return rewards_R

    def check_gold(self, problems: Sequence[Problem]) -> None:
        """Every gold answer, written as a model should, is correct; else a UsageError that names one which is not."""
        boxed = self._name == "math"
        texts = [f"\\boxed{{{problem.answer}}}" if boxed else problem.answer for problem in problems]
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

    gold, parsed = _parse_gold(answer), _parse(_window(completion))
    if not gold or not parsed or not verify(gold, parsed, timeout_seconds=None):
        return 0.0
    if all(getattr(value, "is_number", False) and value.is_finite for value in (gold[0], parsed[0])):
        a, b = gold[0].evalf(15), parsed[0].evalf(15)
        size = max(abs(a), abs(b))
        return float(not (size < 0.01 and abs(a - b) > 1e-4 * size))
    return 1.0


@lru_cache(maxsize=10_000)
def _parse_gold(answer: str) -> Any:
    return _parse(f"\\boxed{{{_without_dollars(answer).strip()}}}")


def _parse(text: str) -> Any:
    r"""What math-verify reads. In a box only LaTeX: where it fails, math-verify would go on with the last number."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = (LatexExtractionConfig(),) if "\\boxed" in text else (LatexExtractionConfig(), ExprExtractionConfig())
    return parse(_readable(text), targets, parsing_timeout=None)  # alarms work in main threads only


def _in_time(verify: Callable[[str, str], float], seconds: float, answer: str, completion: str) -> float:
    """A task of a worker. The kernel ends one that outlives its parent, which then cannot, a second after its time."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
    verdict = verify(answer, completion)
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    return verdict


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
