"""The two forms in which studies show their summaries: small multiples of curves with bands, and heat maps."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from experiments.drawing import COLOURS, INK, legible, look, panels, power, wrapped

Summary = Sequence[dict[str, Any]]


def chosen(summary: Summary, **axes: Any) -> list[dict[str, Any]]:
    """The rows that have these values on these axes."""
    return [row for row in summary if all(row["axes"].get(name) == value for name, value in axes.items())]


def values(summary: Summary, axis: str) -> list[Any]:
    """The values that the rows have on an axis, each once, in their order."""
    return list(dict.fromkeys(row["axes"][axis] for row in summary if axis in row["axes"]))


def curves(
    axes: Axes,
    summary: Summary,
    x: str,
    number: str,
    line: str,
    names: Sequence[Any] | None = None,
    style: Callable[[Any], dict[str, Any]] | None = None,
) -> None:
    """The mean of a number over the axis `x`, a line for each value of the axis `line`, with a band over all seeds.

    A line has a gap where there is no mean. Panels that are given the same `names` show a name alike, whether or not
    all of them have it; with a `style` it is that of the name.
    """
    for index, name in enumerate(values(summary, line) if names is None else names):
        rows = sorted(chosen(summary, **{line: name}), key=lambda row: row["axes"][x])
        rows = [row for row in rows if number in row["numbers"]]
        places = [row["axes"][x] for row in rows]
        mean, low, high = (
            np.array([row["numbers"][number][key] for row in rows], np.float64) for key in ("mean", "low", "high")
        )
        looks: dict[str, Any] = {"markersize": 4, "linewidth": 1.3} | (style(name) if style else _look(index))
        axes.plot(places, mean, label=wrapped(str(name)), **looks)
        axes.fill_between(places, low, high, color=looks["color"], alpha=0.18, linewidth=0)
    axes.grid(alpha=0.25, color="#888888")


def _look(index: int) -> dict[str, Any]:
    """Lines after those of the six colours are broken, so that none looks like another."""
    colour, marker = look(index)
    return {"color": colour, "marker": marker, "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3]}


def powers(axes: Axes, places: Iterable[float], label: str) -> None:
    """A logarithmic horizontal axis with a tick at each of the places."""
    ticks = sorted(set(places))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [power(tick) if tick < 1 else f"{tick:,.10g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def keys_below(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """The names of the lines of a panel, below all of them."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), columns), fontsize="small")


def heat_maps(
    summary: Summary, panel: str, down: str, across: str, number: str, label: str, shown: Callable[[Any], str] = str
) -> Figure:
    """The mean of a number on two axes, a panel for each value of the axis `panel`; below it the spread over seeds."""
    means = [row["numbers"][number]["mean"] for row in summary if row["numbers"][number]["mean"] is not None]
    colours = ScalarMappable(Normalize(min(means), max(means)), mpl.colormaps["cividis"])
    figure, grid = panels(len(values(summary, panel)), width=3.6, height=3.3)
    for axes, name in zip(grid, values(summary, panel), strict=True):
        rows = chosen(summary, **{panel: name})
        places, columns = values(rows, down), values(rows, across)
        for row in rows:
            _cell(axes, row, places.index(row["axes"][down]), columns.index(row["axes"][across]), number, colours)
        axes.set(xlim=(0, len(columns)), ylim=(len(places), 0), xlabel=across, ylabel=down, title=wrapped(str(name)))
        axes.set_xticks(np.arange(len(columns)) + 0.5, [shown(value) for value in columns])
        axes.set_yticks(np.arange(len(places)) + 0.5, [shown(value) for value in places])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.colorbar(colours, ax=grid, label=label, shrink=0.85)
    return figure


def _cell(axes: Axes, row: dict[str, Any], down: int, across: int, number: str, colours: ScalarMappable) -> None:
    found = row["numbers"][number]
    mean = math.nan if found["mean"] is None else found["mean"]
    text, ink = "diverged", INK
    if not math.isnan(mean):
        paper = colours.to_rgba(np.asarray(mean))
        axes.add_patch(Rectangle((across, down), 1, 1, facecolor=paper, edgecolor=paper))
        spread = f"\n±{found['deviation']:.2f}" if row["seeds"] > 1 else ""
        text, ink = f"{mean:.2f}{spread}", legible(paper)
    axes.text(across + 0.5, down + 0.5, text, ha="center", va="center", color=ink, fontsize=8)


def intervals(axes: Axes, summary: Summary, down: str, number: str) -> None:
    """The mean of a number for each value of an axis, one below the other, with a line over all seeds."""
    names = values(summary, down)
    for index, name in enumerate(names):
        (row,) = chosen(summary, **{down: name})
        found = row["numbers"][number]
        colour, marker = look(index)
        axes.plot([found["low"], found["high"]], [index, index], color=colour, linewidth=3, alpha=0.35)
        axes.plot(found["mean"], index, color=colour, marker=marker)
    axes.set_yticks(range(len(names)), [wrapped(str(name)) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25, color="#888888")


def best(summary: Summary, axis: str, number: str) -> list[dict[str, Any]]:
    """For each value of the other axes the row where the mean of a number is highest, without the axis."""
    found: dict[Any, dict[str, Any]] = {}
    for row in summary:
        others = {name: value for name, value in row["axes"].items() if name != axis}
        kept = found.setdefault(tuple(others.items()), row | {"axes": others})
        mean, highest = row["numbers"][number]["mean"], kept["numbers"][number]["mean"]
        if mean is not None and (highest is None or mean > highest):
            kept |= {"numbers": row["numbers"]}
    return list(found.values())
