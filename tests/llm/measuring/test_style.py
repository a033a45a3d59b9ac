"""One look: the figures of runs and of simulations share a base, and a figure has the same bytes at any time."""

import time

import matplotlib
import pytest
from matplotlib.figure import Figure

from gdro_llm.measuring.style import BASE, COLOURS, MARKERS, RUNS, image
from simulations.harness import STYLE


def draw() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [1, 0], label="$a")
    return figure


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_a_figure_has_the_same_bytes_at_any_time(kind, start, monkeypatch):
    """It does not say when it was made."""
    first = image(draw(), kind)
    assert first.startswith(start)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert image(draw(), kind) == first


def test_both_styles_are_the_base_and_more():
    """Nothing of it is changed, and every key is one of matplotlib's."""
    for style in (RUNS, STYLE):
        assert BASE.items() <= style.items()
        with matplotlib.rc_context(style):
            assert matplotlib.rcParams["axes.grid"]
    assert [entry["color"] for entry in STYLE["axes.prop_cycle"]] == COLOURS
    assert len(set(COLOURS)) == len(COLOURS) == len(MARKERS)
