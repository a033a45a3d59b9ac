"""A problem: what is asked, what counts as correct, and an id that never changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One prompt with its gold answer."""

    id: str  # stable and unique: source + content, never a row number
    prompt: str  # the text that the template of the configuration is put around
    answer: str  # gold answer, as text
    task: str = ""  # family of problems, for tables by task
    level: str = ""  # coarse difficulty ("easy", "middle", "hard"), for tables by level
    accepted: tuple[str, ...] = ()  # where finite: every completion graded correct, so that pass rates are exact
