"""The figure of probes: what methods would get wrong in each head of the models of a sweep."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import beta_axis, look, wrapped
from experiments.summary import Point, Results, labels, points_of

ERROR, BOUND = "error of ", "bound of "


def probed(results: Results) -> tuple[str, list[str]]:
    """The program whose models the figure is about, exact attention's if it has probes, and the methods they try."""
    found = {}
    for key in results["programs"]:
        names = [name for point in points_of(results, key) for x in point["evaluations"] for name in x]
        if methods := [name.removeprefix(ERROR) for name in dict.fromkeys(names) if name.startswith(ERROR)]:
            found[key] = methods
    first = next((key for key in found if results["programs"][key]["reference"]), next(iter(found), ""))
    return first, found.get(first, [])


def probe_errors(results: Results) -> Figure:
    """Error of methods in the place of exact attention on a model's own queries, keys and values, relative to the \
exact output (lines), and what their certificates say (dotted), a panel a head; after training over beta, or over the \
steps where there is one beta. Means over seeds."""
    program, methods = probed(results)
    points = [point for point in points_of(results, program) if point["diverged_at"] is None]
    over_beta = len({point["beta"] for point in points}) > 1
    layers, heads = np.shape(_series(points, ERROR + methods[0], over_beta)[1])[1:]
    figure = Figure(figsize=(0.8 + 2.3 * heads, 1.2 + 2.0 * layers))
    grid = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    for index, method in enumerate(methods):
        for kind, line in ((ERROR, "-"), (BOUND, ":")):
            places, table = _series(points, kind + method, over_beta)
            for (layer, head), axes in np.ndenumerate(grid):
                if places:
                    _line(axes, places, table[:, layer, head], index, line, wrapped(method) if line == "-" else None)
    for (layer, head), axes in np.ndenumerate(grid):
        axes.set_title(f"layer {layer}, head {head}", fontsize=9)
        axes.set_yscale("log")
        axes.grid(alpha=0.25, color="#888888")
        if over_beta:
            beta_axis(axes, [point["beta"] for point in points if point["beta"] > 0])
        axes.set_xlabel((r"$\beta$" if over_beta else "step") if layer == layers - 1 else "")
    figure.supylabel("error / exact output", fontsize=10)
    figure.suptitle(wrapped(labels(results)[program]), fontsize=10)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3), fontsize="small")
    return figure


def _line(axes: Axes, places: Sequence[float], numbers: Any, index: int, line: str, label: str | None) -> None:
    colour, marker = look(index)
    axes.plot(places, numbers, line, color=colour, marker=marker, markersize=3, linewidth=1.1, label=label)


def _series(points: Sequence[Point], name: str, over_beta: bool) -> tuple[list[float], np.ndarray]:
    """Where a number was measured, and its mean over the points there, places x layers x heads."""
    found: dict[float, list[Any]] = {}
    for point in points:
        for evaluation in point["evaluations"][-1:] if over_beta else point["evaluations"]:
            if name in evaluation:
                found.setdefault(point["beta"] if over_beta else evaluation["step"], []).append(evaluation[name])
    places = [place for place in sorted(found) if place > 0 or not over_beta]
    # None, where a number was not finite, becomes NaN, and a gap.
    return places, np.array([np.mean(np.array(found[place], np.float64), axis=0) for place in places])
