"""Tables as text: what is given is shown, every line has every column, numbers stand on the right."""

from hypothesis import given
from hypothesis import strategies as st

from gdro_llm.measuring.tables import aligned, aligned_markdown, latex, markdown, with_interval

CELL = st.text("abc 0.5×%_—", max_size=6)
TABLE = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(CELL, min_size=width, max_size=width), min_size=1, max_size=4)
)


@given(TABLE)
def test_markdown_has_the_cells_of_the_table(rows):
    """Split at the bars, plain and aligned; the rule is the second line."""
    sides = ("<" + ">" * len(rows[0]))[: len(rows[0])]
    for text, rule in ((markdown(rows, sides), {"---", "---:"}), (aligned_markdown(rows, sides), None)):
        lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.split("\n")]
        assert [lines[0], *lines[2:]] == [[cell.strip() for cell in row] for row in rows]
        assert len(lines[1]) == len(rows[0])
        assert all(len(cell) >= 3 and set(cell) <= set("-:") for cell in lines[1])
        assert rule is None or set(lines[1]) <= rule
    assert len({len(line) for line in aligned_markdown(rows, sides).split("\n")}) == 1


@given(TABLE)
def test_columns_for_a_terminal_have_one_width(rows):
    """Words end with blanks, numbers begin with them."""
    sides = ("<" + ">" * len(rows[0]))[: len(rows[0])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    for line, row in zip(aligned(rows, sides).split("\n"), rows, strict=True):
        expected = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        assert line == "  ".join(expected).rstrip()


def test_latex_escapes_what_it_would_take_for_its_own():
    """Per cent, underscore and the multiplication sign."""
    text = latex([["a_b", "share, %"], ["c", "2 ×"]], "<>", "made up")
    assert text.split("\n") == [
        "% made up",
        r"\begin{tabular}{lr}",
        r"\hline",
        r"a\_b & share, \% \\",
        r"c & 2 $\times$ \\",
        r"\hline",
        r"\end{tabular}",
    ]


def test_an_interval_stands_behind_its_number_in_the_same_format():
    """With and without a sign."""
    assert with_interval(0.12345, -0.5, 1, ".3f") == "0.123 [-0.500, 1.000]"
    assert with_interval(9.06, -3.95, 14.36, "+.1f") == "+9.1 [-4.0, +14.4]"
