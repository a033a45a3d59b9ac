"""Public sets of problems, loaded from the hub.

They have flaws. Rows without an answer, repetitions and texts with contradictory answers are left out, and counted in a
line of the log.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from gdro_llm.config import UsageError
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.rewards import last_boxed

Row = dict[str, Any]


@dataclass(frozen=True)
class PublicSet:
    """Where a set of the hub lies and what its columns mean."""

    hub: str
    split: str
    problem: str | Callable[[Row], str]  # column, or what makes it of a row
    answer: str | Callable[[Row], str]
    configs: tuple[str | None, ...] = (None,)  # read one after the other
    level: str = ""  # column
    subject: str = ""  # column


def _after_hashes(row: Row) -> str:
    return str(row["answer"]).rpartition("####")[2].replace(",", "")


def _of_solution(row: Row) -> str:
    return last_boxed(str(row["solution"])) or ""


def _joined(row: Row) -> str:
    answers = row["final_answer"]
    return ", ".join(map(str, answers)) if isinstance(answers, list) else str(answers or "")


def _choices(row: Row) -> tuple[str, str]:
    """A GPQA question with its four choices, in an order that its content decides, and the letter of the right one."""
    choices = [str(row[name]).strip() for name in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
    question = str(row["Question"]).strip()
    order = list(range(4))
    random.Random(content_hash("\n".join([question, *choices]))).shuffle(order)
    lines = [f"({letter}) {choices[i]}" for letter, i in zip("ABCD", order, strict=True)]
    text = "\n".join([question, "", *lines, "", "The answer is the letter of the right choice."])
    return text, "ABCD"[order.index(0)]


_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
KNOWN: dict[str, PublicSet] = {
    "dapo-math": PublicSet("open-r1/DAPO-Math-17k-Processed", "train", "prompt", "solution", ("en",)),
    "gsm8k-train": PublicSet("openai/gsm8k", "train", "question", _after_hashes, ("main",)),
    "math-train": PublicSet(
        "EleutherAI/hendrycks_math", "train", "problem", _of_solution, _MATH_SUBJECTS, "level", "type"
    ),
    "gsm8k": PublicSet("openai/gsm8k", "test", "question", _after_hashes, ("main",)),
    "math500": PublicSet("HuggingFaceH4/MATH-500", "test", "problem", "answer", level="level", subject="subject"),
    "aime24": PublicSet("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "aime25": PublicSet("math-ai/aime25", "test", "problem", "answer"),
    "amc23": PublicSet("math-ai/amc23", "test", "question", "answer"),
    "minerva": PublicSet("math-ai/minervamath", "test", "question", "answer"),
    "olympiadbench": PublicSet(
        "Hothan/OlympiadBench", "train", "question", _joined, ("OE_TO_maths_en_COMP",), subject="subfield"
    ),
    "gpqa": PublicSet(
        "Idavidrein/gpqa",
        "train",
        lambda row: _choices(row)[0],
        lambda row: _choices(row)[1],
        ("gpqa_diamond",),
        subject="High-level domain",
    ),
}


def read_hub(name: str, source: PublicSet) -> list[Problem]:
    """Problems of a public set, repaired as the module says; ids are the name and a hash of the text."""
    import datasets
    from datasets.exceptions import DatasetsError

    where = f"data set {name!r} ({source.hub})"
    rows: list[Row] = []
    for config in source.configs:
        try:
            rows += datasets.load_dataset(source.hub, config, split=source.split).to_list()
        except (OSError, ValueError, DatasetsError) as error:
            raise UsageError(
                f"cannot load {where}: {first_line(error)}; connect to the hub (a gated set asks for "
                "`hf auth login`), copy its cache from a machine that is, or give a .jsonl or .parquet file"
            ) from error
    wanted = [column for column in (source.problem, source.answer, source.level, source.subject) if column]
    for column in wanted:
        if isinstance(column, str) and rows and column not in rows[0]:
            raise UsageError(f"{where} has no column {column!r}, only {', '.join(rows[0])}: it has changed")
    by_content: dict[str, Problem] = {}
    left_out = dict.fromkeys(("rows without an answer", "rows repeated", "texts with contradictory answers"), 0)
    contradictory = set()
    for row in rows:
        try:
            text, answer = _value(row, source.problem), _value(row, source.answer)
        except KeyError as error:
            raise UsageError(
                f"{where} has no column {error}, only {', '.join(row)}: it has changed upstream"
            ) from error
        if not text or not answer:
            left_out["rows without an answer"] += 1
            continue
        key = content(text)
        if key in by_content:
            left_out["rows repeated"] += 1
            if by_content[key].answer != answer:
                contradictory.add(key)
            continue
        level = str(row[source.level]).removeprefix("Level ") if source.level else ""
        task = str(row[source.subject] or name) if source.subject else name
        by_content[key] = Problem(f"{name}/{content_hash(text)}", text, answer, task, level)
    for key in contradictory:
        del by_content[key]
    left_out["texts with contradictory answers"] = len(contradictory)
    for reason, count in left_out.items():
        if count:
            tqdm.write(f"{where}: {count} of {len(rows)} {reason} left out")
    if not by_content:
        raise UsageError(f"{where} holds no problems with answers")
    return list(by_content.values())


def _value(row: Row, column: str | Callable[[Row], str]) -> str:
    value = row[column] if isinstance(column, str) else column(row)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # "27", not "27.0"
    return "" if value is None else str(value).strip()


def content(text: str) -> str:
    """A text without regard to its blanks."""
    return " ".join(text.split())


def content_hash(text: str) -> str:
    """16 hexadecimal digits that name a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_line(error: Exception) -> str:
    """An error of a library in one line."""
    return re.sub(r"\s+", " ", str(error).strip().partition("\n")[0]) or type(error).__name__
