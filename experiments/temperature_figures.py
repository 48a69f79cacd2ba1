"""The errors of methods over the temperature, as figures and as a table."""

import re
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.table import Table

from experiments.drawing import wrapped
from experiments.looks import family_of, legend_by_family, look_of

FILLS = ("full", "none", "left", "right")  # of the markers of one class's configurations
COLUMNS = 3
EXACT = 1e-5  # of the output's norm, below which errors are rounding, and are not drawn
BUDGETS = ("features", "k", "order", "blocks", "landmarks", "samples", "tolerance", "rounds", "window")
KINDS = ("coupling", "kind")
"""Fields of methods that labels have: the first of the former that there is, and all of the latter."""


def figure(results: list[dict[str, Any]]) -> Figure:
    """The error relative to the output's norm; methods that take more operations than exact attention are dashed. Of \
up to three kinds of operands the median error and the median bound (dotted) stand below, in radii of the values."""
    with mpl.rc_context({"font.size": 10}):
        return _with_bounds(results) if len(results) <= COLUMNS else _errors_alone(results)


def _with_bounds(results: list[dict[str, Any]]) -> Figure:
    drawing = Figure(figsize=(4.2 * len(results) + 0.6, 9.2), layout="constrained")
    grid = drawing.subplots(2, len(results), squeeze=False, sharex="col", sharey="row")
    labels = _labels(results, "relative_error", "bound_over_radius")
    for (above, below), result in zip(grid.T, results, strict=True):
        temperatures = result["temperatures"]
        for name, row, style in _lines(result):
            above.plot(temperatures, row["relative_error"], label=labels.get(name), **style)
            below.plot(temperatures, row["error_over_radius"], **style)
            if "bound_over_radius" in row:
                below.plot(temperatures, row["bound_over_radius"], **(style | {"linestyle": ":"}))
        for axes in (above, below):
            _scaled(axes)
        above.set_title(wrapped(result["operands"]), fontsize=10)
        below.set_xlabel("temperature")
    for axes in grid[:, 0]:
        axes.set_ylim(bottom=EXACT)  # once all have scaled to what is in them
    grid[0, 0].set_ylabel("|error| / |exact output|")
    grid[1, 0].set_ylabel("median error (bound: dotted) / radius of the values")
    legend_by_family(drawing, grid[0], fontsize=9)
    return drawing


def _errors_alone(results: list[dict[str, Any]]) -> Figure:
    rows = -(-len(results) // COLUMNS)
    drawing = Figure(figsize=(4.2 * COLUMNS + 0.6, 2.9 * rows + 1.8), layout="constrained")
    grid = drawing.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True)
    labels = _labels(results, "relative_error")
    for axes, result in zip(grid.flat, results, strict=False):
        for name, row, style in _lines(result):
            axes.plot(result["temperatures"], row["relative_error"], label=labels.get(name), **style)
        _scaled(axes)
        axes.set_title(wrapped(result["operands"]), fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("temperature")
    grid[0, 0].set_ylim(bottom=EXACT)
    for axes in grid[:, 0]:
        axes.set_ylabel("|error| / |exact output|")
    for unused in grid.flat[len(results) :]:
        unused.set_visible(False)
    legend_by_family(drawing, grid.flat[: len(results)], fontsize=9)
    return drawing


def _labels(results: list[dict[str, Any]], *quantities: str) -> dict[str, str]:
    """A label for each configuration that is seen: with its budget, where that does not differ between panels."""
    everywhere = set.intersection(*(set(result["methods"]) for result in results))
    rows = [pair for result in results for pair in result["methods"].items()]
    seen = dict.fromkeys(name for name, row in rows if any(max(row.get(x, [0])) >= EXACT for x in quantities))
    return {name: _short(name) if name in everywhere else f"{name.partition('(')[0]}, largest" for name in seen}


def _short(expression: str) -> str:
    """An expression of a method with its budget and kind alone."""
    name, _, fields = expression.partition("(")
    told = dict(re.findall(r"(\w+)=('\w+'|[\w.]+)", fields))
    budget = [f"{field}={told[field]}" for field in BUDGETS if field in told][:1]
    shown = ", ".join(budget + [told[field].strip("'") for field in KINDS if field in told])
    return f"{name}({shown})" if shown else name


def _lines(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, numbers and style of each method, families together."""
    drawn: list[str] = []
    for name, row in sorted(result["methods"].items(), key=lambda pair: (family_of(pair[0]), pair[0])):
        cls, costly = name.partition("(")[0], row["share_of_exact_operations"] > result["budget"]
        style = {"markersize": 5, "linewidth": 1.4, "fillstyle": FILLS[drawn.count(cls) % len(FILLS)]}
        drawn.append(cls)
        yield name, row, look_of(name) | style | {"linestyle": "--" if costly else "-"}


def _scaled(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:g}"))
    axes.grid(alpha=0.25)


def table(results: list[dict[str, Any]]) -> Table:
    """The relative errors for a terminal."""
    temperatures = results[0]["temperatures"]
    shown = Table("operands", "method", "work", *(f"T = {t:g}" for t in temperatures), title="relative error")
    for result in results:
        for name, row in result["methods"].items():
            numbers = (f"{error:.2g}" for error in row["relative_error"])
            shown.add_row(result["operands"], name, f"{row['share_of_exact_operations']:.2g}", *numbers)
    return shown
