"""A graded ladder of arithmetic for small pretrained models: few-shot completion prompts, one number as the answer.

    Q: 3 + 4
    A: 7

    Q: 6 + 2
    A:

One completion is accepted: a blank and the number, as in the examples. With grader "exact" success probabilities are
known; grader "number" takes " 8.", "8.0" and endlessly many others, too.

Steps of the ladder go from copying a number, which a 135M model always does, to three-digit sums, which it almost never
does, so that difficulty has a tail from the start.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

from gdro_llm.problems.problem import Problem

Question = Callable[[random.Random], tuple[str, int]]


def _two(low: int, high: int, text: str, value: Callable[[int, int], int]) -> Question:
    def draw(rng: random.Random) -> tuple[str, int]:
        a, b = rng.randint(low, high), rng.randint(low, high)
        return text.format(a=a, b=b), value(a, b)

    return draw


def _a_plus_b_times_c(rng: random.Random) -> tuple[str, int]:
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    return f"{a} + {b} * {c}", a + b * c


def _difference(rng: random.Random) -> tuple[str, int]:
    a, b = sorted((rng.randint(10, 99), rng.randint(10, 99)), reverse=True)
    return f"{a} - {b}", a - b


LADDER: dict[str, tuple[str, Question]] = {  # task: level, generator
    "copy": ("easy", _two(10, 999, "copy {a}", lambda a, b: a)),
    "a + 1": ("easy", _two(10, 999, "{a} + 1", lambda a, b: a + 1)),
    "larger": ("middle", _two(10, 99, "larger of {a} and {b}", max)),
    "1-digit +": ("middle", _two(1, 9, "{a} + {b}", lambda a, b: a + b)),
    "1-digit *": ("middle", _two(1, 9, "{a} * {b}", lambda a, b: a * b)),
    "2-digit +": ("hard", _two(10, 99, "{a} + {b}", lambda a, b: a + b)),
    "2-digit -": ("hard", _difference),
    "a + b * c": ("hard", _a_plus_b_times_c),
    "3-digit +": ("hard", _two(100, 999, "{a} + {b}", lambda a, b: a + b)),
}
PER_TASK = {"train": 60, "test": 20}
SHOTS = 3


def ladder_problems(split: str) -> list[Problem]:
    """Distinct problems of the ladder, `PER_TASK[split]` a task; "train" and "test" are disjoint by content."""
    problems = []
    for task, (level, draw) in LADDER.items():
        rng = random.Random(f"ladder {task}")
        shots: dict[str, int] = {}
        while len(shots) < SHOTS:
            shots.update([draw(rng)])
        header = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in shots.items())
        answers: dict[str, int] = {}
        for _ in range(100 * PER_TASK[split]):  # one-digit tasks run out of distinct problems before 60
            question, answer = draw(rng)
            held_out = zlib.crc32(question.encode()) % 4 == 0
            if question not in shots and held_out == (split == "test"):
                answers.setdefault(question, answer)
            if len(answers) == PER_TASK[split]:
                break
        problems += [
            Problem(
                id=f"ladder/{task}/{question}",
                prompt=f"{header}Q: {question}\nA:",
                answer=str(answer),
                task=task,
                level=level,
                accepted=(f" {answer}",),
            )
            for question, answer in answers.items()
        ]
    return problems
