"""Is a completion correct? Graders take a problem and the text of a completion and return 1.0 or 0.0."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from gdro_llm.data import Problem


def grade_exact(problem: Problem, completion: str) -> float:
    """The completion is one of the accepted ones (or the answer, where none are listed), to the letter."""
    return float(completion in (problem.accepted or (problem.answer,)))


def grade_number(problem: Problem, completion: str) -> float:
    """The first line of the completion is the answer as a number, and nothing else but blanks, commas, a full stop."""
    lines = completion.strip().splitlines()
    return float(bool(lines) and _as_number(lines[0]) == _as_number(problem.answer) is not None)


def grade_math(problem: Problem, completion: str) -> float:
    """math-verify finds the gold answer in the completion (LaTeX, fractions, sets).

    Of several \\boxed{} the last counts; where they stand close together ("\\boxed{1} or \\boxed{2}") they are one set.
    """
    from math_verify import parse, verify

    gold = parse(f"${problem.answer}$")
    return float(verify(gold, parse(completion)))


def _as_number(text: str) -> Decimal | None:
    found = re.fullmatch(r"([+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?)\.?", text.strip(), re.ASCII)
    return Decimal(found[1].replace(",", "")) if found else None


GRADERS: dict[str, Callable[[Problem, str], float]] = {
    "exact": grade_exact,
    "number": grade_number,
    "math": grade_math,
}
