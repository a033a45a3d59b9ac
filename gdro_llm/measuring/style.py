"""How every figure of the project looks, and its bytes: the same figure gives the same file."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito: colour-blind safe.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"]
MARKERS = "os^DvPX"
BASE: Any = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True,
    "legend.frameon": False,
}  # fmt: skip
# Figures of runs: their frame stays behind the curves, and a "$" in the name of a run is a dollar.
RUNS: Any = {
    **BASE, "axes.labelsize": 8.5, "axes.edgecolor": "#888", "axes.labelcolor": "#444", "axes.linewidth": 0.6,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.color": "#444", "ytick.color": "#444", "grid.linewidth": 0.6,
    "text.parse_math": False,
}  # fmt: skip
NO_METADATA: Any = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None}}


def image(figure: Figure, kind: str = "png") -> bytes:
    """The bytes of a PNG or PDF file, without the time at which it was made."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=160, metadata=NO_METADATA[kind])
    return buffer.getvalue()
