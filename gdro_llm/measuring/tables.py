"""Tables as text: Markdown, LaTeX and aligned columns for a terminal. The first row is the header, cells are texts.

`sides` has a character a column: "<" for words, aligned on the left, ">" for numbers, on the right.
"""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def with_interval(value: float, low: float, high: float, form: str) -> str:
    """A number with its interval in brackets, all in one format.

    >>> with_interval(1.25, -0.5, 3, "+.1f")
    '+1.2 [-0.5, +3.0]'
    """
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def line(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def markdown(rows: Rows, sides: str) -> str:
    """A Markdown table.

    >>> print(markdown([["method", "pass"], ["a", "0.5"]], "<>"))
    | method | pass |
    | --- | ---: |
    | a | 0.5 |
    """
    rule = ["---" if side == "<" else "---:" for side in sides]
    return "\n".join(map(line, [rows[0], rule, *rows[1:]]))


def aligned_markdown(rows: Rows, sides: str) -> str:
    """A Markdown table that can be read in a terminal too.

    >>> print(aligned_markdown([["method", "pass"], ["a", "0.5"]], "<>"))
    | method | pass |
    | ------ | ---: |
    | a      |  0.5 |
    """
    padded = _padded(rows, sides, least=3)
    widths = zip(map(len, padded[0]), sides, strict=True)
    rule = ["-" * width if side == "<" else "-" * (width - 1) + ":" for width, side in widths]
    return "\n".join(map(line, [padded[0], rule, *padded[1:]]))


def aligned(rows: Rows, sides: str) -> str:
    """Columns for a terminal, two spaces apart.

    >>> print(aligned([["method", "pass"], ["a", "0.5"]], "<>"))
    method  pass
    a        0.5
    """
    return "\n".join("  ".join(row).rstrip() for row in _padded(rows, sides, least=0))


def latex(rows: Rows, sides: str, caption: str) -> str:
    """A LaTeX tabular, with the caption as a comment above it."""
    columns = sides.replace("<", "l").replace(">", "r")
    body = [" & ".join(row).replace("%", r"\%").replace("_", r"\_").replace("×", r"$\times$") for row in rows]
    head = [f"% {caption}", rf"\begin{{tabular}}{{{columns}}}", r"\hline"]
    return "\n".join([*head, *(rf"{row} \\" for row in body), r"\hline", r"\end{tabular}"])


def _padded(rows: Rows, sides: str, least: int) -> list[list[str]]:
    """The cells, each as wide as the widest of its column and at least `least`."""
    widths = [max(least, *map(len, column)) for column in zip(*rows, strict=True)]
    return [[f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in rows]
