"""Problems: what is asked, what counts as correct, and an id that never changes.

Data come by name or by file. Names are the embedded sets ("cells", "ladder") and the public ones of `KNOWN`, loaded
from the hub; files are .jsonl or .parquet with `problem` and `answer`, and `id`, `level`, `subject`, `source` if they
have them. A flaw in a file of the user's own is an error. Public sets have flaws that nobody who loads them can mend:
rows without an answer, repetitions, texts with contradictory answers and training problems that stand in a test set
are left out, and counted in a line of the log.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gdro_llm.config import Config, UsageError

Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One prompt with its gold answer."""

    id: str  # stable and unique: source + content, never a row number
    prompt: str  # the text that the template of the configuration is put around
    answer: str  # gold answer, as text
    task: str = ""  # family of problems, for tables by task
    level: str = ""  # coarse difficulty ("easy", "middle", "hard"), for tables by level
    accepted: tuple[str, ...] = ()  # where finite: every completion graded correct, so that pass rates are exact


CELL_SETS = ("cells", "cells-shared", "cells-light", "cells-heavy")
EMBEDDED = (*CELL_SETS, "ladder")


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
    from gdro_llm.grading import last_boxed  # here, because it imports Problem from this module

    return last_boxed(str(row["solution"])) or ""


def _joined(row: Row) -> str:
    answers = row["final_answer"]
    return ", ".join(map(str, answers)) if isinstance(answers, list) else str(answers or "")


def _choices(row: Row) -> tuple[str, str]:
    """A GPQA question with its four choices, in an order that its content decides, and the letter of the right one."""
    choices = [str(row[name]).strip() for name in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
    question = str(row["Question"]).strip()
    order = list(range(4))
    random.Random(_content_hash("\n".join([question, *choices]))).shuffle(order)
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


def load_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """Training and test problems of a configuration, without overlap."""
    if config.data in EMBEDDED:
        if config.test_data:
            raise UsageError(f"test_data must be empty with data {config.data!r}, which brings its own")
        train, test = _embedded(config.data, "train"), _embedded(config.data, "test")
    else:
        if not config.test_data:
            raise UsageError(f"test_data must name held-out problems with data {config.data!r}: {_choose()}")
        train, test = read_set(config.data), read_sets(config.test_data)
        train = _without(train, test, config.data)
    if len(train) < config.batch_size:
        raise UsageError(
            f"batch_size must be at most the {len(train)} problems of {config.data}, got {config.batch_size}"
        )
    if len(test) > config.test_problems:
        test = [test[i] for i in _some(len(test), config.test_problems)]
    return train, test


def hold_out(train: list[Problem], config: Config) -> tuple[list[Problem], list[Problem]]:
    """At most `train_problems` to train on, and `validation_problems` others: the cells' own, of other data some."""
    train, validation = _held_out(train, config)
    if 0 < config.train_problems < len(train):
        train = [train[i] for i in _some(len(train), config.train_problems)]
    return train, validation


def _held_out(train: list[Problem], config: Config) -> tuple[list[Problem], list[Problem]]:
    wanted = config.validation_problems
    if not wanted:
        return train, []
    if config.data in CELL_SETS:
        found = _embedded(config.data, "validation")
        return train, [found[i] for i in _some(len(found), min(wanted, len(found)))]
    if wanted > len(train) - config.batch_size:
        raise UsageError(
            f"validation_problems must leave a batch of the {len(train)} problems of {config.data}, got {wanted}"
        )
    chosen = set(_some(len(train), wanted))
    return [p for i, p in enumerate(train) if i not in chosen], [train[i] for i in sorted(chosen)]


def _some(size: int, wanted: int) -> list[int]:
    """Ascending rows, the same ones always."""
    return sorted(np.random.default_rng(0).choice(size, wanted, replace=False).tolist())


def read_sets(names: str) -> list[Problem]:
    """Problems of one or more sets, names or files, separated by commas; `task` is the set's name (a file's stem)."""
    parts = [part.strip() for part in names.split(",")]
    found: dict[str, list[Problem]] = {}
    for part in parts:
        short = Path(part).stem if Path(part).suffix else part
        if short in found:
            raise UsageError(f"test_data must hold sets of different names, got {short!r} twice in {names!r}")
        found[short] = [replace(problem, task=short) for problem in read_set(part, "test")]
    problems = [problem for part in found.values() for problem in part]
    seen: dict[str, Problem] = {}
    for problem in problems:
        if problem.id in seen:
            raise UsageError(f"the id {problem.id!r} stands in two sets of {names!r}; ids must be unique")
        seen[problem.id] = problem
    return problems


def read_set(name: str, split: str = "train") -> list[Problem]:
    """Problems of one set: embedded (of a split), public, or a file."""
    if name in EMBEDDED:
        return _embedded(name, split)
    if name in KNOWN:
        return read_hub(name, KNOWN[name])
    path = Path(name)
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            raise UsageError(f"{path} is not a parquet file ({_first_line(error)})") from error
        return _from_rows(path, ((f"{path}, row {i}", row) for i, row in enumerate(rows, start=1)))
    return read_jsonl(path)


def read_jsonl(path: Path) -> list[Problem]:
    """Problems of a JSON-lines file with `problem` and `answer`; `id`, `level` and `subject` are used if present.

    Without an `id` a problem is named by the hash of its text. An empty answer, a repeated id, a text with two answers
    or a line that is not an object is an error that names the line.
    """
    if not path.is_file():
        raise UsageError(f"no data file or set {str(path)!r}: {_choose()}")

    def rows() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):  # problems may hold other separators
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, json.loads(line, parse_constant=_refuse)
                except ValueError as error:
                    raise UsageError(f"{where}: not JSON ({error})") from error

    return _from_rows(path, rows())


