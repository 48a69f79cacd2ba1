"""A race: one cell measured, and all of them as a figure and as a table."""

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.table import Table

from experiments.contestants import Cell, Contestant, matrix_size
from experiments.drawing import COLOURS, wrapped
from experiments.timing import interleaved, ratios, spread

LOOKS = {
    "Chunked": (COLOURS[2], "^"),
    "jax.nn": (COLOURS[1], "s"),
    "PyTorch": (COLOURS[0], "o"),
    "PyTorch, our layout": (COLOURS[5], "v"),
}


def raced(cell: Cell, contestants: dict[str, Contestant], mine: str, rounds: int, limit: float) -> dict[str, Any]:
    """Times, ratios to `mine`, rates and temporaries of every contestant in one cell."""
    seconds = interleaved({name: one.call for name, one in contestants.items()}, rounds, limit)
    operations = dict.fromkeys(contestants, cell.operations) | {"matrix product": 2.0 * matrix_size() ** 3}
    rates = {name: spread([operations[name] / second / 1e9 for second in times]) for name, times in seconds.items()}
    result: dict[str, Any] = {
        "cell": cell._asdict(),
        "label": cell.label,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "gigaflops": rates,
        "slower_than_ours": ratios(seconds, mine),
        "temporaries": {name: one.temporaries for name, one in contestants.items()},
    }
    result["slower_than_ours"].pop("matrix product", None)  # another amount of work
    if "matrix product" in seconds:
        own, theirs = ([operations[name] / second for second in seconds[name]] for name in (mine, "matrix product"))
        result["share_of_matrix_product"] = spread([a / b for a, b in zip(own, theirs, strict=True)])
    return result


def figure(results: list[dict[str, Any]], mine: str) -> Figure:
    """How many times slower than ours each contestant is, over the length; bars span the quartiles."""
    labels = list(dict.fromkeys(result["label"] for result in results))
    drawing = Figure(figsize=(3.2 * len(labels) + 0.6, 3.4), layout="constrained")
    panels = drawing.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for panel, label in zip(panels, labels, strict=True):
        cells = [result for result in results if result["label"] == label]
        for i, name in enumerate(_contestants(cells, "slower_than_ours")):
            those = [result for result in cells if name in result["slower_than_ours"]]
            lengths = [result["cell"]["length"] for result in those]
            found = [result["slower_than_ours"][name] for result in those]
            middle = [ratio["median"] for ratio in found]
            below = [ratio["median"] - ratio["lower_quartile"] for ratio in found]
            above = [ratio["upper_quartile"] - ratio["median"] for ratio in found]
            colour, marker = LOOKS.get(name, (mpl.colormaps["cividis"](i / 9), "os^Dv"[i % 5]))
            panel.errorbar(lengths, middle, (below, above), color=colour, marker=marker, label=name, capsize=2)
        panel.axhline(1, color="#555555", linewidth=1, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        panel.set_title(wrapped(label), fontsize=10)
        panel.set_xlabel("length (tokens)")
    panels[0].set_ylabel(f"time / time of {mine} (ratio)")
    known: set[str] = set()
    for panel in panels:  # a legend where someone races who is in none before
        names = set(panel.get_legend_handles_labels()[1])
        if names - known:
            panel.legend(frameon=False, fontsize=8)
        known |= names
    return drawing


def _contestants(results: list[dict[str, Any]], quantity: str) -> list[str]:
    """All who raced anywhere, in their order."""
    return list(dict.fromkeys(name for result in results for name in result[quantity]))


def table(results: list[dict[str, Any]], mine: str) -> Table:
    """The same numbers for a terminal."""
    names = _contestants(results, "seconds")
    shown = Table("cell", "T", *(f"{name}, ms" for name in names), "temporaries, MiB", title="medians")
    for result in results:
        seconds = result["seconds"]
        times = (f"{1e3 * seconds[name]['median']:.1f}" if name in seconds else "-" for name in names)
        room = result["temporaries"][mine]
        shown.add_row(
            result["label"], str(result["cell"]["length"]), *times, "?" if room is None else f"{room / 2**20:.1f}"
        )
    return shown
