"""Problems: what is asked, what counts as correct, and an id that never changes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gdro_llm.config import Config, UsageError


@dataclass(frozen=True)
class Problem:
    """One prompt with its gold answer."""

    id: str  # stable and unique: source + content, never a row number
    prompt: str  # the text the model continues
    answer: str  # gold answer, as text
    task: str = ""  # family of problems, for tables by task
    level: str = ""  # coarse difficulty ("easy", "middle", "hard"), for tables by level
    accepted: tuple[str, ...] = ()  # where finite: every completion graded correct, so that pass rates are exact


def load_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """Training and test problems of `config.data`, without overlap."""
    from gdro_llm.cells import cell_problems  # here, because it imports Problem from this module
    from gdro_llm.ladder import ladder_problems

    if config.data == "cells":
        train = cell_problems("train", {"easy": 100, "middle": 60, "hard": 25}, seed=7)
        test = cell_problems("test", {"easy": 40, "middle": 40, "hard": 40}, seed=8)
    elif config.data == "ladder":
        train, test = ladder_problems("train"), ladder_problems("test")
    else:
        if not config.test_data:
            raise UsageError("test_data must name a .jsonl file of held-out problems when data is a file")
        train, test = (
            read_jsonl(Path(config.data), config.template),
            read_jsonl(Path(config.test_data), config.template),
        )
        leaked = {p.prompt for p in train} & {p.prompt for p in test}
        if leaked:
            raise UsageError(
                f"{len(leaked)} problems of test_data stand in data too, for example {min(leaked)[:80]!r}; "
                "remove them from one of the files"
            )
    if len(train) < config.batch_size:
        raise UsageError(
            f"batch_size must be at most the {len(train)} problems of {config.data}, got {config.batch_size}"
        )
    if len(test) > config.test_problems:
        test = [
            test[i] for i in sorted(np.random.default_rng(0).choice(len(test), config.test_problems, replace=False))
        ]
    return train, test


def read_jsonl(path: Path, template: str = "{problem}") -> list[Problem]:
    """Problems of a JSON-lines file with `problem` and `answer`; `id`, `level` and `subject` are used if present.

    Without an `id` a problem is named by the hash of its text. An empty answer, a repeated id or a line that is not an
    object is an error that names the line.
    """
    if not path.is_file():
        raise UsageError(f"no data file {str(path)!r}; data is 'cells', 'ladder' or a .jsonl file")
    found: dict[str, Problem] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):  # problems may hold other line separators
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, parse_constant=_refuse)
        except ValueError as error:
            raise UsageError(f"{where}: not JSON ({error})") from error
        text = row.get("problem") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"{where}: needs a JSON object with a text 'problem'")
        if not isinstance(row.get("answer"), str | int | float) or not str(row["answer"]).strip():
            raise UsageError(f"{where}: needs an 'answer', text or number; a problem without one cannot be graded")
        name = str(row.get("id") or f"{path.stem}/{hashlib.sha256(text.encode()).hexdigest()[:16]}")
        if name in found:
            raise UsageError(f"{where}: the id {name!r} stands twice; ids must be unique")
        found[name] = Problem(
            id=name,
            prompt=template.replace("{problem}", text),
            answer=str(row["answer"]).strip(),
            task=str(row.get("subject") or row.get("source") or path.stem),
            level=str(row.get("level") or ""),
        )
    if not found:
        raise UsageError(f"{path} holds no problems")
    return list(found.values())


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
