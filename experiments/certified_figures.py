"""The figures and the table of `experiments.certified`."""

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.table import Table

from experiments.drawing import COLOURS, power, wrapped

# Bounds that coincide would hide each other: earlier lines are wider, later ones broken and on top of them.
LOOKS: dict[str, dict[str, Any]] = {
    "ball": {"color": COLOURS[5], "linewidth": 4.5, "linestyle": "-", "marker": "s", "markersize": 6},
    "box": {"color": COLOURS[1], "linewidth": 2.4, "linestyle": "--", "marker": "D", "markersize": 4},
    "sketch": {"color": "#1B1B1F", "linewidth": 1.2, "linestyle": "-", "marker": "o", "markersize": 2.5},
    "oracle": {"color": COLOURS[2], "linewidth": 1.6, "linestyle": ":", "marker": "^", "markersize": 4},
}
PEERS = {"Chunked": ("slower_than_certified", "^"), "Fused": ("fused_slower_than_certified", "o")}
COLUMNS = 5
Cell = dict[str, Any]


def figures(results: list[Cell]) -> dict[str, Figure]:
    """What is read, how loose bounds are, and the races, each a figure where it was measured."""
    looks, races = [x for x in results if "family" in x], [x for x in results if "label" in x]
    drawings = {}
    if looks:
        drawings = {"certified": _small_multiples(looks, read), "looseness": _small_multiples(looks, looseness)}
    return drawings | ({"races": raced(races)} if races else {})


def read(panel: Axes, name: str, cells: list[Cell]) -> None:
    """The share of keys read over temperature; of a model the mean of its layers, with a band over them."""
    _line(panel, name, cells, lambda cell: cell["oracle" if name == "oracle" else "read"])
    panel.set_ylim(-0.05, 1.05)


def looseness(panel: Axes, name: str, cells: list[Cell]) -> None:
    """The median of the bound over the error, of the rows for which something was left out."""
    _line(panel, name, cells, lambda cell: (cell["bound_over_error"] or {"median": np.nan})["median"])
    panel.set_yscale("log")


AXES: dict[Callable[[Axes, str, list[Cell]], None], str] = {read: "share of keys read", looseness: "bound / error"}


def _line(panel: Axes, name: str, cells: list[Cell], number: Callable[[Cell], float]) -> None:
    temperatures = sorted({cell["temperature"] for cell in cells})
    found = np.array([[number(x) for x in cells if x["temperature"] == t] for t in temperatures], np.float64)
    known = ~np.isnan(found).all(1)  # a mean over the layers that have one
    places, found = np.array(temperatures)[known], found[known]
    panel.plot(places, np.nanmean(found, 1), label=name, **LOOKS[name])
    panel.fill_between(
        places, np.nanmin(found, 1), np.nanmax(found, 1), color=LOOKS[name]["color"], alpha=0.15, linewidth=0
    )


