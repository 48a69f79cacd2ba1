"""What all figures share: colours, panels, the axis of beta, and how a figure becomes a file."""

import html
import io
import math
import re
import textwrap
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.summary import Results

# Okabe and Ito, "Color Universal Design" (2008), without black and yellow, which vanish on one of the two papers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
INK = "#1b1b1f"
"""The colour of text and axes; the report replaces it by the reader's own."""

PAPER = "#fffffe"
"""The colour of a figure's ground in files of its own; the report leaves its own ground to be seen."""

COLUMNS = 4
"""Panels in a row, at most."""

STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 110,
    "figure.figsize": (7.2, 4.2),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "attention-lab",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def panels(
    count: int, *, width: float = 3.1, height: float = 2.9, columns: int = COLUMNS, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, at most `columns` in a row."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(width * columns, 4.2) + 0.8, height * rows + 0.4))
    grid = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for unused in grid[count:]:
        unused.set_visible(False)
    return figure, grid[:count]


def look(index: int) -> tuple[str, str]:
    """The colour and the marker of the series with this index."""
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def power(number: float) -> str:
    """A number in four digits; a power of two below 1 as the fraction that it is."""
    mantissa, exponent = math.frexp(number)
    if mantissa == 0.5 and exponent <= 0:
        return f"1/{2 ** (1 - exponent)}" if exponent > -12 else f"$2^{{{exponent - 1}}}$"
    return f"{number:.4g}"


def beta_axis(axes: Axes, betas: list[float]) -> None:
    """A logarithmic horizontal axis with a tick at each beta, or at every other where there are many."""
    axes.set_xscale("log", base=2)
    ticks = sorted({beta for beta in betas if beta > 0})
    axes.set_xticks(ticks[:: math.ceil(len(ticks) / 6)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: power(number)))
    axes.set_xlabel(r"$\beta$ = scale / temperature")
    axes.grid(alpha=0.25, color="#888888")


def level(axes: Axes, height: float, line: str, name: str) -> None:
    """A horizontal line that says what it is."""
    axes.axhline(height, linestyle=line, linewidth=1, color=INK)
    right = axes.get_yaxis_transform()  # 1 is the right end of the axis
    axes.text(1, height, name, va="bottom", ha="right", fontsize="small", transform=right, color=INK)


def legible(paper: Any) -> str:
    """The ink that can be read on a colour, given as red, green, blue and opacity from 0 to 1."""
    red, green, blue, _ = paper
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "#000000"


def beta_colours(results: Results) -> tuple[Colormap, Normalize]:
    """Colours for log2 beta, without the ends of viridis, which vanish on dark and on white paper."""
    middle = mpl.colormaps["viridis"](np.linspace(0.15, 0.9, 128))
    exponents = [math.log2(point["beta"]) for point in results["points"] if point["beta"] > 0] or [0.0]
    low, high = min(exponents), max(exponents)
    return LinearSegmentedColormap.from_list("beta", middle), Normalize(low, high if high > low else low + 1)


def drawn(draw: Callable[[Results], Figure], results: Results) -> dict[str, bytes]:
    """A figure as files, `{"svg": ..., "png": ...}`: the same results give the same bytes."""
    files = {}
    with mpl.rc_context(dict(mpl.rcParamsDefault) | STYLE):
        figure = draw(results)
        for kind, metadata in (("svg", {"Date": None}), ("png", {})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=metadata, facecolor=PAPER, dpi=160)
            files[kind] = buffer.getvalue()
    return files


def inlined(svg: bytes, name: str, description: str) -> str:
    """An SVG file as an element of a page: in the page's ink and on its paper, with identifiers of its own."""
    text = svg.decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)


def wrapped(label: str) -> str:
    """A label on lines of at most 30 characters."""
    return "\n".join(textwrap.wrap(label, 30)) or label
