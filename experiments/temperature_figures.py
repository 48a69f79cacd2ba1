"""The errors of methods over the temperature, as figures and as a table."""

from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.table import Table

from experiments.drawing import COLOURS, MARKERS

# A colour a method: those of the other figures, and six between them.
PALETTE = (*COLOURS, "#5B2C83", "#7F7F7F", "#8C4A2F", "#1B1B1F", "#A6A000", "#B2182B")
FILLS = ("full", "none", "left")  # of the markers of one class's configurations
COLUMNS = 3
EXACT = 1e-5  # of the output's norm, below which errors are rounding and are not drawn where they stand alone
TITLE = "operations of each method / those of exact attention"


def figure(results: list[dict[str, Any]]) -> Figure:
    """The error relative to the output's norm, methods beyond the budget dashed. Of up to three kinds of operands the \
median error (lines) and the median bound (dotted) stand below, in radii of the values."""
    return _with_bounds(results) if len(results) <= COLUMNS else _errors_alone(results)


def _with_bounds(results: list[dict[str, Any]]) -> Figure:
    drawing = Figure(figsize=(6.2 * len(results), 10), layout="constrained")
    grid = drawing.subplots(2, len(results), squeeze=False, sharex="col")
    for (above, below), result in zip(grid.T, results, strict=True):
        temperatures = result["temperatures"]
        for label, row, style in _lines(result, _classes(results)):
            above.plot(temperatures, row["relative_error"], label=label, **style)
            below.plot(temperatures, row["error_over_radius"], **style)
            if "bound_over_radius" in row:
                below.plot(temperatures, row["bound_over_radius"], **(style | {"linestyle": ":"}))
        for axes in (above, below):
            _scaled(axes)
        above.set_title(result["operands"], fontsize=10)
        above.set_ylabel("|error| / |exact output|")
        below.set_ylabel("median error (bound: dotted) / radius of the values")
        below.set_xlabel("temperature")
        below.legend(
            *above.get_legend_handles_labels(),
            title=TITLE,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            frameon=False,
            fontsize=8,
            title_fontsize=8,
        )
    return drawing


def _errors_alone(results: list[dict[str, Any]]) -> Figure:
    rows = -(-len(results) // COLUMNS)
    drawing = Figure(figsize=(4.4 * COLUMNS, 3.1 * rows + 2.2), layout="constrained")
    grid = drawing.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True)
    for axes, result in zip(grid.flat, results, strict=False):
        for label, row, style in _lines(result, _classes(results)):
            axes.plot(result["temperatures"], row["relative_error"], label=label, **style)
        _scaled(axes)
        axes.set_ylim(bottom=EXACT)
        axes.set_title(result["operands"], fontsize=10)
        axes.set_xlabel("temperature")
    for axes in grid[:, 0]:
        axes.set_ylabel("|error| / |exact output|")
    for unused in grid.flat[len(results) :]:
        unused.set_visible(False)
    labelled = {
        name: handle for axes in grid.flat for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    drawing.legend(
        list(labelled.values()),
        list(labelled),
        title=TITLE,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    return drawing


def _classes(results: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name.partition("(")[0] for result in results for name in result["methods"]))


def _lines(result: dict[str, Any], classes: list[str]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Label, numbers and style of each method."""
    drawn: list[int] = []
    for name, row in result["methods"].items():
        place, share = classes.index(name.partition("(")[0]), row["share_of_exact_operations"]
        style = {
            "color": PALETTE[place % len(PALETTE)],
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 4,
            "fillstyle": FILLS[drawn.count(place) % len(FILLS)],
            "linestyle": "-" if share <= result["budget"] else "--",
        }
        drawn.append(place)
        yield f"{name}: {share:.2g}", row, style


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
