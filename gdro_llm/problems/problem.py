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
    accepted: tuple[str, ...] = ()  # what grader "exact" takes for correct, where that is not the answer alone

    @property
    def correct(self) -> tuple[str, ...]:
        """Every completion that grader "exact" takes for correct, to the letter, leading blanks included.

        >>> Problem("sum", "Q: 3 + 4\\nA:", "7").correct, Problem("sum", "Q: 3 + 4\\nA:", "7", accepted=(" 7",)).correct
        (('7',), (' 7',))
        """
        return self.accepted or (self.answer,)