def _small_multiples(looks: list[Cell], draw: Callable[[Axes, str, list[Cell]], None]) -> Figure:
    """A panel for each kind of inputs and direction, at the middle tolerance."""
    tolerances = sorted({x["tolerance"] for x in looks})
    middle = tolerances[len(tolerances) // 2]
    directions = list(dict.fromkeys(x.get("causal", False) for x in looks))
    kinds = list(dict.fromkeys(_kind(x) for x in looks))
    rows = -(-len(kinds) // COLUMNS)
    with mpl.rc_context({"font.size": 10}):
        drawing = Figure(figsize=(2.5 * COLUMNS, 2.35 * rows * len(directions) + 0.9), layout="constrained")
        blocks = drawing.subfigures(len(directions), 1, squeeze=False)[:, 0]
        for block, causal in zip(blocks, directions, strict=True):
            block.suptitle(f"{'causal' if causal else 'every key seen'}, tolerance {middle:g}", fontweight="bold")
            grid = block.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
            for panel in grid.flat[len(kinds) :]:
                panel.set_visible(False)
            for panel, kind in zip(grid.flat, kinds, strict=False):
                cells = [x for x in looks if (_kind(x), x.get("causal", False)) == (kind, causal)]
                _panel(panel, [x for x in cells if x["tolerance"] == middle], draw)
                panel.set_title(wrapped(kind), fontsize=10)
            for panel in grid[:, 0]:
                panel.set_ylabel(AXES[draw])
            if draw is looseness:
                loose = (x["bound_over_error"] for x in looks if x["tolerance"] == middle)
                grid[0, 0].set_ylim(1, 2 * max((x["median"] for x in loose if x), default=50))
        shown = {
            name: line for panel in drawing.axes for line, name in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        drawing.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=11)
    return drawing


def _kind(cell: Cell) -> str:
    """The kind of inputs; the layers of a model are one, of which a panel has the mean, and a band over them."""
    model, captured, _ = cell["family"].partition(" after")
    return f"model {model}, its layers" if captured else cell["family"]


def _panel(panel: Axes, cells: list[Cell], draw: Callable[[Axes, str, list[Cell]], None]) -> None:
    for bound in dict.fromkeys(x["bound"] for x in cells):
        those = [x for x in cells if x["bound"] == bound]
        draw(panel, bound, those)
    if draw is read:
        draw(panel, "oracle", those)
    elif not any(x["bound_over_error"] for x in cells):
        panel.text(0.5, 0.5, "nothing left out", ha="center", va="center", transform=panel.transAxes)
    temperatures = sorted({x["temperature"] for x in cells})
    panel.set_xscale("log", base=2)
    panel.set_xlim(temperatures[0] / 1.3, temperatures[-1] * 1.3)
    panel.set_xticks(temperatures[::2], [power(t) for t in temperatures[::2]])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.tick_params(labelbottom=True)
    panel.set_xlabel("temperature")
    panel.grid(alpha=0.25, color="#888888")


def raced(races: list[Cell]) -> Figure:
    """How many times longer exact attention takes than Certified, medians with quartiles; right of 1 it gains."""
    labels = [f"{race['label']}, T = {race['length']:,}" for race in races]
    with mpl.rc_context({"font.size": 10}):
        drawing = Figure(figsize=(8.6, 0.42 * len(races) + 1.5), layout="constrained")
        panel = drawing.subplots()
        for index, (name, (ratio, marker)) in enumerate(PEERS.items()):
            rows = [(place, race[ratio]) for place, race in enumerate(races) if ratio in race]
            if not rows:
                continue
            places, middle = [place + 0.24 * (index - 0.5) for place, _ in rows], [x["median"] for _, x in rows]
            below = [x["median"] - x["lower_quartile"] for _, x in rows]
            above = [x["upper_quartile"] - x["median"] for _, x in rows]
            style: Any = {"color": COLOURS[index], "marker": marker, "linestyle": "none", "capsize": 3}
            panel.errorbar(middle, places, xerr=(below, above), label=f"{name} / Certified", **style)
        panel.axvline(1, color="#555555", linewidth=1, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: power(ratio)))
        panel.set_yticks(range(len(labels)), labels)
        panel.invert_yaxis()
        panel.set_xlabel("time of exact attention / time of Certified (right of 1: Certified is faster)")
        panel.grid(axis="x", alpha=0.25, color="#888888")
        panel.spines[["top", "right"]].set_visible(False)
        drawing.legend(loc="outside upper center", ncols=len(PEERS), frameon=False)
    return drawing


def table(results: list[Cell]) -> Table:
    """The races for a terminal."""
    shown = Table("inputs", "T", "Certified, ms", *(f"{name}, ms" for name in PEERS), *PEERS, "work", title="medians")
    shown.caption = "the times of exact methods, and these over that of Certified"
    for race in (x for x in results if "label" in x):
        times = [race["seconds"].get(name) for name in ("Certified", *PEERS)]
        found = [race.get(ratio) for ratio, _ in PEERS.values()]
        numbers = (*(x and f"{1e3 * x['median']:.0f}" for x in times), *(x and f"{x['median']:.2f}" for x in found))
        shown.add_row(race["label"], str(race["length"]), *(x or "-" for x in numbers), f"{race['work']:.3f}")
    return shown
