"""The figure and the table of `experiments.certified`."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from attention.sparse.bounds import REACH
from experiments.drawing import COLOURS, wrapped

LOOKS = dict(zip(REACH, COLOURS, strict=False))
COLUMNS = 4  # of the figure


def figure(results: list[dict[str, Any]]) -> Figure:
    """The share of keys read at the middle tolerance over temperature; below it the bound over the error, where some \
page was not read (medians)."""
    tolerances = sorted({x["tolerance"] for x in results if "family" in x})
    middle = tolerances[len(tolerances) // 2]
    families = list(dict.fromkeys(x["family"] for x in results if "family" in x))
    loose = [x["bound_over_error"]["median"] for x in results if x.get("bound_over_error")]
    bands = -(-len(families) // COLUMNS)
    drawing = Figure(figsize=(3.3 * COLUMNS, 5.6 * bands), layout="constrained")
    grid = drawing.subplots(2 * bands, COLUMNS, sharex=True, sharey="row", squeeze=False)
    for panel in grid.flat:
        panel.set_visible(False)
    for place, family in enumerate(families):
        row, column = 2 * (place // COLUMNS), place % COLUMNS
        upper, lower = grid[row, column], grid[row + 1, column]
        for panel in (upper, lower):
            panel.set_visible(True)
            panel.tick_params(labelbottom=True)
        _family(upper, lower, [x for x in results if x.get("family") == family and x["tolerance"] == middle])
        upper.set(title=wrapped(family), ylim=(-0.05, 1.05))
        lower.set_ylim(1, 2 * max(loose, default=1e3))
        if not column:
            upper.set_ylabel(f"keys read at {middle:g}")
            lower.set_ylabel("bound / error")
    grid[0, 0].legend(frameon=False, fontsize=8)
    return drawing


def _family(upper: Axes, lower: Axes, cells: list[dict[str, Any]]) -> None:
    """The two panels of one kind of inputs."""
    for bound in dict.fromkeys(x["bound"] for x in cells):
        those = [x for x in cells if x["bound"] == bound]
        temperatures = [x["temperature"] for x in those]
        upper.plot(temperatures, [x["read"] for x in those], color=LOOKS[bound], marker="o", label=bound)
        fired = [x for x in those if x["bound_over_error"]]
        loose = [x["bound_over_error"]["median"] for x in fired]
        lower.plot([x["temperature"] for x in fired], loose, color=LOOKS[bound], marker="o")
        oracle = [x["oracle"] for x in those]
    upper.plot(temperatures, oracle, color="#555555", linestyle="--", label="oracle")
    lower.set_xlabel("temperature")
    lower.set_xscale("log", base=2)
    lower.set_yscale("log")


def table(results: list[dict[str, Any]]) -> Table:
    """The races for a terminal."""
    shown = Table("inputs", "T", "Certified, ms", "Chunked, ms", "ratio", "work", title="medians")
    for race in (x for x in results if "label" in x):
        times = (f"{1e3 * race['seconds'][name]['median']:.0f}" for name in ("Certified", "Chunked"))
        ratio = f"{race['slower_than_certified']['median']:.2f}"
        shown.add_row(race["label"], str(race["length"]), *times, ratio, f"{race['work']:.3f}")
    return shown
