r"""A testbed of 25 families of arithmetic problems ("cells") whose difficulty has a heavy tail and is known exactly.

Reinforcement learning on a tail is slow because a correct answer is rarely sampled. The cells reproduce that in
miniature. A problem can be answered directly, or through a *strategy*: one leading token, then scratch work, then the
answer. On a hard cell the direct answer is out of reach of the model, its own strategy token is sampled with
probability .005 to .05, and every other strategy ends in a wrong answer, so that little transfers between cells.

    12*3=36              the direct answer
    123+45=?861=168      strategy "?", scratch work "861" (the sum written from its last digit), answer 168

A model learns this by supervised examples (``warm_start_example``). The control character "!" in place of "=" asks
for the scratch work: it teaches the skill while the propensity to use it stays rare.

``SHARED_CELLS`` are the same cells with one strategy for all of them: what is learnt on one helps on every other.
``SIZES`` are training sets with more or fewer hard problems.

At most two completions of a problem are graded correct, so its success probability is a sum of two products of token
probabilities: mean@k and pass@k follow without sampling noise (``policy.success_probability``).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gdro_llm.problems.problem import Problem

Split = Literal["train", "validation", "test"]
Question = tuple[str, str, str | None]  # question, direct answer, scratch work and final answer (None: a trap cell)

ANSWER, FORCE = "=", "!"  # last character of a prompt: free answer, or scratch work demanded
STRATEGIES = "?ABCDEFG"  # "?" is right on the middle cells, one of A to G on each hard cell, none on an easy cell
LEVELS = ("easy", "middle", "hard")
PAD, EOS = "<pad>", "<eos>"
MAX_PROMPT_LENGTH, MAX_COMPLETION_LENGTH = 12, 14  # [tokens], the completion with its end token
DIRECT_RIGHT = {"middle": 0.5, "hard": 0.05}  # warm start: share of the direct answers that are right
WRONG_STRATEGY = 0.3  # warm start, hard cells: share of free answers that open with another cell's strategy


def _number(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _binary(operator: str, left: int, right: int) -> Callable[[random.Random], Question]:
    """x+y, x-y >= 0 or x*y with the given numbers of digits; the scratch work is the result from its last digit."""

    def draw(rng: random.Random) -> Question:
        x, y = _number(rng, left), _number(rng, right)
        if operator == "-" and x < y:
            x, y = y, x
        value = str({"+": x + y, "-": x - y, "*": x * y}[operator])
        return f"{x}{operator}{y}", value, f"{value[::-1]}={value}"

    return draw


def _division(operator: str, digits: int) -> Callable[[random.Random], Question]:
    """x%m or x/m (floor) by long division; the scratch work holds each step's remainder (for /, quotient first)."""

    def draw(rng: random.Random) -> Question:
        x, divisor, remainder, steps = _number(rng, digits), rng.randint(2, 9), 0, []
        for digit in str(x):
            quotient, remainder = divmod(10 * remainder + int(digit), divisor)
            steps.append(f"{quotient}{remainder}" if operator == "/" else f"{remainder}")
        if operator == "/":
            return f"{x}/{divisor}", str(x // divisor), f"{''.join(steps)}={x // divisor}"
        return f"{x}%{divisor}", steps[-1], f"{''.join(steps[:-1])}={steps[-1]}"

    return draw


def _sum(terms: int, separator: str = "+", marker: str = "") -> Callable[[random.Random], Question]:
    """Sum of one-digit terms ("1+2+3") or of the digits of a string ("d123"); the scratch work is the partial sums."""

    def draw(rng: random.Random) -> Question:
        values = [_number(rng, 1) for _ in range(terms)]
        partial = "".join(f"{sum(values[:i]):02d}" for i in range(2, terms))
        return marker + separator.join(map(str, values)), str(sum(values)), f"{partial}={sum(values)}"

    return draw


def _multiply_add(first: int, second: int, third: int) -> Callable[[random.Random], Question]:
    """x*y+z; the scratch work is the product."""

    def draw(rng: random.Random) -> Question:
        x, y, z = _number(rng, first), _number(rng, second), _number(rng, third)
        return f"{x}*{y}+{z}", str(x * y + z), f"{x * y}={x * y + z}"

    return draw


def _maximum(count: int) -> Callable[[random.Random], Question]:
    def draw(rng: random.Random) -> Question:
        values = [_number(rng, 2) for _ in range(count)]
        return "M" + ",".join(map(str, values)), str(max(values)), None

    return draw


def _sorted(count: int) -> Callable[[random.Random], Question]:
    def draw(rng: random.Random) -> Question:
        digits = _digits(rng, count)
        return "s" + digits, "".join(sorted(digits)), None

    return draw


def _reversed(count: int) -> Callable[[random.Random], Question]:
    def draw(rng: random.Random) -> Question:
        digits = _digits(rng, count)
        return "r" + digits, digits[::-1], None

    return draw


def _add_digit(rng: random.Random) -> Question:
    x, y = _number(rng, 2), _number(rng, 1)
    return f"{x}+{y}", str(x + y), None


@dataclass(frozen=True)
class Cell:
    """One family of problems and how the warm start presents it."""

    name: str
    draw: Callable[[random.Random], Question]
    scratch_prior: float  # P(strategy token) in the free answers of the warm start; on an easy cell it is a trap
    level: str
    strategy: str | None = None  # the one token that leads to the answer

    def examples(self, rng: random.Random, split: Split) -> Iterator[Question]:
        """Endless draws of one split, with the cell's strategy in front of the scratch work."""
        while True:
            question, answer, scratch = self.draw(rng)
            if split_of(question) == split:
                yield question, answer, None if scratch is None else f"{self.strategy}{scratch}"


CELLS: tuple[Cell, ...] = (
    Cell("max2", _maximum(2), 0.3, "easy"),
    Cell("max3", _maximum(3), 0.2, "easy"),
    Cell("sort3", _sorted(3), 0.3, "easy"),
    Cell("sort4", _sorted(4), 0.2, "easy"),
    Cell("sort5", _sorted(5), 0.3, "easy"),
    Cell("rev4", _reversed(4), 0.3, "easy"),
    Cell("add1", _add_digit, 0.2, "easy"),
    Cell("add2", _binary("+", 2, 2), 0.2, "middle", "?"),
    Cell("sub2", _binary("-", 2, 2), 0.2, "middle", "?"),
    Cell("sum3", _sum(3), 0.15, "middle", "?"),
    Cell("mix1", _multiply_add(1, 1, 1), 0.15, "middle", "?"),
    Cell("mod1", _division("%", 2), 0.1, "middle", "?"),
    Cell("dsum3", _sum(3, "", "d"), 0.1, "middle", "?"),
    Cell("add3", _binary("+", 3, 3), 0.05, "hard", "A"),
    Cell("sub3", _binary("-", 3, 3), 0.05, "hard", "B"),
    Cell("mul2", _binary("*", 2, 1), 0.04, "hard", "C"),
    Cell("sum4", _sum(4), 0.03, "hard", "D"),
    Cell("dsum4", _sum(4, "", "d"), 0.03, "hard", "E"),
    Cell("mod2", _division("%", 3), 0.02, "hard", "F"),
    Cell("mul3", _binary("*", 3, 1), 0.02, "hard", "G"),
    Cell("div2", _division("/", 3), 0.02, "hard", "A"),
    Cell("mix2", _multiply_add(2, 1, 2), 0.01, "hard", "B"),
    Cell("add4", _binary("+", 4, 3), 0.01, "hard", "C"),
    Cell("sub4", _binary("-", 4, 3), 0.005, "hard", "D"),
    Cell("sum5", _sum(5), 0.005, "hard", "E"),
)
SHARED_CELLS = tuple(replace(cell, strategy=cell.strategy and STRATEGIES[0]) for cell in CELLS)
TESTBEDS = {"cells": CELLS, "cells-shared": SHARED_CELLS}  # by name of the data: little transfer, strong transfer
UNREACHABLE = "0" * 40
SIZES = {  # training problems of a cell by level: 40, 22, 10 % are hard
    "cells-light": {"easy": 100, "middle": 60, "hard": 60},
    "cells": {"easy": 100, "middle": 60, "hard": 25},
    "cells-heavy": {"easy": 100, "middle": 60, "hard": 10},
    "cells-once": {"easy": 670, "middle": 530, "hard": 198},  # for 10,240 draws, each of another problem
}


def split_of(question: str) -> Split:
    """The split of a question, from its content alone: 6/8 train, 1/8 validation, 1/8 test."""
    splits: dict[int, Split] = {0: "test", 1: "validation"}
    return splits.get(zlib.crc32(question.encode()) % 8, "train")


def cell_problems(split: Split, per_level: dict[str, int], seed: int, cells: tuple[Cell, ...] = CELLS) -> list[Problem]:
    """Distinct problems of every cell, ``per_level[cell.level]`` each, in the order of ``cells``.

    The splits are disjoint whatever the seeds, and a cell's problems do not depend on how many the others give: a
    larger request extends a smaller one.

    Raises:
        ValueError: an unknown split or level, or a cell without enough distinct problems in the split.

    >>> problem = cell_problems("test", {"hard": 1}, seed=0)[0]
    >>> problem.task, problem.prompt[-1], problem.accepted[0] == problem.answer
    ('add3', '=', True)
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be 'train', 'validation' or 'test', got {split!r}")
    if unknown := set(per_level) - set(LEVELS):
        raise ValueError(f"per_level must name levels among {LEVELS}, got {sorted(unknown)}")
    problems: list[Problem] = []
    for cell in cells:
        wanted = per_level.get(cell.level, 0)
        by_question: dict[str, Problem] = {}
        draws = cell.examples(random.Random(f"{seed}/{cell.name}"), split)
        for _ in range(60 * wanted):
            if len(by_question) == wanted:
                break
            question, answer, scratch = next(draws)
            accepted = (answer,) if scratch is None else (answer, scratch)
            by_question[question] = Problem(
                id=f"cells/{cell.name}/{question}",
                prompt=question + ANSWER,
                answer=answer,
                task=cell.name,
                level=cell.level,
                accepted=accepted,
            )
        if len(by_question) < wanted:
            raise ValueError(f"per_level asks {wanted} problems of {cell.name}, {split} holds about {len(by_question)}")
        problems += by_question.values()
    return problems


def without_answer(problem: Problem) -> Problem:
    """The problem; of 40 %, chosen by content, with an answer that no completion is long enough for.

    >>> problems = cell_problems("train", {"easy": 100}, seed=7)
    >>> sum(len(without_answer(problem).answer) > 14 for problem in problems)
    294
    """
    dead = zlib.crc32(problem.id.encode()) % 5 < 2
    return replace(problem, answer=UNREACHABLE, accepted=(UNREACHABLE,)) if dead else problem


def _wrong_answer(rng: random.Random, answer: str) -> str:
    wrong = answer
    while wrong == answer:
        wrong = str(_number(rng, len(answer)))
    return wrong


def warm_start_example(rng: random.Random, cell: Cell) -> tuple[str, str]:
    """One supervised (prompt, completion) of the train split: half of the middle and hard ones force the scratch work.

    A free answer takes the cell's strategy with ``scratch_prior``; otherwise it is direct, and right or wrong with the
    share of ``DIRECT_RIGHT``, or on a hard cell opens with another cell's strategy and is wrong. On an easy cell the
    direct answer is right and every strategy is a trap.

    >>> warm_start_example(random.Random(0), CELLS[7])
    ('59+63!', '?221=122')
    """
    question, answer, scratch = next(cell.examples(rng, "train"))
    if scratch is None:
        if rng.random() < cell.scratch_prior:
            return question + ANSWER, f"{rng.choice(STRATEGIES)}={_wrong_answer(rng, answer)}"
        return question + ANSWER, answer
    if rng.random() < 0.5:
        return question + FORCE, scratch
    if rng.random() < cell.scratch_prior:
        return question + ANSWER, scratch
    if cell.level == "hard" and rng.random() < WRONG_STRATEGY:
        other = rng.choice(STRATEGIES.replace(scratch[0], ""))
        return question + ANSWER, f"{other}={_wrong_answer(rng, answer)}"
    right = rng.random() < DIRECT_RIGHT[cell.level]
    return question + ANSWER, answer if right else _wrong_answer(rng, answer)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, nothing added or dropped; an unknown character raises.

    >>> tokenizer = character_tokenizer()
    >>> tokenizer.decode(tokenizer("12+3=").input_ids)
    '12+3='
    """
    characters = "0123456789+-*%/,Msrd" + ANSWER + FORCE + STRATEGIES
    vocabulary = {token: i for i, token in enumerate([*characters, PAD, EOS])}
    # Word-level without an unknown token: tokenizers raises on a character outside the vocabulary.
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
