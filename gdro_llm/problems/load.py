"""Problems by name or by file, for training, validation and test.

Names are the embedded sets ("cells", "ladder") and the public ones (`public.KNOWN`); files are .jsonl or .parquet with
`problem` and `answer`, and `id`, `level`, `subject`, `source`, `accepted` if they have them. A flaw in a file of the
user's own is an error. Training problems of a public set that occur in a test set are left out, and counted in a line
of the log.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gdro_llm.config import Config, UsageError
from gdro_llm.problems.cells import CELLS, SIZES, TESTBEDS, cell_problems, without_answer
from gdro_llm.problems.ladder import ladder_problems
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.public import KNOWN, content, content_hash, first_line, read_hub

CELL_SETS = ("cells", "cells-shared", "cells-light", "cells-heavy", "cells-dead", "cells-once")
EMBEDDED_SETS = (*CELL_SETS, "ladder")


def load_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """Training and test problems of a configuration, without overlap."""
    if config.data in EMBEDDED_SETS:
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
        own = _embedded(config.data, "validation")
        return train, [own[i] for i in _some(len(own), min(wanted, len(own)))]
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
    sets: dict[str, list[Problem]] = {}
    for part in parts:
        short = Path(part).stem if Path(part).suffix else part
        if short in sets:
            raise UsageError(f"test_data must hold sets of different names, got {short!r} twice in {names!r}")
        sets[short] = [replace(problem, task=short) for problem in read_set(part, "test")]
    problems = [problem for part in sets.values() for problem in part]
    seen: dict[str, Problem] = {}
    for problem in problems:
        if problem.id in seen:
            raise UsageError(f"the id {problem.id!r} occurs in two sets of {names!r}; ids must be unique")
        seen[problem.id] = problem
    return problems


def read_set(name: str, split: str = "train") -> list[Problem]:
    """Problems of one set: embedded (of a split), public, or a file."""
    if name in EMBEDDED_SETS:
        return _embedded(name, split)
    if name in KNOWN:
        return read_hub(name, KNOWN[name])
    path = Path(name)
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            raise UsageError(f"{path} is not a parquet file ({first_line(error)})") from error
        return _from_rows(path, ((f"{path}, row {i}", row) for i, row in enumerate(rows, start=1)))
    return read_jsonl(path)


def read_jsonl(path: Path) -> list[Problem]:
    """Problems of a JSON-lines file with `problem` and `answer`; `id`, `level` and `subject` are used if present.

    `accepted`, a list of texts, is what grader "exact" takes for correct in place of the answer: all of it, to the
    letter. Other graders read the answer alone.

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
    by_id: dict[str, Problem] = {}
    answers: dict[str, Problem] = {}
    for where, row in rows:
        text = row.get("problem") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UsageError(
                f"{where}: needs a {'row' if path.suffix == '.parquet' else 'JSON object'} with a text 'problem'"
            )
        if not isinstance(row.get("answer"), str | int | float) or not str(row["answer"]).strip():
            raise UsageError(f"{where}: needs an 'answer', text or number; a problem without one cannot be graded")
        accepted = row.get("accepted")
        if accepted is not None and not (accepted and isinstance(accepted, list) and all(map(_is_text, accepted))):
            raise UsageError(f"{where}: 'accepted' must be a list of texts, every completion that is correct")
        name = str(row.get("id") or f"{path.stem}/{content_hash(text)}")
        problem = Problem(
            id=name,
            prompt=text,
            answer=str(row["answer"]).strip(),
            task=str(row.get("subject") or row.get("source") or path.stem),
            level=str(row.get("level") or ""),
            accepted=tuple(accepted or ()),
        )
        other = answers.setdefault(content(text), problem)
        if other.answer != problem.answer:
            raise UsageError(
                f"{where}: the text of {name!r} also occurs as {other.id!r}, with the answer {other.answer!r} "
                f"instead of {problem.answer!r}; keep the right one"
            )
        if name in by_id:
            raise UsageError(f"{where}: the id {name!r} occurs twice; ids must be unique")
        by_id[name] = problem
    if not by_id:
        raise UsageError(f"{path} holds no problems")
    return list(by_id.values())


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _embedded(name: str, split: str) -> list[Problem]:
    if name == "ladder":
        return ladder_problems(split)
    cells = TESTBEDS.get(name, CELLS)
    if split == "train":
        problems = cell_problems("train", SIZES.get(name, SIZES["cells"]), 7, cells)
        return [without_answer(problem) for problem in problems] if name == "cells-dead" else problems
    per_level = dict.fromkeys(("easy", "middle", "hard"), 40 if split == "test" else 20)
    return cell_problems("test" if split == "test" else "validation", per_level, 8, cells)


def _without(train: list[Problem], test: list[Problem], name: str) -> list[Problem]:
    """Training problems that are not in the test set; in a file they are an error, in a public set left out."""
    held_out = {content(problem.prompt) for problem in test}
    kept = [problem for problem in train if content(problem.prompt) not in held_out]
    leaked = len(train) - len(kept)
    if leaked and name not in KNOWN:
        example = next(problem for problem in train if content(problem.prompt) in held_out)
        raise UsageError(
            f"{leaked} problems of test_data occur in data too, for example {example.prompt[:80]!r}; "
            "remove them from one of the files"
        )
    if leaked:
        tqdm.write(f"data set {name!r}: {leaked} of {len(train)} problems that occur in test_data left out")
    return kept


def _choose() -> str:
    return f"choose {', '.join(EMBEDDED_SETS)}, {', '.join(KNOWN)}, or give a .jsonl or .parquet file"


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