def _from_rows(path: Path, rows: Iterable[tuple[str, Any]]) -> list[Problem]:
    """Problems of a user's file; `rows` gives each with its place for messages."""
    found: dict[str, Problem] = {}
    answers: dict[str, Problem] = {}
    for where, row in rows:
        text = row.get("problem") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UsageError(
                f"{where}: needs a {'row' if path.suffix == '.parquet' else 'JSON object'} with a text 'problem'"
            )
        if not isinstance(row.get("answer"), str | int | float) or not str(row["answer"]).strip():
            raise UsageError(f"{where}: needs an 'answer', text or number; a problem without one cannot be graded")
        name = str(row.get("id") or f"{path.stem}/{_content_hash(text)}")
        problem = Problem(
            id=name,
            prompt=text,
            answer=str(row["answer"]).strip(),
            task=str(row.get("subject") or row.get("source") or path.stem),
            level=str(row.get("level") or ""),
        )
        other = answers.setdefault(_content(text), problem)
        if other.answer != problem.answer:
            raise UsageError(
                f"{where}: the text of {name!r} also stands there as {other.id!r}, with the answer {other.answer!r} "
                f"instead of {problem.answer!r}; keep the right one"
            )
        if name in found:
            raise UsageError(f"{where}: the id {name!r} stands twice; ids must be unique")
        found[name] = problem
    if not found:
        raise UsageError(f"{path} holds no problems")
    return list(found.values())


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
                f"cannot load {where}: {_first_line(error)}; connect to the hub (a gated set asks for "
                "`hf auth login`), copy its cache from a machine that is, or give a .jsonl or .parquet file"
            ) from error
    wanted = [column for column in (source.problem, source.answer, source.level, source.subject) if column]
    for column in wanted:
        if isinstance(column, str) and rows and column not in rows[0]:
            raise UsageError(f"{where} has no column {column!r}, only {', '.join(rows[0])}: it has changed")
    found: dict[str, Problem] = {}
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
        key = _content(text)
        if key in found:
            left_out["rows repeated"] += 1
            if found[key].answer != answer:
                contradictory.add(key)
            continue
        level = str(row[source.level]).removeprefix("Level ") if source.level else ""
        task = str(row[source.subject] or name) if source.subject else name
        found[key] = Problem(f"{name}/{_content_hash(text)}", text, answer, task, level)
    for key in contradictory:
        del found[key]
    left_out["texts with contradictory answers"] = len(contradictory)
    for reason, count in left_out.items():
        if count:
            tqdm.write(f"{where}: {count} of {len(rows)} {reason} left out")
    if not found:
        raise UsageError(f"{where} holds no problems with answers")
    return list(found.values())


def _value(row: Row, column: str | Callable[[Row], str]) -> str:
    value = row[column] if isinstance(column, str) else column(row)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # "27", not "27.0"
    return "" if value is None else str(value).strip()


def _embedded(name: str, split: str) -> list[Problem]:
    # here, because they import Problem from this module
    from gdro_llm.cells import CELLS, TAILS, TESTBEDS, cell_problems
    from gdro_llm.ladder import ladder_problems

    if name == "ladder":
        return ladder_problems(split)
    cells = TESTBEDS.get(name, CELLS)
    if split == "train":
        return cell_problems("train", {"easy": 100, "middle": 60, "hard": TAILS.get(name, TAILS["cells"])}, 7, cells)
    per_level = dict.fromkeys(("easy", "middle", "hard"), 40 if split == "test" else 20)
    return cell_problems("test" if split == "test" else "validation", per_level, 8, cells)


def _without(train: list[Problem], test: list[Problem], name: str) -> list[Problem]:
    """Training problems that do not stand in the test set; in a file they are an error, in a public set left out."""
    held_out = {_content(problem.prompt) for problem in test}
    kept = [problem for problem in train if _content(problem.prompt) not in held_out]
    leaked = len(train) - len(kept)
    if leaked and name not in KNOWN:
        example = next(problem for problem in train if _content(problem.prompt) in held_out)
        raise UsageError(
            f"{leaked} problems of test_data stand in data too, for example {example.prompt[:80]!r}; "
            "remove them from one of the files"
        )
    if leaked:
        tqdm.write(f"data set {name!r}: {leaked} of {len(train)} problems that stand in test_data left out")
    return kept


def _content(text: str) -> str:
    """A text without regard to its blanks."""
    return " ".join(text.split())


def _content_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _choose() -> str:
    return f"choose {', '.join(EMBEDDED)}, {', '.join(KNOWN)}, or give a .jsonl or .parquet file"


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error).strip().partition("\n")[0]) or type(error).__name__


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value")


def batch_indices(size: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Rows of the training set in batch `step` (0, 1, ...): a fresh permutation each epoch, no prompt twice in a batch.

    The order depends on these four numbers alone, so methods see the same prompts and a resumed run needs no state. The
    remainder of an epoch that does not fill a batch is left out; the next permutation leaves out others.
    """
    per_epoch = size // batch_size
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(size)
    return order[position * batch_size : (position + 1) * batch_size]
